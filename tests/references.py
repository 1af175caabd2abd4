"""What test_faithful.py compares views.py with: steps of the recipes by PIL and in float64, the
official code's sampling of crops, and statistics. Nothing here uses views.py.

image: uint8 BGR [height, width, 3], as in views.py, unless it says float64.
"""
import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter


# ------------------------------------------------------------------------------------------ by PIL

def to_pil(image):
    return Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))


def from_pil(picture):
    return np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])


def turn_hue(picture, shift):
    """Turn the hue circle of PIL's uint8 HSV, as the official code does: whole steps of 255ths of
    a turn, cut towards zero."""
    hue, saturation, value = picture.convert('HSV').split()
    turned = (np.asarray(hue).astype(int) + int(shift * 255)) % 256
    channels = Image.fromarray(turned.astype(np.uint8)), saturation, value
    return Image.merge('HSV', channels).convert('RGB')


# names are those of views.py: (PIL image, value) -> PIL image
PIL_STEPS = {
    'brightness': lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    'contrast': lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    'saturation': lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    'hue': turn_hue,
    'grayscale': lambda picture: picture.convert('L').convert('RGB'),
}


def pil_step(name, image, value):
    picture = to_pil(image)
    return from_pil(PIL_STEPS[name](picture, *[] if name == 'grayscale' else [value]))


def pil_blur(image, sigma):
    return from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(float(sigma))))


def pil_crop(image, box, size):
    """A resized box (y, x, height, width), antialiased as the official code's: uint8."""
    y, x, h, w = box
    picture = to_pil(image[y:y + h, x:x + w])
    return from_pil(picture.resize((size, size), Image.BILINEAR))


# -------------------------------------------------------------------------------------- in float64

def float_step(name, image, value):
    """A step of the colour jitter on a float64 image, cut to 0..255 but not rounded."""
    image = image.astype(np.float64)
    gray = (image @ [0.114, 0.587, 0.299])[:, :, None]
    if name == 'grayscale':
        return np.repeat(gray, 3, axis=2)
    if name == 'hue':
        hsv = cv2.cvtColor((image / 255).astype(np.float32), cv2.COLOR_BGR2HSV)  # 0..360 degrees
        hsv[:, :, 0] = (hsv[:, :, 0] + 360 * value) % 360
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR) * 255.
    origin = {'brightness': 0, 'contrast': gray.mean(), 'saturation': gray}
    return np.clip(origin[name] + value * (image - origin[name]), 0, 255)


def bilinear_matrix(length, size):
    """[size, length]: resizes one dimension, without antialiasing; pixels are squares."""
    position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(length)))


def gaussian_matrix(length, sigma, border='edge'):
    """[length, length]: blurs one dimension; border as in np.pad."""
    radius = math.ceil(6 * sigma) + 1
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-offsets**2 / (2 * sigma**2))
    taps /= taps.sum()
    columns = np.pad(np.arange(length), radius, mode=border)
    matrix = np.zeros((length, length))
    for row in range(length):
        np.add.at(matrix[row], columns[row + offsets + radius], taps)
    return matrix


def apply_matrices(rows, image, columns):
    """float64 [len(rows), len(columns), 3]."""
    half = np.tensordot(rows, image.astype(np.float64), (1, 0))
    return np.tensordot(half, columns, (1, 1)).transpose(0, 2, 1)


def float_crop(image, box, size):
    """A resized box (y, x, height, width), not antialiased: float64."""
    y, x, h, w = box
    return apply_matrices(bilinear_matrix(h, size), image[y:y + h, x:x + w],
                          bilinear_matrix(w, size))


def float_blur(image, sigma, border='edge'):
    return apply_matrices(gaussian_matrix(image.shape[0], sigma, border), image,
                          gaussian_matrix(image.shape[1], sigma, border))


def to_uint8(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------- sampling

def official_crop(rng, height, width, area):
    """A box (y, x, height, width) as the official code samples it, and whether it is a box of the
    last resort. The logarithm of its aspect is uniform."""
    for _ in range(10):
        target = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (rng.randint(0, height - h), rng.randint(0, width - w), h, w), False
    # the largest central box of a legal aspect
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return ((height - h) // 2, (width - w) // 2, h, w), True


# -------------------------------------------------------------------------------------- statistics
# Each returns p, the chance of a deviation at least as large when the distributions are the same.

def kolmogorov_sf(x):
    """P(sqrt(n) D > x) for many samples."""
    k = np.arange(1, 101)
    return min(1., 2 * np.sum((-1.)**(k - 1) * np.exp(-2 * k**2 * max(x, 0.2)**2)))


def ks_uniform(sample, low=0., high=1.):
    """Kolmogorov-Smirnov test of one sample against the uniform distribution in low..high."""
    x = (np.sort(sample) - low) / (high - low)
    n = len(x)
    if x[0] < 0 or x[-1] > 1:
        return 0.
    distance = max((np.arange(1, n + 1) / n - x).max(), (x - np.arange(n) / n).max())
    return kolmogorov_sf(distance * math.sqrt(n))


def ks_two_samples(one, other):
    """Kolmogorov-Smirnov test of two samples; ties only make p larger."""
    values = np.concatenate([one, other])
    cdfs = [np.searchsorted(np.sort(sample), values, side='right') / len(sample)
            for sample in (one, other)]
    n = len(one) * len(other) / (len(one) + len(other))
    return kolmogorov_sf(np.abs(cdfs[0] - cdfs[1]).max() * math.sqrt(n))


def chi2_sf(x, degrees):
    """P(chi-square of so many degrees of freedom > x): Q(d/2, x/2) by its recurrence in d/2."""
    half, q, a = x / 2, math.exp(-x / 2), 1.
    if degrees % 2:
        q, a = math.erfc(math.sqrt(half)), 0.5
    while a < degrees / 2:
        q += math.exp(a * math.log(half) - half - math.lgamma(a + 1)) if half else 0
        a += 1
    return q


def chi2_counts(counts, probabilities):
    """Chi-square test of counts against probabilities that sum to 1."""
    expected = np.sum(counts) * np.asarray(probabilities, float)
    if (np.asarray(counts)[expected == 0] > 0).any():
        return 0.  # something that never happens
    used = expected > 0
    if used.sum() == 1:
        return 1.
    x = ((np.asarray(counts) - expected)[used]**2 / expected[used]).sum()
    return chi2_sf(x, used.sum() - 1)


def chi2_independence(one, other, bins=6):
    """Chi-square test of the independence of two columns, cut into bins of equal counts."""
    codes = []
    for column in (np.asarray(one, float), np.asarray(other, float)):
        edges = np.unique(np.quantile(column, np.arange(1, bins) / bins))
        codes.append(np.unique(np.searchsorted(edges, column), return_inverse=True)[1])
    table = np.zeros([code.max() + 1 for code in codes])
    np.add.at(table, tuple(codes), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    x = ((table - expected)**2 / expected).sum()
    return chi2_sf(x, (table.shape[0] - 1) * (table.shape[1] - 1))
