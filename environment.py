"""Cores, and environment variables that TensorFlow, OpenMP and OpenCV read while they are loaded.

Importing this takes the cores that --cpus leaves, and sets the variables that are not set; so
scripts import it before anything else. Ctrl-C then ends a script at once until it has handlers of
its own: as a KeyboardInterrupt, one in ten was lost in libraries that were being loaded.
"""
import argparse
import contextlib
import os
import resource
import signal
import sys

CORES = os.sched_getaffinity(0)  # that this process was given


def parse_cpus(text):
    """The cores of a list like 0-3,8, some of CORES: a set.

    Raises:
        argparse.ArgumentTypeError: what is wrong with them.
    """
    try:
        ranges = [range(int(first), int(last if dash else first) + 1) for first, dash, last in
                  (part.partition('-') for part in text.split(','))]
    except ValueError:
        ranges = [()]
    if not all(ranges):
        raise argparse.ArgumentTypeError('{} is not a list of cores like 0-3,8'.format(text))
    for core in (core for cores in ranges for core in cores):
        if core not in CORES:
            raise argparse.ArgumentTypeError('{}: core {} is not one that may be used: {}'.format(
                text, core, ','.join(map(str, sorted(CORES)))))
    if CORES <= set().union(*ranges):
        raise argparse.ArgumentTypeError('{} leaves no core for the trainers'.format(text))
    return set().union(*ranges)


def find_cpus(argv):
    """What a command line says of --cpus, or None. What is wrong with it, the script's own parser
    says; but that comes after TensorFlow has been loaded, too late for its threads."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--cpus')
    try:
        return parse_cpus(parser.parse_known_args(argv)[0].cpus or '')
    except argparse.ArgumentTypeError:
        return None


def num_cores(cores=None, root='/sys/fs/cgroup', groups='/proc/self/cgroup'):
    """How many of the given cores (of those that it runs on) this process may use at once: the
    quota of its control group, or of one around that, may be less."""
    number = len(cores or os.sched_getaffinity(0))
    for folder in control_groups(root, groups):
        for read in (read_quota, read_quota_v1):
            with contextlib.suppress(OSError, ValueError):
                quota, period = read(folder)
                if quota > 0:  # v1 has -1 for none
                    number = min(number, round(quota / period))
    return max(1, number)


def control_groups(root, groups):
    """Folders of the control groups that this process is in, up to the outermost."""
    found = [root, os.path.join(root, 'cpu')]  # all that is seen inside a container
    with contextlib.suppress(OSError), open(groups) as lines:
        for _, controllers, path in (line.rstrip('\n').split(':', 2) for line in lines):
            if controllers == '' or 'cpu' in controllers.split(','):
                parts = path.strip('/').split('/')
                found += [os.path.join(root, 'cpu' if controllers else '', *parts[:i])
                          for i in range(1, len(parts) + 1)]
    return found


def read_quota(folder):
    """Version 2: (microseconds, in which time); ValueError if there is no limit."""
    with open(os.path.join(folder, 'cpu.max')) as file:
        quota, period = map(int, file.read().split())
    return quota, period


def read_quota_v1(folder):
    with open(os.path.join(folder, 'cpu.cfs_quota_us')) as quota, open(
            os.path.join(folder, 'cpu.cfs_period_us')) as period:
        return int(quota.read()), int(period.read())


def allow_open_files(needed):
    """Raise the soft limit of open files to what is needed.

    Raises:
        ValueError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError('{} open files are needed, but the limit is {}: '
                         'raise it with ulimit -n'.format(needed, hard))
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def num_threads():
    """How many threads this rank computes with: its share of the host's cores."""
    return max(1, num_cores() // int(os.environ.get('HOROVOD_LOCAL_SIZE', 1)))


HERE = os.path.dirname(os.path.abspath(__file__))
if os.path.dirname(os.path.abspath(sys.argv[0])) == HERE:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

CPUS = find_cpus(sys.argv[1:])  # the data workers' own cores, or None
if CPUS:
    os.sched_setaffinity(0, CORES - CPUS)

# OpenMP runs the heavy kernels of Intel's TensorFlow. Its threads must not spin (blocktime) while
# others want the core, and too many of them do little else: two ranks with two threads each on two
# cores train at 2/5 of the speed.
os.environ.setdefault('OMP_NUM_THREADS', str(num_threads()))
os.environ.setdefault('KMP_BLOCKTIME', '0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # errors only
os.environ.setdefault('OPENCV_LOG_LEVEL', 'OFF')  # of unreadable images, which serve-data.py names
# A file of 631 bytes can declare 30,000 x 30,000 pixels, which take 5 GB to decode. PIL's limit, so
# the official code's; what is larger counts as unreadable.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', str(2**30 // 6))
