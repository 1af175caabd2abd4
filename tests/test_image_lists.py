"""image_lists.py: lists of images and labels, and lists that are kept."""
import os
import shutil
import time

import cv2
import numpy as np
import pytest

import decoder
import image_lists
from errors import UserError
from image_lists import digest_images, list_images
from images import write_image


def relative(images, root):
    return [os.path.relpath(path, str(root)) for path in images.files]


# ------------------------------------------------------------------------------------------ lists

def test_class_folders(tmp_path):
    for name in ['train/b/2.JPG', 'train/b/1.png', 'train/a/deep/x.jpeg', 'train/a/y.webp',
                 'train/c/z.bmp', 'val/c/1.png', 'val/a/1.png']:
        write_image(tmp_path / name)
    (tmp_path / 'train/b/notes.txt').write_text('x')
    (tmp_path / 'train/.hidden').mkdir()
    write_image(tmp_path / 'train/b/.hidden.png')
    write_image(tmp_path / 'train/loose.png')

    train = list_images(str(tmp_path), 'train', labelled=True)
    assert relative(train, tmp_path) == ['train/a/deep/x.jpeg', 'train/a/y.webp', 'train/b/1.png',
                                         'train/b/2.JPG', 'train/c/z.bmp']
    assert train.labels.tolist() == [0, 0, 1, 1, 2] and train.labels.dtype == np.int32
    assert train.classes == ['a', 'b', 'c']

    # a class that val lacks keeps its number
    val = list_images(str(tmp_path), 'val', labelled=True)
    assert relative(val, tmp_path) == ['val/a/1.png', 'val/c/1.png']
    assert val.labels.tolist() == [0, 2]

    unlabelled = list_images(str(tmp_path), 'train')
    assert relative(unlabelled, tmp_path) == relative(train, tmp_path) + ['train/loose.png']
    assert unlabelled.labels is None and unlabelled.classes is None


@pytest.mark.parametrize('where', ['val.txt', 'val/val.txt'])
def test_flat_val_with_list(tmp_path, where):
    for name in ['train/a/1.png', 'train/b c/1.png', 'train/d/1.png',
                 'val/x.png', 'val/y y.png', 'val/z.png']:
        write_image(tmp_path / name)
    (tmp_path / where).write_text('z.png d\n\ny y.png 1\nval/x.png 2\nelsewhere.png 0\n')
    val = list_images(str(tmp_path), 'val', labelled=True)
    assert relative(val, tmp_path) == ['val/x.png', 'val/y y.png', 'val/z.png']
    assert val.labels.tolist() == [2, 1, 2]


def test_any_folder_for_pretraining(tmp_path):
    for name in ['b.png', 'a/2.png', 'a/1.png']:
        write_image(tmp_path / name)
    assert relative(list_images(str(tmp_path)), tmp_path) == ['a/1.png', 'a/2.png', 'b.png']


def test_links_are_followed_without_looping(tmp_path):
    write_image(tmp_path / 'elsewhere/1.png')
    write_image(tmp_path / 'root/train/a/2.png')
    (tmp_path / 'root/train/b').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'root/train/a/up').symlink_to(tmp_path / 'root/train/a')
    (tmp_path / 'root/train/a/gone.png').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'root/train/a/self').symlink_to(tmp_path / 'root/train/a/self')
    os.mkfifo(str(tmp_path / 'root/train/a/pipe.png'))  # whoever opened it would wait for ever
    images = list_images(str(tmp_path / 'root'), 'train', labelled=True)
    # the broken link is listed, and will be reported when it is read; a link to itself is no image
    assert relative(images, tmp_path / 'root') == ['train/a/2.png', 'train/a/gone.png',
                                                   'train/b/1.png']


def test_names_that_are_not_utf8(tmp_path):
    path = os.path.join(os.fsencode(str(tmp_path)), b'\xff.png')
    with open(path, 'wb') as file:
        file.write(cv2.imencode('.png', np.full((4, 4, 3), 7, np.uint8))[1].tobytes())
    images = list_images(str(tmp_path))
    assert decoder.decode(images.files.read(0))[0, 0].tolist() == [7, 7, 7]


def test_digest_sees_names_and_labels(tmp_path):
    for root in ('one', 'two', 'three', 'four'):
        write_image(tmp_path / root / 'train/a/1.png')
        write_image(tmp_path / root / 'train/b/1.png')
    (tmp_path / 'three/train/b/1.png').rename(tmp_path / 'three/train/b/2.png')
    (tmp_path / 'four/train/0').mkdir()
    write_image(tmp_path / 'four/train/0/1.png')
    digests = [digest_images(list_images(str(tmp_path / root), 'train', labelled=True))
               for root in ('one', 'two', 'three', 'four')]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def make_flat_val(tmp_path, lines):
    for name in ['train/a/1.png', 'train/b/1.png', 'val/x.png', 'val/y.png']:
        write_image(tmp_path / name)
    if lines is not None:
        (tmp_path / 'val.txt').write_text(lines)


@pytest.mark.parametrize('lines, message', [
    (None, 'have no labels'),
    ('x.png 0\n', 'val.txt has no label for y.png'),
    ('x.png 0\ny.png cat\n', 'line 2 of .*val.txt: cat is neither a class'),
    ('x.png 0\ny.png 2\n', 'line 2 of .*val.txt: 2 is neither a class .* number below 2'),
    ('x.png 0\ny.png -1\n', 'line 2 .* -1'),
    ('x.png 0\n\ny.png\n', 'line 3 of .*val.txt is not "name label": y.png'),
])
def test_errors_of_label_lists(tmp_path, lines, message):
    make_flat_val(tmp_path, lines)
    with pytest.raises(UserError, match=message):
        list_images(str(tmp_path), 'val', labelled=True)


@pytest.mark.parametrize('files, folders, split, labelled, message', [
    ([], [], 'train', False, 'there is no image'),
    (['a.txt'], ['train'], 'train', False, 'there is no image .* in .*/train$'),
    (['a.png'], [], 'train', True, 'there is no folder .*/train$'),
    (['train/a.png'], [], 'train', True, 'one folder a class'),
    (['train/a/1.png'], ['train/b'], 'train', True, 'no image in the class folder .*/train/b$'),
    (['train/a/1.png'], [], 'val', True, 'there is no folder .*/val$'),
    (['train/a/1.png', 'val/a/1.png'], ['val/b'], 'val', True, 'the class b of .* is not in'),
    (['train/a/1.png'], ['val/a'], 'val', True, 'no image in the class folder .*/val/a$'),
])
def test_errors_of_folders(tmp_path, files, folders, split, labelled, message):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in files:
        write_image(tmp_path / name)
    with pytest.raises(UserError, match=message):
        list_images(str(tmp_path), split, labelled)


def test_missing_root(tmp_path):
    with pytest.raises(UserError, match='there is no folder .*/gone'):
        list_images(str(tmp_path / 'gone'))


# --------------------------------------------------------------------------------- lists from cache

@pytest.fixture
def listed(tmp_path, monkeypatch):
    """listed(labelled=False): paths and labels of a folder whose lists are kept however short and
    new they are, and whether they were not listed anew. A second one is of a clean cache."""
    for name in ('a/1.png', 'a/deep/2.png', 'b/3.png', 'b/4.png'):
        write_image(tmp_path / 'root/train' / name)
    write_image(tmp_path / 'elsewhere/5.png')
    write_image(tmp_path / 'other/6.png')
    (tmp_path / 'root/train/c').symlink_to(tmp_path / 'elsewhere')
    monkeypatch.setattr(image_lists, 'SLOW_LISTING', -1)
    monkeypatch.setattr(image_lists, 'SETTLED', -60)
    walks, walk = [], image_lists._walk

    def count_walks(*args):
        walks.append(args)
        return walk(*args)
    monkeypatch.setattr(image_lists, '_walk', count_walks)

    def list_folder(labelled=False, cache='cache'):
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / cache))
        before = len(walks)
        images = list_images(str(tmp_path / 'root'), 'train', labelled)
        labels = None if images.labels is None else images.labels.tolist()
        time.sleep(0.05)  # a tick of the clock, before something changes
        return relative(images, tmp_path / 'root'), labels, len(walks) == before
    return list_folder


def test_an_unchanged_folder_is_listed_once(listed):
    names = ['train/a/1.png', 'train/a/deep/2.png', 'train/b/3.png', 'train/b/4.png',
             'train/c/5.png']
    assert listed() == (names, None, False)
    assert listed() == (names, None, True)
    assert listed(labelled=True) == (names, [0, 0, 1, 1, 2], True)


def set_back(path):
    """Let a folder look as old as before, as far as a program can."""
    status = path.stat()
    return lambda: os.utime(str(path), ns=(status.st_atime_ns, status.st_mtime_ns))


def rename_and_set_back(root):
    again = set_back(root / 'b')
    (root / 'b/3.png').rename(root / 'b/0.png')
    again()


def replace_folder(root):
    times = [set_back(root), set_back(root / 'b')]
    (root / 'b').rename(root.parent / 'b')
    write_image(root / 'b/7.png')
    for again in times:
        again()


def retarget(root):
    (root / 'c').unlink()
    (root / 'c').symlink_to(root / '../../other')


def replace_target(root):
    elsewhere = root.parent.parent / 'elsewhere'
    elsewhere.rename(root.parent.parent / 'gone')
    (root.parent.parent / 'other').rename(elsewhere)


CHANGES = {
    'a file comes': lambda root: write_image(root / 'b/0.png'),
    'a file comes deep below': lambda root: write_image(root / 'a/deep/0.png'),
    'a file goes': lambda root: (root / 'a/1.png').unlink(),
    'a file is renamed': lambda root: (root / 'b/3.png').rename(root / 'b/0.png'),
    'a file is renamed, and times are set back': rename_and_set_back,
    'a file moves': lambda root: (root / 'b/3.png').rename(root / 'a/3.png'),
    'a folder comes': lambda root: write_image(root / 'd/0.png'),
    'a folder goes': lambda root: shutil.rmtree(str(root / 'a/deep')),
    'a folder is renamed': lambda root: (root / 'b').rename(root / 'd'),
    'a folder is replaced, and times are set back': replace_folder,
    'a file comes to a linked folder': lambda root: write_image(root / 'c/0.png'),
    'a link leads elsewhere': retarget,
    'what a link leads to is replaced': replace_target,
    'a link goes': lambda root: (root / 'c').unlink(),
    'the folder is replaced': lambda root: (
        root.rename(root.parent / 'old'), write_image(root / 'a/0.png')),
}


@pytest.mark.parametrize('change', sorted(CHANGES))
def test_a_change_is_noticed(listed, tmp_path, change):
    before, _, _ = listed()
    assert listed() == (before, None, True)
    CHANGES[change](tmp_path / 'root/train')
    after, _, _ = listed(cache='clean')
    assert after != before
    assert listed() == (after, None, False)
    assert listed() == (after, None, True)


def test_lists_that_may_not_hold_are_not_kept(listed, tmp_path, monkeypatch):
    # of a folder that has just changed
    monkeypatch.setattr(image_lists, 'SETTLED', 60)
    listed()
    assert not listed()[2]

    # with a link to nowhere, where a folder may be later; unless its name is an image's
    monkeypatch.setattr(image_lists, 'SETTLED', -60)
    link = tmp_path / 'root/train/d'
    link.symlink_to(tmp_path / 'nowhere')
    listed()
    assert not listed()[2]
    link.rename(tmp_path / 'root/train/d.png')
    listed()
    assert listed()[2]
    link.with_name('d.png').unlink()

    # partly on a file system without reliable times
    status = os.stat(str(tmp_path))
    mounts = tmp_path / 'mountinfo'
    line = '36 35 {}:{} / /mnt rw,noatime shared:1 - {} /dev/sdx rw\n'
    for kind in ('vfat', 'fuse.sshfs', 'ext4'):
        mounts.write_text(line.format(0, 0, 'fuse') + line.format(
            os.major(status.st_dev), os.minor(status.st_dev), kind))
        monkeypatch.setattr(image_lists, 'open', lambda path: mounts.open(), raising=False)
        listed()
        assert listed()[2] == (kind == 'ext4')

    # of a short listing
    monkeypatch.setattr(image_lists, 'SLOW_LISTING', 60)
    listed(cache='another')
    assert not listed(cache='another')[2]


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(b'not a list'),
    lambda path: path.write_bytes(path.read_bytes()[:-100]),
    lambda path: path.write_bytes(path.read_bytes().replace(b'3.png', b'9.png')),
    lambda path: np.savez(str(path), stamps=np.zeros(3)),
    lambda path: np.savez(str(path), stamps=np.frombuffer(b'{}', np.uint8), block=[Evil()]),
    lambda path: (path.unlink(), path.mkdir()),
])
def test_a_damaged_cache_is_ignored(listed, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    expected = listed()
    path, = (tmp_path / 'cache/moco').iterdir()
    damage(path)
    assert listed() == expected
    assert not (tmp_path / 'evil').exists()


def test_no_cache_is_no_error(listed, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    expected = listed(cache='file')
    assert listed(cache='file') == expected
    # disk full, say
    monkeypatch.setattr(image_lists.os, 'replace', lambda *_: os.stat('/nowhere'))
    assert listed() == expected
    assert not list((tmp_path / 'cache/moco').iterdir())
    for name in ('XDG_CACHE_HOME', 'HOME'):
        monkeypatch.delenv(name)
    assert len(list_images(str(tmp_path / 'root')).files) == 5
