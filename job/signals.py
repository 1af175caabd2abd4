"""Signals that ask a job to end."""
import signal
from typing import Callable

# a scheduler's and a user's; of a terminal that closes; what schedulers send some time before a
# limit (USR1, USR2), and of a limit of CPU time
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGXCPU)
# the same for a shell's trap
NAMES = ' '.join(number.name[len('SIG'):] for number in SIGNALS)


def ignored(number: int) -> bool:
    """Whether a signal is ignored, as nohup sets SIGHUP, and a shell SIGINT for what a script has
    put into the background: it stays so."""
    return signal.getsignal(number) is signal.SIG_IGN


def handle(handler: Callable) -> None:
    """Set the handler of all that are not ignored."""
    for number in SIGNALS:
        if not ignored(number):
            signal.signal(number, handler)
