#!/usr/bin/env python
"""The rendezvous server of a job that horovodrun has not started: Horovod's own key-value store.
launcher.py starts it on rank 0's host; it ends when the lifeline does, that is, with rank 0.

    rendezvous.py LIFELINE SCOPE TOKEN PORT...

It listens on the first port that is free, says which, and answers `GET SCOPE job` with the token.
"""
import contextlib
import json
import os
import signal
import sys
import threading
import urllib.request

from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer
from signals import SIGNALS  # (lies beside this script)


def listen(ports, scope, token):
    for port in ports:
        try:
            return RendezvousHTTPServer(('', port), RendezvousHandler, verbose=0)
        except OSError as error:
            problem = f'port {port}: {error.strerror}'
        with contextlib.suppress(OSError, ValueError):
            url = f'http://127.0.0.1:{port}{scope}job'
            if json.load(urllib.request.urlopen(url, timeout=5)) == token:
                problem = f'another job that calls itself {token} uses port {port}'
                break
    print(problem)
    sys.exit(1)


def main(lifeline, scope, token, *ports):
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # launchers send them to all; rank 0 decides
    server = listen(map(int, ports), scope, token)
    server.daemon_threads = True
    server.cache[scope.strip('/')] = {'job': json.dumps(token).encode()}
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.read(int(lifeline), 1)


if __name__ == '__main__':
    main(*sys.argv[1:])
