#!/usr/bin/env python
"""MoCo v2 learns CIFAR-10 without labels on this machine's CPU.

    make demo

Every stage is a command line, as a user could type it; its output goes to a file, behind the
command. The same command again skips finished stages and continues an interrupted pre-training. The
last output is a table, which results.json repeats.
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import json
import shlex
import signal

from job import signals
from tools.stages import Stages, read_json

# 24 pixels: half the time of 32, and so twice the epochs
NETWORK = '--depth 18 --width 32 --stem 3x3s2 --image-size 24'
PRETRAIN = ('--v2 --epochs 8 --batch 128 --queue-size 4096 --momentum 0.99 --temp 0.07 --lr 0.06 '
            '--weight-decay 5e-4')
LINEAR = '--epochs 3 --batch 256 --lr 0.1 --crop-area 0.5 1'
# a stage done with one TensorFlow does not count for the other; Python tells which one runs, since
# 1.15 is for none newer than 3.7 and 2.21 for none older than 3.10
LOGDIR = os.path.join('train_log', 'demo' if sys.version_info < (3, 8) else 'demo-tf2')
PYTHON = 'python'
LAUNCH = 'horovodrun -np 2 python'
# seconds of the stages on 2 cores; those of the download say nothing about the cores
TYPICAL = {'knn-pixels': 22, 'random': 11, 'knn-random': 31, 'pretrain': 700, 'knn-moco': 30,
           'linear': 68, 'curves': 2, 'embed': 8, 'report': 2}


def setup_seconds():
    """How long `make env` took when it made the environment."""
    try:
        with open(os.path.join(sys.prefix, 'setup_seconds')) as f:
            return float(f.read())
    except (OSError, ValueError):
        return 0.


def main(args):
    folder, data = args.logdir, args.data
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the demo is about the CPU
    stages = Stages(folder, TYPICAL)
    signals.handle(stages.stop)
    # a stage would inherit that it is ignored, and not end
    signal.signal(signal.SIGTERM, stages.stop)
    paths = {name: os.path.join(folder, name) for name in ('random', 'moco', 'linear')}
    knn = {name: os.path.join(folder, name + '.knn.json') for name in ('pixels', 'random', 'moco')}
    q = shlex.quote

    def run_knn(name, title, what):
        return stages.run(
            'knn-' + name, title,
            f'{LAUNCH} eval_knn.py {what} --data {q(data)} --out {q(knn[name])}', knn[name])

    pretrain_command = f'{LAUNCH} main_moco.py --data {q(data)} {NETWORK} {PRETRAIN} --logdir '
    fetch = stages.run('data', 'CIFAR-10 as class folders',
                       f'{PYTHON} tools/prepare_cifar10.py {q(data)}')
    knn_seconds = run_knn('pixels', 'kNN on raw pixels: what every network should beat',
                          '--pixels --image-size 16')
    stages.run('random', 'A network with random weights',
               pretrain_command + q(paths['random']) + ' --max-steps 0', paths['random'])
    knn_seconds += run_knn('random', 'kNN on its features',
                           f'--load {q(paths["random"])}')
    pretrain = stages.run('pretrain', 'MoCo v2 pre-training, without labels',
                          pretrain_command + q(paths['moco']), paths['moco'],
                          os.path.join(paths['moco'], 'stats.json'))
    knn_seconds += run_knn('moco', 'kNN on its features',
                           f'--load {q(paths["moco"])}')
    linear = stages.run(
        'linear', 'Linear classification on its frozen features',
        f'{LAUNCH} main_lincls.py --load {q(paths["moco"])} --data {q(data)} {LINEAR} --logdir '
        f'{q(paths["linear"])}',
        paths['linear'], os.path.join(paths['linear'], 'stats.json'))
    curves = os.path.join(folder, 'curves.png')
    stages.run('curves', 'Curves',
               f'{PYTHON} tools/plot_curves.py {q(paths["moco"])} {q(paths["linear"])} '
               f'--out {q(curves)}', curves)
    features, report = os.path.join(paths['moco'], 'features'), os.path.join(folder, 'report.html')
    stages.run('embed', 'Features of the validation images',
               f'{LAUNCH} embed.py --load {q(paths["moco"])} --data {q(data)} --split val '
               f'--out {q(features)}', features)
    stages.run('report', 'A page of curves, neighbours and a map',
               f'{PYTHON} tools/report.py {q(paths["moco"])} --out {q(report)}', report)

    results = {
        name + '_knn': read_json(knn[key], {})['knn_top1']
        for name, key in (
            ('raw_pixels', 'pixels'), ('random_init', 'random'), ('pretrained', 'moco'))}
    results['pretrained_linear'] = read_json(
        os.path.join(paths['linear'], 'stats.json'), None)[-1]['val_top1']
    results['seconds'] = {'setup': round(setup_seconds() + fetch, 1), 'pretrain': pretrain,
                          'knn': round(knn_seconds, 1), 'linear': linear}
    with open(os.path.join(folder, 'results.json'), 'w') as f:
        json.dump(results, f, indent=1)

    print('\nCIFAR-10, top-1 on the 10,000 validation images, bank of 50,000')
    for words, key in (
            ('raw pixels, mean-centred, kNN', 'raw_pixels_knn'),
            ('random weights, kNN', 'random_init_knn'),
            ('MoCo v2, kNN', 'pretrained_knn'), ('MoCo v2, linear', 'pretrained_linear')):
        print(f'  {words:32}{results[key]:6.2f} %')
    print('seconds: ' + ', '.join(f'{name} {s:.0f}' for name, s in results['seconds'].items()))
    print(f'curves: {curves}\nreport: {report}\nresults: {os.path.join(folder, "results.json")}\n'
          f'checkpoints and logs: {", ".join(sorted(paths.values()))}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='datasets/cifar10',
                        help='where CIFAR-10 goes (default: datasets/cifar10)')
    parser.add_argument('--logdir', default=LOGDIR,
                        help=f'where everything else goes (default: {LOGDIR})')
    main(parser.parse_args())
