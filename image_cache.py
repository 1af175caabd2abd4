"""Decoded images in memory that all data workers of a host share."""
import contextlib
import mmap
import multiprocessing
import pathlib
from typing import Callable, Optional

import numpy as np
import psutil

from errors import UserError


class ImageCache:
    """Keeps images as they come, until one does not fit. Made before the workers are forked, and
    gone with the last of them.

    Args:
        num_images: in the list.
        size: bytes of pixels; the system hands them out when they are written.
        report_full: called once, by the process that found it full, with the number of images kept.
    """

    def __init__(self, num_images: int, size: int, report_full: Callable[[int], None]):
        self._size, self._report_full = size, report_full
        available = min(psutil.virtual_memory().available, least_limit())
        if size > available:
            raise UserError(f'--cache {size / 1e9:g}: there are {available / 1e9:.3g} GB of memory '
                            'that a job can have here')
        try:
            # of each image: where its pixels end (0: not kept), height, width; then in all: where
            # pixels end, number of images, whether one did not fit
            self._table = np.frombuffer(mmap.mmap(-1, 24 * (num_images + 1)), np.int64).reshape(
                -1, 3)
            self._pixels = np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8)
        except (OSError, MemoryError):
            raise UserError(f'--cache {size / 1e9:g}: this host does not give so many GB of memory')
        self._lock = multiprocessing.get_context('fork').Lock()

    @property
    def full(self) -> bool:
        return bool(self._table[-1, 2])

    def get(self, index: int) -> Optional[np.ndarray]:
        """An image, uint8 [height, width, 3], which must stay as it is; None if it is not kept."""
        end, height, width = self._table[index].tolist()
        if not end:
            return None
        return self._pixels[end - height * width * 3:end].reshape(height, width, 3)

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep an image, if there is room and it is not kept yet."""
        with self._lock:
            if self.full or self._table[index, 0]:
                return
            end = int(self._table[-1, 0]) + image.size
            fits = end <= self._size
            if fits:
                self._pixels[end - image.size:end] = image.ravel()
                self._table[index, 1:] = image.shape[:2]
                self._table[index, 0] = end  # last: others read without the lock
                self._table[-1, :2] += image.size, 1
            else:
                self._table[-1, 2] = 1
        if not fits:
            self._report_full(int(self._table[-1, 1]))


def least_limit(root: str = '') -> float:
    """The least memory limit, in bytes, of this process's control group (version 2, as containers
    and schedulers set them) and of those around it; root: of the file system."""
    limits = [float('inf')]
    with contextlib.suppress(OSError, StopIteration):
        with open(root + '/proc/self/cgroup') as lines:
            group = next(line[3:].strip() for line in lines if line.startswith('0::'))
        folder = pathlib.Path(root + '/sys/fs/cgroup' + group)
        for path in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # none there, or 'max'
                limits.append(int((path / 'memory.max').read_text()))
    return min(limits)
