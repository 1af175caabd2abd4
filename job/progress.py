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
    """Shows how much is done of one thing after the other, epochs say; rank 0's alone."""

    def __init__(self):
        self._start = self._drawn = self._logged = self._paused = time.monotonic()
        self._pauses = 0.  # seconds, between two things
        self._before = self._done = 0  # steps, of all things before, and of this one
        self._recent = collections.deque(maxlen=100)  # (time without pauses, steps) of drawings
        self._terminal = None
        if os.environ.get('HOROVOD_RANK', '0') == '0':
            self._terminal = Terminal(of_horovodrun=True)

    def begin(self, what: str, total: int) -> None:
        """The next thing, and how many steps (or images) it takes."""
        self._what, self._total, self._start = what, total, time.monotonic()
        self._before, self._done = self._before + self._done, 0
        self._pauses += self._start - self._paused

    def end(self) -> None:
        """Clear the line: other lines follow."""
        self._paused = time.monotonic()
        if self._terminal is not None:
            self._terminal.clear()

    def update(self, done: int, describe=lambda pace: '') -> None:
        """Show it, if it is time to; `describe` makes the rest of the line of the seconds that a
        step has taken lately (None: not known)."""
        now, self._done = time.monotonic(), done
        if self._terminal is None or now < self._drawn + DRAW_INTERVAL:
            return
        self._drawn = now
        # not from the start: the first step is slow
        self._recent.append((now - self._pauses, self._before + done))
        (since, first), (until, last) = self._recent[0], self._recent[-1]
        pace = (until - since) / (last - first) if last > first else None
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
        if self._terminal is not None:
            self._terminal.close()
            self._terminal = None
