"""Progress: how far a pass has got, in place on a terminal, or as a line a minute in the log."""
import collections
import logging
import os
import time

from job.terminal import Terminal

DRAW_INTERVAL, LOG_INTERVAL = 0.5, 60  # seconds between two drawings, and two lines of the log


def format_seconds(seconds: float) -> str:
    """0:42, 17:22, 3:05:10 or, in days, hours and minutes, 2 d 03:11"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f'{hours // 24} d {hours % 24:02}:{minutes:02}'
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def format_bar(share: float) -> str:
    """0.41 ->  41%|████      |"""
    return f'{int(100 * share):3}%|{"█" * int(10 * share):10}|'


class Progress:
    """Shows how much is done; rank 0's alone.

    Args:
        what, total: what is done, and how many steps (or images) that takes.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total
        self._start = self._drawn = self._logged = time.monotonic()
        self._recent = collections.deque(maxlen=100)  # (time, what was done) of drawings
        self._terminal = None
        if os.environ.get('HOROVOD_RANK', '0') == '0':
            self._terminal = Terminal(of_horovodrun=True)

    def update(self, done: int, describe=lambda pace: '') -> None:
        """Show it, if it is time to; `describe` makes the rest of the line of the seconds that a
        step has taken lately (None: not known)."""
        now = time.monotonic()
        if self._terminal is None or now < self._drawn + DRAW_INTERVAL:
            return
        self._drawn = now
        self._recent.append((now, done))  # not the start: the first step is slow
        since, first = self._recent[0]
        pace = (now - since) / (done - first) if done > first else None
        left = format_seconds(pace * (self._total - done)) if pace else '?'
        share, spent, text = done / self._total, format_seconds(now - self._start), describe(pace)
        line = (f'{self._what} {format_bar(share)} {done}/{self._total} [{spent}<{left}] '
                f'{text}').rstrip()
        if self._terminal.show(line):
            self._logged = now
        elif now > self._logged + LOG_INTERVAL:
            self._logged = now
            words = [f'{self._what}: {done} of {self._total} ({int(100 * share)} %)',
                     f'{left} left', text]
            # tensorpack's logger, without loading TensorFlow
            logging.getLogger('tensorpack').info(', '.join(filter(None, words)))

    def close(self) -> None:
        """Clear the line: other lines follow."""
        if self._terminal is not None:
            self._terminal.close()
            self._terminal = None
