#!/usr/bin/env python
"""From a JPEG to the views of MoCo, v1 and v2, of linear training and of validation: this project
against the same by tensorpack's augmentors.

    python benchmarks/augment.py --data /path/to/imagenet    # 200 images; a minute

Both decode an image once, with libjpeg-turbo: tensorpack all of it, by OpenCV, ours the part that
it needs. They make its views of 224 pixels on one core, ours in a process that is set up as a data
worker is. tensorpack's colour steps run in float32, as in its own ImageNet example, and in uint8,
where each converts to float32 and back. In turns; printed are milliseconds of a core per image
(medians of the rounds), and the median of the rounds' ratios.
"""
import argparse
import collections
import multiprocessing
import os
import random
import statistics
import sys
import time

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cv2
import numpy as np
from tensorpack.dataflow import imgaug

import data
import decoder
import image_lists
import views

SIZE = 224
# stage -> functions of views.py; a view's flip and random numbers only count in the total
STAGES = {'crop': ['resize'], 'colour': ['jitter', 'convert_to_gray'],
          'blur': ['blur']}
TASKS = {'v1': 'moco-v1', 'v2': 'moco-v2', 'linear': 'linear', 'validation': 'eval'}
COLUMNS = ['decode', 'crop', 'colour', 'blur', 'total']


class Clock:
    """Seconds of this process's core by stage: other jobs on the machine do not count."""

    def __init__(self):
        self.seconds = collections.Counter()
        self.by_stage = False

    def time(self, stage, function):
        """The function, timed."""
        def timed(*args):
            if not self.by_stage:
                return function(*args)
            start = time.process_time()
            result = function(*args)
            self.seconds[stage] += time.process_time() - start
            return result
        return timed


# ------------------------------------------------------------------------- file -> both views

class Ours:
    def __init__(self, recipe, clock):
        decoder.set_up_process()
        task = data.TASKS[TASKS[recipe]]
        self._view, self._area, self._rng = task.view, task.area, random.Random(0)
        self._views = np.empty((task.num_views, SIZE, SIZE, 3), np.uint8)
        self._read = clock.time('decode', self._read)
        self._timed = {name: clock.time(stage, getattr(views, name))
                       for stage, names in STAGES.items() for name in names}

    def _read(self, files, index):
        def choose_box(*size):
            self._boxes = [data.sample_box(self._rng, *size, self._area, SIZE)
                           for _ in self._views]
            return views.union(self._boxes)
        return decoder.decode(files.read(index), choose_box)[0]

    def make_all(self, files, indices):
        untimed = {name: getattr(views, name) for name in self._timed}
        vars(views).update(self._timed)
        for index in indices:
            image = self._read(files, index)
            for box, view in zip(self._boxes, self._views):
                self._view(image, box, view, self._rng)
        vars(views).update(untimed)


class Tensorpack:
    def __init__(self, recipe, float32, clock):
        task = data.TASKS[TASKS[recipe]]
        crop = (imgaug.GoogleNetRandomCropAndResize(crop_area_fraction=task.area, target_shape=SIZE)
                if task.area else
                imgaug.AugmentorList([imgaug.ResizeShortestEdge(256), imgaug.CenterCrop(SIZE)]))
        gray = imgaug.RandomApplyAug(imgaug.Grayscale(rgb=False, keepshape=True), 0.2)
        hue = 180 * {'v1': 0.4}.get(recipe, 0.1)
        jitter = imgaug.RandomOrderAug([
            imgaug.BrightnessScale((0.6, 1.4)), imgaug.Contrast((0.6, 1.4), rgb=False),
            imgaug.Saturation(0.4, rgb=False), imgaug.Hue((-hue, hue), rgb=False)])
        if float32:
            jitter = imgaug.AugmentorList([imgaug.ToFloat32(), jitter, imgaug.ToUint8()])
        # 13 pixels wide, the least that holds 3 sigma
        blur = imgaug.RandomApplyAug(imgaug.GaussianBlur((6, 7), sigma_range=(0.1, 2)), 0.5)
        flip = imgaug.Flip(horiz=True)
        stages = {'validation': [('crop', [crop])],
                  'linear': [('crop', [crop]), ('flip', [flip])],
                  'v1': [('crop', [crop]), ('colour', [gray, jitter]), ('flip', [flip])],
                  'v2': [('crop', [crop]), ('colour', [imgaug.RandomApplyAug(jitter, 0.8), gray]),
                         ('blur', [blur]), ('flip', [flip])]}[recipe]
        self._num_views = task.num_views
        self._read = clock.time(
            'decode', lambda files, index: cv2.imread(files[index], cv2.IMREAD_COLOR))
        self._steps = [clock.time(stage, imgaug.AugmentorList(augmentors).augment)
                       for stage, augmentors in stages]

    def make_all(self, files, indices):
        for index in indices:
            image = self._read(files, index)
            for _ in range(self._num_views):
                view = image
                for step in self._steps:
                    view = step(view)


# ---------------------------------------------------------------------------------- measuring

def time_rounds(connection, files, indices, create, *args):
    """In a process of its own: for each message, send milliseconds per image, as COLUMNS."""
    clock = Clock()
    side = create(*args, clock=clock)
    side.make_all(files, indices[:20])  # warms up
    while True:
        connection.recv()
        clock.seconds.clear()
        # asking for the time by stage takes 1 % of ours
        clock.by_stage = True
        side.make_all(files, indices)
        clock.by_stage = False
        start = time.process_time()
        side.make_all(files, indices)
        clock.seconds['total'] = time.process_time() - start
        connection.send([1000 * clock.seconds[column] / len(indices) for column in COLUMNS])


def start(*args):
    """Start time_rounds(); returns the connection to it."""
    here, there = multiprocessing.Pipe()
    multiprocessing.Process(target=time_rounds, args=(there,) + args, daemon=True).start()
    return here


def measure(recipe, files, indices, num_rounds):
    sides = collections.OrderedDict([
        ('this project', start(files, indices, Ours, recipe)),
        ('tensorpack, float32', start(files, indices, Tensorpack, recipe, True)),
        ('tensorpack, uint8', start(files, indices, Tensorpack, recipe, False))])
    rounds = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            side.send('go')
            rounds[name].append(side.recv())

    print(f'\n{recipe + ", ms per image":22}' + ''.join(f'{column:>8}' for column in COLUMNS))
    for name in sides:
        medians = [statistics.median(column) for column in zip(*rounds[name])]
        print(f'{name:22}' + ''.join(f'{value:8.3f}' for value in medians))
    for name in list(sides)[1:]:
        pairs = list(zip(rounds['this project'], rounds[name]))
        print_ratio(name, [theirs[-1] / ours[-1] for ours, theirs in pairs])
    print_ratio('OpenCV decodes', [theirs[0] / ours[-1] for ours, theirs in pairs])


def print_ratio(other, ratios):
    print(f'{statistics.median(ratios):.2f} times as many images as {other} ({min(ratios):.2f} to '
          f'{max(ratios):.2f} in {len(ratios)} rounds)', flush=True)


def main(args):
    cv2.setNumThreads(0)
    images = image_lists.list_images(args.data)
    files = images.files
    # images of all classes; reading them once puts the files in memory
    count = min(args.images, len(files))
    indices = [i * len(files) // count for i in range(count)]

    def report(index, text, unreadable):
        if unreadable:
            sys.exit(f'cannot read {files[index]}: {text}')
    reader = decoder.ImageReader(images, report)
    pixels = np.mean([reader.read(index)[1].size / 3 for index in indices])
    print(f'{count} images of {pixels / 1000:.0f} x 1000 pixels on average, '
          f'OpenCV {cv2.__version__}, NumPy {np.__version__}')
    for recipe in TASKS:
        measure(recipe, files, indices, args.rounds)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help='folder of JPEGs')
    parser.add_argument('--images', type=int, default=200, help='of a round (default: 200)')
    parser.add_argument('--rounds', type=int, default=5, help='of each side (default: 5)')
    main(parser.parse_args())
