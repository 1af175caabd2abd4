#!/usr/bin/env python
"""Does every rank get its share of a data server's images, and does its memory stay as it is?

    python benchmarks/pullers.py --data DIR    # half an hour, of which 20 minutes for memory
    python benchmarks/pullers.py --data DIR --minutes 3

One server each feeds 1, 2, 4 and 8 ranks that pull as fast as they can; printed are the images that
each gets, and by how much the furthest one is off the mean: the claim is at most 5 %. Then 8 ranks
go on for --minutes; printed are the memory of server and workers (PSS, in which they share what
they share; without files, as the share of a library that other jobs use too changes when such a job
begins or ends), and its slope after the first quarter: the claim is less than 1 MB a minute.
"""
import os
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

import argparse  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import zmq  # noqa: E402

import zmq_ops  # noqa: E402

RANKS, BATCH, SHARE_SECONDS, SAMPLE_SECONDS = (1, 2, 4, 8), 32, 120, 5


class Server:
    """A data server and its ranks, each a thread that pulls; counts[rank] are the images it got."""

    def __init__(self, ranks, args):
        self.counts = [0] * ranks
        self._folder = tempfile.mkdtemp(prefix='pullers-')
        read, self._lifeline = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, 'serve-data.py'), '--data', args.data,
             '--task', 'moco-v2', '--batch', str(BATCH), '--image-size', str(args.image_size),
             '--ranks', ','.join(map(str, range(ranks))), '--size', str(ranks),
             '--address', self._folder, '--lifeline', str(read)], pass_fds=[read])
        os.close(read)
        self._control, self._ended = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), False
        self.num_workers = self._connect()['workers_per_rank']
        self._context = zmq.Context()
        self._threads = [threading.Thread(target=self._pull, args=[rank]) for rank in range(ranks)]
        for thread in self._threads:
            thread.start()

    def _connect(self):
        while True:
            try:
                self._control.connect(os.path.join(self._folder, 'control'))
                break
            except OSError:
                if self.process.poll() is not None:
                    sys.exit(1)  # it has said why
                time.sleep(0.05)
        facts = json.loads(self._control.makefile().readline())
        if 'error' in facts:
            sys.exit(1)
        return facts

    def _pull(self, rank):
        sockets = []
        for worker in range(self.num_workers):
            sockets.append(self._context.socket(zmq.PULL))
            sockets[-1].set(zmq.LINGER, 0)
            sockets[-1].connect('ipc://{}/rank{}-worker{}'.format(self._folder, rank, worker))
        turn = 0
        while not self._ended:
            if sockets[turn].poll(100):
                try:
                    zmq_ops.fetch_message(sockets[turn].recv())
                except OSError:
                    break  # the worker is dead, and the server says why
                self.counts[rank] += BATCH
                turn = (turn + 1) % len(sockets)
        for pull_socket in sockets:
            pull_socket.close()

    def wait(self, seconds):
        deadline = time.time() + seconds
        while time.time() < deadline:
            if self.process.poll() is not None:
                sys.exit('the server has ended')
            time.sleep(0.1)

    def wait_for_all(self):
        """Wait until what was ready before is used up."""
        while min(self.counts) < 5 * self.num_workers * BATCH:
            self.wait(0.1)

    def memory(self):
        """PSS of server and workers without files, in MB (2^20 bytes)."""
        pid, total = self.process.pid, 0
        with open('/proc/{0}/task/{0}/children'.format(pid)) as children:
            pids = [pid] + children.read().split()
        for pid in pids:
            with open('/proc/{}/smaps_rollup'.format(pid)) as lines:
                kilobytes = {line.split()[0]: int(line.split()[1]) for line in list(lines)[1:]}
            # Linux before 5.4 does not tell files apart
            total += kilobytes['Pss:'] - kilobytes.get('Pss_File:', 0)
        return total / 1024

    def close(self):
        self._ended = True
        for thread in self._threads:
            thread.join()
        self._context.term()
        self._control.close()
        os.close(self._lifeline)
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def measure_shares(server):
    server.wait_for_all()
    before = list(server.counts)
    server.wait(SHARE_SECONDS)
    images = np.subtract(server.counts, before)
    print('{} rank(s) with {} worker(s) each, images in {} s: {}; furthest from the mean {:.1f} %'
          .format(len(images), server.num_workers, SHARE_SECONDS, ' '.join(map(str, images)),
                  100 * np.abs(images / images.mean() - 1).max()), flush=True)


def measure_memory(server, minutes):
    start, samples = time.time(), []
    while not samples or samples[-1][0] < minutes:
        server.wait(SAMPLE_SECONDS)
        samples.append(((time.time() - start) / 60, server.memory()))
        if int(samples[-1][0]) > int(samples[-2][0] if len(samples) > 1 else 0):
            print('after {:.1f} minutes: {:.1f} MB, {} images'.format(
                *samples[-1], sum(server.counts)), flush=True)
    settled = np.array([sample for sample in samples if sample[0] > minutes / 4])
    print('{} ranks, from minute {:.1f} to {:.1f}: {:.1f} to {:.1f} MB, slope {:.2f} MB/min'.format(
        len(server.counts), settled[0, 0], settled[-1, 0], settled[:, 1].min(),
        settled[:, 1].max(), np.polyfit(settled[:, 0], settled[:, 1], 1)[0]))


def main(args):
    for ranks in RANKS:
        server = Server(ranks, args)
        try:
            measure_shares(server)
            if ranks == RANKS[-1]:
                measure_memory(server, args.minutes)
        finally:
            server.close()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help='folder of images')
    parser.add_argument('--image-size', type=int, default=32, help='pixels (default: 32)')
    parser.add_argument('--minutes', type=float, default=20, help='of memory (default: 20)')
    main(parser.parse_args())
