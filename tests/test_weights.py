"""weights.py: what names mean, and which files are refused."""
import os
import pickle

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import moco
import resnet
import runs
import weights
from errors import UserError
from test_resnet import graph, randomize  # noqa: F401


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
            values = randomize(sess)
            tf.train.Saver().save(sess, str(folder / recipe / 'model-7'), write_meta_graph=False)
            np.savez(str(folder / (recipe + '.npz')), **values)
            np.savez(str(folder / (recipe + 'colon.npz')),
                     **{name + ':0': value for name, value in values.items()})
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
        backbone = weights.load_weights(path, weights.is_backbone, tf.global_variables())
        whole = weights.load_weights(path, weights.is_model, tf.global_variables())
        v1_session.run(tf.global_variables_initializer())
        runs.assign(v1_session, whole)
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
    with pytest.raises(UserError) as error:
        weights.read_weights(str(files / path))
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
    with pytest.raises(UserError, match='bomb.npz: cannot be read'):
        weights.read_weights(path)
    (tmp_path / 'pickle.npz').write_bytes(pickle.dumps(Bomb(exploded)))
    with pytest.raises(UserError, match='pickle.npz: cannot be read'):
        weights.read_weights(str(tmp_path / 'pickle.npz'))
    assert not os.path.exists(exploded)


def test_weights_that_do_not_fit_are_refused_with_their_names(files):
    build_model('v2', 18)
    path = str(files / 'v1.npz')
    # the backbone is the same
    assert len(weights.load_weights(path, weights.is_backbone, tf.global_variables())) == 100
    with pytest.raises(UserError) as error:
        weights.load_weights(path, weights.is_model, tf.global_variables())
    message = str(error.value)
    assert (path in message and 'linear0_64/W is missing' in message and
            'linear0_128/W has no place here' in message)


@pytest.mark.parametrize('depth, reason', [
    (50, 'group0/block0/conv1/W has shape (3, 3, 8, 8) where (1, 1, 8, 8) is needed'),
    (34, 'group0/block2/conv1/W is missing')])
def test_weights_of_another_depth_are_refused(files, depth, reason):
    build_model('v1', depth)
    with pytest.raises(UserError) as error:
        weights.load_weights(str(files / 'v1'), weights.is_backbone, tf.global_variables())
    message = str(error.value)
    # a few names, and how many there are besides
    assert message.count(';') == 6 and 'more' in message
    with pytest.raises(UserError) as error:
        variable, = [v for v in tf.global_variables() if v.op.name == reason.split()[0]]
        wanted = reason.split()[0].__eq__
        weights.check_weights('file', weights.read_weights(str(files / 'v1'), wanted), [variable])
    assert reason in str(error.value)


@pytest.mark.parametrize('optimizer, slots', [
    (tf.train.MomentumOptimizer(0.1, 0.9), ['conv0/W/Momentum']),
    (tf.train.AdamOptimizer(0.1), ['conv0/W/Adam', 'conv0/W/Adam_1', 'beta1_power', 'beta2_power']),
    (tf.train.AdagradOptimizer(0.1), ['conv0/W/Adagrad']),
    (tf.train.RMSPropOptimizer(0.1), ['conv0/W/RMSProp', 'conv0/W/RMSProp_1'])])
def test_weights_of_any_optimizer_load(tmp_path, optimizer, slots):
    def build(optimizer=None):
        """The model's variables, and what is to be saved."""
        features = resnet.ResNet(18, 8, '3x3s2')(tf.zeros([4, 16, 16, 3], tf.uint8), training=True)
        output = resnet.project(features, [128])
        moco.MOCOModel(None, 8, queue_size=32).create_queue()
        variables = tf.global_variables()
        if optimizer:
            optimizer.minimize(tf.reduce_sum(output), tf.train.get_or_create_global_step())
        return variables

    path = str(tmp_path / 'model-0')
    with tf.Graph().as_default(), tf.Session() as sess:
        build(optimizer)
        names = {v.op.name for v in tf.global_variables()}
        sess.run(tf.global_variables_initializer())
        values = randomize(sess)
        tf.train.Saver().save(sess, path, write_meta_graph=False)
    assert names >= {'global_step', *slots}
    with tf.Graph().as_default():
        variables = build()
        loaded = weights.load_weights(path, weights.is_model, variables)
        backbone = weights.load_weights(path, weights.is_backbone, variables)
    assert set(loaded) == {v.op.name for v in variables} and len(loaded) == 20 * 5 + 2 + 2
    assert set(loaded) - set(backbone) == {'linear0_128/W', 'linear0_128/b', 'queue', 'queue_ptr'}
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, values[name].astype(value.dtype))
