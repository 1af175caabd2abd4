"""Bytes of an image file to pixels."""
import ctypes
import functools
import os
import re
import tempfile
from typing import Callable, List, Optional, Tuple

import cv2
import numpy as np

import compiled
import formats
from errors import UserError
from formats import Unreadable

# of libjpeg, about a JPEG or what is in a TIFF: it has made up what was missing
LOST = re.compile('[Pp]remature end|instead of RST')


class ImageReader:
    """Reads images of an image_lists.ImageList; in place of one that cannot be read, the next one
    in the list that can. `report` is called with the index of an image, a text, and whether it is
    the reason why the image cannot be read or a warning about one that is used: once for each.
    `cache`: an image_cache.ImageCache, or None."""

    def __init__(self, images, report: Callable[[int, str, bool], None], cache=None):
        self.images, self._report, self._cache, self._unreadable = images, report, cache, set()
        self._warned = bytearray(len(images.files))  # it may be all of them

    def read(self, index: int, choose_box: Optional[Callable] = None) -> Tuple[int, np.ndarray]:
        """Returns (index of the image that was read, uint8 BGR [height, width, 3]); choose_box: see
        decode()."""
        files = self.images.files
        for _ in range(len(files)):
            if index not in self._unreadable:
                try:
                    image, warning = self._decode(index, choose_box)
                    if warning and not self._warned[index]:
                        self._warned[index] = True
                        self._report(index, warning, False)
                    return index, image
                except (OSError, ValueError, MemoryError) as error:
                    reason = (getattr(error, 'strerror', None) or str(error) or
                              'takes more memory than there is')
                self._unreadable.add(index)
                self._report(index, reason, True)
            index = (index + 1) % len(files)
        raise UserError(f'none of the {len(files)} images can be read')

    def _decode(self, index, choose_box):
        image, warning = self._cache and self._cache.get(index), ''
        if image is None:
            keep = self._cache and not self._cache.full
            image, warning = decode(self.images.files.read(index), None if keep else choose_box)
            if not keep:
                return image, warning
            self._cache.put(index, image)
        if choose_box:
            choose_box(*image.shape[:2])
        return image, warning


def decode(encoded: bytes, choose_box: Optional[Callable] = None) -> Tuple[np.ndarray, str]:
    """As decode_whole(), but pixels outside a box may be anything: (y, x, height, width), which
    choose_box(height, width) returns. The last call, of one or two, has the size of the image."""
    image = decode_box(encoded, choose_box) if choose_box else None
    if image is not None:
        return image, ''
    image, warning = decode_whole(encoded)
    if choose_box:
        choose_box(*image.shape[:2])
    return image, warning


def decode_box(encoded: bytes, choose_box: Callable) -> Optional[np.ndarray]:
    """An image of which a box is decoded, or None if this is no JPEG for jpeg.cc."""
    library, size = load_library(), (ctypes.c_int32 * 2)()
    if not library.open_jpeg(encoded, len(encoded), size):
        return None
    image = np.empty((*size, 3), np.uint8)
    return image if library.decode_box(image.ctypes.data, *choose_box(*size)) else None


@functools.lru_cache(maxsize=None)
def load_library():
    """The functions of jpeg.cc."""
    return compiled.load('jpeg', open_jpeg=[ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p],
                         decode_box=[ctypes.c_void_p] + [ctypes.c_int64] * 4)


def decode_whole(encoded: bytes) -> Tuple[np.ndarray, str]:
    """Returns (uint8 BGR [height, width, 3], what a library warns of or ''), turned as its EXIF
    says, of an animation the first frame; or raises Unreadable or MemoryError.

    What is transparent lies on white, but a BMP is opaque. 16-bit numbers are divided by 2**b - 1,
    b being the least from 8 on in which the file's largest colour fits, since cameras write 10 to
    14 bits so; alpha by 2**16 - 1; and those of a PPM by the maximum that it names, unless that is
    2**16 - 1 too. Not for threads: meanwhile, stderr is another file."""
    if encoded.startswith(b'\xff\xd8'):
        kind, segments = 'JPEG', formats.list_segments(encoded)
        if not has_end(encoded, segments):
            raise Unreadable('is a JPEG that was cut off')
        # OpenCV looks for EXIF in the first APP1 alone, where XMP or a thermal image may be
        exif = [encoded[at + 4:at + 10] == b'Exif\0\0' for marker, at in segments if marker == 0xe1]
        missed = any(exif) and not exif[0]
        image, said = call_quietly(formats.read_opencv, encoded, cv2.IMREAD_COLOR | (
            cv2.IMREAD_IGNORE_ORIENTATION if missed else 0))
        if (said or image is None) and not has_end(encoded, segments, before_next=True):
            raise Unreadable('is a JPEG that was cut off')
        if missed and image is not None:
            image = formats.turn(image, encoded)
    else:
        kind, image = formats.find_format(encoded), None
    if image is None:
        image, said = call_quietly(formats.read, encoded, kind)
    if not said:
        return image, ''
    line = said.strip().split('\n')[0][:120]
    if LOST.search(said):
        raise Unreadable(f'is a {kind} that lacks a part: {line}')
    return image, line


def has_end(jpeg: bytes, segments: List[Tuple[int, int]], before_next: bool = False) -> bool:
    """Whether a JPEG has its end marker, and before_next: another JPEG begins. The missing rows of
    one that was cut off would be pieces of other images: OpenCV leaves the memory as it is. PIL,
    hence the official code, refuses it."""
    # The marker counts behind the first start of scan (0xda): a thumbnail before it has its own.
    # What may follow the marker, a video say, does not matter. From the end it is found at once;
    # forwards it takes 5 % of the time of an image, so that is for those that libjpeg warns of.
    marker, at = segments[-1] if segments else (None, 0)
    if marker not in formats.LAST_MARKERS:
        return False
    end = jpeg.find(b'\xff\xd8', at) if before_next else -1
    return jpeg.rfind(b'\xff\xd9', at, end if end >= 0 else len(jpeg)) > 0


def call_quietly(function: Callable, *arguments) -> tuple:
    """Returns (result, the beginning of what C libraries wrote to stderr)."""
    file, stderr = open_file_for_stderr(os.getpid()), os.dup(2)
    os.dup2(file, 2)
    try:
        result = function(*arguments)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        size, said = os.lseek(file, 0, os.SEEK_CUR), ''
        if size:
            said = os.pread(file, min(size, 4096), 0).decode(errors='replace')
            os.lseek(file, 0, os.SEEK_SET)
    return result, said


@functools.lru_cache(maxsize=None)
def open_file_for_stderr(pid: int) -> int:
    """For each process its own: those that were forked would share the position in it."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def set_up_process() -> None:
    """What a process that makes batches does first."""
    cv2.setNumThreads(0)  # such processes are the threads
    # The C library gives the memory of an image back to the system, and gets it again, page by
    # page, for the next one: 2 % of the time of an image. So let it keep 16 MB (M_TRIM_THRESHOLD),
    # and only map what is larger (M_MMAP_THRESHOLD). With more, memory creeps up for hours.
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 16 << 20)
    libc.mallopt(-3, 16 << 20)
