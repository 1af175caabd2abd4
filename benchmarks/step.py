#!/usr/bin/env python
"""What tensorpack, Horovod, callbacks and logging cost:
main_moco.py --fake against the same graph bare.

    python benchmarks/step.py    # 224 px batch 16 and 32 px batch 64; about 10 minutes on 2 cores
    python benchmarks/step.py --image-size 32 --batch 64

Both run in turns, each in a process of its own; printed are images/s of both, and the median of the
ratios of neighbours. The claim is a ratio of at least 0.95.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WARM_UP, ROUNDS = 3, 3

BARE = '''
import sys, time
sys.path.insert(0, {here!r})
from job import cores
cores.set_up([])
from tensorpack import tfv1 as tf
import resnet
from job import start
from moco import MOCOModel

threads, _ = start.begin()
model = MOCOModel(resnet.ResNet(), {batch}, image_size={size})
images = [tf.get_variable(s.name, trainable=False, use_resource=True, initializer=tf.cast(
    tf.random.uniform(s.shape, 0, 255, tf.int32), tf.uint8)).read_value()
          for s in model.get_input_signature()]
step = model.build_graph(*images)
with tf.Session(config=start.session_config(threads)) as sess:
    sess.run(tf.global_variables_initializer())
    for _ in range({warm_up}):
        sess.run(step)
    began = time.time()
    for _ in range({steps}):
        sess.run(step)
    print('images/s', {steps} * {batch} / (time.time() - began))
'''


def run_bare(size, batch, steps):
    code = BARE.format(here=HERE, batch=batch, size=size, warm_up=WARM_UP, steps=steps)
    output = subprocess.check_output([sys.executable, '-c', code], universal_newlines=True)
    return float(output.split('images/s')[1])


def run_main(size, batch, steps, python=sys.executable, flags=('--fake',)):
    """Images/s of main_moco.py."""
    # epochs of warm-up steps, then of the measured ones; the first step of an epoch is not counted
    with tempfile.TemporaryDirectory() as logdir:
        subprocess.check_call(
            [python, os.path.join(HERE, 'main_moco.py'), *flags,
             '--image-size', str(size), '--batch', str(batch), '--steps-per-epoch', str(steps + 1),
             '--max-steps', str(2 * (steps + 1)), '--logdir', logdir],
            stdout=subprocess.DEVNULL)
        with open(os.path.join(logdir, 'stats.json')) as f:
            return json.load(f)[-1]['images_per_second']


def measure(size, batch, steps):
    ratios = []
    for _ in range(ROUNDS):
        bare, full = run_bare(size, batch, steps), run_main(size, batch, steps)
        ratios.append(full / bare)
        print(f'{size} px, batch {batch}: bare graph {bare:.2f} images/s, main_moco.py --fake '
              f'{full:.2f}, ratio {ratios[-1]:.3f}', flush=True)
    print(f'{size} px, batch {batch}: median ratio {statistics.median(ratios):.3f} of {ROUNDS}',
          flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image-size', type=int, help='pixels (default: both)')
    parser.add_argument('--batch', type=int, help='images in a step')
    parser.add_argument('--steps', type=int, help='measured steps')
    args = parser.parse_args()
    if args.image_size:
        measure(args.image_size, args.batch or 64, args.steps or 20)
    else:
        measure(224, 16, args.steps or 6)
        measure(32, 64, args.steps or 20)
