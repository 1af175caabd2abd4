"""The plan, which image goes where, and the batches that follow from it.

Everything is a function of (files, seed): the order of an epoch of (seed, epoch), the randomness
of an image of (seed, epoch, index). So neither the number of processes that make batches nor a
restart in the middle changes what is trained on. seed, epoch and index are below 2**32.
"""
import collections
import functools
import random
from typing import List, Sequence, Tuple

import numpy as np

import views

# What a server can be asked for. view: a function of views.py; num_views: of each image;
# labelled: whether labels go along, or the images' own numbers, NUMBERED; area: range of the random
# crop, fractions of the image, or None for the centre;
# bounded: whether the ranks together get every image once, in place of endless epochs.
NUMBERED = 'numbered'
Task = collections.namedtuple('Task', 'view num_views labelled area bounded')
TASKS = {
    'moco-v1': Task(views.moco_v1_view, 2, False, (0.2, 1), False),
    'moco-v2': Task(views.moco_v2_view, 2, False, (0.2, 1), False),
    'linear': Task(views.linear_train_view, 1, True, (0.08, 1), False),
    'eval': Task(views.center_crop_view, 1, True, None, True),
    'embed': Task(views.center_crop_view, 1, NUMBERED, None, True),
}


# ---- the plan; batch: images per rank and step

def images_of_batch(step: int, rank: int, size: int, batch: int, num_images: int,
                    seed: int) -> List[Tuple[int, int]]:
    """Which images one of `size` ranks trains on in a step, from 0: `batch` times (epoch, index).
    The stream is epoch after epoch, each in its own order; step after step takes size x batch
    images from it, rank after rank. An epoch need not be a whole number of steps."""
    position, images = (step * size + rank) * batch, []
    while len(images) < batch:
        epoch, first = divmod(position + len(images), num_images)
        order = epoch_permutation(seed, epoch, num_images)
        images += [(epoch, index) for index in order[first:first + batch - len(images)].tolist()]
    return images


@functools.lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images in an epoch: uint32 [num_images], read-only."""
    # NumPy promises that RandomState's numbers never change, as it does not for Generator
    order = np.random.RandomState([seed, epoch]).permutation(num_images).astype(np.uint32)
    order.setflags(write=False)
    return order


def seed_of_image(seed: int, epoch: int, index: int) -> int:
    """What to seed a random.Random with."""
    # It takes an integer as a list of 32-bit words and adds each word's position to it, over and
    # over, so [k] and [k, k - 1] give the same numbers. The highest bit makes lists equally long.
    return 1 << 96 | seed << 64 | epoch << 32 | index


def images_of_bounded_batch(step: int, rank: int, size: int, batch: int,
                            num_images: int) -> Sequence[int]:
    """A rank's images in a bounded step: the next `batch`, or fewer, of rank, rank + size ..."""
    return range(rank, num_images, size)[step * batch:(step + 1) * batch]


def num_bounded_batches(rank: int, size: int, batch: int, num_images: int) -> int:
    """How many batches a rank gets in a bounded pass."""
    return -(-len(range(rank, num_images, size)) // batch)


# ---- workers: worker i of a rank's n makes the batches i, i + n, i + 2n ...

def workers_per_rank(num_workers: int, num_ranks: int) -> int:
    """Of a host's workers, the same number for each of its ranks, rounded up."""
    return -(-num_workers // num_ranks)


def num_turns(num_batches: int, num_workers: int) -> int:
    """How many batches a rank's workers make in a bounded pass: whole rounds of turns, the last
    batches empty, so that the next pass begins with worker 0 again."""
    return -(-num_batches // num_workers) * num_workers


# ---- batches

def sample_box(rng, height: int, width: int, area, image_size: int) -> Tuple[int, int, int, int]:
    """The part of an image that a view needs, (y, x, height, width); area: a Task's."""
    if area is None:
        return views.center_box(height, width, image_size)
    return views.sample_crop(rng, height, width, area)


class Batches:
    """The batches of one rank: num_batches, or None if they are endless.

    Args:
        task, reader: a Task, a decoder.ImageReader.
        rank, size, batch, seed: see images_of_batch().
        image_size, area: S, in pixels; the range of the random crop in place of the task's.
    """

    def __init__(self, task, reader, rank, size, batch, image_size, seed=0, area=None):
        self.task, self.reader, self.area = task, reader, task.area and (area or task.area)
        self.image_size, self.seed, self._rng = image_size, seed, random.Random()
        self._where = rank, size, batch, len(reader.images.files)
        self.num_batches = num_bounded_batches(*self._where) if task.bounded else None

    def _plan(self, step):  # list of (epoch, index)
        if self.task.bounded:
            return [(0, index) for index in images_of_bounded_batch(step, *self._where)]
        return images_of_batch(step, *self._where, self.seed)

    def specs(self, step: int) -> list:
        """(shape, dtype) of a batch's arrays: views uint8 [n, S, S, 3], labels int32 [n] if any."""
        n = len(self._plan(step))
        view = (n, self.image_size, self.image_size, 3), np.uint8
        return [view] * self.task.num_views + [((n,), np.int32)] * bool(self.task.labelled)

    def fill(self, step: int, arrays: List[np.ndarray]) -> None:
        """Write a batch into arrays of its specs."""
        for i, (epoch, index) in enumerate(self._plan(step)):
            boxes, seed = [], seed_of_image(self.seed, epoch, index)

            def choose_box(height, width):
                # here, since it is called again for the next image if this one cannot be read
                self._rng.seed(seed)
                boxes[:] = [sample_box(self._rng, height, width, self.area, self.image_size)
                            for _ in range(self.task.num_views)]
                return views.union(boxes)
            index, image = self.reader.read(index, choose_box)
            for box, array in zip(boxes, arrays):
                self.task.view(image, box, array[i], self._rng)
            for labels in arrays[self.task.num_views:]:
                labels[i] = self.reader.images.labels[index]


class FakeBatches(Batches):
    """Batches of random images, made once; the arguments are those of Batches."""

    def __init__(self, *args):
        super().__init__(*args)
        rng, num_classes = np.random.RandomState(0), len(self.reader.images.classes or [1])
        # images, or labels; the last batches may be smaller
        self._arrays = [rng.randint(0, 256 if len(shape) == 4 else num_classes, shape, dtype)
                        for shape, dtype in self.specs(0)]

    def fill(self, step, arrays):
        for array, fake in zip(arrays, self._arrays):
            array[:] = fake[:len(array)]
