"""The command lines, end to end on small JPEGs: what they write,
and that a run which stopped goes on as if it had not."""
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import main_lincls
import resnet
from commands import MOCO, ROOT, read_json, run, two_at_a_time, write_images
from runs import assign
from weights import is_backbone, is_model, read_weights

SHORT = ['--steps-per-epoch', 6, '--epochs', 3]
LARGE_BATCH = ['--batch', 1024, '--queue-size', 1024, '--image-size', 8, '--lr', 0.03,
               '--steps-per-epoch', 1, '--epochs', 10]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def runs(tmp_path_factory, images):
    """All log folders, by name, and the last output of those that were continued."""
    root = tmp_path_factory.mktemp('runs')
    outputs = {}

    def pretrain(name, *flags):
        outputs[name], _ = run('main_moco.py', *MOCO, '--logdir', root / name, *flags)

    def train_linear(*flags):
        outputs['linear'], _ = run(
            'main_lincls.py', '--load', root / 'v1', '--data', images, '--batch', 12,
            '--epochs', 2, '--logdir', root / 'linear', *flags)

    def v1_and_linear():
        pretrain('v1', '--data', images, *SHORT, '--max-steps', 12, '--workers', 1)
        train_linear('--max-steps', 3)
        train_linear()
        run('main_lincls.py', '--load', root / 'v1', '--data', images, '--batch', 6, '--labels',
            '10%', '--finetune', '--epochs', 3, '--logdir', root / 'finetuned')
        pretrain('fake', '--fake', '--v2', '--steps-per-epoch', 3, '--epochs', 1,
                 '--knn-every', 1, '--knn-data', images)
        pretrain('from_init', '--fake', '--v2', '--max-steps', 0, '--init', root / 'v1')
        pretrain('large_batch_v1', '--fake', *LARGE_BATCH)

    def stopped_and_v2():
        # stopped in the middle of an epoch, and with other data processes
        for max_steps in (4, 12):
            pretrain('stopped', '--data', images, *SHORT, '--max-steps', max_steps, '--workers', 2)
        v2 = ['--data', images, '--v2', '--max-steps', 0]
        pretrain('v2', *v2)
        # started from given weights: the file's first layer is not that of its key encoder
        model = {name: value + (name == 'conv0/W')
                 for name, value in read_checkpoint(root / 'v2', 0).items() if is_model(name)}
        np.savez(str(root / 'v2.npz'), **model)
        pretrain('from_folder', *v2, '--seed', 7, '--load', root / 'v2')
        pretrain('from_npz', *v2, '--seed', 7, '--load', root / 'v2.npz')
        pretrain('large_batch_v2', '--fake', '--v2', *LARGE_BATCH)

    two_at_a_time(lambda chain: chain(), [v1_and_linear, stopped_and_v2])
    return types.SimpleNamespace(root=root, outputs=outputs)


@pytest.fixture(scope='module')
def v1(runs):
    """The log folder of 12 steps without a break."""
    return str(runs.root / 'v1')


@pytest.fixture(scope='module')
def v2(runs):
    """The log folder of no step of v2."""
    return str(runs.root / 'v2')


def read_checkpoint(logdir, step):
    return read_weights(os.path.join(str(logdir), 'model-{}'.format(step)))


# ---- pre-training

def test_pretraining_writes_checkpoints_and_statistics(v1):
    epochs = read_json(v1, 'stats.json')
    assert [(epoch['epoch_num'], epoch['global_step']) for epoch in epochs] == [(1, 6), (2, 12)]
    for epoch in epochs:
        assert set(epoch) == {'epoch_num', 'global_step', 'loss', 'accuracy', 'learning_rate',
                              'images_per_second', 'data_wait', 'queue_size', 'alignment',
                              'uniformity', 'queue_rank'}
        assert epoch['queue_size'] == 32
        assert 0 < epoch['alignment'] < 4 and -4.1 < epoch['uniformity'] < 0
        assert 1 < epoch['queue_rank'] < 32  # of 32 rows
        assert (0 < epoch['loss'] < 20 and 0 <= epoch['accuracy'] <= 1 and
                epoch['images_per_second'] > 0)
    # 0.5 at a batch of 256; its mean over the epoch,
    # the last step of which is after the milestone at 60 % of 18
    assert [epoch['learning_rate'] * 256 / 8 for epoch in epochs] == pytest.approx(
        [0.5, 0.5 * (5 + 0.1) / 6])
    weights = read_checkpoint(v1, 12)
    assert weights['global_step'] == 12 and weights['queue_ptr'] == 12 * 8 % 32
    assert weights['queue'].shape == (32, 128)
    assert any(name.startswith('events') for name in os.listdir(v1))


def test_a_run_that_stopped_goes_on_as_if_it_had_not(runs, v1):
    stopped = runs.root / 'stopped'
    assert 'after step 4' in runs.outputs['stopped']
    assert read_checkpoint(stopped, 4)['global_step'] == 4
    assert [epoch['global_step'] for epoch in read_json(stopped, 'stats.json')] == [4, 6, 12]
    for step in (6, 12):
        expected, resumed = read_checkpoint(v1, step), read_checkpoint(stopped, step)
        assert set(resumed) == set(expected) and 'conv0/W/Momentum' in expected
        for name in expected:
            np.testing.assert_array_equal(resumed[name], expected[name], err_msg=name)


def test_no_step_writes_the_initial_weights(v2):
    weights = read_checkpoint(v2, 0)
    assert weights['global_step'] == 0
    for name in weights:
        if name.startswith('momentum_encoder/'):
            np.testing.assert_array_equal(weights[name], weights[name[len('momentum_encoder/'):]])
    np.testing.assert_allclose(np.linalg.norm(weights['queue'], axis=1), 1, rtol=1e-5)
    assert weights['linear0_64/W'].shape == (64, 64) and weights['linear1_128/W'].shape == (64, 128)


@pytest.mark.parametrize('source, name', [('v2', 'from_folder'), ('v2.npz', 'from_npz')])
def test_pretraining_starts_from_given_weights(runs, source, name):
    given = read_weights(str(runs.root / source), is_model)
    started = read_checkpoint(runs.root / name, 0)
    assert 'momentum_encoder/conv0/W' in given and 'queue' in given
    for variable in given:
        np.testing.assert_array_equal(started[variable], given[variable], err_msg=variable)


def test_pretraining_starts_from_a_backbone(runs, v1):
    given, started = read_checkpoint(v1, 12), read_checkpoint(runs.root / 'from_init', 0)
    backbone = list(filter(is_backbone, given))
    assert len(backbone) == 100
    for name in backbone:
        np.testing.assert_array_equal(started[name], given[name], err_msg=name)
        np.testing.assert_array_equal(started['momentum_encoder/' + name], given[name])
    # what is fresh: head and queue, the head of v2 too
    assert not np.array_equal(started['queue'], given['queue'])
    np.testing.assert_array_equal(started['momentum_encoder/linear1_128/W'],
                                  started['linear1_128/W'])
    assert started['queue_ptr'] == 0 and started['global_step'] == 0


def test_knn_of_other_images_than_those_of_training(runs):
    epoch, = read_json(runs.root, 'fake', 'stats.json')
    assert 0 <= epoch['knn_top1'] <= 100


def test_v2_without_data(runs):
    epoch, = read_json(runs.root, 'fake', 'stats.json')
    assert epoch['global_step'] == 3 and np.isfinite(epoch['loss'])
    # half a cosine of 3 steps; what counts is a step's rate:
    # its mean is that of cos 0, 60, 120 degrees
    assert epoch['learning_rate'] == pytest.approx(0.5 * (1 + 0.75 + 0.25) / 3, rel=1e-3)


# 10 epochs of a step each: warming up in 5 steps to 0.12, falling at 6 and 8; half a cosine, of
# 18, 36, 54 and 72 degrees, which the batch has no effect on
@pytest.mark.parametrize('recipe, table', [
    ('v1', [.03, .048, .066, .084, .102, .12, .012, .012, .0012, .0012]),
    ('v2', [.03, .0292658, .0271353, .0238168, .0196353, .015, .0103647, .0061832, .0028647,
            .0007342])])
def test_learning_rate_at_batch_1024(runs, recipe, table):
    epochs = read_json(runs.root, 'large_batch_' + recipe, 'stats.json')
    np.testing.assert_allclose([epoch['learning_rate'] for epoch in epochs], table, rtol=1e-4)


# ---- linear classification

def test_linear_classification_leaves_the_backbone_alone(runs, v1):
    assert 'the backbone is unchanged (100 variables compared)' in runs.outputs['linear']
    backbone, trained = read_checkpoint(v1, 12), read_checkpoint(runs.root / 'linear', 10)
    for name in filter(is_backbone, backbone):
        np.testing.assert_array_equal(trained[name], backbone[name])
    assert trained['linear/W'].shape == (64, 3) and trained['linear/W/Momentum'].any()


def test_linear_classification_validates_every_image(runs):
    epochs = read_json(runs.root, 'linear', 'stats.json')
    assert [epoch['global_step'] for epoch in epochs] == [3, 5, 10]
    for epoch in epochs:
        assert {'loss', 'train_top1', 'val_top1', 'val_top5', 'learning_rate'} < set(epoch)
        assert epoch['val_images'] == 20
        assert epoch['val_top1'] / 5 == pytest.approx(round(epoch['val_top1'] / 5))
    # milestones are steps 6, 7, 8, 9 of 10
    rates = [epoch['learning_rate'] / 30 / 12 * 256 for epoch in epochs]
    assert rates == pytest.approx([1, 1, (1 + 0.1 + 0.01 + 0.001 + 0.0001) / 5])


def test_few_labels_train_the_whole_network(runs, v1):
    epochs = read_json(runs.root, 'finetuned', 'stats.json')
    assert [epoch['global_step'] for epoch in epochs] == [1, 2, 3]
    assert all(epoch['labels'] == 6 and epoch['val_images'] == 20 for epoch in epochs)
    # milestones at 60 and 80 % of 3 steps: both after the second one
    assert [epoch['learning_rate'] / 0.2 / 6 * 256 for epoch in epochs] == pytest.approx(
        [1, 1, 0.01])
    before, after = read_checkpoint(v1, 12), read_checkpoint(runs.root / 'finetuned', 3)
    changed = [name for name in filter(is_backbone, before)
               if not np.array_equal(after[name], before[name])]
    # (a gamma of 1 does not change by less than 1e-7)
    assert len(changed) >= 80 and any(name.endswith('/EMA') for name in changed)
    assert after['conv0/W/Momentum'].any() and after['linear/W/Momentum'].any()


def test_the_backbone_learns_at_its_own_rate():
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.constant([2., 3.])
        scaled = main_lincls.scale_gradient(x, 1 / 20)
        gradient, = tf.gradients(tf.reduce_sum(scaled ** 2), x)
        values = sess.run([scaled, gradient])
    np.testing.assert_allclose(values, [[2, 3], [0.2, 0.3]], rtol=1e-6)


def test_a_changed_backbone_is_an_error():
    with tf.Graph().as_default(), tf.Session() as sess:
        resnet.ResNet(18, 8)(tf.zeros([1, 32, 32, 3], tf.uint8), training=False)
        sess.run(tf.global_variables_initializer())
        loaded = sess.run({v.op.name: v for v in tf.global_variables()})
        main_lincls.check_unchanged(sess, loaded)
        value = loaded['group1/block0/conv1_bn/mean/EMA'] + np.float32(1e-6)
        assign(sess, {'group1/block0/conv1_bn/mean/EMA': value})
        with pytest.raises(Exception, match='group1/block0/conv1_bn/mean/EMA'):
            main_lincls.check_unchanged(sess, loaded)


# ---- kNN

def test_knn_writes_its_result_next_to_each_checkpoint(v1, images):
    run('eval_knn.py', '--load', v1, '--all', '--data', images, '--k', 5)
    for step in (6, 12):
        result = read_json(v1, 'model-{}.knn.json'.format(step))
        assert result['load'].endswith('model-{}'.format(step))
        assert (result['images'], result['bank'], result['k'], result['features']) == (
            20, 60, 5, 'backbone')
        assert 0 <= result['knn_top1'] <= 100 and result['knn_top1'] % 5 == 0


def test_knn_of_the_head(v2, images):
    run('eval_knn.py', '--load', v2, '--head', '--data', images)
    assert read_json(v2, 'model-0.head.knn.json')['features'] == 'head'


def test_knn_of_pixels(images, tmp_path):
    run('eval_knn.py', '--pixels', '--data', images, '--image-size', 16, '--k', 5,
        '--out', tmp_path / 'out.json')
    result = read_json(tmp_path, 'out.json')
    # a class has more of its colour: what brightness hides, the mean-centred direction shows
    assert result['images'] == 20 and result['knn_top1'] > 60


# ---- what a user sees

@pytest.mark.parametrize('script, ranks', [
    ('main_moco.py', 1), ('main_moco.py', 2), ('main_lincls.py', 2), ('eval_knn.py', 1),
    ('tools/convert_checkpoint.py', 1)])
def test_nothing_but_the_log_is_seen(v1, images, tmp_path, monkeypatch, script, ranks):
    flags = {
        'main_moco.py': [*MOCO, '--data', images, '--max-steps', 2, '--logdir', tmp_path],
        'main_lincls.py': ['--load', v1, '--data', images, '--batch', 12, '--max-steps', 2,
                           '--logdir', tmp_path],
        'eval_knn.py': ['--load', v1, '--data', images, '--out', tmp_path / 'out.json'],
        'tools/convert_checkpoint.py': [v1, tmp_path / 'out.npz']}[script]
    for name in ('TF_CPP_MIN_LOG_LEVEL', 'KMP_BLOCKTIME'):  # conftest.py's
        monkeypatch.delenv(name)
    output, errors = run(script, *flags, ranks=ranks)  # the log is its output
    assert output and errors == ''


@pytest.mark.parametrize('level, seen', [('0', 'IWEF'), ('2', 'EF'), ('3', 'F')])
def test_errors_while_tensorflow_is_loaded_are_seen(level, seen):
    lines = {severity: f'{severity}0000 00:00:1.2   34 file.cc:5] said' for severity in 'IWEF'}
    process = subprocess.run(
        [sys.executable, '-c', f'''import os
from tools import quiet_tensorflow
with quiet_tensorflow.heeding_level():
    os.write(2, {chr(10).join(lines.values())!r}.encode())
    os.abort()
'''], cwd=ROOT, env=dict(os.environ, TF_CPP_MIN_LOG_LEVEL=level), stderr=subprocess.PIPE,
        universal_newlines=True)
    assert process.returncode == -signal.SIGABRT
    assert process.stderr.splitlines() == [lines[severity] for severity in seen]
