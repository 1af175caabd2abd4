"""Lists of the files below a folder that are images, and the ones of large folders, kept."""
import contextlib
import hashlib
import json
import os
import tempfile
import time
from typing import Dict, Iterable, Iterator, List, Tuple

import numpy as np

import labels
import tar_files
from errors import UserError, enumerate_some
from image_files import (DANGLING, EXTENSIONS, FOLDER, HIDDEN_FOLDER, SIGNATURES, SYSTEM, TAR,
                         TWICE, holds_image, is_tar, lost_link, may_be_class, read_folder, tar_of,
                         two_of_a_name, why_no_image)


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


def find_images(folder: str) -> Tuple[FileList, Dict[str, Tuple[int, List[str]]]]:
    """The images under a folder, in sorted order, and what is left out, {reason: (number, first
    names)}: from a kept list, if it has one that holds."""
    # whatever is wrong with that, the folder can be listed again
    with contextlib.suppress(Exception), np.load(_cache_path(folder), allow_pickle=False) as kept:
        stamps = json.loads(kept['stamps'].tobytes().decode())
        if all(stamp(os.stat(os.path.join(folder, name))) == then
               for name, then in stamps.items()):
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
            leave_out(left_out, kind, prefix + name)


def _walk_tar(folder, tar, beside, seen, left_out, tars):
    """_walk() of the tar file in place of the folder folder/tar, which has these names beside it.
    `tars` gets (tar, mtime in ns, size, places of tar_files.list_tar())."""
    path = tar_of(folder, tar)
    status = os.stat(path)
    seen[tar_of(tar) if tar else os.path.realpath(path)] = status
    names, places, not_read = tar_files.list_tar(path, tuple(stamp(status)))
    names, prefix = names.split('\0')[:-1], tar + '/' * bool(tar)
    tops = {name.split('/', 1)[0] for name in names}
    if len(tops) > 1 and tops <= set(beside) - {os.path.basename(tar)}:
        raise UserError(f'{path} is beside all that is in it, {enumerate_some(sorted(tops))}: '
                        'remove one or the other')
    for name, reason in not_read.items():
        leave_out(left_out, reason, prefix + name)
    tars.append((tar, status.st_mtime_ns, status.st_size, places))
    for name in names:
        yield prefix + name


def leave_out(left_out: dict, reason: str, name: str) -> None:
    """Count what is left out in {reason: (number, the first names)}."""
    number, names = left_out.get(reason, (0, []))
    left_out[reason] = number + 1, (names + [name])[:3]


def describe_left_out(folder: str, left_out: dict) -> List[str]:
    """No note or one, for image_lists.ImageList."""
    if not left_out:
        return []
    total = sum(number for number, _ in left_out.values())
    reasons = [f'{number} {reason} ({", ".join(names)}{", ..." * (number > len(names))})'
               for reason, (number, names) in left_out.items()]
    return [f'{folder}: left out {total} file{"s" * (total > 1)}: ' + ', '.join(reasons)]


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


def stamp(status: os.stat_result) -> List[int]:
    """What changes whenever a folder or tar file does."""
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
        stamps = json.dumps({name: stamp(status) for name, status in seen.items()}).encode()
        (block, ends), path = files.packed(), _cache_path(folder)
        tars = json.dumps(getattr(files, 'tars', [])).encode()
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as temporary:
            np.savez(temporary + '/list.npz', stamps=np.frombuffer(stamps, np.uint8),
                     block=np.frombuffer(block, np.uint8), ends=ends,
                     tars=np.frombuffer(tars, np.uint8), places=getattr(files, 'places', []),
                     left_out=np.frombuffer(json.dumps(left_out).encode(), np.uint8))
            os.replace(temporary + '/list.npz', path)
