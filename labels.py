"""Labels of images from a list of names and labels, as several programs write them."""
import csv
import os
import posixpath
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np

from errors import UserError

# the last two are Tiny-ImageNet's, and ImageNet's of the localization task
LISTS = ('val.txt', 'val.csv', 'val_annotations.txt', 'LOC_val_solution.csv')
SEPARATORS = (None, '\t', ',', ';')  # between name and label; None: the last white space of a line
HANDFUL = 5  # labels without an image that are not worth a note


def find_list(root: str, folder: str) -> Optional[str]:
    """The first list that there is in one of these folders."""
    paths = [os.path.join(place, name) for name in LISTS for place in (root, folder)]
    return next(filter(os.path.isfile, paths), None)


def read_labels(path: str, images: Sequence[str],
                classes: Sequence[str]) -> Tuple[np.ndarray, List[str]]:
    """The labels that a list has for these images of val/: int32 [N]; and notes. A line has the
    name of an image and its label, which is a class or its number; boxes may follow, of 4 numbers
    each. The class's name precedes a number. Anything that can be read in two ways is an error."""
    try:
        with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}')
    find, numbers = _finder(images), {name: number for number, name in enumerate(classes)}
    # the separator by which most names are those of images
    separator = max(SEPARATORS, key=lambda separator: sum(
        (separator or ' ') in line and find(_split(line, separator)[0]) is not None
        for _, line in lines))

    entries, num_absent = [], 0  # (line number, find()'s result, label)
    for number, line in lines:
        name, *fields = _split(line, separator)
        found, label = find(name), _label(fields, numbers)
        if found is None and fields and number == lines[0][0] and not (
                fields[0] in numbers or (label or '').isdecimal() or label in numbers):
            continue  # a header
        if label is None:
            raise UserError(f'line {number} of {path} is not "name label": {line[:80]}')
        entries.append((number, found, label))
        num_absent += found is None

    given = {int(label) for _, _, label in entries if label not in numbers and label.isdecimal()}
    if given and 0 not in given and max(given) == len(classes):
        raise UserError(f'the labels in {path} are numbers from 1 to {len(classes)}, as of '
                        "ImageNet's devkit, in an order that is not that of the class folders' "
                        'sorted names: it must name the classes, or count them from 0')

    chosen = {}  # index of an image: (whether by its whole name, label, line number)
    for number, found, label in entries:
        if found is None:
            continue
        index, whole = found
        value = numbers.get(label, int(label) if label.isdecimal() else len(classes))
        if value >= len(classes):
            raise UserError(f'line {number} of {path}: {label[:80]} is neither a class of the '
                            f'training images nor a number below {len(classes)}')
        before = chosen.get(index, (False, value, number))
        if before[0] == whole and before[1] != value:
            raise UserError(f'lines {before[2]} and {number} of {path} give {images[index]} '
                            'different labels')
        if whole >= before[0]:
            chosen[index] = whole, value, number

    unlabelled = [image for index, image in enumerate(images) if index not in chosen]
    if unlabelled:
        raise UserError(f'{path} has no label for {len(unlabelled)} of {len(images)} images: '
                        f'{cut(unlabelled)}')
    notes = ([f'{path} has {num_absent} labels for images that are not there']
             if num_absent > HANDFUL else [])
    return np.array([chosen[index][1] for index in range(len(images))], np.int32), notes


def _split(line, separator):
    """At least one field."""
    if separator is None:
        return line.rsplit(None, 1)
    try:
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        return [field.strip() for field in fields]
    except csv.Error:  # a zero byte, say
        return [line]


def _label(fields, numbers):
    """The label in the fields behind a name; None if they cannot be understood."""
    if not fields or len(fields) % 4 != 1 or not all(map(str.isdecimal, fields[1:])):
        return None
    words = fields[0].split()  # class, 4 numbers, the same class, 4 numbers ...
    boxes = [word for i, word in enumerate(words) if i % 5]
    if fields[0] not in numbers and len(words) % 5 == 0 and len(set(words[::5])) == 1 and all(
            map(str.isdecimal, boxes)):
        return words[0]
    return fields[0]


def _finder(images: Sequence[str]) -> Callable[[str], Optional[Tuple[int, bool]]]:
    """A function that finds the image that a list means by a name: (index, whether by its whole
    name), or None. Lists have names with and without an extension, and in folders of others: so the
    last part of a name will do, if only one image has it."""
    tables = {}, {}, {}, {}
    for index, image in enumerate(images):
        last = posixpath.basename(image)
        for table, key in zip(tables, (image, posixpath.splitext(image)[0],
                                       last, posixpath.splitext(last)[0])):
            table[key] = None if key in table else index

    def find(name):
        if '/' in name:
            name = ('/' + posixpath.normpath(name)).rpartition('/val/')[2].lstrip('/')
        last = name.rpartition('/')[2]
        for rank, (table, key) in enumerate(zip(tables, (name, name, last, last))):
            if table.get(key) is not None:
                return table[key], rank < 2
        return None
    return find


def cut(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    more = f' and {len(names) - 6} more' if len(names) > 6 else ''
    return ', '.join(names[:6]) + more
