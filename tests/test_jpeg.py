"""jpeg.cc: a box of a JPEG is what decoder.decode_whole() makes of it, which OpenCV does."""
import itertools
import os
import random
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

import compiled
import decoder
import views
from errors import UserError
from test_decoder import EXIF, JPEGS, TURNED, UPRIGHT, XMP, encode

BOXES = [lambda height, width: (0, 0, 1, 1), lambda height, width: (height - 1, width - 1, 1, 1),
         lambda height, width: (0, 0, height, width),
         lambda height, width: (height // 3, width // 3, height // 3 + 1, width // 3 + 1)]
SAMPLINGS = {'gray': 0x111111, '4:4:4': 0x111111, '4:2:2': 0x211111, '4:2:0': 0x221111}
OTHERS = {'4:4:0': 0x121111, '4:1:1': 0x411111}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that is not written does not look like an image that was there before."""
    monkeypatch.setattr(np, 'empty', lambda shape, dtype: np.full(shape, 77, dtype))


def jpeg(sampling, height, width, progressive=0, restarts=0, optimise=0):
    noise = np.random.RandomState(height * width).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode('.jpg', image[..., 0] if sampling == 'gray' else image, [
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, {**SAMPLINGS, **OTHERS}[sampling],
        cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_RST_INTERVAL, restarts,
        cv2.IMWRITE_JPEG_OPTIMIZE, optimise])[1].tobytes()


def cut(image, box):
    y, x, h, w = box
    return image[y:y + h, x:x + w]


def outcome(function, *args):
    """(image, warning), or (None, why it cannot be read)."""
    try:
        return function(*args)
    except ValueError as error:
        return None, str(error)


def assert_same(content):
    """Returns the warning, or why it cannot be read."""
    whole, expected = outcome(decoder.decode_whole, content)
    for choose_box in BOXES:
        image, said = outcome(decoder.decode, content, choose_box)
        assert said == expected and (image is None) == (whole is None)
        if image is not None:
            assert image.shape == whole.shape
            box = choose_box(*image.shape[:2])
            np.testing.assert_array_equal(cut(image, box), cut(whole, box))
    return expected


@pytest.mark.parametrize('sampling', SAMPLINGS)
@pytest.mark.parametrize('height, width', [(1, 1), (2, 3), (15, 17), (16, 16), (33, 47), (49, 34)])
def test_boxes(sampling, height, width):
    rng, pixels = random.Random(0), itertools.product(range(height), range(width))
    boxes = [(y, x, 1, 1) for y, x in pixels]
    for _ in range(300):
        h, w = rng.randint(1, height), rng.randint(1, width)
        boxes.append((rng.randint(0, height - h), rng.randint(0, width - w), h, w))
    for restarts, optimise in itertools.product((0, 1, 3), (0, 1)):
        content = jpeg(sampling, height, width, 0, restarts, optimise)
        whole = decoder.decode_whole(content)[0]
        for box in boxes:
            image = decoder.decode_box(content, lambda *size: size == (height, width) and box)
            assert image.shape == whole.shape and image.dtype == np.uint8
            assert (cut(image, box) == cut(whole, box)).all(), (restarts, optimise, box)
        boxes = boxes[-100:]


def with_app1(*parts):
    return JPEGS['plain'][:2] + b''.join(
        struct.pack('>HH', 0xffe1, 2 + len(part)) + part for part in parts) + JPEGS['plain'][2:]


LEFT_TO_OPENCV = [jpeg(sampling, 33, 47, 1) for sampling in SAMPLINGS] + [
    jpeg(sampling, 33, 47) for sampling in OTHERS] + [
    encode(Image.new('CMYK', (24, 16), (5, 205, 155, 51)), 'JPEG'), b'', b'\xff\xd8', b'GIF89a',
    encode(Image.new('RGB', (24, 16)), 'PNG'), b'\xff\xd8\0' + JPEGS['plain'][2:]
] + [with_app1(*parts) for parts in TURNED['JPEG']] + [
    with_app1(EXIF[:-8] + bytes([orientation]) + EXIF[-7:]) for orientation in range(2, 9)] + [
    with_app1(b'Exif\0\0MM\0*\0\0\0\x08\0\1' + struct.pack('>HHLHH', 0x0112, 3, 1, 6, 0)),
    with_app1(b'FLIR\0\0' + EXIF[6:])]
UPRIGHTS = [with_app1(EXIF[:-8] + b'\1' + EXIF[-7:], XMP), with_app1(XMP), with_app1(b''),
            with_app1(b'Exif\0\0II'), with_app1(EXIF[:14] + b'\xff' * 8)]


@pytest.mark.parametrize('content', LEFT_TO_OPENCV, ids=map(str, itertools.count()))
def test_left_to_opencv(content):
    assert decoder.decode_box(content, lambda *_: pytest.fail()) is None
    assert_same(content)


@pytest.mark.parametrize('content', UPRIGHTS + [
    JPEGS['plain'] + trailer for trailer in (b'', bytes(99), b'\xff\xda', JPEGS['plain'])],
                         ids=map(str, itertools.count()))
def test_upright_ones_and_what_follows_the_end(content):
    assert decoder.decode_box(content, BOXES[0]) is not None
    assert_same(content)


def test_other_upright_ones():
    for parts in UPRIGHT['JPEG']:
        assert_same(with_app1(*parts))


@pytest.mark.parametrize('sampling, restarts', [('4:2:0', 0), ('4:4:4', 2), ('gray', 0)])
def test_damage_is_seen_whichever_the_box(sampling, restarts, capfd):
    whole, rng = jpeg(sampling, 33, 47, 0, restarts), random.Random(0)
    scan, said = whole.index(b'\xff\xda'), set()
    for at in range(2, len(whole), 9):
        assert_same(whole[:at])
        if not scan < at < scan + 14:  # there, has_end() takes it for the end
            assert_same(whole[:at] + b'\xff\xd9')
    for at in list(range(0, scan, 19)) + list(range(scan, len(whole), 5)):
        said.add(assert_same(
            whole[:at] + bytes([whole[at] ^ rng.randint(1, 255)]) + whole[at + 1:]))
    for count, trailer in itertools.product(range(12), (b'', bytes(5000))):
        said.add(assert_same(whole[:-2] + bytes(count) + b'\xff\xd9' + trailer))
    assert {'', 'is a JPEG that was cut off'} < said and len(said) > 10
    assert capfd.readouterr() == ('', '')


def test_the_box_is_that_of_the_image_that_is_returned():
    asked = []
    warned = JPEGS['plain'][:-2] + bytes(12) + b'\xff\xd9'
    for content in (JPEGS['plain'], warned, with_app1(EXIF)):
        asked.append([])
        image, _ = decoder.decode(content, lambda *size: asked[-1].append(size) or (0, 0, 1, 1))
        assert asked[-1][-1] == image.shape[:2]
    assert asked == [[(375, 500)], [(375, 500)] * 2, [(500, 375)]]


def test_memory_does_not_grow():
    def megabytes():
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6

    whole = jpeg('4:2:0', 64, 64)
    damaged = [whole, whole[:-99] + b'\xff\xd9', whole[:300], jpeg('4:4:0', 64, 64)]
    for count in (50, 1000):
        before = megabytes()
        for _ in range(count):
            for content in damaged:
                decoder.decode_box(content, BOXES[0])
        # a box that cannot be chosen
        for _ in range(count):
            with pytest.raises(KeyError):
                decoder.decode_box(whole, lambda *_: {}[0])
    assert megabytes() - before < 5


def test_a_library_that_does_not_load_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, 'FOLDER', str(tmp_path))
    for load, name in ((decoder.load_library, 'jpeg'), (views.load_kernels, 'augment')):
        for content in (None, b'not a library'):
            if content:
                (tmp_path / f'{name}.so').write_bytes(content)
            with pytest.raises(UserError, match=f'{name}.cc is not built.*make env.*{name}.so'):
                load.__wrapped__()
