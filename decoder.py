"""Bytes of an image file to pixels."""
import contextlib
import ctypes
from typing import Callable, Optional, Tuple

import cv2
import numpy as np

from errors import UserError

MARKERS_WITHOUT_LENGTH = {0x00, 0x01, 0xff, *range(0xd0, 0xda)}


class ImageReader:
    """Reads images of an image_lists.ImageList; in place of one that cannot be read, the next one
    in the list that can. `report` is called with the index of an unreadable image, once."""

    def __init__(self, images, report: Callable[[int], None]):
        self.images, self._report, self._unreadable = images, report, set()

    def read(self, index: int) -> Tuple[int, np.ndarray]:
        """Returns (index of the image that was read, uint8 BGR [height, width, 3])."""
        files = self.images.files
        for _ in range(len(files)):
            if index not in self._unreadable:
                with contextlib.suppress(OSError, MemoryError, cv2.error):
                    image = decode(files.read(index))
                    if image is not None:
                        return index, image
                self._unreadable.add(index)
                self._report(index)
            index = (index + 1) % len(files)
        raise UserError(f'none of the {len(files)} images can be read')


def decode(encoded: bytes) -> Optional[np.ndarray]:
    """uint8 BGR [height, width, 3], turned as its EXIF says; None, cv2.error or MemoryError if it
    cannot be read."""
    if encoded[:2] == b'\xff\xd8' and not has_end(encoded):
        return None
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)


def has_end(jpeg: bytes) -> bool:
    """Whether a JPEG has its end marker. The missing rows of one that was cut off would be pieces
    of other images: OpenCV leaves the memory as it is. PIL, hence the official code, refuses it."""
    # The marker counts behind the first start of scan (0xda): a thumbnail before it has its own.
    # What may follow the marker, a video say, does not matter.
    at = 2
    while at + 4 <= len(jpeg):
        if jpeg[at] != 0xff or jpeg[at + 1] in MARKERS_WITHOUT_LENGTH:
            at += 1
        elif jpeg[at + 1] == 0xda:
            return jpeg.rfind(b'\xff\xd9', at) > 0
        else:
            at += 2 + int.from_bytes(jpeg[at + 2:at + 4], 'big')
    return False


def set_up_process() -> None:
    """What a process that makes batches does first."""
    cv2.setNumThreads(0)  # such processes are the threads
    # The C library gives the memory of an image back to the system, and gets it again, page by
    # page, for the next one: 2 % of the time of an image. So let it keep 16 MB (M_TRIM_THRESHOLD),
    # and only map what is larger (M_MMAP_THRESHOLD). With more, memory creeps up for hours.
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 16 << 20)
    libc.mallopt(-3, 16 << 20)
