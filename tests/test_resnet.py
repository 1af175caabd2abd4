"""resnet.py: the released variable names, the layers by hand,
and which files of weights are refused."""
import json
import os
import pickle

import horovod.tensorflow as hvd
import numpy as np
import pytest
from tensorpack import tfv1 as tf

import main_moco
import resnet

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(autouse=True)
def graph():
    """Every test has a graph of its own."""
    hvd.init()
    with tf.Graph().as_default() as graph:
        tf.set_random_seed(1)
        yield graph


def random_images(count, size, seed=0):
    return np.random.RandomState(seed).randint(0, 256, [count, size, size, 3]).astype(np.uint8)


def randomize(sess, seed=0):
    """Give all variables values that no initialiser gives: variances positive,
    the rest around zero."""
    rng = np.random.RandomState(seed)
    values = {v.op.name: rng.uniform(0.5, 2, v.shape) if v.op.name.endswith('variance/EMA')
              else rng.normal(0, 0.5, v.shape) for v in tf.global_variables()}
    resnet.assign(sess, values)
    return values


# ---- variables

@pytest.mark.parametrize('recipe', ['v1', 'v2'])
def test_variables_are_those_of_the_released_weights(recipe):
    with open(os.path.join(HERE, 'data', 'released_variables.json')) as f:
        released = json.load(f)[recipe]
    model = main_moco.MOCOModel(resnet.ResNet(), 2, mlp=recipe == 'v2')
    model.build_graph(
        *[tf.placeholder(spec.dtype, spec.shape) for spec in model.get_input_signature()])

    trainable = {v.op.name for v in tf.trainable_variables()}
    ours = {v.op.name: [v.dtype.base_dtype.name, v.shape.as_list(), v.op.name in trainable]
            for v in tf.global_variables() if v.op.name != 'global_step'}
    assert ours == released


@pytest.mark.parametrize('depth, convolutions, features', [
    (18, 20, 64), (34, 36, 64), (50, 53, 256), (101, 104, 256)])
def test_depths(depth, convolutions, features):
    # one less than the depth (the last layer is a head), and 3 or 4 projecting shortcuts
    net = resnet.ResNet(depth, width=8)
    output = net(tf.zeros([2, 32, 32, 3], tf.uint8), training=True)
    assert output.shape.as_list() == [2, features] and net.feature_dim == features
    assert sum(v.op.name.endswith('/W') for v in tf.trainable_variables()) == convolutions


@pytest.mark.parametrize('stem, size, last', [
    ('imagenet', 224, 7), ('imagenet', 32, 1), ('3x3', 32, 4), ('3x3s2', 32, 2)])
def test_stems(stem, size, last):
    output = resnet.ResNet(18, 8, stem)(tf.zeros([2, size, size, 3], tf.uint8), training=True)
    assert output.op.type == 'Mean'
    assert output.op.inputs[0].shape.as_list() == [2, last, last, 64]
    kernel = 7 if stem == 'imagenet' else 3
    assert tf.trainable_variables()[0].shape.as_list() == [kernel, kernel, 3, 8]


# ---- layers

def make_layers(training, **kwargs):
    net = resnet.ResNet(18, 8, **kwargs)
    net._training, net._trainable = training, True
    return net


@pytest.mark.parametrize('kernel, size, sums', [
    # how many ones a window of the zero-padded input has, along one axis:
    # windows start at -1, 1 or -3, -1, 1, 3
    (3, 4, [2, 3]),
    (7, 8, [4, 6, 7, 5]),
    (1, 4, [1, 1])])
def test_strided_convolution_pads_all_sides(kernel, size, sums):
    output = make_layers(training=False)._conv('conv', tf.ones([1, size, size, 1]), 1, kernel, 2)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        resnet.assign(sess, {'conv/W': np.ones([kernel, kernel, 1, 1])})
        np.testing.assert_allclose(sess.run(output)[0, :, :, 0], np.outer(sums, sums), rtol=1e-4)


def test_max_pool_pads_all_sides():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    with tf.Session() as sess:
        output = sess.run(make_layers(training=False)._max_pool(tf.constant(x)))
    assert output[0, :, :, 0].tolist() == [[5, 7], [13, 15]]


@pytest.mark.parametrize('splits', [1, 3])
def test_batch_norm_in_training(splits):
    x = np.random.RandomState(0).normal(3, 2, [6, 4, 4, 2])
    output = make_layers(True, bn_splits=splits)._batch_norm('bn', tf.constant(x, tf.float32))
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        old = randomize(sess)
        result = sess.run(output)
        sess.run(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
        new = {v.op.name: sess.run(v) for v in tf.global_variables()}

    parts = np.split(x, splits)
    means, variances = ([f(part, axis=(0, 1, 2)) for part in parts] for f in (np.mean, np.var))
    expected = [(part - mean) / np.sqrt(variance + 1.001e-5) * old['bn/gamma'] + old['bn/beta']
                for part, mean, variance in zip(parts, means, variances)]
    np.testing.assert_allclose(result, np.concatenate(expected), atol=1e-4)

    n = 6 * 4 * 4 / splits
    unbiased = np.mean(variances, axis=0) * n / (n - 1)
    np.testing.assert_allclose(
        new['bn/mean/EMA'], 0.9 * old['bn/mean/EMA'] + 0.1 * np.mean(means, axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        new['bn/variance/EMA'], 0.9 * old['bn/variance/EMA'] + 0.1 * unbiased, rtol=1e-5)


def test_batch_norm_in_evaluation_uses_the_moving_averages():
    x = np.random.RandomState(0).normal(3, 2, [6, 4, 4, 2])
    # splits do not matter then, nor need they divide anything
    output = make_layers(False, bn_splits=4)._batch_norm('bn', tf.constant(x, tf.float32))
    assert not tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        v = randomize(sess)
        expected = ((x - v['bn/mean/EMA']) / np.sqrt(v['bn/variance/EMA'] + 1.001e-5) *
                    v['bn/gamma'] + v['bn/beta'])
        np.testing.assert_allclose(sess.run(output), expected, atol=1e-4)


def test_images_are_normalised_in_bgr_order():
    net = resnet.ResNet(18, 8)
    seen = []
    net._conv = lambda name, x, *args, **kwargs: seen.append(x) or x
    net._max_pool = net._residual = lambda x, *args: x
    net(tf.constant([[[[0, 128, 255]]]], tf.uint8), training=False)
    with tf.Session() as sess:
        expected = [(0 - 0.406) / 0.225, (128 / 255 - 0.456) / 0.224, (1 - 0.485) / 0.229]
        np.testing.assert_allclose(sess.run(seen[0]).ravel(), expected, rtol=1e-5)


@pytest.mark.skipif(tf.__version__ >= '2', reason='on a CPU, where NHWC is used, TensorFlow 2.15 '
                    'gives other NCHW features if no tensor in between is fetched too')
@pytest.mark.parametrize('training', [True, False])
def test_data_formats_give_the_same_features(training):
    # BN over 16 values in the last layers: of two, the sign of a rounding error may be all it sees
    images = random_images(8, 64)
    tf.set_random_seed(1)
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        outputs = [
            resnet.ResNet(18, 8, data_format=data_format, bn_splits=2)(
                tf.constant(images), training)
            for data_format in ('NHWC', 'NCHW')]
    assert len(tf.trainable_variables()) == 60  # shared: 20 convolutions, each with gamma and beta
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        nhwc = sess.run(outputs[0])
        try:
            nchw = sess.run(outputs[1])
        except tf.errors.OpError as error:
            pytest.skip('this TensorFlow has no NCHW on this machine: {}'.format(
                error.message[:80]))
        assert nhwc.std() > 0.01
        np.testing.assert_allclose(nchw, nhwc, rtol=1e-3, atol=1e-4)


def is_compiled(tensor):
    """Whether the convolutions that a tensor is computed from belong to a cluster of XLA."""
    ops, seen = [tensor.op], set()
    while ops:
        op = ops.pop()
        if op not in seen:
            seen.add(op)
            ops += [x.op for x in op.inputs]
    clustered = {any(name.startswith('_xla') for name in op.node_def.attr)
                 for op in seen if op.type == 'Conv2D'}
    assert len(clustered) == 1
    return clustered.pop()


def test_xla_changes_nothing():
    # of the frozen backbone; test_moco.py compares the key encoder's output
    x = tf.placeholder(tf.uint8, [None, 32, 32, 3])
    net = resnet.ResNet(18, 8, '3x3s2')
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        plain, compiled = (resnet.compile_if(use_xla, lambda x: net(x, training=False), x)
                           for use_xla in (False, True))
    assert compiled.shape.as_list() == plain.shape.as_list() == [None, 64]
    assert is_compiled(compiled) and not is_compiled(plain)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for count in (4, 3):  # the last batch of a pass is smaller
            expected, result = sess.run([plain, compiled], {x: random_images(count, 32)})
            assert expected.std() > 0.01
            np.testing.assert_allclose(result, expected, rtol=1e-3, atol=1e-4)


# ---- files of weights

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with weights of a small v1 and v2 model in every form,
    and with what is not weights."""
    folder = tmp_path_factory.mktemp('weights')
    for recipe in ('v1', 'v2'):
        with tf.Graph().as_default(), tf.Session() as sess:
            build_model(recipe, 18)
            tf.train.get_or_create_global_step()
            sess.run(tf.global_variables_initializer())
            weights = randomize(sess)
            tf.train.Saver().save(sess, str(folder / recipe / 'model-7'), write_meta_graph=False)
            np.savez(str(folder / (recipe + '.npz')), **weights)
            np.savez(str(folder / (recipe + 'colon.npz')),
                     **{name + ':0': value for name, value in weights.items()})
    (folder / 'text').write_text('hello\n')
    (folder / 'text.npz').write_text('hello\n')
    (folder / 'empty.npz').write_text('')
    (folder / 'cut.npz').write_bytes((folder / 'v1.npz').read_bytes()[:5000])
    np.savez_compressed(str(folder / 'changed.npz'), a=np.random.rand(1000))
    changed = bytearray((folder / 'changed.npz').read_bytes())
    changed[1000:1100] = bytes(100)
    (folder / 'changed.npz').write_bytes(changed)
    np.save(str(folder / 'array.npy'), np.zeros(3))
    (folder / 'array.npy').rename(folder / 'array.npz')
    (folder / 'empty').mkdir()
    (folder / 'gone').mkdir()
    (folder / 'gone' / 'checkpoint').write_text('model_checkpoint_path: "model-9"\n')
    (folder / 'nodata-7.index').write_bytes((folder / 'v1' / 'model-7.index').read_bytes())
    return folder


@pytest.fixture(scope='module')
def v1_session():
    """A session with the query encoder of the small v1 model."""
    with tf.Graph().as_default(), tf.Session() as sess:
        build_model('v1', 18)
        yield sess


def build_model(recipe, depth):
    """The query encoder of a small model."""
    features = resnet.ResNet(depth, 8)(tf.zeros([2, 32, 32, 3], tf.uint8), training=False)
    resnet.project(features, [128] if recipe == 'v1' else [64, 128])


@pytest.mark.parametrize('path', ['v1', 'v1/checkpoint', 'v1/model-7', 'v1/model-7.index',
                                  'v1/model-7.data-00000-of-00001', 'v1.npz', 'v1colon.npz'])
def test_every_form_of_weights_loads(files, v1_session, path, monkeypatch):
    monkeypatch.chdir(str(files))  # relative paths, too
    with v1_session.graph.as_default():
        variables = {v.op.name: v for v in tf.global_variables()}
        backbone = resnet.load_weights(path, resnet.is_backbone)
        whole = resnet.load_weights(path, resnet.is_model)
        v1_session.run(tf.global_variables_initializer())
        resnet.assign(v1_session, whole)
    assert len(backbone) == 20 * 5
    assert set(backbone) == {name for name in variables if not name.startswith('linear')}
    assert set(whole) - set(backbone) == {'linear0_128/W', 'linear0_128/b'}
    expected = np.load(str(files / 'v1.npz'))
    for name, value in v1_session.run(variables).items():
        np.testing.assert_array_equal(value, expected[name].astype(np.float32))


@pytest.mark.parametrize('path, reason', [
    ('nothing', 'does not exist'),
    ('nothing.npz', 'does not exist'),
    ('text', 'is not a checkpoint, an .npz or a file of PyTorch'),
    ('text.npz', 'cannot be read'),
    ('empty.npz', 'cannot be read'),
    ('cut.npz', 'cannot be read'),
    ('changed.npz', 'cannot be read'),
    ('array.npz', 'cannot be read'),
    ('empty', 'holds no checkpoint'),
    ('gone', 'holds no checkpoint'),
    ('nodata-7', 'cannot be read')])
def test_what_is_not_weights_is_refused_by_name(files, path, reason):
    with pytest.raises(resnet.WeightsError) as error:
        resnet.read_weights(str(files / path))
    assert str(files / path) in str(error.value) and reason in str(error.value)


class Bomb:
    """Its pickle, when loaded, makes a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (self._path, 'w')


def test_nothing_in_a_file_is_executed(tmp_path):
    path, exploded = str(tmp_path / 'bomb.npz'), str(tmp_path / 'exploded')
    np.savez(path, np.array([Bomb(exploded)], dtype=object))
    with pytest.raises(resnet.WeightsError, match='bomb.npz: cannot be read'):
        resnet.read_weights(path)
    (tmp_path / 'pickle.npz').write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(resnet.WeightsError, match='pickle.npz: cannot be read'):
        resnet.read_weights(str(tmp_path / 'pickle.npz'))
    assert not os.path.exists(exploded)


def test_weights_that_do_not_fit_are_refused_with_their_names(files):
    build_model('v2', 18)
    path = str(files / 'v1.npz')
    assert len(resnet.load_weights(path, resnet.is_backbone)) == 100  # the backbone is the same
    with pytest.raises(resnet.WeightsError) as error:
        resnet.load_weights(path, resnet.is_model)
    message = str(error.value)
    assert (path in message and 'linear0_64/W is missing' in message and
            'linear0_128/W has no place here' in message)


@pytest.mark.parametrize('depth, reason', [
    (50, 'group0/block0/conv1/W has shape (3, 3, 8, 8) where (1, 1, 8, 8) is needed'),
    (34, 'group0/block2/conv1/W is missing')])
def test_weights_of_another_depth_are_refused(files, depth, reason):
    build_model('v1', depth)
    with pytest.raises(resnet.WeightsError) as error:
        resnet.load_weights(str(files / 'v1'), resnet.is_backbone)
    message = str(error.value)
    # a few names, and how many there are besides
    assert message.count(';') == 6 and 'more' in message
    with pytest.raises(resnet.WeightsError) as error:
        variable, = [v for v in tf.global_variables() if v.op.name == reason.split()[0]]
        wanted = reason.split()[0].__eq__
        resnet.check_weights('file', resnet.read_weights(str(files / 'v1'), wanted), [variable])
    assert reason in str(error.value)
