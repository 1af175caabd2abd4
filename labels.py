"""Labels of images from a list of names and labels, as several programs write them."""
import codecs
import csv
import itertools
import os
import posixpath
import re
import unicodedata
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from errors import UserError, enumerate_some
from image_files import EXTENSIONS

# the last two are Tiny-ImageNet's, and ImageNet's of the localization task
LISTS = ('val.txt', 'val.csv', 'val_annotations.txt', 'LOC_val_solution.csv')
HANDFUL = 5  # labels without an image that are not worth a note

# How a line is read: what is between name and label, and whether the label is first. None is the
# last white space, and a blank the first, unless in quotes.
READINGS = list(itertools.product((None, '\t', ',', ';', ' '), (False, True)))
FIRST_WORD = re.compile(r"""("[^"]*"|'[^']*'|\S+)\s+(.+)""")
QUOTED = re.compile(r"""^(["'])(.*)\1$""")
NAME_COLUMN = re.compile('name|id|file|image', re.IGNORECASE)  # in a header
NUMBER = re.compile('[0-9]{1,255}')


def find_lists(root: str, folder: str) -> List[str]:
    """The lists that there are in these folders."""
    paths = [os.path.join(place, name) for name in LISTS for place in (root, folder)]
    return list(filter(os.path.isfile, paths))


def read_labels(paths: Sequence[str], images: Sequence[str],
                classes: Sequence[str]) -> Tuple[np.ndarray, List[str]]:
    """The labels that lists, all the same, have for these images of val/: int32 [N]; and notes. A
    line has the name of an image and its label, in either order; boxes may follow, of 4 numbers
    each. A label is a class, or its number if no class's name is a number. Anything that can be
    read in two ways is an error."""
    results = [_read_list(path, images, classes) for path in paths]
    values, notes = results[0]
    for path, (others, _) in zip(paths, results):
        if (others != values).any():
            image = images[(others != values).argmax()]
            raise UserError(f'{paths[0]} and {path} give {image} different labels: remove the '
                            'list that is wrong')
    return values, notes


def _read_list(path, images, classes):
    lines = _read_lines(path)
    find, (find_class, numeric) = _finder(images), _class_finder(classes)
    reading = _choose(path, lines, find, find_class)

    entries, absent = [], []  # (line number, find()'s result, label), and (line number, line)
    for number, line in lines:
        name, *fields = _split(line, *reading)
        found, label = find(name), _label(fields, find_class)
        if found is None and fields and number == lines[0][0] and not NUMBER.fullmatch(label) and (
                find_class(fields[0]) is None and find_class(label) is None):
            continue  # a header
        if not label:
            raise UserError(f'line {number} of {path} is not "name label": {line[:80]}')
        entries.append((number, found, label))
        if found is None:
            absent.append((number, line))

    given = {int(label) for _, _, label in entries if NUMBER.fullmatch(label)}
    if given and not numeric and 0 not in given and max(given) == len(classes):
        raise UserError(f'the labels in {path} are numbers from 1 to {len(classes)}, as of '
                        "ImageNet's devkit, in an order that is not that of the class folders' "
                        'sorted names: it must name the classes, or count them from 0')

    chosen = {}  # index of an image: (whether by its whole name, label, line number)
    for number, found, label in entries:
        if found is None:
            continue
        index, whole = found
        value = find_class(label)
        if value is None:
            is_rank = NUMBER.fullmatch(label) and int(label) < len(classes)
            raise UserError(f'line {number} of {path}: {label[:80]} is ' + (
                f'no class, and as a rank it is the class {classes[int(label)]}: where names of '
                'classes are numbers, every label must be a name' if is_rank else
                f'neither a class of the training images nor a number below {len(classes)}'))
        before = chosen.get(index, (False, value, number))
        if before[0] == whole and before[1] != value:
            raise UserError(f'lines {before[2]} and {number} of {path} give {images[index]} '
                            'different labels')
        if whole >= before[0]:
            chosen[index] = whole, value, number

    unlabelled = [image for index, image in enumerate(images) if index not in chosen]
    if unlabelled:
        example = '; its line {} is "{:.80}"'.format(*absent[0]) if absent else ''
        raise UserError(f'{path} has no label for {len(unlabelled)} of {len(images)} images: '
                        f'{enumerate_some(unlabelled)}{example}')
    notes = ([f'{path} has {len(absent)} labels for images that are not there']
             if len(absent) > HANDFUL else [])
    return np.array([chosen[index][1] for index in range(len(images))], np.int32), notes


def _read_lines(path) -> List[Tuple[int, str]]:
    """Those that are not empty, and their numbers."""
    try:
        with open(path, 'rb') as file:
            utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with open(path, encoding='utf-16' if utf16 else 'utf-8-sig',
                  errors='replace' if utf16 else 'surrogateescape') as file:
            return [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}')


def _choose(path, lines, find, find_class):
    """The reading by which most images have a class, and most names are those of images. A few
    thousand lines tell, as this is ten times the work of reading them."""
    lines = lines[::1 + len(lines) // 2000]

    def read(reading) -> Tuple[Dict[int, int], int]:
        labelled, num_found = {}, 0
        for _, line in lines:
            name, *fields = _split(line, *reading)
            found = find(name)
            if found is not None:
                num_found += 1
                value = find_class(_label(fields, find_class))
                if value is not None:
                    labelled[found[0]] = value
        return labelled, num_found

    results = {reading: read(reading) for reading in READINGS}
    best = max(READINGS, key=lambda reading: (len(results[reading][0]), results[reading][1]))
    separator, swapped = best
    (labelled, _), (other, _) = results[best], results[separator, not swapped]
    if len(labelled) == len(other) and labelled != other:
        is_name = [bool(NAME_COLUMN.search(word)) for word in _split(lines[0][1], separator)[:2]]
        if sum(is_name) != 1:
            raise UserError(f'{path}: both columns can be names of images, and both can be labels: '
                            'it needs a header "name label", or names with their extensions')
        swapped = not is_name[0]
    return separator, swapped


def _split(line, separator, swapped=False):
    """At least one field; the name is the first."""
    fields = [line]
    if separator is None:
        fields = line.rsplit(None, 1)
    elif separator == ' ':
        match = FIRST_WORD.fullmatch(line)
        fields = match.groups() if match else fields
    elif separator in line:
        try:
            fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        except csv.Error:  # a zero byte, say
            pass
    fields = [QUOTED.sub(r'\2', field.strip()) for field in fields]
    return fields[::-1] if swapped else fields


def _label(fields, find_class):
    """The label in the fields behind a name; empty if they cannot be understood."""
    if not fields or len(fields) % 4 != 1 or not all(map(str.isdecimal, fields[1:])):
        return ''
    words = fields[0].split()  # class, 4 numbers, the same class, 4 numbers ...
    boxes = [word for i, word in enumerate(words) if i % 5]
    if len(words) % 5 == 0 and len(set(words[::5])) == 1 and all(
            map(str.isdecimal, boxes)) and find_class(fields[0]) is None:
        return words[0]
    return fields[0]


def _class_finder(classes: Sequence[str]) -> Tuple[Callable[[str], Optional[int]], bool]:
    """A function that finds the class that a list means by a label: its index, or None. 01 is the
    class 1 if there is no other of this value. And whether a class's name is a number."""
    def key(name):
        return int(name) if NUMBER.fullmatch(name) else unicodedata.normalize('NFC', name)
    alike = {}
    for index, name in enumerate(classes):
        alike[key(name)] = None if key(name) in alike else index
    exact, numeric = {name: index for index, name in enumerate(classes)}, any(
        map(NUMBER.fullmatch, classes))
    if not numeric:
        alike.update({index: index for index in range(len(classes))})
    return lambda label: exact.get(label, alike.get(key(label))), numeric


def _finder(images: Sequence[str]) -> Callable[[str], Optional[Tuple[int, bool]]]:
    """A function that finds the image that a list means by a name: (index, whether by its whole
    name), or None. Lists have names with and without an extension or with that of another format,
    in folders of others, and of Windows: so the last part of a name will do, and what is before
    its extension, if only one image has it."""
    tables = {}, {}, {}, {}
    for index, image in enumerate(images):
        last = posixpath.basename(image)
        for table, key in zip(tables, (image, posixpath.splitext(image)[0],
                                       last, posixpath.splitext(last)[0])):
            table[key] = None if key in table else index
    of_windows = not any('\\' in image for image in images)

    def find(name):
        if of_windows:
            name = name.replace('\\', '/')
        if '/' in name:
            name = ('/' + posixpath.normpath(name)).rpartition('/val/')[2].lstrip('/')
        last, (stem, extension) = posixpath.basename(name), posixpath.splitext(name)
        keys = [name, name, last, last]
        if extension.lower() in EXTENSIONS:
            keys += [None, stem, None, posixpath.basename(stem)]
        for rank, (table, key) in enumerate(zip(tables + tables, keys)):
            if table.get(key) is not None:
                return table[key], rank < 2
        return None
    return find
