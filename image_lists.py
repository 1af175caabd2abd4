"""Lists of images and their labels."""
import collections
import contextlib
import hashlib
import json
import os
import tempfile
import time
from typing import Iterable, Iterator, Tuple

import numpy as np

from errors import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm')

# files: FileList; labels: int32 [N] or None; classes: sorted list of names or None
ImageList = collections.namedtuple('ImageList', ['files', 'labels', 'classes'])


class FileList:
    """A read-only list of files below root, and the bytes in them; another format (images inside
    archives, say) is another class with these five methods. The names are one block of memory: 1.28
    million Python strings take 150 MB, and counting references to them would copy those pages into
    every forked worker; the block takes 50 MB, shared by all."""

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


def list_images(root: str, split: str = 'train', labelled: bool = False) -> ImageList:
    """List the images of one split, sorted, so that every process and host has the same list.

    Labelled: root/train/<class>/** and root/val/<class>/**, or images directly in root/val with a
    list of labels, val.txt, in root or root/val: lines 'name label', a label being the name of a
    class or its number, which is its rank among the sorted names of the folders in root/train.
    Unlabelled: everything in root/train (or in root, if it has no train) or root/val, flat or
    nested. Symbolic links are followed; names that start with a dot are ignored.
    """
    if not os.path.isdir(root):
        raise UserError(f'there is no folder {root}')
    folder = os.path.join(root, split)
    if not labelled:
        if split == 'train' and not os.path.isdir(folder):
            folder = root
        files = find_images(folder)
        if not len(files):
            kinds = ' '.join(extension[1:] for extension in EXTENSIONS)
            raise UserError(f'there is no image ({kinds}) in {folder}')
        return ImageList(files, None, None)

    classes = _list_classes(os.path.join(root, 'train'))
    names, folders = _read_folder(folder)
    flat = [name for name in names if name not in folders and name.lower().endswith(EXTENSIONS)]
    if split == 'val' and flat:
        for path in (os.path.join(root, 'val.txt'), os.path.join(folder, 'val.txt')):
            if os.path.isfile(path):
                labels = _read_labels(path, flat, classes)
                return ImageList(FileList(folder, *pack_names(flat)), labels, classes)
        if not folders:
            raise UserError(f'the images in {folder} have no labels: they need class folders, or '
                            f'a list {root}/val.txt with lines "name label"')

    files = find_images(folder)
    counts = collections.Counter(name.split('/', 1)[0] for name in files.names() if '/' in name)
    if sum(counts.values()) < len(files):  # some are in no class folder
        files = FileList(folder, *pack_names(name for name in files.names() if '/' in name))
    for name in _list_classes(folder):
        if name not in classes:
            raise UserError(f'the class {name} of {folder} is not in {root}/train')
        if not counts[name]:
            raise UserError(f'there is no image in the class folder {folder}/{name}')
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [counts[name] for name in classes])
    return ImageList(files, labels, classes)


def _list_classes(folder):
    folders = _read_folder(folder)[1]
    if not folders:
        raise UserError(f'labels need one folder a class, but {folder} has no folder in it')
    return sorted(folders)


def _read_labels(path, images, classes):
    """The labels that a list has for these images: int32 [N]. A class's name precedes a number."""
    numbers, labels = {name: number for number, name in enumerate(classes)}, {}
    with open(path, errors='surrogateescape') as lines:
        for number, line in enumerate(lines, 1):
            words = line.strip().rsplit(None, 1)
            if not words:
                continue
            if len(words) != 2:
                raise UserError(f'line {number} of {path} is not "name label": {line[:80].strip()}')
            name, label = words
            value = numbers.get(label, int(label) if label.isdecimal() else len(classes))
            if value >= len(classes):
                raise UserError(f'line {number} of {path}: {label} is neither a class of the '
                                f'training images nor a number below {len(classes)}')
            labels[name[4:] if name.startswith('val/') else name] = value
    for image in images:
        if image not in labels:
            raise UserError(f'{path} has no label for {image}')
    return np.array([labels[image] for image in images], np.int32)


def digest_images(images: ImageList) -> str:
    """A short hexadecimal digest of names and labels, by which hosts can compare their data."""
    digest = hashlib.sha256()
    for array in images.files.packed():
        digest.update(array)
    if images.labels is not None:
        digest.update(images.labels.tobytes())
        digest.update('\n'.join(images.classes).encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]


def find_images(folder: str) -> FileList:
    """The images under a folder, in sorted order: from a kept list, if it has one that holds."""
    # whatever is wrong with that, the folder can be listed again
    with contextlib.suppress(Exception), np.load(_cache_path(folder), allow_pickle=False) as kept:
        stamps = json.loads(kept['stamps'].tobytes().decode())
        if all(_stamp(os.stat(os.path.join(folder, name))) == stamp
               for name, stamp in stamps.items()):
            return FileList(folder, kept['block'].tobytes(), kept['ends'])
    _read_folder(folder)  # whose errors are clear
    start, seen = time.time(), {}
    files = FileList(folder, *pack_names(_walk(folder, '', (), seen)))
    if time.time() - start > SLOW_LISTING:
        _save_list(folder, files, seen, start)
    return files


def _walk(folder, prefix, above, seen):
    """Yield the names, relative to the folder, of all images under folder/prefix, sorted. `above`
    has (device, inode) of the folders around; `seen` gets an os.stat_result by the name of every
    folder, and None by that of every dangling link."""
    path = os.path.join(folder, prefix[:-1])
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return  # a link to a folder around it
    seen[prefix] = status
    names, folders = _read_folder(path)
    for name in names:
        if name in folders:
            yield from _walk(folder, prefix + name + '/', above + (identity,), seen)
        elif name.lower().endswith(EXTENSIONS):
            yield prefix + name
        elif not os.path.exists(os.path.join(path, name)):
            seen[prefix + name] = None


def _read_folder(folder):
    """The sorted names in a folder, hidden ones left out, and the set of those that are folders."""
    names, folders = [], set()
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}')
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith('.'):
                    continue
                # a broken link stays in the list, so that it is reported when it cannot be read
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.add(entry.name)
                elif not (entry.is_symlink() or entry.is_file()):
                    continue  # reading a pipe or a device may block for ever
                names.append(entry.name)
    except OSError as error:
        raise UserError(f'cannot read the folder {folder}: {error.strerror}')
    return sorted(names), folders


# ---- kept lists

# A list that took long to make is kept in the user's cache. It holds while every folder in it has
# the inode, mtime and ctime that it had then: a new, removed or renamed file changes the times of
# its folder (tar and rsync set mtime back, but no program sets ctime back). So two changes are not
# seen: of a file's contents, which the list does not hold, and of a link from one file to another.
# A list is not kept where times are not reliable: with a dangling link, which may lead to a folder
# tomorrow; of folders that changed within the last minute (a clock's tick can be 2 s long, or the
# clock wrong); on object stores by FUSE, and on FAT.
SLOW_LISTING, SETTLED = 1, 60  # seconds
UNTIMED = ('fuse', 'vfat', 'msdos', 'exfat')


def _cache_path(folder):
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.environ['HOME'], '.cache')
    # the inode, for hosts that share a home but not the data
    key = json.dumps([os.path.realpath(folder), os.stat(folder).st_ino, EXTENSIONS])
    return os.path.join(home, 'moco', hashlib.sha256(key.encode()).hexdigest()[:16] + '.npz')


def _stamp(status):
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _save_list(folder, files, seen, start):
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
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as temporary:
            np.savez(temporary + '/list.npz', stamps=np.frombuffer(stamps, np.uint8),
                     block=np.frombuffer(block, np.uint8), ends=ends)
            os.replace(temporary + '/list.npz', path)
