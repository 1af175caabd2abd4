"""Whatever ends a trainer or its data server, nothing is left of either,
and what remained says why in one line."""
import os
import shutil
import signal
import tempfile
import time

import pytest

import environment
from commands import (
    MOCO, PATIENCE, ROOT, finish, read_json, start, two_at_a_time, write_images)


def wait_until(condition):
    deadline = time.time() + PATIENCE
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def find_processes(word):
    """Ids of the living processes that have the word in their command line,
    in the order of their start."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open('/proc/{}/cmdline'.format(pid), errors='replace') as f:
                if word in f.read():
                    found.append(int(pid))
        except OSError:
            pass
    return sorted(found)


def is_trainer(pid):
    """Whether this is Python running the script, not horovodrun or a shell of its."""
    with open('/proc/{}/cmdline'.format(pid)) as f:
        return f.read().split('\0')[1].endswith('main_moco.py')


class Run:
    """A training that would take for ever."""

    def __init__(self, images, ranks, *flags):
        self.tmp = tempfile.mkdtemp(prefix='t')  # short, for the paths of sockets
        self.logdir = os.path.join(self.tmp, 'log')
        self.process = start(
            'main_moco.py', '--data', images, *MOCO, '--steps-per-epoch', 4, '--epochs', 1000000,
            '--logdir', self.logdir, *flags, ranks=ranks, tmp=self.tmp, start_new_session=True)

    def wait_for_an_epoch(self):
        wait_until(lambda: os.path.exists(os.path.join(self.logdir, 'stats.json')) or
                   self.process.poll() is not None)
        self.trainers = [pid for pid in find_processes(self.logdir + '\0') if is_trainer(pid)]
        self.server, *self.workers = find_processes(self.tmp + '/moco-')

    def wait_for_the_end(self):
        """Wait until nothing is left; returns the exit code and the lines of standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        wait_until(lambda: not find_processes(self.tmp) and os.listdir(self.tmp) == ['log'])
        return self.process.returncode, errors.splitlines()

    def clean(self):
        for pid in find_processes(self.tmp):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        shutil.rmtree(self.tmp, ignore_errors=True)


# name: (ranks, whom it hits, by which signal)
FAULTS = {
    'SIGTERM': (1, lambda run: run.process.pid, signal.SIGTERM),
    'SIGINT': (1, lambda run: run.process.pid, signal.SIGINT),
    'trainer killed': (1, lambda run: run.process.pid, signal.SIGKILL),
    'server killed': (1, lambda run: run.server, signal.SIGKILL),
    'worker killed': (1, lambda run: run.workers[-1], signal.SIGKILL),
    'SIGTERM to horovodrun': (2, lambda run: run.process.pid, signal.SIGTERM),
    'rank killed': (2, lambda run: run.trainers[1], signal.SIGKILL),
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), 12, 0)


@pytest.fixture(scope='module')
def ends(images):
    """Name -> exit code, lines of standard error, process id of whom it hit.

    That nothing was left has been waited for.
    """
    def end(fault):
        ranks, find_victim, number = fault
        run = Run(images, ranks)
        try:
            run.wait_for_an_epoch()
            assert len(run.trainers) == ranks
            victim = find_victim(run)
            os.kill(victim, number)
            return run.wait_for_the_end() + (victim,)
        finally:
            run.clean()
    return dict(zip(FAULTS, two_at_a_time(end, FAULTS.values())))


@pytest.mark.parametrize('name, code, errors', [
    ('SIGTERM', 128 + signal.SIGTERM, ['rank 0: stopped by SIGTERM']),
    ('SIGINT', 128 + signal.SIGINT, ['rank 0: stopped by SIGINT']),
    ('trainer killed', -signal.SIGKILL, []),
    ('server killed', 1, ['rank 0: the data server of this host is gone'])])
def test_nothing_is_left_and_one_line_says_why(ends, name, code, errors):
    assert ends[name][:2] == (code, errors)


def test_a_killed_worker_is_named(ends):
    code, errors, worker = ends['worker killed']
    assert code == 1
    assert len(errors) == 1 and 'pid {}) was killed by signal 9'.format(worker) in errors[0]


@pytest.mark.parametrize('name', ['SIGTERM to horovodrun', 'rank killed'])
def test_nothing_is_left_of_two_ranks(ends, name):
    assert ends[name][0] != 0


def test_waiting_for_data_is_seen(images):
    run = Run(images, 1)
    try:
        run.wait_for_an_epoch()

        def slow_down():
            # for longer than the batches that are ready last
            for number, seconds in ((signal.SIGSTOP, 3), (signal.SIGCONT, 0.2)):
                for pid in run.workers:
                    os.kill(pid, number)
                time.sleep(seconds)
            return max(epoch['data_wait'] for epoch in read_json(run.logdir, 'stats.json')) > 0.1
        wait_until(slow_down)
    finally:
        run.clean()


def cores_of_threads(pid):
    """The sets of cores that the threads of a process may use."""
    found = set()
    for thread in os.listdir('/proc/{}/task'.format(pid)):
        try:
            found.add(frozenset(os.sched_getaffinity(int(thread))))
        except ProcessLookupError:
            pass
    return found


@pytest.mark.skipif(len(environment.CORES) < 2, reason='needs two cores')
def test_cpus_keep_trainers_and_workers_apart(images):
    first, *others = sorted(environment.CORES)
    run = Run(images, 1, '--cpus', first)
    try:
        run.wait_for_an_epoch()
        assert len(run.trainers) == len(run.workers) == 1  # for its one core
        for pid in [run.server] + run.workers:
            assert cores_of_threads(pid) == {frozenset([first])}
        assert cores_of_threads(run.trainers[0]) == {frozenset(others)}
    finally:
        run.clean()


# the first checkpoint is being written as the session is closed
CLOSED_WHILE_SAVING = '''
import sys
sys.path.insert(0, {!r})
import main_moco
import training

save = training.Save._trigger


def end_and_save(self):
    self.trainer._ending.end('this is the end')
    save(self)


training.Save._trigger = end_and_save
main_moco.main(main_moco.parse_args())
'''.format(ROOT)


def test_a_session_that_is_closed_between_steps_is_no_second_error(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(CLOSED_WHILE_SAVING)
    process = start(script, '--fake', *MOCO, '--steps-per-epoch', 1, '--max-steps', 1,
                    '--logdir', tmp_path / 'log')
    _, errors = finish(process)
    assert process.returncode == 1
    assert errors.splitlines() == ['rank 0: this is the end']
