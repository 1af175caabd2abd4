"""Whatever ends a trainer or its data server, nothing is left of either,
and what remained says why in one line."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from tensorpack import tfv1 as tf

from commands import (
    MOCO, NETWORK, PATIENCE, ROOT, finish, read_json, run, start, start_command, two_at_a_time,
    write_images, write_script)
from errors import one_line
from job import cores
from processes import find_processes, name_process, read_rank, wait_until
from runs import MARKER
from weights import find_checkpoint, read_weights


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
        self.trainers = sorted((pid for pid in find_processes(self.logdir + '\0')
                                if name_process(pid) == 'trainer'), key=read_rank)
        self.server, *self.workers = find_processes('serve-data.py\0--address\0' + self.tmp)

    def wait_for_the_end(self):
        """Wait until nothing is left; returns the exit code and the lines of standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        wait_until(lambda: not find_processes(self.tmp) and os.listdir(self.tmp) == ['log'])
        return self.process.returncode, errors.splitlines()

    def last_step(self):
        return int(find_checkpoint(self.logdir).rsplit('-', 1)[1])

    def read_marker(self):
        path = os.path.join(self.logdir, MARKER)
        if not os.path.exists(path):
            return None
        with open(path) as f:
            return f.read()

    def clean(self):
        for pid in find_processes(self.tmp):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        shutil.rmtree(self.tmp, ignore_errors=True)


def find_worker_of_busy_server(run):
    """A worker whose end the server will only see when the trainer may have missed its batches."""
    os.kill(run.server, signal.SIGSTOP)
    threading.Timer(0.7, os.kill, [run.server, signal.SIGCONT]).start()
    return run.workers[-1]


def send_to_all(run):
    """Send SIGUSR1 to all processes but horovodrun, as a scheduler does; the second rank gets it
    twice."""
    for pid in run.trainers + [run.server] + run.workers:
        os.kill(pid, signal.SIGUSR1)
    return run.trainers[1]


# name: (ranks, whom it hits, by which signal)
FAULTS = {
    'SIGTERM': (1, lambda run: run.process.pid, signal.SIGTERM),
    'SIGINT': (1, lambda run: run.process.pid, signal.SIGINT),
    'SIGHUP': (1, lambda run: run.process.pid, signal.SIGHUP),
    'trainer killed': (1, lambda run: run.process.pid, signal.SIGKILL),
    'server killed': (1, lambda run: run.server, signal.SIGKILL),
    'worker killed': (1, lambda run: run.workers[-1], signal.SIGKILL),
    'worker killed, server busy': (1, find_worker_of_busy_server, signal.SIGKILL),
    'SIGTERM to horovodrun': (2, lambda run: run.process.pid, signal.SIGTERM),
    'SIGTERM to a rank': (2, lambda run: run.trainers[1], signal.SIGTERM),
    'SIGUSR1 to all': (2, send_to_all, signal.SIGUSR1),
    'server of two killed': (2, lambda run: run.server, signal.SIGKILL),
    'worker of two killed': (2, lambda run: run.workers[-1], signal.SIGKILL),
    'rank killed': (2, lambda run: run.trainers[1], signal.SIGKILL),
    'horovodrun killed': (2, lambda run: run.process.pid, signal.SIGKILL),
    'rank 0 stopped': (2, lambda run: run.trainers[0], signal.SIGSTOP),
    'rank 1 stopped': (2, lambda run: run.trainers[1], signal.SIGSTOP),
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), 12, 0)


@pytest.fixture(scope='module')
def ends(images):
    """Name -> exit code, lines of standard error, process id of whom it hit, and of what the log
    folder holds: the newest checkpoint's step, and the text of the file resume-me or None.

    That nothing was left has been waited for.
    """
    def end(fault):
        ranks, find_victim, number = fault
        run = Run(images, ranks, '--stall-limit', 20)
        try:
            run.wait_for_an_epoch()
            assert len(run.trainers) == ranks
            victim = find_victim(run)
            os.kill(victim, number)
            return run.wait_for_the_end() + (victim, run.last_step(), run.read_marker())
        finally:
            run.clean()
    return dict(zip(FAULTS, two_at_a_time(end, FAULTS.values())))


@pytest.mark.parametrize('name, code, errors', [
    ('trainer killed', -signal.SIGKILL, []),
    ('server killed', 1, ['rank 0: the data server of this host is gone'])])
def test_nothing_is_left_and_one_line_says_why(ends, name, code, errors):
    assert ends[name][:2] == (code, errors)
    assert ends[name][4] is None


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_who_is_asked_to_end_writes_a_checkpoint_first(ends, name):
    code, errors, _, step, marker = ends[name]
    line = 'stopped by {} after step {}: the same command continues'.format(name, step)
    assert (code, errors, marker) == (75, ['rank 0: ' + line], line + '\n')


@pytest.mark.parametrize('name, who', [
    ('SIGTERM to horovodrun', ['SIGTERM', 'SIGTERM']),
    ('SIGUSR1 to all', ['SIGUSR1', 'SIGUSR1']),
    ('SIGTERM to a rank', ['a signal to another rank', 'SIGTERM'])])
def test_all_ranks_end_after_the_same_step(ends, name, who):
    _, errors, _, step, marker = ends[name]
    lines = ['stopped by {} after step {}: the same command continues'.format(by, step)
             for by in who]
    said = '\n'.join(errors)
    for rank, line in enumerate(lines):
        assert 'rank {}: {}'.format(rank, line) in said
    if name == 'SIGTERM to a rank':
        # horovodrun tells of the first one; if it was itself asked to end, it may lose exit codes:
        # its psutil waits for the same process as its subprocess, which then takes it for 0
        assert 'Exit code: 75' in said
    assert marker == lines[0] + '\n'


@pytest.mark.parametrize('rank', [0, 1])
def test_a_rank_that_stops_is_named(ends, rank):
    code, errors, pid, _, marker = ends['rank {} stopped'.format(rank)]
    assert code != 0 and marker is None
    assert 'rank {}: waited for rank {} (process {} on '.format(1 - rank, rank, pid) in (
        '\n'.join(errors))


@pytest.mark.parametrize('name', ['worker killed', 'worker killed, server busy'])
def test_a_killed_worker_is_named(ends, name):
    code, errors, worker = ends[name][:3]
    assert code == 1
    assert len(errors) == 1 and 'pid {}) was killed by signal 9'.format(worker) in errors[0]


def test_every_rank_of_a_host_notices_its_server(ends):
    for name, words in [('server of two killed', 'the data server of this host is gone'),
                        ('worker of two killed', 'was killed by signal 9')]:
        code, errors = ends[name][:2]
        assert code != 0 and any(words in line for line in errors), errors


@pytest.mark.parametrize('name', ['SIGTERM to a rank', 'rank killed', 'horovodrun killed'])
def test_nothing_is_left_of_two_ranks(ends, name):
    assert ends[name][0] != 0


def test_random_moments():
    script = os.path.join(ROOT, 'tests', 'faults', 'kill_at_random.py')
    # its default limits are for a machine that does nothing else
    done = subprocess.run(
        [sys.executable, script, '--rounds', '3', '--ranks', '2', '--limits', '60', '60'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    assert done.returncode == 0 and 'nothing was left, nothing was lost' in done.stdout, done.stdout


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


@pytest.mark.skipif(len(cores.CORES) < 2, reason='needs two cores')
def test_cpus_keep_trainers_and_workers_apart(images):
    first, *others = sorted(cores.CORES)
    run = Run(images, 1, '--cpus', first)
    try:
        run.wait_for_an_epoch()
        assert len(run.trainers) == len(run.workers) == 1  # for its one core
        for pid in [run.server] + run.workers:
            assert cores_of_threads(pid) == {frozenset([first])}
        assert cores_of_threads(run.trainers[0]) == {frozenset(others)}
    finally:
        run.clean()


@pytest.mark.parametrize('message', [
    'no room',
    'no room\n\t [[{{node Save}}]]',
    "Graph execution error:\n\nDetected at node 'Save'\n  File\nNode: 'Save'\nno room\n\t [[{{",
    "Graph execution error:\n\nNode: 'a'\n2 root error(s) found.\n  no room\n\t [[{{node a}}]]"])
def test_an_error_of_tensorflow_is_told_in_one_line(message):
    error = tf.errors.InternalError(None, None, message)
    assert one_line(error) == 'no room'


# the first checkpoint is being written as the session is closed
CLOSED_WHILE_SAVING = '''
import callbacks
from job.shutdown import shutdown

save = callbacks.Save._trigger


def end_and_save(self):
    shutdown.end('this is the end')
    save(self)


callbacks.Save._trigger = end_and_save
'''


def test_a_session_that_is_closed_between_steps_is_no_second_error(tmp_path):
    script = write_script(tmp_path / 'script.py', CLOSED_WHILE_SAVING)
    process = start(script, '--fake', *MOCO, '--steps-per-epoch', 1, '--max-steps', 1,
                    '--logdir', tmp_path / 'log')
    _, errors = finish(process)
    assert process.returncode == 1
    assert errors.splitlines() == ['rank 0: this is the end']


# asked to end as it evaluates, which takes long
SIGNAL_WHILE_EVALUATING = '''
import os
import signal
import time
import eval_knn


def never_end(self):
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(1)


eval_knn.OnlineKNN._trigger_epoch = never_end
'''


def test_an_evaluation_that_was_cut_off_is_repeated(tmp_path):
    flags = ['--data', write_images(tmp_path / 'images', 12, 4), *MOCO, '--steps-per-epoch', 2,
             '--max-steps', 2, '--knn-every', 1, '--logdir', tmp_path / 'log']
    process = start(write_script(tmp_path / 'script.py', SIGNAL_WHILE_EVALUATING), *flags)
    _, errors = finish(process)
    assert process.returncode == 75, errors
    assert (tmp_path / 'log' / MARKER).exists()
    assert not (tmp_path / 'log' / 'stats.json').exists()
    for _ in range(2):  # and then not again
        run('main_moco.py', *flags)
        epoch, = read_json(tmp_path, 'log', 'stats.json')
        assert (epoch['epoch_num'], epoch['global_step']) == (1, 2) and 'knn_top1' in epoch
    assert not (tmp_path / 'log' / MARKER).exists()


# asked to end in the last step of the first epoch
SIGNAL_IN_LAST_STEP = '''
import os
import signal
import time
import trainer
from job.shutdown import shutdown

run_step = trainer.Trainer.run_step


def end_and_run(self):
    if self.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        while not shutdown.asked:
            time.sleep(0.01)
    run_step(self)


trainer.Trainer.run_step = end_and_run
'''


def test_an_epoch_that_ended_with_a_signal_is_evaluated_later(tmp_path):
    flags = ['--data', write_images(tmp_path / 'images', 12, 4), *MOCO, '--steps-per-epoch', 2,
             '--max-steps', 4, '--knn-every', 1, '--logdir', tmp_path / 'log']
    process = start(write_script(tmp_path / 'script.py', SIGNAL_IN_LAST_STEP), *flags)
    _, errors = finish(process)
    assert process.returncode == 75 and 'after step 2: the same command' in errors
    for _ in range(2):  # and then not again
        run('main_moco.py', *flags)
        stopped, *epochs = read_json(tmp_path, 'log', 'stats.json')
        assert stopped['global_step'] == 2 and stopped['stopped'] and 'knn_top1' not in stopped
        assert [(epoch['epoch_num'], epoch['global_step']) for epoch in epochs] == [(1, 2), (2, 4)]
        assert all('knn_top1' in epoch for epoch in epochs)


RAISES = '''
import horovod.tensorflow as hvd
import callbacks


after_run = callbacks.EpochMeans._after_run


def fail(self, context, values):
    after_run(self, context, values)
    if hvd.rank() == 1 and self.global_step == 3:
        raise KeyError('a mistake')


callbacks.EpochMeans._after_run = fail
'''


def test_an_exception_in_a_rank_ends_all(images, tmp_path):
    script = write_script(tmp_path / 'script.py', RAISES)
    process = start(script, '--data', images, *MOCO, '--steps-per-epoch', 4, '--epochs', 1000000,
                    '--logdir', tmp_path / 'log', ranks=2, tmp=tmp_path)
    _, errors = finish(process)
    assert process.returncode != 0 and "KeyError: 'a mistake'" in errors
    wait_until(lambda: not find_processes(str(tmp_path)))
    assert set(os.listdir(str(tmp_path))) == {'log', 'script.py'}


def test_a_loss_that_is_not_finite_ends_all_and_is_not_saved(tmp_path):
    process = start('main_moco.py', '--fake', *MOCO, '--lr', '1e36', '--steps-per-epoch', 1,
                    '--epochs', 1000, '--logdir', tmp_path / 'log', ranks=2)
    _, errors = finish(process)
    assert process.returncode != 0
    assert re.search(r'rank \d: (loss is (nan|inf) at|.* is not finite after) step \d+: stopped; '
                     'checkpoints are of earlier steps', errors)
    path = find_checkpoint(str(tmp_path / 'log'))
    if path:  # there may have been no good step
        for name, value in read_weights(path).items():
            assert np.isfinite(value).all(), name


def start_on_two_hosts(script, *flags, tmp):
    """Start a command on what counts as two hosts: two names of this machine. In the last flag,
    {} is the rank."""
    words = [sys.executable, os.path.join(ROOT, script)] + [str(flag) for flag in flags]
    line = ' '.join(map(shlex.quote, words[:-1])) + ' ' + words[-1].format('$HOROVOD_RANK')
    return start_command(
        [os.path.join(os.path.dirname(sys.executable), 'horovodrun'), '-np', '2',
         '-H', 'localhost:1,127.0.0.1:1', 'sh', '-c', 'exec ' + line], tmp=tmp)


def test_hosts_must_have_the_same_images(tmp_path):
    # the second one has an image more
    for rank in (0, 1):
        write_images(tmp_path / str(rank), 12 + rank, 0)
    process = start_on_two_hosts('main_moco.py', *MOCO, '--logdir', tmp_path / 'log', '--data',
                                 str(tmp_path) + '/{}', tmp=tmp_path)
    _, errors = finish(process)
    assert process.returncode != 0
    assert 'error: --data holds other images on the hosts of the ranks 1 than on that' in errors


def test_what_fails_on_one_host_only_is_told(tmp_path):
    write_images(tmp_path / 'data', 12, 4)
    np.savez(str(tmp_path / '0.npz'))
    process = start_on_two_hosts('eval_knn.py', *NETWORK, '--data', tmp_path / 'data', '--load',
                                 str(tmp_path) + '/{}.npz', tmp=tmp_path)
    _, errors = finish(process)
    assert process.returncode != 0
    assert '{}/1.npz: does not exist (rank 1)'.format(tmp_path) in errors


# a rank that lives, but does not come to what the other waits for
STUCK = '''
import time
import horovod.tensorflow as hvd
import eval_knn

find_nearest = eval_knn.find_nearest


def be_stuck(*args):
    if hvd.rank() == 1:
        time.sleep(10000)
    return find_nearest(*args)


eval_knn.find_nearest = be_stuck
'''


def test_a_rank_that_is_stuck_in_an_evaluation_is_named(tmp_path):
    process = start(
        write_script(tmp_path / 'script.py', STUCK), '--data',
        write_images(tmp_path / 'images', 12, 4), *MOCO, '--steps-per-epoch', 1, '--max-steps', 1,
        '--knn-every', 1, '--logdir', tmp_path / 'log', '--stall-limit', 20, ranks=2)
    _, errors = finish(process)
    assert process.returncode != 0
    assert re.search(r'rank 0: waited for rank 1 \(process \d+ on \S+\), which lives, but has not '
                     'got as far as others for 20 s', errors), errors


SLOW = '''
import os, signal, time
from job import ranks
run_together = ranks.run_together
def slow(sess, fetches, feeds=None, what='evaluation'):
    if what == 'step 3':
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(6)
    return run_together(sess, fetches, feeds, what)
ranks.run_together = slow'''


@pytest.mark.parametrize('grace, checkpoints, said', [
    (2, [], 'with no time for a checkpoint'), (60, ['model-4.index'], 'after step 4')])
def test_the_grace_after_sigterm_is_a_setting(tmp_path, grace, checkpoints, said):
    process = start(write_script(tmp_path / 'script.py', SLOW), '--fake', *MOCO, '--grace', grace,
                    '--logdir', tmp_path / 'log')
    _, errors = finish(process)
    assert process.returncode == 75 and said in errors, errors
    assert [path.name for path in tmp_path.glob('log/*.index')] == checkpoints


def test_the_end_comes_though_nobody_reads_standard_error():
    code = """if True:
        import os, sys, time
        sys.path.insert(0, {!r})
        from job.shutdown import Shutdown
        read, write = os.pipe()
        os.dup2(write, 2)
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, b'x' * 65536)
        except BlockingIOError:
            os.set_blocking(2, True)
        Shutdown().end('a reason', code=3, grace=1)
        time.sleep(10000)""".format(ROOT)
    assert subprocess.call([sys.executable, '-c', code], timeout=PATIENCE) == 3
