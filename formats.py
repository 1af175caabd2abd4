"""Pixels of image files that are no JPEG, or one that OpenCV cannot read."""
import contextlib
import io
import re
import warnings
from typing import List, Optional, Tuple

import cv2
import numpy as np

# how the files begin that are read here, under Pillow's names of their formats, and some others
FORMATS = {'JPEG': rb'\xff\xd8', 'PNG': rb'\x89PNG', 'WebP': rb'(?s)RIFF....WEBP', 'GIF': rb'GIF8',
           'TIFF': rb'II[*+]\0|MM\0\*', 'BMP': rb'BM', 'PPM': rb'P[1-6][\s#]'}
OTHERS = {'is empty': rb'\Z', 'holds nothing but zeros': rb'\0+\Z',
          'is HTML text, not an image':
              rb'(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)',
          'is text, not an image': rb'(\xef\xbb\xbf)?([\t-\r -~]{200}|[\t-\r -~]+\Z)',
          'is a BigTIFF, for which there is no decoder here': rb'MM\0\+',
          'is a HEIC or AVIF, for which there is no decoder here':
              rb'(?s)....ftyp(avi|hei|hev|mif|msf)'}
# what is in those in which Pillow finds an orientation; a TIFF's is no EXIF: both libraries turn it
EXIF = {'PNG': (b'eXIf', b'Raw profile type exif', b'tiff:Orientation'), 'WebP': (b'EXIF',),
        'JPEG': (b'Exif',)}
BGR_MASKS = bytes.fromhex('0000ff00 00ff0000 ff000000')  # of a BMP's pixels of 32 bits
# of segments of a JPEG; the last are the start of a scan and that of a next image
MARKERS_WITHOUT_LENGTH = {0x00, 0x01, 0xff, *range(0xd0, 0xd8), 0xd9}
LAST_MARKERS = {0xd8, 0xda}


class Unreadable(ValueError):
    """Says why, as the end of a sentence about an image."""


def find_format(encoded: bytes) -> str:
    """One of FORMATS."""
    for name, start in FORMATS.items():
        if re.match(start, encoded):
            return name
    for reason, start in OTHERS.items():
        if re.match(start, encoded):
            raise Unreadable(reason)
    raise Unreadable(f'is none of {", ".join(FORMATS)}: its first bytes are {encoded[:8].hex()}')


def list_segments(jpeg: bytes) -> List[Tuple[int, int]]:
    """(marker, where it is) of what is before the first scan, and of its start."""
    segments, at = [], 2
    while at + 4 <= len(jpeg):
        marker = jpeg[at + 1]
        if jpeg[at] != 0xff or marker in MARKERS_WITHOUT_LENGTH:
            at += 1
            continue
        segments.append((marker, at))
        if marker in LAST_MARKERS:
            break
        at += 2 + int.from_bytes(jpeg[at + 2:at + 4], 'big')
    return segments


def read_opencv(encoded: bytes, flags: int) -> Optional[np.ndarray]:
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        return None


def read(encoded: bytes, kind: str) -> np.ndarray:
    """What decoder.decode() promises; by Pillow, if OpenCV does not read it, or not right."""
    has_exif = any(word in encoded for word in EXIF.get(kind, ()))
    image = compression = None
    if kind in ('PNG', 'WebP'):
        image = read_opencv(encoded, cv2.IMREAD_UNCHANGED)
        if image is not None and image.dtype == np.uint8 and image.shape[2:] == (3,) and (
                not has_exif):
            return image
    elif kind == 'BMP' and encoded[28:29] != b'\x10' and (  # of 16 bits OpenCV's white is 248
            encoded[30:31] != b'\3' or encoded[54:66] == BGR_MASKS):  # it does not look at others
        image = read_opencv(encoded, cv2.IMREAD_COLOR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if kind == 'PPM':
                image = read_ppm(encoded)
            elif kind == 'TIFF':
                tags = read_tags(encoded)
                compression = tags.get(259, 1)
                if has_16_bits(tags, len(encoded)):
                    image = read_opencv(encoded, cv2.IMREAD_UNCHANGED)
            elif kind == 'PNG' and image is not None and image.ndim == 2:
                image = add_transparent_gray(image, encoded)
            image = convert(read_pillow(encoded, kind) if image is None else image)
            return turn(image, encoded) if has_exif else image
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise Unreadable('is a ' + explain(error, encoded, kind, compression))


def explain(error: Exception, encoded: bytes, kind: str, compression: Optional[int]) -> str:
    """What follows `is a `."""
    for marker, at in list_segments(encoded) if kind == 'JPEG' else []:
        if marker in (0xc3, 0xc7, 0xcb, 0xcf, 0xf7):
            return 'lossless JPEG, for which there is no decoder here'
        if 0xc0 <= marker < 0xcf and marker not in (0xc4, 0xc8, 0xcc) and encoded[at + 4] != 8:
            return f'JPEG of {encoded[at + 4]} bits, for which there is no decoder here'
    text = str(error) or type(error).__name__
    if re.search(r'BytesIO|-\d+$', text):  # such words of Pillow, or of a decoder, tell nothing
        return f'{kind} that cannot be decoded ' + (
            f'(compression {compression})' if compression else 'here')
    return f'{kind} that cannot be decoded: {text}'


def convert(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 [h, w], [h, w, 1], BGR or BGRA to BGR of 8 bits, as decode() says."""
    image = np.atleast_3d(image)
    colour, alpha = image[..., :3], image[..., 3:]
    if image.dtype == np.uint16:
        colour = scale(colour, 2**max(8, int(colour.max()).bit_length()) - 1)
        alpha = scale(alpha, 2**16 - 1)
    colour = np.array(np.broadcast_to(colour, colour.shape[:2] + (3,)))
    if alpha.size and alpha.min() < 255:
        for top in range(0, len(image), 64):  # some rows at a time, for memory
            rows, clear = colour[top:top + 64], alpha[top:top + 64].astype(np.uint16)
            rows[:] = (rows * clear + 255 * (255 - clear) + 127) // 255
    return colour


def scale(numbers: np.ndarray, largest: int) -> np.ndarray:
    """0 to largest becomes 0 to 255."""
    table = ((510 * np.arange(largest + 1) + largest) // (2 * largest)).astype(np.uint8)
    return table[np.minimum(numbers, largest)]


def turn(image: np.ndarray, encoded: bytes) -> np.ndarray:
    from PIL import Image, ImageOps
    turned = Image.fromarray(image)
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # EXIF that is damaged says nothing
        turned.getexif()[0x0112] = Image.open(io.BytesIO(encoded)).getexif().get(0x0112, 1)
    return np.array(ImageOps.exif_transpose(turned))


def add_transparent_gray(image: np.ndarray, png: bytes) -> np.ndarray:
    """OpenCV forgets that one gray of a PNG may be transparent, and so does Pillow for few bits."""
    at = 8
    while png[at + 4:at + 8] not in (b'tRNS', b'IDAT', b''):
        at += 12 + int.from_bytes(png[at:at + 4], 'big')
    if png[at + 4:at + 8] != b'tRNS':
        return image
    gray, largest = int.from_bytes(png[at + 8:at + 10], 'big'), np.iinfo(image.dtype).max
    gray = gray * largest // (2**png[24] - 1)  # png[24]: bits, of which OpenCV has made 8 or 16
    return cv2.merge([image] * 3 + [np.where(image == gray, 0, largest).astype(image.dtype)])


def read_ppm(encoded: bytes) -> Optional[np.ndarray]:
    """PPM or PGM; None if Pillow reads it right, as it does 0 to 255. It clips others, OpenCV does
    not scale them, and it swaps the bytes of some."""
    header = re.match(rb'P([2356])' + 3 * rb'(?:\s|#[^\n]*\n)+(\d+)' + rb'\s', encoded)
    if not header or int(header.group(4)) == 255:
        return None
    kind, width, height, largest = map(int, header.groups())
    channels, body = 3 if kind in (3, 6) else 1, encoded[header.end():]
    if not (width and height and 0 < largest < 2**16):
        raise Unreadable(f'is a PPM of {width} x {height} numbers up to {largest}')
    numbers = (np.array(body.split(), np.bytes_).astype(int) if kind < 5 else
               np.frombuffer(body[:len(body) // 2 * 2], '>u2') if largest > 255 else
               np.frombuffer(body, np.uint8))[:height * width * channels]
    if len(numbers) < height * width * channels:
        raise Unreadable('is a PPM that was cut off')
    numbers = numbers.reshape(height, width, channels)[..., ::-1]
    return numbers.astype(np.uint16) if largest == 2**16 - 1 else scale(numbers, largest)


def read_tags(tiff: bytes) -> dict:
    """Of the first page."""
    from PIL import TiffImagePlugin
    header = tiff[:16 if tiff[2:3] == b'+' else 8]  # +: BigTIFF
    file, tags = io.BytesIO(tiff), TiffImagePlugin.ImageFileDirectory_v2(header)
    if tags.next >= len(tiff):
        raise Unreadable('is a TIFF that was cut off')
    file.seek(tags.next)
    tags.load(file)
    return tags


def has_16_bits(tags: dict, size: int) -> bool:
    """Whether OpenCV reads a TIFF of `size` bytes right, and not Pillow; Unreadable if neither
    does."""
    if tags.get(254, 0) & 1:
        raise Unreadable('is a TIFF whose first page is a thumbnail, as in raw photographs')
    bits, formats = set(tags.get(258, (1,))), set(tags.get(339, (1,)))
    channels, extra = tags.get(277, 1), tuple(tags.get(338, ()))
    numbers = ('floating-point numbers' if 3 in formats else 'signed numbers' if 2 in formats else
               'numbers of unknown kind' if formats != {1} else
               f'{max(bits)}-bit numbers' if not bits <= {1, 2, 4, 8} and bits != {16} else None)
    if numbers:
        raise Unreadable(f'is a TIFF of {numbers}, whose range nothing tells')
    if channels > 4 or channels == 2 and extra != (2,):  # (2,): alpha
        raise Unreadable(f'is a TIFF of {channels} channels')
    layout = tags.get(284, 1), tags.get(262), channels, extra
    if bits == {16} and layout not in (
            (1, 1, 1, ()), (1, 2, 3, ()), (1, 2, 4, ()), (1, 2, 4, (2,))):
        raise Unreadable('is a TIFF of 16-bit numbers ' + (
            'in separate planes, or with white as 0, which is not read here'
            if layout[0] == 2 or layout[1] == 0 else 'that are neither gray nor RGB nor RGBA'))
    if bits == {16} and lacks_data(tags, size):
        raise Unreadable('is a TIFF that was cut off')
    return bits == {16}


def lacks_data(tags: dict, size: int) -> bool:
    """Whether a TIFF of 16 bits has fewer strips or tiles than its size needs, or not all of one.
    OpenCV leaves the memory of such rows as it is."""
    width, height, tiled = tags[256], tags[257], 322 in tags
    across, down = (tags[322], tags[323]) if tiled else (width, min(height, tags.get(278, height)))
    starts, counts = tags.get(324 if tiled else 273, ()), tags.get(325 if tiled else 279, ())
    parts = -(-width // across) * -(-height // down)
    if min(len(starts), len(counts)) < parts:
        return True
    for i in range(parts):
        rows = down if tiled else min(down, height - i * down)
        needed = 2 * tags.get(277, 1) * across * rows if tags.get(259, 1) == 1 else 1
        if counts[i] < needed or starts[i] + counts[i] > size:
            return True
    return False


def read_pillow(encoded: bytes, kind: str) -> np.ndarray:
    """BGR or BGRA of 8 bits."""
    from PIL import Image
    with Image.open(io.BytesIO(encoded), formats=[kind.upper()]) as image:
        # Pillow takes the upper 8 of 16 bits; in a BMP, 16 are those of a pixel
        deep = image.mode[0] in 'IFH' or kind != 'BMP' and ';16' in str(image.tile)
        image.load()
        if deep:
            raise Unreadable(f'is a {kind} of 16 bits that OpenCV cannot decode')
        alpha = kind != 'BMP' and ('A' in image.mode.upper() or 'transparency' in image.info)
        pixels = np.asarray(image.convert('RGBA' if alpha else 'RGB'))
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if alpha else cv2.COLOR_RGB2BGR)
