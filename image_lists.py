"""Lists of images and their labels."""
import collections
import hashlib
import os
import re
from typing import List

import numpy as np

import labels
import tar_files
from errors import UserError, enumerate_some, printable
from file_lists import FileList, describe_left_out, find_images, leave_out, stamp
from image_files import (COMPRESSED_NAME, DANGLING, EXTENSIONS, FOLDER, TAR, TWICE, enter,
                         holds_image, is_tar, lost_link, may_be_class, read_folder, tar_of,
                         two_of_a_name, why_no_image)

# files: FileList; labels: int32 [N] or None; classes: list of names, sorted (numbers as numbers),
# or None; notes: lines for the user, of what was left out
ImageList = collections.namedtuple('ImageList', ['files', 'labels', 'classes', 'notes'])
ImageList.__new__.__defaults__ = ((),)

# names of folders that are no classes, in lower case
SPLIT = re.compile(r'(val|valid|validation|test|testing|dev|eval|evaluation)\d*')


def fake_images(num_images: int, labelled: bool) -> ImageList:
    """A list without files, of 1000 classes if labelled."""
    classes = [f'{number:03d}' for number in range(1000)] if labelled else None
    return ImageList(FileList('fake', b'', np.zeros(num_images + 1, np.int64)), None, classes)


def list_images(root: str, split: str = 'train', labelled: bool = False,
                numbered: bool = False) -> ImageList:
    """List the images of one split, sorted, so that every process and host has the same list.

    Labelled: root/train/<class>/** and root/val/<class>/**, or images directly in root/val, or in
    its only folder, with a list of labels in root or root/val: one of labels.LISTS, with a label
    that is the name of a class, or its rank among the sorted names of the folders in root/train if
    none of them is a number. Or tar files with a class number beside each image, see tar_files:
    the classes are those of root/train, in the order of numbers. Unlabelled: everything in
    root/train (or in root, if it has no train) or root/val, flat or nested; an error if root/train
    may as well be one of several classes.
    Numbered: the same, each image's label being its index.

    An image is a file with one of EXTENSIONS, or that image_files.why_no_image() knows by its
    start. A tar file is a folder of its name without .tar. Symbolic links are followed. All else is
    left out, and noted; so are hidden names and SYSTEM_FOLDERS.
    """
    try:
        images = _list_split(root, split, labelled, numbered)
    except UserError as error:
        raise UserError(printable(str(error)))
    except OSError as error:  # of a folder that has just gone, say
        raise UserError(printable(f'cannot read {error.filename}: {error.strerror}'))
    except RecursionError:
        raise UserError(printable(f'the folders in {root} are too deeply nested'))
    return images._replace(notes=list(map(printable, images.notes)))


def _list_split(root, split, labelled, numbered):
    enter(root)
    folder = os.path.join(root, split)
    for name in ('train', split) if labelled else (split,):
        path = os.path.join(root, name)
        if os.path.isfile(tar_of(path)) and os.path.lexists(path):
            raise two_of_a_name(path)
    if labelled:
        return _list_labelled(root, folder, split)

    notes = []
    if split == 'train' and (os.path.isdir(folder) or is_tar(folder)):
        notes = _look_beside_train(root)
    elif split == 'train':
        folder, notes = root, _look_for_splits(root)
    files, left_out = find_images(folder)
    notes += describe_left_out(folder, left_out)
    if not len(files):
        kinds = ' '.join(extension[1:] for extension in EXTENSIONS)
        raise UserError('; '.join([f'there is no image ({kinds}) in {folder}'] + notes))
    numbers = np.arange(len(files), dtype=np.int32) if numbered else None
    return ImageList(files, numbers, None, notes)


def _list_labelled(root, folder, split):
    train, found, known = os.path.join(root, 'train'), None, None
    if _may_have_numbers(train, split):
        found = find_images(train)
        known = tar_files.find_class_numbers(found[0])
    classes = _list_classes(train) if known is None else list(map(str, np.unique(known).tolist()))
    files, left_out = found if found and split == 'train' else find_images(folder)
    numbers = tar_files.find_class_numbers(files)
    if numbers is not None:
        values = _rank_numbers(numbers, known, files, train)
        return ImageList(files, values, classes, describe_left_out(folder, left_out))

    counts = collections.Counter(name.split('/', 1)[0] for name in files.names() if '/' in name)
    num_flat = len(files) - sum(counts.values())

    if split == 'val':
        folders, lists = _list_folders(folder), labels.find_lists(root, folder)
        in_one_folder = len(folders) == 1 and counts[folders[0]] and folders[0] not in classes
        if lists and (num_flat or in_one_folder):
            if num_flat and counts:
                files = _keep(files, False, left_out, 'in folders beside flat images')
            values, notes = labels.read_labels(lists, list(files.names()), classes)
            return ImageList(files, values, classes, describe_left_out(folder, left_out) + notes)
        if num_flat and not folders:
            raise UserError(f'the images in {folder} have no labels: they need class folders, or '
                            f'a list {root}/val.txt with lines "name label"')

    if known is not None and isinstance(files, tar_files.TarFiles):
        raise UserError(f'{tar_of(folder, files.tars[0][0])}: has no class numbers in .cls files, '
                        f'as the tar files in {train} have')
    if num_flat:
        files = _keep(files, True, left_out, 'in no class folder')
    notes = describe_left_out(folder, left_out)
    for name in _list_classes(folder):
        if name not in classes:
            raise UserError(f'the class {name} of {folder} is not in {root}/train')
        if not counts[name]:
            raise UserError('; '.join([f'there is no image in the class folder {folder}/{name}'] +
                                      notes))
    order = sorted(range(len(classes)), key=classes.__getitem__)  # of folders: 10 is before 9
    values = np.repeat(np.array(order, np.int32), [counts[classes[label]] for label in order])
    return ImageList(files, values, classes, notes)


def _rank_numbers(numbers, known, files, train):
    """Labels: ranks of class numbers among those that images in train/ have, `known`, or None."""
    if known is None:
        raise UserError(f'{files[0]}: has a class number in a .cls beside it, but no tar file '
                        f'directly in {train} has any')
    unknown = ~np.isin(numbers, known)
    if unknown.any():
        first = int(unknown.argmax())
        raise UserError(f'{files[first]}: its class number {numbers[first]} is not in {train}')
    return np.searchsorted(np.unique(known), numbers).astype(np.int32)


def _may_have_numbers(train, split):
    """Whether the tar files in train/ may have class numbers; for another split, whose list should
    not take as long as that of train/, the first one tells, as all have them or none."""
    if is_tar(train):
        return True
    tars = [tar_of(train, name) for name, kind in sorted(read_folder(train)[1].items())
            if kind == TAR]
    if split == 'train':
        return bool(tars)
    places = (tar_files.list_tar(path, tuple(stamp(os.stat(path))))[1] for path in tars)
    first = next((found for found in places if found.size), None)
    return first is not None and (first[2] != tar_files.NO_CLASS).any()


def _list_folders(folder):
    if is_tar(folder):
        files, _ = find_images(folder)
        return sorted({name.split('/', 1)[0] for name in files.names() if '/' in name})
    names, kinds = read_folder(folder)
    for name in names:
        if kinds.get(name) == TWICE:
            raise two_of_a_name(os.path.join(folder, name))
        if kinds.get(name) == DANGLING and may_be_class(name):
            raise lost_link(os.path.join(folder, name))
    return [name for name in names if kinds.get(name) in (FOLDER, TAR)]


def _list_classes(folder):
    folders = _list_folders(folder)
    if not folders:
        names = [] if is_tar(folder) else filter(COMPRESSED_NAME.search, read_folder(folder)[0])
        raise UserError(f'labels need one folder a class, but {folder} has no folder in it' +
                        ''.join(f'; decompress {name}' for name in names))
    return folders


def _keep(files, nested, left_out, reason):
    """The files that are in folders, or those that are not; the others are left out."""
    kept = []
    for index, name in enumerate(files.names()):
        if ('/' in name) == nested:
            kept.append(index)
        else:
            leave_out(left_out, reason, name)
    return files.take(kept)


def _look_beside_train(root) -> List[str]:
    """Notes on the images in root that are not in root/train; an error if that may be a class."""
    if not os.access(root, os.R_OK):
        return []  # what is in train/ can be used nevertheless
    names, kinds = read_folder(root)
    folders = [name for name in names if kinds.get(name) in (FOLDER, TWICE) and name != 'train']
    splits = [name for name in folders if SPLIT.fullmatch(name.lower())]
    others = [name + '/' for name in folders
              if name not in splits and holds_image(os.path.join(root, name))]
    if others and not splits:
        raise UserError(f'{root}: is train/ the training images, or a class beside '
                        f'{enumerate_some(others)}? Give {root}/train to read it alone; to read '
                        'all, name it differently')
    loose = [name for name in names
             if name not in kinds and not why_no_image(os.path.join(root, name))]
    tars = [name + '.tar' for name in names if kinds.get(name) == TAR and name != 'train'
            and not SPLIT.fullmatch(name.lower())]
    beside = (['images in ' + enumerate_some(others)] if others else []) + (
        ['loose images: ' + enumerate_some(loose)] if loose else []) + (
        ['tar files: ' + enumerate_some(tars)] if tars else [])
    return [f'{root}: only train/ is read; beside it are {", and ".join(beside)}'] if beside else []


def _look_for_splits(root) -> List[str]:
    """A note if other splits than train/, which is not there, are read with all that is in root."""
    names, kinds = read_folder(root)
    folders = [name for name in names if kinds.get(name) in (FOLDER, TAR)]
    splits = [name + '/' for name in folders if SPLIT.fullmatch(name.lower())]
    others = [name for name in folders if name + '/' not in splits]
    advice = f' (give {root}/{others[0]} to read that alone)' if len(others) == 1 else ''
    return [f'{root}: no train/ in it: everything is read, also {enumerate_some(splits)}' + advice
            ] if splits else []


def digest_images(images: ImageList) -> str:
    """A short hexadecimal digest of names and labels, by which hosts can compare their data."""
    digest = hashlib.sha256()
    for array in images.files.packed():
        digest.update(array)
    if images.labels is not None:
        digest.update(images.labels.tobytes())
        digest.update('\n'.join(images.classes or []).encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]
