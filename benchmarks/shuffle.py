#!/usr/bin/env python
"""What shuffled BN costs in time and traffic: each rank is sent the images that it keeps (alltoall,
as main_moco.py does), or all of them (allgather).

    horovodrun -np 2 python benchmarks/shuffle.py
    horovodrun -np 4 python benchmarks/shuffle.py

Both ways run in turns, in the same processes; printed are the medians of the time of a step (images
there, keys back), the median ratio of neighbours, and what a rank receives, which follows from the
sizes. A Horovod that is built without GPUs exchanges by Gloo, which is what this measures; on GPUs
it is NCCL.
"""
import os
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [HERE, os.path.join(HERE, 'tests')]

import environment  # noqa: F401, E402, I001  before all that reads it
import argparse  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import horovod.tensorflow as hvd  # noqa: E402
from tensorpack import tfv1 as tf  # noqa: E402

import launch  # noqa: E402
import main_moco  # noqa: E402
from horovod_ranks import Allgather  # noqa: E402

N, S, C = 32, 224, 128  # images of a rank, their size, and the dimension of keys
WARM_UP, ROUNDS, STEPS = 2, 10, 4


def build_step(cls):
    """What to fetch: images there, keys back, which depend on the images."""
    images = tf.get_variable('images', [N, S, S, 3], tf.uint8, tf.zeros_initializer(),
                             trainable=False, use_resource=True).read_value()
    shuffled, unshuffle = cls(None, N).shuffle(images)
    pixels = tf.cast(shuffled[:, 0, 0, :1], tf.float32)  # [N, 1]
    keys = unshuffle(tf.tile(pixels, [1, C]))
    with tf.control_dependencies([keys]):
        return keys, tf.train.get_or_create_global_step().assign_add(1).op  # another order


def time_steps(sess, fetches, steps=STEPS):
    start = time.time()
    for _ in range(steps):
        sess.run(fetches)
    return (time.time() - start) / steps


def print_traffic():
    """What a rank receives; of the images that it keeps, N / ranks of them its own on average."""
    print('\nreceived by each rank in a step of {} images of {} px a rank, in MB (10^6 bytes)'
          .format(N, S))
    print('ranks     all images    the kept ones    all keys (both ways)')
    for ranks in (2, 4, 8, 64, 512):
        others = N * (ranks - 1)
        image, key = S * S * 3 / 1e6, C * 4 / 1e6
        print('{:5} {:14.2f} {:16.2f} {:23.3f}'.format(
            ranks, others * image, others / ranks * image, others * key))


def main():
    threads, _, gpu = launch.begin()
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        ways = {'allgather': build_step(Allgather), 'alltoall': build_step(main_moco.MOCOModel)}
    seconds = {way: [] for way in ways}
    with tf.Session(config=launch.session_config(threads, gpu)) as sess:
        sess.run(tf.global_variables_initializer())
        for fetches in ways.values():
            time_steps(sess, fetches, WARM_UP)
        for _ in range(ROUNDS):
            for way, fetches in ways.items():
                seconds[way].append(time_steps(sess, fetches))
    if hvd.rank() != 0:
        return
    ratio = statistics.median(a / b for a, b in zip(seconds['allgather'], seconds['alltoall']))
    print('{} ranks: allgather {:.1f} ms, alltoall {:.1f} ms a step; median ratio {:.2f} of {}'
          .format(hvd.size(), *(1000 * statistics.median(seconds[way]) for way in ways),
                  ratio, ROUNDS))
    print_traffic()


if __name__ == '__main__':
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
