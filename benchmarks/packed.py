#!/usr/bin/env python
"""What packing brings, and resizing: images/s of a core, from files to the two views of MoCo v2.

    python benchmarks/packed.py /path/to/images    # some hundred JPEGs; a minute

Packs DIR into a temporary folder, byte for byte and with each --max-side, and makes the same
batches of each, in turns, in this process. All files are in memory: disks are not measured.
Resizing changes what a network sees: crops of smaller images are blurrier, and of JPEGs that were
made twice.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == '__main__':
    sys.path.insert(0, HERE)

import numpy as np

import data
import decoder
import image_lists

BATCH, STEPS = 32, 16


def measure(batches):
    """Microseconds to read an image, and images/s of views, by this process's clock of its core."""
    files, start = batches.reader.images.files, time.process_time()
    for index in range(BATCH * STEPS):
        files.read(index * 7919 % len(files))
    reading, start = time.process_time() - start, time.process_time()
    arrays = [np.empty(shape, dtype) for shape, dtype in batches.specs(0)]
    for step in range(STEPS):
        batches.fill(step, arrays)
    return 1e6 * reading / (BATCH * STEPS), BATCH * STEPS / (time.process_time() - start)


def main(args, scratch):
    decoder.set_up_process()
    folders, sides = {'files': args.folder}, {}
    for name, flags in [('packed', [])] + [
            (f'packed, {side} pixels', ['--max-side', str(side)]) for side in args.max_side]:
        folders[name] = os.path.join(scratch, name)
        subprocess.run([sys.executable, os.path.join(HERE, 'tools/pack.py'), args.folder,
                        folders[name]] + flags, check=True, stderr=subprocess.DEVNULL)
    for name, folder in folders.items():
        images = image_lists.list_images(folder)
        reader = decoder.ImageReader(images, lambda *report: print(name, *report, file=sys.stderr))
        sides[name] = data.Batches(data.TASKS['moco-v2'], reader, 0, 1, BATCH, 224)
        size = sum(len(images.files.read(i)) for i in range(len(images.files))) / 1e6
        print(f'{name}: {len(images.files)} images, {size:.1f} MB', flush=True)
    rounds = [{name: measure(side) for name, side in sides.items()}
              for _ in range(args.rounds + 1)][1:]  # the first one warms up
    for name in sides:
        reading, rate = map(statistics.median, zip(*[by_side[name] for by_side in rounds]))
        ratios = [by_side[name][1] / by_side['files'][1] for by_side in rounds]
        print(f'{name:20} reading {reading:4.0f} us an image; {rate:5.0f} images/s of a core, '
              f'{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='DIR', help='folder of images')
    parser.add_argument('--max-side', type=int, nargs='*', default=[512, 256], metavar='N')
    parser.add_argument('--rounds', type=int, default=7, help='of each side (7)')
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args(), folder)
