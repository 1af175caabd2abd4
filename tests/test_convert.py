"""tools/convert_checkpoint.py: every pair of formats and back, bit for bit; one picture through
TensorFlow and PyTorch; what is refused; and that every command loads every format.

PyTorch lives in another Python (torch_python() in commands.py), where torch_features.py builds
torchvision's and the official MoCo's models and runs the converter without TensorFlow.
"""
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import resnet
import runs
import views
from commands import (MOCO, NETWORK, PATIENCE, ROOT, run, torch_python, two_at_a_time,
                      write_images)
from errors import UserError
from images import PHOTO, read_image
from moco import MOCOModel
from tools import convert_checkpoint, pytorch_format
from weights import (PYTORCH_MAGIC, find_checkpoint, head_dims, is_backbone, is_model,
                     load_weights, read_weights)

# what TensorFlow makes: name -> recipe, depth, stem. `small` is the network of commands.py
MODELS = {'large': ('v1', 50, 'imagenet'), 'small': ('v2', 18, '3x3s2')}
# what PyTorch makes: name -> arguments of torch_features.create()
OFFICIAL = {'v1.pth.tar': ('v1', 18, 8), 'v2.pth.tar': ('v2', 50, 4),
            'vision.pth': ('torchvision', 18, 8)}
# ResNets in the files of others: layout of torch_features.create_other() and flags -> what is read
# besides the backbone, and what is dropped besides counters
LINEAR, HEAD = ['linear/W', 'linear/b'], ['linear0_32/W', 'linear0_32/b', 'linear1_128/W',
                                          'linear1_128/b']
OTHERS = {
    ('plain',): (LINEAR, []),
    ('compiled',): (LINEAR, ['epoch']),
    ('lightly',): ([], ['hyper_parameters', 'state_dict.backbone_momentum.* (120)',
                        'state_dict.projection_head.layers.0.bias',
                        'state_dict.projection_head.layers.0.weight']),
    ('moco3',): ([], ['args', 'state_dict.module.momentum_encoder.* (120)'] + [
        'state_dict.module.' + name for name in (
            'base_encoder.fc.0.bias', 'base_encoder.fc.0.weight', 'base_encoder.fc.1.bias',
            'base_encoder.fc.1.weight', 'predictor.0.bias', 'predictor.0.weight')]),
    ('simsiam',): ([], ['state_dict.module.encoder.' + name for name in (
        'fc.0.bias', 'fc.0.weight', 'fc.6.bias', 'fc.6.weight')]),
    ('byol',): ([], ['target_network.encoder.* (120)']),
    ('dino', '--part', 'teacher'): (LINEAR, [
        'args', 'curve', 'student', 'teacher.head.mlp.0.bias', 'teacher.head.mlp.0.weight']),
    ('query',): (HEAD, []),
    ('no_queue',): (HEAD, ['state_dict.module.encoder_k.* (124)']),
    ('no_key',): (HEAD, ['state_dict.module.queue', 'state_dict.module.queue_ptr']),
    ('other_head',): ([], ['state_dict.module.encoder_k.* (122)',
                           'state_dict.module.encoder_q.fc.0.bias',
                           'state_dict.module.encoder_q.fc.0.weight', 'state_dict.module.queue',
                           'state_dict.module.queue_ptr']),
    ('half',): (LINEAR, []),
    ('bfloat',): ([], [])}
# and what is refused -> the message
REFUSED = {
    ('dino',): 'holds several networks: student.module.backbone., teacher.backbone.; convert one: '
               'tools/convert_checkpoint.py --part teacher.backbone',
    ('dino', '--part', 'nobody'): '--part: it holds student.module.backbone., teacher.backbone.',
    ('no_layer4',): 'is not all of one network on a ResNet-18, and nothing else: '
                    'group3/block0/conv1/W is missing; .*; and 19 more',
    ('excited',): 'holds no ResNet of torchvision, which has no layer1.0.se.fc0.bias, .*'
                  'layer1.0.se.fc2.weight, and 4 more',
    ('grouped',): r'.*conv2/W has shape .3, 3, 1, 4. where .3, 3, 4, 4. is needed; .*'
                  '; and 2 more',
    ('transformer',): 'cannot be read as weights: it holds no ResNet of torchvision .conv1.weight, '
                      'layer1.0.conv1.weight., but model.blocks.0.attn.bias, .*, and 12 more',
    ('list',): 'cannot be read as weights: it holds no ResNet of .*, but no state_dict of tensors',
    ('object',): 'cannot be read as weights: it holds more than tensors and plain values, which '
                 'might be code: __main__.ResNet'}


def convert(*argv):
    """Run the converter in this process."""
    convert_checkpoint.main([str(arg) for arg in argv])


def make_run(path, recipe, depth, stem):
    """Write the checkpoint of a small model as training does, all variables random."""
    with tf.Graph().as_default(), tf.Session() as sess:
        for scope in ('momentum_encoder', ''):
            with tf.variable_scope(scope):
                x = resnet.ResNet(depth, 8, stem)(
                    tf.zeros([1, 32, 32, 3], tf.uint8), training=False, trainable=not scope)
                output = resnet.project(x, [128] if recipe == 'v1' else [int(x.shape[1]), 128],
                                        trainable=not scope)
        MOCOModel(None, 2, queue_size=32).create_queue()
        # of a few variables: some of the optimizer's are enough
        tf.train.MomentumOptimizer(0.1, 0.9).minimize(
            tf.reduce_sum(output), tf.train.get_or_create_global_step(),
            tf.trainable_variables()[-2:])
        rng = np.random.RandomState(depth)

        def draw(v):
            if v.dtype.base_dtype == tf.int64:
                return 3
            if len(v.shape) > 1:
                return rng.normal(0, np.prod(v.shape.as_list()[:-1]) ** -0.5, v.shape)
            low = 0.5 if v.op.name.endswith(('variance/EMA', 'gamma')) else -0.5
            return rng.uniform(low, low + 1, v.shape)
        runs.assign(sess, {v.op.name: draw(v) for v in tf.global_variables()})
        tf.train.Saver().save(sess, path, write_meta_graph=False)


def make_picture():
    """A photograph as validation sees it: uint8 [1, 224, 224, 3], BGR."""
    picture = np.empty([1, 224, 224, 3], np.uint8)
    views.center_crop_view(read_image(PHOTO), None, picture[0])
    return picture


def load_npz(path):
    with np.load(str(path)) as arrays:
        return dict(arrays)


def assert_same(arrays, expected):
    assert set(arrays) == set(expected)
    for name in expected:
        assert arrays[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A folder with what TensorFlow makes: checkpoints large/model-3, small/model-3, and .npz."""
    folder = tmp_path_factory.mktemp('convert')
    for name, model in MODELS.items():
        (folder / name).mkdir()
        make_run(str(folder / name / 'model-3'), *model)
        convert(folder / name, folder / (name + '.npz'))
    return folder


@pytest.fixture(scope='module')
def folder(made):
    """`made`, what PyTorch makes, and all of it converted by PyTorch's Python:
    (folder, what each conversion printed by name of its output)."""
    np.save(str(made / 'picture.npy'), make_picture())
    jobs = []

    def job(function, *arguments):
        jobs.append([function] + [str(made / arg) if isinstance(arg, str) and '.' in arg else arg
                                  for arg in arguments])

    for name, model in OFFICIAL.items():
        stem = name.split('.')[0]
        job('create', *model, name, name.startswith('v2'))
        job('dump', name, stem + '.arrays.npz')
        job('convert', name, stem + '.npz')
        job('convert', stem + '.npz', 'back.' + name)
        job('dump', 'back.' + name, stem + '.back.npz')
        job('features', name, *model, 'picture.npy', stem + '.npy')
    for name, (recipe, depth, _) in MODELS.items():
        for ending in ('.pth.tar', '.pth'):
            job('convert', name + '.npz', name + ending)
            job('dump', name + ending, name + ending + '.arrays.npz')
            job('convert', name + ending, name + ending + '.npz')
    job('features', 'large.pth', 'torchvision', 50, 8, 'picture.npy', 'large.npy')
    job('features', 'large.pth.tar', 'v1', 50, 8, 'picture.npy', 'large.moco.npy')
    for legacy in (False, True):
        path = 'bomb{}.pth'.format(int(legacy))
        job('create_bomb', path, 'exploded.txt', legacy)
        job('convert', path, 'bomb.npz')

    np.savez(str(made / 'told.npz'), network=np.frombuffer(NETWORK_TEXT.encode(), np.uint8),
             **load_npz(made / 'small.npz'))
    job('convert', 'told.npz', 'told.pth.tar')
    job('convert', 'told.pth.tar', 'told.pth.tar.npz')
    job('convert', 'told.npz', 'told.pth')
    job('dump', 'told.pth', 'told.pth.arrays.npz')
    for layout, *flags in list(OTHERS) + list(REFUSED):
        path = '_'.join([layout] + flags) + '.pth'
        job('create_other', layout, path)
        jobs.append(['convert', str(made / path), str(made / path) + '.npz'] + flags)

    process = subprocess.run(
        [torch_python(), os.path.join(ROOT, 'tests', 'torch_features.py')],
        input=json.dumps(jobs), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr
    said = {os.path.basename(job[1]): result
            for job, result in zip(jobs, json.loads(process.stdout)) if job[0] == 'convert'}
    return types.SimpleNamespace(path=made, said=said)


# ---- names

@pytest.mark.parametrize('recipe, variables', [('v1', 536), ('v2', 540)])
def test_released_weights_are_complete(recipe, variables):
    with open(os.path.join(ROOT, 'tests', 'data', 'released_variables.json')) as f:
        released = {name: tuple(shape) for name, (_, shape, _) in json.load(f)[recipe].items()}
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in released.items()}
    assert convert_checkpoint.describe(weights) == (50, released)
    assert len(released) == variables
    # and each has a name of its own in the official files, besides those of deeper networks
    names = pytorch_format.moco_names(head_dims(released))
    assert set(released) < set(names) and len(set(names.values())) == len(names)


@pytest.mark.parametrize('depth, stem', [
    (18, 'imagenet'), (34, '3x3'), (50, '3x3s2'), (101, 'imagenet')])
def test_variables_are_those_of_the_network(depth, stem):
    with tf.Graph().as_default():
        resnet.ResNet(depth, 16, stem)(tf.zeros([1, 32, 32, 3], tf.uint8), training=False)
        shapes = {v.op.name: tuple(v.shape.as_list()) for v in tf.global_variables()}
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert convert_checkpoint.describe(weights) == (depth, shapes)


# ---- bit for bit

@pytest.mark.parametrize('name', sorted(MODELS))
def test_checkpoint_to_npz_and_back(made, name, tmp_path, capsys):
    run_, npz = made / name, load_npz(made / (name + '.npz'))
    expected = read_weights(str(run_), is_model)
    assert_same(npz, expected)

    convert(made / (name + '.npz'), tmp_path / 'first' / 'model-0')
    (tmp_path / 'first').rename(tmp_path / 'new')
    for path in (tmp_path / 'new', tmp_path / 'new' / 'model-0'):
        assert find_checkpoint(str(path)) == str(tmp_path / 'new' / 'model-0')
        assert_same(read_weights(str(path)), expected)  # and no optimizer
    with tf.Graph().as_default(), tf.Session() as sess:
        queue = tf.get_variable('queue', [32, 128])
        tf.train.Saver().restore(sess, str(tmp_path / 'new' / 'model-0'))
        np.testing.assert_array_equal(sess.run(queue), expected['queue'])
    capsys.readouterr()
    convert(run_, tmp_path / 'again.npz')
    *dropped, summary = capsys.readouterr().out.splitlines()
    last = 'linear0_128' if name == 'large' else 'linear1_128'
    assert {line.replace('dropped: ', '') for line in dropped} == {
        'global_step', last + '/W/Momentum', last + '/b/Momentum'}
    assert summary == '{}: {} variables, ResNet-{}; {} dropped'.format(
        tmp_path / 'again.npz', len(expected), MODELS[name][1], len(dropped))


@pytest.mark.parametrize('name', sorted(MODELS))
@pytest.mark.parametrize('source', ['npz', 'checkpoint'])
def test_backbone_only(made, name, source, tmp_path, capsys):
    convert(made / (name + '.npz' if source == 'npz' else name), tmp_path / 'b.npz',
            '--backbone-only')
    weights = load_npz(made / (name + '.npz'))
    assert_same(load_npz(tmp_path / 'b.npz'),
                {name: weights[name] for name in filter(is_backbone, weights)})
    output = capsys.readouterr().out
    assert 'dropped: queue\n' in output and 'dropped: momentum_encoder/conv0/W\n' in output


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_official_files_to_npz(folder, name):
    """Each value is where it belongs; indices are written out here."""
    stem = name.split('.')[0]
    ours, theirs = (load_npz(folder.path / (stem + end)) for end in ('.npz', '.arrays.npz'))
    encoders = ([('', '')] if 'vision' in name else
                [('', 'module.encoder_q.'), ('momentum_encoder/', 'module.encoder_k.')])
    last = '3' if '50' in name or name == 'v2.pth.tar' else '2'
    for our, their in encoders:
        a, b = ours[our + 'conv0/W'], theirs[their + 'conv1.weight']
        assert a.shape == (7, 7, 3, len(b))
        for h, w, channel, out in ((0, 6, 0, 1), (2, 1, 1, 0), (3, 4, 2, 3)):
            assert a[h, w, channel, out] == b[out, 2 - channel, h, w]  # BGR and RGB
        a = ours[our + 'group2/block1/conv%s/W' % last]
        b = theirs[their + 'layer3.1.conv%s.weight' % last]
        for h, w, channel, out in ((0, -1, 1, 2), (-1, 0, 5, 0)):
            assert a[h, w, channel, out] == b[out, channel, h, w]
        np.testing.assert_array_equal(
            ours[our + 'group3/block0/convshortcut/W'][0, 0],
            theirs[their + 'layer4.0.downsample.0.weight'][:, :, 0, 0].T)
        for a, b in (('conv0_bn/', 'bn1.'), ('group3/block1/conv2_bn/', 'layer4.1.bn2.'),
                     ('group1/block0/convshortcut_bn/', 'layer2.0.downsample.1.')):
            for x, y in (('gamma', 'weight'), ('beta', 'bias'), ('mean/EMA', 'running_mean'),
                         ('variance/EMA', 'running_var')):
                np.testing.assert_array_equal(ours[our + a + x], theirs[their + b + y])
        heads = {'v1.pth.tar': [('linear0_128', 'fc')],
                 'v2.pth.tar': [('linear0_128', 'fc.0'), ('linear1_128', 'fc.2')]}
        for a, b in heads.get(name, [('linear', 'fc')]):
            np.testing.assert_array_equal(ours[our + a + '/W'], theirs[their + b + '.weight'].T)
            np.testing.assert_array_equal(ours[our + a + '/b'], theirs[their + b + '.bias'])
    counters = [key for key in theirs if key.endswith('num_batches_tracked')]
    assert len(ours) == len(theirs) - len(counters)
    if 'vision' not in name:
        np.testing.assert_array_equal(ours['queue'], theirs['module.queue'].T)
        assert ours['queue_ptr'].shape == () and ours['queue_ptr'] == 7

    # what the official file has besides
    dropped = re.findall('dropped: (.*)', folder.said[name])
    assert set(dropped) == {'*.num_batches_tracked ({})'.format(len(counters))} | (
        set() if 'vision' in name else {'epoch', 'arch', 'optimizer'})


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_official_files_to_npz_and_back(folder, name):
    stem = name.split('.')[0]
    expected = {key: array
                for key, array in load_npz(folder.path / (stem + '.arrays.npz')).items()
                if not key.endswith('num_batches_tracked')}
    assert_same(load_npz(folder.path / (stem + '.back.npz')), expected)


@pytest.mark.parametrize('name', sorted(OFFICIAL))
def test_official_files_to_checkpoints_and_back(folder, name, tmp_path):
    stem = name.split('.')[0]
    convert(folder.path / (stem + '.npz'), tmp_path / 'model-0')
    convert(tmp_path / 'model-0', tmp_path / 'back.npz')
    assert_same(load_npz(tmp_path / 'back.npz'), load_npz(folder.path / (stem + '.npz')))


@pytest.mark.parametrize('name', sorted(MODELS))
def test_npz_to_official_files_and_back(folder, name):
    weights = load_npz(folder.path / (name + '.npz'))
    assert_same(load_npz(folder.path / (name + '.pth.tar.npz')), weights)
    backbone = {key: weights[key] for key in filter(is_backbone, weights)}
    assert_same(load_npz(folder.path / (name + '.pth.npz')), backbone)
    assert 'dropped: queue\n' in folder.said[name + '.npz']  # the later one, to .pth
    if name == 'large':  # loads strictly, as torchvision's and as MoCo
        np.testing.assert_array_equal(*[np.load(str(folder.path / features))
                                        for features in ('large.npy', 'large.moco.npy')])


@pytest.mark.parametrize('name', sorted(MODELS))
def test_detectron2(folder, name, tmp_path):
    convert(folder.path / (name + '.npz'), tmp_path / 'out.pkl')
    written = (tmp_path / 'out.pkl').read_bytes()
    assert b'numpy.core.' in written and b'numpy._core.' not in written  # NumPy 1 reads it
    content = pickle.loads(written)
    assert set(content) == {'model', '__author__', 'matching_heuristics'}
    assert content['matching_heuristics'] is True
    expected = {}
    for key, array in load_npz(folder.path / (name + '.pth.arrays.npz')).items():
        key = key if key.startswith('layer') else 'stem.' + key
        for i in range(4, 0, -1):
            key = key.replace('layer%d' % i, 'res%d' % (i + 1))
            key = key.replace('bn%d' % i, 'conv%d.norm' % i)
        expected[key.replace('downsample.0', 'shortcut').replace(
            'downsample.1', 'shortcut.norm')] = array
    assert 'stem.conv1.norm.running_mean' in expected and 'res5.1.conv2.weight' in expected
    assert_same(content['model'], expected)


@pytest.mark.parametrize('name', sorted(MODELS))
def test_fasterrcnn(made, name, tmp_path):
    convert(made / name, tmp_path / 'out.npz', '--fasterrcnn')
    weights = load_npz(made / (name + '.npz'))
    expected = {key.replace('_bn/', '/bn/'): weights[key]
                for key in filter(is_backbone, weights)}
    assert 'group0/block1/conv1/bn/mean/EMA' in expected and 'conv0/W' in expected
    assert_same(load_npz(tmp_path / 'out.npz'), expected)


# ---- files of others

@pytest.mark.parametrize('case', sorted(OTHERS), ids=' '.join)
def test_other_files_are_read(folder, case):
    kept, dropped = OTHERS[case]
    name = '_'.join(case) + '.pth'
    *lines, summary = folder.said[name].splitlines()
    assert 'variables, ResNet-18' in summary, summary
    read, plain = (load_npz(folder.path / (path + '.npz')) for path in (name, 'plain.pth'))
    backbone = list(filter(is_backbone, plain))
    assert set(read) == set(backbone + kept)
    precision = {'half': 1e-3, 'bfloat': 1e-2}.get(case[0], 0)
    for key in backbone + (kept if kept == LINEAR else []):
        assert read[key].dtype == np.float32, key
        np.testing.assert_allclose(read[key], plain[key], precision, precision, err_msg=key)
    assert {line.replace('dropped: ', '') for line in lines if COUNTERS not in line} == set(dropped)


COUNTERS = '*.num_batches_tracked (20)'


@pytest.mark.parametrize('case', sorted(REFUSED), ids=' '.join)
def test_other_files_that_are_refused(folder, case):
    name = '_'.join(case) + '.pth'
    assert re.fullmatch('convert_checkpoint.py: error: {}: {}'.format(
        re.escape(str(folder.path / name)), REFUSED[case]), folder.said[name]), folder.said[name]
    assert not (folder.path / (name + '.npz')).exists()


# ---- one picture through both

@pytest.mark.parametrize('made_by, weights, features, depth, width', [
    ('PyTorch', 'v1.npz', 'v1.npy', 18, 8),
    ('PyTorch', 'v2.npz', 'v2.npy', 50, 4),
    ('PyTorch', 'vision.npz', 'vision.npy', 18, 8),
    ('TensorFlow', 'large', 'large.npy', 50, 8)])
def test_a_picture_has_the_same_features(folder, made_by, weights, features, depth, width):
    expected = np.load(str(folder.path / features))
    picture = make_picture()
    with tf.Graph().as_default(), tf.Session() as sess:
        images = np.concatenate([picture, picture[..., ::-1]])
        output = resnet.ResNet(depth, width)(tf.constant(images), training=False)
        runs.assign(sess, load_weights(
            str(folder.path / weights), is_backbone, tf.global_variables()))
        ours = sess.run(output)
    assert ours.shape[1:] == expected.shape[1:] == (width * (8 if depth == 18 else 32),)
    difference = np.linalg.norm(ours - expected, axis=1) / np.linalg.norm(expected)
    # and so that the order of the channels matters
    assert difference[0] <= 1e-3 and difference[1] > 0.05


# ---- what is refused

def refuse(capsys, *argv):
    """The error of a conversion."""
    with pytest.raises(SystemExit) as error:
        convert(*argv)
    assert str(error.value).startswith('convert_checkpoint.py: error: ')
    return str(error.value)


@pytest.mark.parametrize('change, words', [
    (lambda w: w.pop('group1/block0/conv2_bn/mean/EMA'),
     ['MoCo on a ResNet-18', 'group1/block0/conv2_bn/mean/EMA is missing']),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith('momentum_encoder/conv0')],
     ['momentum_encoder/conv0/W is missing', 'momentum_encoder/conv0_bn/variance/EMA is missing']),
    (lambda w: w.pop('conv0/W'), [': conv0/W is missing']),
    (lambda w: w.pop('queue'), ['queue is missing']),
    (lambda w: w.pop('linear0_64/b'), ['linear0_64/b is missing']),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith('linear')],
     ['linear0_128/W is missing', 'momentum_encoder/linear0_64/W has no place here']),
    (lambda w: w.update({'group0/block2/conv1/W': np.zeros([3, 3, 8, 8])}),
     ['group0/block2/conv1/W has no place here']),
    (lambda w: w.update(extra=np.zeros(3)), ['extra has no place here']),
    (lambda w: w.update({'conv0_bn/gamma': np.zeros(9)}),
     ['conv0_bn/gamma has shape (9,) where (8,) is needed']),
    (lambda w: w.update({'linear1_128/W': np.zeros([128, 64])}),
     ['linear1_128/W has shape (128, 64) where (64, 128) is needed']),
    (lambda w: w.update(queue=np.zeros([128, 32])),
     ['queue has shape (128, 32) where (128, 128) is needed'])])
def test_every_variable_is_accounted_for(made, change, words, tmp_path, capsys):
    weights = load_npz(made / 'small.npz')
    change(weights)
    np.savez(str(tmp_path / 'changed.npz'), **weights)
    error = refuse(capsys, tmp_path / 'changed.npz', tmp_path / 'out.npz')
    assert str(tmp_path / 'changed.npz') in error and all(word in error for word in words), error
    assert not (tmp_path / 'out.npz').exists()


@pytest.mark.parametrize('parts, ending', [
    ('backbone linear queue', '.npz'), ('backbone linear', '.npz'), ('backbone', '.npz'),
    ('backbone linear momentum_encoder', '.npz'), ('backbone linear queue', ''),
    ('backbone linear queue', '.pkl')])
@pytest.mark.parametrize('suffix', ['', ':0'])
def test_parts_that_are_whole_are_enough(made, parts, ending, suffix, tmp_path, capsys):
    whole = load_npz(made / 'small.npz')
    chosen = {name: array for name, array in whole.items() if name.startswith(
        tuple(parts.replace('backbone', 'conv0 group').split()))}
    extras = {'global_step': np.int64(3), 'learning_rate': np.float32(1), 'EMA/loss': np.float32(2)}
    np.savez(str(tmp_path / 'in.npz'),
             **{name + suffix: array for name, array in dict(chosen, **extras).items()})
    convert(tmp_path / 'in.npz', tmp_path / ('out' + ending))
    *dropped, _ = capsys.readouterr().out.splitlines()
    if ending == '.pkl':
        assert len(dropped) == len(chosen) - len(list(filter(is_backbone, chosen))) + 3
    else:
        assert {line.replace('dropped: ', '') for line in dropped} == set(extras)
        assert_same(read_weights(str(tmp_path / ('out' + ending))), chosen)
    assert 'has no key encoder and queue' in refuse(
        capsys, tmp_path / 'in.npz', tmp_path / 'out.pth.tar')


NETWORK_TEXT = '{"depth": 18, "width": 8, "stem": "3x3s2", "mean_bgr": [1.5, 2.5, 3.5]}'


def test_what_the_network_was_goes_along(folder, tmp_path, capsys):
    """Through a checkpoint here, and PyTorch's Python in the fixture."""
    convert(folder.path / 'told.npz', tmp_path / 'model-0')
    convert(tmp_path / 'model-0', tmp_path / 'back.npz', '--backbone-only')
    for path in (folder.path / 'told.pth.tar.npz', tmp_path / 'back.npz', tmp_path / 'model-0'):
        network = read_weights(str(path))['network']
        assert network.dtype == np.uint8 and network.tobytes().decode() == NETWORK_TEXT
    assert 'network' in load_npz(folder.path / 'told.pth.tar.npz')
    # and where there is no place for it, nothing is said
    for path, flags in (('out.pkl', []), ('out.npz', ['--fasterrcnn'])):
        convert(folder.path / 'told.npz', tmp_path / path, *flags)
    said = capsys.readouterr().out + folder.said['told.npz'] + folder.said['told.pth.tar']
    assert 'dropped: queue' in said and 'dropped: network' not in said
    assert 'network' not in load_npz(tmp_path / 'out.npz')
    assert 'network' not in load_npz(folder.path / 'told.pth.arrays.npz')


def test_what_is_no_source(made, tmp_path, capsys):
    (tmp_path / 'text').write_text('hello\n')
    (tmp_path / 'text.pth').write_text('hello\n')
    assert 'text: is not a checkpoint' in refuse(capsys, tmp_path / 'text', 'out.npz')
    assert 'text.pth: cannot be read as weights' in refuse(
        capsys, tmp_path / 'text.pth', tmp_path / 'out.npz')
    assert 'nothing.pth: does not exist' in refuse(capsys, tmp_path / 'nothing.pth', 'out.npz')
    # detectron2's format is only written
    convert(made / 'small', tmp_path / 'small.pkl')
    assert 'small.pkl: is not a checkpoint' in refuse(
        capsys, tmp_path / 'small.pkl', tmp_path / 'out.npz')


@pytest.mark.parametrize('dst, flags, words', [
    ('', [], ['is a folder', 'model-0']),
    ('new/', [], ['is a folder', 'new/model-0']),
    ('out.h5', [], ['out.h5', '.npz, .pth.tar, .pth, .pt, .pkl']),
    ('out.pth', ['--fasterrcnn'], ['out.pth', 'ends in .npz']),
    ('out.pth.tar', ['--backbone-only'], ['out.pth.tar', 'write a .pth']),
    ('file/out.npz', [], ['file/out.npz: cannot be written'])])
def test_what_is_no_destination(made, dst, flags, words, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    error = refuse(capsys, made / 'small', os.path.join(str(tmp_path), dst), *flags)
    assert all(word in error for word in words), error
    assert os.listdir(str(tmp_path)) == ['file']


def test_nothing_is_overwritten_that_is_needed(made, capsys):
    small = str(made / 'small.npz')
    before = load_npz(small)
    assert 'what would be read and written' in refuse(
        capsys, small, os.path.join(str(made), 'large', '..', 'small.npz'), '--backbone-only')
    assert 'holds model-3 already' in refuse(capsys, small, made / 'large' / 'model-0')
    assert_same(load_npz(small), before)
    assert find_checkpoint(str(made / 'large')).endswith('model-3')


def test_only_weights_are_replaced(made, tmp_path, capsys):
    """What is written twice is replaced; what is the user's is not, nor what a link points to."""
    small = made / 'small.npz'
    for name in ('out.npz', 'out.pkl', 'model-0'):
        convert(small, tmp_path / name, '--backbone-only')
        convert(small, tmp_path / name)
        assert 'checkpoint' in os.listdir(str(tmp_path)) or not name == 'model-0'
    assert 'queue' in load_npz(tmp_path / 'out.npz') and 'queue' in read_weights(
        str(tmp_path / 'model-0'))
    (tmp_path / 'mine').mkdir()
    link = tmp_path / 'mine' / 'link.npz'
    link.symlink_to(tmp_path / 'out.npz')
    convert(small, link, '--backbone-only')
    assert link.is_symlink() and 'queue' not in load_npz(tmp_path / 'out.npz')

    for name, write in (
            ('photos.npz', lambda path: np.savez(path, photos=np.zeros(3))),
            ('thesis.pkl', lambda path: pathlib.Path(path).write_bytes(pickle.dumps({'a': 1})))):
        write(str(tmp_path / name))
        before = (tmp_path / name).read_bytes()
        assert 'it is not replaced' in refuse(capsys, small, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    os.mkfifo(str(tmp_path / 'mine' / 'device'))
    assert 'is no regular file' in refuse(capsys, small, tmp_path / 'mine' / 'device')
    (tmp_path / 'mine' / 'device').unlink()

    mine = tmp_path / 'mine' / 'text'
    mine.write_text('mine')
    os.mkfifo(str(tmp_path / 'mine' / 'fifo.npz'))
    names = ['a.npz', 'a.pkl', 'a.index', 'b.data-00000-of-00001']
    for name in names:
        (tmp_path / 'mine' / name).symlink_to(mine)
    for name in ('a.npz', 'a.pkl', 'a', 'b', 'fifo.npz'):
        words = 'is no regular file' if 'fifo' in name else 'it is not replaced'
        assert words in refuse(capsys, small, tmp_path / 'mine' / name)
    mine.rename(tmp_path / 'mine' / 'checkpoint')
    assert 'checkpoint: is there' in refuse(capsys, small, tmp_path / 'mine' / 'c')
    assert (tmp_path / 'mine' / 'checkpoint').read_text() == 'mine'
    assert sorted(os.listdir(str(tmp_path / 'mine'))) == sorted(
        names + ['checkpoint', 'fifo.npz', 'link.npz'])


def test_a_backbone_is_no_moco(made, tmp_path, capsys):
    convert(made / 'small', tmp_path / 'b.npz', '--backbone-only')
    assert 'b.npz: has no key encoder and queue' in refuse(
        capsys, tmp_path / 'b.npz', tmp_path / 'out.pth.tar')


class Bomb:
    """Its pickle, when loaded, makes a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (self._path, 'w')


def test_a_pickle_is_not_loaded(tmp_path, capsys):
    exploded = str(tmp_path / 'exploded')
    content = pickle.dumps({'state_dict': Bomb(exploded)}, protocol=2)
    for name in ('bomb.pth', 'bomb.pth.tar', 'bomb.pkl', 'bomb'):
        (tmp_path / name).write_bytes(content)
        assert name in refuse(capsys, tmp_path / name, tmp_path / 'out.npz')
    assert not os.path.exists(exploded)


def test_code_in_a_file_of_pytorch_is_not_executed(folder):
    for name in ('bomb0.pth', 'bomb1.pth'):
        assert (folder.path / name).exists()
        assert re.search(
            name + ': cannot be read as weights: it holds more than tensors .*io.open',
            folder.said[name]), folder.said[name]
    assert not (folder.path / 'exploded.txt').exists()


@pytest.fixture
def pth(tmp_path):
    """What looks like a file of PyTorch."""
    (tmp_path / 'x.pth').write_bytes(PYTORCH_MAGIC)
    return str(tmp_path / 'x.pth')


@pytest.mark.parametrize('torch, found', [
    (None, 'newer: pip install torch'),
    (types.SimpleNamespace(__version__='2.5.1+cpu'), 'newer, not 2.5.1+cpu: pip install torch')])
def test_pytorch_is_asked_for_by_name(made, pth, torch, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', torch)
    monkeypatch.delenv('TORCH_PYTHON', raising=False)
    words = '{} needs PyTorch 2.6 or ' + found
    assert 'reading ' + words.format(pth) in refuse(capsys, pth, tmp_path / 'out.npz')
    with pytest.raises(UserError, match='needs PyTorch 2.6 or newer'):
        read_weights(pth, is_backbone)
    out = str(tmp_path / 'out.pth')
    assert 'writing ' + words.format(out) in refuse(capsys, made / 'small.npz', out)


def test_another_python_that_cannot_read_says_why(pth, tmp_path, monkeypatch):
    def reason(python):
        monkeypatch.setenv('TORCH_PYTHON', python)
        with pytest.raises(UserError) as error:
            read_weights(pth)
        assert pth in str(error.value) and '\n' not in str(error.value)
        return str(error.value)

    python = torch_python()
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert re.search('No such file.*python.*-none', reason(sys.executable + '-none'))
    assert re.search('TORCH_PYTHON=.*x.pth: cannot be read.*EOFError', reason(python))
    (tmp_path / 'torch.py').write_text('raise ImportError')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    assert re.search('TORCH_PYTHON=.*reading .*x.pth needs PyTorch', reason(sys.executable))


def test_part_needs_pytorch_at_hand(made, pth, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setenv('TORCH_PYTHON', torch_python())
    assert '--part needs a Python that has PyTorch: $TORCH_PYTHON tools/convert' in refuse(
        capsys, pth, tmp_path / 'out.npz', '--part', 'teacher')
    assert '--part is of a file of PyTorch' in refuse(
        capsys, made / 'small.npz', tmp_path / 'out.npz', '--part', 'teacher')


def test_tensorflow_is_asked_for_by_name(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tensorpack', None)
    assert 'needs TensorFlow and Tensorpack' in refuse(
        capsys, made / 'small', tmp_path / 'out.npz')
    assert 'model-0, a checkpoint of TensorFlow, needs' in refuse(
        capsys, made / 'small.npz', tmp_path / 'model-0')
    convert(made / 'small.npz', tmp_path / 'out.npz', '--fasterrcnn')


def test_another_python_reads(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setenv('TORCH_PYTHON', torch_python())
    convert(folder.path / 'v2.pth.tar', tmp_path / 'out.npz')
    assert_same(load_npz(tmp_path / 'out.npz'), load_npz(folder.path / 'v2.npz'))
    *dropped, _ = capsys.readouterr().out.splitlines()
    assert dropped == folder.said['v2.pth.tar'].splitlines()[:-1] and len(dropped) > 3


# ---- commands

def test_commands_load_every_format(folder, tmp_path, monkeypatch):
    """Beside what test_commands.py loads: folders everywhere, and an .npz for MoCo."""
    root, images = folder.path, write_images(tmp_path / 'images', 12, 6)
    monkeypatch.setenv('TORCH_PYTHON', torch_python())
    expected = load_npz(root / 'small.npz')

    def load(command):
        script, name, flags = command
        logdir = tmp_path / (script + name)
        out = (['--out', tmp_path / name] if script == 'eval_knn.py'
               else ['--logdir', logdir, '--max-steps', 0])
        run(script, '--load', root / name, *flags, *out)
        if out[0] == '--out':
            assert (tmp_path / name).exists()
            return
        loaded = read_weights(str(logdir), is_model)
        wanted = is_model if script == 'main_moco.py' else is_backbone
        for key in filter(wanted, expected):
            np.testing.assert_array_equal(loaded[key], expected[key], err_msg=key)

    labelled = ['--data', images] + NETWORK + ['--batch', 6]
    two_at_a_time(load, [
        ('main_moco.py', 'small.pth.tar', MOCO + ['--v2', '--fake']),
        ('main_lincls.py', 'small.pth', labelled), ('main_lincls.py', 'small.npz', labelled),
        ('eval_knn.py', 'small.pth.tar', labelled + ['--head']),
        ('eval_knn.py', 'small.npz', labelled)])
