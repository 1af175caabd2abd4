#!/usr/bin/env python
"""Time and traffic of shuffled BN: each rank is sent only the images that it keeps (alltoall, as in
moco.py), or all of them (allgather).

    horovodrun -np 2 python benchmarks/shuffle.py
    horovodrun -np 4 python benchmarks/shuffle.py

Both ways run in turns, in the same processes; printed are the medians of the time of a step (images
there, keys back), the median ratio of neighbours, and a rank's traffic, which follows from the
sizes. Gloo exchanges images, which stay on the host, and without GPUs also keys, which NCCL
exchanges between GPUs.
"""
import os
import sys

if __name__ == '__main__':
    HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:0] = [HERE, os.path.join(HERE, 'tests')]
    from job import cores
    cores.set_up(sys.argv[1:])  # before TensorFlow is loaded, which reads what this sets

import argparse
import statistics
import time

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf

from horovod_ranks import Allgather
from job import start
from moco import MOCOModel

N, S, C = 32, 224, 128  # images of a rank, their size, and the dimension of keys
WARM_UP, ROUNDS, STEPS = 2, 10, 4


def build_step(cls):
    """Tensors of a step: images there, keys back, which depend on the images."""
    images = tf.get_variable('images', [N, S, S, 3], tf.uint8, tf.zeros_initializer(),
                             trainable=False, use_resource=True).read_value()
    shuffled, unshuffle = cls(None, N).shuffle(images)
    pixels = tf.cast(shuffled[:, 0, 0, :1], tf.float32)  # [N, 1]
    keys = unshuffle(tf.tile(pixels, [1, C]))
    with tf.control_dependencies([keys]):
        return keys, tf.train.get_or_create_global_step().assign_add(1).op  # another order


def time_steps(sess, fetches, steps=STEPS):
    began = time.time()
    for _ in range(steps):
        sess.run(fetches)
    return (time.time() - began) / steps


def print_traffic():
    """A rank's traffic; of the images that it keeps, N / ranks are its own on average."""
    print(f'\nreceived by each rank in a step of {N} images of {S} px a rank, in MB (10^6 bytes)')
    print('ranks     all images    the kept ones    all keys (both ways)')
    for ranks in (2, 4, 8, 64, 512):
        foreign = N * (ranks - 1)
        image, key = S * S * 3 / 1e6, C * 4 / 1e6
        print(f'{ranks:5} {foreign * image:14.2f} {foreign / ranks * image:16.2f} '
              f'{foreign * key:23.3f}')


def main():
    threads, gpus = start.begin()
    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        ways = {'allgather': build_step(Allgather), 'alltoall': build_step(MOCOModel)}
    seconds = {way: [] for way in ways}
    with tf.Session(config=start.session_config(threads, gpus)) as sess:
        sess.run(tf.global_variables_initializer())
        for fetches in ways.values():
            time_steps(sess, fetches, WARM_UP)
        for _ in range(ROUNDS):
            for way, fetches in ways.items():
                seconds[way].append(time_steps(sess, fetches))
    if hvd.rank() != 0:
        return
    ratio = statistics.median(a / b for a, b in zip(seconds['allgather'], seconds['alltoall']))
    medians = ', '.join(f'{way} {1000 * statistics.median(seconds[way]):.1f} ms' for way in ways)
    print(f'{hvd.size()} ranks: {medians} a step; median ratio {ratio:.2f} of {ROUNDS}')
    print_traffic()


if __name__ == '__main__':
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with start.user_errors():
        main()
