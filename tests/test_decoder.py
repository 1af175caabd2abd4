"""decoder.py: every kind of file becomes pixels, or is known to be unreadable."""
import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import decoder
import image_lists
from errors import UserError
from images import PHOTO, read_image, write_image


def test_decode(tmp_path):
    # a red pixel: BGR
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 2] = 255
    path = tmp_path / 'red.png'
    path.write_bytes(cv2.imencode('.png', red)[1].tobytes())
    np.testing.assert_array_equal(read_image(str(path)), red)


def encode(image, kind, **options):
    """The bytes of a file of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode, colour, size=(24, 16)):
    return Image.new(mode, size, colour)


def decode(tmp_path, content, name='x.JPEG'):
    """What becomes of these bytes, whatever the name says that they are."""
    path = tmp_path / name
    path.write_bytes(content)
    return read_image(str(path))


# name: (content, shape, colour of all pixels: BGR)
KINDS = {
    'PNG': (encode(flat('RGB', (200, 30, 60)), 'PNG'), (16, 24), [60, 30, 200]),
    'WebP': (encode(flat('RGB', (200, 30, 60)), 'WEBP', lossless=True), (16, 24), [60, 30, 200]),
    'TIFF': (encode(flat('RGB', (200, 30, 60)), 'TIFF'), (16, 24), [60, 30, 200]),
    # 255 - (cyan, magenta, yellow), each times 1 - black
    'CMYK JPEG': (encode(flat('CMYK', (5, 205, 155, 51)), 'JPEG', quality=100), (16, 24),
                  [80, 40, 200]),
    'gray JPEG': (encode(flat('L', 77), 'JPEG'), (16, 24), [77, 77, 77]),
    'progressive JPEG': (encode(flat('RGB', (80, 80, 80)), 'JPEG', progressive=True), (16, 24),
                         [80, 80, 80]),
    # the upper 8 bits
    'gray PNG of 16 bits': (
        cv2.imencode('.png', np.uint16([[0x80ff] * 24] * 16))[1].tobytes(),
        (16, 24), [0x80, 0x80, 0x80]),
    'PNG of 16 bits': (
        cv2.imencode('.png', np.uint16([[[0x1122, 0x3344, 0x80ff]] * 24] * 16))[1].tobytes(),
        (16, 24), [0x11, 0x33, 0x80]),
    'PNG of 1 bit': (encode(flat('1', 1), 'PNG'), (16, 24), [255, 255, 255]),
    'PNG with a palette': (encode(flat('RGB', (200, 30, 60)).convert('P', palette=Image.ADAPTIVE),
                                  'PNG'), (16, 24), [60, 30, 200]),
    'transparent PNG': (encode(flat('RGBA', (200, 30, 60, 0)), 'PNG'), (16, 24), [60, 30, 200]),
    'one pixel': (encode(flat('RGB', (80, 80, 80), (1, 1)), 'JPEG'), (1, 1), [80, 80, 80]),
    '20,000 pixels wide': (encode(flat('RGB', (80, 80, 80), (20000, 10)), 'JPEG'), (10, 20000),
                           [80, 80, 80]),
}


@pytest.mark.parametrize('kind', sorted(KINDS))
def test_every_kind_becomes_bgr_of_8_bits(tmp_path, kind):
    content, shape, colour = KINDS[kind]
    image = decode(tmp_path, content)
    assert image.dtype == np.uint8 and image.shape == shape + (3,)
    np.testing.assert_allclose(image, np.broadcast_to(colour, image.shape), atol=2)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.open(PHOTO).resize((32, 24)), kind, exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))[..., ::-1]
    assert expected.shape == ((24, 32, 3) if orientation < 5 else (32, 24, 3))
    np.testing.assert_allclose(decode(tmp_path, content), expected, atol=3)


def photo_with_thumbnail():
    """A JPEG with a whole JPEG in its header."""
    image = Image.open(PHOTO)
    thumbnail = encode(image.resize((80, 60)), 'JPEG')
    return encode(image, 'JPEG', exif=b'Exif\0\0' + thumbnail)


@pytest.mark.parametrize('whole', [
    encode(Image.open(PHOTO), 'JPEG'), encode(Image.open(PHOTO), 'JPEG', progressive=True),
    photo_with_thumbnail()], ids=['plain', 'progressive', 'with a thumbnail'])
def test_a_jpeg_that_was_cut_off_is_unreadable(tmp_path, whole):
    expected = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)
    for trailer in (b'', b'\0' * 999, b'video \xff\xda video'):
        np.testing.assert_array_equal(decode(tmp_path, whole + trailer), expected)
    # OpenCV would find the missing rows in its memory, perhaps from the image before
    for size in [0, 1, 2, 3, 4, 30, 2000] + [len(whole) * i // 9 for i in range(1, 9)] + [
            len(whole) - 2, len(whole) - 1]:
        assert decode(tmp_path, whole[:size]) is None
        # as by a file system that has lost blocks
        assert decode(tmp_path, whole[:size] + bytes(len(whole) - size)) is None


def test_a_jpeg_with_a_hole_is_the_same_every_time(tmp_path):
    whole = encode(Image.open(PHOTO), 'JPEG')
    holed = whole[:len(whole) // 2] + whole[-100:]
    seen = []
    for before in (0, 255):
        noise = np.full((375, 500, 3), before, np.uint8)
        assert decode(tmp_path, cv2.imencode('.png', noise)[1].tobytes()) is not None
        seen.append(decode(tmp_path, holed))
    np.testing.assert_array_equal(*seen)
    np.testing.assert_array_equal(seen[0][:100], decode(tmp_path, whole)[:100])


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'BMP', 'TIFF', 'PPM'])
def test_other_kinds_that_were_cut_off_are_unreadable(tmp_path, kind):
    whole = encode(Image.open(PHOTO).resize((64, 48)), kind)
    assert decode(tmp_path, whole) is not None
    for size in range(0, len(whole) - 64, len(whole) // 20):
        assert decode(tmp_path, whole[:size]) is None


@pytest.mark.parametrize('content', [
    b'', b'not an image', b'<html></html>', b'\x89PNG\r\n\x1a\n', b'\xff\xd8', b'\xff\xd8\xff\xd9',
    encode(flat('RGB', (1, 2, 3)), 'GIF')])  # this OpenCV has no GIF
def test_unreadable(tmp_path, content):
    assert decode(tmp_path, content) is None
    assert read_image(str(tmp_path / 'gone.png')) is None
    assert read_image(str(tmp_path)) is None


def test_the_next_readable_image_takes_the_place(tmp_path):
    for i in range(5):
        write_image(tmp_path / '{}.png'.format(i), value=i)
    for i in (3, 4):
        (tmp_path / '{}.png'.format(i)).write_bytes(b'')
    reported = []
    reader = decoder.ImageReader(image_lists.list_images(str(tmp_path)), reported.append)
    for index, expected in [(2, 2), (4, 0), (3, 0), (4, 0)]:
        actual, image = reader.read(index)
        assert (actual, image[0, 0, 0]) == (expected, expected)
    assert reported == [4, 3]

    for i in range(3):
        (tmp_path / '{}.png'.format(i)).write_bytes(b'')
    with pytest.raises(UserError, match='none of the 5 images'):
        reader.read(0)
