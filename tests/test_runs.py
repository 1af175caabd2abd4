"""runs.py, checkpoints.py, network.py: what is in a log folder is never trained over from step 0,
never written by two jobs, and always known for what it is."""
import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import types

import horovod.tensorflow as hvd
import numpy as np
import pytest
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import callbacks
import checkpoints
import network
import resnet
import runs
import weights
from commands import ROOT, finish
from errors import UserError

hvd.init()


def write_run(folder, steps=(3, 5), epochs=2, state=True, counter=True):
    """Checkpoints of these steps, as a run writes them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.get_variable('x', [1000], initializer=tf.ones_initializer())
        variables = [x] + ([tf.train.get_or_create_global_step()] if counter else [])
        saver = tf.train.Saver(variables)
        sess.run(tf.global_variables_initializer())
        for step in steps:
            if counter:
                sess.run(variables[1].assign(step))
            saver.save(sess, str(folder / 'model'), step, write_meta_graph=False, write_state=False)
    if state and steps:
        checkpoints.write_pointer([str(folder / f'model-{step}') for step in steps])
    (folder / 'stats.json').write_text(json.dumps(
        [{'epoch_num': i, 'global_step': step} for i, step in enumerate(steps[:epochs], 1)]))
    return folder


def remove(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


def cut(folder, pattern, size):
    for path in folder.glob(pattern):
        os.truncate(str(path), size)


@pytest.fixture
def said(monkeypatch):
    """Warnings of the log."""
    lines = []
    monkeypatch.setattr(logger, 'warn', lines.append)
    monkeypatch.setattr(checkpoints.logging.getLogger('tensorpack'), 'warning', lines.append)
    return lines


NAMES = ['plain', 'a[1]', 'run*', 'what?', '{a,b}', 'back\\slash', "it's", 'mit Leerzeichen', 'µ',
         '-x', '[!a]', '%d%s', '$HOME', '~x']
# name: (what happens to a run of steps 3 and 5, the step from which it goes on, words of warnings)
HARM = {
    'nothing': (lambda folder: None, 5, []),
    'no file checkpoint': (lambda folder: remove(folder, 'checkpoint'), 5, ['says nothing']),
    'an empty file checkpoint': (lambda folder: cut(folder, 'checkpoint', 0), 5, ['says nothing']),
    'half of the file checkpoint': (
        lambda folder: cut(folder, 'checkpoint', 30), 5, ['says nothing']),
    'an old file checkpoint': (
        lambda folder: checkpoints.write_pointer([str(folder / 'model-3')]), 5, ['model-3']),
    'a file checkpoint of another place': (
        lambda folder: (folder / 'checkpoint').write_text(
            'model_checkpoint_path: "/nowhere/model-5"\n'
            'all_model_checkpoint_paths: "/nowhere/model-5"\n'), 5, []),
    'the newest is gone': (lambda folder: remove(folder, 'model-5.*'), 3, ['model-5']),
    'its index is gone': (lambda folder: remove(folder, 'model-5.index'), 3, ['model-5']),
    'its data are gone': (lambda folder: remove(folder, 'model-5.data*'), 3, ['model-5']),
    'its data are cut': (
        lambda folder: cut(folder, 'model-5.data*', 1000), 3, ['model-5: cannot be read']),
    'its data are empty': (
        lambda folder: cut(folder, 'model-5.data*', 0), 3, ['model-5: cannot be read']),
    'its index is cut': (
        lambda folder: cut(folder, 'model-5.index', 100), 3, ['model-5: cannot be read']),
    'its index is empty': (
        lambda folder: cut(folder, 'model-5.index', 0), 3, ['model-5: cannot be read']),
}


@pytest.mark.parametrize('name', NAMES)
def test_any_legal_path_is_continued(tmp_path, name):
    folder = write_run(tmp_path / name)
    path, step = runs.find_resume(str(folder))
    assert (path, step) == (str(folder / 'model-5'), 5)
    assert weights.find_checkpoint(str(folder)) == path
    assert weights.read_weights(path)['global_step'] == 5


@pytest.mark.parametrize('name', sorted(HARM))
def test_the_newest_whole_checkpoint_is_continued(tmp_path, said, name):
    harm, step, words = HARM[name]
    folder = write_run(tmp_path)
    harm(folder)
    assert runs.find_resume(str(folder)) == (str(folder / f'model-{step}'), step)
    assert len(said) >= len(words)
    assert all(any(word in line for line in said) for word in words), said
    assert bool(said) == bool(words)


@pytest.mark.parametrize('pattern, found', [
    ('model-*', 'stats.json of 2 epochs, the file checkpoint'),
    ('model-*.index', 'stats.json of 2 epochs, the file checkpoint'),
    ('[mc]*', 'stats.json of 2 epochs'),
    ('[ms]*', 'the file checkpoint'),
    ('[ms]*.[ij]*', 'the file checkpoint'),
    ('model-*.data*', 'model-3.index, model-5.index, stats.json of 2 epochs, the file checkpoint')])
def test_what_cannot_be_continued_is_not_trained_over(tmp_path, said, pattern, found):
    folder = write_run(tmp_path)
    remove(folder, pattern)
    with pytest.raises(UserError) as error:
        runs.find_resume(str(folder))
    assert str(error.value) == (
        f'--logdir {folder}: has no checkpoint that can be read, but {found}, which a new run '
        'would write over: mend that, or take another folder')


def test_weights_only_are_no_run(tmp_path):
    folder = write_run(tmp_path, counter=False)
    with pytest.raises(UserError, match='is of weights only'):
        runs.find_resume(str(folder))


def test_a_new_folder_begins_at_step_0(tmp_path, said):
    assert runs.find_resume(str(tmp_path)) == (None, 0)
    # what a kill in the first checkpoint leaves
    (tmp_path / 'model-1.data-00000-of-00001').write_text('half')
    (tmp_path / 'stats.json').write_text('[]')
    assert runs.find_resume(str(tmp_path)) == (None, 0) and not said


@pytest.mark.parametrize('content', [
    '', '[{"global_step": 3', 'null', '{}', '[1]', '[{"epoch_num": 1}]',
    '[{"global_step": null}]', '\0\0\0\0'])
def test_damaged_curves_are_kept_aside(tmp_path, said, monkeypatch, content):
    monkeypatch.setattr(logger, 'set_logger_dir', lambda path, action: None)
    write_run(tmp_path)
    (tmp_path / 'stats.json').write_text(content)
    for number in (1, 2):
        runs.open_logdir(str(tmp_path)).close()
        assert (tmp_path / f'stats.json.damaged-{number}').read_text() == content
        assert not (tmp_path / 'stats.json').exists()
        assert 'stats.json cannot be read' in said[-1] and len(said) == number
        (tmp_path / 'stats.json').write_text(content)
    (tmp_path / 'stats.json').unlink()
    remove(tmp_path, 'model-*')
    remove(tmp_path, 'checkpoint')
    with pytest.raises(UserError, match='no checkpoint .* but stats.json.damaged-1, stats'):
        runs.find_resume(str(tmp_path))  # they tell that there was a run


@pytest.mark.parametrize('name', ['lock', 'stats.json', 'resume-me', 'checkpoint', 'log.log'])
@pytest.mark.parametrize('make', [
    lambda path: path.mkdir(), lambda path: os.mkfifo(str(path)),
    lambda path: path.symlink_to('/nowhere/x')])
def test_what_is_no_file_is_seen_at_the_start(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f'{tmp_path}/{name}: is no file, but one of that name'):
        runs.open_logdir(str(tmp_path))


def test_only_what_a_kill_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, 'set_logger_dir', lambda path, action: None)
    kept = ['.good-checkpoint', 'model-best.tempstate.txt', '.1-notes', 'model-7.index',
            '.x-stats.json']
    left = ['model-7.index.tempstate123', 'model-7.data-00000-of-00001.tempstate9',
            '.77-stats.json', '.8-checkpoint']
    for name in kept + left:
        (tmp_path / name).write_text('x')
    (tmp_path / '.9-checkpoint').mkdir()
    runs.open_logdir(str(tmp_path)).close()
    assert sorted(os.listdir(str(tmp_path))) == sorted(kept + ['.9-checkpoint', 'lock'])


@pytest.mark.parametrize('epochs, warned', [
    ([(1, 7), (2, 14)], None), ([(1, 4), (1, 7), (2, 14)], None), ([(1, 7), (2, 9)], None),
    ([(1, 3)], None), ([], None), ([(1, 14)], 14), ([(1, 3), (2, 6)], 3), ([(1, 14), (2, 28)], 14)])
def test_epochs_of_another_length_are_said(tmp_path, said, monkeypatch, epochs, warned):
    monkeypatch.setattr(logger, 'get_logger_dir', lambda: str(tmp_path))
    (tmp_path / 'stats.json').write_text(json.dumps(
        [{'epoch_num': number, 'global_step': step} for number, step in epochs]))
    runs.count_epochs(7, 14, 70)
    assert [line.split(':')[0] for line in said] == [] if warned is None else [
        f'the epochs of this run had {warned} steps, now they have 7']


def test_a_number_of_newest_checkpoints_is_kept_also_after_going_on(tmp_path, monkeypatch):
    folder = tmp_path / 'a[1]'
    folder.mkdir()
    monkeypatch.setattr(logger, 'get_logger_dir', lambda: str(folder))
    other = folder / 'model-2-mine.index'
    other.write_text('of the user')

    def save(steps):
        with tf.Graph().as_default(), tf.Session() as sess:
            step = tf.train.get_or_create_global_step()
            saver = callbacks.Save(max_to_keep=3)
            saver.setup_graph(types.SimpleNamespace(is_chief=True))
            saver.trainer = types.SimpleNamespace(sess=sess)
            for number in steps:
                sess.run(step.assign(number))
                saver._trigger()
        return sorted(path.name for path in folder.glob('model-*.index'))

    assert save([1, 2]) == ['model-1.index', 'model-2-mine.index', 'model-2.index']
    # the same step again, as when an evaluation was cut off
    assert save([2, 3, 4, 5]) == ['model-2-mine.index'] + [
        f'model-{step}.index' for step in (3, 4, 5)]
    assert len(list(folder.glob('model-*.data*'))) == 3
    assert runs.find_resume(str(folder)) == (str(folder / 'model-5'), 5)
    # TensorFlow understands the file, too
    state = tf.train.get_checkpoint_state(str(folder))
    assert [os.path.basename(path) for path in state.all_model_checkpoint_paths] == [
        'model-3', 'model-4', 'model-5']


def start_python(code, *args):
    """Start a program that says `ready`, and wait until it does."""
    process = subprocess.Popen([sys.executable, '-c', code, *args], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, universal_newlines=True)
    lines = iter(process.stdout.readline, '')
    assert 'ready\n' in lines, finish(process)  # (reads on until it comes)
    return process


# ---- two jobs, one folder

HOLD = f'''
import sys, time
sys.path.insert(0, {ROOT!r})
import horovod.tensorflow as hvd
import runs
hvd.init()
lock = runs.open_logdir(sys.argv[1])
print('ready', flush=True)
time.sleep(600)
'''


def test_a_folder_has_one_job_and_a_killed_one_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, 'set_logger_dir', lambda path, action: None)
    for _ in range(2):
        process = start_python(HOLD, str(tmp_path))
        try:
            before = sorted(os.listdir(str(tmp_path)))
            with pytest.raises(UserError) as error:
                runs.open_logdir(str(tmp_path))
            assert f'is in use by another job (process {process.pid} on ' in str(error.value)
            assert sorted(os.listdir(str(tmp_path))) == before
            (tmp_path / 'lock').unlink()  # as people do
            with pytest.raises(UserError, match='is in use by another job'):
                runs.open_logdir(str(tmp_path))
        finally:
            process.kill()
            finish(process)
    lock = runs.open_logdir(str(tmp_path))
    lock.close()


def test_a_disk_without_locks_is_said(tmp_path, said, monkeypatch):
    def refuse(*args):
        raise OSError(37, 'No locks available')
    monkeypatch.setattr(runs.fcntl, 'flock', refuse)
    runs.lock_folder(str(tmp_path)).close()
    assert len(said) == 1 and 'its disk has no locks (No locks available)' in said[0]


def test_a_disk_that_locks_files_only_will_do(tmp_path, said, monkeypatch):
    flock = fcntl.flock

    def refuse(file, how):
        if isinstance(file, int):  # of a folder
            raise OSError(9, 'Bad file descriptor')
        flock(file, how)
    monkeypatch.setattr(runs.fcntl, 'flock', refuse)
    lock = runs.lock_folder(str(tmp_path))
    with pytest.raises(UserError, match='is in use by another job'):
        runs.lock_folder(str(tmp_path))
    lock.close()
    assert not said


# ---- what a network is

SMALL = dict(network.PUBLISHED, depth=18, width=8, stem='3x3s2', image_size=16)


def settle(tmp_path, told, **flags):
    """settle() with weights that tell something, or nothing, and flags; (result, args)."""
    arrays = {'x': np.zeros(3)}
    if told is not None:
        arrays['network'] = np.frombuffer(told if isinstance(told, bytes) else
                                          json.dumps(told).encode(), np.uint8)
    np.savez(str(tmp_path / 'w.npz'), **arrays)
    args = argparse.Namespace(depth=None, width=None, stem=None, image_size=None)
    vars(args).update(flags)
    return network.settle(args, str(tmp_path / 'w.npz')), args


def test_weights_tell_what_their_network_is(tmp_path):
    described, args = settle(tmp_path, SMALL, stem='3x3s2')
    assert described == SMALL
    assert (args.depth, args.width, args.stem, args.image_size) == (18, 8, '3x3s2', 16)


def test_weights_of_others_are_as_published_or_as_flags_say(tmp_path):
    described, args = settle(tmp_path, None, width=32)
    assert described == dict(network.PUBLISHED, width=32)
    assert (args.depth, args.width, args.stem, args.image_size) == (50, 32, 'imagenet', 224)


@pytest.mark.parametrize('flags, words', [
    ({'stem': '3x3'}, '--stem 3x3: the weights of .*w.npz are of --stem 3x3s2'),
    ({'depth': 50}, '--depth 50: the weights of .*w.npz are of --depth 18'),
    ({'width': 64}, '--width 64: the weights of .*w.npz are of --width 8')])
def test_another_network_is_refused(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        settle(tmp_path, SMALL, **flags)


def test_another_image_size_is_said(tmp_path, said):
    described, args = settle(tmp_path, SMALL, image_size=32)
    assert described['image_size'] == args.image_size == 32
    assert said == [f'--image-size 32: the weights of {tmp_path}/w.npz are of --image-size 16; '
                    'features of another size are less good']


@pytest.mark.parametrize('told', [
    b'\xff\xfe', b'[', b'[1]', b'3', {'depth': 19}, {'stem': 'x'}, {'depth': '50'}, {'new': 1},
    {'image_size': 0}, {'width': -8}, {'width': True}, {'mean_bgr': [1, 2]},
    {'mean_bgr': ['a'] * 3}, {'std_bgr': [0, 1, 1]}, {'std_bgr': None}])
def test_a_description_that_is_not_understood_is_one_line(tmp_path, told):
    with pytest.raises(UserError) as error:
        settle(tmp_path, told)
    assert str(tmp_path / 'w.npz') in str(error.value) and '\n' not in str(error.value)


def test_a_description_is_saved_with_the_weights_and_builds_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, 'get_logger_dir', lambda: str(tmp_path))
    described = dict(SMALL, mean_bgr=[1.5, 2.5, 3.5])
    with tf.Graph().as_default(), tf.Session() as sess:
        tf.train.get_or_create_global_step()
        network.save(described)
        saver = callbacks.Save(max_to_keep=3)
        saver.setup_graph(types.SimpleNamespace(is_chief=True))
        saver.trainer = types.SimpleNamespace(sess=sess)
        sess.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        saver._trigger()
        # it is no variable of the model: runs from before go on
        assert [v.op.name for v in tf.global_variables()] == ['global_step']
    assert weights.read_network(str(tmp_path)) == described
    net = network.build(weights.read_network(str(tmp_path)), gpus=0)
    assert net.conv0 == resnet.Conv('conv0', 3, 3, 8, 2) and not net.has_pool
    np.testing.assert_array_equal(net.mean_bgr, np.float32([1.5, 2.5, 3.5]))


@pytest.mark.parametrize('make, words', [
    (lambda x: x * 0, 'features of a black and of a white image are the same'),
    (lambda x: x * 0 + 7, 'features of a black and of a white image are the same'),
    (lambda x: x / 0, 'its features are not finite'),
    (lambda x: x + float('nan'), 'its features are not finite'),
    (lambda x: x, None)])
@pytest.mark.parametrize('batch', [None, 1, 3])
def test_features_that_mean_nothing_are_refused(make, words, batch):
    with tf.Graph().as_default(), tf.Session() as sess:
        images = tf.placeholder(tf.uint8, [batch, 4, 4, 3])
        features = make(tf.reduce_mean(tf.cast(images, tf.float32), [1, 2]))
        if words is None:
            network.check_features(sess, images, features, 'w.npz')
        else:
            with pytest.raises(UserError, match='w.npz: ' + words if 'its' in words else words):
                network.check_features(sess, images, features, 'w.npz')


@pytest.mark.parametrize('change, words', [
    ({'conv0/W': np.full([3], np.nan)}, 'conv0/W is not finite'),
    ({'conv0_bn/variance/EMA': np.array([1, np.inf, 1])}, 'conv0_bn/variance/EMA is not finite'),
    ({'conv0/W': np.full([3], 1e300)}, 'conv0/W is not finite'),
    ({'conv0/W': np.array(['1', '2', '3'])}, 'conv0/W is no array of numbers'),
    ({'conv0/W': np.full([3], 1j)}, 'conv0/W is no array of numbers'),
    ({'conv0/W': np.zeros([3])}, 'conv0/W is zero')])
def test_weights_that_compute_nothing_are_refused(change, words):
    arrays = {'conv0/W': np.ones([3]), 'conv0_bn/variance/EMA': np.ones([3]),
              'conv0_bn/beta': np.zeros([3]), 'queue_ptr': np.int64(0)}
    with tf.Graph().as_default():
        variables = [tf.get_variable(name, array.shape) for name, array in arrays.items()]
        weights.check_weights('w.npz', arrays, variables)
        with pytest.raises(UserError) as error:
            weights.check_weights('w.npz', dict(arrays, **change), variables)
    assert str(error.value) == f'w.npz: is of a network that computes nothing: {words}'


# ---- signals

LISTEN = f'''
import signal, sys, time
sys.path.insert(0, {ROOT!r})
from job import cores
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), signal.SIG_IGN)  # as if inherited
cores.set_up([])
from job.shutdown import shutdown
shutdown.watch_signals()
shutdown.phase = 'saved'
print('ready', flush=True)
time.sleep(600)
'''


@pytest.mark.parametrize('names', [['SIGHUP', 'SIGUSR1'], ['SIGUSR2', 'SIGXCPU'],
                                   ['SIGTERM', 'SIGINT']])
def test_signals_of_schedulers_and_terminals_ask_for_the_end(names):
    processes = [start_python(LISTEN) for _ in names]
    for process, name in zip(processes, names):
        process.send_signal(getattr(signal, name))
    for process, name in zip(processes, names):
        _, errors = finish(process)
        assert process.returncode == 75, errors
        assert f'stopped by {name} after step 0: the same command continues' in errors


def test_a_signal_that_is_ignored_stays_so():
    process = start_python(LISTEN, 'SIGINT', 'SIGHUP')
    for name in ('SIGINT', 'SIGHUP', 'SIGTERM'):
        process.send_signal(getattr(signal, name))
    _, errors = finish(process)
    assert 'stopped by SIGTERM after step 0' in errors and process.returncode == 75
