"""Lists of images and their labels."""
import collections
import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from typing import Dict, Iterable, Iterator, List, Tuple

import numpy as np

import labels
import tar_files
from errors import UserError, enumerate_some, printable
from image_files import (COMPRESSED_NAME, DANGLING, EXTENSIONS, FOLDER, HIDDEN_FOLDER, SIGNATURES,
                         SYSTEM, TAR, TWICE, enter, holds_image, is_tar, lost_link, may_be_class,
                         read_folder, tar_of, two_of_a_name, why_no_image)

# files: FileList; labels: int32 [N] or None; classes: list of names, sorted (numbers as numbers),
# or None; notes: lines for the user, of what was left out
ImageList = collections.namedtuple('ImageList', ['files', 'labels', 'classes', 'notes'])
ImageList.__new__.__defaults__ = ((),)

# names of folders that are no classes, in lower case
SPLIT = re.compile(r'(val|valid|validation|test|testing|dev|eval|evaluation)\d*')


class FileList:
    """A read-only list of files below root, and the bytes in them; another format is another class
    with these six methods, as tar_files.TarFiles. The names are one block of memory: 1.28 million
    Python strings take 150 MB, and counting references to them would copy those pages into every
    forked worker; the block takes 50 MB, shared by all."""

    def __init__(self, root: str, block: bytes, ends: np.ndarray):
        self.root, self._block, self._ends = root, block, ends

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # a path
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self._block[self._ends[index]:self._ends[index + 1]]
        return os.path.join(self.root, os.fsdecode(name))

    def read(self, index: int) -> bytes:
        # cv2.imread crashes on names that are not UTF-8, and open() takes as long as the crops of
        # two views of 32 pixels
        file = os.open(self[index], os.O_RDONLY)
        try:
            return os.read(file, os.fstat(file).st_size)
        finally:
            os.close(file)

    def names(self) -> Iterator[str]:
        return (os.fsdecode(self._block[start:end])
                for start, end in zip(self._ends, self._ends[1:]))

    def take(self, indices) -> 'FileList':
        return FileList(self.root, *pack_names(
            os.fsdecode(self._block[self._ends[i]:self._ends[i + 1]]) for i in indices))

    def packed(self) -> Tuple[bytes, np.ndarray]:  # what pack_names() returned
        return self._block, self._ends


def pack_names(names: Iterable[str]) -> Tuple[bytes, np.ndarray]:
    """One block of bytes, and where each name ends in it, from 0 on: int64."""
    block, ends = bytearray(), [0]
    for name in names:
        block += os.fsencode(name)
        ends.append(len(block))
    return bytes(block), np.array(ends, np.int64)


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
    notes += _describe(folder, left_out)
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
        if known is None:
            raise UserError(f'{files[0]}: has a class number in a .cls beside it, but no tar file '
                            f'directly in {train} has any')
        values, unknown = np.searchsorted(np.unique(known), numbers), ~np.isin(numbers, known)
        if unknown.any():
            first = int(unknown.argmax())
            raise UserError(f'{files[first]}: its class number {numbers[first]} is not in {train}')
        return ImageList(files, values.astype(np.int32), classes, _describe(folder, left_out))

    counts = collections.Counter(name.split('/', 1)[0] for name in files.names() if '/' in name)
    num_flat = len(files) - sum(counts.values())

    if split == 'val':
        folders, lists = _list_folders(folder), labels.find_lists(root, folder)
        in_one_folder = len(folders) == 1 and counts[folders[0]] and folders[0] not in classes
        if lists and (num_flat or in_one_folder):
            if num_flat and counts:
                files = _keep(files, False, left_out, 'in folders beside flat images')
            values, notes = labels.read_labels(lists, list(files.names()), classes)
            return ImageList(files, values, classes, _describe(folder, left_out) + notes)
        if num_flat and not folders:
            raise UserError(f'the images in {folder} have no labels: they need class folders, or '
                            f'a list {root}/val.txt with lines "name label"')

    if known is not None and isinstance(files, tar_files.TarFiles):
        raise UserError(f'{tar_of(folder, files.tars[0][0])}: has no class numbers in .cls files, '
                        f'as the tar files in {train} have')
    if num_flat:
        files = _keep(files, True, left_out, 'in no class folder')
    for name in _list_classes(folder):
        if name not in classes:
            raise UserError(f'the class {name} of {folder} is not in {root}/train')
        if not counts[name]:
            raise UserError('; '.join([f'there is no image in the class folder {folder}/{name}'] +
                                      _describe(folder, left_out)))
    order = sorted(range(len(classes)), key=classes.__getitem__)  # of folders: 10 is before 9
    values = np.repeat(np.array(order, np.int32), [counts[classes[label]] for label in order])
    return ImageList(files, values, classes, _describe(folder, left_out))


def _may_have_numbers(train, split):
    """Whether the tar files in train/ may have class numbers; for another split, whose list should
    not take as long as that of train/, the first one tells, as all have them or none."""
    if is_tar(train):
        return True
    tars = [tar_of(train, name) for name, kind in sorted(read_folder(train)[1].items())
            if kind == TAR]
    if split == 'train':
        return bool(tars)
    places = (tar_files.list_tar(path, tuple(_stamp(os.stat(path))))[1] for path in tars)
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
            _leave_out(left_out, reason, name)
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


def _leave_out(left_out, reason, name):
    """Count what is left out, {reason: (number, the first names)}."""
    number, names = left_out.get(reason, (0, []))
    left_out[reason] = number + 1, (names + [name])[:3]


def _describe(folder, left_out) -> List[str]:
    """No note or one."""
    if not left_out:
        return []
    total = sum(number for number, _ in left_out.values())
    reasons = [f'{number} {reason} ({", ".join(names)}{", ..." * (number > len(names))})'
               for reason, (number, names) in left_out.items()]
    return [f'{folder}: left out {total} file{"s" * (total > 1)}: ' + ', '.join(reasons)]


def digest_images(images: ImageList) -> str:
    """A short hexadecimal digest of names and labels, by which hosts can compare their data."""
    digest = hashlib.sha256()
    for array in images.files.packed():
        digest.update(array)
    if images.labels is not None:
        digest.update(images.labels.tobytes())
        digest.update('\n'.join(images.classes or []).encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]


def find_images(folder: str) -> Tuple[FileList, Dict[str, Tuple[int, List[str]]]]:
    """The images under a folder, in sorted order, and what is left out, {reason: (number, first
    names)}: from a kept list, if it has one that holds."""
    # whatever is wrong with that, the folder can be listed again
    with contextlib.suppress(Exception), np.load(_cache_path(folder), allow_pickle=False) as kept:
        stamps = json.loads(kept['stamps'].tobytes().decode())
        if all(_stamp(os.stat(os.path.join(folder, name))) == stamp
               for name, stamp in stamps.items()):
            files, tars = FileList(folder, kept['block'].tobytes(), kept['ends']), kept['tars']
            tars = json.loads(tars.tobytes().decode())
            return (tar_files.TarFiles(files, tars, kept['places']) if tars else files,
                    json.loads(kept['left_out'].tobytes().decode()))
    start, seen, left_out, tars = time.time(), {}, {}, []
    if is_tar(folder):
        names = _walk_tar(folder, '', (), seen, left_out, tars)
    else:
        read_folder(folder)  # whose errors are clear
        names = _walk(folder, '', (), seen, left_out, tars)
    files = FileList(folder, *pack_names(names))
    if tars:
        places = tar_files.locate(files.names(), [(tar[0], tar[-1]) for tar in tars], len(files))
        files = tar_files.TarFiles(files, [tar[:-1] for tar in tars], places)
    if time.time() - start > SLOW_LISTING:
        _save_list(folder, files, left_out, seen, start)
    return files, left_out


def _walk(folder, prefix, above, seen, left_out, tars):
    """Yield the names, relative to the folder, of all images under folder/prefix, sorted. `above`
    has (device, inode) of the folders around; `seen` gets an os.stat_result by the name of every
    folder and tar file, and None by that of every dangling link; `tars`, see _walk_tar()."""
    path = os.path.join(folder, prefix[:-1])
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return  # a link to a folder around it
    seen[prefix] = status
    names, kinds = read_folder(path)
    for name in names:
        kind = kinds.get(name)
        if kind is None and not name.lower().endswith(EXTENSIONS):
            if name in labels.LISTS:
                continue
            kind = why_no_image(os.path.join(path, name))
        if kind is None:
            yield prefix + name
        elif kind == FOLDER:
            yield from _walk(folder, prefix + name + '/', above + (identity,), seen, left_out,
                             tars)
        elif kind == TAR:
            yield from _walk_tar(folder, prefix + name, names, seen, left_out, tars)
        elif kind == TWICE:
            raise two_of_a_name(os.path.join(path, name))
        elif kind not in (SYSTEM, HIDDEN_FOLDER) or holds_image(os.path.join(path, name)):
            if kind == DANGLING:
                seen[prefix + name] = None
                if not prefix and may_be_class(name):
                    raise lost_link(os.path.join(path, name))
            _leave_out(left_out, kind, prefix + name)


def _walk_tar(folder, tar, beside, seen, left_out, tars):
    """_walk() of the tar file in place of the folder folder/tar, which has these names beside it.
    `tars` gets (tar, mtime in ns, size, places of tar_files.list_tar())."""
    path = tar_of(folder, tar)
    status = os.stat(path)
    seen[tar_of(tar) if tar else os.path.realpath(path)] = status
    names, places, not_read = tar_files.list_tar(path, tuple(_stamp(status)))
    names, prefix = names.split('\0')[:-1], tar + '/' * bool(tar)
    tops = {name.split('/', 1)[0] for name in names}
    if len(tops) > 1 and tops <= set(beside) - {os.path.basename(tar)}:
        raise UserError(f'{path} is beside all that is in it, {enumerate_some(sorted(tops))}: '
                        'remove one or the other')
    for name, reason in not_read.items():
        _leave_out(left_out, reason, prefix + name)
    tars.append((tar, status.st_mtime_ns, status.st_size, places))
    for name in names:
        yield prefix + name


# ---- kept lists

# A list that took long to make is kept in the user's cache. It holds while every folder in it has
# the inode, mtime and ctime that it had then, and every tar file, too: a new, removed or renamed
# file changes the times of its folder (tar and rsync set mtime back, but no program sets ctime
# back). So two changes are not seen: of a file's contents, even from no image to one, and of a link
# from one file to another.
# A list is not kept where times are not reliable: with a dangling link, which may lead to a folder
# tomorrow; of folders that changed within the last minute (a clock's tick can be 2 s long, or the
# clock wrong); on object stores by FUSE, and on FAT.
SLOW_LISTING, SETTLED = 1, 60  # seconds
UNTIMED = ('fuse', 'vfat', 'msdos', 'exfat')


def _cache_path(folder):
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.environ['HOME'], '.cache')
    folder = tar_of(folder) if is_tar(folder) else folder
    # the inode, for hosts that share a home but not the data
    key = json.dumps(['class numbers', os.path.realpath(folder), os.stat(folder).st_ino, EXTENSIONS,
                      SIGNATURES.pattern.decode('latin-1')])
    return os.path.join(home, 'moco', hashlib.sha256(key.encode()).hexdigest()[:16] + '.npz')


def _stamp(status):
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _save_list(folder, files, left_out, seen, start):
    """Keep a list whose listing started at that time, if it can be relied on."""
    with contextlib.suppress(Exception):  # nothing depends on it
        with open('/proc/self/mountinfo') as mounts:
            untimed = {os.makedev(*map(int, line.split()[2].split(':'))) for line in mounts
                       if line.split(' - ')[1].startswith(UNTIMED)}
        if not all(s and s.st_dev not in untimed and
                   max(s.st_mtime, s.st_ctime) <= start - SETTLED for s in seen.values()):
            return
        stamps = json.dumps({name: _stamp(status) for name, status in seen.items()}).encode()
        (block, ends), path = files.packed(), _cache_path(folder)
        tars = json.dumps(getattr(files, 'tars', [])).encode()
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as temporary:
            np.savez(temporary + '/list.npz', stamps=np.frombuffer(stamps, np.uint8),
                     block=np.frombuffer(block, np.uint8), ends=ends,
                     tars=np.frombuffer(tars, np.uint8), places=getattr(files, 'places', []),
                     left_out=np.frombuffer(json.dumps(left_out).encode(), np.uint8))
            os.replace(temporary + '/list.npz', path)
