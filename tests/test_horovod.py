"""Two ranks under horovodrun: what must be equal on both,
and what must have travelled between them."""
import os

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import resnet
import runs
import views
from commands import MOCO, read_json, run, write_images
from image_lists import list_images
from images import read_image
from weights import is_model, load_weights

EMA = '/EMA'


def run_ranks(folder, ranks, *parts):
    """What horovod_ranks.py wrote, of all ranks."""
    run('tests/horovod_ranks.py', folder, *parts, ranks=ranks)
    return [dict(np.load(str(folder / 'rank{}.npz'.format(rank)))) for rank in range(ranks)]


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp('ranks'), 2, 'shuffle', 'train')


@pytest.fixture(scope='module')
def four_ranks(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp('four_ranks'), 4, 'shuffle')


@pytest.mark.parametrize('fixture', ['ranks', 'four_ranks'])
def test_images_are_exchanged_and_come_back(request, fixture):
    ranks = request.getfixturevalue(fixture)
    size = len(ranks)
    orders = set()
    for i in range(10):
        shuffled = [rank['shuffled{}'.format(i)] for rank in ranks]
        assert [x.shape for x in shuffled] == [(4, 2, 2)] * size
        assert all((x == x[:, :1, :1]).all() for x in shuffled)  # whole images
        order = np.concatenate(shuffled)[:, 0, 0].tolist()
        assert sorted(order) == list(range(4 * size))
        orders.add(tuple(order))
        for rank in ranks:
            # all images of all, as they were
            assert rank['back{}'.format(i)][:, 0, 0].tolist() == list(range(4 * size))
            # as if every rank had received every image
            for name in ('images', 'keys'):
                np.testing.assert_array_equal(
                    rank['{}{}'.format(name, i)], rank['expected_{}{}'.format(name, i)])
    assert len(orders) == 10
    for rank in ranks:
        assert rank['collectives'].tolist() == ['HorovodAlltoall'] and rank['no_gradient']
    # a rank gets images of several in nearly every step
    assert sum(len({image // 4 for image in order[:4]}) > 1 for order in orders) >= 6


def test_ranks_hold_the_same_after_every_step(ranks):
    names = [name for name in ranks[0] if name.startswith('step') and not name.endswith(EMA)]
    assert {name.split(':')[0] for name in names} == {'step1', 'step2', 'step3'}
    for name in names:
        np.testing.assert_array_equal(ranks[0][name], ranks[1][name], err_msg=name)
    # and it is no standstill
    assert [int(ranks[0]['step{}:queue_ptr'.format(i)]) for i in (1, 2, 3)] == [8, 16, 0]
    assert [int(ranks[0]['step{}:global_step'.format(i)]) for i in (1, 2, 3)] == [1, 2, 3]
    for name in ('conv0/W', 'momentum_encoder/conv0/W', 'linear0_16/b', 'queue'):
        assert not np.array_equal(ranks[0]['step1:' + name], ranks[0]['step2:' + name])
    # all of the queue is new by then: the keys of both ranks, all different
    queue = ranks[1]['step3:queue']
    assert len(np.unique(queue.round(4), axis=0)) == 24
    np.testing.assert_array_equal(ranks[1]['step1:queue'][:8], queue[:8])
    np.testing.assert_array_equal(ranks[1]['step2:queue'][8:16], queue[8:16])


def test_bn_statistics_differ_until_the_epoch_ends(ranks):
    names = [name for name in ranks[0] if name.startswith('step3:') and name.endswith(EMA) and
             'momentum_enc' not in name]
    assert len(names) == 40
    for name in names:
        assert not np.array_equal(ranks[0][name], ranks[1][name]), name
        after = name.replace('step3', 'epoch')
        for rank in ranks:
            np.testing.assert_array_equal(rank[after], ranks[0][name])


def test_what_is_logged_is_the_mean_of_all_ranks(ranks):
    for name in ('loss', 'accuracy', 'learning_rate', 'queue_size'):
        means = [np.mean([rank[f'monitored{step}:{name}'] for step in (1, 2, 3)], dtype=np.float64)
                 for rank in ranks]
        # the losses of two ranks differ, so neither is their mean
        assert name != 'loss' or abs(means[0] - means[1]) > 1e-3
        for rank in ranks:
            assert rank['logged:' + name] == pytest.approx(np.mean(means), rel=1e-6)
    assert ranks[0]['logged:queue_size'] == 24


# ---- kNN and validation: 61 and 21 images, which two ranks do not divide

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), 61, 21)


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory, images):
    """The log folder of a run on two ranks."""
    logdir = str(tmp_path_factory.mktemp('pretrained'))
    run('main_moco.py', '--data', images, *MOCO, '--logdir', logdir, '--knn-every', 1,
        '--max-steps', 10, ranks=2)
    return logdir


def test_online_knn_is_that_of_the_checkpoint(pretrained, images):
    online = [(epoch['global_step'], epoch['knn_top1'])
              for epoch in read_json(pretrained, 'stats.json')]
    assert [step for step, _ in online] == [7, 10]
    # with one rank, three workers:
    # the passes' one and four batches are no whole rounds of their turns
    for ranks, flags in ((1, ['--workers', 3, '--batch', 18]), (2, [])):
        run('eval_knn.py', '--load', pretrained, '--all', '--data', images, *flags,
            ranks=ranks)
        for step, knn in online:
            result = read_json(pretrained, 'model-{}.knn.json'.format(step))
            assert result['images'] == 21 and result['bank'] == 61
            assert result['knn_top1'] == pytest.approx(knn, abs=1e-4)
            os.remove(os.path.join(pretrained, 'model-{}.knn.json'.format(step)))


def classify(checkpoint, images):
    """Of each validation image its label and whether a linear classifier is right,
    computed here, in one batch."""
    val = list_images(images, 'val', labelled=True)
    batch = np.zeros([len(val.files), 16, 16, 3], np.uint8)
    for image, path in zip(batch, (val.files[i] for i in range(len(val.files)))):
        views.center_crop_view(read_image(path), None, image)
    with tf.Graph().as_default(), tf.Session() as sess:
        features = resnet.ResNet(18, 8, '3x3s2')(tf.constant(batch), training=False)
        logits = resnet.fully_connected('linear', features, 3)
        runs.assign(sess, load_weights(checkpoint, is_model, tf.global_variables()))
        return sess.run(logits).argmax(axis=1) == val.labels


def test_sharded_validation_is_exact(pretrained, images, tmp_path):
    run('main_lincls.py', '--load', pretrained, '--data', images, '--batch', 10,
        '--steps-per-epoch', 3, '--max-steps', 6, '--logdir', tmp_path, ranks=2)
    epochs = read_json(tmp_path, 'stats.json')
    assert [epoch['global_step'] for epoch in epochs] == [3, 6]
    for epoch in epochs:
        right = classify(str(tmp_path / 'model-{}'.format(epoch['global_step'])), images)
        assert len(right) == epoch['val_images'] == 21
        assert epoch['val_top1'] == pytest.approx(100 * right.mean(), abs=1e-4)
        assert epoch['val_top5'] == 100  # of three classes
