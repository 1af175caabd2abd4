"""Bad input: one clear line before any training, and nothing left behind."""
import json
import os
import re
import resource
import shutil
import tempfile
import time

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import eval_knn
import main_lincls
import main_moco
import network
import resnet
from commands import MOCO, NETWORK, PATIENCE, ROOT, finish, start, two_at_a_time, write_images
from job import cores
from job.start import mixed_precision_rewrite
from moco import MOCOModel
from tools import convert_checkpoint
from weights import is_backbone, is_model, read_weights


def save_model(path, recipe, depth=18):
    """Write a checkpoint of a small model, as after 0 steps."""
    with tf.Graph().as_default(), tf.Session() as sess:
        with tf.variable_scope('', reuse=tf.AUTO_REUSE):
            for scope in ('', 'momentum_encoder'):
                with tf.variable_scope(scope):
                    x = resnet.ResNet(depth, 8, '3x3s2')(
                        tf.zeros([1, 16, 16, 3], tf.uint8), training=False)
                    resnet.project(x, [128] if recipe == 'v1' else [int(x.shape[1]), 128])
        MOCOModel(None, 8, queue_size=32).create_queue()
        tf.train.get_or_create_global_step()
        sess.run(tf.global_variables_initializer())
        tf.train.Saver().save(sess, str(path / 'model-0'), write_meta_graph=False)


def save_linear(path):
    """Write a checkpoint of a linear classifier on another backbone, as after 0 steps."""
    with tf.Graph().as_default(), tf.Session() as sess:
        x = resnet.ResNet(18, 8, '3x3s2')(
            tf.zeros([1, 16, 16, 3], tf.uint8), training=False, trainable=False)
        output = resnet.fully_connected('linear', x, 3)
        tf.train.MomentumOptimizer(0.1, 0.9).minimize(
            tf.reduce_sum(output), tf.train.get_or_create_global_step())
        sess.run(tf.global_variables_initializer())
        tf.train.Saver().save(sess, str(path / 'model-0'), write_meta_graph=False)


def limit_open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (270, 270))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """What can be given by mistake."""
    folder = tmp_path_factory.mktemp('mistakes')
    write_images(folder / 'images', 12, 6)
    write_images(folder / 'one', 1, 1)
    write_images(folder / 'no_val', 3, 0)
    write_images(folder / 'hole', 12, 6)
    (folder / 'hole' / 'train' / 'violet').mkdir()
    (folder / 'nothing').mkdir()
    (folder / 'text').write_text('hello\n')
    for recipe, depth in (('v1', 18), ('v2', 18), ('v1', 34)):
        save_model(folder / '{}-{}'.format(recipe, depth), recipe, depth)
    save_linear(folder / 'linear')
    convert_checkpoint.convert(str(folder / 'v1-18'), str(folder / 'weights' / 'model-0'))
    np.savez(str(folder / 'backbone.npz'),
             **read_weights(str(folder / 'v1-18'), is_backbone))
    small = read_weights(str(folder / 'v1-18'), is_model)
    told = dict(network.PUBLISHED, depth=18, width=8, stem='3x3s2', image_size=16)
    np.savez(str(folder / 'told.npz'),
             network=np.frombuffer(json.dumps(told).encode(), np.uint8), **small)
    np.savez(str(folder / 'nan.npz'), **dict(small, **{'group0/block0/conv1_bn/beta': np.full(
        8, np.nan, np.float32)}))
    np.savez(str(folder / 'zero.npz'), **{name: 0 * value for name, value in small.items()})
    # all of them live, but what comes last is always below zero
    np.savez(str(folder / 'dead.npz'), **dict(small, **{'group3/block1/conv2_bn/beta': np.full(
        64, -1e9, np.float32)}))
    os.mkfifo(str(folder / 'pipe'))
    write_images(folder / 'vehicles' / 'train', 3, 0)
    write_images(folder / 'vehicles' / 'bus', 3, 0)
    write_images(folder / 'vehicles' / 'boat', 3, 0)
    write_images(folder / 'dangling', 12, 6)
    (folder / 'dangling' / 'train' / 'violet').symlink_to('/nowhere/violet')
    shutil.copytree(str(folder / 'v1-18'), str(folder / 'no_index'))
    (folder / 'no_index' / 'model-0.data-00000-of-00001').unlink()
    shutil.copytree(ROOT, str(folder / 'unbuilt'), ignore=shutil.ignore_patterns(
        'build', '.*', 'datasets', 'train_log', 'tests'))
    return folder


def moco(*flags, data='images', **kwargs):
    return ('main_moco.py', ['--data', data] + MOCO + list(flags), kwargs)


def lincls(*flags, data='images', **kwargs):
    return ('main_lincls.py', ['--data', data] + NETWORK + ['--batch', 6] + list(flags), kwargs)


def knn(*flags, data='images', **kwargs):
    network = ['--image-size', '16'] if '--pixels' in flags else NETWORK
    return ('eval_knn.py', ['--data', data] + network + list(flags), kwargs)


# name: (command line, words of the error)
MISTAKES = {
    'no data': (moco(data='nowhere'), ['there is no folder nowhere']),
    'no image': (moco(data='nothing'), ['there is no image', 'nothing']),
    'linear without data': (
        lincls('--load', 'v1-18', data='nowhere'), ['there is no folder nowhere']),
    'linear without val': (
        lincls('--load', 'v1-18', data='no_val'), ['there is no folder no_val/val']),
    'linear with an empty class': (
        lincls('--load', 'v1-18', data='hole'), ['no image in the class folder', 'violet']),
    'online knn without val': (
        moco('--knn-every', 1, data='no_val'), ['there is no folder no_val/val']),
    'load of nothing': (moco('--load', 'nowhere'), ['nowhere: does not exist']),
    'load of a text': (moco('--load', 'text'), ['text: is not a checkpoint']),
    'load of v1 for v2': (
        moco('--v2', '--load', 'v1-18'), ['v1-18', 'does not fit', 'linear0_64/W is missing']),
    'load of another depth': (
        moco('--load', 'v1-34'), ['v1-34', 'does not fit', 'has no place here']),
    'linear load of nothing': (lincls('--load', 'nowhere'), ['nowhere: does not exist']),
    'linear load of another depth': (lincls('--load', 'v1-34'), ['v1-34', 'does not fit']),
    'knn load of nothing': (knn('--load', 'nowhere'), ['nowhere: does not exist']),
    'knn load of another depth': (knn('--load', 'v1-34'), ['v1-34', 'does not fit']),
    'knn of no head': (knn('--load', 'backbone.npz', '--head'), ['backbone.npz', 'holds no head']),
    'knn result nowhere': (knn('--load', 'v1-18', '--out', 'nowhere/x.json'),
                           ['nowhere/x.json: cannot be written']),
    'knn result in a pipe': (knn('--load', 'v1-18', '--out', 'pipe'),
                             ['--out pipe: is no regular file']),
    'knn result over a text': (knn('--load', 'v1-18', '--out', 'text'), ['--out text: is there']),
    'load of nothing beside a run': (
        moco('--load', 'nowhere', '--logdir', 'v1-18'), ['nowhere: does not exist']),
    'knn of another stem': (
        knn('--load', 'told.npz', '--stem', '3x3'),
        ['--stem 3x3: the weights of told.npz are of --stem 3x3s2']),
    'linear of another stem': (
        lincls('--load', 'told.npz', '--stem', '3x3'),
        ['--stem 3x3: the weights of told.npz are of --stem 3x3s2']),
    'knn of not a number': (
        knn('--load', 'nan.npz'), ['nan.npz', 'group0/block0/conv1_bn/beta is not finite']),
    'linear of not a number': (
        lincls('--load', 'nan.npz'), ['nan.npz', 'group0/block0/conv1_bn/beta is not finite']),
    'knn of zeros': (knn('--load', 'zero.npz'), ['zero.npz', 'conv0/W is zero', 'and ']),
    'knn of dead features': (knn('--load', 'dead.npz'), ['dead.npz', 'features', 'the same']),
    'linear of dead features': (
        lincls('--load', 'dead.npz'), ['dead.npz', 'features', 'the same']),
    'a run without data files': (
        moco('--logdir', 'no_index'), ['--logdir no_index', 'model-0.index', 'would write over']),
    'a class that is called train': (
        moco(data='vehicles'), ['train/ the training images, or a class', 'boat', 'bus']),
    'a class that is a dangling link': (
        lincls('--load', 'v1-18', data='dangling'), ['violet', '/nowhere/violet']),
    'one class': (knn('--load', 'v1-18', data='one'), ['one/train: has one class only, b']),
    'splits': (moco('--bn-splits', 3), ['--bn-splits 3', '8 images', '1, 2, 4, 8']),
    'batch over images': (moco('--batch', 16), ['12 images', '--batch of 16']),
    'logdir below a file': (
        moco('--logdir', 'text/log'), ['--logdir text/log', 'cannot be written']),
    'logdir of weights only': (
        moco('--logdir', 'weights'), ['weights/model-0', 'give it to --load']),
    'linear logdir of pre-training': (
        lincls('--load', 'v1-18', '--logdir', 'v1-18'), ['v1-18/model-0', 'does not fit']),
    'linear logdir of another backbone': (
        lincls('--load', 'v1-18', '--logdir', 'linear'), ['conv0/W', 'not as loaded']),
    'open files': (moco('--workers', 40, preexec_fn=limit_open_files),
                   ['496 open files', 'limit is 270', 'ulimit -n']),
    'op not built': (moco(root='unbuilt'), ['zmq_ops', 'not built', 'make env']),
    'ranks do not divide': (moco('--batch', 9, ranks=2), ['--batch 9', '2 ranks', '8 or 10']),
    'logdir of another network, two ranks': (
        moco('--logdir', 'v1-34', ranks=2), ['v1-34/model-0', 'does not fit']),
    'ranks over images': (
        moco('--batch', 2, '--bn-splits', 1, data='one', ranks=2), ['1 images', '2 ranks']),
    'ranks over val images': (
        lincls('--load', 'v1-18', data='one', ranks=2), ['1 images', '2 ranks']),
    'ranks over knn images': (knn('--pixels', data='one', ranks=2), ['1 images', '2 ranks']),
}
if mixed_precision_rewrite(gpu=False) is None:
    MISTAKES['no sixteen bits'] = (moco('--amp'), ['--amp', 'TensorFlow', 'GPU'])


@pytest.fixture(scope='module')
def failures(folder):
    """Name -> exit code, lines of errors, all output, what is left of temporary files:
    of all mistakes, two at a time."""
    def fail(mistake):
        (script, flags, kwargs), _ = mistake
        if 'root' in kwargs:
            kwargs = dict(kwargs, root=str(folder / kwargs['root']))
        if script != 'eval_knn.py' and '--logdir' not in flags:
            flags = flags + ['--logdir', tempfile.mkdtemp(dir=str(folder))]
        # short, for the paths of sockets
        tmp = tempfile.mkdtemp(prefix='t')
        try:
            process = start(script, *flags, tmp=tmp, cwd=str(folder), **kwargs)
            output, errors = finish(process)
            # a server goes when its trainer has gone
            deadline = time.time() + PATIENCE
            while os.listdir(tmp) and time.time() < deadline:
                time.sleep(0.1)
            return process.returncode, errors.splitlines(), output + errors, os.listdir(tmp)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    return dict(zip(MISTAKES, two_at_a_time(fail, MISTAKES.values())))


@pytest.mark.parametrize('name', sorted(MISTAKES))
def test_a_mistake_gets_one_line(failures, name):
    (script, _, kwargs), words = MISTAKES[name]
    code, errors, everything, left = failures[name]
    assert code != 0
    # horovodrun adds a story of its own
    said = [line for line in errors if 'error: ' in line] if 'ranks' in kwargs else errors
    assert len(said) == 1, everything
    assert all(word in said[0] for word in words), said[0]
    # horovodrun ends with a traceback of its own, sometimes in the line that a rank began
    assert not any(re.match(r'\[\d+\]<stderr>:Traceback', line) for line in errors)
    assert not left


@pytest.mark.parametrize('flags, words', [
    (['--fake', '--stem', 'round'], ["invalid choice: 'round'", "'3x3'", "'imagenet'"]),
    (['--fake', '--depth', '20'], ['invalid choice: 20', '18, 34, 50, 101']),
    (['--fake', '--batch', '0'], ['--batch must be positive, not 0']),
    (['--fake', '--queue-size', '-4'], ['--queue-size must be positive, not -4']),
    (['--fake', '--stall-limit', '0'], ['--stall-limit must be positive, not 0.0']),
    (['--fake', '--crop-area', '0.5', '0.2'], ['--crop-area 0.5 0.2']),
    (['--fake', '--data', 'x'], ['either --data DIR or --fake']),
    (['--fake', '--cpus', '1-'], ['--cpus: 1- is not a list of cores like 0-3,8']),
    (['--fake', '--cpus', '3-1'], ['--cpus: 3-1 is not a list of cores']),
    (['--fake', '--cpus', ''], ['--cpus:  is not a list of cores']),
    (['--fake', '--cpus', '5000-999999999999'], ['--cpus: 5000-999999999999: core 5000 is not one',
                                                 ','.join(map(str, sorted(cores.CORES)))]),
    (['--fake', '--cpus', ','.join(map(str, cores.CORES))],
     ['--cpus:', 'leaves no core for the trainers']),
    (['--fake', '--knn-every', '1'], ['--knn-every needs --data or --knn-data']),
    (['--fake', '--load', 'x', '--init', 'y'], ['either --load FILE or --init FILE']),
    (['--fake', '--amp', '--xla'], ['--amp --xla: what XLA compiles stays in 32 bits']),
    (['--fake', '--temp', '0'], ['--temp must be positive, not 0.0']),
    (['--fake', '--image-size', '0'], ['--image-size must be positive, not 0']),
    (['--fake', '--width', '-1'], ['--width must be positive, not -1']),
    (['--fake', '--epochs', 'nan'], ['--epochs must be positive, not nan']),
    (['--fake', '--lr', '-1'], ['--lr must not be negative, not -1.0']),
    (['--fake', '--max-steps', '-1'], ['--max-steps must not be negative, not -1']),
    (['--fake', '--momentum', '1.5'], ['--momentum must be 0 to 1, not 1.5']),
    (['--data', ''], ['--data is empty']),
    (['--fake', '--load', ''], ['--load is empty']),
    (['--fake', '--logdir', ''], ['--logdir is empty']),
    ([], ['either --data DIR or --fake'])])
def test_flags_that_make_no_sense(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        main_moco.parse_args(flags)
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(word in last for word in words), last


@pytest.mark.parametrize('flags, words', [
    ([], 'either --load FILE or --pixels'),
    (['--pixels', '--head'], '--pixels has neither'),
    (['--pixels', '--all'], '--pixels has neither'),
    (['--pixels', '--stem', '3x3'], '--pixels has no network'),
    (['--load', 'x', '--all', '--out', 'y'], '--all writes one next to each'),
    (['--load', ''], '--load is empty'),
    (['--load', 'x', '--out', ''], '--out is empty'),
    (['--load', 'x', '--k', '0'], '--k must be positive, not 0'),
    (['--load', 'x', '--knn-temp', '0'], '--knn-temp must be positive, not 0.0')])
def test_knn_flags_that_make_no_sense(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        eval_knn.parse_args(['--data', 'x'] + flags)
    assert error.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_linear_flags_that_make_no_sense(capsys):
    with pytest.raises(SystemExit) as error:
        main_lincls.parse_args(['--load', 'x', '--data', 'y', '--crop-area', '0.5', '0.2'])
    assert error.value.code == 2
    assert '--crop-area 0.5 0.2: needs' in capsys.readouterr().err.splitlines()[-1]
