"""serve-data.py --benchmark: a data server, and ranks that pull from it as fast as they can."""
import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import zmq

import data
import decoder
import image_lists
import zmq_ops
from data_worker import BATCHES_PER_WORKER, socket_path
from job import cores

SERVER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'serve-data.py')
SECONDS = 10  # of the measurement


class Ended(Exception):
    """The server has ended, and has said why."""


class Server:
    """A process of serve-data.py and its ranks, each a thread that pulls.

    Args:
        flags: of serve-data.py, besides --address and --lifeline.
        ranks: list of global ranks; the flags name the same.

    Attributes:
        process: a subprocess.Popen.
        counts: images of each rank so far.
        workers_per_rank: from start() on.
    """

    def __init__(self, flags, ranks):
        self.counts, self._turns = [0] * len(ranks), [0] * len(ranks)
        self._ranks, self._threads, self._ended = ranks, [], threading.Event()
        self._folder = tempfile.mkdtemp(prefix='serve-data-')
        read, self._lifeline = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, SERVER, *flags, '--address', self._folder, '--lifeline', str(read)],
            pass_fds=[read])
        os.close(read)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._context = zmq.Context()

    def start(self) -> dict:
        """Connect and begin to pull; returns the server's facts."""
        while True:
            try:
                self._control.connect(os.path.join(self._folder, 'control'))
                break
            except OSError:
                if self.process.poll() is not None:
                    raise Ended
                time.sleep(0.02)
        facts = json.loads(self._control.makefile().readline() or '{"error": ""}')
        if 'error' in facts:
            raise Ended
        self.workers_per_rank = facts['workers_per_rank']
        self._threads = [threading.Thread(target=self._pull, args=[i])
                         for i in range(len(self._ranks))]
        for thread in self._threads:
            thread.start()
        return facts

    def _pull(self, i):
        sockets = []
        for worker in range(self.workers_per_rank):
            sockets.append(self._context.socket(zmq.PULL))
            sockets[-1].set(zmq.LINGER, 0)
            sockets[-1].connect('ipc://' + socket_path(self._folder, self._ranks[i], worker))
        while not self._ended.is_set():
            pull_socket = sockets[self._turns[i] % len(sockets)]
            if pull_socket.poll(100):
                try:
                    message = zmq_ops.fetch_message(pull_socket.recv())
                except OSError:
                    break  # the worker is dead, and the server says why
                self.counts[i] += len(zmq_ops.load_arrays(message)[0])
                self._turns[i] += 1
        for pull_socket in sockets:
            pull_socket.close()

    def wait(self, seconds):
        """Let the ranks pull for so long; Ended if the server ends meanwhile."""
        if select.select([self._control], [], [], seconds)[0]:
            raise Ended

    def wait_for_all(self):
        """Wait until every rank has used up the batches from before it began to pull."""
        while min(self._turns) < self.workers_per_rank * (BATCHES_PER_WORKER + 1):
            self.wait(0.05)

    def close(self):
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._context.term()
        self._control.close()
        os.close(self._lifeline)
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def time_decoding(images, seconds=2):
    """Seconds to read and decode one image, in this process, of images all over the list."""
    decoder.set_up_process()
    reader = decoder.ImageReader(images, report=lambda *_: None)  # the server has named it
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        # a stride without a common factor with most lengths, to visit all classes
        reader.read(count * 7919 % len(images.files))
        count += 1
    return (time.perf_counter() - start) / count


def main(argv, args) -> int:
    """Run a server as trainers would, pull from it, and print how fast it is.

    Args:
        argv: the flags of serve-data.py, with --benchmark.
        args: the same, parsed.

    Returns:
        The exit code.
    """
    flags = [flag for flag in argv if not flag.startswith('--be')]  # argparse takes abbreviations
    with contextlib.closing(Server(flags, args.ranks)) as server:
        try:
            facts = server.start()
            server.wait_for_all()
            before, start = sum(server.counts), time.monotonic()
            server.wait(SECONDS)
            rate = (sum(server.counts) - before) / (time.monotonic() - start)
        except Ended:
            return 1

    num_ranks = len(args.ranks)
    workers = facts['workers_per_rank'] * num_ranks
    num_cores = min(workers, cores.num_cores())
    print(f'{rate:.0f} images/s from {workers} workers on {num_cores} cores: '
          f'{1000 * num_cores / rate:.3f} ms of a core per image')
    if not args.fake:
        decoding = time_decoding(
            image_lists.list_images(args.data, args.split, data.TASKS[args.task].labelled))
        print(f'decoding whole images takes {1000 * decoding:.3f} ms each: '
              f'{num_cores / decoding:.0f} images/s')
    print(f'this feeds {rate / num_ranks:.0f} images/s to each of {num_ranks} rank(s); a pass over '
          f'{facts["images"]} images takes {facts["images"] / rate / 60:.1f} min')
    return 0
