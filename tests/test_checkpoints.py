"""A run that is ended while it writes a checkpoint, by SIGKILL or by a full disk, continues from
the one before."""
import os
import shlex
import signal
import subprocess

import pytest

from commands import (
    MOCO, command, finish, run, start, start_command, write_images, write_script)
from weights import find_checkpoint, read_weights

# the second checkpoint is not finished
KILLED_WHILE_SAVING = '''
import os
import signal
import threading
import callbacks

save, checkpoints = callbacks.Save._trigger, []


def save_or_die(self):
    checkpoints.append(self.global_step)
    if len(checkpoints) == 2:
        threading.Timer({}, os.kill, [os.getpid(), signal.SIGKILL]).start()
    save(self)
    if len(checkpoints) == 2:
        signal.pause()


callbacks.Save._trigger = save_or_die
'''


@pytest.fixture
def flags(tmp_path):
    return ['--data', write_images(tmp_path / 'images', 12, 0), *MOCO, '--steps-per-epoch', 1,
            '--epochs', 1000]


def newest_step(logdir):
    """Of the newest checkpoint, which must be readable and of that step."""
    path = find_checkpoint(str(logdir))
    step = int(path.rpartition('-')[2])
    assert read_weights(path)['global_step'] == step
    return step


def test_a_kill_while_saving_leaves_the_checkpoint_before(flags, tmp_path):
    logdir, step = tmp_path / 'log', 0
    for delay in (0, 0.01, 0.03, 0.1):  # seconds; a checkpoint takes about 0.05
        script = write_script(tmp_path / 'script.py', KILLED_WHILE_SAVING.format(delay))
        process = start(script, *flags, '--logdir', logdir)
        output, errors = finish(process)
        assert process.returncode == -signal.SIGKILL, errors
        assert step == 0 or 'after step {}'.format(step) in output
        # the first of the two may be that of the step before: if the kill came between it and
        # stats.json, its epoch is ended again
        assert step <= newest_step(logdir) <= step + 2
        step = newest_step(logdir)
    for number in (step, 9):
        (logdir / f'model-{number}.data-00000-of-00001.tempstate123').write_text('half of one')
    assert newest_step(logdir) == step
    output, _ = run('main_moco.py', *flags, '--max-steps', step + 1, '--logdir', logdir)
    assert 'after step {}'.format(step) in output and newest_step(logdir) == step + 1
    assert not list(logdir.glob('*tempstate*'))


def can_mount():
    return os.getuid() == 0 and subprocess.call(
        ['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], stderr=subprocess.DEVNULL) == 0


@pytest.mark.skipif(not can_mount(), reason='needs to be root, and to mount')
def test_a_full_disk_leaves_the_checkpoint_before(flags, tmp_path):
    # there is room for two checkpoints of 2.2 MB and events of 1.4 MB; the disk is seen by this
    # command only
    disk, kept = tmp_path / 'disk', tmp_path / 'kept'
    disk.mkdir()
    words = command('main_moco.py', *flags, '--logdir', disk / 'log')
    process = start_command(['unshare', '-m', 'sh', '-c', (
        'mount -t tmpfs -o size=6000k tmpfs {0}; {1}; code=$?; cp -r {0}/log {2}; exit $code'
    ).format(shlex.quote(str(disk)), ' '.join(map(shlex.quote, words)), shlex.quote(str(kept)))])
    _, errors = finish(process)
    assert process.returncode == 1
    line, = errors.splitlines()
    assert line.startswith('rank 0: cannot write a checkpoint to {}, on whose disk '.format(
        disk / 'log')) and 'No space left on device' in line
    step = newest_step(kept)
    output, _ = run('main_moco.py', *flags, '--max-steps', step + 1, '--logdir', kept)
    assert 'after step {}'.format(step) in output and newest_step(kept) == step + 1
