"""Pixels to views: the augmentations of MoCo and of linear classification.

Images are uint8 BGR [height, width, 3]. An operation but resize() changes its image in place. rng
is a random.Random, whose single numbers cost a tenth of NumPy's.
"""
import ctypes
import functools
import itertools
import math

import cv2
import numpy as np

import compiled

STEPS = ('brightness', 'contrast', 'saturation', 'hue', 'grayscale')
ORDERS = list(itertools.permutations(range(4)))


# ---- views
# image: uint8 [height, width, 3], left as it is; box: a part of it, (y, x, height, width), outside
# of which pixels do not matter; out: uint8 [S, S, 3], contiguous, filled in place.

def resized_crop(image, box, out):
    """Fill `out` with a box of the image, resized."""
    resize(image, box, out, out.shape[:2])


def moco_v1_view(image, box, out, rng):
    """Fill `out` with a view of MoCo v1."""
    resized_crop(image, box, out)
    if rng.random() < 0.2:
        convert_to_gray(out)
    jitter(out, sample_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4))
    if rng.random() < 0.5:
        flip(out)


def moco_v2_view(image, box, out, rng):
    """Fill `out` with a view of MoCo v2."""
    resized_crop(image, box, out)
    steps = []
    if rng.random() < 0.8:
        steps += sample_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    if rng.random() < 0.2:
        steps.append(('grayscale', 1))
    jitter(out, steps)
    if rng.random() < 0.5:
        # the published sigma is in pixels of a 224-pixel view: take the same part of other views
        blur(out, (0.1 + 1.9 * rng.random()) * out.shape[0] / 224)
    if rng.random() < 0.5:
        flip(out)


def linear_train_view(image, box, out, rng):
    """Fill `out` with a training view of linear classification."""
    resized_crop(image, box, out)
    if rng.random() < 0.5:
        flip(out)


def center_crop_view(image, box, out, rng=None):
    """Fill `out` with a validation view: shortest edge to 256/224 of the size, then the centre. An
    image that has the size already (CIFAR's at 32) is taken whole. Its box is center_box()."""
    height, width, _ = image.shape
    if image.shape == out.shape:
        out[:] = image
        return
    (rows, y), (columns, x) = center(height, width, out.shape[0])
    resize(image, (0, 0, height, width), out, (rows, columns), (y, x))


def center(height, width, size):
    """Of both edges of an image, for center_crop_view(): the length that it gets, and where in that
    the view begins."""
    for edge in (height, width):
        resized = int(round(size * 256 / 224) / min(height, width) * edge + 0.5)
        yield resized, (resized - size) // 2


def center_box(height, width, size):
    """The box of an image that matters to center_crop_view(), for a view of this size."""
    if (height, width) == (size, size):
        return 0, 0, height, width
    edges = []
    for edge, (resized, view) in zip((height, width), center(height, width, size)):
        # pixel i of the resized edge is at (i + 1/2) edge / resized - 1/2: between two that are
        # read; and one more on each side, for rounding
        first, last = ((i + 0.5) * edge / resized - 0.5 for i in (view, view + size - 1))
        first, last = max(0, int(first) - 1), min(edge, int(last) + 3)
        edges.append((first, last - first))
    (y, h), (x, w) = edges
    return y, x, h, w


def union(boxes):
    """The least box around boxes."""
    y, x, h, w = zip(*boxes)
    top, left = min(y), min(x)
    return top, left, max(map(sum, zip(y, h))) - top, max(map(sum, zip(x, w))) - left


# ---- sampled parameters

def sample_crop(rng, height, width, area):
    """Sample a box of an image as torchvision's RandomResizedCrop does: (y, x, height, width) in
    pixels, its area between two fractions of the image's, the logarithm of its aspect uniform.
    After ten boxes that do not fit, it is the largest central one of an aspect of 3/4 to 4/3."""
    for _ in range(10):
        target = (area[0] + (area[1] - area[0]) * rng.random()) * height * width
        aspect = 3 / 4 * (16 / 9) ** rng.random()
        w = max(1, int(math.sqrt(target * aspect) + 0.5))
        h = max(1, int(math.sqrt(target / aspect) + 0.5))
        if h <= height and w <= width:
            y = int(rng.random() * (height - h + 1))
            x = int(rng.random() * (width - w + 1))
            return y, x, h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def sample_jitter(rng, brightness, contrast, saturation, hue):
    """Sample the steps of jitter(), in a random order: factors uniform in 1 +- strength, a shift of
    hue in +- hue turns."""
    steps = (('brightness', 1 + brightness * (2 * rng.random() - 1)),
             ('contrast', 1 + contrast * (2 * rng.random() - 1)),
             ('saturation', 1 + saturation * (2 * rng.random() - 1)),
             ('hue', hue * (2 * rng.random() - 1)))
    return [steps[i] for i in ORDERS[int(rng.random() * len(ORDERS))]]


# ---- operations

def resize(image, box, out, shape, at=(0, 0)):
    """Resize a box of the image to a shape (height, width), bilinearly as OpenCV does it, and fill
    `out` with the part of that which begins `at` (y, x)."""
    y, x, h, w = box
    size, (height, width) = len(out), image.shape[:2]
    if not (image.flags.c_contiguous and image.dtype == np.uint8 and image.shape[2:] == (3,)
            and 0 <= y < y + h <= height and 0 <= x < x + w <= width
            and out.shape == (size, size, 3)):
        raise ValueError(f'this needs a box of a contiguous uint8 [height, width, 3], not {box} of '
                         f'{image.dtype} {image.shape}, and a square in place of {out.shape}')
    load_kernels().resize(image.ctypes.data + 3 * (y * width + x), 3 * width, h, w, *shape, *at,
                          point_to(out), size)


def jitter(image, steps):
    """Change colours by steps (name of STEPS, value), as tensorpack does in float32: each is cut to
    0..255, and only the last one down to uint8. Brightness, contrast and saturation move colours
    away from black, from the mean of the grayscale image and from that image by a factor of 0 to 2,
    hue turns its circle by so many turns, and grayscale takes no heed of its value."""
    if not steps:
        return
    kinds = (ctypes.c_int32 * len(steps))(*[STEPS.index(name) for name, _ in steps])
    values = (ctypes.c_double * len(steps))(*[value for _, value in steps])
    load_kernels().jitter(point_to(image), image.size // 3, kinds, values, len(steps))


def convert_to_gray(image):
    """Make all channels the luma of ITU-R 601."""
    cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR, image)


def blur(image, sigma):
    """PIL's GaussianBlur: three box blurs of together `sigma` pixels, the border repeated."""
    load_kernels().blur(point_to(image), image.shape[0], image.shape[1], sigma)


def flip(image):
    """Mirror left and right."""
    cv2.flip(image, 1, image)


@functools.lru_cache(maxsize=None)
def load_kernels():
    """The functions of augment.cc."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return compiled.load(
        'augment', resize=[pointer] + 7 * [number] + [pointer, number],
        jitter=[pointer, number, pointer, pointer, number],
        blur=[pointer, number, number, ctypes.c_double])


def point_to(image):
    """The address of an image's pixels for the kernels, in a fourth of image.ctypes' time."""
    if not (image.flags.c_contiguous and image.flags.writeable and image.dtype == np.uint8
            and image.ndim == 3 and image.shape[2] == 3):
        raise ValueError('this needs a contiguous, writable uint8 [height, width, 3], not '
                         f'{image.dtype} {image.shape}')
    return ctypes.byref(ctypes.c_char.from_buffer(image))
