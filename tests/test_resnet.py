"""resnet.py: the released variable names, and the layers by hand."""
import json
import os

import horovod.tensorflow as hvd
import numpy as np
import pytest
from tensorpack import tfv1 as tf

import main_moco
import moco
import resnet
import runs
from tools import pytorch_format

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
    runs.assign(sess, values)
    return values


# ---- variables

@pytest.mark.parametrize('recipe', ['v1', 'v2'])
def test_variables_are_those_of_the_released_weights(recipe):
    with open(os.path.join(HERE, 'data', 'released_variables.json')) as f:
        released = json.load(f)[recipe]
    model = moco.MOCOModel(resnet.ResNet(), 2, mlp=recipe == 'v2')
    model.build_graph(
        *[tf.placeholder(spec.dtype, spec.shape) for spec in model.get_input_signature()])

    trainable = {v.op.name for v in tf.trainable_variables()}
    others = {'global_step'} | {name + '/Momentum' for name in trainable}  # of the optimizer
    ours = {v.op.name: [v.dtype.base_dtype.name, v.shape.as_list(), v.op.name in trainable]
            for v in tf.global_variables() if v.op.name not in others}
    assert ours == released


def test_initial_values_are_those_of_the_published_runs():
    model = moco.MOCOModel(resnet.ResNet(), 2, queue_size=4096, mlp=True)
    model.encode(tf.zeros([2, 64, 64, 3], tf.uint8), trainable=True)
    model.create_queue()
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        values = sess.run({v.op.name: v for v in tf.global_variables()})

    def assert_normal(values, deviation):
        count, scaled = values.size, values.ravel().astype(np.float64) / deviation
        assert abs(scaled.mean()) < 5 / count ** 0.5
        assert abs(scaled.std() - 1) < 5 / (2 * count) ** 0.5
        assert np.abs(scaled).max() > 3  # a truncated one ends at 2.3

    constants = {'gamma': 1, 'beta': 0, 'b': 0, 'mean/EMA': 0, 'variance/EMA': 1, 'queue_ptr': 0}
    for name, value in values.items():
        kind = '/'.join(name.split('/')[-1 - name.endswith('EMA'):])
        if kind == 'W' and value.ndim == 4:  # of the outputs, scale 2
            assert_normal(value, (2 / (value.shape[0] * value.shape[1] * value.shape[3])) ** 0.5)
        elif kind == 'W':
            assert_normal(value, 0.01)
        elif kind == 'queue':
            np.testing.assert_allclose(np.linalg.norm(value, axis=1), 1, rtol=1e-5)
            assert_normal(value * value.shape[1] ** 0.5, 1)
        else:
            assert (value == constants[kind]).all(), name
    assert len(values) == 53 * 5 + 4 + 2


@pytest.mark.parametrize('depth, convolutions, features', [
    (18, 20, 64), (34, 36, 64), (50, 53, 256), (101, 104, 256)])
def test_depths(depth, convolutions, features):
    # one less than the depth (the last layer is a head), and 3 or 4 projecting shortcuts
    net = resnet.ResNet(depth, width=8)
    output = net(tf.zeros([2, 32, 32, 3], tf.uint8), training=True)
    assert output.shape.as_list() == [2, features] and net.feature_dim == features
    assert sum(v.op.name.endswith('/W') for v in tf.trainable_variables()) == convolutions


def test_another_depth_is_a_line_in_the_table(monkeypatch):
    monkeypatch.setitem(resnet.DEPTHS, 152, (resnet.BOTTLENECK, (3, 8, 36, 3)))
    net = resnet.ResNet(152, width=4)
    assert net(tf.zeros([2, 32, 32, 3], tf.uint8), training=True).shape.as_list() == [2, 128]
    built = [(v.op.name, tuple(v.shape.as_list())) for v in tf.global_variables()]
    listed = pytorch_format.list_variables(152, width=4)
    assert len(listed) == len(built) == 155 * 5 and sorted(listed) == sorted(built)
    # PyTorch has a name for each, and no name for two
    names = pytorch_format.classifier_names()
    assert {name for name, _ in listed} | {'linear/W', 'linear/b'} <= set(names)
    assert len(set(names.values())) == len(names)
    assert [names[name] for name in (
        'group2/block35/conv3/W', 'group1/block7/conv2_bn/variance/EMA', 'linear/b')] == [
        'layer3.35.conv3.weight', 'layer2.7.bn2.running_var', 'fc.bias']
    assert main_moco.parse_args(['--fake', '--depth', '152']).depth == 152


@pytest.mark.parametrize('stem, size, last', [
    ('imagenet', 224, 7), ('imagenet', 32, 1), ('3x3', 32, 4), ('3x3s2', 32, 2)])
def test_stems(stem, size, last):
    output = resnet.ResNet(18, 8, stem)(tf.zeros([2, size, size, 3], tf.uint8), training=True)
    assert output.op.type == 'Mean'
    assert output.op.inputs[0].shape.as_list() == [2, last, last, 64]
    kernel = 7 if stem == 'imagenet' else 3
    assert tf.trainable_variables()[0].shape.as_list() == [kernel, kernel, 3, 8]


# ---- layers

@pytest.mark.parametrize('kernel, size, sums', [
    # how many ones a window of the zero-padded input has, along one axis:
    # windows start at -1, 1 or -3, -1, 1, 3
    (3, 4, [2, 3]),
    (7, 8, [4, 6, 7, 5]),
    (1, 4, [1, 1])])
def test_strided_convolution_pads_all_sides(kernel, size, sums):
    output = resnet.ResNet(18, 8)._conv(
        tf.ones([1, size, size, 1]), resnet.Conv('conv', kernel, 1, 1, 2), False, True)
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        runs.assign(sess, {'conv/W': np.ones([kernel, kernel, 1, 1])})
        np.testing.assert_allclose(sess.run(output)[0, :, :, 0], np.outer(sums, sums), rtol=1e-4)


def test_max_pool_pads_all_sides():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    with tf.Session() as sess:
        output = sess.run(resnet.ResNet(18, 8)._max_pool(tf.constant(x)))
    assert output[0, :, :, 0].tolist() == [[5, 7], [13, 15]]


@pytest.mark.parametrize('splits', [1, 3])
def test_batch_norm_in_training(splits):
    x = np.random.RandomState(0).normal(3, 2, [6, 4, 4, 2])
    output = resnet.ResNet(18, 8, bn_splits=splits)._batch_norm(
        'bn', tf.constant(x, tf.float32), 2, training=True, trainable=True)
    updates = resnet.update_moving_averages()
    assert len(updates) == 2
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        old = randomize(sess)
        result = sess.run(output)
        sess.run(updates)
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
    output = resnet.ResNet(18, 8, bn_splits=4)._batch_norm(
        'bn', tf.constant(x, tf.float32), 2, training=False, trainable=True)
    assert not tf.get_collection(resnet.BATCH_STATISTICS) and not resnet.update_moving_averages()
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        v = randomize(sess)
        expected = ((x - v['bn/mean/EMA']) / np.sqrt(v['bn/variance/EMA'] + 1.001e-5) *
                    v['bn/gamma'] + v['bn/beta'])
        np.testing.assert_allclose(sess.run(output), expected, atol=1e-4)


def test_images_are_normalised_in_bgr_order():
    net = resnet.ResNet(18, 8)
    seen = []
    net._conv = lambda x, *args: seen.append(x) or x
    net._max_pool = lambda x: x
    net(tf.constant([[[[0, 128, 255]]]], tf.uint8), training=False)
    with tf.Session() as sess:
        expected = [(0 - 0.406) / 0.225, (128 / 255 - 0.456) / 0.224, (1 - 0.485) / 0.229]
        np.testing.assert_allclose(sess.run(seen[0]).ravel(), expected, rtol=1e-5)


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
