"""tar_files.py and tools/pack.py: images in tar files, read as those in folders."""
import gzip
import io
import itertools
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time

import cv2
import numpy as np
import pytest

import decoder
import file_lists
import subset
import tar_files
from errors import UserError
from image_lists import digest_images, list_images
from images import PHOTO, write_image
from test_serve_data import folder, same, start  # noqa: F401, fixtures
from tools import pack


def make(root):
    """Class folders whose order is not that of the names with .tar, or of whole paths."""
    for i, name in enumerate(['a/2.png', 'a/10.JPEG', 'a/deep/3.png', 'a/deep-1.png', 'a-b/1.png',
                              'a.b/' + 120 * 'x' + '.png', 'a.b/caf\xe9.png', 'a!/photo']):
        write_image(root / 'train' / name, i)
        write_image(root / 'val' / name, 10 + i)
    return root


def write_tar(path, names, top='', form=tarfile.GNU_FORMAT):
    """A tar file of {name: Path of a file, or bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(str(path), 'w', format=form) as tar:
        for name, content in names.items():
            content = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(top + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def files_in(folder, reverse=False):
    return {os.path.relpath(str(path), str(folder)): path
            for path in sorted(folder.rglob('*'), reverse=reverse) if path.is_file()}


def class_tars(source, target, **kwargs):
    for split in ('train', 'val'):
        for path in (source / split).iterdir():
            top = path.name + '/' if kwargs.get('top') == 'own' else kwargs.get('top', '')
            write_tar(target / split / (path.name + '.tar'), files_in(path, True),
                      **dict(kwargs, top=top))


def split_tars(source, target):
    for split in ('train', 'val'):
        write_tar(target / (split + '.tar'), files_in(source / split, True), './')


def tars_of_tars(source, target):  # ImageNet's ILSVRC2012_img_train.tar
    class_tars(source, target / 'tmp')
    for split in ('train', 'val'):
        write_tar(target / (split + '.tar'), files_in(target / 'tmp' / split, True))
    shutil.rmtree(str(target / 'tmp'))


def by_tar(source, target):  # as people do it
    for split in ('train', 'val'):
        (target / split).mkdir(parents=True)
        subprocess.check_call(['tar', 'cf', str(target / split / 'a.tar'), '-C',
                               str(source / split), 'a'])
        for name in ('a-b', 'a.b', 'a!'):
            subprocess.check_call(['tar', 'cf', str(target / split / (name + '.tar')), '-C',
                                   str(source / split / name), '.'])


def mixed(source, target):
    class_tars(source, target)
    for split in ('train', 'val'):
        (target / split / 'a.tar').unlink()
        shutil.copytree(str(source / split / 'a'), str(target / split / 'a'))


def linked(source, target):
    class_tars(source, target / 'elsewhere')
    for split in ('train', 'val'):
        (target / split).symlink_to(target / 'elsewhere' / split)


LAYOUTS = {
    'class tars': class_tars,
    'class tars with their folder in them': lambda *at: class_tars(*at, top='own'),
    'PAX': lambda *at: class_tars(*at, form=tarfile.PAX_FORMAT),
    'by pack.py': lambda source, target: pack.main([str(source), str(target)]),
    'split tars': split_tars, 'tars of tars': tars_of_tars, 'by tar': by_tar, 'mixed': mixed,
    'linked': linked,
}


def expect_same(one, two, *how):
    one, two = list_images(str(one), *how), list_images(str(two), *how)
    assert list(one.files.names()) == list(two.files.names())
    assert digest_images(one) == digest_images(two) and one.classes == two.classes
    assert np.array_equal(one.labels, two.labels)
    assert len(one.files) == len(two.files)
    # in an order that leads to and fro
    for i in np.random.RandomState(0).permutation(len(one.files)):
        assert one.files.read(i) == two.files.read(i)
    return two


@pytest.mark.parametrize('layout', sorted(LAYOUTS))
def test_tar_files_are_the_folders(tmp_path, layout):
    make(tmp_path / 'folders')
    LAYOUTS[layout](tmp_path / 'folders', tmp_path / 'tars')
    for split, labelled in itertools.product(('train', 'val'), (False, True)):
        images = expect_same(tmp_path / 'folders', tmp_path / 'tars', split, labelled)
        assert images.notes == [] and len(images.files) == 8
        assert any('.tar/' in path for path in images.files)


def test_paths_for_messages(tmp_path):
    make(tmp_path / 'folders')
    mixed(tmp_path / 'folders', tmp_path / 'tars')
    split_tars(tmp_path / 'folders', tmp_path / 'more')
    paths = list(list_images(str(tmp_path / 'tars')).files)
    assert f'{tmp_path}/tars/train/a-b.tar/1.png' in paths
    assert f'{tmp_path}/tars/train/a/deep/3.png' in paths
    paths = list(list_images(str(tmp_path / 'more')).files)
    assert f'{tmp_path}/more/train.tar/a/deep/3.png' in paths


@pytest.mark.parametrize('where', ['val.txt', 'val/val.txt'])
def test_flat_images_with_a_list(tmp_path, where):
    for name in ('train/c/1.png', 'train/d/1.png', 'val/x.png', 'val/y.png', 'val/z.png'):
        write_image(tmp_path / 'folders' / name)
    (tmp_path / 'folders' / where).write_text('x.png d\ny.png c\nz.png d\n')
    pack.main([str(tmp_path / 'folders'), str(tmp_path / 'tars')])
    assert (tmp_path / 'tars/val.tar').exists() and (tmp_path / 'tars/train/c.tar').exists()
    for how in (('val', True), ('val',), ('train', True), ('train',)):
        images = expect_same(tmp_path / 'folders', tmp_path / 'tars', *how)
    # or a tar file in val/, as the only folder in it
    (tmp_path / 'tars/val').mkdir()
    (tmp_path / 'tars/val.tar').rename(tmp_path / 'tars/val/images.tar')
    images = list_images(str(tmp_path / 'tars'), 'val', True)
    assert images.labels.tolist() == [1, 0, 1] and images.files.read(0)
    assert list(images.files.names())[0].startswith('images/')


@pytest.mark.parametrize('names', [['1.png', 'b/2.png'], ['b/2.png', 'c/d/3.png'],
                                   ['b/b/2.png', 'b/b/3.png'], ['b/b/2', 'b/c/3', 'c/1.png'],
                                   ['val/1.png', 'b/2.png']])
def test_folders_without_train(tmp_path, names):
    for name in names:
        write_image(tmp_path / 'folders' / name)
    pack.main([str(tmp_path / 'folders'), str(tmp_path / 'tars')])
    expect_same(tmp_path / 'folders', tmp_path / 'tars')
    assert not list((tmp_path / 'tars').rglob('*.png'))


# ------------------------------------------------------------------------------ class numbers

PNG = cv2.imencode('.png', np.zeros([8, 8, 3], np.uint8))[1].tobytes()


def write_shards(root, split='train', numbers=(10, 9, 2, 10, 9), **others):
    """Two shards of images '<i>.png' with these class numbers, or none of None; and others in the
    second."""
    for shard in range(2):
        members = {}
        for i in range(shard, len(numbers), 2):
            members[f'{i}.png'] = PNG
            if numbers[i] is not None:
                members[f'{i}.cls'] = str(numbers[i]).encode()
        write_tar(root / split / f'{shard:06d}.tar', dict(members, **others if shard else {}))


def test_class_numbers_beside_images(tmp_path):
    write_shards(tmp_path)
    write_shards(tmp_path, 'val', (9, '10\n', '002'))
    train, val = (list_images(str(tmp_path), split, True) for split in ('train', 'val'))
    assert train.classes == val.classes == ['2', '9', '10'] and train.labels.dtype == np.int32
    assert list(train.files.names()) == ['000000/0.png', '000000/2.png', '000000/4.png',
                                         '000001/1.png', '000001/3.png']
    assert train.labels.tolist() == [2, 0, 1, 1, 2] and val.labels.tolist() == [1, 0, 2]
    assert train.notes == val.notes == []
    chosen = subset.choose(train, '1-per-class')
    assert sorted(chosen.labels.tolist()) == [0, 1, 2] and len(chosen.files) == 3

    # a list, or folders named by the numbers, may be val/
    shutil.rmtree(str(tmp_path / 'val'))
    for name in ('9/1.png', '10/1.png', '2/1.png', '10/2.png'):
        write_image(tmp_path / 'val' / name)
    val = list_images(str(tmp_path), 'val', True)
    assert [val.classes[label] for label in val.labels] == [
        name.split('/')[0] for name in val.files.names()] == ['10', '10', '2', '9']
    shutil.rmtree(str(tmp_path / 'val'))
    write_tar(tmp_path / 'val.tar', {'1.png': PNG, '2.png': PNG})
    (tmp_path / 'val.txt').write_text('2.png 10\n1.png 2\n')
    assert list_images(str(tmp_path), 'val', True).labels.tolist() == [0, 2]


@pytest.mark.parametrize('members, expected', [
    ({'1.png': PNG, '1.cls': b'4', '2.png': PNG, '2.CLS': b'5', '2.json': b'{}'}, [4, 5]),
    ({'d.x/1.cls': b'4', 'd.x/1.left.png': PNG, 'd.x/1.right.png': PNG}, [4, 4]),
    ({'1.a.png': PNG, '1.a.cls': b'4', '1.b.png': PNG, '1.b.cls': b'5'}, [4, 5]),
    ({'train/1.png': PNG, 'train/1.cls': b'4', 'train/x.npy': b'x'}, [4]),
    ({'photo': PNG, 'photo.cls': b'4', '._photo.cls': b'x', 'gone.cls': b'cat'}, [4]),
    ({'1.png': PNG, '2.cls': PNG}, None),  # an image
])
def test_which_number_is_whose(tmp_path, members, expected):
    write_tar(tmp_path / 'train.tar', members)
    files = list_images(str(tmp_path)).files
    assert len(files) == list(members.values()).count(PNG)
    numbers = tar_files.find_class_numbers(files)
    assert numbers is expected is None or numbers.tolist() == expected
    if expected:
        assert list_images(str(tmp_path), 'train', True).classes == sorted(map(str, set(expected)))


def test_pretraining_needs_no_class_numbers(tmp_path):
    write_shards(tmp_path / 'with', numbers=(0, 'cat', None))
    write_shards(tmp_path / 'without', numbers=(None, None, None))
    one = list_images(str(tmp_path / 'with'))
    assert digest_images(one) == digest_images(list_images(str(tmp_path / 'without')))
    assert one.notes == []
    write_shards(tmp_path / 'more', **{'1.json': b'{}', '3.json': b'{}'})
    assert list_images(str(tmp_path / 'more')).notes == [
        f'{tmp_path}/more/train: left out 2 files: 2 of no known image format '
        '(000001/1.json, 000001/3.json)']


@pytest.mark.parametrize('train, val, split, message', [
    ((0, 1, 1, None), (0, 1), 'train', r'train/000001.tar/3.png: has no class number .*1 of 4'),
    ((0, None, 1, None), (0, 1), 'val', r'train/000001.tar/1.png: has no class .*2 of 4 images'),
    ((0, 'cat', 1), (0, 1), 'train', 'train/000001.tar/1.png: the .cls beside it is no class'),
    ((0, -1, 1), (0, 1), 'train', 'train/000001.tar/1.png: the .cls beside it is no class'),
    ((0, '', 1), (0, 1), 'train', 'train/000001.tar/1.png: the .cls beside it is no class'),
    ((0, '1.5'), (0, 1), 'train', 'train/000001.tar/1.png: the .cls beside it is no class'),
    ((0, 1), (0, 2), 'val', r'val/000001.tar/1.png: its class number 2 is not in .*/train$'),
    ((0, 1), (None, None), 'val', r'val/000000.tar: has no class numbers in .cls files, as'),
    ((None, None), (0, 1), 'val', r'val/000000.tar/0.png: has a class number .* has any$'),
])
def test_errors_of_class_numbers(tmp_path, train, val, split, message):
    write_shards(tmp_path, 'train', train)
    write_shards(tmp_path, 'val', val)
    with pytest.raises(UserError, match='^' + str(tmp_path) + '/' + message):
        list_images(str(tmp_path), split, True)
    assert len(list_images(str(tmp_path)).files) == len(train)  # without labels


def test_shards_in_class_folders_or_beside_images_are_no_guess(tmp_path):
    write_shards(tmp_path, 'train/part')
    with pytest.raises(UserError, match='/part/000000.tar/0.png: has a class .*/train has any'):
        list_images(str(tmp_path), 'train', True)
    shutil.move(str(tmp_path / 'train/part/000000.tar'), str(tmp_path / 'train/000000.tar'))
    write_image(tmp_path / 'train/a/1.png')
    with pytest.raises(UserError, match='/train/a/1.png: has no class number in a .cls'):
        list_images(str(tmp_path), 'train', True)


@pytest.mark.parametrize('top', ['train', ''])
def test_packing_keeps_class_numbers(tmp_path, top):
    if top:
        write_shards(tmp_path / 'shards', **{'7.left.png': PNG, '7.cls': b'9', '8': PNG,
                                             '8.cls': b'12'})
    else:
        write_tar(tmp_path / 'shards/train.tar', {'1.png': PNG, '1.cls': b'4', 'd/2.left.png': PNG,
                                                  'd/2.cls': b'5'})
    write_shards(tmp_path / 'shards', 'val')
    pack.main([str(tmp_path / 'shards'), str(tmp_path / 'packed')])
    assert expect_same(tmp_path / 'shards', tmp_path / 'packed', 'train', True).labels.any()
    write_shards(tmp_path / 'shards', 'val', (9, 9, 9, 9, 9))
    with pytest.raises(SystemExit, match='was not packed from the same images'):
        pack.main([str(tmp_path / 'shards'), str(tmp_path / 'packed')])
    write_shards(tmp_path / 'shards', 'val', (9, 9, 9, 9, None))
    with pytest.raises(SystemExit, match='/val/000000.tar/4.png: has no class number'):
        pack.main([str(tmp_path / 'shards'), str(tmp_path / 'again')])


# -------------------------------------------------------------------------------- what is left out


def test_what_is_left_out_of_a_tar_file(tmp_path):
    png = write_image(tmp_path / '1.png').read_bytes()
    path = write_tar(tmp_path / 'root/a.tar', {
        'b/2': png, 'b/no.txt': b'P3 x', '._b/2.png': png, 'b/._2.png': png, '.DS_Store': b'x',
        '@eaDir/b/2.png': png, 'b/weights.pth.tar': b'x'})
    with tarfile.open(str(path), 'a') as tar:
        member = tarfile.TarInfo('b/linked.png')
        member.type, member.linkname = tarfile.SYMTYPE, '2'
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo('/abs/../../b/3.png'))
    (tmp_path / 'root/model.pth.tar').write_bytes(b'no tar file')
    (tmp_path / 'root/more.tar.gz').write_bytes(b'')
    images = list_images(str(tmp_path / 'root'))
    assert list(images.files.names()) == ['a/b/2', 'a/b/3.png']
    assert images.notes == [
        f'{tmp_path}/root: left out 8 files: 3 of no known image format (a/b/no.txt, '
        'a/b/weights.pth.tar, model.pth.tar), 1 hidden with images in it (a/._b), 1 hidden '
        '(a/b/._2.png), 1 of the system (a/@eaDir), 1 linked or special in a tar file '
        '(a/b/linked.png), 1 compressed, to be made a folder or a .tar (more.tar.gz)']


def test_a_name_that_is_twice_in_a_tar_file_is_the_last_one(tmp_path):
    path = write_tar(tmp_path / 'root/a.tar', {'1.png': b'old'})
    with tarfile.open(str(path), 'a') as tar:
        member = tarfile.TarInfo('./1.png')
        member.size = 3
        tar.addfile(member, io.BytesIO(b'new'))
    files = list_images(str(tmp_path / 'root')).files
    assert len(files) == 1 and files.read(0) == b'new'


def cut(size):
    def damage(path):
        path.write_bytes(path.read_bytes()[:size])
    return damage


def overwrite(at, content):
    def damage(path):
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + content + whole[at + len(content):])
    return damage


@pytest.mark.parametrize('damage, message', [
    (cut(0), 'damaged'), (cut(300), 'damaged'), (cut(600), 'damaged'), (cut(1024), 'damaged'),
    (cut(1300), 'damaged'), (cut(1536), 'damaged'), (cut(2048), 'damaged'), (cut(2200), 'damaged'),
    (overwrite(0, b'xxxxxxxx'), 'damaged'), (overwrite(1024, b'xxxxxxxx'), 'damaged'),
    (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), 'is compressed: decompress'),
])
@pytest.mark.parametrize('labelled', [False, True])
def test_damaged_tar_files(tmp_path, damage, message, labelled):
    path = write_tar(tmp_path / 'train/a.tar', {'1.png': b'x', '2.png': b'y'})
    assert len(list_images(str(tmp_path), 'train', labelled).files) == 2
    damage(path)
    with pytest.raises(UserError, match=f'{path} .*{message}|{path} is {message}'):
        list_images(str(tmp_path), 'train', labelled)


def test_a_tar_file_in_a_tar_file_that_is_cut_off(tmp_path):
    inner = write_tar(tmp_path / 'a.tar', {'1.png': b'x', '2.png': b'y'}).read_bytes()
    for size in (600, 1024, 2048):
        write_tar(tmp_path / 'root/all.tar', {'a.tar': inner[:size], 'b.tar': inner})
        with pytest.raises(UserError, match='root/all.tar is damaged or cut off'):
            list_images(str(tmp_path / 'root'))


def test_what_is_there_twice(tmp_path):
    make(tmp_path)
    for labelled in (False, True):
        write_tar(tmp_path / 'train/a.tar', {'1.png': b'x'})
        with pytest.raises(UserError, match='/train/a and .*/train/a.tar are side by side'):
            list_images(str(tmp_path), 'train', labelled)
        (tmp_path / 'train/a.tar').rename(tmp_path / 'train.tar')
        with pytest.raises(UserError, match='/train and .*/train.tar are side by side'):
            list_images(str(tmp_path), 'train', labelled)
        # the user names one
        assert len(list_images(str(tmp_path / 'train')).files) == 8
        # an archive that was unpacked where it lies
        split_tars(tmp_path, tmp_path / 'tars')
        (tmp_path / 'train.tar').unlink()
        (tmp_path / 'tars/train.tar').rename(tmp_path / 'train/img.tar')
        with pytest.raises(UserError, match='/img.tar is beside all that is in it, a, a!, a-b'):
            list_images(str(tmp_path), 'train', labelled)
        (tmp_path / 'train/img.tar').unlink()
    png = (tmp_path / 'train/a/2.png').read_bytes()
    nested = write_tar(tmp_path / 'x.tar', {'2.png': png}).read_bytes()
    write_tar(tmp_path / 'root/all.tar', {'b/1.png': png, 'b.tar': nested})
    with pytest.raises(UserError, match='both b and b.tar are in it'):
        list_images(str(tmp_path / 'root'))


def test_tar_files_beside_train_are_named_at_most(tmp_path):
    make(tmp_path)
    for name in ('ILSVRC2012_img_train.tar', 'val.tar', 'more.tar'):
        (tmp_path / name).write_bytes(b'not looked at')
    (tmp_path / 'more').mkdir()
    assert list_images(str(tmp_path)).notes == [
        f'{tmp_path}: only train/ is read; beside it are tar files: ILSVRC2012_img_train.tar']


@pytest.mark.parametrize('name, labelled, message', [
    ('train/a.tar.gz', True, 'has no folder in it; decompress a.tar.gz$'),
    ('train/a.tgz', False, r'no image .*: 1 compressed, to be made a folder or a .tar \(a.tgz\)$'),
    ('train.tar.gz', False, r'no image .* to be made a folder or a .tar \(train.tar.gz\)$'),
])
def test_compressed_tar_files_are_named(tmp_path, name, labelled, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(gzip.compress(b''))
    with pytest.raises(UserError, match=message):
        list_images(str(tmp_path), 'train', labelled)


def test_a_tar_file_for_data(tmp_path):
    path = write_tar(tmp_path / 'a.tar', {'1.png': b'x'})
    with pytest.raises(UserError, match='a.tar is a tar file: name the folder that it is in$'):
        list_images(str(path))


# ------------------------------------------------------------------------------------- kept lists

@pytest.mark.parametrize('layout', ['class tars', 'split tars', 'tars of tars', 'mixed'])
@pytest.mark.parametrize('labelled', [False, True])
def test_an_index_is_kept_until_a_tar_file_changes(tmp_path, monkeypatch, layout, labelled):
    make(tmp_path / 'folders')
    LAYOUTS[layout](tmp_path / 'folders', tmp_path / 'tars')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(file_lists, 'SLOW_LISTING', -1)
    monkeypatch.setattr(file_lists, 'SETTLED', -60)
    read, list_tar = [], tar_files.list_tar.__wrapped__
    monkeypatch.setattr(tar_files, 'list_tar', lambda *args: read.append(args) or list_tar(*args))
    expect_same(tmp_path / 'folders', tmp_path / 'tars', 'train', labelled)
    assert read
    read.clear()
    expect_same(tmp_path / 'folders', tmp_path / 'tars', 'train', labelled)
    assert not read

    path = next((tmp_path / 'tars').rglob('a-b.tar' if layout in ('class tars', 'mixed') else
                                          'train.tar'))
    status = path.stat()
    path.write_bytes(write_tar(tmp_path / 'new', {'a-b/7.png': b'seven'}).read_bytes())
    os.utime(str(path), ns=(status.st_atime_ns, status.st_mtime_ns))
    images = list_images(str(tmp_path / 'tars'), 'train', labelled)
    assert read and 'a-b/7.png' in list(images.files.names())
    assert images.files.read(list(images.files.names()).index('a-b/7.png')) == b'seven'


def test_only_one_tar_file_of_train_is_read_for_val(tmp_path, monkeypatch):
    make(tmp_path / 'folders')
    class_tars(tmp_path / 'folders', tmp_path / 'tars')
    read, list_tar = [], tar_files.list_tar.__wrapped__
    monkeypatch.setattr(tar_files, 'list_tar', lambda *args: read.append(args) or list_tar(*args))
    expect_same(tmp_path / 'folders', tmp_path / 'tars', 'val', True)
    assert [path for path, _ in read if '/train/' in path] == [f'{tmp_path}/tars/train/a.tar']


def test_an_index_keeps_class_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(file_lists, 'SLOW_LISTING', -1)
    monkeypatch.setattr(file_lists, 'SETTLED', -60)
    write_shards(tmp_path)
    list_images(str(tmp_path))  # keeps them, too
    monkeypatch.setattr(tar_files, 'list_tar', None)
    assert list_images(str(tmp_path), 'train', True).labels.tolist() == [2, 0, 1, 1, 2]


# --------------------------------------------------------------------------------------- processes

def test_a_fork_opens_its_own_and_few_are_open(tmp_path):
    for i in range(40):
        write_tar(tmp_path / f'{i:02d}.tar', {'1.png': b'%d' % i})
    files = list_images(str(tmp_path)).files
    assert files.read(3) == b'3'
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            descriptor = files._opened[3]
            os.dup2(os.open(os.devnull, os.O_RDONLY), descriptor)  # another file's number
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptor + 40, hard))
            code = int([files.read(i) for i in range(40)] != [b'%d' % i for i in range(40)])
            code += 2 * (len(files._opened) > (descriptor + 40) // 2)
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0 and files.read(4) == b'4'


def test_a_tar_file_that_changes_under_way_is_not_read(tmp_path):
    write_tar(tmp_path / 'a.tar', {'1.png': b'x', '2.png': b'y'})
    images, reports = list_images(str(tmp_path)), []
    time.sleep(0.02)
    write_tar(tmp_path / 'a.tar', {'0.png': b'z', '2.png': b'y'})
    reader = decoder.ImageReader(images, lambda *report: reports.append(report))
    with pytest.raises(UserError, match='none of the 2 images'):
        reader.read(0)
    assert reports[0] == (0, 'its tar file has changed since it was listed', True)


def test_a_part_of_a_list(tmp_path):
    make(tmp_path / 'folders')
    mixed(tmp_path / 'folders', tmp_path / 'tars')
    one, two = (subset.choose(list_images(str(tmp_path / name), 'train', True), '1-per-class')
                for name in ('folders', 'tars'))
    assert digest_images(one) == digest_images(two) and len(two.files) == 4
    assert [one.files.read(i) for i in range(4)] == [two.files.read(i) for i in range(4)]


def test_a_data_server_sends_the_same(folder, start, tmp_path):  # noqa: F811
    pack.main([folder, str(tmp_path / 'tars')])
    for flags in (['--task', 'moco-v2'], ['--task', 'linear'], ['--task', 'eval']):
        streams, digests = [], []
        for data in (folder, str(tmp_path / 'tars')):
            server = start('--data', data, '--batch', 3, '--image-size', 16, '--workers', 2, *flags)
            digests.append(server.hello()['digest'])
            streams.append(server.pull_stream(0, 2, 3))
        assert digests[0] == digests[1] and same(*streams)


# ----------------------------------------------------------------------------------------- pack.py

def test_packing_is_resumed_and_always_the_same(tmp_path):
    make(tmp_path / 'folders')
    command = [sys.executable, pack.__file__, str(tmp_path / 'folders'), str(tmp_path / 'tars')]
    subprocess.check_call(command)
    first = {path: path.read_bytes() for path in (tmp_path / 'tars').rglob('*.tar')}
    kept = tmp_path / 'tars/train/a.tar'
    before = kept.stat().st_mtime_ns
    (tmp_path / 'tars/train/a-b.tar').unlink()
    subprocess.check_call(command)
    assert {path: path.read_bytes() for path in (tmp_path / 'tars').rglob('*.tar')} == first
    assert kept.stat().st_mtime_ns == before
    # tar makes folders of it
    (tmp_path / 'again').mkdir()
    subprocess.check_call(['tar', 'xf', str(kept)], cwd=str(tmp_path / 'again'))
    assert sorted(files_in(tmp_path / 'again/a')) == sorted(files_in(tmp_path / 'folders/train/a'))


def test_resized_images(tmp_path, capsys):
    for name in ('b/1.jpg', 'b/3.jpg', 'c/small.png'):
        write_image(tmp_path / 'folders/train' / name)
    shutil.copy(PHOTO, str(tmp_path / 'folders/train/b/1.jpg'))
    (tmp_path / 'folders/train/b/2.jpg').write_bytes(b'\xff\xd8 damaged')
    (tmp_path / 'folders/train/b/3.jpg').write_bytes(
        cv2.imencode('.png', np.full((10, 1000, 3), 7, np.uint8))[1].tobytes())
    pack.main([str(tmp_path / 'folders'), str(tmp_path / 'tars'), '--max-side', '100'])
    assert f'left out {tmp_path}/folders/train/b/2.jpg: ' in capsys.readouterr().err
    images = list_images(str(tmp_path / 'tars'), 'train', True)
    assert list(images.files.names()) == ['b/1.jpg', 'b/3.jpg', 'c/small.png']
    assert decoder.decode(images.files.read(1))[0].shape == (1, 100, 3)
    assert images.files.read(2) == (tmp_path / 'folders/train/c/small.png').read_bytes()
    full = decoder.decode(open(PHOTO, 'rb').read())[0]
    small = cv2.resize(full, (100, 75), interpolation=cv2.INTER_AREA)
    assert images.files.read(0) == cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 95])[
        1].tobytes()


def test_what_is_not_packed(tmp_path):
    make(tmp_path / 'folders')
    write_image(tmp_path / 'mine/1.png')
    for out, flags, message in (('mine', [], 'is not empty'), ('folders/x', [], 'is in .*folders'),
                                ('folders', [], 'is in .*folders')):
        with pytest.raises(SystemExit, match=message):
            pack.main([str(tmp_path / 'folders'), str(tmp_path / out)] + flags)
    arguments = [str(tmp_path / 'folders'), str(tmp_path / 'tars')]
    pack.main(arguments)
    for change in (lambda: arguments.append('--max-side=3'),
                   lambda: (arguments.pop(), write_image(tmp_path / 'folders/train/a/new.png'))):
        change()
        with pytest.raises(SystemExit, match='was not packed from the same images in the same way'):
            pack.main(arguments)
    with pytest.raises(SystemExit, match='no image'):
        (tmp_path / 'empty').mkdir()
        pack.main([str(tmp_path / 'empty'), str(tmp_path / 'out')])


def test_a_tar_file_is_written_whole_or_not(tmp_path, monkeypatch):
    make(tmp_path / 'folders')
    add, added = tarfile.TarFile.addfile, []

    def fail(*args):
        added.append(add(*args))
        if len(added) == 7:
            raise OSError('disk full')
    monkeypatch.setattr(tarfile.TarFile, 'addfile', fail)
    with pytest.raises(SystemExit, match='disk full'):
        pack.main([str(tmp_path / 'folders'), str(tmp_path / 'tars')])
    # sorted: a has 4 images, a! one, a-b one, a.b two
    assert sorted(files_in(tmp_path / 'tars')) == ['.packed', 'train/a!.tar', 'train/a-b.tar',
                                                   'train/a.tar']
    monkeypatch.undo()
    pack.main([str(tmp_path / 'folders'), str(tmp_path / 'tars')])
    expect_same(tmp_path / 'folders', tmp_path / 'tars', 'train', True)
