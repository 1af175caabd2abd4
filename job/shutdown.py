"""Shutdown: how this process ends, for whatever reason and from any thread.

A job that is asked to end (by SIGTERM, Ctrl-C or another of signals.SIGNALS) finishes the step, on
which all ranks agree, writes a checkpoint and a file named resume-me, and exits with code 75: the
same command goes on from there.
"""
import contextlib
import os
import signal
import sys
import threading

from tensorpack import tfv1 as tf

from errors import UserError, one_line
from job import signals

STALL_LIMIT = 300  # seconds
GRACE = 4  # seconds: horovodrun kills 5 s after SIGTERM
SERVER_PATIENCE = 5  # seconds for a data server to say why a batch is lost


class Shutdown:
    """Ends this process, even while its main thread is inside session.run. Python sees a signal
    only after that has returned, so a thread reads the pipe that the C-level handler writes to. The
    end closes the session, which cancels a blocked pull. The last step, and a main thread that is
    stuck elsewhere (in a collective without its peers, say), are given some seconds."""
    RESUME = 75  # exit code; EX_TEMPFAIL of sysexits.h

    def __init__(self):
        self.stall_limit = STALL_LIMIT  # seconds to wait for a rank, or a batch
        self.grace = GRACE  # seconds for the last step
        self.reason, self.code = None, 1  # of the end
        self.asked = self.session = None  # signal that asked for the end; session to close
        self.step = 0  # training step that is under way, or was the last one
        # where training is: in a 'step', 'saving' a checkpoint of it, or behind that ('saved'),
        # evaluating, say; None outside training
        self.phase = None
        self.marker = None  # path of the file that says that the run is to be continued
        self._overdue = self._unmarked = False
        self._lock, self._closed = threading.Lock(), threading.Event()

    # ---- signals

    def watch_signals(self) -> None:
        """Watch for signals that ask for the end; to be called in the main thread."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        signals.handle(self._leave)

        def wait():
            while True:
                self._obey(os.read(read, 1)[0])
        threading.Thread(target=wait, daemon=True).start()

    def _leave(self, number, frame):  # in the main thread
        if self.phase is None:
            raise SystemExit(128 + number)

    def _obey(self, number):  # in the thread that watches
        name, again, self.asked = signal.Signals(number).name, self.asked, number
        if again and number != signal.SIGINT:
            return  # a cluster's manager and horovodrun may both send it
        if self.phase is None or again:
            self.end(f'stopped by {name}', 128 + number)
            return

        def give_up():
            self._overdue = True
            if self.phase == 'saved':
                self.end_to_resume()
            elif self.phase == 'step':
                self.end_to_resume(f'stopped by {name}, with no time for a checkpoint: the same '
                                   'command continues from the last one')
        start_timer(self.grace, give_up)

    # ---- phases of training

    def begin_step(self, number: int) -> None:
        self.step, self.phase = number, 'step'

    @contextlib.contextmanager
    def checkpoint(self):
        """Around the writing of a checkpoint, which a signal waits for."""
        self.phase = 'saving'
        yield
        self.phase = 'saved'
        if self._overdue:
            self.end_to_resume()
            raise SystemExit(self.code)

    def unmark(self) -> None:
        """Remove the marker of an earlier run: this one has got further."""
        if self.marker and self.asked is None and not self._unmarked:
            self._unmarked = True
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.marker)

    # ---- the end

    def end_to_resume(self, reason=None) -> None:
        """End, and mark the run as to be continued; without a reason, from this step on."""
        if reason is None:
            by = signal.Signals(self.asked).name if self.asked else 'a signal to another rank'
            reason = f'stopped by {by} after step {self.step}: the same command continues'
        if self.marker and self.reason is None:
            with contextlib.suppress(OSError), open(self.marker, 'w') as f:  # a full disk
                f.write(reason + '\n')
        self.end(reason, self.RESUME, grace=1)  # all has been written

    def end(self, reason: str, code=1, said=False, grace=GRACE) -> None:
        """Show the reason (unless it is said), close the session, and give the main thread some
        seconds' grace; the first call wins."""
        with self._lock:
            is_first = self.reason is None
            if is_first:
                self.reason, self.code = reason, code
        if not is_first:
            self._closed.wait()
            return
        start_timer(grace, os._exit, code)  # first: nobody may be reading standard error
        if not said:
            with contextlib.suppress(OSError):  # horovodrun, which reads it, may be gone
                print(f'rank {this_rank()}: {reason}', file=sys.stderr, flush=True)
        try:
            if self.session is not None:
                self.session.close()
        finally:
            self._closed.set()

    def exit_if_ended(self) -> None:
        if self.reason is not None:
            # Python, when it exits, aborts if another thread is in TensorFlow
            self._closed.wait()
            sys.exit(self.code)

    @contextlib.contextmanager
    def explain(self, what: str):
        """Around what runs a session: an error ends this process with one line. Once a reason has
        been shown, the session is closed, and any error is a consequence."""
        try:
            yield
        except Exception as error:
            if isinstance(error, tf.errors.DataLossError):
                # a batch went with its worker: the server is about to say why
                self._closed.wait(SERVER_PATIENCE)
            self.exit_if_ended()
            if isinstance(error, tf.errors.OpError):
                self.end(f'{what}: {one_line(error)}')
            elif isinstance(error, UserError):
                self.end(str(error), said=not str(error))
            else:
                raise
            sys.exit(self.code)


shutdown = Shutdown()  # of this process


def this_rank() -> int:
    """The rank, also before Horovod has started and after it has ended."""
    return int(os.environ.get('HOROVOD_RANK', 0))


def start_timer(seconds, function, *args):
    timer = threading.Timer(seconds, function, args)
    timer.daemon = True
    timer.start()
