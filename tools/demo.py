#!/usr/bin/env python
"""MoCo v2 learns CIFAR-10 without labels on this machine's CPU.

    make demo

Every stage is a command line, as a user could type it; it is printed, and its output goes to a
file. The same command again skips finished stages and continues an interrupted pre-training. The
last output is a table, which results.json repeats.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# 24 pixels: half the time of 32, and so twice the epochs
NETWORK = '--depth 18 --width 32 --stem 3x3s2 --image-size 24'
PRETRAIN = ('--v2 --epochs 6 --batch 128 --queue-size 4096 --momentum 0.99 --temp 0.07 --lr 0.06 '
            '--weight-decay 5e-4')
LINEAR = '--epochs 3 --batch 256 --lr 0.1 --crop-area 0.5 1'
# a stage done with one TensorFlow does not count for the other; Python tells which one runs, since
# 1.15 is for none newer than 3.7 and 2.21 for none older than 3.10
LOGDIR = os.path.join('train_log', 'demo' if sys.version_info < (3, 8) else 'demo-tf2')
PYTHON = 'python'
LAUNCH = 'horovodrun -np 2 python'


class Stages:
    """Runs command lines once each, and remembers their seconds in a file."""

    def __init__(self, folder):
        self._folder = folder
        self._path = os.path.join(folder, 'stages.json')
        os.makedirs(folder, exist_ok=True)
        self._done = read_json(self._path, {})  # in the order of the stages

    def run(self, name, title, command, output=None, stats=None):
        """Run a command line unless it has been done.

        If another command has been run in its place, this and all later stages begin anew.

        Args:
            name: of its log.
            title: printed above the command.
            command: as a user would type it in the project's folder.
            output: a file or folder that it writes, to be removed before it begins anew.
            stats: a stats.json whose new epochs are reported while it runs.

        Returns:
            Seconds it took.
        """
        if name in self._done and self._done[name]['command'] != command:
            for later in list(self._done)[list(self._done).index(name):]:
                remove(self._done.pop(later)['output'])
        record = self._done.get(
            name, {'command': command, 'output': output, 'seconds': 0, 'done': False})
        if not record['done']:
            print(f'\n== {title}\n   {command}', flush=True)
            start = time.time()
            log = os.path.join(self._folder, name + '.log')
            try:
                self._run(command, log, stats)
                record['done'] = True
            finally:
                record['seconds'] = round(record['seconds'] + time.time() - start, 1)
                self._done[name] = record
                with open(self._path + '.tmp', 'w') as f:
                    json.dump(self._done, f, indent=1)
                os.replace(self._path + '.tmp', self._path)
        return record['seconds']

    def _run(self, command, log, stats):
        with open(log, 'a') as output:
            process = subprocess.Popen(
                shlex.split(command), stdout=output, stderr=subprocess.STDOUT, cwd=HERE)
        shown, next_sign = len(read_json(stats, [])), time.time() + 20
        try:
            while process.poll() is None:
                time.sleep(0.5)
                epochs = read_json(stats, [])
                for epoch in epochs[shown:]:
                    print('   ' + describe(epoch), flush=True)
                if len(epochs) > shown or time.time() > next_sign:
                    if len(epochs) == shown:
                        print(f'   ... {last_line(log)}', flush=True)
                    next_sign = time.time() + 20
                shown = len(epochs)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode != 0:
            with open(log) as f:
                print(''.join(f.readlines()[-25:]))
            sys.exit(f'make demo: this failed with exit code {process.returncode}; all of its '
                     f'output is in {log}')


def remove(path):
    if path and os.path.isdir(path):
        shutil.rmtree(path)
    elif path and os.path.exists(path):
        os.remove(path)


def read_json(path, default):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError, TypeError):
        return default


def last_line(path):
    with open(path, errors='replace') as f:
        lines = [line.strip() for line in f if line.strip()]
    return lines[-1][:110] if lines else 'starting'


def describe(epoch):
    parts = []
    for key, words in (
            ('loss', 'loss {:.3f}'), ('accuracy', '(K+1)-way accuracy {:.3f}'),
            ('val_top1', 'validation top-1 {:.2f} %'),
            ('knn_top1', 'kNN top-1 {:.2f} %'), ('images_per_second', '{:.0f} images/s'),
            ('data_wait', 'waited for data {:.1%} of the time')):
        if key in epoch:
            parts.append(words.format(epoch[key]))
    return f'epoch {epoch["epoch_num"]}: {", ".join(parts)}'


def setup_seconds():
    """How long `make env` took when it made the environment."""
    try:
        with open(os.path.join(sys.prefix, 'setup_seconds')) as f:
            return float(f.read())
    except (OSError, ValueError):
        return 0.


def main(args):
    # a signal ends the stage too, even if the shell has set signals to be ignored
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, data = args.logdir, args.data
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the demo is about the CPU
    stages = Stages(folder)
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
                          '--pixels --image-size 32')
    stages.run('random', 'A network with random weights',
               pretrain_command + q(paths['random']) + ' --max-steps 0', paths['random'])
    knn_seconds += run_knn('random', 'kNN on its features',
                           f'--load {q(paths["random"])} {NETWORK}')
    pretrain = stages.run('pretrain', 'MoCo v2 pre-training, without labels',
                          pretrain_command + q(paths['moco']), paths['moco'],
                          os.path.join(paths['moco'], 'stats.json'))
    knn_seconds += run_knn('moco', 'kNN on its features',
                           f'--load {q(paths["moco"])} {NETWORK}')
    linear = stages.run(
        'linear', 'Linear classification on its frozen features',
        f'{LAUNCH} main_lincls.py --load {q(paths["moco"])} {NETWORK} --data {q(data)} {LINEAR} '
        f'--logdir {q(paths["linear"])}',
        paths['linear'], os.path.join(paths['linear'], 'stats.json'))
    curves = os.path.join(folder, 'curves.png')
    stages.run('curves', 'Curves',
               f'{PYTHON} tools/plot_curves.py {q(paths["moco"])} {q(paths["linear"])} '
               f'--out {q(curves)}', curves)

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
    print(f'curves: {curves}\nresults: {os.path.join(folder, "results.json")}\n'
          f'checkpoints and logs: {", ".join(sorted(paths.values()))}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default='datasets/cifar10',
                        help='where CIFAR-10 goes (default: datasets/cifar10)')
    parser.add_argument('--logdir', default=LOGDIR,
                        help=f'where everything else goes (default: {LOGDIR})')
    main(parser.parse_args())
