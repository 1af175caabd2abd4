"""Data workers: processes that each make and push batches of one rank; how they start and end."""
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from typing import Callable

import zmq

import data
import decoder
import zmq_ops
from errors import UserError, enumerate_some, printable
from image_cache import ImageCache
from job import signals

# memory is bounded: the batch that a worker makes and those that its trainer has not read yet
BATCHES_PER_WORKER = 4


def run_worker(args, images, rank: int, number: int, count: int, report, cache) -> None:
    """Push the batches number, number + count, ... of a rank, from args.start_batch on; never
    returns. `images`, `report` and `cache` are for decoder.ImageReader."""
    decoder.set_up_process()
    batches = (data.FakeBatches if args.fake else data.Batches)(
        data.TASKS[args.task], decoder.ImageReader(images, report, cache), rank, args.size,
        args.batch, args.image_size, args.seed, args.crop_area)
    first = args.start_batch + number
    steps = (itertools.count(first, count) if batches.num_batches is None else
             range(first, data.num_turns(batches.num_batches, count), count))

    out = zmq.Context().socket(zmq.PUSH)
    out.bind('ipc://' + socket_path(args.address, rank, number))
    messages = zmq_ops.SharedMessages(BATCHES_PER_WORKER)
    for step in steps:
        message, arrays = messages.new_message(batches.specs(step))
        batches.fill(step, arrays)
        out.send(message)
    # A PULL socket that is full when its peer closes forgets what it has not read yet (libzmq 4.3),
    # linger or not. So stay: the server ends its workers when the trainers have what they wanted.
    while True:
        signal.pause()


def socket_path(address: str, rank: int, number: int) -> str:
    return os.path.join(address, f'rank{rank}-worker{number}')


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(line, file=sys.stderr, flush=True)


class Workers:
    """All workers of a server, which has these `args`, and which `end` ends: with an exit code and
    an error for the trainers."""

    def __init__(self, args, end: Callable[[int, str], None]):
        self._args, self._end = args, end
        self.per_rank = data.workers_per_rank(args.workers, len(args.ranks))
        self.names = [(rank, i) for rank in args.ranks for i in range(self.per_rank)]
        self.processes = {}  # connection, for read_report(): ((rank, number), process)
        self._unreadable, self._warned = {}, set()  # index: reason; indices

    def start(self, images, remove_folder: Callable[[], None]) -> None:
        """Fork them; a worker whose server is gone calls remove_folder."""
        self._images, fork = images, multiprocessing.get_context('fork')
        self._cache = self._make_cache() if self._args.cache and not self._args.fake else None
        alive, self._alive = os.pipe()  # by whose end workers see that of this process
        for name in self.names:
            connection, report = fork.Pipe(duplex=False)
            process = fork.Process(target=self._work, args=[name, alive, report, remove_folder])
            process.start()
            report.close()
            self.processes[connection] = name, process
        os.close(alive)

    def _work(self, name, alive, report, remove_folder):
        signal.set_wakeup_fd(-1)
        for number in signals.SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # they go to all: the server decides
        # what is the server's must end with the server
        for descriptor in map(int, os.listdir('/proc/self/fd')):
            if descriptor not in (0, 1, 2, alive, report.fileno()):
                with contextlib.suppress(OSError):  # listdir's own
                    os.close(descriptor)

        def wait_for_end():
            os.read(alive, 1)
            remove_folder()
            os._exit(1)
        threading.Thread(target=wait_for_end, daemon=True).start()
        try:
            run_worker(self._args, self._images, *name, self.per_rank,
                       lambda *image: report.send(image), self._cache)
        except UserError as error:
            report.send(str(error))
            sys.exit(1)
        except Exception as error:
            report.send(f'{type(error).__name__}: {error}'[:500])
            raise

    def _make_cache(self):
        total = len(self._images.files)
        return ImageCache(total, int(self._args.cache * 1e9), lambda count: say(
            f'serve-data: --cache {self._args.cache:g}: is full with {count} of {total} images; '
            'the others are decoded in each epoch'))

    def read_report(self, connection) -> None:
        """What decoder.ImageReader reports, or why a worker has failed, or the end of one."""
        (rank, number), process = self.processes[connection]
        try:
            report = connection.recv()
        except (EOFError, OSError):
            report = None
        if isinstance(report, tuple):
            self._count(*report)
        else:
            process.join()
            reason = (f'was killed by signal {-process.exitcode}' if process.exitcode < 0 else
                      f'failed: {report or "exit code " + str(process.exitcode)}')
            self._end(1, f'data worker {number} of rank {rank} (pid {process.pid}) {reason}')

    def _count(self, index, text, unreadable):
        """Log an image once, though many workers report it. One that is unreadable is forgiven,
        more only if they are below 1 %."""
        seen, path = self._unreadable if unreadable else self._warned, self._images.files[index]
        if index in seen:
            return
        if not unreadable:
            seen.add(index)
            self._log(len(seen), f'{path}: {text}', 'the image is used', 'have such warnings')
            return
        seen[index] = text
        self._log(len(seen), f'cannot read {path}: {text}', 'the next image takes its place',
                  'cannot be read')
        files, count, args = self._images.files, len(seen), self._args
        # of a bounded pass, this host reads its share of the images; else, sooner or later, all
        share = len(args.ranks) / args.size if data.TASKS[args.task].bounded else 1
        images = round(share * len(files))
        if count >= 2 and count > images / 100:
            lines = [printable(f'{files[i]}: {reason}') for i, reason in sorted(seen.items())]
            self._end(1, f'{count} of {images} images, more than 1 %, cannot be read: '
                         + enumerate_some(lines, '; '))

    def _log(self, count, image, consequence, all_images):
        """The first ten of a kind, and then their number at 20, 40, 80 ..."""
        if self._args.quiet:
            return
        if count <= 10:
            line = f'serve-data: {printable(image)} (number {count}); {consequence}'
        elif count % 10 == 0 and count // 10 & count // 10 - 1 == 0:
            line = f'serve-data: {count} images so far {all_images}'
        else:
            return
        say(line)

    def kill(self) -> None:
        """End all that are left; they have nothing to lose."""
        for _, process in self.processes.values():
            process.kill()
        for _, process in self.processes.values():
            process.join()
