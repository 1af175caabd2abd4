"""Lists, plan, single operations and views of data.py, against values computed by hand."""
import io
import os
import random
import shutil
import time

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import data
import references

PHOTO = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data/coffee.jpg')


def write_image(path, value=0, size=(8, 8)):
    """A lossless image, all of whose channels have this value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extension = path.suffix if path.suffix.lower() in data.EXTENSIONS else '.png'
    encoded = cv2.imencode(extension, np.full(size + (3,), value, np.uint8))[1]
    path.write_bytes(encoded.tobytes())
    return path


def relative(images, root):
    return [os.path.relpath(path, str(root)) for path in images.paths]


# ------------------------------------------------------------------------------------------ lists

def test_class_folders(tmp_path):
    for name in ['train/b/2.JPG', 'train/b/1.png', 'train/a/deep/x.jpeg', 'train/a/y.webp',
                 'train/c/z.bmp', 'val/c/1.png', 'val/a/1.png']:
        write_image(tmp_path / name)
    (tmp_path / 'train/b/notes.txt').write_text('x')
    (tmp_path / 'train/.hidden').mkdir()
    write_image(tmp_path / 'train/b/.hidden.png')
    write_image(tmp_path / 'train/loose.png')

    train = data.list_images(str(tmp_path), 'train', labelled=True)
    assert relative(train, tmp_path) == ['train/a/deep/x.jpeg', 'train/a/y.webp', 'train/b/1.png',
                                         'train/b/2.JPG', 'train/c/z.bmp']
    assert train.labels.tolist() == [0, 0, 1, 1, 2] and train.labels.dtype == np.int32
    assert train.classes == ['a', 'b', 'c']

    # a class that val lacks keeps its number
    val = data.list_images(str(tmp_path), 'val', labelled=True)
    assert relative(val, tmp_path) == ['val/a/1.png', 'val/c/1.png']
    assert val.labels.tolist() == [0, 2]

    unlabelled = data.list_images(str(tmp_path), 'train')
    assert relative(unlabelled, tmp_path) == relative(train, tmp_path) + ['train/loose.png']
    assert unlabelled.labels is None and unlabelled.classes is None


@pytest.mark.parametrize('where', ['val.txt', 'val/val.txt'])
def test_flat_val_with_list(tmp_path, where):
    for name in ['train/a/1.png', 'train/b c/1.png', 'train/d/1.png',
                 'val/x.png', 'val/y y.png', 'val/z.png']:
        write_image(tmp_path / name)
    (tmp_path / where).write_text('z.png d\n\ny y.png 1\nval/x.png 2\nelsewhere.png 0\n')
    val = data.list_images(str(tmp_path), 'val', labelled=True)
    assert relative(val, tmp_path) == ['val/x.png', 'val/y y.png', 'val/z.png']
    assert val.labels.tolist() == [2, 1, 2]


def test_any_folder_for_pretraining(tmp_path):
    for name in ['b.png', 'a/2.png', 'a/1.png']:
        write_image(tmp_path / name)
    assert relative(data.list_images(str(tmp_path)), tmp_path) == ['a/1.png', 'a/2.png', 'b.png']


def test_links_are_followed_without_looping(tmp_path):
    write_image(tmp_path / 'elsewhere/1.png')
    write_image(tmp_path / 'root/train/a/2.png')
    (tmp_path / 'root/train/b').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'root/train/a/up').symlink_to(tmp_path / 'root/train/a')
    (tmp_path / 'root/train/a/gone.png').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'root/train/a/self').symlink_to(tmp_path / 'root/train/a/self')
    os.mkfifo(str(tmp_path / 'root/train/a/pipe.png'))  # whoever opened it would wait for ever
    images = data.list_images(str(tmp_path / 'root'), 'train', labelled=True)
    # the broken link is listed, and will be reported when it is read; a link to itself is no image
    assert relative(images, tmp_path / 'root') == ['train/a/2.png', 'train/a/gone.png',
                                                   'train/b/1.png']


def test_names_that_are_not_utf8(tmp_path):
    path = os.path.join(os.fsencode(str(tmp_path)), b'\xff.png')
    with open(path, 'wb') as file:
        file.write(cv2.imencode('.png', np.full((4, 4, 3), 7, np.uint8))[1].tobytes())
    images = data.list_images(str(tmp_path))
    assert data.decode_image(images.paths[0])[0, 0].tolist() == [7, 7, 7]


def test_digest_sees_names_and_labels(tmp_path):
    for root in ('one', 'two', 'three', 'four'):
        write_image(tmp_path / root / 'train/a/1.png')
        write_image(tmp_path / root / 'train/b/1.png')
    (tmp_path / 'three/train/b/1.png').rename(tmp_path / 'three/train/b/2.png')
    (tmp_path / 'four/train/0').mkdir()
    write_image(tmp_path / 'four/train/0/1.png')
    digests = [data.digest_images(data.list_images(str(tmp_path / root), 'train', labelled=True))
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
    with pytest.raises(data.DataError, match=message):
        data.list_images(str(tmp_path), 'val', labelled=True)


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
    with pytest.raises(data.DataError, match=message):
        data.list_images(str(tmp_path), split, labelled)


def test_missing_root(tmp_path):
    with pytest.raises(data.DataError, match='there is no folder .*/gone'):
        data.list_images(str(tmp_path / 'gone'))


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
    monkeypatch.setattr(data, 'SLOW_LISTING', -1)
    monkeypatch.setattr(data, 'SETTLED', -60)
    walks, walk = [], data._walk

    def count_walks(*args):
        walks.append(args)
        return walk(*args)
    monkeypatch.setattr(data, '_walk', count_walks)

    def list_folder(labelled=False, cache='cache'):
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / cache))
        before = len(walks)
        images = data.list_images(str(tmp_path / 'root'), 'train', labelled)
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
    monkeypatch.setattr(data, 'SETTLED', 60)
    listed()
    assert not listed()[2]

    # with a link to nowhere, where a folder may be later; unless its name is an image's
    monkeypatch.setattr(data, 'SETTLED', -60)
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
        monkeypatch.setattr(data, 'open', lambda path: mounts.open(), raising=False)
        listed()
        assert listed()[2] == (kind == 'ext4')

    # of a short listing
    monkeypatch.setattr(data, 'SLOW_LISTING', 60)
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
    monkeypatch.setattr(data.os, 'replace', lambda *_: os.stat('/nowhere'))  # disk full, say
    assert listed() == expected
    assert not list((tmp_path / 'cache/moco').iterdir())
    for name in ('XDG_CACHE_HOME', 'HOME'):
        monkeypatch.delenv(name)
    assert len(data.list_images(str(tmp_path / 'root')).paths) == 5


# ---------------------------------------------------------------------------------------- reading

def test_decode(tmp_path):
    # a red pixel: BGR
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 2] = 255
    path = tmp_path / 'red.png'
    path.write_bytes(cv2.imencode('.png', red)[1].tobytes())
    np.testing.assert_array_equal(data.decode_image(str(path)), red)


def encode(image, kind, **options):
    """The bytes of a file of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode, colour, size=(24, 16)):
    return Image.new(mode, size, colour)


def decode(tmp_path, content, name='x.JPEG'):
    """What becomes of these bytes, whatever the name says that they are."""
    path = tmp_path / name
    path.write_bytes(content)
    return data.decode_image(str(path))


# name: (content, shape, colour of all pixels: BGR)
KINDS = {
    'PNG': (encode(flat('RGB', (200, 30, 60)), 'PNG'), (16, 24), [60, 30, 200]),
    'WebP': (encode(flat('RGB', (200, 30, 60)), 'WEBP', lossless=True), (16, 24), [60, 30, 200]),
    'TIFF': (encode(flat('RGB', (200, 30, 60)), 'TIFF'), (16, 24), [60, 30, 200]),
    # 255 - (cyan, magenta, yellow), each times 1 - black
    'CMYK JPEG': (encode(flat('CMYK', (5, 205, 155, 51)), 'JPEG', quality=100), (16, 24),
                  [80, 40, 200]),
    'gray JPEG': (encode(flat('L', 77), 'JPEG'), (16, 24), [77, 77, 77]),
    'progressive JPEG': (encode(flat('RGB', (80, 80, 80)), 'JPEG', progressive=True), (16, 24),
                         [80, 80, 80]),
    # the upper 8 bits
    'gray PNG of 16 bits': (
        cv2.imencode('.png', np.uint16([[0x80ff] * 24] * 16))[1].tobytes(),
        (16, 24), [0x80, 0x80, 0x80]),
    'PNG of 16 bits': (
        cv2.imencode('.png', np.uint16([[[0x1122, 0x3344, 0x80ff]] * 24] * 16))[1].tobytes(),
        (16, 24), [0x11, 0x33, 0x80]),
    'PNG of 1 bit': (encode(flat('1', 1), 'PNG'), (16, 24), [255, 255, 255]),
    'PNG with a palette': (encode(flat('RGB', (200, 30, 60)).convert('P', palette=Image.ADAPTIVE),
                                  'PNG'), (16, 24), [60, 30, 200]),
    'transparent PNG': (encode(flat('RGBA', (200, 30, 60, 0)), 'PNG'), (16, 24), [60, 30, 200]),
    'one pixel': (encode(flat('RGB', (80, 80, 80), (1, 1)), 'JPEG'), (1, 1), [80, 80, 80]),
    '20,000 pixels wide': (encode(flat('RGB', (80, 80, 80), (20000, 10)), 'JPEG'), (10, 20000),
                           [80, 80, 80]),
}


@pytest.mark.parametrize('kind', sorted(KINDS))
def test_every_kind_becomes_bgr_of_8_bits(tmp_path, kind):
    content, shape, colour = KINDS[kind]
    image = decode(tmp_path, content)
    assert image.dtype == np.uint8 and image.shape == shape + (3,)
    np.testing.assert_allclose(image, np.broadcast_to(colour, image.shape), atol=2)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.open(PHOTO).resize((32, 24)), kind, exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))[..., ::-1]
    assert expected.shape == ((24, 32, 3) if orientation < 5 else (32, 24, 3))
    np.testing.assert_allclose(decode(tmp_path, content), expected, atol=3)


def photo_with_thumbnail():
    """A JPEG with a whole JPEG in its header."""
    image = Image.open(PHOTO)
    thumbnail = encode(image.resize((80, 60)), 'JPEG')
    return encode(image, 'JPEG', exif=b'Exif\0\0' + thumbnail)


@pytest.mark.parametrize('whole', [
    encode(Image.open(PHOTO), 'JPEG'), encode(Image.open(PHOTO), 'JPEG', progressive=True),
    photo_with_thumbnail()], ids=['plain', 'progressive', 'with a thumbnail'])
def test_a_jpeg_that_was_cut_off_is_unreadable(tmp_path, whole):
    expected = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)
    for trailer in (b'', b'\0' * 999, b'video \xff\xda video'):
        np.testing.assert_array_equal(decode(tmp_path, whole + trailer), expected)
    # OpenCV would find the missing rows in its memory, perhaps from the image before
    for size in [0, 1, 2, 3, 4, 30, 2000] + [len(whole) * i // 9 for i in range(1, 9)] + [
            len(whole) - 2, len(whole) - 1]:
        assert decode(tmp_path, whole[:size]) is None
        # as by a file system that has lost blocks
        assert decode(tmp_path, whole[:size] + bytes(len(whole) - size)) is None


def test_a_jpeg_with_a_hole_is_the_same_every_time(tmp_path):
    whole = encode(Image.open(PHOTO), 'JPEG')
    holed = whole[:len(whole) // 2] + whole[-100:]
    seen = []
    for before in (0, 255):
        noise = np.full((375, 500, 3), before, np.uint8)
        assert decode(tmp_path, cv2.imencode('.png', noise)[1].tobytes()) is not None
        seen.append(decode(tmp_path, holed))
    np.testing.assert_array_equal(*seen)
    np.testing.assert_array_equal(seen[0][:100], decode(tmp_path, whole)[:100])


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'BMP', 'TIFF', 'PPM'])
def test_other_kinds_that_were_cut_off_are_unreadable(tmp_path, kind):
    whole = encode(Image.open(PHOTO).resize((64, 48)), kind)
    assert decode(tmp_path, whole) is not None
    for size in range(0, len(whole) - 64, len(whole) // 20):
        assert decode(tmp_path, whole[:size]) is None


@pytest.mark.parametrize('content', [
    b'', b'not an image', b'<html></html>', b'\x89PNG\r\n\x1a\n', b'\xff\xd8', b'\xff\xd8\xff\xd9',
    encode(flat('RGB', (1, 2, 3)), 'GIF')])  # this OpenCV has no GIF
def test_unreadable(tmp_path, content):
    assert decode(tmp_path, content) is None
    assert data.decode_image(str(tmp_path / 'gone.png')) is None
    assert data.decode_image(str(tmp_path)) is None


def test_the_next_readable_image_takes_the_place(tmp_path):
    for i in range(5):
        write_image(tmp_path / '{}.png'.format(i), value=i)
    for i in (3, 4):
        (tmp_path / '{}.png'.format(i)).write_bytes(b'')
    reported = []
    reader = data.ImageReader(data.list_images(str(tmp_path)), reported.append)
    for index, expected in [(2, 2), (4, 0), (3, 0), (4, 0)]:
        actual, image = reader.read(index)
        assert (actual, image[0, 0, 0]) == (expected, expected)
    assert reported == [4, 3]

    for i in range(3):
        (tmp_path / '{}.png'.format(i)).write_bytes(b'')
    with pytest.raises(data.DataError, match='none of the 5 images'):
        reader.read(0)


# ------------------------------------------------------------------------------ single operations

def step_of(name):
    """One step of the jitter, as an operation of its own."""
    def step(image, value):
        data.jitter(image, [(name, value)])
    return step


adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue = map(step_of, data.JITTER)


def adjusted(operation, pixels, value=None):
    """What an operation makes of a row of BGR pixels."""
    image = np.array([pixels], np.uint8)
    if value is None:
        operation(image)
    else:
        operation(image, value)
    return image[0].tolist()


def test_brightness():
    # truncated, as PIL does: 100 * 1.1, 99 * 1.1 = 108.9, 240 * 1.1 = 264
    assert adjusted(adjust_brightness, [[100, 99, 240]], 1.1) == [[110, 108, 255]]
    assert adjusted(adjust_brightness, [[100, 99, 0]], 0.6) == [[60, 59, 0]]


def test_contrast():
    # luma of gray pixels 10, 20, 90, 100 is themselves: mean 55
    gray = [[v] * 3 for v in (10, 20, 90, 100)]
    assert adjusted(adjust_contrast, gray, 0.5) == [[v] * 3 for v in (32, 37, 72, 77)]
    # 55 + 1.4 * (v - 55): -8, 6, 104, 118
    assert adjusted(adjust_contrast, gray, 1.4) == [[v] * 3 for v in (0, 6, 104, 118)]
    # the mean is rounded: of 10, 11 it is 10.5 -> 11, and of the luma: 0.114 B of blue 200 is 22.8
    assert adjusted(adjust_contrast, [[10] * 3, [11] * 3], 0) == [[11] * 3] * 2
    assert adjusted(adjust_contrast, [[200, 0, 0]], 0) == [[23] * 3]


def test_saturation():
    # luma of B 50, G 100, R 200: 0.114 * 50 + 0.587 * 100 + 0.299 * 200 = 124.2 -> 124
    assert adjusted(adjust_saturation, [[50, 100, 200]], 0) == [[124] * 3]
    assert adjusted(adjust_saturation, [[50, 100, 200]], 0.5) == [[87, 112, 162]]
    # 124 + 1.4 * (v - 124) = 20.4, 90.4, 230.4
    assert adjusted(adjust_saturation, [[50, 100, 200]], 1.4) == [[20, 90, 230]]


@pytest.mark.parametrize('shift, expected', [
    (0, [[0, 0, 255], [0, 255, 0], [255, 0, 0], [77, 77, 77]]),
    (1 / 3, [[0, 255, 0], [255, 0, 0], [0, 0, 255], [77, 77, 77]]),
    (-1 / 3, [[255, 0, 0], [0, 0, 255], [0, 255, 0], [77, 77, 77]]),
])
def test_hue(shift, expected):
    # red, green, blue follow each other at thirds of the circle; gray has no hue
    got = adjusted(adjust_hue, [[0, 0, 255], [0, 255, 0], [255, 0, 0], [77, 77, 77]], shift)
    # one of 256 steps of the circle is up to 6 of 255
    np.testing.assert_allclose(got, expected, atol=12)


@pytest.mark.parametrize('steps', [0, 1, 43, 100, 128, 255])
@pytest.mark.parametrize('count', [1, 7, 4096])
def test_hue_against_float(steps, count):
    image = np.random.RandomState(0).randint(0, 256, [1, count, 3]).astype(np.uint8)
    image[0, 0] = 0, 255, 255  # two channels are the largest
    turned = image.copy()
    adjust_hue(turned, (steps + 0.5) / 255)  # cut to steps, which are 256ths then
    expected = references.float_step('hue', image, steps / 256)
    assert np.abs(turned - expected).max() < 0.75  # rounded once from eighths
    assert steps or (turned == image).all()
    # value and saturation stay
    assert (turned.max(2) == image.max(2)).all() and (turned.min(2) == image.min(2)).all()


def all_colours():
    """Every 5th value of each channel, 0 and 255 among them: uint8 [52, 2704, 3]."""
    values = np.arange(0, 256, 5, dtype=np.uint8)
    return np.stack(np.meshgrid(values, values, values, indexing='ij'), 3).reshape(52, -1, 3)


@pytest.mark.parametrize('percent', [0, 1, 60, 99, 100, 101, 137, 140, 199, 200])
def test_colour_steps_against_whole_numbers(percent):
    image = all_colours()
    wide = image.astype(np.int64)
    blue, green, red = np.moveaxis(wide, 2, 0)
    # ITU-R 601 in 2^15ths, rounded, as OpenCV's; and the mean of that, rounded
    gray = (3735 * blue + 19235 * green + 9798 * red + 2**14) // 2**15
    np.testing.assert_array_equal(gray, cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
    mean = (2 * gray.sum() + gray.size) // (2 * gray.size)
    for adjust, origin in [(adjust_brightness, 0), (adjust_contrast, mean),
                           (adjust_saturation, gray[:, :, None])]:
        changed = image.copy()
        adjust(changed, percent / 100)
        # // rounds down, so what is cut to 0 does not matter
        expected = np.clip((100 * origin + percent * (wide - origin)) // 100, 0, 255)
        np.testing.assert_array_equal(changed, expected, str(origin))


OPERATIONS = [(adjust_brightness, 0.7), (adjust_contrast, 1.3),
              (adjust_saturation, 1.3), (adjust_hue, 0.1), (data.blur, 1)]


@pytest.mark.parametrize('count', [1, 2, 15, 16, 17, 31, 33, 100])
def test_a_step_changes_its_image_only(count):
    for operation, value in OPERATIONS:
        memory = np.random.RandomState(count).randint(0, 256, (3, 1, count, 3)).astype(np.uint8)
        before = memory.copy()
        operation(memory[1], value)
        np.testing.assert_array_equal(memory[::2], before[::2])
        # a pixel depends on no other one, but for contrast and blur
        if operation not in (adjust_contrast, data.blur):
            alone = before[1].copy()
            for x in range(count):
                operation(alone[:, x:x + 1].reshape(1, 1, 3), value)
            np.testing.assert_array_equal(memory[1], alone)


@pytest.mark.parametrize('operation, value', OPERATIONS)
def test_steps_refuse_what_they_would_spoil(operation, value):
    image = np.full([4, 4, 3], 7, np.uint8)
    read_only = image.copy()
    read_only.setflags(write=False)
    for wrong in (np.zeros([4, 8, 3], np.uint8)[:, ::2], np.zeros([4, 4, 4], np.uint8)[:, :, :3],
                  np.zeros([4, 4, 4], np.uint8), np.zeros([4, 4], np.uint8),
                  np.zeros([4, 3], np.uint8), np.zeros([4, 4, 3], np.int8),
                  np.zeros([4, 4, 3], np.float32), read_only):
        before = wrong.copy()
        with pytest.raises(ValueError, match='contiguous'):
            operation(wrong, value)
        np.testing.assert_array_equal(wrong, before)
    operation(image, value)


def test_kernels_that_are_not_built(monkeypatch, tmp_path):
    for content in (None, b'not a library'):
        if content:
            (tmp_path / 'augment.so').write_bytes(content)
        monkeypatch.setattr(data, 'KERNELS', str(tmp_path / 'augment.so'))
        data.load_kernels.cache_clear()
        with pytest.raises(data.DataError, match='augment.cc is not built.*make env.*augment.so'):
            data.load_kernels()


def test_gray_and_flip():
    assert adjusted(data.convert_to_gray, [[50, 100, 200]]) == [[124] * 3]
    assert adjusted(data.flip, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == [
        [7, 8, 9], [4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize('sigma', [0.3, 0.5, 0.77, 1, 1.5, 1.76, 2])
def test_blur(sigma):
    taps = data.gaussian_taps(sigma)
    assert taps[0] + 2 * sum(taps[1:]) == 256
    radius = int(np.ceil(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-offsets**2 / (2 * sigma**2))
    weights /= weights.sum()
    np.testing.assert_allclose(np.array(taps) / 256, weights[radius:], atol=2 / 256)

    # no change of brightness, repeated border; an edge gets blurred as by the exact kernel
    image = np.zeros((9, 40, 3), np.uint8)
    image[:, 20:] = 200
    data.blur(image, sigma)
    row = np.repeat([0.0, 200.0], 20)
    exact = np.convolve(np.pad(row, radius, mode='edge'), weights, mode='valid')
    np.testing.assert_allclose(image[4, :, 1], exact, atol=3)
    assert image[:, 0].max() == 0 and (image[:, -1] == 200).all()


@pytest.mark.parametrize('height, width', [
    (1, 1), (1, 2), (2, 1), (1, 50), (50, 1), (2, 3), (3, 7), (7, 3), (5, 31), (6, 32), (13, 33),
    (9, 64), (40, 65), (17, 17), (224, 224)])
@pytest.mark.parametrize('sigma', [0.25, 0.3, 0.6, 1, 1.5, 2, 4.1])
def test_blur_of_all_sizes_against_taps_and_float(height, width, sigma):
    rng = np.random.RandomState(height * width)
    memory = rng.randint(0, 256, (3, height, width, 3)).astype(np.uint8)
    before = memory.copy()
    data.blur(memory[1], sigma)
    np.testing.assert_array_equal(memory[::2], before[::2])  # it does not write outside

    # as with these taps: rounding rows to 128ths, and each product of a column, is off by less than
    # radius + 2 of them, half the radius of which is made up for
    taps = data.gaussian_taps(sigma)
    radius = len(taps) - 1
    taps = np.array(taps[:0:-1] + taps) / 256
    exact = np.pad(before[1].astype(float), [(radius, radius), (radius, radius), (0, 0)], 'edge')
    exact = sum(taps[k] * exact[k:k + height] for k in range(2 * radius + 1))
    exact = sum(taps[k] * exact[:, k:k + width] for k in range(2 * radius + 1))
    assert np.abs(memory[1] - exact).max() < 0.5 + (radius + 5) / 256
    assert height * width < 5000 or abs((memory[1] - exact).mean()) < 0.01
    # and as a Gaussian, but for the taps' rounding
    error = memory[1] - references.float_blur(before[1], sigma)
    assert np.abs(error).max() < 4.5 and abs(error.mean()) < 0.4


@pytest.mark.parametrize('value', [0, 1, 127, 128, 254, 255])
def test_blur_leaves_flat_images(value):
    for sigma in (0.25, 0.27, 0.3, 0.5, 1, 2, 3, 9):
        image = np.full((11, 40, 3), value, np.uint8)
        data.blur(image, sigma)
        assert (image == value).all()


def test_a_blur_too_small_to_see_is_left_out():
    noise = np.random.RandomState(0).randint(0, 256, (20, 20, 3)).astype(np.uint8)
    exact = cv2.GaussianBlur(noise.astype(np.float64), (3, 3), 0.25,
                             borderType=cv2.BORDER_REPLICATE)
    np.testing.assert_allclose(noise, exact, atol=0.5)
    for sigma in (0, 0.249, 0.26):  # rounded, the taps of the last one leave all as it is
        image = noise.copy()
        data.blur(image, sigma)
        np.testing.assert_array_equal(image, noise)


@pytest.mark.parametrize('size', [1, 7, 32, 33, 224])
def test_in_place_is_like_out_of_place(size):
    # vectorised loops must not read again what they have written
    image = np.random.RandomState(size).randint(0, 256, (size, size, 3)).astype(np.uint8)
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    gray3 = np.repeat(gray[:, :, None], 3, axis=2)
    mean = int(gray.mean() + 0.5)
    truncate = np.vectorize(lambda v: int(min(255, max(0, v + 1e-3))), otypes=[np.int32])
    for operation, value, expected in [
            (adjust_brightness, 1.37, truncate(image * 1.37)),
            (adjust_contrast, 1.37, truncate(mean + (image - float(mean)) * 1.37)),
            (adjust_saturation, 1.37, truncate(gray3 + (image - gray3.astype(float)) * 1.37)),
            (data.convert_to_gray, None, gray3),
            (data.flip, None, image[:, ::-1])]:
        changed = image.copy()
        operation(*[changed] + ([] if value is None else [value]))
        np.testing.assert_allclose(changed, expected, atol=1 if value else 0)


# ------------------------------------------------------------------------------ crops and views

def test_sample_crop_is_inside_and_covers_the_ranges():
    rng = random.Random(0)
    boxes = [data.sample_crop(rng, 300, 400, (0.2, 0.6)) for _ in range(2000)]
    y, x, h, w = np.array(boxes).T
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 300).all() and (x + w <= 400).all()
    fractions, aspects = h * w / 120000, w / h
    assert 0.195 < fractions.min() < 0.21 and 0.59 < fractions.max() < 0.605
    assert 0.74 < aspects.min() < 0.76 and 1.32 < aspects.max() < 1.35
    assert len(set(y)) > 100 and len(set(x)) > 100

    # nothing fits: the central square
    assert data.sample_crop(rng, 10, 1000, (0.9, 1)) == (0, 495, 10, 10)
    assert data.sample_crop(rng, 1, 1, (0.01, 0.02)) == (0, 0, 1, 1)


def test_sample_jitter():
    rng = random.Random(0)
    orders, values = set(), {}
    for _ in range(2000):
        jitter = data.sample_jitter(rng, 0.4, 0.3, 0.2, 0.1)
        orders.add(tuple(name for name, _ in jitter))
        for name, value in jitter:
            values.setdefault(name, []).append(value)
    assert len(orders) == 24
    for name, low, high in [('brightness', 0.6, 1.4), ('contrast', 0.7, 1.3),
                            ('saturation', 0.8, 1.2), ('hue', -0.1, 0.1)]:
        low_seen, high_seen = min(values[name]), max(values[name])
        assert low <= low_seen < low + 0.01 and high - 0.01 < high_seen <= high


class Script:
    """A random.Random whose numbers are written down."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


# area 1, aspect 1, no swap, x, y
WHOLE = [0, 3 / 7, 0.9, 0, 0]
# factors 1, shift 0, first order
NEUTRAL = [0.5, 0.5, 0.5, 0.5, 0]


@pytest.fixture
def photo():
    """A smooth image of many colours, 32 x 32."""
    noise = np.random.RandomState(1).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    return cv2.resize(noise, (32, 32), interpolation=cv2.INTER_CUBIC)


def draw(view, image, numbers, size=32):
    out = np.full((size, size, 3), 99, np.uint8)
    rng = Script(*numbers)
    view(image, out, rng, (1, 1))
    assert not rng.numbers  # as many as expected were drawn
    return out


def test_order_of_v1(photo):
    # gray, then jitter, always; then the flip
    plain = draw(data.moco_v1_view, photo, WHOLE + [0.5] + NEUTRAL + [0.9])
    np.testing.assert_allclose(plain, photo, atol=8)  # but for the rounding of hue
    gray = draw(data.moco_v1_view, photo, WHOLE + [0.19] + NEUTRAL + [0.9])
    assert (gray[..., 0] == gray[..., 2]).all()
    flipped = draw(data.moco_v1_view, photo, WHOLE + [0.5] + NEUTRAL + [0.49])
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    # hue 0.4: a shift of +0.4 turns
    expected = photo.copy()
    adjust_hue(expected, 0.4)
    turned = draw(data.moco_v1_view, photo, WHOLE + [0.5] + [0.5, 0.5, 0.5, 1, 0] + [0.9])
    np.testing.assert_allclose(turned, expected, atol=3)


def test_order_of_v2(photo):
    # jitter with p 0.8, gray, blur, flip: one with all, by hand
    jitter = [0.75, 0.25, 1, 0, 0.999]  # factors 1.2, 0.8, 1.4, shift -0.1, the last order
    everything = draw(data.moco_v2_view, photo,
                      WHOLE + [0.79] + jitter + [0.19] + [0.49, 1] + [0.49])
    expected = photo.copy()
    adjust_hue(expected, -0.1)
    adjust_saturation(expected, 1.4)
    adjust_contrast(expected, 0.8)
    adjust_brightness(expected, 1.2)
    data.convert_to_gray(expected)
    data.blur(expected, 2.0 * 32 / 224)
    np.testing.assert_array_equal(everything, expected[:, ::-1])

    nothing = draw(data.moco_v2_view, photo, WHOLE + [0.8, 0.2, 0.5, 0.5])
    np.testing.assert_array_equal(nothing, photo)

    # the blur of a 224-pixel view has the published sigma
    big = cv2.resize(photo, (224, 224))
    blurred = draw(data.moco_v2_view, big, WHOLE + [0.8, 0.2] + [0.49, 0.5] + [0.5], size=224)
    expected = big.copy()
    data.blur(expected, 1.05)
    np.testing.assert_array_equal(blurred, expected)


def test_linear_views(photo):
    np.testing.assert_array_equal(draw(data.linear_train_view, photo, WHOLE + [0.4]),
                                  photo[:, ::-1])

    # shortest edge 256, centre 224: of 512 x 768 the middle 448 x 448 halved
    image = np.zeros((512, 768, 3), np.uint8)
    image[32:480, 160:608] = 255
    out = np.zeros((224, 224, 3), np.uint8)
    data.center_crop_view(image, out)
    assert (out == 255).all()
    # an image of the size asked for is taken whole
    small = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    out = np.zeros_like(small)
    data.center_crop_view(small, out)
    np.testing.assert_array_equal(out, small)
    out = np.zeros((224, 224, 3), np.uint8)
    # one more row or column would show
    image[:34] = image[478:] = 0
    image[:, :162] = image[:, 606:] = 0
    data.center_crop_view(image, out)
    assert (out[1:-1, 1:-1] == 255).all()
    assert not out[0].any() and not out[-1].any() and not out[:, 0].any() and not out[:, -1].any()


@pytest.mark.parametrize('shape', [(1, 1), (10, 20000), (2000, 3), (500, 375)])
def test_views_of_odd_images(shape):
    image = np.full(shape + (3,), 50, np.uint8)
    out = np.zeros((32, 32, 3), np.uint8)
    data.center_crop_view(image, out)
    assert (out == 50).all()
    rng = random.Random(0)
    for view in (data.moco_v1_view, data.moco_v2_view, data.linear_train_view):
        out[:] = 0
        view(image, out, rng)
        assert out.min() > 0


# ----------------------------------------------------------------------------------------- plan

@pytest.mark.parametrize('size, batch', [(1, 4), (2, 3), (3, 7), (4, 25)])
def test_every_image_once_per_epoch(size, batch):
    num_images, epochs = 10, 3
    stream = []
    for step in range(epochs * num_images // (size * batch) + 1):
        for rank in range(size):
            images = data.images_of_batch(step, rank, size, batch, num_images, seed=5)
            assert len(images) == batch
            stream += images
    orders = []
    for epoch in range(epochs):
        part = stream[epoch * num_images:(epoch + 1) * num_images]
        assert [e for e, _ in part] == [epoch] * num_images
        orders.append([index for _, index in part])
        assert sorted(orders[-1]) == list(range(num_images))
    assert orders[0] != orders[1] != orders[2]
    assert data.images_of_batch(0, 0, size, batch, num_images, seed=6) != stream[:batch]


def test_order_of_an_epoch_never_changes():
    # a resumed run may have another version of NumPy
    assert data.epoch_permutation(1, 2, 8).tolist() == [2, 4, 1, 5, 6, 3, 0, 7]





@pytest.mark.parametrize('size, batch, num_images', [(1, 4, 10), (3, 4, 10), (2, 5, 10), (4, 3, 2)])
def test_bounded_pass(size, batch, num_images):
    got = []
    for rank in range(size):
        steps = data.num_bounded_batches(rank, size, batch, num_images)
        batches = [list(data.images_of_bounded_batch(step, rank, size, batch, num_images))
                   for step in range(steps)]
        assert all(len(images) == batch for images in batches[:-1])
        assert all(batches)
        assert sum(batches, []) == list(range(num_images))[rank::size]
        got += sum(batches, [])
    assert sorted(got) == list(range(num_images))


# ---------------------------------------------------------------------------------------- batches

@pytest.fixture
def folder(tmp_path):
    """train/{a,b,c}, 3 images of noise each."""
    rng = np.random.RandomState(3)
    for i in range(9):
        path = write_image(tmp_path / 'train' / 'abc'[i // 3] / '{}.png'.format(i))
        noise = rng.randint(0, 256, (20, 24, 3)).astype(np.uint8)
        path.write_bytes(cv2.imencode('.png', noise)[1].tobytes())
    return str(tmp_path)


def fill(folder, task, step, seed=0, rank=0, size=2, batch=4):
    labelled = task in ('linear', 'eval')
    reader = data.ImageReader(data.list_images(folder, 'train', labelled), pytest.fail)
    batches = data.create_batches(task, reader, rank, size, batch, 16, seed, (0.2, 1))
    arrays = [np.full(shape, 77, dtype) for shape, dtype in batches.specs(step)]
    batches.fill(step, arrays)
    return arrays


@pytest.mark.parametrize('task', ['moco-v1', 'moco-v2', 'linear'])
def test_batches_follow_from_the_seed(folder, task):
    first = fill(folder, task, step=3)
    for again in (fill(folder, task, step=3), fill(folder, task, step=3)):
        for one, other in zip(first, again):
            np.testing.assert_array_equal(one, other)
    for other in (fill(folder, task, step=3, seed=1), fill(folder, task, step=4),
                  fill(folder, task, step=3, rank=1)):
        assert (first[0] != other[0]).any()
    assert first[0].shape == (4, 16, 16, 3) and first[0].dtype == np.uint8
    if task == 'linear':
        plan = data.images_of_batch(3, 0, 2, 4, 9, 0)
        assert first[1].dtype == np.int32
        assert first[1].tolist() == [index // 3 for _, index in plan]
    else:
        assert (first[0] != first[1]).any()  # two views


def test_an_image_is_cropped_anew_in_every_epoch(folder):
    views = {}
    for step in range(4):
        query, _ = fill(folder, 'moco-v2', step, size=1, batch=9)
        for view, (epoch, index) in zip(query, data.images_of_batch(step, 0, 1, 9, 9, 0)):
            assert epoch == step
            views.setdefault(index, set()).add(view.tobytes())
    assert [len(views[index]) for index in range(9)] == [4] * 9


def test_seeds_of_images_give_different_numbers():
    rng, seen = random.Random(), set()
    for seed in range(6):
        for epoch in range(6):
            for index in range(6):
                rng.seed(data.seed_of_image(seed, epoch, index))
                seen.add(rng.random())
    assert len(seen) == 6**3


def test_eval_batches(folder):
    # rank 1 of 2 has images 1, 3, 5, 7: a batch of 3 and one of 1
    images, labels = fill(folder, 'eval', step=0, rank=1, batch=3)
    assert images.shape == (3, 16, 16, 3) and labels.tolist() == [0, 1, 1]
    images, labels = fill(folder, 'eval', step=1, rank=1, batch=3)
    assert images.shape == (1, 16, 16, 3) and labels.tolist() == [2]
    expected = np.zeros((16, 16, 3), np.uint8)
    data.center_crop_view(data.decode_image(data.list_images(folder).paths[7]), expected)
    np.testing.assert_array_equal(images[0], expected)
