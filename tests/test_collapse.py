"""collapse.py, and the measures without labels in moco.py, against plain definitions."""
import types

import numpy as np
import pytest
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import collapse


@pytest.mark.parametrize('rows, rank', [
    (np.eye(5), 5), (np.ones([9, 4]), 1), (np.diag([1, 1, 0, 0]), 2),
    (np.repeat([[3, 0], [0, 3]], 50, axis=0), 2), (np.full([7, 3], 1e-20), 1)])
def test_effective_rank_counts_directions(rows, rank):
    assert collapse.effective_rank(rows.astype(np.float32)) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_is_that_of_singular_values():
    rows = np.random.RandomState(0).normal(size=[60, 8]) * np.arange(1, 9)
    shares = np.linalg.svd(rows, compute_uv=False)
    shares /= shares.sum()
    assert collapse.effective_rank(rows) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


@pytest.mark.parametrize('rows, warned', [(np.eye(6, 4), False), (np.ones([6, 4]), True)])
def test_a_collapse_is_said(monkeypatch, rows, warned):
    said, put = [], {}
    monkeypatch.setattr(logger, 'warn', said.append)
    with tf.Graph().as_default(), tf.Session() as sess:
        queue = tf.get_variable('queue', initializer=tf.constant(rows, tf.float32))
        sess.run(queue.initializer)
        watch = collapse.WatchRank(queue)
        watch.trainer = types.SimpleNamespace(
            sess=sess, monitors=types.SimpleNamespace(put_scalar=put.__setitem__))
        watch._trigger_epoch()
    assert put['queue_rank'] == pytest.approx(1 if warned else 4, rel=1e-4)
    assert bool(said) == warned
    assert not said or 'the features have collapsed: the keys in the queue use 1.00 of 4' in said[0]
