"""What a user can mend, in one line; job/start.py shows it."""
import re
from typing import Sequence


class UserError(ValueError):
    """The message names the file, flag or number that is wrong. No message: it has been shown."""


def printable(name: str) -> str:
    """A name for a message: control characters, as of lines and terminals, are '?'; but no tab."""
    return re.sub('[\0-\x08\n-\x1f\x7f-\x9f]', '?', name)


def enumerate_some(items: Sequence[str], separator: str = ', ') -> str:
    """The first six, and how many more."""
    more = [f'and {len(items) - 6} more'] if len(items) > 6 else []
    return separator.join([*items[:6], *more])


def one_line(error: Exception) -> str:
    """The reason in an error of TensorFlow. TensorFlow 2 first says where the graph was made, and
    then `Node: name`."""
    text = re.split('^Node: .*\n', error.message, maxsplit=1, flags=re.MULTILINE)[-1]
    return re.sub(r'\A\d+ root error\(s\) found\.\s*', '', text).split('\n')[0]
