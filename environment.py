"""Environment variables that TensorFlow and OpenMP read while they are loaded.

Importing this sets those that are not set; so scripts import it before anything else.
"""
import os


def num_cores():
    """How many cores this process may use: affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    try:
        with open('/sys/fs/cgroup/cpu.max') as version2:
            quota, period = version2.read().split()
    except (OSError, ValueError):
        try:
            with open('/sys/fs/cgroup/cpu/cpu.cfs_quota_us') as version1:
                quota = version1.read().strip()
            with open('/sys/fs/cgroup/cpu/cpu.cfs_period_us') as version1:
                period = version1.read().strip()
        except OSError:
            return cores
    if quota in ('max', '-1'):
        return cores
    return max(1, min(cores, round(int(quota) / int(period))))


def num_threads():
    """How many threads this rank computes with: its share of the host's cores."""
    return max(1, num_cores() // int(os.environ.get('HOROVOD_LOCAL_SIZE', 1)))


# OpenMP runs the heavy kernels of Intel's TensorFlow. Its threads must not spin (blocktime) while
# others want the core, and too many of them do little else: two ranks with two threads each on two
# cores train at 2/5 of the speed.
os.environ.setdefault('OMP_NUM_THREADS', str(num_threads()))
os.environ.setdefault('KMP_BLOCKTIME', '0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # errors only
