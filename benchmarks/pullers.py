#!/usr/bin/env python
"""Does every rank get its share of a data server's images, and does its memory stay as it is?

    python benchmarks/pullers.py --data DIR    # half an hour, of which 20 minutes for memory
    python benchmarks/pullers.py --data DIR --minutes 3
    python benchmarks/pullers.py --data DIR --image-size 224 -- --cache 1    # the server's flags

One server each feeds 1, 2, 4 and 8 ranks that pull as fast as they can; printed are the images that
each gets, and by how much the furthest one is off the mean: the claim is at most 5 %. Then 8 ranks
go on for --minutes; printed are the memory of server and workers, and its slope after the first
quarter: the claim is less than 1 MB a minute. Memory is PSS, where processes divide their common
pages, without files: of a library's pages, the share falls while another job has the library too.
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import contextlib
import time

import numpy as np

from benchmarks import data_server

RANKS, BATCH, SHARE_SECONDS, SAMPLE_SECONDS = (1, 2, 4, 8), 32, 120, 5


def make_server(num_ranks, args):
    ranks = list(range(num_ranks))
    return data_server.Server(
        ['--data', args.data, '--task', 'moco-v2', '--batch', str(BATCH), '--image-size',
         str(args.image_size), '--ranks', ','.join(map(str, ranks)), '--size', str(num_ranks),
         *args.flags],
        ranks)


def measure_shares(server):
    server.wait_for_all()
    before = list(server.counts)
    server.wait(SHARE_SECONDS)
    images = np.subtract(server.counts, before)
    furthest = 100 * np.abs(images / images.mean() - 1).max()
    print(f'{len(images)} rank(s) with {server.workers_per_rank} worker(s) each, images in '
          f'{SHARE_SECONDS} s: {" ".join(map(str, images))}; furthest from the mean '
          f'{furthest:.1f} %', flush=True)


def measure_memory(server, minutes):
    start, samples = time.time(), []
    while not samples or samples[-1][0] < minutes:
        server.wait(SAMPLE_SECONDS)
        samples.append(((time.time() - start) / 60, read_memory(server.process.pid)))
        minute, memory = samples[-1]
        if int(minute) > int(samples[-2][0] if len(samples) > 1 else 0):
            print(f'after {minute:.1f} minutes: {memory:.1f} MB, {sum(server.counts)} images',
                  flush=True)
    times, memory = np.array([sample for sample in samples if sample[0] > minutes / 4]).T
    print(f'{len(server.counts)} ranks, from minute {times[0]:.1f} to {times[-1]:.1f}: '
          f'{memory.min():.1f} to {memory.max():.1f} MB, '
          f'slope {np.polyfit(times, memory, 1)[0]:.2f} MB/min')


def read_memory(server):
    """PSS of the process `server` and its workers without files, in MB (2^20 bytes)."""
    total = 0
    with open(f'/proc/{server}/task/{server}/children') as children:
        pids = [server] + children.read().split()
    for pid in pids:
        with open(f'/proc/{pid}/smaps_rollup') as lines:
            kilobytes = {line.split()[0]: int(line.split()[1]) for line in list(lines)[1:]}
        # Linux before 5.4 does not tell files apart
        total += kilobytes['Pss:'] - kilobytes.get('Pss_File:', 0)
    return total / 1024


def main(args):
    for num_ranks in RANKS:
        with contextlib.closing(make_server(num_ranks, args)) as server:
            server.start()
            measure_shares(server)
            if num_ranks == RANKS[-1]:
                measure_memory(server, args.minutes)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help='folder of images')
    parser.add_argument('--image-size', type=int, default=32, help='pixels (default: 32)')
    parser.add_argument('--minutes', type=float, default=20, help='of memory (default: 20)')
    parser.add_argument('flags', nargs='*', help='for serve-data.py, behind --')
    try:
        main(parser.parse_args())
    except data_server.Ended:
        sys.exit('the server has ended')
