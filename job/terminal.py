"""A line on a terminal that is drawn again and again; without a terminal, nothing.

The line is below the cursor, which goes back. So whatever horovodrun, other ranks or the data
server write there, at any time, begins in an empty line.
"""
import contextlib
import os
import re

# '\v' goes down as '\n' does, but a terminal's driver leaves it alone
DRAW, CLEAR = '\x1b[J\v\r{}\r\x1b[A', '\x1b[J'
DRAWN = re.compile(re.escape(DRAW).replace(re.escape('{}'), '([^\r]*)'))


def read_stat(pid):
    """Of a process: its parent, its process group, its controlling terminal's device, and that
    terminal's foreground group."""
    with open(f'/proc/{pid}/stat', errors='replace') as f:
        words = f.read().rpartition(')')[2].split()
    return int(words[1]), int(words[2]), int(words[4]), int(words[5])


def find_horovodrun():
    """The nearest ancestor that runs horovodrun, to whose pipes ranks write; None without one."""
    pid = os.getppid()
    while pid:
        with open(f'/proc/{pid}/cmdline', errors='replace') as f:
            words = f.read().split('\0')[:2]  # an interpreter and its script
        if 'horovodrun' in map(os.path.basename, words):
            return pid
        pid = read_stat(pid)[0]


class Terminal:
    """The terminal that is a process's stderr: this one's or, `of_horovodrun`, its horovodrun's."""

    def __init__(self, of_horovodrun=False):
        self._fd, self._drawn = None, False
        with contextlib.suppress(OSError):
            self._open('self')
            horovodrun = find_horovodrun() if of_horovodrun and self._fd is None else None
            if horovodrun:
                self._open(horovodrun)

    def _open(self, pid):
        self._pid, path = pid, f'/proc/{pid}/fd/2'
        if os.environ.get('TERM', '') in ('', 'dumb') or os.readlink(path)[:5] != '/dev/':
            return
        # opened anew: writing never waits (for Ctrl-S, or a lost connection), that of others may
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        if os.isatty(fd):
            self._fd = fd
        else:
            os.close(fd)

    def show(self, line=None) -> bool:
        """Draw the line, or clear it; returns whether anybody can see it."""
        if self._fd is None:
            return False
        try:
            columns = os.get_terminal_size(self._fd).columns or 80  # 0: nobody has said how many
            _, group, device, foreground = read_stat(self._pid)
            in_background = device == os.fstat(self._fd).st_rdev and group != foreground
            if columns < 40 or in_background:
                return False
            self._drawn = line is not None
            text = DRAW.format(line[:columns - 1]) if self._drawn else CLEAR
            with contextlib.suppress(BlockingIOError):
                os.write(self._fd, text.encode())
            return True
        except OSError:  # the terminal has gone, or the process
            os.close(self._fd)
            self._fd = None
            return False

    def clear(self) -> None:
        if self._drawn:
            self.show()

    def close(self) -> None:
        """Clear the line; the last that is shown."""
        self.clear()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
