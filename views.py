"""Pixels to views: the augmentations of MoCo and of linear classification.

Images are uint8 BGR [height, width, 3]. An operation changes its image in place. rng is a
random.Random, whose single numbers cost a tenth of NumPy's.
"""
import ctypes
import functools
import itertools
import math
import os

import cv2
import numpy as np

from errors import UserError

KERNELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'build', 'augment.so')
JITTER = ('brightness', 'contrast', 'saturation', 'hue')
ORDERS = list(itertools.permutations(range(4)))


# ---- views
# image: uint8 [height, width, 3], left as it is; out: uint8 [S, S, 3], contiguous, filled in place.

def random_resized_crop(image, out, rng, area):
    """Fill `out` with a random box of the image, resized bilinearly."""
    y, x, h, w = sample_crop(rng, *image.shape[:2], area)
    cv2.resize(image[y:y + h, x:x + w], out.shape[1::-1], out, interpolation=cv2.INTER_LINEAR)


def moco_v1_view(image, out, rng, area=(0.2, 1)):
    """Fill `out` with a view of MoCo v1."""
    random_resized_crop(image, out, rng, area)
    if rng.random() < 0.2:
        convert_to_gray(out)
    jitter(out, sample_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4))
    if rng.random() < 0.5:
        flip(out)


def moco_v2_view(image, out, rng, area=(0.2, 1)):
    """Fill `out` with a view of MoCo v2."""
    random_resized_crop(image, out, rng, area)
    if rng.random() < 0.8:
        jitter(out, sample_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    if rng.random() < 0.2:
        convert_to_gray(out)
    if rng.random() < 0.5:
        # the published sigma is in pixels of a 224-pixel view: take the same part of other views
        blur(out, (0.1 + 1.9 * rng.random()) * out.shape[0] / 224)
    if rng.random() < 0.5:
        flip(out)


def linear_train_view(image, out, rng, area=(0.08, 1)):
    """Fill `out` with a training view of linear classification."""
    random_resized_crop(image, out, rng, area)
    if rng.random() < 0.5:
        flip(out)


def center_crop_view(image, out, rng=None, area=None):
    """Fill `out` with a validation view: shortest edge to 256/224 of the size, then the centre. An
    image that has the size already (CIFAR's at 32) is taken whole."""
    if image.shape == out.shape:
        out[:] = image
        return
    size, short = out.shape[0], min(image.shape[:2])
    # only the centre is wanted: do not resize (at 20,000 x 10, to 350 MB) what is far outside
    top, left = (max(0, (edge - 4 * short) // 2) for edge in image.shape[:2])
    image = image[top:, left:][:4 * short, :4 * short]
    scale = round(size * 256 / 224) / short
    h, w = (int(scale * edge + 0.5) for edge in image.shape[:2])
    y, x = (h - size) // 2, (w - size) // 2
    out[:] = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)[y:y + size, x:x + size]


# ---- sampled parameters

def sample_crop(rng, height, width, area):
    """Sample a box of an image as tensorpack's GoogleNetRandomCropAndResize does: (y, x, height,
    width) in pixels, its area between two fractions of the image's. After ten boxes that do not
    fit, it is the central square."""
    for _ in range(10):
        target = (area[0] + (area[1] - area[0]) * rng.random()) * height * width
        aspect = 3 / 4 + (4 / 3 - 3 / 4) * rng.random()
        w = max(1, int(math.sqrt(target * aspect) + 0.5))
        h = max(1, int(math.sqrt(target / aspect) + 0.5))
        if rng.random() < 0.5:
            w, h = h, w
        if h <= height and w <= width:
            x = int(rng.random() * (width - w + 1))
            y = int(rng.random() * (height - h + 1))
            return y, x, h, w
    # tensorpack resizes all of the image, then crops; so a 20,000 x 10 image would take 300 MB
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def sample_jitter(rng, brightness, contrast, saturation, hue):
    """Sample the steps of jitter(), in a random order: factors uniform in 1 +- strength, a shift of
    hue in +- hue turns."""
    steps = (('brightness', 1 + brightness * (2 * rng.random() - 1)),
             ('contrast', 1 + contrast * (2 * rng.random() - 1)),
             ('saturation', 1 + saturation * (2 * rng.random() - 1)),
             ('hue', hue * (2 * rng.random() - 1)))
    return [steps[i] for i in ORDERS[int(rng.random() * len(ORDERS))]]


# ---- operations, as those of PIL's ImageEnhance

def jitter(image, steps):
    """Change colours by steps (name of JITTER, value), cutting to uint8 after each: brightness,
    contrast and saturation move colours away from black, from the rounded mean of the grayscale
    image and from that image by a factor of 0 to 2, hue turns its circle by so many turns."""
    kinds = (ctypes.c_int32 * len(steps))(*[JITTER.index(name) for name, _ in steps])
    values = (ctypes.c_double * len(steps))(*[value for _, value in steps])
    load_kernels().jitter(point_to(image), image.size // 3, kinds, values, len(steps))


def convert_to_gray(image):
    """Make all channels the luma of ITU-R 601."""
    cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR, image)


def blur(image, sigma):
    """Gaussian blur of `sigma` pixels, the border repeated."""
    if sigma < 0.25:
        return  # a neighbour's weight, exp(-1 / 2 sigma^2), is so small that no uint8 changes
    taps = gaussian_taps(sigma)
    load_kernels().blur(point_to(image), image.shape[0], image.shape[1],
                        (ctypes.c_uint16 * len(taps))(*taps), len(taps) - 1)


def gaussian_taps(sigma):
    """Weights of a pixel and of its neighbours at 1, 2 .. ceil(3 sigma), in 256ths: list of int.
    All must add up to 1, or brightness changes: the middle one, the largest, corrects rounding."""
    weights = [math.exp(-k * k / (2 * sigma * sigma)) for k in range(math.ceil(3 * sigma) + 1)]
    total = 2 * sum(weights) - weights[0]
    taps = [round(256 * weight / total) for weight in weights]
    taps[0] = 256 - 2 * sum(taps[1:])
    return taps


def flip(image):
    """Mirror left and right."""
    cv2.flip(image, 1, image)


@functools.lru_cache(maxsize=None)
def load_kernels():
    """The functions of augment.cc."""
    try:
        kernels = ctypes.CDLL(KERNELS)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        kernels.jitter.argtypes = [pointer, number, pointer, pointer, number]
        kernels.blur.argtypes = [pointer, number, number, pointer, number]
    except (OSError, AttributeError) as error:
        raise UserError(f'augment.cc is not built for this machine, run make env: {error}')
    return kernels


def point_to(image):
    """The address of an image's pixels for the kernels, in a fourth of image.ctypes' time."""
    if not (image.flags.c_contiguous and image.flags.writeable and image.dtype == np.uint8
            and image.ndim == 3 and image.shape[2] == 3):
        raise ValueError('this needs a contiguous, writable uint8 [height, width, 3], not '
                         f'{image.dtype} {image.shape}')
    return ctypes.byref(ctypes.c_char.from_buffer(image))
