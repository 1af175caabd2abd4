"""Terminals, and what people see on them."""
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios

from commands import ROOT

CONTROL = re.compile('(\r|\n|\v|\x1b\\[J|\x1b\\[A)')


def open_terminal(columns=100):
    """(this side, the processes' side)"""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('4H', 24, columns, 0, 0))
    return ours, theirs


def start_on(theirs, words, added=None, **kwargs):
    """subprocess.Popen of a command whose controlling terminal, and streams, that is; added: to
    its environment."""
    streams = {'stdin': theirs, 'stdout': theirs, 'stderr': theirs}
    env = dict(os.environ, TERM='xterm', PYTHONPATH=ROOT)
    env.update(added or {})
    return subprocess.Popen(
        words, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        env=env, **dict(streams, **kwargs))


def run_on_terminal(words, columns=100, added=None, **kwargs):
    """All that a command writes to a terminal of its own; the rest is for start_on()."""
    ours, theirs = open_terminal(columns)
    process, data = start_on(theirs, words, added, **kwargs), b''
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            data += os.read(ours, 2 ** 16)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, data.decode()
    return data.decode()


def run_python(code, *args, **kwargs):
    """run_on_terminal() of Python code."""
    return run_on_terminal([sys.executable, '-c', code, *args], **kwargs)


def see(text):
    """The lines of a screen to which the text has been written, without empty ones at its end."""
    lines, row, column = [''], 0, 0
    for part in CONTROL.split(text):
        if part in ('\n', '\v'):
            row += 1
            lines += [''] * (row + 1 - len(lines))
        elif part == '\r':
            column = 0
        elif part == '\x1b[A':
            row -= 1
        elif part == '\x1b[J':
            lines[row:] = [lines[row][:column]]
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part):]
            column += len(part)
    while lines and not lines[-1]:
        lines.pop()
    return lines
