"""The order of one training step, which is one op and one session.run."""
import contextlib
import functools
import operator

import horovod.tensorflow as hvd
from tensorflow.python.ops import math_ops
from tensorpack import tfv1 as tf


def train_step(cost, optimizer, *updates, loss_scale: float = 1):
    """Build the op of a step. In this order:

        gradients of the cost, of the weights and everything else as they were before the step
        weights, by the optimizer, from the gradients' average over all ranks
        updates, one after the other; each reads what was written before it
        step counter, so that all above reads the number of steps done before this one

    Args:
        updates: functions without arguments that build ops and return a list of them.
        loss_scale: gradients are computed of so many times the cost, lest they underflow in
            float16, and divided by it.
    """
    with gradients_summed_in_pairs():
        gradients = optimizer.compute_gradients(cost if loss_scale == 1 else loss_scale * cost)
    done = optimizer.apply_gradients(
        [(average(g if loss_scale == 1 else g / loss_scale), weights) for g, weights in gradients])
    for update in updates:
        with tf.control_dependencies([done]):
            done = tf.group(*update())
    with tf.control_dependencies([done]):
        return tf.assign_add(tf.train.get_or_create_global_step(), 1).op


def average(gradient):
    """The mean over all ranks."""
    return hvd.allreduce(gradient, op=hvd.Average) if hvd.size() > 1 else gradient


@contextlib.contextmanager
def gradients_summed_in_pairs():
    """While the graph is built, TensorFlow sums gradients with Add, not AddN: for each input of an
    AddN, Intel's TensorFlow 1.15 loses 1.8 KB whenever it runs, with ResNet-18 0.2 MB a step."""
    add_n = math_ops.add_n
    math_ops.add_n = lambda inputs, name=None: functools.reduce(operator.add, inputs)
    try:
        yield
    finally:
        math_ops.add_n = add_n
