"""Proof that views.py augments as the published weights were: pixels against tensorpack in float32,
PIL and float64, random choices against their distributions, the official code's and torchvision's.

    python -m pytest -s -k differences tests/test_faithful.py    # 5 s; docs/faithfulness.md has it

All seeds are fixed, so each test always has the same outcome. A statistical test fails at p below
SIGNIFICANCE; there are 311, so with 3 % of other seeds one would fail by chance. The samples are
large enough for a probability off by 0.02, or a range 5 % too wide or too narrow, to fail.
"""
import ctypes
import itertools
import json
import math
import mmap
import os
import random
import re
import statistics
import subprocess
import types

import cv2
import numpy as np
import pytest
from PIL import Image
from tensorpack.dataflow import imgaug
from tensorpack.dataflow.imgaug.transform import CropTransform, ResizeTransform

import data
import references
import views
from commands import PATIENCE, ROOT, torch_python
from image_lists import ImageList
from images import PHOTO, read_image

SIGNIFICANCE = 1e-4
TASKS = ['moco-v1', 'moco-v2', 'linear']
AREAS = {'moco-v1': (0.2, 1), 'moco-v2': (0.2, 1), 'linear': (0.08, 1)}


def mean_difference(one, other):
    return np.abs(one.astype(float) - other).mean()


@pytest.fixture(scope='module')
def pictures():
    """From all colours at once to hardly any, from smooth to noise."""
    rng = np.random.RandomState(0)
    photo = cv2.imread(PHOTO)
    blobs = cv2.resize(rng.randint(0, 256, (9, 9, 3)).astype(np.uint8), (224, 224),
                       interpolation=cv2.INTER_CUBIC)
    return {'photo': photo, 'smooth': blobs,
            'noise': rng.randint(0, 256, (224, 224, 3)).astype(np.uint8),
            'noisy photo': references.to_uint8(photo + rng.normal(0, 20, photo.shape)),
            'dull': references.to_uint8(128 + rng.normal(0, 6, (224, 224, 3)))}


# ------------------------------------------------------------------------------- single operations

FACTORS = [0.6, 0.85, 1, 1.2, 1.4]
# name of views.STEPS -> (values, tensorpack's augmentor, which takes float32)
COLOUR_STEPS = {
    'brightness': (FACTORS, imgaug.BrightnessScale((0.6, 1.4))),
    'contrast': (FACTORS, imgaug.Contrast((0.6, 1.4), rgb=False)),
    'saturation': (FACTORS, imgaug.Saturation(0.4, rgb=False)),
    'hue': ([-0.4, -0.25, -0.1, -0.03, 0, 0.03, 0.1, 0.25, 0.4], imgaug.Hue(rgb=False)),
    'grayscale': ([True], imgaug.Grayscale(rgb=False, keepshape=True)),
}


def apply_step(name, image, *value):
    changed = image.copy()
    if name in views.STEPS:
        views.jitter(changed, [(name, *value)])
    else:
        getattr(views, name)(changed, *value)
    return changed


def tensorpack_step(name, image, value):
    """A step as the published run took it: float32, from an image of any type."""
    if name == 'hue':  # tensorpack counts half degrees, and OpenCV wants 0..1
        return COLOUR_STEPS[name][1]._augment(image.astype(np.float32), value * 180)
    return COLOUR_STEPS[name][1]._augment(image.astype(np.float32), value)


def cut(image):
    """As imgaug.ToUint8 does."""
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.parametrize('name', COLOUR_STEPS)
def test_colour_steps_against_tensorpack_and_float64(pictures, name):
    for key, image in pictures.items():
        for value in COLOUR_STEPS[name][0]:
            got = apply_step(name, image, value)
            exact = references.float_step(name, image, value)
            # cut off, so up to 1 lower; a 16th is the rounding of a step
            error = got - exact
            assert -1.15 < error.min() and error.max() < 0.15, (key, value)
            assert mean_difference(got, cut(tensorpack_step(name, image, value))) < 0.25, (
                key, value)
            assert value in (0, 1) and name != 'grayscale' or (got != image).any(), (key, value)


@pytest.mark.parametrize('sigma', [0, 0.1, 0.25, 0.5, 0.7, 1, 1.24, 1.25, 1.5, 1.76, 2])
def test_blur_against_pil(pictures, sigma):
    for key in 'photo', 'smooth', 'noise':
        np.testing.assert_array_equal(apply_step('blur', pictures[key], sigma),
                                      references.pil_blur(pictures[key], sigma), key)


def test_decoding_against_pil():
    # both have libjpeg-turbo, of different versions
    theirs = references.from_pil(Image.open(PHOTO).convert('RGB'))
    ours = read_image(PHOTO)
    assert ours.shape == (375, 500, 3)
    assert mean_difference(ours, theirs) < 0.1


def test_decoding_turns_as_exif_says(tmp_path):
    """As OpenCV, and so tensorpack, does; the official code leaves images as they are stored."""
    path, exif = str(tmp_path / 'turned.jpg'), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.open(PHOTO).save(path, exif=exif)
    stored = references.from_pil(Image.open(path).convert('RGB'))
    turned = read_image(path)
    assert stored.shape == (375, 500, 3) and turned.shape == (500, 375, 3)
    assert mean_difference(turned, np.rot90(stored, -1)) < 0.1


# ----------------------------------------------------------------------- parameters of random views

# a letter for each step, as it is noted down
LETTERS = {'brightness': 'b', 'contrast': 'c', 'saturation': 's',
           'hue': 'h', 'grayscale': 'G', 'blur': 'B', 'flip': 'F'}
STEPS = {letter: name for name, letter in LETTERS.items()}
JITTER = '[bcsh]{4}'
# the steps after the crop, in the recipes' order
RECIPES = {'moco-v1': 'G?' + JITTER + 'F?', 'moco-v2': '(' + JITTER + ')?G?B?F?', 'linear': 'F?'}


class View:
    """What was drawn for a view: box (y, x, height, width), letters of steps, values by letter."""

    def __init__(self, box):
        self.box, self.letters, self.values = box, '', {}

    def follows(self, task):
        """Whether the steps are those of the recipe, in its order."""
        return (re.fullmatch(RECIPES[task], self.letters) is not None
                and len(set(self.letters)) == len(self.letters))


def note_views(monkeypatch, change_pixels):
    """A list that will have a View for every view that views.py makes.

    Args:
        change_pixels: whether views are made; else their parameters are drawn only.
    """
    noted, begun = [], []  # all boxes of an image are drawn before its views are made
    sample_crop, resized_crop = views.sample_crop, views.resized_crop

    def note_crop(*args):
        noted.append(View(sample_crop(*args)))
        return noted[-1].box

    def begin_view(image, box, out):
        begun.append(noted[len(begun)])
        assert begun[-1].box == box
        if change_pixels:
            resized_crop(image, box, out)

    def note_step(letter, function):
        def step(image, *value):
            begun[-1].letters += letter
            begun[-1].values[letter] = value
            if change_pixels:
                function(image, *value)
        return step

    def note_jitter(image, steps):
        for name, value in steps:
            note_step(LETTERS[name], lambda *_: None)(image, value)
        if change_pixels:
            jitter(image, steps)

    jitter = views.jitter
    monkeypatch.setattr(views, 'jitter', note_jitter)
    monkeypatch.setattr(views, 'sample_crop', note_crop)
    monkeypatch.setattr(views, 'resized_crop', begin_view)
    for name, letter in [('convert_to_gray', 'G'), ('blur', 'B'), ('flip', 'F')]:
        monkeypatch.setattr(views, name, note_step(letter, getattr(views, name)))
    return noted


def create_batches(task, image, num_images, batch, size=224, rank=0, ranks=1):
    """Batches of data.py, every file of which holds this image."""
    images = ImageList(range(num_images), np.zeros(num_images, np.int32), None)
    reader = types.SimpleNamespace(images=images, read=lambda index, choose_box: (
        choose_box(*image.shape[:2]) and (index, image)))
    return data.Batches(data.TASKS[task], reader, rank, ranks, batch, size, 0, AREAS[task])


def fill(batches, step):
    arrays = [np.empty(shape, dtype) for shape, dtype in batches.specs(step)]
    batches.fill(step, arrays)
    return arrays


# ---------------------------------------------------------------------------------- whole views

def follow_published(task, view, image):
    """The steps of a view after its crop as the published run took them."""
    if task == 'moco-v2':  # in v1, gray comes first, in uint8
        image = image.astype(np.float32)
    for letter in view.letters:
        if letter == 'B':
            image = references.pil_blur(cut(image), *view.values[letter])
        elif letter == 'F':
            image = cut(image)[:, ::-1]
        elif letter == 'G':
            image = COLOUR_STEPS['grayscale'][1]._augment(image, True)
        else:
            image = tensorpack_step(STEPS[letter], image, *view.values[letter])
    return cut(image)


def follow_official(view, image):
    """The same as the official code takes them: PIL's uint8."""
    for letter in view.letters:
        if letter == 'B':
            image = references.pil_blur(image, *view.values[letter])
        elif letter == 'F':
            image = image[:, ::-1]
        else:
            image = references.pil_step(STEPS[letter], image, *(view.values[letter] or [True]))
    return image


def make_views(patch, task, image, count):
    """[(View, uint8 [224, 224, 3])] of as many images, or twice as many for pre-training."""
    with patch.context() as context:
        noted = note_views(context, change_pixels=True)
        arrays = [array for array in fill(create_batches(task, image, count, count), 0)
                  if array.ndim == 4]
    assert len(noted) == count * len(arrays)
    return list(zip(noted, itertools.chain(*zip(*arrays))))


@pytest.mark.parametrize('task', TASKS)
def test_whole_views_against_the_published_steps(pictures, monkeypatch, task):
    differences = []
    for view, got in make_views(monkeypatch, task, pictures['photo'], 40):
        assert view.follows(task)
        y, x, h, w = view.box
        crop = cv2.resize(pictures['photo'][y:y + h, x:x + w], (224, 224))
        differences.append(mean_difference(got, follow_published(task, view, crop)))
    # rounding to 16ths moves a few pixels over a whole number
    assert max(differences) < (1e-9 if task == 'linear' else 0.3)
    assert np.mean(differences) < (1e-9 if task == 'linear' else 0.15)


@pytest.mark.parametrize('box', [(0, 0, 375, 500), (3, 7, 120, 140), (17, 40, 224, 224),
                                 (100, 99, 275, 401), (200, 300, 1, 30)])
def test_crops_are_resized_without_antialiasing(pictures, box):
    image = pictures['photo']
    got = np.empty((224, 224, 3), np.uint8)
    views.resized_crop(image, box, got)
    # what tensorpack does with this box: OpenCV's bilinear resize of the decoded image's slice
    y, x, h, w = box
    theirs = CropTransform(y, x, h, w).apply_image(image)
    theirs = ResizeTransform(h, w, 224, 224, cv2.INTER_LINEAR).apply_image(theirs)
    np.testing.assert_array_equal(got, theirs)
    exact = references.float_crop(image, box, 224)
    # the limits are of rounding, which OpenCV does twice
    assert mean_difference(got, exact) < 0.3 and np.abs(got - exact).max() < 1.1


def test_crops_of_all_sizes_are_opencvs():
    rng = random.Random(0)
    for size in (1, 2, 7, 24, 32, 97, 224):
        for _ in range(60):
            height, width = (rng.choice([1, 2, 3, rng.randint(4, 400), size, 2 * size, 3 * size])
                             for _ in range(2))
            right, below = rng.randint(0, 2), rng.randint(0, 2)
            image = np.random.RandomState(height + width).randint(
                0, 256, (height + below, width + right, 3)).astype(np.uint8)
            got = np.empty((size, size, 3), np.uint8)
            views.resized_crop(image, (below, right, height, width), got)
            np.testing.assert_array_equal(got, cv2.resize(
                image[below:, right:], (size, size), interpolation=cv2.INTER_LINEAR))


def test_crops_of_other_arrays_are_refused():
    image, out, box = np.zeros([9, 9, 3], np.uint8), np.zeros((4, 4, 3), np.uint8), (0, 0, 9, 9)
    for wrong in (image.astype(np.float32), np.zeros([9, 18, 3], np.uint8)[:, ::2], image[::-1],
                  np.zeros([9, 9, 4], np.uint8), np.zeros([9, 9], np.uint8), image[:, :, :2],
                  np.broadcast_to(image[:1], (9, 9, 3))):
        with pytest.raises(ValueError, match='a box of a contiguous uint8'):
            views.resized_crop(wrong, box, out)
    for wrong in ((-1, 0, 9, 9), (0, -1, 9, 9), (1, 0, 9, 9), (0, 1, 9, 9), (0, 0, 0, 9)):
        with pytest.raises(ValueError, match='a box of a contiguous uint8'):
            views.resized_crop(image, wrong, out)
    for wrong in (np.zeros([8, 4, 3], np.uint8), np.zeros([4, 8, 3], np.uint8)[:, ::2]):
        with pytest.raises(ValueError, match='contiguous'):
            views.resized_crop(image, box, wrong)
    image.setflags(write=False)
    views.resized_crop(image, box, out)


def test_nothing_behind_an_image_is_read():
    page = mmap.PAGESIZE
    memory, libc = mmap.mmap(-1, 2 * page), ctypes.CDLL(None)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    assert libc.mprotect(ctypes.c_void_p(behind), page, 0) == 0  # not to be read
    child = os.fork()
    if not child:
        for height, width in ((1, 1), (2, 1), (9, 1), (1, 2), (3, 2), (9, 7)):
            image = np.frombuffer(memory, np.uint8, 3 * height * width, page - 3 * height * width)
            for size in (1, 2, 5, 32):
                views.resized_crop(image.reshape(height, width, 3), (0, 0, height, width),
                                   np.empty((size, size, 3), np.uint8))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def validation_view(image):
    got = np.empty((224, 224, 3), np.uint8)
    views.center_crop_view(image, None, got)
    return got


@pytest.mark.parametrize('shape', [(375, 500), (500, 375), (256, 256), (224, 300), (333, 500),
                                   (1200, 701), (100, 399), (64, 1000), (1501, 100),
                                   (6, 62)])
def test_validation_views(pictures, shape):
    image = cv2.resize(pictures['photo'], shape[::-1], interpolation=cv2.INTER_AREA)
    # the whole image, its shortest edge 256 pixels; then a slice, half a pixel up and left if need
    # be, as tensorpack's
    scale = 256 / min(shape)
    height, width = [int(round(scale * length)) for length in shape]
    assert min(height, width) == 256
    whole = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    top, left = (height - 224) // 2, (width - 224) // 2
    got = validation_view(image)
    np.testing.assert_array_equal(got, whole[top:top + 224, left:left + 224])
    tensorpack = imgaug.AugmentorList([imgaug.ResizeShortestEdge(256), imgaug.CenterCrop(224)])
    np.testing.assert_array_equal(got, tensorpack.augment(image))


# ---------------------------------------------------------------------------------- distributions

NUM_IMAGES, EPOCHS = 8000, 2


class Sample:
    """Parameters of many views, as columns [EPOCHS, NUM_IMAGES, views per image]:

    of the crop (y, x, area, aspect), whether there was a step (by its name; the jitter's four come
    together), the step's value (by its letter, NaN without that step), and the jitter's order.
    """

    def __init__(self, task):
        self.task, batch = task, 100
        with pytest.MonkeyPatch.context() as monkeypatch:
            noted = note_views(monkeypatch, change_pixels=False)
            batches = create_batches(task, np.zeros((375, 500, 3), np.uint8), NUM_IMAGES, batch)
            arrays = [np.empty(shape, dtype) for shape, dtype in batches.specs(0)]
            plan = []
            for step in range(EPOCHS * NUM_IMAGES // batch):
                batches.fill(step, arrays)
                plan += data.images_of_batch(step, 0, 1, batch, NUM_IMAGES, 0)
        assert all(view.follows(task) for view in noted)
        # by epoch and number of the image, in the place of the order in which they were made
        per_image = len(noted) // len(plan)
        assert per_image == (1 if task == 'linear' else 2)
        places = sorted(range(len(plan)), key=plan.__getitem__)
        self.views = [view for place in places
                      for view in noted[place * per_image:(place + 1) * per_image]]
        self.shape = EPOCHS, NUM_IMAGES, per_image

        self.boxes = np.array([view.box for view in self.views]).T  # y, x, height, width
        self.columns = dict(zip(['y', 'x'], self.boxes),
                            area=self.boxes[2] * self.boxes[3] / (375 * 500),
                            aspect=self.boxes[3] / self.boxes[2])
        for letter in 'hGBF':
            self.columns[STEPS[letter]] = np.array([letter in view.letters for view in self.views])
        for letter in 'bchsB':
            self.columns[letter] = np.array([view.values.get(letter, (math.nan,))[0]
                                             for view in self.views])
        orders = {''.join(order): i for i, order in enumerate(itertools.permutations('bchs'))}
        self.columns['order'] = np.array([orders.get(re.sub('[GBF]', '', view.letters), math.nan)
                                          for view in self.views])
        self.columns = {name: column.reshape(self.shape)
                        for name, column in self.columns.items()}

    def drawn(self, name):
        """The values of a column that are not NaN: [N]."""
        column = self.columns[name]
        return column[~np.isnan(column)]


@pytest.fixture(scope='module')
def samples():
    return {task: Sample(task) for task in TASKS}


def assert_likely(p, *what):
    assert p > SIGNIFICANCE, what + (p,)


def test_statistics_against_tables():
    for x, degrees, p in [(3.841, 1, 0.05), (6.635, 1, 0.01), (5.991, 2, 0.05), (18.307, 10, 0.05),
                          (35.172, 23, 0.05), (52.620, 25, 0.001)]:
        assert references.chi2_sf(x, degrees) == pytest.approx(p, rel=1e-3)
    for x, p in [(1.3581, 0.05), (1.6276, 0.01), (1.9495, 0.001)]:
        assert references.kolmogorov_sf(x) == pytest.approx(p, rel=1e-3)
    # p of samples of the same distribution is uniform: a test of the tests
    rng = np.random.RandomState(0)
    repeats = range(400)
    for ps in [[references.ks_uniform(rng.rand(500)) for _ in repeats],
               [references.ks_two_samples(rng.rand(500), rng.rand(400)) for _ in repeats],
               [references.chi2_counts(np.bincount(rng.randint(0, 9, 500), minlength=9),
                                       [1 / 9] * 9) for _ in repeats],
               [references.chi2_independence(rng.rand(500), rng.rand(500)) for _ in repeats]]:
        assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09 and 0.4 < np.mean(ps) < 0.6


@pytest.mark.parametrize('task, name, probability', [
    ('moco-v1', 'grayscale', 0.2), ('moco-v1', 'hue', 1), ('moco-v1', 'blur', 0),
    ('moco-v1', 'flip', 0.5),
    ('moco-v2', 'grayscale', 0.2), ('moco-v2', 'hue', 0.8), ('moco-v2', 'blur', 0.5),
    ('moco-v2', 'flip', 0.5),
    ('linear', 'grayscale', 0), ('linear', 'hue', 0), ('linear', 'blur', 0),
    ('linear', 'flip', 0.5)])
def test_probabilities(samples, task, name, probability):
    column = samples[task].columns[name]
    counts = [column.sum(), (~column).sum()]
    assert_likely(references.chi2_counts(counts, [probability, 1 - probability]), counts)


@pytest.mark.parametrize('task, letter, low, high', [
    ('moco-v1', 'b', 0.6, 1.4), ('moco-v1', 'c', 0.6, 1.4), ('moco-v1', 's', 0.6, 1.4),
    ('moco-v1', 'h', -0.4, 0.4),
    ('moco-v2', 'b', 0.6, 1.4), ('moco-v2', 'c', 0.6, 1.4), ('moco-v2', 's', 0.6, 1.4),
    ('moco-v2', 'h', -0.1, 0.1), ('moco-v2', 'B', 0.1, 2.0)])
def test_strengths_are_uniform(samples, task, letter, low, high):
    drawn = samples[task].drawn(letter)
    assert len(drawn) > 15000
    assert_likely(references.ks_uniform(drawn, low, high), drawn.min(), drawn.max())


@pytest.mark.parametrize('task', ['moco-v1', 'moco-v2'])
def test_orders_of_the_jitter_are_equally_likely(samples, task):
    counts = np.bincount(samples[task].drawn('order').astype(int), minlength=24)
    assert_likely(references.chi2_counts(counts, [1 / 24] * 24), counts)


def official_boxes(height, width, area, count):
    """Boxes that the official code samples, int [4, count], and which are of the last resort."""
    rng = random.Random(1)
    boxes, last_resort = zip(*[references.official_crop(rng, height, width, area)
                               for _ in range(count)])
    return np.array(boxes).T, np.array(last_resort)


def assert_boxes_alike(ours, theirs, height, width):
    for values in [lambda y, x, h, w: y, lambda y, x, h, w: x,
                   lambda y, x, h, w: h, lambda y, x, h, w: w,
                   lambda y, x, h, w: h * w, lambda y, x, h, w: w / h,
                   lambda y, x, h, w: y + h, lambda y, x, h, w: x + w]:
        assert_likely(references.ks_two_samples(values(*ours), values(*theirs)), height, width)


@pytest.mark.parametrize('task', TASKS)
def test_crops_of_the_recipes_against_the_official_code(samples, task):
    theirs, _ = official_boxes(375, 500, AREAS[task], 20000)
    assert_boxes_alike(samples[task].boxes, theirs, 375, 500)


SHAPES = [(500, 333), (224, 224), (280, 640), (200, 600), (1000, 100)]


def sample_boxes(height, width, count=20000):
    rng = random.Random(0)
    return np.array([views.sample_crop(rng, height, width, (0.2, 1)) for _ in range(count)]).T


@pytest.mark.parametrize('height, width', SHAPES)
def test_crops_of_other_shapes_against_the_official_code(height, width):
    ours, (theirs, last_resort) = sample_boxes(height, width), official_boxes(
        height, width, (0.2, 1), 20000)
    assert_boxes_alike(ours, theirs, height, width)
    # boxes of the last resort, which tensorpack's, of a later version, are squares
    expected = (theirs[:, last_resort][:, :1] if last_resort.any() else
                np.array([[-1]] * 4))
    counts = [np.all(boxes == expected, axis=0) for boxes in (ours, theirs)]
    assert counts[1].sum() == last_resort.sum()
    assert last_resort.mean() > 0.1 or 1 / 3 < width / height < 3
    assert_likely(references.chi2_independence(np.repeat([0, 1], 20000), np.concatenate(counts)),
                  [count.sum() for count in counts])


def test_crops_against_torchvision():
    python, script = torch_python(), os.path.join(ROOT, 'tests', 'torch_crops.py')
    if subprocess.run([python, '-c', 'from importlib import metadata as m;'
                       'm.version("torchvision")'], capture_output=True).returncode:
        pytest.skip(f'{python} has no torchvision')
    cases = [(*shape, (0.2, 1), 10000) for shape in SHAPES]
    results = subprocess.run([python, script], input=json.dumps(cases).encode(), check=True,
                             stdout=subprocess.PIPE, timeout=PATIENCE).stdout
    for shape, theirs in zip(SHAPES, json.loads(results)):
        assert_boxes_alike(sample_boxes(*shape), np.array(theirs).T, *shape)


def test_crops_against_their_distributions():
    # any box fits: the largest is sqrt(0.5 * 4 / 3) = 82 % high or wide
    rng, side, high = random.Random(0), 10000, math.log(4 / 3)
    y, x, h, w = np.array([views.sample_crop(rng, side, side, (0.2, 0.5))
                           for _ in range(300000)]).T
    assert_likely(references.ks_uniform(h * w / side**2, 0.1999, 0.5001), 'area')
    assert_likely(references.ks_uniform(np.log(w / h), -high - 1e-3, high + 1e-3), 'aspect')
    assert_likely(references.ks_uniform(y / (side - h)), 'y')
    assert_likely(references.ks_uniform(x / (side - w)), 'x')
    # A uniform aspect, swapped by chance (tensorpack's, in later versions), differs so little that a
    # sharper test is due (0.003): of the mean of (a + 1/a) / 2 = cosh(log a), to which the ratio of
    # both densities is proportional. Of log a uniform in +-t, it is sinh(t) / t.
    spread = (w / h + h / w) / 2
    mean = math.sinh(high) / high
    variance = (math.sinh(2 * high) / (2 * high) + 1) / 2 - mean**2
    z = (spread.mean() - mean) * math.sqrt(len(spread) / variance)
    assert_likely(math.erfc(abs(z) / math.sqrt(2)), 'mean aspect')


@pytest.mark.parametrize('task', TASKS)
def test_choices_are_independent(samples, task):
    sample = samples[task]
    names = [name for name, column in sample.columns.items()
             if not np.isnan(column.astype(float)).all() and len(np.unique(column)) > 1]
    assert {'area', 'aspect', 'flip'} <= set(names)

    def assert_independent(one, other, *what):
        one, other = one.astype(float).ravel(), other.astype(float).ravel()
        both = ~(np.isnan(one) | np.isnan(other))
        assert_likely(references.chi2_independence(one[both], other[both]), *what)

    for name in names:
        column = sample.columns[name]
        assert_independent(column[0], column[1], name, 'epoch and epoch')
        assert_independent(column[:, 1:], column[:, :-1], name, 'image and next image')
        if sample.shape[2] == 2:
            assert_independent(column[:, :, 0], column[:, :, 1], name, 'query and key')
    # where a crop can be depends on its size, and whether it fits on its aspect
    boxes = {'y', 'x', 'area', 'aspect'}
    for one, other in itertools.combinations(names, 2):
        if not {one, other} <= boxes:
            assert_independent(sample.columns[one], sample.columns[other], one, other)


# ----------------------------------------------------------------------------- streams of random

@pytest.mark.parametrize('task', TASKS)
def test_a_view_follows_from_seed_epoch_and_image(pictures, task):
    """However many ranks and whatever the batch; test_serve_data.py has it of data workers."""
    image = cv2.resize(pictures['photo'], (100, 75))
    collected = []
    for ranks, batch in [(1, 4), (2, 3), (3, 5)]:
        made = {}
        makers = [create_batches(task, image, 12, batch, 32, rank, ranks) for rank in range(ranks)]
        for step in range(24 // batch):
            for rank, maker in enumerate(makers):
                plan = data.images_of_batch(step, rank, ranks, batch, 12, 0)
                arrays = [array for array in fill(maker, step) if array.ndim == 4]
                made.update(zip(plan, zip(*[[one.tobytes() for one in array]
                                             for array in arrays])))
        collected.append({place: made[place] for place in itertools.product([0, 1], range(12))})
    assert collected[0] == collected[1] == collected[2]
    # all files hold the same image, so a stream of random numbers used twice would show
    different = [view for pair in collected[0].values() for view in pair]
    assert len(set(different)) == len(different) == (24 if task == 'linear' else 48)


# ----------------------------------------------------------------------------------- differences

def central_box(area):
    h, w = [int(length * math.sqrt(area) + 0.5) for length in (375, 500)]
    return (375 - h) // 2, (500 - w) // 2, h, w


def test_differences_from_others(pictures, monkeypatch):
    """Measures the table of docs/faithfulness.md; -s prints it. Mean absolute ones, of 255."""
    photo, lines = pictures['photo'], ['', '| of | from | difference, of 255 |', '|---|---|---|']

    def add_line(what, other, text, *numbers):
        lines.append('| {} | {} | {} |'.format(what, other, text.format(*numbers)))

    def crop(area):
        y, x, h, w = central_box(area)
        return cv2.resize(photo[y:y + h, x:x + w], (224, 224), interpolation=cv2.INTER_LINEAR)

    # antialiasing
    resize = {area: mean_difference(crop(area), references.pil_crop(photo, central_box(area), 224))
              for area in (0.2, 0.4, 0.7, 1)}
    add_line('crops resized to 224', 'official code, antialiased',
             ', '.join('{:.2f} from {} x {}'.format(difference, *central_box(area)[2:])
                       for area, difference in resize.items()))
    assert resize[0.2] < 0.2 < 0.5 < resize[0.4] < resize[0.7] < resize[1] < 3
    whole = references.to_pil(photo).resize((int(256 * 500 / 375), 256), Image.BILINEAR)
    left = round((whole.size[0] - 224) / 2)
    validation = mean_difference(
        validation_view(photo), references.from_pil(whole.crop((left, 16, left + 224, 240))))
    add_line('validation', 'official code, antialiased', '{:.2f}', validation)
    assert 0.5 < validation < 1.5

    # colour jitter
    middle, rng, published, official = crop(0.7), random.Random(0), [], []
    for _ in range(50):
        steps = views.sample_jitter(rng, 0.4, 0.4, 0.4, 0.1)
        ours, floats, whole = middle.copy(), middle.astype(np.float32), middle
        views.jitter(ours, steps)
        for name, value in steps:
            floats = tensorpack_step(name, floats, value)
            whole = references.pil_step(name, whole, value)
        published.append(mean_difference(ours, cut(floats)))
        official.append(mean_difference(ours, whole))
    add_line('colour jitter of v2', 'published run, float32', '{:.2f}', statistics.mean(published))
    add_line('colour jitter of v2', 'official code, uint8', '{:.2f}', statistics.mean(official))
    assert statistics.mean(published) < 0.15 < statistics.mean(official) < 2

    # blur
    for sigma in (0.5, 1, 2):
        ours, exact = apply_step('blur', middle, sigma), references.float_blur(middle, sigma)
        add_line(f'blur, sigma {sigma}', 'an exact one', '{:.2f}', mean_difference(ours, exact))
        assert mean_difference(ours, exact) < 0.6

    # everything together
    for task, limit in [('moco-v1', 1.5), ('moco-v2', 1.5), ('linear', 1.2)]:
        made = make_views(monkeypatch, task, photo, 20)
        y_x_h_w = [view.box for view, _ in made]
        crops = [cv2.resize(photo[y:y + h, x:x + w], (224, 224)) for y, x, h, w in y_x_h_w]
        published = np.mean([mean_difference(got, follow_published(task, view, image))
                             for (view, got), image in zip(made, crops)])
        official = np.mean([mean_difference(got, follow_official(
            view, references.pil_crop(photo, view.box, 224))) for view, got in made])
        add_line(f'views of {task}, the same parameters', 'published run', '{:.2f}', published)
        add_line(f'views of {task}, the same parameters', 'official code', '{:.2f}', official)
        assert published < 0.15 < official < limit
    print('\n'.join(lines))
