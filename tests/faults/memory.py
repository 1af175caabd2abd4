#!/usr/bin/env python
"""Memory of every process of a training, for half an hour: does any of them grow?

    python tests/faults/memory.py --data /path/to/images
    python tests/faults/memory.py --pid 1234    # watch a job that runs: the pid of its horovodrun

The first trains on two ranks, with the demo's network, in a folder that is removed. Every 10 s it
reads of each process (trainers, data server, its workers, launcher) two figures from /proc:

    RSS    all memory that it has mapped and touched, shared or not
    own    its proportional share (PSS) without files: libraries that other jobs use too are left
           out, as their share changes whenever such a job begins or ends

A line of sums is printed every minute; at the end, for each process, the first and last figure and
the slope by least squares, after the first quarter as warm-up. The exit code is 1 if a slope is
1 MB/min or more, or if the job ended too early. Processes that were there for less than half of
what follows the warm-up (data servers of kNN, say) are only counted. A job that is watched is never
signalled. Flags behind -- go to main_moco.py.
"""
import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from commands import command  # noqa: E402
from processes import list_processes, name_process, read_rank, read_status  # noqa: E402

INTERVAL = 10  # seconds between two samples
LIMIT = 1  # MB/min
DEMO = ['--v2', '--depth', 18, '--width', 32, '--stem', '3x3s2', '--image-size', 24,
        '--batch', 128, '--queue-size', 4096, '--momentum', 0.99]


def list_job(launcher):
    """Process ids of a launcher and of all that descend from it."""
    parents = {pid: read_status(pid)[1] for pid in list_processes()}
    job = [launcher] if launcher in parents else []
    for pid in job:
        job += sorted(child for child, parent in parents.items() if parent == pid)
    return job


def name(pid):
    """What a process is, and of a trainer its rank."""
    return 'rank {}'.format(read_rank(pid)) if name_process(pid) == 'trainer' else name_process(pid)


def read_memory(pid):
    """RSS and own memory in MB; raises OSError if the process is gone."""
    with open('/proc/{}/smaps_rollup'.format(pid)) as f:
        fields = dict(line.split(':') for line in f.read().splitlines()[1:])
    if not fields:
        raise ProcessLookupError
    kilobytes = {name: int(text.split()[0]) for name, text in fields.items()}
    # Linux before 5.4 does not tell files apart
    own = kilobytes['Pss'] - kilobytes.get('Pss_File', 0)
    return kilobytes['Rss'] / 1024, own / 1024


def watch(launcher, minutes):
    """Sample a job; prints a line a minute.

    Returns:
        dict of (pid, what it is) -> list of (minute, RSS, own), and whether the job is still there.
    """
    start, samples, names = time.time(), {}, {}
    count = int(minutes * 60 / INTERVAL) + 1
    for number in range(count):
        time.sleep(max(0, start + number * INTERVAL - time.time()))
        minute, job = (time.time() - start) / 60, list_job(launcher)
        if not job:
            return samples, False
        now = []
        for pid in job:
            names[pid] = names.get(pid) or name(pid)
            with contextlib.suppress(OSError):
                now.append(read_memory(pid))
                samples.setdefault((pid, names[pid]), []).append((minute,) + now[-1])
        if number % (60 // INTERVAL) == 0 or number == count - 1:
            rss, own = np.sum(now, axis=0)
            print('{:5.1f} min: {:2} processes, RSS {:.1f} MB, own {:.1f} MB'.format(
                minute, len(now), rss, own), flush=True)
    return samples, True


def fit(samples):
    """First figure, last figure and slope, of RSS and of own memory."""
    minute, *figures = np.transpose(samples)
    return [(figure[0], figure[-1], np.polyfit(minute, figure, 1)[0]) for figure in figures]


def report(samples):
    """Print the table; returns whether a process grows."""
    end = max(minute for figures in samples.values() for minute, *_ in figures)
    warm = {key: [figure for figure in figures if figure[0] >= end / 4]
            for key, figures in samples.items()}
    longest = max(map(len, warm.values()))
    if longest < 3:
        sys.exit('memory: too short to tell')
    print('\n{:32}{:>28}{:>28}'.format('', 'RSS: MB, MB, MB/min', 'own: MB, MB, MB/min'))
    grows, few = False, 0
    for (pid, name), figures in warm.items():
        if len(figures) < longest / 2:
            few += 1
            continue
        fits = fit(figures)
        verdict = any(slope >= LIMIT for _, _, slope in fits)
        grows |= verdict
        print('{:32}{}{}'.format('{} ({})'.format(name, pid), ''.join(
            '{:10.1f}{:9.1f}{:+9.3f}'.format(*values) for values in fits),
            '  GROWS' if verdict else ''))
    print('from minute {:.1f} to {:.1f}; {} other processes came or went'.format(
        end / 4, end, few))
    return grows


@contextlib.contextmanager
def training(data, flags):
    """Yields the pid of a horovodrun whose training is under way; ends it."""
    tmp = tempfile.mkdtemp(prefix='memory-')
    logdir = os.path.join(tmp, 'log')
    process = subprocess.Popen(
        command('main_moco.py', '--data', os.path.abspath(data), *DEMO, '--epochs', 1000000,
                '--logdir', logdir, *flags, ranks=2),
        env=dict(os.environ, TMPDIR=tmp), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not os.path.exists(os.path.join(logdir, 'stats.json')):
            if process.poll() is not None:
                sys.exit('memory: the training has ended, see above')
            time.sleep(1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(tmp)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--data', metavar='DIR', help='train on these images')
    what.add_argument('--pid', type=int, help='watch the job of this launcher')
    parser.add_argument('--minutes', type=float, default=30, help='how long (default: 30)')
    parser.add_argument('flags', nargs='*', help='for main_moco.py, behind --')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up
    with contextlib.nullcontext(args.pid) if args.pid else training(args.data, args.flags) as pid:
        samples, alive = watch(pid, args.minutes)
    if not samples:
        sys.exit('memory: there is no process {}'.format(args.pid))
    grows = report(samples)
    if not alive:
        print('the job has ended before its time')
    return int(grows or not alive)


if __name__ == '__main__':
    sys.exit(main())
