#!/usr/bin/env python
"""The use of shuffled BN: the demo's network with BN in splits, its keys permuted or not.

    python tools/prepare_cifar10.py datasets/cifar10
    python benchmarks/leak.py --data datasets/cifar10    # 3 epochs each: 12 minutes on 2 cores

Unpermuted, a query and its key are normalised with the same few images: statistics give the pair
away, the (K+1)-way accuracy is higher, and features are worse for it (kNN). Printed are both, an
epoch a line. One process; an interrupted run is continued by the same command.
"""
import argparse
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ('--v2 --depth 18 --width 32 --stem 3x3s2 --image-size 24 --batch 128 --bn-splits 8 '
         '--queue-size 4096 --momentum 0.99 --temp 0.07 --lr 0.06 --weight-decay 5e-4').split()
TRAIN = '''
import sys
sys.path.insert(0, {here!r})
from job import cores
cores.set_up([])
import main_moco
from job import start

class Unpermuted(main_moco.MOCOModel):
    def shuffle(self, images):
        return images, lambda results: results

if {name!r} == 'unpermuted':
    main_moco.MOCOModel = Unpermuted
with start.user_errors():
    main_moco.main(main_moco.parse_args({flags!r}))
'''


def train(name, data, epochs, logdir):
    """The epochs' statistics of a run with keys 'permuted' or 'unpermuted'."""
    logdir = os.path.join(logdir, name)
    flags = FLAGS + ['--data', data, '--epochs', str(epochs), '--knn-every', '1',
                     '--logdir', logdir]
    done = subprocess.run([sys.executable, '-c', TRAIN.format(here=HERE, name=name, flags=flags)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          universal_newlines=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    with open(os.path.join(logdir, 'stats.json')) as f:
        return json.load(f)


def main(args):
    print('keys        epoch   loss  accuracy  kNN top-1')
    for name in ('permuted', 'unpermuted'):
        for epoch in train(name, args.data, args.epochs, args.logdir):
            print('{:10} {:6} {:6.3f} {:8.1f} % {:8.2f} %'.format(
                name, epoch['epoch_num'], epoch['loss'], 100 * epoch['accuracy'],
                epoch['knn_top1']), flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR',
                        help='CIFAR-10, from tools/prepare_cifar10.py')
    parser.add_argument('--epochs', type=int, default=3, help='of each run (default: 3)')
    parser.add_argument('--logdir', default='train_log/leak', metavar='DIR',
                        help='where both runs go (default: train_log/leak)')
    main(parser.parse_args())
