#!/usr/bin/env python
"""Serve batches of augmented images to the trainers of this host.

The training scripts start it themselves. By hand, it tells how many images this machine's disk and
cores feed (10 seconds; prints images/s, ms per image, what decoding alone takes, and how long a
pass over all images is):

    ./serve-data.py --benchmark --data /path/to/imagenet --task moco-v2 --batch 32
    ./serve-data.py --benchmark --fake 50000 --task moco-v2 --image-size 32 --batch 256

or serves a trainer, here one of two ranks, each pulling from its own sockets in ADDRESS:

    ./serve-data.py --data /path/to/imagenet --task moco-v2 --address /tmp/data --ranks 0,1 --size 2

Every worker belongs to one rank: worker i of its n makes batches i, i+n, i+2n ... and writes each,
as one message of zmq_ops, into memory that it shares with the trainer, and pushes a reference to it
on ipc://ADDRESS/rank{R}-worker{i}. The trainer, a process of the same user and PID namespace, pulls
from its n sockets in strict turns, so what it gets does not depend on n. Whoever connects to the
unix socket ADDRESS/control, and stays connected for as long as it pulls, gets lines of JSON:

    {"images": N, "classes": C or null, "workers_per_rank": n, "digest": "..."}     first
    {"error": "..."}     the server ends; also instead of the first line

The server ends when its lifeline does, when all trainers have been there and gone (after a bounded
pass, --task eval, too), and when a worker dies. SIGTERM and SIGINT end it if it has no lifeline; a
cluster sends them to all processes of a job, and the trainer wants data until it has ended its last
step. The server takes its workers and ADDRESS along, and they go too if it is killed.
"""
import environment  # noqa: I001  before all that reads it
import argparse
import itertools
import json
import os
import select
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time

import cv2
import zmq

import data
import zmq_ops

# Memory is bounded: a worker has so many batches, the one that it makes and those that its trainer
# has not read yet.
BATCHES_PER_WORKER = 4
LINGER = 10  # seconds that an ended server waits for trainers that have not yet heard why
MAX_SOCKET_PATH = 107  # bytes: sockaddr_un has 108 with the final zero
BENCHMARK_SECONDS = 10
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data', metavar='DIR', help='folder of images, see the README')
    source.add_argument('--fake', type=int, metavar='N',
                        help='pretend N images: random ones, made once, copied into every batch')
    parser.add_argument('--task', choices=['moco-v1', 'moco-v2', 'linear', 'eval'], required=True,
                        help='moco: two views; linear: a view and its label; '
                             'eval: every image once, its centre and label')
    parser.add_argument('--split', choices=['train', 'val'],
                        help='default: val for the task eval, else train')
    parser.add_argument('--address', metavar='DIR', help='private folder for the sockets')
    parser.add_argument('--ranks', default='0', help='global ranks on this host, as in 4,5,6,7')
    parser.add_argument('--size', type=int, default=1, help='number of ranks on all hosts')
    parser.add_argument('--batch', type=int, default=32, help='images per rank and step')
    parser.add_argument('--image-size', type=int, default=224, help='pixels')
    parser.add_argument('--crop-area', type=float, nargs=2, metavar=('LO', 'HI'),
                        help='range of the random crop, as fractions of the image; '
                             'default: 0.2 1 for moco, 0.08 1 for linear')
    parser.add_argument('--workers', type=int,
                        help='processes on this host, rounded up to the same number for each rank; '
                             'default: as many as the cores that may be used')
    parser.add_argument('--seed', type=int, default=0, help='0 to 2**32 - 1')
    parser.add_argument('--start-batch', type=int, default=0,
                        help='number of the first batch, to resume')
    parser.add_argument('--lifeline', type=int, metavar='FD',
                        help='read end of a pipe; the server ends when its write end is closed')
    parser.add_argument('--quiet', action='store_true',
                        help='do not name unreadable images: an earlier pass has')
    parser.add_argument('--benchmark', action='store_true',
                        help='measure for {} seconds how many images per second it serves'.format(
                            BENCHMARK_SECONDS))
    args = parser.parse_args(argv)

    # defaults that depend on others
    args.split = args.split or ('val' if args.task == 'eval' else 'train')
    args.crop_area = args.crop_area or ([0.08, 1] if args.task == 'linear' else [0.2, 1])
    args.workers = environment.num_cores() if args.workers is None else args.workers

    # numbers out of range
    try:
        args.ranks = [int(rank) for rank in args.ranks.split(',')]
    except ValueError:
        parser.error('--ranks must be numbers and commas, got {}'.format(args.ranks))
    if len(set(args.ranks)) < len(args.ranks) or not all(0 <= r < args.size for r in args.ranks):
        parser.error('--ranks must be different numbers below --size {}, got {}'.format(
            args.size, args.ranks))
    for flag in ('fake', 'size', 'batch', 'image_size', 'workers'):
        value = getattr(args, flag)
        if value is not None and value < 1:
            parser.error('--{} must be at least 1, got {}'.format(flag.replace('_', '-'), value))
    if not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        parser.error('--crop-area must be 0 < LO <= HI <= 1, got {} {}'.format(*args.crop_area))
    if not 0 <= args.seed < 2**32:
        parser.error('--seed must be 0 to 2**32 - 1, got {}'.format(args.seed))
    if args.start_batch < 0:
        parser.error('--start-batch must be at least 0, got {}'.format(args.start_batch))
    if not (args.address or args.benchmark):
        parser.error('--address is needed')
    if args.benchmark and args.task == 'eval':
        parser.error('--benchmark needs a task without an end, not eval')
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.benchmark:
        return benchmark(args)
    return serve(args, args.address, args.lifeline)


def list_images(args):
    """The images to serve; the workers find what they need."""
    if args.task in ('moco-v1', 'moco-v2'):
        data.load_kernels()
    labelled = args.task in ('linear', 'eval')
    if args.fake:
        return data.fake_images(args.fake, labelled)
    return data.list_images(args.data, args.split, labelled)


# ----------------------------------------------------------------------------------------- worker

def run_worker(args, address, images, rank, number, count, report):
    """Make and push the batches number, number + count, ... of a rank, from args.start_batch on.

    Args:
        report: is called with the index of an unreadable image.
    """
    data.set_up_process()
    reader = data.ImageReader(images, report)
    batches = data.create_batches(args.task, reader, rank, args.size, args.batch, args.image_size,
                                  args.seed, args.crop_area)
    if args.fake:
        batches = data.FakeBatches(batches)
    steps = itertools.count(args.start_batch + number, count)
    if batches.num_batches is not None:
        # whole rounds, the last batches empty: the pulls of the next pass begin with worker 0 again
        rounds = -(-batches.num_batches // count)
        steps = range(args.start_batch + number, rounds * count, count)

    context = zmq.Context()
    out = context.socket(zmq.PUSH)
    out.bind('ipc://' + socket_path(address, rank, number))
    messages = zmq_ops.SharedMessages(BATCHES_PER_WORKER)
    for step in steps:
        message, arrays = messages.new_message(batches.specs(step))
        batches.fill(step, arrays)
        out.send(message)
    # A PULL socket that is full when its peer closes forgets what it has not read yet (libzmq 4.3),
    # linger or not. So stay: the server ends its workers when the trainers, who have all they
    # wanted, have left it.
    while True:
        signal.pause()


def socket_path(address, rank, number):
    return os.path.join(address, 'rank{}-worker{}'.format(rank, number))


# ----------------------------------------------------------------------------------------- server

class Stop(Exception):
    """The server is to end: with an error for the trainers, or with an exit code."""

    def __init__(self, code, error=None):
        super().__init__(error)
        self.code, self.error = code, error


def serve(args, address, lifeline=None):
    """Serve until there is a reason to end.

    Args:
        args: from parse_args().
        address: folder for the sockets, which must be empty or missing.
        lifeline: a file descriptor at whose end of file the server ends, or None.

    Returns:
        int: exit code.
    """
    # of a bounded pass, this host has its share of the images, else sooner or later all
    share = len(args.ranks) / args.size if args.task == 'eval' else 1
    server = Server(address, args.ranks, -(-args.workers // len(args.ranks)), share, args.quiet)
    try:
        server.open(lifeline)
        images = server.wait_for(lambda: list_images(args))
        server.images = images
        server.fork_workers(args)
        server.send({'images': len(images.paths),
                     'classes': None if images.classes is None else len(images.classes),
                     'workers_per_rank': server.workers_per_rank,
                     'digest': data.digest_images(images)})
        while True:
            server.poll()
    except data.DataError as error:
        stop = Stop(1, str(error))
    except Stop as reason:
        stop = reason
    try:
        server.kill_workers()
        if stop.error:
            print('serve-data: error: ' + stop.error, file=sys.stderr, flush=True)
            server.send({'error': stop.error})
        if stop.code == 1:
            server.linger()
    except Stop:
        pass  # nobody listens any more
    finally:
        server.close()
    return stop.code


class Server:
    """The folder with the sockets, the workers, and the connections of the trainers.

    Args:
        address: the folder.
        ranks: list of the global ranks on this host.
        workers_per_rank: number of workers of each.
        share: the part of all images that they read.
        quiet: whether unreadable images are only counted.
    """

    def __init__(self, address, ranks, workers_per_rank, share, quiet):
        self.address, self.ranks, self.workers_per_rank = address, ranks, workers_per_rank
        self._share, self._quiet = share, quiet
        self.images = None
        self._names = [(rank, i) for rank in ranks for i in range(workers_per_rank)]
        self._workers = {}  # pid: (rank, number)
        self._reasons = {}  # (rank, number): why it failed
        self._unreadable = set()
        self._connections, self._lines, self._num_connected = set(), b'', 0
        self._ending = False
        # poll() rather than epoll, which forked workers would share
        self._selector = selectors.PollSelector()
        self._control = self._report = self._alive = None
        self._reported = b''

    def open(self, lifeline):
        """Make the folder and the control socket, and watch signals and the lifeline.

        Raises:
            data.DataError: the folder cannot be used.
        """
        # limits of the system
        longest = max((socket_path(self.address, *name) for name in self._names), key=len)
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            raise data.DataError('the path of a socket can have {} bytes, but {} has {}: '
                                 'choose a shorter folder (TMPDIR)'.format(
                                     MAX_SOCKET_PATH, longest, len(os.fsencode(longest))))
        try:
            environment.allow_open_files(64 + 2 * len(self.ranks))
        except ValueError as error:
            raise data.DataError(str(error))

        # the folder, which only this user can enter
        try:
            os.makedirs(self.address, mode=0o700, exist_ok=True)
            status = os.stat(self.address)
            if status.st_uid != os.getuid() or status.st_mode & 0o077 or os.listdir(self.address):
                raise data.DataError('the folder {} must be empty, and yours alone (mode 700)'
                                     .format(self.address))
            control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            control.bind(os.path.join(self.address, 'control'))
        except OSError as error:
            raise data.DataError('cannot make a socket in {}: {}'.format(self.address, error))
        control.setblocking(False)
        control.listen(128)
        self._control = control
        self._selector.register(control, selectors.EVENT_READ, self._accept)

        # signals only wake poll() up
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in SIGNALS:
            signal.signal(number, (lambda *_: None) if lifeline is None else signal.SIG_IGN)
        self._selector.register(read, selectors.EVENT_READ, self._read_signals)
        if lifeline is not None:
            self._selector.register(lifeline, selectors.EVENT_READ, self._read_lifeline)

    def poll(self, timeout=None):
        """Wait for something to happen, and handle it.

        Raises:
            Stop: the server is to end.
        """
        for key, _ in self._selector.select(timeout):
            if key.fileobj in self._selector.get_map():
                key.data(key.fileobj)

    def wait_for(self, function):
        """Return what the function returns, or raise what it raises, while polling."""
        result = []

        def run():
            try:
                result.append((function(), None))
            except BaseException as error:
                result.append((None, error))
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            self.poll(timeout=0.02)
        value, error = result[0]
        if error is not None:
            raise error
        return value

    # ------------------------------------------------------------------------------------ workers

    def fork_workers(self, args):
        """Start the workers of every rank."""
        alive, self._alive = os.pipe()
        self._report, report = os.pipe()
        os.set_blocking(self._report, False)
        self._selector.register(self._report, selectors.EVENT_READ, self._read_reports)
        for rank, number in self._names:
            pid = os.fork()
            if pid == 0:
                self._be_worker(args, rank, number, alive, report)
            self._workers[pid] = rank, number
        os.close(alive)
        # `report` stays open, lest the end of the last worker be an end of file here: SIGCHLD tells

    def _be_worker(self, args, rank, number, alive, report):
        """Never returns."""
        try:
            signal.set_wakeup_fd(-1)
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)  # they go to all: the server decides
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # what is the server's must end with the server
            os.close(self._alive)
            for key in list(self._selector.get_map().values()):
                os.close(key.fd)

            def wait_for_end():
                os.read(alive, 1)
                self._remove_folder()
                os._exit(1)
            threading.Thread(target=wait_for_end, daemon=True).start()

            # lines shorter than PIPE_BUF are written as a whole
            def send_report(fields):
                os.write(report, (json.dumps(fields) + '\n').encode())
            try:
                run_worker(args, self.address, self.images, rank, number, self.workers_per_rank,
                           lambda index: send_report({'unreadable': index}))
            except Exception as error:
                reason = '{}: {}'.format(type(error).__name__, error)[:500]
                send_report({'rank': rank, 'worker': number, 'reason': reason})
                raise
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        finally:
            os._exit(1)

    def _read_reports(self, pipe):
        try:
            text = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        lines = (self._reported + text).split(b'\n')
        self._reported = lines.pop()
        for fields in map(json.loads, lines):
            if 'unreadable' in fields:
                self._count_unreadable(fields['unreadable'])
            else:
                self._reasons[fields['rank'], fields['worker']] = fields['reason']

    def _count_unreadable(self, index):
        """Log an unreadable image once; one is forgiven, more only if they are below 1 %."""
        if index in self._unreadable:
            return
        self._unreadable.add(index)
        paths, count = self.images.paths, len(self._unreadable)
        if not self._quiet:
            print('serve-data: cannot read {} (number {}); the next image takes its place'.format(
                paths[index], count), file=sys.stderr, flush=True)
        images = round(self._share * len(paths))
        if count >= 2 and count > images / 100:
            raise Stop(1, '{} of {} images, more than 1 %, cannot be read: {}'.format(
                count, images, ', '.join(paths[i] for i in sorted(self._unreadable)[:10])))

    def _check_workers(self):
        """Look for workers that have ended."""
        for pid, (rank, number) in list(self._workers.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self._workers[pid]
            self._read_reports(self._report)
            if os.WIFSIGNALED(status):
                reason = 'was killed by signal {}'.format(os.WTERMSIG(status))
            else:
                reason = 'failed: {}'.format(self._reasons.get(
                    (rank, number), 'exit code {}'.format(os.WEXITSTATUS(status))))
            raise Stop(1, 'data worker {} of rank {} (pid {}) {}'.format(number, rank, pid, reason))

    def kill_workers(self):
        """End what is left of the workers; they have nothing to lose."""
        for pid in self._workers:
            os.kill(pid, signal.SIGKILL)
        for pid in self._workers:
            os.waitpid(pid, 0)
        self._workers = {}
        self._ending = True

    # ----------------------------------------------------------------------------------- trainers

    def _accept(self, control):
        try:
            connection, _ = control.accept()
        except OSError:
            return  # gone already
        connection.setblocking(False)
        self._num_connected += 1
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, self._read_connection)
        self._send_to(connection, self._lines)

    def send(self, fields):
        """Send a line to all connections, now and to come."""
        line = (json.dumps(fields) + '\n').encode()
        self._lines += line
        for connection in list(self._connections):
            self._send_to(connection, line)

    def _send_to(self, connection, text):
        try:
            connection.sendall(text)  # so short that it fits in the buffer of the socket
        except OSError:
            self._disconnect(connection)

    def _read_connection(self, connection):
        try:
            if connection.recv(4096):
                return
        except OSError:
            pass
        self._disconnect(connection)

    def _disconnect(self, connection):
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._selector.unregister(connection)
        connection.close()
        if not self._connections and self._num_connected >= len(self.ranks) and not self._ending:
            raise Stop(0)  # all trainers were here, and are gone

    def linger(self):
        """Wait until every rank has had its chance to read why the server ends."""
        if self._control is None:
            return  # nobody can
        deadline = time.monotonic() + LINGER
        while self._num_connected < len(self.ranks) and time.monotonic() < deadline:
            self.poll(timeout=0.1)

    # ---------------------------------------------------------------------------------------- end

    def _read_signals(self, pipe):
        numbers = set(os.read(pipe, 4096))
        for number in SIGNALS:
            if number in numbers:
                raise Stop(128 + number, 'the data server was ended by {}'.format(
                    signal.Signals(number).name))
        if not self._ending:
            self._check_workers()

    def _read_lifeline(self, lifeline):
        if not os.read(lifeline, 4096):
            self._selector.unregister(lifeline)
            raise Stop(0)

    def close(self):
        """Remove the folder and close the connections."""
        if self._control is not None:
            self._remove_folder()
            self._control.close()
        for connection in self._connections:
            connection.close()

    def _remove_folder(self):
        # nothing but what was made here
        for path in [os.path.join(self.address, 'control')] + [
                socket_path(self.address, *name) for name in self._names]:
            try:
                os.unlink(path)
            except OSError:
                pass
        try:
            os.rmdir(self.address)
        except OSError:
            pass


# -------------------------------------------------------------------------------------- benchmark

def benchmark(args):
    """Run a server as trainers would, pull from it, and print how fast it is."""
    folder = tempfile.mkdtemp(prefix='serve-data-')
    read, lifeline = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(lifeline)
        os._exit(serve(args, folder, read))
    os.close(read)
    try:
        facts, connection = connect(folder, pid)
        rate = facts and measure_rate(folder, args.ranks, facts['workers_per_rank'], connection)
    finally:
        os.close(lifeline)
        os.waitpid(pid, 0)
    if rate is None:
        return 1  # the server has said why

    workers = facts['workers_per_rank'] * len(args.ranks)
    cores = min(workers, environment.num_cores())
    print('{:.0f} images/s from {} workers on {} cores: {:.3f} ms of a core per image'.format(
        rate, workers, cores, 1000 * cores / rate))
    if not args.fake:
        decoding = time_decoding(list_images(args).paths)
        print('decoding alone takes {:.3f} ms per image: at most {:.0f} images/s'.format(
            1000 * decoding, cores / decoding))
    print('this feeds {:.0f} images/s to each of {} rank(s); a pass over {} images takes {:.1f} min'
          .format(rate / len(args.ranks), len(args.ranks), facts['images'],
                  facts['images'] / rate / 60))
    return 0


def connect(folder, pid):
    """Returns (first line of the server or None, connection)."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            connection.connect(os.path.join(folder, 'control'))
            break
        except OSError:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return None, connection
            time.sleep(0.02)
    facts = json.loads(connection.makefile().readline() or '{"error": ""}')
    return (None if 'error' in facts else facts), connection


def measure_rate(folder, ranks, workers_per_rank, connection):
    """Pull as the trainers would, all ranks at once.

    Returns:
        float: images per second, or None if the server ends.
    """
    context = zmq.Context()
    turns, counts, ended = [0] * len(ranks), [0] * len(ranks), threading.Event()

    def pull(i):
        sockets = []
        for number in range(workers_per_rank):
            pull_socket = context.socket(zmq.PULL)
            pull_socket.set(zmq.LINGER, 0)
            pull_socket.connect('ipc://' + socket_path(folder, ranks[i], number))
            sockets.append(pull_socket)
        while not ended.is_set():
            pull_socket = sockets[turns[i] % workers_per_rank]
            if pull_socket.poll(100):
                try:
                    message = zmq_ops.fetch_message(pull_socket.recv())
                except OSError:
                    break  # the worker is dead, and the server says why
                counts[i] += len(zmq_ops.load_arrays(message)[0])
                turns[i] += 1
        for pull_socket in sockets:
            pull_socket.close()

    def server_ends(seconds):
        return bool(select.select([connection], [], [], seconds)[0])
    threads = [threading.Thread(target=pull, args=[i]) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    try:
        # what filled the queues at leisure is not counted
        while min(turns) < workers_per_rank * (BATCHES_PER_WORKER + 1):
            if server_ends(0.05):
                return None
        before, start = sum(counts), time.monotonic()
        if server_ends(BENCHMARK_SECONDS):
            return None
        return (sum(counts) - before) / (time.monotonic() - start)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        context.term()


def time_decoding(paths, seconds=2):
    """Seconds to read and decode one image, in this process, of images all over the list."""
    cv2.setNumThreads(0)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        # a stride without a common factor with most lengths, so that all classes have their turn
        data.decode_image(paths[count * 7919 % len(paths)])
        count += 1
    return (time.perf_counter() - start) / count


if __name__ == '__main__':
    sys.exit(main())
