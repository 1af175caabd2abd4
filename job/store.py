"""A request to the key-value store that ranks meet in: horovodrun's, or rendezvous.py's."""
import http.client
import json


def request(server, method, path, value=None, timeout=5.):
    """Write or read a value of the store at `server`, (host, port); a missing one is None. Takes
    `timeout` seconds at most, and lets OSError and http.client.HTTPException through."""
    connection = http.client.HTTPConnection(*server, timeout=timeout)
    try:
        connection.request(method, path, value and json.dumps(value))
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    return json.loads(content) if method == 'GET' and response.status == 200 else None
