"""Images in uncompressed tar files: a tar file is a folder of its name without .tar. A member
key.cls, as of WebDataset, has the number of the class of key.jpg."""
import functools
import os
import posixpath
import re
import resource
import tarfile
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np

from errors import UserError, printable
from image_files import (EXTENSIONS, HIDDEN, HIDDEN_FOLDER, SYSTEM, SYSTEM_FOLDERS, TAR_NAME,
                         UNKNOWN, tar_of, why_no_image)

COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')  # gzip, bzip2, xz, zstd
NO_CLASS, BAD_CLASS = -1, -2  # in place of a class number: no .cls, and one without a number


class TarFiles:
    """file_lists.FileList for images of which some are in tar files. A process opens a tar file
    when it first reads from it, and may not have all open at once.

    Args:
        files: the FileList of their names.
        tars: list of (name as a folder, mtime in ns, size in bytes), of each tar file.
        places: int64 [4, N]: number of the tar file, or -1; first byte; number of bytes; class
            number, or NO_CLASS, or BAD_CLASS.
    """

    def __init__(self, files, tars, places: np.ndarray):
        self.root, self.names, self.packed = files.root, files.names, files.packed
        self.tars, self.places = tars, places
        self._files, self._pid, self._opened = files, None, {}

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        path, tar = self._files[index], self.places[0, index]
        if tar < 0:
            return path
        name = self.tars[tar][0]
        return tar_of(self.root, name) + path[len(os.path.join(self.root, name).rstrip('/')):]

    def read(self, index: int) -> bytes:
        tar, first, size, _ = self.places[:, index].tolist()
        return self._files.read(index) if tar < 0 else os.pread(self._open(tar), size, first)

    def take(self, indices) -> 'TarFiles':
        return TarFiles(self._files.take(indices), self.tars, self.places[:, indices])

    def __del__(self):
        for file in self._opened.values() if self._pid == os.getpid() else ():
            os.close(file)

    def _open(self, tar):
        if self._pid != os.getpid():  # a fork has closed them, and their numbers may be of others
            self._pid, self._opened = os.getpid(), {}
        if tar not in self._opened:
            if len(self._opened) >= max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2):
                os.close(self._opened.pop(next(iter(self._opened))))
            name, *stamp = self.tars[tar]
            file = os.open(tar_of(self.root, name), os.O_RDONLY)
            status = os.fstat(file)
            if stamp != [status.st_mtime_ns, status.st_size]:
                os.close(file)
                raise ValueError('its tar file has changed since it was listed')
            self._opened[tar] = file
        return self._opened[tar]


def locate(names: Iterator[str], tars: List[Tuple[str, np.ndarray]], count: int) -> np.ndarray:
    """`places` of TarFiles, from (name, places that list_tar() gave) of each tar file in the order
    of a list's names. The images of a tar file lie side by side in it."""
    places, numbered = np.full([4, count], -1, np.int64), enumerate(names)
    for number, (tar, found) in enumerate(tars):
        if found.shape[1]:
            first = next(i for i, name in numbered if name.startswith(tar + '/' * bool(tar)))
            places[0, first:first + found.shape[1]] = number
            places[1:, first:first + found.shape[1]] = found
    return places


def find_class_numbers(files) -> Optional[np.ndarray]:
    """The class number of each image of a file_lists.FileList, int64 [N], if there are any."""
    numbers = files.places[3] if isinstance(files, TarFiles) else np.array([])
    if (numbers == NO_CLASS).all():
        return None
    for fault, text in ((NO_CLASS, 'has no class number in a .cls beside it, as other images have'),
                        (BAD_CLASS, 'the .cls beside it is no class number, as 0, 1, 2')):
        if (numbers == fault).any():
            raise UserError(printable(f'{files[int((numbers == fault).argmax())]}: {text} '
                                      f'({(numbers == fault).sum()} of {len(numbers)} images)'))
    return numbers


@functools.lru_cache(maxsize=2)  # train.tar and val.tar are asked for several times
def list_tar(path: str, stamp) -> Tuple[str, np.ndarray, Dict[str, str]]:
    """The images in a tar file: their names, each with NUL behind it, in the order of folders;
    int64 [3, N]: first byte, number of bytes, class number; and what is left out, {name: reason}.
    Only headers and class numbers are read. `stamp`: what tells a changed file."""
    left_out = {}
    with open(path, 'rb') as file:
        if file.read(6).startswith(COMPRESSED):
            raise UserError(f'{path} is compressed: decompress it')
        try:
            stem = os.path.basename(path)[:-len('.tar')]
            found = _list_members(file, 0, os.fstat(file.fileno()).st_size, stem, True, left_out)
        except (tarfile.TarError, ValueError, OSError) as error:
            raise UserError(f'the tar file {path} is damaged or cut off: {error}')
    names = sorted(found, key=lambda name: name.replace('/', '\0'))
    places = np.array([found[name] for name in names], np.int64).reshape(-1, 3).T
    return ''.join(name + '\0' for name in names), places, left_out


def _list_members(file, start, end, stem, may_nest, left_out):
    """{name: (first byte, number of bytes, class number)} of the tar file in these bytes of a
    file."""
    file.seek(start)
    found, folders, tars, classes = {}, set(), {}, {}
    tar = tarfile.TarFile(fileobj=file)
    for member in iter(tar.next, None):
        tar.members = []  # it would keep all
        name = posixpath.normpath('/' + member.name.lstrip('/'))[1:]
        place = member.offset_data, member.size
        what, reason = _why_left_out(file, member, name)
        folders.add(name if member.isdir() else posixpath.dirname(name))
        if may_nest and TAR_NAME.search(name) and member.isreg() and not what:
            tars[name[:-len('.tar')]] = place
        elif reason == UNKNOWN and name.lower().endswith('.cls'):
            classes[name[:-len('.cls')]] = _read_number(file, member)
        elif reason:
            left_out[what or name] = reason
        elif not what and not member.isdir():
            found[name] = place  # of two, the last one: tar would write it over the other
    file.seek(tar.offset)
    if tar.offset + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
        raise ValueError('it does not end as tar files do')
    # WebDataset's keys end at the first dot: 1.cls is of 1.left.jpg, unless there is 1.left.cls
    found = {name: place + (classes.get(posixpath.splitext(name)[0], classes.get(
        re.sub(r'\.[^/]*$', '', name), NO_CLASS)),) for name, place in found.items()}

    for name, (first, size) in tars.items():
        if name in folders:
            raise ValueError(f'both {name} and {name}.tar are in it')
        inner, inner_left_out = {}, {}
        if size:
            inner = _list_members(file, first, first + size, posixpath.basename(name), False,
                                  inner_left_out)
        found.update((f'{name}/{image}', place) for image, place in inner.items())
        left_out.update((f'{name}/{image}', why) for image, why in inner_left_out.items())
    # `tar cf a.tar a`
    own = len(stem) + 1
    if found and all(name.startswith(stem + '/') for name in found):
        found = {name[own:]: place for name, place in found.items()}
    return found


def _read_number(file, member):
    file.seek(member.offset_data)
    text = file.read(min(64, member.size)).strip()
    return int(text) if re.fullmatch(rb'[0-9]{1,18}', text) else BAD_CLASS


def _why_left_out(file, member, name):
    """(what, reason), as image_files has them: (None, None) of an image or a folder."""
    parts, is_image = name.split('/'), name.lower().endswith(EXTENSIONS)
    for i, part in enumerate(parts):
        if part.startswith('.') or part in SYSTEM_FOLDERS and i < len(parts) - 1:
            kind = (HIDDEN if i == len(parts) - 1 else
                    HIDDEN_FOLDER if part.startswith('.') else SYSTEM)
            return '/'.join(parts[:i + 1]), kind if is_image else None
    if member.isdir():
        return None, None
    if not member.isreg() or member.issparse():
        return None, 'linked or special in a tar file'
    if is_image:
        return None, None
    file.seek(member.offset_data)
    return None, why_no_image(name, file.read(min(32, member.size)))
