"""Files that are written: whole or not at all, and never over what belongs to the user."""
import contextlib
import mmap
import os
import stat
import tempfile
from typing import Callable, Iterator

from errors import UserError


def check_output(path: str, is_ours: Callable[[str], bool], flag: str = '',
                 what: str = 'file of this kind') -> None:
    """A UserError unless a file can be written there: in place of nothing, or of a regular file
    that is_ours, which is what the message calls it. What a link points to is replaced."""
    name, target = f'{flag} {path}'.strip(), os.path.realpath(path)
    try:
        # (a shell may have sent those of a process to any file)
        is_stream = os.path.abspath(path).startswith(('/dev/std', '/dev/fd/', '/proc/'))
        if is_stream or os.path.lexists(target):
            if is_stream or not stat.S_ISREG(os.stat(target).st_mode):
                raise UserError(f'{name}: is no regular file: nothing there is replaced')
            if os.path.getsize(target) and not is_ours(target):
                raise UserError(f'{name}: is there, and is no {what}: it is not replaced')
        tempfile.TemporaryFile(dir=os.path.dirname(target)).close()
    except OSError as error:
        raise UserError(f'{name}: cannot be written: {error.strerror}')


def contains(mark: bytes) -> Callable[[str], bool]:
    """Whether a file has these bytes in it: a predicate on paths."""
    def is_ours(path):
        with open(path, 'rb') as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(mark) >= 0
    return is_ours


@contextlib.contextmanager
def replace(path: str) -> Iterator[str]:
    """Yield the name, of the same ending, of a temporary file beside a file, which it replaces once
    it is written."""
    folder, name = os.path.split(os.path.realpath(path))
    temporary = os.path.join(folder, f'.{os.getpid()}-{name}')
    try:
        yield temporary
        with open(temporary, 'rb') as f:
            os.fsync(f.fileno())
        os.replace(temporary, os.path.join(folder, name))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
