#!/usr/bin/env python
"""How long a data server takes to list ImageNet: 1,281,167 empty files in 1000 folders.

    python benchmarks/listing.py /path/to/a/new/folder    # about 4 minutes; the folder is removed

The first listing reads all folders, from a cold cache of the kernel if this may drop it (root);
the others take the list from the user's cache, here one inside the folder. Each is a new process.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
IMAGES, CLASSES = 1281167, 1000

LIST = '''
import sys, time
sys.path.insert(0, {here!r})
import image_lists
start = time.time()
images = image_lists.list_images({folder!r}, 'train', {labelled})
print(len(images.files), 'images in', format(time.time() - start, '.2f'), 's')
'''


def make_files(folder):
    """Fill train/ with files named as ImageNet's are."""
    for number in range(CLASSES):
        name = f'n{number:08d}'
        os.makedirs(os.path.join(folder, 'train', name))
        for image in range(number, IMAGES, CLASSES):
            path = os.path.join(folder, 'train', name, f'{name}_{image}.JPEG')
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def list_files(folder, what, labelled=False):
    code = LIST.format(here=HERE, folder=folder, labelled=labelled)
    output = subprocess.check_output(
        [sys.executable, '-c', code], universal_newlines=True,
        env=dict(os.environ, XDG_CACHE_HOME=os.path.join(folder, 'cache')))
    print(f'{what}: {output.strip()}', flush=True)


def drop_kernel_cache():
    """Returns 'cold' if that is allowed, else 'warm'."""
    os.sync()
    try:
        with open('/proc/sys/vm/drop_caches', 'w') as file:
            file.write('3\n')
        return 'cold'
    except OSError:
        return 'warm'


def main(folder):
    inodes = os.statvfs(os.path.dirname(os.path.abspath(folder))).f_favail
    if inodes < 2 * IMAGES:
        sys.exit(f'{folder}: a file system with {inodes} free inodes is too full')
    os.mkdir(folder)
    try:
        make_files(folder)
        print('waiting: a list is kept only if its folders are a minute old', flush=True)
        time.sleep(65)
        for what in ('all folders', 'the kept list'):
            list_files(folder, f'{what}, {drop_kernel_cache()}')
            if not os.path.isdir(os.path.join(folder, 'cache')):
                sys.exit(f'{folder}: the list is not kept, on this file system or since it took '
                         'less than a second')
        list_files(folder, 'the kept list, warm')
        list_files(folder, 'the kept list, labelled, warm', labelled=True)
        shutil.rmtree(os.path.join(folder, 'cache'))
        list_files(folder, 'all folders, warm')
    finally:
        shutil.rmtree(folder)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='FOLDER', help='where the files are made; must not exist')
    main(parser.parse_args().folder)
