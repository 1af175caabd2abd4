"""Images for tests: files of one colour, a photograph, and the pixels in a file."""
import os

import cv2
import numpy as np

import decoder
import file_lists
import image_files
import image_lists
from errors import UserError

# 375 x 500, the usual size of ImageNet's; see tests/data/README.md
PHOTO = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data/coffee.jpg')


def write_image(path, value=0, size=(8, 8)):
    """A lossless image, all of whose channels have this value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extension = path.suffix if path.suffix.lower() in image_files.EXTENSIONS else '.png'
    encoded = cv2.imencode(extension, np.full(size + (3,), value, np.uint8))[1]
    path.write_bytes(encoded.tobytes())
    return path


def read_image(path):
    """What a data worker reads from a file: uint8 BGR [height, width, 3], or None."""
    folder, name = os.path.split(path)
    files = file_lists.FileList(folder, *file_lists.pack_names([name]))
    reader = decoder.ImageReader(image_lists.ImageList(files, None, None), lambda *report: None)
    try:
        return reader.read(0)[1]
    except UserError:
        return None
