"""Messages in memory that sender and receiver share, so that a socket carries only references.

A socket copies a message into the kernel and out of it again, which costs more than all else that
happens to a large one. Here the sender writes it into a file that is in memory only, and sends a
frame that no message of zmq_ops can be, in native byte order:

    int32 -1, int32 pid, int32 memory, int32 released, int64 inode, int64 size

`memory` and `released` are descriptors of the process pid: of the file, whose inode and size tell
that it is the right one, and of a pipe, into which the receiver writes a byte when it needs the
message no more. The receiver opens them under /proc, so it must be on the same host, of the same
user, and in the same PID namespace (container). Its side is shared.h for the op, and
fetch_message() for Python. Needs NumPy only.
"""
import collections
import contextlib
import ctypes
import mmap
import os
import stat
import struct
import tempfile

from .serialize import new_message

__all__ = ['SharedMessages', 'fetch_message']

REFERENCE = struct.Struct('=iiiiqq')

_Slot = collections.namedtuple('_Slot', ['specs', 'file', 'frame', 'arrays'])


class SharedMessages:
    """The sender's messages, of which at most `count` exist at a time, used in turns.

    They are meant for one receiver, which reads them in the order in which they were made.

    Args:
        count (int): at least 1.
    """

    def __init__(self, count):
        self._slots = collections.deque([None] * count, count)  # the oldest first
        self._released, self._release = [os.fdopen(fd, mode, 0)
                                         for fd, mode in zip(os.pipe(), ('rb', 'wb'))]

    def new_message(self, specs):
        """Wait until the receiver has released the oldest message, and make the next in its place.

        Args:
            specs: a list of (shape, dtype).

        Returns:
            bytes: the frame to send, when the arrays are written.
            list of np.ndarray: views into the message, one for each spec, uninitialised.

        Raises:
            TypeError, ValueError: as serialize.new_message().
            OSError: there is no memory.
        """
        slot = self._slots[0]
        if slot is not None:
            self._released.read(1)
            self._slots[0] = None
            if slot.specs != specs:
                slot = None  # its memory goes before other comes
        if slot is None:
            slot = self._new_slot(specs)
        self._slots.append(slot)  # and the oldest goes
        return slot.frame, slot.arrays

    def _new_slot(self, specs):
        file = _open_memory()

        def allocate(size):
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # or writing to it would be a SIGBUS
            except OSError as error:
                raise OSError(error.errno, error.strerror,
                              f'{size} bytes of shared memory') from error
            return mmap.mmap(file.fileno(), size)
        message, arrays = new_message(specs, allocate)
        frame = REFERENCE.pack(-1, os.getpid(), file.fileno(), self._release.fileno(),
                               os.fstat(file.fileno()).st_ino, len(message))
        return _Slot(specs, file, frame, arrays)


def _open_memory():
    """A file without a name, in memory."""
    try:
        # os.memfd_create() is there from Python 3.8 on
        fd = ctypes.CDLL(None, use_errno=True).memfd_create(b'zmq_ops', 1)  # MFD_CLOEXEC
    except AttributeError:  # glibc before 2.27
        fd = -1
    return open(fd, 'r+b', 0) if fd >= 0 else tempfile.TemporaryFile(buffering=0, dir='/dev/shm')


def fetch_message(frame):
    """Copy the message that a frame refers to, and release it.

    Args:
        frame: bytes-like.

    Returns:
        bytes-like: the message; the frame itself if it is no reference.

    Raises:
        OSError: the sender is gone, or cannot be seen.
    """
    if len(frame) != REFERENCE.size or REFERENCE.unpack(frame)[0] != -1:
        return frame
    _, pid, memory, released, inode, size = REFERENCE.unpack(frame)
    with _open_descriptor(pid, released, os.O_WRONLY) as pipe, \
            _open_descriptor(pid, memory, os.O_RDONLY) as file:
        is_pipe = stat.S_ISFIFO(os.fstat(pipe.fileno()).st_mode)
        status = os.fstat(file.fileno())
        if not is_pipe or not stat.S_ISREG(status.st_mode) or (
                status.st_ino, status.st_size) != (inode, size):
            raise OSError(f'/proc/{pid}/fd/{memory} is not the message')
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as message:
            copy = message[:]
        with contextlib.suppress(OSError):  # nobody is there to write over it
            pipe.write(b'\0')
    return copy


def _open_descriptor(pid, number, flags):
    """A descriptor of another process, as a file; it is neither emptied nor waited for."""
    path = f'/proc/{pid}/fd/{number}'
    return os.fdopen(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY),
                     'rb' if flags == os.O_RDONLY else 'wb', 0)
