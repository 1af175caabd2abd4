#!/usr/bin/env python
"""Serve batches of augmented images to the trainers of this host.

The training scripts start it themselves. By hand, it tells how many images this machine's disk and
cores feed (10 seconds; images/s, ms per image, decoding alone, and minutes for all images):

    ./serve-data.py --benchmark --data /path/to/imagenet --task moco-v2 --batch 32
    ./serve-data.py --benchmark --fake 50000 --task moco-v2 --image-size 32 --batch 256

or serves a trainer, here one of two ranks, each pulling from its own sockets in ADDRESS:

    ./serve-data.py --data /path/to/imagenet --task moco-v2 --address /tmp/data --ranks 0,1 --size 2

Worker i of a rank's n makes batches i, i+n, i+2n ..., writes each, as one message of zmq_ops, into
memory shared with the trainer, and pushes a reference to it on ipc://ADDRESS/rank{R}-worker{i}. The
trainer, a process of the same user and PID namespace, pulls from its n sockets in strict turns, so
n does not change what it gets. While it pulls, it stays connected to the unix socket
ADDRESS/control, and gets lines of JSON:

    {"images": N, "classes": C or null, "workers_per_rank": n, "digest": "..."}     first
    {"error": "..."}     the server ends; also instead of the first line

The server ends when its lifeline does, when all trainers have been there and gone (after a bounded
pass, --task eval, too), and when a worker dies. SIGTERM and SIGINT end it if it has no lifeline; a
cluster sends them to all processes of a job, and the trainer wants data to the end of its last
step. Its workers and ADDRESS go with it, even if it is killed.
"""
import sys

if __name__ == '__main__':
    from job import cores
    cores.set_up([])  # before OpenCV is loaded, which reads what this sets

import argparse
import asyncio
import contextlib
import json
import os
import signal
import threading

import data
import decoder
import image_lists
import subset
import views
from data_worker import Workers, say, socket_path
from errors import UserError
from job import cores, signals

LINGER = 10  # seconds that an ended server waits for trainers that have not yet heard why
MAX_SOCKET_PATH = 107  # bytes: sockaddr_un has 108 with the final zero


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--data', metavar='DIR', help='folder of images, see the README')
    source.add_argument('--fake', type=int, metavar='N',
                        help='pretend N images: random ones, made once, copied into every batch')
    add = parser.add_argument
    add('--task', choices=list(data.TASKS), required=True, help='moco: two views; linear: a view '
        'and its label; eval: every image once, its centre and label')
    add('--split', choices=['train', 'val'], help='default: val for the task eval, else train')
    add('--address', metavar='DIR', help='private folder for the sockets')
    add('--ranks', default='0', help='global ranks on this host, as in 4,5,6,7')
    add('--size', type=int, default=1, help='number of ranks on all hosts')
    add('--batch', type=int, default=32, help='images per rank and step')
    add('--image-size', type=int, default=224, help='pixels')
    add('--crop-area', type=float, nargs=2, metavar=('LO', 'HI'), help='range of the random crop, '
        'as fractions of the image; default: 0.2 1 for moco, 0.08 1 for linear')
    add('--labels', type=subset.parse, metavar='SHARE', help='read a part of the labelled images '
        'only: 1%%, 10%% or 5-per-class')
    add('--cache', type=float, default=0, metavar='GB', help='keep so many GB of decoded images in '
        'memory (0)')
    add('--workers', type=int, default=cores.num_cores(), help='processes on this host, rounded up '
        'to the same number for each rank; default: as many as the cores that may be used')
    add('--seed', type=int, default=0, help='0 to 2**32 - 1')
    add('--start-batch', type=int, default=0, help='number of the first batch, to resume')
    add('--lifeline', type=int, metavar='FD',
        help='read end of a pipe; the server ends when its write end is closed')
    add('--quiet', action='store_true',
        help='do not name unreadable images, nor what is left out: an earlier pass has')
    add('--benchmark', action='store_true',
        help='measure for 10 seconds how many images per second it serves')
    args = parser.parse_args(argv)

    task = data.TASKS[args.task]
    args.split = args.split or ('val' if task.bounded else 'train')

    # numbers out of range
    try:
        ranks = args.ranks = [int(rank) for rank in args.ranks.split(',')]
    except ValueError:
        parser.error(f'--ranks must be numbers and commas, got {args.ranks}')
    if len(set(ranks)) < len(ranks) or not all(0 <= rank < args.size for rank in ranks):
        parser.error(f'--ranks must be different numbers below --size {args.size}, got {ranks}')
    for flag, least in (('fake', 1), ('size', 1), ('batch', 1), ('image_size', 1), ('workers', 1),
                        ('start_batch', 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            parser.error(f'--{flag.replace("_", "-")} must be at least {least}, got {value}')
    if args.crop_area and not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        parser.error('--crop-area must be 0 < LO <= HI <= 1, got {} {}'.format(*args.crop_area))
    if not 0 <= args.cache < float('inf'):
        parser.error(f'--cache must not be negative, got {args.cache}')
    if not 0 <= args.seed < 2**32:
        parser.error(f'--seed must be 0 to 2**32 - 1, got {args.seed}')
    if args.labels and task.labelled is not True:
        parser.error(f'--labels needs a task with labels, not {args.task}')
    if not (args.address or args.benchmark):
        parser.error('--address is needed')
    if args.benchmark and task.bounded:
        parser.error(f'--benchmark needs a task without an end, not {args.task}')
    return args


def main(args) -> int:
    if args.benchmark:
        from benchmarks import data_server
        return data_server.main(sys.argv[1:], args)
    return asyncio.run(Server(args).serve())


class Server:
    """The folder with the sockets, the connections of the trainers, and all reasons to end."""

    def __init__(self, args):
        self._args, self._address, self._ranks = args, args.address, args.ranks
        self._workers = Workers(args, self._end)
        self._trainers, self._num_connected = set(), 0  # connections now, and in all
        self._lines = b''  # for all connections, now and to come

    async def serve(self) -> int:
        """Serve until there is a reason to end; returns the exit code."""
        self._loop, control = asyncio.get_running_loop(), None
        self._stop = self._loop.create_future()
        try:
            control = await self._open()
            images = await self._list_images()
            if images is not None:
                for note in [] if self._args.quiet else images.notes:
                    say(f'serve-data: {note}')
                self._workers.start(images, self._remove_folder)
                for connection in self._workers.processes:
                    self._loop.add_reader(connection, self._workers.read_report, connection)
                self._send({'images': len(images.files),
                            'classes': images.classes and len(images.classes),
                            'workers_per_rank': self._workers.per_rank,
                            'digest': image_lists.digest_images(images)})
            code, error = await self._stop
        except UserError as mistake:
            code, error = 1, str(mistake)
        finally:
            for connection in self._workers.processes:
                self._loop.remove_reader(connection)
            self._workers.kill()
        if error:
            say('serve-data: error: ' + error)
            self._send({'error': error})
        if control is not None:
            if code == 1:
                await self._linger()
            self._remove_folder()
            control.close()
        return code

    def _end(self, code, error=None):
        if not self._stop.done():
            self._stop.set_result((code, error))

    def _watch(self, lifeline):
        for number in signals.SIGNALS:
            if lifeline is not None:
                signal.signal(number, signal.SIG_IGN)
            elif not signals.ignored(number):
                why = f'the data server was ended by {signal.Signals(number).name}'
                self._loop.add_signal_handler(number, self._end, 128 + number, why)

        def read_lifeline():
            if not os.read(lifeline, 4096):
                self._loop.remove_reader(lifeline)
                self._end(0)
        if lifeline is not None:
            self._loop.add_reader(lifeline, read_lifeline)

    async def _list_images(self):
        """List them in a thread of its own, which does not keep this process from ending; None if
        there is a reason to end before. And see that the workers will find what they need."""
        listed, args, task = self._loop.create_future(), self._args, data.TASKS[self._args.task]
        views.load_kernels()
        decoder.load_library()

        def run():
            try:
                set_listed, value = listed.set_result, (
                    image_lists.fake_images(args.fake, task.labelled) if args.fake else
                    image_lists.list_images(args.data, args.split, task.labelled is True,
                                            task.labelled == data.NUMBERED))
                if args.labels:
                    value = subset.choose(value, args.labels)
            except Exception as error:
                set_listed, value = listed.set_exception, error
            self._loop.call_soon_threadsafe(set_listed, value)
        threading.Thread(target=run, daemon=True).start()
        await asyncio.wait([listed, self._stop], return_when=asyncio.FIRST_COMPLETED)
        return None if self._stop.done() else listed.result()

    async def _open(self):
        """Make the folder and the control socket, and watch signals and the lifeline."""
        # limits of the system
        longest = max((socket_path(self._address, *name) for name in self._workers.names), key=len)
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            raise UserError(f'the path of a socket can have {MAX_SOCKET_PATH} bytes, but {longest} '
                            f'has {len(os.fsencode(longest))}: choose a shorter folder (TMPDIR)')
        cores.allow_open_files(64 + 2 * len(self._ranks))

        # the folder, which only this user can enter
        try:
            os.makedirs(self._address, mode=0o700, exist_ok=True)
            status = os.stat(self._address)
            if status.st_uid != os.getuid() or status.st_mode & 0o077 or os.listdir(self._address):
                raise UserError(f'the folder {self._address} must be empty, and yours alone '
                                '(mode 700)')
            # in a task of its own: that which asyncio makes reports its end, until Python 3.11
            control = await asyncio.start_unix_server(
                lambda *streams: self._loop.create_task(self._accept(*streams)),
                os.path.join(self._address, 'control'), backlog=128)
        except OSError as error:
            raise UserError(f'cannot make a socket in {self._address}: {error}')
        self._watch(self._args.lifeline)
        return control

    async def _accept(self, reader, writer):
        """A trainer's connection, until its end."""
        self._num_connected += 1
        self._trainers.add(writer)
        writer.write(self._lines)
        with contextlib.suppress(OSError):
            await reader.read()
        self._trainers.remove(writer)
        writer.close()
        if not self._trainers and self._num_connected >= len(self._ranks):
            self._end(0)  # all trainers were here, and are gone

    def _send(self, fields):
        """Send a line to all connections, now and to come."""
        line = (json.dumps(fields) + '\n').encode()  # so short that it fits in a socket's buffer
        self._lines += line
        for writer in self._trainers:
            writer.write(line)

    async def _linger(self):
        """Wait until every rank has had its chance to read why the server ends."""
        self._stop, deadline = self._loop.create_future(), self._loop.time() + LINGER
        while (self._num_connected < len(self._ranks) and self._loop.time() < deadline
               and not self._stop.done()):
            await asyncio.sleep(0.02)

    def _remove_folder(self):
        # nothing but what was made here
        with contextlib.suppress(OSError):
            for path in [os.path.join(self._address, 'control')] + [
                    socket_path(self._address, *name) for name in self._workers.names]:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.rmdir(self._address)


if __name__ == '__main__':
    sys.exit(main(parse_args()))
