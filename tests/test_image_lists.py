"""image_lists.py and file_lists.py: lists of images and labels, and lists that are kept."""
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from PIL import Image

import decoder
import file_lists
import image_files
import image_lists
import labels
from errors import UserError
from image_lists import digest_images, list_images
from images import read_image, write_image


def relative(images, root):
    return [os.path.relpath(path, str(root)) for path in images.files]


def make(root, *names):
    """Images; empty folders, whose names end with /; and text files."""
    for name in names:
        if name.endswith('/'):
            (root / name).mkdir(parents=True)
        elif name.endswith('.txt'):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text('P3 x BM x')
        else:
            write_image(root / name)


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
    make(tmp_path, 'b.png', 'a/2.png', 'a/1.png')
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
    assert decoder.decode(images.files.read(0))[0][0, 0].tolist() == [7, 7, 7]


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


@pytest.mark.parametrize('files, folders, split, labelled, message', [
    ([], [], 'train', False, 'there is no image'),
    ([], ['train'], 'train', False, 'there is no image .* in .*/train$'),
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


# --------------------------------------------------------------------- images, and what is left out

FORMATS = ['JPEG', 'PNG', 'BMP', 'WEBP', 'TIFF', 'PPM', 'GIF']
NO_IMAGES = {'empty': b'', 'car': b'BMW 320 sells', 'page': b'<html>', 'paper': b'P5 paper',
             'sound': b'RIFF\x24\0\0\0WAVEfmt ', 'x.csv': b'II,1\n', 'x.txt': b'GIF\n'}


def test_images_without_an_extension_are_known_by_their_first_bytes(tmp_path):
    for mode in ('RGB', 'L', '1'):
        for kind in FORMATS if mode == 'RGB' else ['PPM']:
            encoded = io.BytesIO()
            # a BMP of this size has a line feed in its header
            Image.new(mode, (1, 53)).save(encoded, kind)
            (tmp_path / (kind + mode)).write_bytes(encoded.getvalue())
    write_image(tmp_path / 'photo.jpg?w=300')
    for name, content in NO_IMAGES.items():
        (tmp_path / name).write_bytes(content)
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path) == sorted(
        [kind + 'RGB' for kind in FORMATS] + ['PPML', 'PPM1', 'photo.jpg?w=300'])
    assert images.notes == [f'{tmp_path}: left out 7 files: 7 of no known image format (car, '
                            'empty, page, ...)']
    assert all(read_image(path) is not None for path in images.files)


@pytest.mark.parametrize('start', [b'II*\0', b'MM\0*'])
def test_raw_files_of_cameras_are_no_tiffs(tmp_path, start):
    names = ['a.tif', 'b.TIFF', 'c', 'd.tif?w=3', 'x.dng', 'x.NEF', 'x.cr2?w=3', 'x.bin']
    for name in names:
        (tmp_path / name).write_bytes(start + bytes(99))
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path) == names[:4]
    assert '4 of no known image format (x.NEF, ' in images.notes[0]


def test_names_in_messages_are_printable(tmp_path):
    make(tmp_path, 'a\n\x1b/1.png', 'a\n\x1b/\x7f\x9b\tb.txt')
    assert list_images(str(tmp_path)).notes == [
        f'{tmp_path}: left out 1 file: 1 of no known image format (a??/??\tb.txt)']
    for name in ('\n', 'a\n\x1b'):
        with pytest.raises(UserError, match=r'^there is no folder .*\?(/train)?$'):
            list_images(str(tmp_path / name), 'val', labelled=True)


def test_images_with_an_extension_are_not_opened(tmp_path, monkeypatch):
    names = sorted('x' + extension for extension in image_files.EXTENSIONS + ('.JPG', '.Jfif'))
    make(tmp_path, 'train/', 'val/', 'more/')
    for name in names:
        (tmp_path / 'train' / name).write_text('the decoder will say that this is none')
        (tmp_path / 'more' / name).write_text('')
    monkeypatch.setattr(image_files.io, 'FileIO', pytest.fail)
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path / 'train') == names
    assert images.notes == [f'{tmp_path}: only train/ is read; beside it are images in more/']


def make_all_kinds(root):
    make(root, 'a/1.png', 'b/2.png', 'a/deep/no.txt', 'b/._2.png', 'b/.DS_Store.txt', '.hid/3.png',
         'loose.png', 'val.txt', '@eaDir/b/thumb.jpg', 'lost+found/', 'a/@eaDir/x.txt')
    for name in ('a/gone', 'a/gone.png'):
        (root / name).symlink_to(root / 'nowhere')
    os.mkfifo(str(root / 'b/pipe.png'))
    (root / 'b/linked').symlink_to(root / 'b/pipe.png')
    (root / 'b/up').symlink_to(root)


LEFT_OUT = ('1 hidden with images in it (.hid), 1 of the system (@eaDir), 1 of no known image '
            'format (a/deep/no.txt), 1 linked to nowhere (a/gone), 1 hidden (b/._2.png), 2 neither '
            'file nor folder (b/linked, b/pipe.png)')


def test_notes_name_what_is_left_out(tmp_path):
    make_all_kinds(tmp_path / 'train')
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path / 'train') == ['a/1.png', 'a/gone.png', 'b/2.png', 'loose.png']
    assert images.notes == [f'{tmp_path}/train: left out 7 files: {LEFT_OUT}']

    images = list_images(str(tmp_path), 'train', labelled=True)
    assert relative(images, tmp_path / 'train') == ['a/1.png', 'a/gone.png', 'b/2.png']
    assert images.classes == ['a', 'b']
    assert images.notes == [f'{tmp_path}/train: left out 8 files: {LEFT_OUT}, '
                            '1 in no class folder (loose.png)']


def test_a_file_that_cannot_be_opened_is_noted(tmp_path, monkeypatch):
    make(tmp_path, '1.png', 'x.txt')
    monkeypatch.setattr(image_files.io, 'FileIO', lambda path: os.stat('/nowhere'))
    assert list_images(str(tmp_path)).notes == [
        f'{tmp_path}: left out 1 file: 1 that cannot be read (x.txt)']


def test_errors_name_what_is_left_out(tmp_path):
    make(tmp_path, 'train/a/x.txt', 'train/b/1.png')
    for labelled, message in ((True, 'no image in the class folder .*/train/a; .*/train: left out'),
                              (False, r'no image .* in .*/a; .*/a: left out 1 file: .*\(x.txt')):
        with pytest.raises(UserError, match=message):
            list_images(str(tmp_path if labelled else tmp_path / 'train/a'), 'train', labelled)


@pytest.mark.parametrize('quiet', [False, True])
def test_the_data_server_prints_notes(tmp_path, quiet):
    make(tmp_path, 'root/1.png', 'root/x.txt')
    server = subprocess.Popen(
        [sys.executable, os.path.join(os.path.dirname(image_lists.__file__), 'serve-data.py'),
         '--task', 'moco-v2', '--data', str(tmp_path / 'root'), '--address', str(tmp_path / 'at'),
         '--workers', '1'] + ['--quiet'] * quiet, stderr=subprocess.PIPE, universal_newlines=True)
    try:
        deadline = time.time() + 30
        while not (tmp_path / 'at/rank0-worker0').exists() and time.time() < deadline:
            assert server.poll() is None
            time.sleep(0.05)
        server.send_signal(signal.SIGTERM)
        lines = server.communicate(timeout=30)[1].splitlines()
    finally:
        server.kill()
        server.wait()
    note = f'serve-data: {tmp_path}/root: left out 1 file: 1 of no known image format (x.txt)'
    assert lines[:-1] == ([] if quiet else [note])


# ---------------------------------------------------------------------- what lies beside root/train

@pytest.mark.parametrize('names, note', [
    ([], None),
    (['val/a/1.png', 'README.txt', 'docs/x.txt', '.git/1.png', '@eaDir/1.png', 'empty/'], None),
    (['Test2017/', 'more/deep/1.png', 'extra/IMG'], 'images in extra/, more/'),
    (['val.txt', 'b.png', 'IMG'], 'loose images: IMG, b.png'),
    (['dev/', 'more/1.png', '1.png'], 'images in more/, and loose images: 1.png'),
    (['val/'] + [f'{i}/1.png' for i in range(8)], 'images in 0/, 1/, 2/, 3/, 4/, 5/, and 2 more'),
])
def test_train_is_read_alone(tmp_path, names, note):
    make(tmp_path, 'train/1.png', *names)
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path) == ['train/1.png']
    assert images.notes == (
        [f'{tmp_path}: only train/ is read; beside it are {note}'] if note else [])


@pytest.mark.parametrize('names', [['bus/1.png', 'boat/IMG', 'docs/x.txt'],
                                   ['bus/1.png', 'boat/deep/er/1.png', '1.png', 'evil.txt'],
                                   ['bus/1.png', 'boat/1.png', 'test_tube/', 'valley/', 'dev-1/']])
def test_train_may_be_a_class(tmp_path, names):
    make(tmp_path, 'train/1.png', *names)
    with pytest.raises(UserError) as error:
        list_images(str(tmp_path))
    assert str(error.value) == (
        f'{tmp_path}: is train/ the training images, or a class beside boat/, bus/? Give '
        f'{tmp_path}/train to read it alone; to read all, name it differently')
    assert len(list_images(str(tmp_path / 'train')).files) == 1

    # nobody asks where labels say it
    make(tmp_path, 'train/a/1.png')
    assert list_images(str(tmp_path), 'train', labelled=True).notes == [
        f'{tmp_path}/train: left out 1 file: 1 in no class folder (1.png)']


@pytest.mark.parametrize('folders, note', [
    ('Train Val', 'Val/ (give {}/Train to read that alone)'), ('val', 'val/'),
    ('images test2017', 'test2017/ (give {}/images to read that alone)'), ('a b Eval', 'Eval/'),
    ('a b valley', None),
])
def test_splits_that_are_read_with_the_rest_are_noted(tmp_path, folders, note):
    make(tmp_path, *[f'{name}/1.png' for name in folders.split()])
    images = list_images(str(tmp_path))
    assert len(images.files) == len(folders.split())
    assert images.notes == ([f'{tmp_path}: no train/ in it: everything is read, also ' +
                             note.format(tmp_path)] if note else [])


def test_the_look_beside_train_is_bounded(tmp_path, monkeypatch):
    make(tmp_path, 'train/1.png', *[f'annotations/{i % 9}/{i}.txt' for i in range(1200)])
    looked = []
    monkeypatch.setattr(image_files, 'why_no_image', lambda path: looked.append(path) or 'none')
    assert len(list_images(str(tmp_path)).files) == 1
    assert 900 < len(looked) <= 1000


def test_a_root_that_cannot_be_read_may_have_a_train_that_can(tmp_path, monkeypatch):
    make(tmp_path, 'train/1.png', 'more/1.png')
    monkeypatch.setattr(image_lists.os, 'access', lambda path, mode: False)
    assert len(list_images(str(tmp_path)).files) == 1


# ----------------------------------------------------------------------------------- system folders

def test_folders_that_cannot_be_entered(tmp_path, monkeypatch):
    """As root may enter all: a scandir() that refuses."""
    make(tmp_path, 'a/1.png', 'lost+found/1.png', '$RECYCLE.BIN/deep/1.png', 'a/private/1.png',
         '__MACOSX/a/._1.png', '#recycle/x.txt')
    scan, refused = os.scandir, {'lost+found'}

    def scandir(path):
        if os.path.basename(path) in refused:
            raise PermissionError(13, 'Permission denied', path)
        return scan(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path) == ['a/1.png', 'a/private/1.png']
    assert images.notes == [f'{tmp_path}: left out 1 file: 1 of the system ($RECYCLE.BIN)']

    refused.add('private')
    with pytest.raises(UserError, match='^cannot read the folder .*/private: Permission denied$'):
        list_images(str(tmp_path))


POWERS = '-dac_override,-dac_read_search'  # of root


@pytest.mark.skipif(not os.getuid() and not shutil.which('setpriv'), reason='root enters all')
@pytest.mark.parametrize('folder, split, labelled', [
    ('', 'train', ''), ('', 'val', 'labelled'), ('train', 'train', ''), ('train/a', 'train', ''),
    ('train/a', 'train', 'labelled'), ('train/a/deep', 'train', '')])
def test_folders_that_can_be_listed_but_not_entered(tmp_path, folder, split, labelled):
    make(tmp_path, 'train/a/deep/1.png', 'train/a/1.png', 'val/a/1.png')
    program = ('import sys, image_lists\n'
               'try: image_lists.list_images(*sys.argv[1:])\n'
               'except image_lists.UserError as error: print(error)')
    as_user = [] if os.getuid() else ['setpriv', '--bounding-set=' + POWERS, '--inh-caps=' + POWERS]
    (tmp_path / folder).chmod(0o600)
    try:
        said = subprocess.run(
            as_user + [sys.executable, '-c', program, str(tmp_path), split, labelled],
            cwd=os.path.dirname(image_lists.__file__), stdout=subprocess.PIPE,
            universal_newlines=True, check=True).stdout
    finally:
        (tmp_path / folder).chmod(0o700)
    assert said == f'cannot read the folder {tmp_path / folder}: Permission denied\n'


def test_folders_too_deep_are_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):
        os.mkdir('d')
        os.chdir('d')
    with pytest.raises(UserError, match=f'^the folders in {tmp_path} are too deeply nested$'):
        list_images(str(tmp_path))
    # which is too deep for pytest, too
    subprocess.run(['rm', '-r', str(tmp_path / 'd')], cwd=str(tmp_path), check=True)


@pytest.mark.parametrize('name', sorted(image_files.SYSTEM_FOLDERS) + ['.ipynb_checkpoints'])
def test_system_folders_are_no_classes(tmp_path, name):
    make(tmp_path, 'train/a/1.png', f'train/{name}/x.txt', 'val/a/1.png', f'val/{name}/1.png')
    for split in ('train', 'val'):
        images = list_images(str(tmp_path), split, labelled=True)
        assert images.classes == ['a'] and len(images.files) == 1
        assert bool(images.notes) == (split == 'val')


# ----------------------------------------------------------------------------------- dangling links

@pytest.mark.parametrize('link, split, labelled', [
    ('train/b', 'train', False), ('train/b', 'train', True), ('train/b', 'val', True),
    ('val/b', 'val', False), ('val/b', 'val', True), ('val/flat', 'val', True),
    ('train', 'train', False), ('train', 'train', True), ('val', 'val', True),
])
def test_a_folder_behind_a_dangling_link_is_missed(tmp_path, link, split, labelled):
    make(tmp_path, *[name for name in ('train/a/1.png', 'val/a/1.png', 'other/1.png')
                     if not name.startswith(link + '/')])
    (tmp_path / link).symlink_to('/nowhere')
    with pytest.raises(UserError) as error:
        list_images(str(tmp_path), split, labelled)
    assert str(error.value) == (f'the link {tmp_path}/{link} leads to /nowhere, where no folder '
                                'can be read')


@pytest.mark.parametrize('labelled', [False, True])
def test_a_dangling_link_with_an_extension_is_no_class(tmp_path, labelled):
    make(tmp_path, 'train/a/1.png')
    (tmp_path / 'train/README.txt').symlink_to('/nowhere')
    images = list_images(str(tmp_path), 'train', labelled)
    assert relative(images, tmp_path) == ['train/a/1.png']
    assert images.notes == [f'{tmp_path}/train: left out 1 file: 1 linked to nowhere (README.txt)']


def test_dangling_links_of_images_stay_listed(tmp_path):
    make(tmp_path, 'a/1.png')
    (tmp_path / '0.png').symlink_to('/nowhere')
    images = list_images(str(tmp_path))
    assert relative(images, tmp_path) == ['0.png', 'a/1.png'] and images.notes == []


# -------------------------------------------------------------------------------------- label lists

CLASSES, BOXES = ['cat', 'dog', 'n03'], '85 1 499 272'
LISTS_OF_LABELS = {
    'numbers': ('val.txt', 'x.JPEG 2\ny z.JPEG 0\n'),
    'names': ('val.txt', 'x.JPEG n03\ny z.JPEG cat\n'),
    'of Windows': ('val.txt', '\ufeffx.JPEG n03\r\ny z.JPEG 0\r\n'),
    'tabs': ('val.txt', 'x.JPEG\tn03\ny z.JPEG\tcat\n\n'),
    'commas': ('val.csv', 'x.JPEG,n03\ny z.JPEG, cat\n'),
    'semicolons': ('val.csv', 'x.JPEG;n03\ny z.JPEG;cat\n'),
    'quotes': ('val.csv', '"x.JPEG","n03"\n"y z.JPEG", "cat"\n'),
    'header': ('val.csv', '\nfilename,label\nx.JPEG,n03\ny z.JPEG,cat\n'),
    'header, boxes': ('val.csv', 'file;class;x;y;X;Y\nx.JPEG;n03;1;2;3;4\ny z.JPEG;cat;1;2;3;4\n'),
    'commas in a text': ('val.txt', 'x.JPEG,n03\ny z.JPEG,cat\n'),
    'no extensions': ('val.txt', 'x n03\ny z cat\n'),
    'folders': ('val.txt', './x.JPEG n03\nval/y z.JPEG cat\n'),
    'absolute': ('val.txt', '/data/val/x.JPEG n03\n/a/val/images/y z.JPEG cat\n'),
    'twice the same': ('val.txt', 'x.JPEG n03\nx.JPEG 2\ny z.JPEG cat\n'),
    'Tiny-ImageNet': ('val_annotations.txt', 'x.JPEG\tn03\t0\t32\t44\t62\n'
                                             'y z.JPEG\tcat\t0\t0\t1\t2\n'),
    'UTF-16': ('val.txt', '\ufeffx.JPEG n03\r\ny z.JPEG 0\r\n', 'utf-16-le'),
    'UTF-16, big-endian': ('val.txt', '\ufeffx.JPEG,n03\ny z.JPEG,0\n', 'utf-16-be'),
    'backslashes': ('val.txt', 'C:\\data\\val\\x.JPEG n03\nval\\y z.JPEG cat\n'),
    'quotes and blanks': ('val.txt', '"x.JPEG" \'n03\'\n"y z.JPEG" "cat"\n'),
    'quotes and one name': ('val.txt', 'x "n03"\n"y z" cat\n'),
    'labels first': ('val.txt', 'n03 x.JPEG\n0 y z.JPEG\n'),
    'labels first, header': ('val.csv', 'label,name\nn03,x\n0,y z\n'),
    'another extension': ('val.csv', 'x.png,n03\nval/y z.bmp,cat\n'),
    'ImageNet': ('LOC_val_solution.csv', f'ImageId,PredictionString\nx,n03 {BOXES} n03 1 2 3 4 \n'
                                         f'y z,cat {BOXES}\n'),
}


@pytest.mark.parametrize('kind', sorted(LISTS_OF_LABELS))
def test_lists_of_labels(tmp_path, kind):
    name, lines, encoding = (LISTS_OF_LABELS[kind] + ('utf-8',))[:3]
    for place in ('flat/val', 'flat', 'nested/val', 'nested'):  # nested is Tiny-ImageNet's val
        root = tmp_path / place.replace('/', '_')
        make(root, *[f'train/{name}/1.png' for name in CLASSES])
        images = ['x.JPEG', 'y z.JPEG']
        if 'nested' in place:
            images = ['images/' + image for image in images]
        make(root, *['val/' + image for image in images])
        (root / ('val' if 'val' in place else '') / name).write_bytes(lines.encode(encoding))
        val = list_images(str(root), 'val', labelled=True)
        assert relative(val, root / 'val') == images and val.classes == CLASSES
        assert val.labels.tolist() == [2, 0] and val.labels.dtype == np.int32
        assert val.notes == []
        assert list_images(str(root), 'val').notes == []


NUMBERS = [str(number) for number in range(1, 12)]


@pytest.mark.parametrize('classes, lines, labels', [
    (NUMBERS, 'x 1\ny 11', '1 11'), (NUMBERS, 'x 01\ny 011', '1 11'),
    (['01', '02', '3'], 'x 1\ny 3', '01 3'), (['01', '1', '2'], 'x 01\ny 1', '01 1'),
    (NUMBERS, 'x 0\ny 3', 'line 1 of .*: 0 is no class, and as a rank it is the class 1: where'),
    (['cat', '7'], 'x cat\ny 1', 'line 2 of .*: 1 is no class, and as a rank it is the class cat'),
    (['01', '1', '2'], 'x 001\ny 1', 'line 1 of .*: 001 is no class, and as a rank'),
    (NUMBERS, 'x 12\ny 1', 'line 1 of .*: 12 is neither a class of .* nor a number below 11$'),
    (['a', 'b'], 'x ' + 5000 * '9' + '\ny 1', 'line 1 of .*: 9{80} is neither a class'),
])
def test_labels_where_names_of_classes_are_numbers(tmp_path, classes, lines, labels):
    expect_labels(tmp_path, classes, ['x.png', 'y.png'], lines, labels)


@pytest.mark.parametrize('classes, lines, labels', [
    (['golden retriever', 'dog', 'my cat'], 'x golden retriever\ny dog', 'golden retriever dog'),
    (['golden retriever', 'dog', 'my cat'], 'dog x\nmy cat y', 'dog my cat'),
    (['cafe\u0301', 'dog'], 'x caf\xe9\ny dog', 'cafe\u0301 dog'),
    (['caf\xe9', 'dog'], 'x cafe\u0301\ny dog', 'caf\xe9 dog'),
    (['cat', 'dog'], 'lion x\ndog y', 'line 1 of .*: lion is neither a class'),
    (['cat', 'dog'], 'z cat\nz dog\ny cat', '1 of 2 images: x.png; its line 1 is "z cat"$'),
    (['cat', 'dog'], 'x: cat\ny: dog', '2 of 2 images: x.png, y.png; its line 1 is "x: cat"$'),
    (['cat', 'dog'], 'x.old cat\ny.old dog', '2 of 2 images: .* its line 1 is "x.old cat"$'),
])
def test_labels_of_words(tmp_path, classes, lines, labels):
    expect_labels(tmp_path, classes, ['x.png', 'y.png'], lines, labels)


def test_blanks_in_quotes(tmp_path):
    lines = '"x y.png" "golden retriever"\n\'z z\' dog'
    expect_labels(tmp_path, ['golden retriever', 'dog'], ['x y.png', 'z z.png'], lines,
                  'golden retriever dog')


@pytest.mark.parametrize('lines, labels', [
    ('label,id\n2,0\n0,1\n1,2', '2 0 1'), ('id,label\n2,0\n0,1\n1,2', '1 2 0'),
    ('2 0.png\n0 1.png\n1 2.png', '2 0 1'), ('0 0\n1 1\n2 2', '0 1 2'),
    ('0 1\n1 1\n2 1', '1 1 1'), ('1 0\n1 1\n1 2', '1 1 1'),
    ('2 0\n0 1\n1 2', 'both columns can be names'),
    ('class_id,id\n2,0\n0,1\n1,2', 'both columns can be names'),
])
def test_columns_that_cannot_be_told_apart(tmp_path, lines, labels):
    expect_labels(tmp_path, ['0', '1', '2'], ['0.png', '1.png', '2.png'], lines, labels)


def expect_labels(root, classes, images, lines, expected):
    """The classes' names, with blanks between them, or what an error matches."""
    make(root, *[f'train/{name}/1.png' for name in classes], *[f'val/{name}' for name in images])
    (root / 'val.txt').write_bytes(lines.encode())
    try:
        val = list_images(str(root), 'val', labelled=True)
    except UserError as error:
        assert re.search(expected, str(error))
    else:
        assert ' '.join(val.classes[label] for label in val.labels) == expected


def test_lists_that_differ(tmp_path):
    make_flat_val(tmp_path, 'x.png 0\ny.png 1\n')
    (tmp_path / 'val/val.csv').write_text('y.png,b\nx.png,a\n')
    assert list_images(str(tmp_path), 'val', labelled=True).labels.tolist() == [0, 1]
    (tmp_path / 'val/val.csv').write_text('y.png,a\nx.png,a\n')
    with pytest.raises(UserError, match=r'/val.txt and .*/val/val.csv give y.png different labels'):
        list_images(str(tmp_path), 'val', labelled=True)


def test_labels_of_another_split(tmp_path):
    make_flat_val(tmp_path, 'train/x.png 0\nval/x.png b\ntrain/x.png 0\nval/y.png a\ny.png 0\n')
    val = list_images(str(tmp_path), 'val', labelled=True)
    assert val.labels.tolist() == [1, 0] and val.notes == []


def test_labels_by_the_last_part_of_a_name_if_one_image_has_it():
    find = labels._finder(['images/a/1.png', 'images/b/1.png', 'images/2.png', 'images/2.png.jpg'])
    for name in ('images/b/1.png', '/d/val/images/b/1.png', 'images/b/1'):
        assert find(name) == (1, True)
    assert find('1.png') is None and find('1') is None
    assert find('2.png') == (2, False) and find('2.png.jpg') == (3, False)
    assert find('2') == (2, False) and find('3.png') is None


def test_class_folders_precede_a_list_unless_images_are_flat(tmp_path):
    make_flat_val(tmp_path, 'x.png 1\ny.png 0\n')
    make(tmp_path, 'val/a/1.png', 'val/b/1.png')
    val = list_images(str(tmp_path), 'val', labelled=True)
    assert relative(val, tmp_path) == ['val/x.png', 'val/y.png'] and val.labels.tolist() == [1, 0]
    assert val.notes == [f'{tmp_path}/val: left out 2 files: 2 in folders beside flat images '
                         '(a/1.png, b/1.png)']
    for name in ('x.png', 'y.png'):
        (tmp_path / 'val' / name).unlink()
    val = list_images(str(tmp_path), 'val', labelled=True)
    assert relative(val, tmp_path) == ['val/a/1.png', 'val/b/1.png']
    assert val.labels.tolist() == [0, 1] and val.notes == []

    # the only folder is Tiny-ImageNet's, unless it is a class
    shutil.rmtree(str(tmp_path / 'val/b'))
    (tmp_path / 'val.txt').write_text('1.png 1\n')
    for name, label in (('a', 0), ('c', 1)):
        (tmp_path / 'val/a').rename(tmp_path / 'val' / name)
        assert list_images(str(tmp_path), 'val', labelled=True).labels.tolist() == [label]


def test_many_labels_without_an_image_are_noted(tmp_path):
    lines = 'name label\nx.png 0\ny.png 1\n' + ''.join(f'{i}.png lion\n' for i in range(5))
    make_flat_val(tmp_path, lines)
    assert list_images(str(tmp_path), 'val', labelled=True).notes == []
    (tmp_path / 'val.txt').write_text(lines + 'z.png 0\n')
    assert list_images(str(tmp_path), 'val', labelled=True).notes == [
        f'{tmp_path}/val.txt has 6 labels for images that are not there']


def make_flat_val(tmp_path, lines):
    for name in ['train/a/1.png', 'train/b/1.png', 'val/x.png', 'val/y.png']:
        write_image(tmp_path / name)
    if lines is not None:
        (tmp_path / 'val.txt').write_text(lines)


@pytest.mark.parametrize('lines, message', [
    (None, 'have no labels'),
    ('x.png 0\n', 'val.txt has no label for 1 of 2 images: y.png$'),
    ('x.png 0\ny.png cat\n', 'line 2 of .*val.txt: cat is neither a class'),
    ('x.png 0\ny.png 2\n', 'line 2 of .*val.txt: 2 is neither a class .* number below 2'),
    ('x.png 0\ny.png -1\n', 'line 2 .* -1'),
    ('x.png 0\n\ny.png\n', 'line 3 of .*val.txt is not "name label": y.png'),
    ('x.png 0\ny.png 1\n' + 99 * 'z', 'line 3 of .*val.txt is not "name label": z{80}$'),
    ('x.png\t0\t1\t2\n', 'line 1 .*val.txt is not "name label": x.png\t0\t1\t2$'),
    ('x.png,a\ny.png,b,train\n', 'line 2 .*val.txt is not "name label": y.png,b,train$'),
    ('x.png,a\n"y\0,b\n', 'line 2 .*val.txt is not "name label": "y[?],b$'),
    ('x.png,a 1 2 3 4 b 1 2 3 4\n', 'line 1 .*: a 1 2 3 4 b 1 2 3 4 is neither a class'),
    ('name label\nx.png 0\nother label\n', '1 of 2 images: y.png; its line 3 is "other label"$'),
    ('x.png 1\ny.png 2\n', "val.txt are numbers from 1 to 2, as of ImageNet's devkit, in an order"),
    ('x.png 0\ny.png 0\nval/x.png b\n', 'lines 1 and 3 of .*val.txt give x.png different labels$'),
    ('\ufeffz.png 0\n', '2 of 2 images: x.png, y.png; its line 1 is "z.png 0"$'),
])
def test_errors_of_label_lists(tmp_path, lines, message):
    make_flat_val(tmp_path, lines)
    with pytest.raises(UserError, match=message):
        list_images(str(tmp_path), 'val', labelled=True)


def test_long_lists_of_names_are_cut(tmp_path):
    make_flat_val(tmp_path, 'x.png 0\ny.png 0\n')
    make(tmp_path, *[f'val/{i}.png' for i in range(8)])
    with pytest.raises(UserError, match='8 of 10 images: 0.png, .*, 5.png, and 2 more$'):
        list_images(str(tmp_path), 'val', labelled=True)


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
    monkeypatch.setattr(file_lists, 'SLOW_LISTING', -1)
    monkeypatch.setattr(file_lists, 'SETTLED', -60)
    walks, walk = [], file_lists._walk

    def count_walks(*args):
        walks.append(args)
        return walk(*args)
    monkeypatch.setattr(file_lists, '_walk', count_walks)

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


def test_kept_lists_keep_notes(listed, tmp_path):
    make(tmp_path / 'root/train', 'a/x.txt', '1.png')
    note = f'{tmp_path}/root/train: left out 1 file: 1 of no known image format (a/x.txt)'
    for labelled, holds in ((False, False), (False, True), (True, True), (True, True)):
        assert listed(labelled)[2] == holds
        notes = list_images(str(tmp_path / 'root'), 'train', labelled).notes
        assert notes == [note if not labelled else note.replace('1 file', '2 files') +
                         ', 1 in no class folder (1.png)']


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
    (root / 'b').rename(root.parent.parent / 'b')
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
        root.rename(root.parent.parent / 'old'), write_image(root / 'a/0.png')),
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
    monkeypatch.setattr(file_lists, 'SETTLED', 60)
    listed()
    assert not listed()[2]

    # with a link to nowhere, where a folder may be later; unless its name is an image's
    monkeypatch.setattr(file_lists, 'SETTLED', -60)
    link = tmp_path / 'root/train/a/d'
    link.symlink_to(tmp_path / 'nowhere')
    listed()
    assert not listed()[2]
    link.rename(tmp_path / 'root/train/a/d.png')
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
        monkeypatch.setattr(file_lists, 'open', lambda path: mounts.open(), raising=False)
        listed()
        assert listed()[2] == (kind == 'ext4')

    # of a short listing
    monkeypatch.setattr(file_lists, 'SLOW_LISTING', 60)
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
    monkeypatch.setattr(file_lists.os, 'replace', lambda *_: os.stat('/nowhere'))
    assert listed() == expected
    assert not list((tmp_path / 'cache/moco').iterdir())
    for name in ('XDG_CACHE_HOME', 'HOME'):
        monkeypatch.delenv(name)
    assert len(list_images(str(tmp_path / 'root')).files) == 5
