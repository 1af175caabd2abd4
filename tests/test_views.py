"""views.py: single operations, sampling and views, against values computed by hand."""
import random

import cv2
import numpy as np
import pytest

import decoder
import references
import views


# ------------------------------------------------------------------------------ single operations

def step_of(name):
    """One step of the jitter, as an operation of its own."""
    def step(image, value):
        views.jitter(image, [(name, value)])
    return step


adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue = map(step_of, views.STEPS[:4])


def adjusted(operation, pixels, value=None):
    """What an operation makes of a row of BGR pixels."""
    image = np.array([pixels], np.uint8)
    if value is None:
        operation(image)
    else:
        operation(image, value)
    return image[0].tolist()


def test_brightness():
    # cut off at the end, as the published run's: 100 * 1.1, 99 * 1.1 = 108.9, 240 * 1.1 = 264
    assert adjusted(adjust_brightness, [[100, 99, 240]], 1.1) == [[110, 108, 255]]
    assert adjusted(adjust_brightness, [[100, 99, 0]], 0.6) == [[60, 59, 0]]


def test_contrast():
    # luma of gray pixels 10, 20, 90, 100 is themselves: mean 55
    gray = [[v] * 3 for v in (10, 20, 90, 100)]
    assert adjusted(adjust_contrast, gray, 0.5) == [[v] * 3 for v in (32, 37, 72, 77)]
    # 55 + 1.4 * (v - 55): -8, 6, 104, 118
    assert adjusted(adjust_contrast, gray, 1.4) == [[v] * 3 for v in (0, 6, 104, 118)]
    # neither the mean of 10, 11 is rounded, nor that of the luma: 0.114 B of blue 200 is 22.8
    assert adjusted(adjust_contrast, [[10] * 3, [11] * 3], 0) == [[10] * 3] * 2
    assert adjusted(adjust_contrast, [[200, 0, 0]], 0) == [[22] * 3]


def test_saturation():
    # luma of B 50, G 100, R 200: 0.114 * 50 + 0.587 * 100 + 0.299 * 200 = 124.2
    assert adjusted(adjust_saturation, [[50, 100, 200]], 0) == [[124] * 3]
    assert adjusted(adjust_saturation, [[50, 100, 200]], 0.5) == [[87, 112, 162]]
    # 124.2 + 1.4 * (v - 124.2) = 20.3, 90.3, 230.3
    assert adjusted(adjust_saturation, [[50, 100, 200]], 1.4) == [[20, 90, 230]]


def test_nothing_is_cut_off_between_steps():
    # 201 * 0.75 = 150.75, and 150.75 * 1.25 = 188.4; of 150, it would be 187
    image = np.full([1, 1, 3], 201, np.uint8)
    views.jitter(image, [('brightness', 0.75), ('brightness', 1.25)])
    assert image.ravel().tolist() == [188] * 3
    # but each step cuts to 0..255
    image = np.full([1, 1, 3], 200, np.uint8)
    views.jitter(image, [('brightness', 1.5), ('brightness', 0.5)])
    assert image.ravel().tolist() == [127] * 3
    before = image.copy()
    views.jitter(image, [])
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize('shift, expected', [
    (0, [[0, 0, 255], [0, 255, 0], [255, 0, 0], [77, 77, 77]]),
    (1 / 3, [[0, 255, 0], [255, 0, 0], [0, 0, 255], [77, 77, 77]]),
    (-1 / 3, [[255, 0, 0], [0, 0, 255], [0, 255, 0], [77, 77, 77]]),
])
def test_hue(shift, expected):
    # red, green, blue follow each other at thirds of the circle; gray has no hue
    got = adjusted(adjust_hue, [[0, 0, 255], [0, 255, 0], [255, 0, 0], [77, 77, 77]], shift)
    np.testing.assert_allclose(got, expected, atol=1)


@pytest.mark.parametrize('shift', [0, 0.001, 0.17, -0.1, 0.39, 0.5, 0.999])
@pytest.mark.parametrize('count', [1, 7, 4096])
def test_hue_against_float(shift, count):
    image = np.random.RandomState(0).randint(0, 256, [1, count, 3]).astype(np.uint8)
    image[0, 0] = 0, 255, 255  # two channels are the largest
    turned = image.copy()
    adjust_hue(turned, shift)
    error = turned - references.float_step('hue', image, shift)
    assert -1.2 < error.min() and error.max() < 0.2  # cut off, after steps of a 16th
    assert shift or (turned == image).all()
    # value and saturation stay
    assert (turned.max(2) == image.max(2)).all() and (turned.min(2) == image.min(2)).all()


def all_colours():
    """Every 5th value of each channel, 0 and 255 among them: uint8 [52, 2704, 3]."""
    values = np.arange(0, 256, 5, dtype=np.uint8)
    return np.stack(np.meshgrid(values, values, values, indexing='ij'), 3).reshape(52, -1, 3)


@pytest.mark.parametrize('percent', [0, 1, 60, 99, 100, 101, 137, 140, 199, 200])
def test_colour_steps_against_float(percent):
    image = all_colours()
    for name in views.STEPS[:3]:
        changed = image.copy()
        views.jitter(changed, [(name, percent / 100)])
        error = changed - references.float_step(name, image, percent / 100)
        # cut off, after steps of a 16th: the mean of contrast has one too
        assert -1.15 < error.min() and error.max() < 0.15, name
        if percent == 100:
            np.testing.assert_array_equal(changed, image, name)


OPERATIONS = [(adjust_brightness, 0.7), (adjust_contrast, 1.3),
              (adjust_saturation, 1.3), (adjust_hue, 0.1), (step_of('grayscale'), 1),
              (views.blur, 1)]


@pytest.mark.parametrize('count', [1, 2, 15, 16, 17, 31, 33, 100])
def test_a_step_changes_its_image_only(count):
    for operation, value in OPERATIONS:
        memory = np.random.RandomState(count).randint(0, 256, (3, 1, count, 3)).astype(np.uint8)
        before = memory.copy()
        operation(memory[1], value)
        np.testing.assert_array_equal(memory[::2], before[::2])
        # a pixel depends on no other one, but for contrast and blur
        if operation not in (adjust_contrast, views.blur):
            alone = before[1].copy()
            for x in range(count):
                operation(alone[:, x:x + 1].reshape(1, 1, 3), value)
            np.testing.assert_array_equal(memory[1], alone)


@pytest.mark.parametrize('operation, value', OPERATIONS)
def test_steps_refuse_what_they_would_spoil(operation, value):
    image = np.full([4, 4, 3], 7, np.uint8)
    read_only = image.copy()
    read_only.setflags(write=False)
    for wrong in (np.zeros([4, 8, 3], np.uint8)[:, ::2], np.zeros([4, 4, 4], np.uint8)[:, :, :3],
                  np.zeros([4, 4, 4], np.uint8), np.zeros([4, 4], np.uint8),
                  np.zeros([4, 3], np.uint8), np.zeros([4, 4, 3], np.int8),
                  np.zeros([4, 4, 3], np.float32), read_only):
        before = wrong.copy()
        with pytest.raises(ValueError, match='contiguous'):
            operation(wrong, value)
        np.testing.assert_array_equal(wrong, before)
    operation(image, value)


def test_gray_and_flip():
    assert adjusted(views.convert_to_gray, [[50, 100, 200]]) == [[124] * 3]
    assert adjusted(views.flip, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == [
        [7, 8, 9], [4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize('height, width', [
    (1, 1), (1, 2), (2, 1), (1, 50), (50, 1), (2, 3), (3, 7), (7, 3), (5, 31), (6, 32), (13, 33),
    (9, 64), (40, 65), (17, 17), (224, 224)])
@pytest.mark.parametrize('sigma', [0, 0.1, 0.3, 0.6, 1, 1.22, 1.23, 1.5, 2, 4.1])
def test_blur_of_all_sizes_against_pil(height, width, sigma):
    rng = np.random.RandomState(height * width)
    memory = rng.randint(0, 256, (3, height, width, 3)).astype(np.uint8)
    before = memory.copy()
    views.blur(memory[1], sigma)
    np.testing.assert_array_equal(memory[::2], before[::2])  # it does not write outside
    np.testing.assert_array_equal(memory[1], references.pil_blur(before[1], sigma))


def test_blur_of_any_sigma_against_pil():
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (34, 212, 3)).astype(np.uint8)
    # with the first one, PIL's single precision decides over a pixel
    for sigma in [1.3055152358303213, *rng.uniform(0.1, 2, 100)]:
        blurred = image.copy()
        views.blur(blurred, sigma)
        np.testing.assert_array_equal(blurred, references.pil_blur(image, sigma))


def test_grayscale_leaves_grays():
    grays = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 256, 1), 3, axis=2)
    changed = grays.copy()
    step_of('grayscale')(changed, 1)
    np.testing.assert_array_equal(changed, grays)


@pytest.mark.parametrize('value', [0, 1, 127, 128, 254, 255])
def test_blur_leaves_flat_images(value):
    for sigma in (0, 0.25, 0.27, 0.3, 0.5, 1, 2, 3, 9):
        image = np.full((11, 40, 3), value, np.uint8)
        views.blur(image, sigma)
        assert (image == value).all()


@pytest.mark.parametrize('size', [1, 7, 32, 33, 224])
def test_in_place_is_like_out_of_place(size):
    # vectorised loops must not read again what they have written
    image = np.random.RandomState(size).randint(0, 256, (size, size, 3)).astype(np.uint8)
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    gray3 = np.repeat(gray[:, :, None], 3, axis=2)
    mean = gray.mean()
    truncate = np.vectorize(lambda v: int(min(255, max(0, v + 1e-3))), otypes=[np.int32])
    for operation, value, expected in [
            (adjust_brightness, 1.37, truncate(image * 1.37)),
            (adjust_contrast, 1.37, truncate(mean + (image - mean) * 1.37)),
            (adjust_saturation, 1.37, truncate(gray3 + (image - gray3.astype(float)) * 1.37)),
            (views.convert_to_gray, None, gray3),
            (views.flip, None, image[:, ::-1])]:
        changed = image.copy()
        operation(*[changed] + ([] if value is None else [value]))
        np.testing.assert_allclose(changed, expected, atol=1 if value else 0)


# ------------------------------------------------------------------------------ crops and views

def test_sample_crop_is_inside_and_covers_the_ranges():
    rng = random.Random(0)
    boxes = [views.sample_crop(rng, 300, 400, (0.2, 0.6)) for _ in range(2000)]
    y, x, h, w = np.array(boxes).T
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 300).all() and (x + w <= 400).all()
    fractions, aspects = h * w / 120000, w / h
    assert 0.195 < fractions.min() < 0.21 and 0.59 < fractions.max() < 0.605
    assert 0.74 < aspects.min() < 0.76 and 1.32 < aspects.max() < 1.35
    assert len(set(y)) > 100 and len(set(x)) > 100

    # nothing fits: the largest central box of an aspect of 3/4 to 4/3
    assert views.sample_crop(rng, 10, 1000, (0.9, 1)) == (0, 493, 10, 13)
    assert views.sample_crop(rng, 1000, 100, (0.9, 1)) == (433, 0, 133, 100)
    assert views.sample_crop(rng, 1, 1, (0.01, 0.02)) == (0, 0, 1, 1)


def test_sample_jitter():
    rng = random.Random(0)
    orders, values = set(), {}
    for _ in range(2000):
        jitter = views.sample_jitter(rng, 0.4, 0.3, 0.2, 0.1)
        orders.add(tuple(name for name, _ in jitter))
        for name, value in jitter:
            values.setdefault(name, []).append(value)
    assert len(orders) == 24
    for name, low, high in [('brightness', 0.6, 1.4), ('contrast', 0.7, 1.3),
                            ('saturation', 0.8, 1.2), ('hue', -0.1, 0.1)]:
        low_seen, high_seen = min(values[name]), max(values[name])
        assert low <= low_seen < low + 0.01 and high - 0.01 < high_seen <= high


class Script:
    """A random.Random whose numbers are written down."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


# area 1, aspect 1, y, x
WHOLE = [0, 0.5, 0, 0]
# factors 1, shift 0, first order
NEUTRAL = [0.5, 0.5, 0.5, 0.5, 0]


@pytest.fixture
def photo():
    """A smooth image of many colours, 32 x 32."""
    noise = np.random.RandomState(1).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    return cv2.resize(noise, (32, 32), interpolation=cv2.INTER_CUBIC)


def draw(view, image, numbers, size=32):
    out = np.full((size, size, 3), 99, np.uint8)
    rng = Script(*numbers)
    view(image, views.sample_crop(rng, *image.shape[:2], (1, 1)), out, rng)
    assert not rng.numbers  # as many as expected were drawn
    return out


def test_order_of_v1(photo):
    # gray, then jitter, always; then the flip
    plain = draw(views.moco_v1_view, photo, WHOLE + [0.5] + NEUTRAL + [0.9])
    np.testing.assert_array_equal(plain, photo)
    gray = draw(views.moco_v1_view, photo, WHOLE + [0.19] + NEUTRAL + [0.9])
    assert (gray[..., 0] == gray[..., 2]).all()
    flipped = draw(views.moco_v1_view, photo, WHOLE + [0.5] + NEUTRAL + [0.49])
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    # hue 0.4: a shift of +0.4 turns
    expected = photo.copy()
    adjust_hue(expected, 0.4)
    turned = draw(views.moco_v1_view, photo, WHOLE + [0.5] + [0.5, 0.5, 0.5, 1, 0] + [0.9])
    np.testing.assert_allclose(turned, expected, atol=3)


def test_order_of_v2(photo):
    # jitter with p 0.8, gray, blur, flip: one with all, by hand
    jitter = [0.75, 0.25, 1, 0, 0.999]  # factors 1.2, 0.8, 1.4, shift -0.1, the last order
    everything = draw(views.moco_v2_view, photo,
                      WHOLE + [0.79] + jitter + [0.19] + [0.49, 1] + [0.49])
    expected = photo.copy()
    views.jitter(expected, [('hue', -0.1), ('saturation', 1.4), ('contrast', 0.8),
                            ('brightness', 1.2), ('grayscale', 1)])
    views.blur(expected, 2.0 * 32 / 224)
    np.testing.assert_array_equal(everything, expected[:, ::-1])

    nothing = draw(views.moco_v2_view, photo, WHOLE + [0.8, 0.2, 0.5, 0.5])
    np.testing.assert_array_equal(nothing, photo)

    # the blur of a 224-pixel view has the published sigma
    big = cv2.resize(photo, (224, 224))
    blurred = draw(views.moco_v2_view, big, WHOLE + [0.8, 0.2] + [0.49, 0.5] + [0.5], size=224)
    expected = big.copy()
    views.blur(expected, 1.05)
    np.testing.assert_array_equal(blurred, expected)


def test_linear_views(photo):
    np.testing.assert_array_equal(draw(views.linear_train_view, photo, WHOLE + [0.4]),
                                  photo[:, ::-1])

    # shortest edge 256, centre 224: of 512 x 768 the middle 448 x 448 halved
    image = np.zeros((512, 768, 3), np.uint8)
    image[32:480, 160:608] = 255
    out = np.zeros((224, 224, 3), np.uint8)
    views.center_crop_view(image, None, out)
    assert (out == 255).all()
    # an image of the size asked for is taken whole
    small = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    out = np.zeros_like(small)
    views.center_crop_view(small, None, out)
    np.testing.assert_array_equal(out, small)
    out = np.zeros((224, 224, 3), np.uint8)
    # one more row or column would show
    image[:34] = image[478:] = 0
    image[:, :162] = image[:, 606:] = 0
    views.center_crop_view(image, None, out)
    assert (out[1:-1, 1:-1] == 255).all()
    assert not out[0].any() and not out[-1].any() and not out[:, 0].any() and not out[:, -1].any()


@pytest.mark.parametrize('shape', [(1, 1), (10, 20000), (2000, 3), (500, 375), (448, 512),
                                   (333, 500), (1200, 701), (32, 32), (224, 224)])
@pytest.mark.parametrize('size', [1, 32, 224])
def test_the_centre_is_all_that_its_view_reads(shape, size):
    image = np.random.RandomState(0).randint(0, 256, shape + (3,)).astype(np.uint8)
    y, x, h, w = views.center_box(*shape, size)
    other = 255 - image
    other[y:y + h, x:x + w] = image[y:y + h, x:x + w]
    expected, got = np.zeros((2, size, size, 3), np.uint8)
    views.center_crop_view(image, None, expected)
    views.center_crop_view(other, None, got)
    np.testing.assert_array_equal(got, expected)
    # 224 / 256 of the shortest edge, and some for the neighbours
    assert shape[0] == size or max(h, w) <= 0.875 * min(shape) + 5


def test_union():
    assert views.union([(3, 4, 10, 20)]) == (3, 4, 10, 20)
    assert views.union([(3, 4, 10, 20), (0, 9, 2, 30)]) == (0, 4, 13, 35)


@pytest.mark.parametrize('shape', [(1, 1), (10, 20000), (2000, 3), (500, 375)])
def test_views_of_odd_images(shape):
    image = np.full(shape + (3,), 50, np.uint8)
    out = np.zeros((32, 32, 3), np.uint8)
    views.center_crop_view(image, None, out)
    assert (out == 50).all()
    check_random_views(image, out)


def test_views_of_a_column_with_alpha():
    # NumPy copies what is repeated with other strides, where one pixel is all that there is
    png = cv2.imencode('.png', np.full((30, 1, 4), (50, 50, 50, 255), np.uint8))[1].tobytes()
    image, _ = decoder.decode_whole(png)
    for image in (image, np.array(np.broadcast_to(image[..., :1], image.shape))):
        out = np.zeros((32, 32, 3), np.uint8)
        views.center_crop_view(image, None, out)
        assert (out == 50).all()
        check_random_views(image, out)


def check_random_views(image, out):
    rng, shape = random.Random(0), image.shape[:2]
    for view in (views.moco_v1_view, views.moco_v2_view, views.linear_train_view):
        out[:] = 0
        view(image, views.sample_crop(rng, *shape, (0.2, 1)), out, rng)
        assert out.min() > 0
