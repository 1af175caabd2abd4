#!/usr/bin/env python
"""Pack a folder of images into a few tar files, which all scripts read in place, as the folder.

    python tools/pack.py /path/to/imagenet /path/to/packed                   # byte for byte
    python tools/pack.py /path/to/imagenet /path/to/small --max-side 512     # larger ones resized

train/ and val/ of a DIR with a train/, else all of DIR. Each folder in them becomes a tar file; a
folder with images directly in it becomes one as a whole. So the list of images is the same: names,
order, labels (of shards: their .cls). With --max-side, an image whose longer side is longer becomes
a JPEG, whatever its name, and one that cannot be read is left out. The same command again goes on
where it was stopped.
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import contextlib
import functools
import io
import itertools
import multiprocessing
import shutil
import tarfile

import cv2

import decoder
import labels
import outputs
import tar_files
from errors import UserError, printable
from image_lists import digest_images, list_images
from job import cores

SLICE = 256  # images in memory
MARK = '.packed'  # a file in OUT that tells of what it was made, and how


def shrink(encoded: bytes, max_side: int, quality: int):
    """The bytes of an image, resized if its longer side is longer; or a text, why not."""
    try:
        image, _ = decoder.decode(encoded)
    except (ValueError, MemoryError) as error:
        return str(error) or 'takes more memory than there is'
    scale = max_side / max(image.shape[:2])
    if scale >= 1:
        return encoded
    size = tuple(max(1, round(scale * side)) for side in image.shape[1::-1])
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def write_tar(path, members, files, numbers, convert):
    """Write the images of (name in the tar file, index), and their class numbers, or None."""
    def add(name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
        tar.members = []  # it would keep all

    def leave_out(index, why):
        print(printable(f'left out {files[index]}: {why}'), file=sys.stderr)

    with outputs.replace(path) as temporary, tarfile.open(
            temporary, 'w', format=tarfile.GNU_FORMAT) as tar:
        for part in iter(lambda: list(itertools.islice(members, SLICE)), []):
            encoded = []
            for name, index in part:
                try:
                    encoded.append((name, index, files.read(index)))
                except (OSError, ValueError) as error:
                    leave_out(index, error)
            contents = convert([content for _, _, content in encoded])
            for (name, index, _), content in zip(encoded, contents):
                if isinstance(content, str):
                    leave_out(index, content)
                    continue
                add(name, content)
                if numbers is not None:
                    add(os.path.splitext(name)[0] + '.cls', str(numbers[index]).encode())
    print(printable(path), file=sys.stderr, flush=True)


def open_folder(out, settings):
    """Make OUT, or see that the same command made it."""
    mark = os.path.join(out, MARK)
    os.makedirs(out, exist_ok=True)
    if not os.listdir(out):
        with outputs.replace(mark) as temporary, open(temporary, 'w') as file:
            file.write(settings)
    with contextlib.suppress(OSError), open(mark) as file:
        if file.read() == settings:
            return
    raise UserError(f'{out} is not empty, and was not packed from the same images in the same way')


def pack(root, out, convert, how: str):
    """`convert` a list of bytes to one of bytes, or of texts why not; `how` is for MARK."""
    if (os.path.realpath(out) + os.sep).startswith(os.path.realpath(root) + os.sep):
        raise UserError(f'{out} is in {root}: name a folder outside')
    lists, val = [list_images(root)], os.path.join(root, 'val')
    if lists[0].files.root != root and (os.path.exists(val) or os.path.exists(val + '.tar')):
        lists.append(list_images(root, 'val'))
    lists = [images._replace(labels=tar_files.find_class_numbers(images.files)) for images in lists]
    open_folder(out, ' '.join([how] + list(map(digest_images, lists))))
    for files, numbers, _, notes in lists:
        for note in notes:
            print(note, file=sys.stderr)
        split, names = os.path.relpath(files.root, root), list(files.names())
        # in every tar file, the name of its folder: so tar makes that
        flat = '' if all('/' in name for name in names) else split.replace('.', 'train') + '/'
        members = ((flat + name, index) for index, name in enumerate(names))
        for folder, own in itertools.groupby(members, lambda member: member[0].split('/')[0]):
            path = os.path.join(out, '' if flat else split, folder) + '.tar'
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.exists(path):
                write_tar(path, own, files, numbers, convert)
    for folder, name in itertools.product(('', 'val'), labels.LISTS):
        source = os.path.join(root, folder, name)
        path = os.path.join(out, folder if os.path.isdir(os.path.join(out, folder)) else '', name)
        if os.path.isfile(source) and not os.path.exists(path):
            with outputs.replace(path) as temporary:
                shutil.copyfile(source, temporary)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='DIR', help='folder of images, see the README')
    parser.add_argument('out', metavar='OUT', help='folder to make')
    parser.add_argument('--max-side', type=int, metavar='N', help='pixels')
    parser.add_argument('--quality', type=int, default=95, help='of JPEGs that are made (95)')
    args = parser.parse_args(argv)
    if args.max_side is not None and args.max_side < 1 or not 1 <= args.quality <= 100:
        parser.error('--max-side must be at least 1, and --quality 1 to 100')
    root = os.path.normpath(args.folder)
    try:
        if args.max_side is None:
            pack(root, args.out, lambda contents: contents, 'byte for byte')
            return
        resize = functools.partial(shrink, max_side=args.max_side, quality=args.quality)
        with multiprocessing.get_context('fork').Pool(
                cores.num_cores(), decoder.set_up_process) as pool:
            pack(root, args.out, functools.partial(pool.map, resize), str(resize.keywords))
    except (UserError, OSError) as error:
        sys.exit(f'pack.py: error: {error}')


if __name__ == '__main__':
    main()
