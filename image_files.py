"""Which files in a folder are images, and why the others are not."""
import collections
import contextlib
import io
import itertools
import os
import re
from typing import Dict, List, Optional, Tuple

from errors import UserError

# What the decoder reads. A file with such a name is an image without a look into it: ImageNet has
# 1.28 million, maybe on a network disk. Any other file is one if it starts as one.
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.pbm',
              '.pnm', '.pxm', '.gif', '.jpe', '.jfif', '.pjpeg', '.pjp', '.dib')
SIGNATURES = re.compile(  # BMP and PNM: with more of their headers, as texts may start so, too
    rb'\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|GIF8[79]a|BM.{4}\0{4}|P[1-6]\s+[\d#]', re.DOTALL)
# Cameras' raw files (.dng, .nef, .cr2 ...) start so, too: not if the name has another extension.
TIFF = re.compile(rb'II\*\0|MM\0\*')

# made by systems, storage and programs; never entered, never a class
SYSTEM_FOLDERS = {'lost+found', '@eaDir', '#recycle', '#snapshot', '$RECYCLE.BIN', '__MACOSX',
                  'System Volume Information', '__pycache__'}

# Kinds of names in a folder that are no files. All but the first and the tar files are reasons to
# leave something out, as notes give them.
FOLDER, HIDDEN, DANGLING, SYSTEM = 'folder', 'hidden', 'linked to nowhere', 'of the system'
HIDDEN_FOLDER = 'hidden with images in it'
# a tar file, as a folder; and one beside a folder or file of that name
TAR, TWICE = 'tar file', 'tar file beside a folder'
UNKNOWN = 'of no known image format'
TAR_NAME = re.compile(r'(?<!\.pth)\.tar$')
COMPRESSED_NAME = re.compile(r'\.(tar\.\w+|tgz|tbz2?|txz)$', re.IGNORECASE)


def read_folder(folder: str) -> Tuple[List[str], Dict[str, str]]:
    """The sorted names in a folder, and the kinds of those that are no files. A hidden file is only
    there if it has an image's extension. Tar files are there as folders, without .tar."""
    names, kinds = [], {}
    enter(folder)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, kind = entry.name, _kind(entry)
                if kind is not None:
                    if kind == HIDDEN and not name.lower().endswith(EXTENSIONS):
                        continue
                    kinds[name] = kind
                names.append(name)
    except OSError as error:
        raise UserError(f'cannot read the folder {folder}: {error.strerror}')
    if '.tar\n' in '\n'.join(names + ['']):
        tars = {name for name in names if name not in kinds and TAR_NAME.search(name)}
        names, folders = set(names) - tars, {name[:-len('.tar')] for name in tars}
        kinds.update((name, TWICE if name in names else TAR) for name in folders)
        names |= folders
    return sorted(names), kinds


def enter(folder: str) -> None:
    """An error if a folder does not exist, or cannot be entered."""
    try:
        os.stat(os.path.join(folder, os.curdir))
    except OSError as error:
        if os.path.islink(folder) and not os.path.isdir(folder):
            raise lost_link(folder)
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        is_file = folder.endswith('.tar') and os.path.isfile(folder)
        raise UserError(f'{folder} is a tar file: name the folder that it is in' if is_file else
                        f'there is no folder {folder}' if missing else
                        f'cannot read the folder {folder}: {error.strerror}')


def _kind(entry):
    """None for a file."""
    hidden = entry.name.startswith('.')
    try:
        if entry.is_dir():
            return (HIDDEN_FOLDER if hidden else
                    SYSTEM if entry.name in SYSTEM_FOLDERS else FOLDER)
        if entry.is_file() and not hidden:  # of a link, both need one os.stat()
            return None
    except OSError:  # a link to itself, say
        pass
    if hidden:
        return HIDDEN
    if os.path.exists(entry.path):
        return 'neither file nor folder'  # reading a pipe or a device may block for ever
    # an image's name stays in the list, so that it is reported when it cannot be read
    return None if entry.name.lower().endswith(EXTENSIONS) else DANGLING


def tar_of(folder: str, name: str = '') -> str:
    """The path of the tar file in place of a folder, or of one in it."""
    return (os.path.join(folder, name) if name else folder) + '.tar'


def is_tar(folder: str) -> bool:
    """Whether a tar file is in the place of a folder."""
    return not os.path.lexists(folder) and os.path.isfile(tar_of(folder))


def two_of_a_name(folder: str) -> UserError:
    return UserError(f'{folder} and {tar_of(folder)} are side by side: remove one or the other')


def why_no_image(path: str, start: bytes = None) -> Optional[str]:
    """The reason to leave out a file; None if it is an image by its name, or else by its start."""
    if path.lower().endswith(EXTENSIONS):
        return None
    try:
        if start is None:
            with io.FileIO(path) as file:
                start = file.read(32)
    except OSError:
        return 'that cannot be read'
    name = os.path.basename(path).lower().partition('?')[0]
    may_be_tiff = name.endswith(EXTENSIONS) or not os.path.splitext(name)[1]
    return (None if SIGNATURES.match(start) or may_be_tiff and TIFF.match(start) else
            'compressed, to be made a folder or a .tar' if COMPRESSED_NAME.search(name) else
            UNKNOWN)


def holds_image(folder: str) -> bool:
    """Whether an image is among the first 1000 names below a folder; not if it cannot be read."""
    folders, left = collections.deque([folder]), 1000
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in itertools.islice(entries, left):
                left, kind = left - 1, _kind(entry)
                if kind == FOLDER:
                    folders.append(entry.path)
                elif kind is None and not why_no_image(entry.path):
                    return True
    return False


def may_be_class(link: str) -> bool:
    """Whether a link to nowhere may have led to a folder, as its name has no extension."""
    return not re.search(r'\.[a-z]\w{0,4}$', link, re.IGNORECASE)


def lost_link(path: str) -> UserError:
    return UserError(f'the link {path} leads to {os.readlink(path)}, where no folder can be read')
