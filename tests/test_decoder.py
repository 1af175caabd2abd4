"""decoder.py: every kind of file becomes the right pixels, or is refused with a reason."""
import contextlib
import io
import itertools
import multiprocessing
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import decoder
import formats
import file_lists
import image_lists
from errors import UserError
from images import PHOTO, write_image

SMALL = Image.open(PHOTO).resize((32, 24))


def encode(image, kind, **options):
    """The bytes of a file of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode, colour, size=(24, 16)):
    return Image.new(mode, size, colour)


def pixels(content):
    return decoder.decode(content)[0]


def refuse(content):
    """Why it cannot be read."""
    with pytest.raises(ValueError) as caught:
        decoder.decode(content)
    return str(caught.value)


def chunk(name, content):
    return struct.pack('>L', len(content)) + name + content + struct.pack(
        '>L', zlib.crc32(name + content))


def add_chunk(png, name, content):
    """A PNG with a chunk behind its header."""
    return png[:33] + chunk(name, content) + png[33:]


def png(numbers, bits, kind=0, interlaced=False):
    """A PNG of numbers [h, w, channels]; kind: 0 gray, 2 RGB, 4 gray with alpha, 6 RGBA."""
    height, width = numbers.shape[:2]
    content = b''
    for y, x, dy, dx in [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
                         (0, 1, 2, 2), (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]:
        part = numbers[y::dy, x::dx]
        planes = part.reshape(len(part), -1, 1) >> np.arange(bits - 1, -1, -1) & 1  # bits
        rows = np.packbits(np.uint8(planes).reshape(len(part), -1), axis=1)
        content += b''.join(b'\0' + row.tobytes() for row in rows)
    return b'\x89PNG\r\n\x1a\n' + chunk(
        b'IHDR', struct.pack('>LLBBBBB', width, height, bits, kind, 0, 0, interlaced)) + chunk(
            b'IDAT', zlib.compress(content)) + chunk(b'IEND', b'')


def tiff(numbers, order='<', big=False, **tags):
    """A TIFF or BigTIFF of numbers [h, w, channels], not compressed; more tags: t274=(3,)."""
    height, width, channels = numbers.shape
    content = numbers.astype(numbers.dtype.newbyteorder(order)).tobytes()
    entries = {256: (width,), 257: (height,), 258: (8 * numbers.itemsize,) * channels, 259: (1,),
               262: (2 if channels >= 3 else 1,), 273: (1000,), 277: (channels,), 278: (height,),
               279: (len(content),)}
    entries.update({int(name[1:]): values for name, values in tags.items()})
    file, extra = (struct.pack(order + 'HHHQQ', 43, 8, 0, 16, len(entries)) if big else
                   struct.pack(order + 'HLH', 42, 8, len(entries))), 500
    file, more = (b'II' if order == '<' else b'MM') + file, b''
    number, size = ('Q', 8) if big else ('L', 4)
    for tag, values in sorted(entries.items()):
        value = struct.pack(order + '%dH' % len(values), *values)
        if len(value) > size:
            value, more = struct.pack(order + number, extra + len(more)), more + value
        file += struct.pack(order + 'HH' + number, tag, 3, len(values)) + value.ljust(size, b'\0')
    return (file.ljust(extra, b'\0') + more).ljust(1000, b'\0') + content


def over_white(rgba):
    """RGBA of 0 to 255 to BGR."""
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., 2::-1] * alpha + 255 * (1 - alpha))


# ------------------------------------------------------------------------------------------ pixels

def test_a_red_pixel_is_bgr():
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 2] = 255
    image, warning = decoder.decode(cv2.imencode('.png', red)[1].tobytes())
    np.testing.assert_array_equal(image, red)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and warning == ''


# name: (content, shape, colour of all pixels: BGR)
KINDS = {
    # 255 - (cyan, magenta, yellow), each times 1 - black
    'CMYK JPEG': (encode(flat('CMYK', (5, 205, 155, 51)), 'JPEG', quality=100), (16, 24),
                  [80, 40, 200]),
    'gray JPEG': (encode(flat('L', 77), 'JPEG'), (16, 24), [77, 77, 77]),
    'progressive JPEG': (encode(flat('RGB', (80, 80, 80)), 'JPEG', progressive=True), (16, 24),
                         [80, 80, 80]),
    'WebP': (encode(flat('RGB', (200, 120, 60)), 'WEBP', quality=100), (16, 24),
             [60, 120, 200]),
    'one pixel': (encode(flat('RGB', (80, 80, 80), (1, 1)), 'JPEG'), (1, 1), [80, 80, 80]),
    '20,000 pixels wide': (encode(flat('RGB', (80, 80, 80), (20000, 10)), 'JPEG'), (10, 20000),
                           [80, 80, 80]),
}


@pytest.mark.parametrize('kind', sorted(KINDS))
def test_lossy_kinds_become_bgr_of_8_bits(kind):
    content, shape, colour = KINDS[kind]
    image = pixels(content)
    assert image.dtype == np.uint8 and image.shape == shape + (3,)
    np.testing.assert_allclose(image, np.broadcast_to(colour, image.shape), atol=2)


def lossless_images():
    """(name, content, whether its libraries turn it) of what Pillow writes."""
    rgba = SMALL.copy()
    rgba.putalpha(Image.fromarray(np.arange(768, dtype=np.uint8).reshape(24, 32)))
    palette = SMALL.quantize(16)
    images = {'1': SMALL.convert('1'), 'L': SMALL.convert('L'), 'LA': rgba.convert('LA'),
              'P': palette, 'RGB': SMALL, 'RGBA': rgba, 'CMYK': SMALL.convert('CMYK')}
    for kind, modes, options in [
            ('PNG', '1 L LA P RGB RGBA', [{}, {'optimize': True}]),
            ('PNG', 'P', [{'transparency': bytes(range(0, 256, 16))}, {'transparency': 5}]),
            ('PNG', 'RGB', [{'transparency': SMALL.getpixel((0, 0))},
                            {'save_all': True, 'append_images': [rgba.rotate(90)]}]),
            ('WebP', 'RGB RGBA', [{'lossless': True, 'exact': True},
                                  {'lossless': True, 'exact': True, 'save_all': True,
                                   'append_images': [SMALL.rotate(90)]}]),
            ('TIFF', '1 L LA P RGB RGBA CMYK', [{}, {'compression': 'tiff_lzw'}]),
            ('TIFF', '1', [{'compression': 'group4'}]),
            ('TIFF', 'RGB', [{'save_all': True, 'append_images': [SMALL.rotate(90)]}]),
            ('GIF', 'P', [{}, {'transparency': 5},
                          {'save_all': True, 'append_images': [palette.rotate(90)]}]),
            ('BMP', '1 L P RGB RGBA', [{}]), ('PPM', '1 L RGB', [{}])]:
        for mode, option in itertools.product(modes.split(), options):
            for orientation in range(1, 9 if kind in ('PNG', 'WebP', 'TIFF') else 2):
                exif = Image.Exif()
                exif[0x0112] = orientation
                tag = {} if orientation == 1 else (
                    {'tiffinfo': {0x0112: orientation}} if kind == 'TIFF' else
                    {'exif': exif.tobytes()})
                name = ' '.join([kind, mode, *option, str(orientation)])
                yield pytest.param(encode(images[mode], kind, **option, **tag), id=name)


@pytest.mark.parametrize('content', list(lossless_images()))
def test_pixels_are_pillows(content):
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.format != 'TIFF':  # Pillow 9 does not note that it has turned it
        image = ImageOps.exif_transpose(image)
    if image.format == 'BMP':
        image = image.convert('RGB')
    actual = pixels(content)
    assert actual.shape[:2] in ((24, 32), (32, 24)) and actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, over_white(np.asarray(image.convert('RGBA'))))


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF', 'TIFF of 16 bits',
                                  'PNG of 16 bits'])
def test_images_are_turned_as_their_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.asarray(SMALL)[..., ::-1]
    if kind == 'TIFF of 16 bits':
        content = tiff(257 * np.asarray(SMALL).astype(np.uint16), t274=(orientation,))
    elif kind == 'PNG of 16 bits':
        content = add_chunk(png(257 * np.asarray(SMALL).astype(int), 16, 2), b'eXIf',
                            exif.tobytes()[6:])
    elif kind == 'TIFF':
        content = encode(SMALL, kind, tiffinfo={0x0112: orientation})
    else:
        content = encode(SMALL, kind, exif=exif.tobytes(), lossless=True)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))[..., ::-1]
    # rows and columns of the file become what the standard says
    expected = expected.swapaxes(0, 1) if orientation > 4 else expected
    axes = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    expected = np.flip(expected, axes)
    np.testing.assert_allclose(pixels(content), expected, atol=3 if kind == 'JPEG' else 0)


EXIF = b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<HHHLLL', 1, 0x0112, 3, 1, 6, 0)
XMP = b'http://ns.adobe.com/xap/1.0/\0<x/>'
RAW = b'\nexif\n%8d\n' % len(EXIF) + EXIF.hex().encode()
# kind of image: where else its orientation, 6, may be
TURNED = {'JPEG': [(XMP, EXIF), (b'FLIR\0\0', XMP, EXIF), (EXIF, XMP),
                   (EXIF, EXIF[:-8] + bytes(8))],
          'PNG': [(b'tEXt', b'Raw profile type exif\0' + RAW),
                  (b'zTXt', b'Raw profile type exif\0\0' + zlib.compress(RAW)),
                  (b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')]}
UPRIGHT = {'JPEG': [(XMP, XMP), (XMP, EXIF[:12] + b'junk'), (EXIF[:-8] + bytes(8), EXIF),
                    (b'junk\0\0' + EXIF[6:], EXIF[:-8] + bytes(8))],
           'PNG': [(b'tEXt', b'Raw profile type exif\0junk'),
                   (b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="1"/>')]}


@pytest.mark.parametrize('kind, parts, turned', [
    (kind, parts, table is TURNED) for table in (TURNED, UPRIGHT) for kind in table
    for parts in table[kind]])
def test_orientations_are_found_elsewhere(kind, parts, turned, recwarn):
    plain = encode(SMALL, kind)
    content = add_chunk(plain, *parts) if kind == 'PNG' else plain[:2] + b''.join(
        struct.pack('>HH', 0xffe1, 2 + len(part)) + part for part in parts) + plain[2:]
    np.testing.assert_array_equal(pixels(content), np.rot90(pixels(plain), -1 if turned else 0))
    assert not len(recwarn)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_only_exif_needs_pillow(kind, monkeypatch):
    content = encode(SMALL, kind)
    monkeypatch.setattr(Image, 'open', None)
    assert pixels(content).shape == (24, 32, 3)


@pytest.mark.parametrize('exif', [b'MM\0*\0\0\xff\xff junk', b'junk'])
def test_exif_that_is_damaged_turns_nothing(exif):
    content = add_chunk(encode(SMALL, 'PNG'), b'eXIf', exif)
    np.testing.assert_array_equal(pixels(content), np.asarray(SMALL)[..., ::-1])


def random_numbers(bits, channels):
    numbers = np.random.RandomState(bits).randint(0, 2**bits, (20, 30, channels))
    numbers[0, 0] = 2**bits - 1
    return numbers


@pytest.mark.parametrize('bits', range(8, 17))
def test_16_bits_are_scaled_by_those_in_use(bits):
    for channels, png_kind in ((1, 0), (3, 2)):
        numbers = random_numbers(bits, channels)
        expected = np.broadcast_to(np.rint(numbers * 255 / (2**bits - 1))[..., ::-1], (20, 30, 3))
        deep = numbers.astype(np.uint16)
        netpbm = b'P%d 30 20 65535\n' % (5 if channels == 1 else 6) + deep.astype('>u2').tobytes()
        for content in (png(numbers, 16, png_kind), png(numbers, 16, png_kind, True), tiff(deep),
                        tiff(deep, '>'), tiff(deep, big=True), netpbm, tiff(
                            deep, t278=(16,), t273=(1000, 1000 + 960 * channels),  # two strips
                            t279=(960 * channels, 240 * channels))):
            np.testing.assert_array_equal(pixels(content), expected)


def test_constants_of_16_bits():
    for number, expected in ((0, 0), (255, 255), (256, 128), (4095, 255), (0x80ff, 128)):
        image = pixels(cv2.imencode('.png', np.full((2, 2), number, np.uint16))[1].tobytes())
        np.testing.assert_array_equal(image, np.full((2, 2, 3), expected))
    # as the bytes that IDAT begins with, which are no transparent gray
    assert pixels(png(np.full((1, 1, 1), 0x789c), 16)).tolist() == [[[240] * 3]]


@pytest.mark.parametrize('bits', [12, 16])
def test_16_bits_with_alpha(bits):
    colour, alpha = random_numbers(bits, 3), random_numbers(16, 1)
    rgba = np.rint(np.concatenate([colour * 255 / (2**bits - 1), alpha * 255 / 65535], axis=2))
    both = np.concatenate([colour, alpha], axis=2)
    gray = np.concatenate([colour[..., :1], alpha], axis=2)
    for content in (png(both, 16, 6), tiff(both.astype(np.uint16)),
                    tiff(both.astype(np.uint16), t338=(2,))):
        np.testing.assert_array_equal(pixels(content), over_white(rgba))
    largest = 2**max(8, int(gray[..., 0].max()).bit_length()) - 1
    gray = np.rint(np.concatenate([gray[..., :1] * 255 / largest] * 3 + [alpha * 255 / 65535], 2))
    np.testing.assert_array_equal(
        pixels(png(np.concatenate([colour[..., :1], alpha], axis=2), 16, 4)), over_white(gray))


@pytest.mark.parametrize('bits', [1, 2, 4, 8, 16])
def test_one_gray_of_a_png_may_be_transparent(bits):
    numbers = random_numbers(bits, 1)
    clear = int(numbers[7, 7, 0])
    content = add_chunk(add_chunk(png(numbers, bits), b'tRNS', struct.pack('>H', clear)),
                        b'tEXt', b'Comment\0not tRNS, IDAT')
    expected = np.where(numbers == clear, 255, np.rint(numbers * 255 / (2**bits - 1)))
    np.testing.assert_array_equal(pixels(content), np.broadcast_to(expected, (20, 30, 3)))


@pytest.mark.parametrize('largest', [1, 15, 100, 255, 256, 1023, 4095, 65534])
def test_a_ppm_says_its_largest_number(largest):
    numbers = np.random.RandomState(0).randint(0, largest + 1, (2, 5, 3))
    for kind, values in ((6, numbers), (5, numbers[..., :1]), (3, numbers), (2, numbers[..., :1])):
        body = (values.astype('>u2' if largest > 255 else 'u1').tobytes() if kind > 3 else
                ' '.join(map(str, values.ravel())).encode())
        content = b'P%d\n# 7 7\n5  2\n%d\n' % (kind, largest) + body
        expected = np.floor(values * 255 / largest + 0.5)[..., ::-1]
        np.testing.assert_array_equal(pixels(content), np.broadcast_to(expected, (2, 5, 3)))
        assert refuse(content[:-2 if kind > 3 else -12]).startswith(
            'is a PPM that ' + ('cannot be decoded: ' if largest == 255 else 'was cut off'))


def test_bmps_are_opaque():
    rgba = encode(flat('RGBA', (200, 30, 60, 0)), 'BMP')
    assert rgba[28] == 32  # bits per pixel
    assert pixels(rgba)[0, 0].tolist() == [60, 30, 200]
    # with a mask of alpha, as editors write it
    header = struct.pack('<LllHHLLllLLLLLL16x', 56, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0,
                         0xff0000, 0xff00, 0xff, 0xff000000)[:56]
    bmp = b'BM' + struct.pack('<LLL', 14 + 56 + 8, 0, 14 + 56) + header + b'\x3c\x1e\xc8\0' * 2
    assert pixels(bmp).tolist() == [[[60, 30, 200]] * 2]
    # with masks in which OpenCV would not look
    header = struct.pack('<LllHHLLllLLLLL', 40, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0,
                         0xff000000, 0xff0000, 0xff00)
    bmp = b'BM' + struct.pack('<LLL', 14 + 52 + 8, 0, 14 + 52) + header + b'\0\x3c\x1e\xc8' * 2
    assert pixels(bmp).tolist() == [[[60, 30, 200]] * 2]
    assert refuse(bmp.replace(b'\xff\0', b'\x3f\0')) == (
        'is a BMP that cannot be decoded: Unsupported BMP bitfields layout')
    # white of 16 bits
    header = struct.pack('<LllHHLLllLL', 40, 2, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    bmp = b'BM' + struct.pack('<LLL', 14 + 40 + 4, 0, 14 + 40) + header + b'\xff\x7f' * 2
    assert pixels(bmp).tolist() == [[[255] * 3] * 2]


# ------------------------------------------------------------------------------------ cut-off JPEGs

def jpegs():
    """name: content of kinds of JPEG, some with a whole JPEG in their header."""
    image = Image.open(PHOTO)
    thumbnail = encode(image.resize((80, 60)), 'JPEG')
    small = np.asarray(SMALL)
    kinds = {'plain': encode(image, 'JPEG'), 'with a thumbnail': encode(
        image, 'JPEG', exif=b'Exif\0\0' + thumbnail)}
    for progressive, restarts in itertools.product((0, 1), (0, 1)):
        flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_RST_INTERVAL, restarts]
        kinds['small, %d, %d' % (progressive, restarts)] = cv2.imencode(
            '.jpg', small, flags)[1].tobytes()
    return kinds


JPEGS = jpegs()


@pytest.mark.parametrize('kind', sorted(JPEGS))
def test_a_jpeg_that_was_cut_off_is_refused(kind):
    whole = JPEGS[kind]
    expected = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)
    for trailer in (b'', b'\0' * 999, b'video \xff\xda video', whole, JPEGS['plain'][:-999]):
        image, warning = decoder.decode(whole + trailer)
        np.testing.assert_array_equal(image, expected)
        assert warning == ''
    # OpenCV would find the missing rows in its memory, perhaps from the image before
    sizes = [2, 3, 4, 30] + [len(whole) * i // 9 for i in range(1, 9)] + [
        len(whole) - 2, len(whole) - 1]
    for size in sizes:
        assert refuse(whole[:size]) == 'is a JPEG that was cut off'
        # as by a file system that has lost blocks
        assert refuse(whole[:size] + bytes(len(whole) - size)) == 'is a JPEG that was cut off'


@pytest.mark.parametrize('kind', [kind for kind in sorted(JPEGS) if 'small' in kind])
def test_a_jpeg_that_was_cut_off_is_refused_if_another_is_behind(kind):
    # wherever: in a scan, between scans, in a restart marker; and between parts of the header
    whole = JPEGS[kind]
    start = whole.index(b'\xff\xda')
    for size in [2, whole.index(b'\xff\xdb'), start, *range(start + 14, len(whole) - 3)]:
        for other in ('small, 0, 0', 'small, 1, 0'):
            assert refuse(whole[:size] + JPEGS[other]) == 'is a JPEG that was cut off'


def test_a_jpeg_that_is_broken_in_the_middle():
    whole = JPEGS['plain']
    half = len(whole) // 2
    for end in (b'\xff\xd9', whole[half + 99:]):
        assert refuse(whole[:half] + end) == (
            'is a JPEG that lacks a part: Corrupt JPEG data: premature end of data segment')
    # between restart markers, which it may lack
    small = JPEGS['small, 0, 1']
    for end in (b'\xff\xd9', small[small.index(b'\xff\xd1'):]):
        assert refuse(small[:small.index(b'\xff\xd0')] + end).startswith(
            'is a JPEG that lacks a part: Corrupt JPEG data: found marker 0xd')
    # one that has a piece twice is used, but has nothing of other images
    seen = []
    for before in (0, 255):
        noise = np.full((375, 500, 3), before, np.uint8)
        pixels(cv2.imencode('.png', noise)[1].tobytes())
        seen.append(decoder.decode(whole[:half] + whole[half - 99:]))
    assert [said for _, said in seen] == [
        'Corrupt JPEG data: 49 extraneous bytes before marker 0xd9'] * 2
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    np.testing.assert_array_equal(seen[0][0][:100], pixels(whole)[:100])


# ------------------------------------------------------------------------------------- other files

def huge_png():
    """A PNG that says that it has 40,000 x 40,000 pixels."""
    content = chunk(b'IHDR', struct.pack('>LLBBBBB', 40000, 40000, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + content + chunk(b'IDAT', zlib.compress(bytes(9)))


def huge_jpeg():
    at = JPEGS['plain'].index(b'\xff\xc0') + 5  # height and width in the frame's header
    return JPEGS['plain'][:at] + struct.pack('>HH', 40000, 40000) + JPEGS['plain'][at + 4:]


def change_frame(at, byte):
    at += JPEGS['plain'].index(b'\xff\xc0') + 1  # its marker, two bytes of length, bits
    return JPEGS['plain'][:at] + bytes([byte]) + JPEGS['plain'][at + 1:]


LOSSLESS = 'is a lossless JPEG, for which there is no decoder here'
TOO_LARGE = ('cannot be decoded: Image size (1600000000 pixels) exceeds limit of 178956970 pixels, '
             'could be decompression bomb DOS attack.')
ONE = np.ones((3, 4, 1), np.uint16)
PLANES = ('is a TIFF of 16-bit numbers in separate planes, or with white as 0, which is not read '
          'here')
# content, reason
REFUSED = [
    (b'', 'is empty'),
    (bytes(1000), 'holds nothing but zeros'),
    (b'not an image\n', 'is text, not an image'),
    (b'\n<!DOCTYPE html><p>404', 'is HTML text, not an image'),
    (b'\xef\xbb\xbf<html>404', 'is HTML text, not an image'),
    (b'\xef\xbb\xbfnot an image\n', 'is text, not an image'),
    (b'MM\0+\0\x08\0\0', 'is a BigTIFF, for which there is no decoder here'),
    (b'\0\0\0\x18ftypheic\0\0\0\0', 'is a HEIC or AVIF, for which there is no decoder here'),
    (b'\0\0\0\x20ftypavif\0\0\0\0', 'is a HEIC or AVIF, for which there is no decoder here'),
    (b'%PDF-1.5\n%\xd0\xd4\xc5\xd8\n', 'is none of JPEG, PNG, WebP, GIF, TIFF, BMP, PPM: '
     'its first bytes are 255044462d312e35'),
    (b'\xff\xd8', 'is a JPEG that was cut off'),
    (b'\xff\xd8\xff\xd9', 'is a JPEG that was cut off'),
    (b'\x89PNG\r\n\x1a\n', 'is a PNG that cannot be decoded here'),
    (b'RIFF\0\0\0\0WEBPVP8 ', 'is a WebP that cannot be decoded: '),
    (b'GIF89a\1\0\1\0\0\0\0;', 'is a GIF that cannot be decoded here'),
    (b'P6 0 5 100\n', 'is a PPM of 0 x 5 numbers up to 100'),
    (b'P6 5 5 65536\n' + bytes(150), 'is a PPM of 5 x 5 numbers up to 65536'),
    (huge_png(), 'is a PNG that ' + TOO_LARGE), (huge_jpeg(), 'is a JPEG that ' + TOO_LARGE),
    # Pillow makes do without its last chunk, but would take the upper 8 bits
    (png(ONE, 16)[:-12], 'is a PNG of 16 bits that OpenCV cannot decode'),
    (tiff(ONE.astype(np.float32), t339=(3,)),
     'is a TIFF of floating-point numbers, whose range nothing tells'),
    (tiff(np.ones((3, 4, 3), np.float32), t339=(3, 3, 3)),
     'is a TIFF of floating-point numbers, whose range nothing tells'),
    (tiff(ONE.astype(np.int8), t339=(2,)),
     'is a TIFF of signed numbers, whose range nothing tells'),
    (tiff(ONE, t339=(4,)), 'is a TIFF of numbers of unknown kind, whose range nothing tells'),
    (tiff(ONE.astype(np.uint32)), 'is a TIFF of 32-bit numbers, whose range nothing tells'),
    (tiff(ONE, t258=(12,)), 'is a TIFF of 12-bit numbers, whose range nothing tells'),
    (tiff(ONE, t254=(1,)), 'is a TIFF whose first page is a thumbnail, as in raw photographs'),
    (tiff(ONE.astype(np.uint8), t259=(34712,)),
     'is a TIFF that cannot be decoded (compression 34712)'),
    (change_frame(0, 0xc3), LOSSLESS), (change_frame(0, 0xf7), LOSSLESS),
    (change_frame(3, 12), 'is a JPEG of 12 bits, for which there is no decoder here'),
    (tiff(np.ones((3, 4, 2), np.uint8)), 'is a TIFF of 2 channels'),
    (tiff(np.ones((3, 4, 5), np.uint8)), 'is a TIFF of 5 channels'),
    (tiff(ONE)[:8], 'is a TIFF that was cut off'),
    (tiff(ONE, t262=(0,)), PLANES), (tiff(np.ones((3, 4, 3), np.uint16), t284=(2,)), PLANES),
] + [(tiff(ONE, **tags), 'is a TIFF that was cut off') for tags in [
    {'t279': (23,)}, {'t273': (1001,)}, {'t257': (4,)}, {'t278': (2,)},  # bytes, start, rows
    {'t273': (1000, 1016), 't279': (15, 9), 't278': (2,)},  # the first strip lacks a byte
    {'t322': (16,), 't323': (16,), 't324': (600,), 't325': (96,)}]  # tiles of 16 x 16
] + [(tiff(numbers, **tags), 'is a TIFF of 16-bit numbers that are neither gray nor RGB nor RGBA')
     for numbers, tags in [
         (np.ones((3, 4, 4), np.uint16), {'t262': (5,)}),  # CMYK
         (np.ones((3, 4, 4), np.uint16), {'t338': (1,)})]]  # colours are multiplied by alpha


@pytest.mark.parametrize('content, reason', REFUSED)
def test_refused(content, reason, capfd, recwarn):
    actual = refuse(content)
    assert actual == reason or reason[-2:] == ': ' and actual[:len(reason)] == reason != actual
    assert 'object at' not in actual
    assert capfd.readouterr().err == '' and not len(recwarn)


@pytest.mark.parametrize('kind', ['PNG', 'WebP', 'BMP', 'TIFF', 'PPM', 'GIF', 'TIFF of 16 bits',
                                  'PNG of 16 bits', 'interlaced PNG'])
def test_other_kinds_that_were_cut_off_are_refused(kind):
    image = Image.open(PHOTO).resize((64, 48))
    deep = 257 * np.asarray(image).astype(int)
    whole = {'TIFF of 16 bits': lambda: tiff(deep.astype(np.uint16)),
             'PNG of 16 bits': lambda: png(deep, 16, 2),
             'interlaced PNG': lambda: png(np.asarray(image), 8, 2, True)}.get(
                 kind, lambda: encode(image, kind))()
    assert pixels(whole).shape == (48, 64, 3)
    for size in range(0, len(whole) - 64, len(whole) // 20):
        assert refuse(whole[:size]).startswith('is')


# --------------------------------------------------------------------------------- what is reported

def bad_profile():
    """A PNG that libpng warns of."""
    return add_chunk(encode(SMALL, 'PNG'), b'iCCP', b'x\0\0' + zlib.compress(bytes(200)))


WARNED = [(bad_profile(), 'libpng warning: iCCP: '),
          (JPEGS['plain'][:-2] + bytes(12) + b'\xff\xd9',
           'Corrupt JPEG data: 11 extraneous bytes before marker 0xd9')]


@pytest.mark.parametrize('content, warning', WARNED)
def test_what_libraries_say_is_returned_and_not_printed(content, warning, capfd):
    for _ in range(2):
        image, said = decoder.decode(content)
        assert said.startswith(warning) and len(said) <= 120 and '\n' not in said
        assert decoder.decode(JPEGS['plain'])[1] == ''
    assert capfd.readouterr().err == ''
    os.write(2, b'still here')
    assert capfd.readouterr().err == 'still here'


def test_a_long_story_is_cut(monkeypatch):
    monkeypatch.setattr(formats, 'read', lambda *_: os.write(2, b'x' * 999 + b'\ny'))
    assert decoder.decode(WARNED[0][0])[1] == 'x' * 120


def test_python_warnings_are_not_printed(recwarn):
    # Pillow says that a tag has too many entries
    assert pixels(tiff(np.zeros((3, 4, 1), np.uint8), t296=(2, 2))).shape == (3, 4, 3)
    assert not len(recwarn)


def decode_often(content):
    return {decoder.decode(content)[1] for _ in range(300)}


def test_processes_do_not_hear_each_other():
    decoder.decode(WARNED[0][0])
    with contextlib.closing(multiprocessing.get_context('fork').Pool(2)) as pool:
        said = pool.map(decode_often, [WARNED[0][0], WARNED[1][0], JPEGS['plain']] * 2, 1)
    assert [len(one) for one in said] == [1] * 6
    assert said[0] == said[3] != said[1] == said[4] and said[2] == said[5] == {''}


def test_the_next_readable_image_takes_the_place(tmp_path):
    for i in range(7):
        write_image(tmp_path / '{}.png'.format(i), value=i)
    for i in (3, 4):
        (tmp_path / '{}.png'.format(i)).write_bytes(b'')
    for i, path in ((5, 'nowhere'), (6, '.')):
        (tmp_path / '{}.png'.format(i)).unlink()
        (tmp_path / '{}.png'.format(i)).symlink_to(tmp_path / path)
    (tmp_path / '2.png').write_bytes(bad_profile())
    files = file_lists.FileList(str(tmp_path), *file_lists.pack_names(
        '{}.png'.format(i) for i in range(7)))
    reported = []
    reader = decoder.ImageReader(image_lists.ImageList(files, None, None),
                                 lambda *report: reported.append(report))
    for index, expected in [(1, 1), (4, 0), (3, 0), (4, 0), (2, 2), (2, 2)]:
        actual, image = reader.read(index)
        assert actual == expected and (expected == 2 or image[0, 0, 0] == expected)
    assert reported == [(4, 'is empty', True), (5, 'No such file or directory', True),
                        (6, 'Is a directory', True), (3, 'is empty', True),
                        (2, decoder.decode(bad_profile())[1], False)]

    for i in range(3):
        (tmp_path / '{}.png'.format(i)).write_bytes(b'')
    with pytest.raises(UserError, match='none of the 7 images'):
        reader.read(0)
