"""Cores: which this process may use, how many threads fit them, and what libraries are told."""
import argparse
import contextlib
import glob
import itertools
import os
import pathlib
import resource
import signal
import sys
import sysconfig
from typing import Iterable, List, Optional, Set

from errors import UserError
from job import signals

PACKAGES = ('cv2', 'google', 'h5py', 'horovod', 'msgpack', 'numpy', 'PIL', 'tensorflow',
            'tensorpack', 'yaml', 'zmq')
CORES = os.sched_getaffinity(0)  # that this host's ranks were given: this process, and all others
_ranks_per_core = None  # local ranks that share this rank's cores, if not all of them do


def add_ranks(cores_of_ranks: List[Set[int]]) -> None:
    """Tell of the cores of each of this host's ranks: a launcher may have bound them to their own,
    which are then not to be divided again."""
    global _ranks_per_core
    CORES.update(*cores_of_ranks)
    _ranks_per_core = max(sum(core in cores for cores in cores_of_ranks)
                          for core in os.sched_getaffinity(0))


def set_up(argv: List[str]) -> None:
    """Keep to the cores that --cpus in a script's flags leaves, and set environment variables that
    are not set. Libraries read them while they are loaded: to be called before."""
    # Until a script has handlers of its own, Ctrl-C ends it at once: libraries that are being
    # loaded lose one KeyboardInterrupt in ten.
    if not signals.ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    leave_other_packages()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--cpus', default='')
    with contextlib.suppress(argparse.ArgumentTypeError):  # the script's own parser reports it
        cpus = parse_cpus(parser.parse_known_args(argv)[0].cpus)
        left = os.sched_getaffinity(0) - cpus
        if not left:
            sys.exit(f'--cpus leaves no core to a rank that is bound to {format_cpus(cpus)}')
        os.sched_setaffinity(0, left)
    for name, value in {
            # Intel's TensorFlow computes in OpenMP's threads. More threads than cores train at 2/5
            # of the speed, and threads that spin while they wait (blocktime) take others' cores.
            'OMP_NUM_THREADS': num_threads(),
            'KMP_BLOCKTIME': 0,
            'TF_CPP_MIN_LOG_LEVEL': 2,  # errors only
            'OPENCV_LOG_LEVEL': 'OFF',  # the data server names unreadable images itself
            # A file of 631 bytes can declare 30,000 x 30,000 pixels, which take 5 GB to decode.
            # This is PIL's limit, hence the official code's.
            'OPENCV_IO_MAX_IMAGE_PIXELS': 2**30 // 6}.items():
        os.environ.setdefault(name, str(value))
    # pip's CUDA has libdevice and ptxas where XLA does not look for them
    cuda = os.path.join(sysconfig.get_path('purelib'), 'nvidia', 'cuda_nvcc')
    flags = os.environ.get('XLA_FLAGS', '')
    if os.path.isdir(cuda) and '--xla_gpu_cuda_data_dir' not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_cuda_data_dir={cuda}'.strip()


def leave_other_packages() -> None:
    """Leave folders of PYTHONPATH that have another cv2, say, than this environment: ROS and its
    like set it, for other Pythons. In this process, and in those that it starts."""
    entries = [entry for entry in os.environ.get('PYTHONPATH', '').split(os.pathsep) if entry]
    own = [folder for folder in sys.path if folder not in entries]
    others = {}  # folder -> package
    for folder, name in itertools.product(entries, PACKAGES):
        if has_package(folder, name) and any(has_package(other, name) for other in own):
            others.setdefault(folder, name)
    if others:
        os.environ['PYTHONPATH'] = os.pathsep.join(
            entry for entry in entries if entry not in others)
        sys.path[:] = [folder for folder in sys.path if folder not in others]
        for folder, name in others.items():
            print(f'PYTHONPATH: {folder} is left out, since it has a {name} of its own',
                  file=sys.stderr)


def has_package(folder: str, name: str) -> bool:
    return any(glob.glob(os.path.join(glob.escape(folder), name + ending))
               for ending in ('', '.py', '.*so'))


def parse_cpus(text: str) -> Set[int]:
    """The cores in a list like 0-3,8, for argparse."""
    try:
        ranges = [range(int(first), int(last if dash else first) + 1) for first, dash, last in
                  (part.partition('-') for part in text.split(','))]
    except ValueError:
        ranges = [()]
    if not all(ranges):
        raise argparse.ArgumentTypeError(f'{text} is not a list of cores like 0-3,8')
    for core in (core for cores in ranges for core in cores):
        if core not in CORES:
            raise argparse.ArgumentTypeError(f'{text}: core {core} is not one that may be used: '
                                             f'{format_cpus(CORES)}')
    if CORES <= set().union(*ranges):
        raise argparse.ArgumentTypeError(f'{text} leaves no core for the trainers')
    return set().union(*ranges)


def format_cpus(cores: Iterable[int]) -> str:
    return ','.join(map(str, sorted(cores)))


def num_threads() -> int:
    """The threads that this rank computes with: its share of the host's cores."""
    local_size = int(os.environ.get('HOROVOD_LOCAL_SIZE', 1))
    return max(1, min(num_cores() // (_ranks_per_core or local_size),
                      num_cores(CORES) // local_size))


def num_cores(cores: Optional[Iterable[int]] = None, root: str = '/sys/fs/cgroup',
              groups: str = '/proc/self/cgroup') -> int:
    """How many of these cores (default: this process's) may be used at once: the quota of a control
    group may be smaller than their number."""
    # folders of this process's control groups, and of those around them
    folders = [root, os.path.join(root, 'cpu')]  # all that is seen inside a container
    with contextlib.suppress(OSError):
        for line in pathlib.Path(groups).read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            if controllers == '' or 'cpu' in controllers.split(','):
                parts = path.strip('/').split('/')
                folders += [os.path.join(root, 'cpu' if controllers else '', *parts[:i])
                            for i in range(1, len(parts) + 1)]
    number = len(cores or os.sched_getaffinity(0))
    for folder in folders:
        for names in (['cpu.max'], ['cpu.cfs_quota_us', 'cpu.cfs_period_us']):  # version 2, 1
            with contextlib.suppress(OSError, ValueError):  # 'max' is no number
                quota, period = [int(word) for name in names
                                 for word in pathlib.Path(folder, name).read_text().split()]
                if quota > 0:  # version 1 has -1 for none
                    number = min(number, round(quota / period))
    return max(1, number)


def allow_open_files(needed: int) -> None:
    """Raise the soft limit of open files; a hard limit below it is a UserError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f'{needed} open files are needed, but the limit is {hard}: '
                        'raise it with ulimit -n')
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
