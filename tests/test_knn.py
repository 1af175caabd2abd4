"""eval_knn.py: neighbours and votes, against plain loops."""
import math

import numpy as np
import pytest

import eval_knn


def brute_force(queries, bank, labels, num_classes, k, temp):
    """What find_nearest() and knn_vote() should give, one query at a time."""
    result = []
    for query in queries:
        similarity = [float(np.dot(query, row)) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes = [0.] * num_classes
        for i in nearest:
            votes[labels[i]] += 1 if temp is None else math.exp(similarity[i] / temp)
        result.append(votes.index(max(votes)))
    return result


@pytest.mark.parametrize('k', [1, 7, 60, 100])
@pytest.mark.parametrize('temp', [None, 0.1])
def test_votes_equal_a_plain_loop(k, temp):
    rng = np.random.RandomState(k)
    bank = eval_knn.normalize(rng.normal(size=[60, 8]).astype(np.float32))
    queries = eval_knn.normalize(rng.normal(size=[40, 8]).astype(np.float32))
    labels = rng.randint(0, 5, 60)
    similarity, neighbours = eval_knn.find_nearest(queries @ bank.T, labels, k)
    assert similarity.shape == neighbours.shape == (40, min(k, 60))
    votes = eval_knn.knn_vote(similarity, neighbours, 5, temp)
    assert votes.tolist() == brute_force(queries, bank, labels, 5, k, temp)


def test_nearest_by_hand():
    bank = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    queries = np.array([[1, 0], [0, -1]], np.float32)
    similarity, labels = eval_knn.find_nearest(queries @ bank.T, np.array([7, 5, 3, 9]), 2)
    assert [sorted(zip(*pair)) for pair in zip(similarity.tolist(), labels.tolist())] == [
        [(pytest.approx(0.6), 9), (1, 7)], [(0, 3), (0, 7)]]


def test_weighted_and_plain_votes_differ():
    # one neighbour that is close against two that are not: exp(9) > exp(5) + exp(4)
    similarity, labels = np.array([[0.9, 0.5, 0.4]], np.float32), np.array([[0, 1, 1]])
    assert eval_knn.knn_vote(similarity, labels, 2, temp=0.1).tolist() == [0]
    assert eval_knn.knn_vote(similarity, labels, 2).tolist() == [1]
    # at t = 10 weights hardly differ
    assert eval_knn.knn_vote(similarity, labels, 2, temp=10).tolist() == [1]


def test_of_equal_votes_the_first_class_wins():
    similarity, labels = np.full([2, 4], 0.5, np.float32), np.array([[3, 1, 1, 3], [2, 2, 0, 0]])
    assert eval_knn.knn_vote(similarity, labels, 5).tolist() == [1, 0]
    assert eval_knn.knn_vote(similarity, labels, 5, temp=0.1).tolist() == [1, 0]


def test_rows_of_length_one():
    x = eval_knn.normalize(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(x, [[0.6, 0.8], [0, 0]], rtol=1e-6)  # no division by zero


@pytest.mark.parametrize('temp', [0.01, 1e-3, 1e-30])
def test_cold_votes_do_not_overflow(temp):
    # exp(0.999 / 0.01) is 2e43, beyond float32; the two nearest ones outvote many that are not
    similarity = np.array([[0.999, 0.999] + [0.2] * 9, [-0.9] * 11], np.float32)
    labels = np.array([[1, 1] + [0] * 9, [2] * 6 + [0] * 5])
    with np.errstate(over='raise', invalid='raise'):
        assert eval_knn.knn_vote(similarity, labels, 3, temp).tolist() == [1, 2]


def test_rows_of_any_length_become_1():
    x = eval_knn.normalize(np.array([[3e25, 4e25], [3e-15, 4e-15]], np.float32))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0], [0.6, 0.8], rtol=1e-6)
    assert np.isfinite(x).all()
