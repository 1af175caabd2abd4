"""tools/export_model.py: ONNX in onnxruntime and SavedModels in a bare TensorFlow, against the
features of resnet.py; and what is refused.

onnx and onnxruntime live in this Python, or in the one of torch_python() in commands.py; without
them, tests of ONNX files are skipped.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import network
import resnet
import runs
from commands import PATIENCE, run, torch_python
from tools import convert_checkpoint
from weights import read_weights

SIZES = [(64, 64), (47, 70)]  # of images: no side of the second one is a multiple of a stride
COLOURS = {'mean_bgr': [100.5, 120.25, 90.0], 'std_bgr': [60.0, 50.5, 70.0]}
# name of a file -> depth, width, stem, what else its description says (None: it has none)
MODELS = {'small': (18, 8, '3x3s2', dict(COLOURS, image_size=64)), 'cifar': (34, 4, '3x3', {}),
          'large': (50, 8, 'imagenet', COLOURS), 'untold': (18, 8, 'imagenet', None)}

# a bare TensorFlow, 1 or 2: model, images .npz, features .npz
RUN_SAVED_MODEL = '''
import sys
import numpy as np
import tensorflow as tf
tf = tf.compat.v1
_, model, images, features = sys.argv
images = np.load(images)
with tf.Graph().as_default(), tf.Session() as sess:
    signature = tf.saved_model.load(sess, ['serve'], model).signature_def['serving_default']
    (key, x), (name, y) = list(signature.inputs.items()) + list(signature.outputs.items())
    assert (key, name) == ('images', 'features'), signature
    x, y = (sess.graph.get_tensor_by_name(tensor.name) for tensor in (x, y))
    out = {name: sess.run(y, {x: images[name].astype(x.dtype.as_numpy_dtype)})
           for name in images.files}
np.savez(features, dtype=x.dtype.name, **out)
assert not {'tensorpack', 'horovod', 'resnet'} & set(sys.modules)
'''

# onnxruntime: the same
RUN_ONNX = '''
import sys
import numpy as np
import onnx
import onnxruntime
_, model, images, features = sys.argv
onnx.checker.check_model(model, full_check=True)
loaded = onnx.load(model)
images = np.load(images)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
(x,), (y,) = session.get_inputs(), session.get_outputs()
assert (x.name, y.name) == ('images', 'features') and x.shape == ['N', 'H', 'W', 3], (x, y)
dtype = {'tensor(uint8)': 'uint8', 'tensor(float)': 'float32'}[x.type]
out = {name: session.run(['features'], {'images': images[name].astype(dtype)})[0]
       for name in images.files}
np.savez(features, dtype=dtype, network=session.get_modelmeta().custom_metadata_map['network'],
         opset=[entry.version for entry in loaded.opset_import], **out)
'''


def convert(*argv):
    """Run the converter in this process."""
    convert_checkpoint.main([str(arg) for arg in argv])


def refuse(capsys, *argv):
    """The error of a conversion: one line."""
    with pytest.raises(SystemExit) as error:
        convert(*argv)
    assert str(error.value).startswith('convert_checkpoint.py: error: ')
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with MODELS as .npz, all values random, and images.npz: of each size one of RGB, and
    that with its channels reversed."""
    folder = tmp_path_factory.mktemp('export')
    rng = np.random.RandomState(0)
    images = {}
    for size in SIZES:
        rgb = (rng.randint(0, 256, size + (3,)) // [1, 2, 4]).astype(np.uint8)
        images['x'.join(map(str, size))] = np.stack([rgb, rgb[..., ::-1]])
    np.savez(str(folder / 'images.npz'), **images)
    for name, (depth, width, stem, told) in MODELS.items():
        with tf.Graph().as_default():
            resnet.ResNet(depth, width, stem)(tf.zeros([1, 32, 32, 3], tf.uint8), training=False)
            shapes = {v.op.name: v.shape.as_list() for v in tf.global_variables()}
        arrays = {key: draw(rng, key, shape) for key, shape in shapes.items()}
        if told is not None:
            text = json.dumps(dict(told, depth=depth, width=width, stem=stem))
            arrays['network'] = np.frombuffer(text.encode(), np.uint8)
        np.savez(str(folder / (name + '.npz')), **arrays)
    return folder


def draw(rng, name, shape):
    """Values that no initialiser gives; the features stay moderate."""
    if len(shape) > 1:
        return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)
    low = 0.5 if name.endswith(('variance/EMA', 'gamma')) else -0.5
    return rng.uniform(low, low + 1, shape).astype(np.float32)


def our_features(folder, name):
    """The features of images.npz, in BGR, as the commands here compute them: dict."""
    depth, width, stem, told = MODELS[name]
    net = network.build(dict(network.PUBLISHED, depth=depth, width=width, stem=stem,
                             **(told or {})), gpus=0)
    with tf.Graph().as_default(), tf.Session() as sess:
        images = tf.placeholder(tf.uint8, [None, None, None, 3])
        features = net(images, training=False)
        runs.assign(sess, read_weights(str(folder / (name + '.npz'))))
        return {size: sess.run(features, {images: rgb[..., ::-1]})
                for size, rgb in np.load(str(folder / 'images.npz')).items()}


def run_export(python, script, model, folder, out):
    """What one of the scripts above computes: dict."""
    process = subprocess.run(
        [python, '-c', script, str(model), str(folder / 'images.npz'), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        timeout=PATIENCE, cwd=str(folder),
        env=dict(os.environ, CUDA_VISIBLE_DEVICES='', PYTHONPATH=''))
    assert process.returncode == 0, process.stdout
    return dict(np.load(str(out)))


def assert_features(found, folder, name):
    expected = our_features(folder, name)
    assert len(expected) == len(SIZES)
    for size, features in expected.items():
        assert found[size].dtype == np.float32 and found[size].shape == features.shape
        scale = np.abs(features).max()
        assert np.abs(found[size] - features).max() <= 1e-4 * scale
        # and the order of the channels matters
        assert np.abs(features[0] - features[1]).max() > 0.01 * scale


@pytest.fixture(scope='module')
def onnx_python():
    """A Python that has onnx and onnxruntime."""
    for find in (lambda: sys.executable, torch_python):
        python = find()
        if subprocess.run([python, '-c', 'import onnx, onnxruntime'], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, timeout=PATIENCE).returncode == 0:
            return python
    pytest.skip(f'no onnx and onnxruntime in {sys.executable} or {python}')


# ---- features

@pytest.mark.parametrize('name, input_type', [
    ('small', None), ('small', 'float'), ('cifar', None), ('large', None), ('untold', 'uint8')])
def test_onnx(folder, onnx_python, name, input_type, tmp_path):
    out = tmp_path / 'out.onnx'
    flags = ['--input', input_type] if input_type else []
    for _ in range(2):  # what was written in this way is replaced
        printed, _ = run('tools/convert_checkpoint.py', folder / (name + '.npz'), out, *flags,
                         python=onnx_python)
    assert printed.endswith(f'ResNet-{MODELS[name][0]}; 0 dropped\n')
    found = run_export(onnx_python, RUN_ONNX, out, folder, tmp_path / 'out.npz')
    assert str(found['dtype']) == {'float': 'float32'}.get(input_type, 'uint8')
    assert found['opset'] == [13]
    assert_features(found, folder, name)
    told = json.loads(str(found['network']))
    assert (told['depth'], told['width'], told['stem']) == MODELS[name][:3]
    assert {key: told[key] for key in MODELS[name][3] or {}} == (MODELS[name][3] or {})
    assert sorted(os.listdir(str(tmp_path))) == ['out.npz', 'out.onnx']


@pytest.mark.parametrize('name, input_type', [
    ('small', None), ('small', 'float'), ('large', 'uint8')])
def test_saved_model(folder, name, input_type, tmp_path):
    out = tmp_path / 'a [1]' / 'out.savedmodel'
    convert(folder / (name + '.npz'), str(out) + '/', *['--input', input_type] * bool(input_type))
    assert os.listdir(str(tmp_path / 'a [1]')) == ['out.savedmodel']
    (tmp_path / 'a [1]').rename(tmp_path / 'a')  # TensorFlow finds nothing in brackets
    out = tmp_path / 'a' / 'out.savedmodel'
    found = run_export(sys.executable, RUN_SAVED_MODEL, out, folder, tmp_path / 'out.npz')
    assert str(found['dtype']) == {'float': 'float32'}.get(input_type, 'uint8')
    assert_features(found, folder, name)


def test_saved_model_by_the_command(folder, tmp_path):
    """Where nothing has told TensorFlow 2 to behave as 1."""
    out = tmp_path / 'out.savedmodel'
    _, errors = run('tools/convert_checkpoint.py', folder / 'small.npz', out)
    assert not errors
    assert_features(run_export(sys.executable, RUN_SAVED_MODEL, out, folder, tmp_path / 'out.npz'),
                    folder, 'small')


# ---- what is refused

def change(folder, path, **changed):
    """Write small.npz with another `network`, or none."""
    arrays = {key: array for key, array in np.load(str(folder / 'small.npz')).items()
              if key != 'network'}
    text = changed.get('text') or json.dumps(changed)
    added = {'network': np.frombuffer(text.encode(), np.uint8)} if changed else {}
    np.savez(str(path), **arrays, **added)
    return path


def test_a_stem_that_is_not_known_is_asked_for(folder, tmp_path, capsys):
    untold, out = change(folder, tmp_path / 'untold.npz'), tmp_path / 'out.savedmodel'
    assert ('untold.npz: its stem is not told; with a first kernel of 3x3 it can be --stem 3x3 or '
            '3x3s2') in refuse(capsys, untold, out)
    convert(untold, out, '--stem', '3x3s2')
    found = run_export(sys.executable, RUN_SAVED_MODEL, out, folder, tmp_path / 'out.npz')
    # with colours as published: features are others
    assert np.abs(found['64x64'] - our_features(folder, 'small')['64x64']).max() > 0


@pytest.mark.parametrize('changed, flags, words', [
    ({'stem': '3x3s2'}, ['--stem', '3x3'],
     '--stem 3x3: the weights of {path} are of --stem 3x3s2'),
    ({'stem': 'imagenet'}, [], '{path}: its stem is imagenet; with a first kernel of 3x3 it can'),
    ({}, ['--stem', 'imagenet'], '{path}: its stem is imagenet; with a first kernel of 3x3 it can'),
    ({'stem': 'new'}, [], '{path}: its stem is new; with'),
    ({'stem': '3x3', 'mean_bgr': [1, 2]}, [], "{path}: its 'network' cannot be read"),
    ({'text': '3'}, [], "{path}: its 'network' cannot be read"),
    ({'text': '{'}, [], "{path}: its 'network' cannot be read")])
@pytest.mark.parametrize('ending', ['.onnx', '.savedmodel'])
def test_descriptions_that_do_not_fit(folder, changed, flags, words, ending, tmp_path, capsys):
    path = change(folder, tmp_path / 'in.npz', **changed)
    assert words.format(path=path) in refuse(capsys, path, tmp_path / ('out' + ending), *flags)
    assert os.listdir(str(tmp_path)) == ['in.npz']


@pytest.mark.parametrize('flags', [['--stem', '3x3s2'], ['--input', 'float']])
def test_flags_of_other_formats(folder, flags, tmp_path, capsys):
    assert 'out.npz: --stem and --input are of .onnx and .savedmodel' in refuse(
        capsys, folder / 'small.npz', tmp_path / 'out.npz', *flags)


def test_what_is_there_stays(folder, tmp_path, capsys):
    small = folder / 'small.npz'
    (tmp_path / 'empty.savedmodel').mkdir()
    (tmp_path / 'link.savedmodel').symlink_to('nothing')
    (tmp_path / 'file.savedmodel').write_text('')
    for name, words in (('empty.savedmodel', 'is no regular file: nothing there is replaced'),
                        ('empty.savedmodel/', 'nothing there is replaced'),
                        ('link.savedmodel', 'cannot be written'),
                        ('file.savedmodel', 'cannot be written')):
        assert words in refuse(capsys, small, f'{tmp_path}/{name}')
    assert sorted(os.listdir(str(tmp_path))) == [
        name + '.savedmodel' for name in ('empty', 'file', 'link')]
    assert not os.listdir(str(tmp_path / 'empty.savedmodel'))
    (tmp_path / 'file').write_text('mine')
    assert 'cannot be written' in refuse(capsys, small, tmp_path / 'file' / 'out.savedmodel')
    (tmp_path / 'mine.onnx').write_text('mine')
    assert 'it is not replaced' in refuse(capsys, small, tmp_path / 'mine.onnx')
    assert (tmp_path / 'mine.onnx').read_text() == 'mine'


def test_a_folder_is_whole_or_not_there(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'rename', lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(folder / 'small.npz', tmp_path / 'out.savedmodel')
    assert os.listdir(str(tmp_path)) == []


def test_libraries_are_asked_for_by_name(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    monkeypatch.setattr(resnet, 'tf', None)
    assert 'writing ONNX needs onnx: pip install onnx' in refuse(
        capsys, folder / 'small.npz', tmp_path / 'out.onnx')
    assert 'writing a SavedModel needs TensorFlow and Tensorpack' in refuse(
        capsys, folder / 'small.npz', tmp_path / 'out.savedmodel')
    assert os.listdir(str(tmp_path)) == []
