"""Lists of images, augmentation, and which image goes where. No TensorFlow, no sockets.

Images are uint8 BGR [height, width, 3], as OpenCV reads them, from the file to the batch.
Everything is a function of (files, seed): the order of an epoch of (seed, epoch), the randomness
of an image of (seed, epoch, index). So neither the number of processes that make batches nor a
restart in the middle changes what is trained on.
"""
import collections
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import random
import tempfile
import time

import cv2
import numpy as np

KERNELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'build', 'augment.so')
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm')


class DataError(ValueError):
    """What is wrong with the data, in one sentence for the user."""


# ---------------------------------------------------------------------------------- lists of images

# paths: PathList; labels: int32 [N] or None; classes: sorted list of names or None
ImageList = collections.namedtuple('ImageList', ['paths', 'labels', 'classes'])


class PathList:
    """A read-only list of paths in one block of memory.

    1.28 million Python strings take 150 MB, and counting references to them would copy those pages
    into every forked worker; this takes 50 MB, shared by all.

    Args:
        root: the folder that the names are relative to.
        block, ends: from pack_names().
    """
    def __init__(self, root, block, ends):
        self.root, self._block, self._ends = root, block, ends

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self._block[self._ends[index]:self._ends[index + 1]]
        return os.path.join(self.root, os.fsdecode(name))

    def names(self):
        """Yield the names."""
        for start, end in zip(self._ends, self._ends[1:]):
            yield os.fsdecode(self._block[start:end])

    def packed(self):
        """What pack_names() returned."""
        return self._block, self._ends


def pack_names(names):
    """One block of bytes of an iterable of str, and where each ends in it, from 0 on: int64."""
    block, ends = bytearray(), [0]
    for name in names:
        block += os.fsencode(name)
        ends.append(len(block))
    return bytes(block), np.array(ends, np.int64)


def list_images(root, split='train', labelled=False):
    """List the images of one split, sorted, so that every process and host has the same list.

    Labelled: root/train/<class>/** and root/val/<class>/**, or images directly in root/val with a
    list of labels, val.txt, in root or root/val: lines 'name label', a label being the name of a
    class or its number. The number of a class is the rank of its name among the sorted names of
    the folders in root/train.
    Unlabelled: everything in root/train (or in root, if it has no train) or root/val, flat or
    nested.

    Symbolic links are followed; what starts with a dot is ignored.

    Args:
        root: folder.
        split: 'train' or 'val'.
        labelled: whether labels are needed.

    Returns:
        ImageList: labels and classes are None when unlabelled.

    Raises:
        DataError: what is missing or inconsistent, in one sentence.
    """
    if not os.path.isdir(root):
        raise DataError('there is no folder {}'.format(root))
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        if labelled or split != 'train':
            raise DataError('there is no folder {}'.format(folder))
        folder = root

    if not labelled:
        images = ImageList(find_images(folder), None, None)
        if not len(images.paths):
            raise DataError('there is no image ({}) in {}'.format(
                ' '.join(extension[1:] for extension in EXTENSIONS), folder))
        return images

    classes = _find_classes(os.path.join(root, 'train'))
    if split == 'val':
        names, folders = _read_folder(folder)
        flat = [name for name in names
                if name not in folders and name.lower().endswith(EXTENSIONS)]
        lists = [path for path in (os.path.join(root, 'val.txt'), os.path.join(folder, 'val.txt'))
                 if os.path.isfile(path)]
        if flat and lists:
            labels = _read_labels(lists[0], flat, classes)
            return ImageList(PathList(folder, *pack_names(flat)), labels, classes)
        if flat and not folders:
            raise DataError('the images in {} have no labels: they need class folders, or a list '
                            '{} with lines "name label"'.format(folder, root + '/val.txt'))
    return _list_classes(root, folder, classes)


def _read_folder(folder):
    """The sorted names in a folder, hidden ones left out, and the set of those that are folders."""
    names, folders = [], set()
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
        raise DataError('cannot read the folder {}: {}'.format(folder, error.strerror))
    return sorted(names), folders


def find_images(folder):
    """The images under a folder, in sorted order: PathList."""
    images = _load_list(folder)
    if images is None:
        start, seen = time.time(), {}
        images = PathList(folder, *pack_names(_walk(folder, '', (), seen)))
        if time.time() - start > SLOW_LISTING:
            _save_list(folder, images, seen, start)
    return images


def _walk(folder, prefix, above, seen):
    """Yield the names of all images under folder/prefix, relative to the folder, in sorted order.

    Args:
        prefix: '' or ends with a slash.
        above: (device, inode) of the folders that it is in.
        seen: gets an os.stat_result by the name of every folder, and None by that of every link to
            nowhere.
    """
    path = os.path.join(folder, prefix[:-1]) if prefix else folder
    status = os.stat(path)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return  # a link to a folder that it is in
    seen[prefix] = status
    names, folders = _read_folder(path)
    for name in names:
        if name in folders:
            yield from _walk(folder, prefix + name + '/', above + (identity,), seen)
        elif name.lower().endswith(EXTENSIONS):
            yield prefix + name
        elif not os.path.exists(os.path.join(path, name)):
            seen[prefix + name] = None


# A list that took long is kept in the user's cache, and holds while every folder in it has the same
# inode, mtime and ctime: a name that comes, goes or changes does so in a folder, and sets its times
# (tar and rsync set mtime back, but cannot ctime). What these do not tell:
# - that the contents of a file change: no matter, the list has only names;
# - where a link leads now: to another folder is another inode; but to a folder instead of nowhere
#   is not, so lists with links to nowhere are not kept, and instead of a file goes unnoticed;
# - a second change within one tick of the clock, which can be 2 s long, or that of another machine
#   and wrong: a list is kept only if its folders have been as they are for a minute;
# - anything, where folders have no times (object stores, by FUSE), or not of all changes (FAT, by
#   Windows): lists with such are not kept.

SLOW_LISTING, SETTLED = 1, 60  # seconds
UNTIMED = ('fuse', 'vfat', 'msdos', 'exfat')


def _cache_path(folder):
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.environ['HOME'], '.cache')
    # the inode, for hosts that share a home but not the data
    key = json.dumps([os.path.realpath(folder), os.stat(folder).st_ino, EXTENSIONS])
    return os.path.join(home, 'moco', hashlib.sha256(key.encode()).hexdigest()[:16] + '.npz')


def _stamp(status):
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _load_list(folder):
    """The PathList of a folder as it was kept, or None."""
    try:
        with np.load(_cache_path(folder), allow_pickle=False) as kept:
            stamps = json.loads(kept['stamps'].tobytes().decode())
            if all(_stamp(os.stat(os.path.join(folder, name))) == stamp
                   for name, stamp in stamps.items()):
                return PathList(folder, kept['block'].tobytes(), kept['ends'])
    except Exception:  # whatever is wrong with it, the folder can be listed again
        pass
    return None


def _save_list(folder, images, seen, start):
    """Keep a list whose listing started at that time, if it can be relied on."""
    try:
        if None in seen.values() or _untimed_devices() & {s.st_dev for s in seen.values()} or max(
                max(s.st_mtime, s.st_ctime) for s in seen.values()) > start - SETTLED:
            return
        stamps = json.dumps({name: _stamp(status) for name, status in seen.items()}).encode()
        block, ends = images.packed()
        path = _cache_path(folder)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, 'wb') as file:
                np.savez(file, stamps=np.frombuffer(stamps, np.uint8),
                         block=np.frombuffer(block, np.uint8), ends=ends)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except Exception:  # nothing depends on it
        pass


def _untimed_devices():
    """Numbers of the devices whose folders have no reliable times."""
    with open('/proc/self/mountinfo') as mounts:
        return {os.makedev(*map(int, line.split()[2].split(':'))) for line in mounts
                if line.split(' - ')[1].startswith(UNTIMED)}


def _find_classes(folder):
    if not os.path.isdir(folder):
        raise DataError('there is no folder {}'.format(folder))
    names, folders = _read_folder(folder)
    if not folders:
        raise DataError('labels need one folder a class, but {} has no folder in it'.format(folder))
    return [name for name in names if name in folders]


def _list_classes(root, folder, classes):
    """List the images of class folders."""
    images = find_images(folder)
    counts = collections.Counter(
        name.split('/', 1)[0] for name in images.names() if '/' in name)
    if sum(counts.values()) < len(images):  # some are in no class folder
        images = PathList(folder, *pack_names(name for name in images.names() if '/' in name))
    for name in _find_classes(folder):
        if name not in classes:
            raise DataError('the class {} of {} is not in {}'.format(
                name, folder, os.path.join(root, 'train')))
        if not counts[name]:
            raise DataError('there is no image in the class folder {}'.format(
                os.path.join(folder, name)))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [counts[name] for name in classes])
    return ImageList(images, labels, classes)


def _read_labels(path, images, classes):
    """Read a list of labels for these images: int32 [N]. A name of a class goes before a number."""
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {}
    with open(path, errors='surrogateescape') as lines:
        for number, line in enumerate(lines, 1):
            words = line.strip().rsplit(None, 1)
            if not words:
                continue
            if len(words) != 2:
                raise DataError('line {} of {} is not "name label": {}'.format(
                    number, path, line.strip()[:80]))
            name, label = words
            if label not in numbers and not (label.isdecimal() and int(label) < len(classes)):
                raise DataError('line {} of {}: {} is neither a class of the training images nor a '
                                'number below {}'.format(number, path, label, len(classes)))
            name = name[4:] if name.startswith('val/') else name
            labels[name] = numbers[label] if label in numbers else int(label)
    for image in images:
        if image not in labels:
            raise DataError('{} has no label for {}'.format(path, image))
    return np.array([labels[image] for image in images], np.int32)


def digest_images(images):
    """A short hexadecimal digest of names and labels, by which hosts can compare their data."""
    digest = hashlib.sha256()
    for array in images.paths.packed():
        digest.update(array)
    if images.labels is not None:
        digest.update(images.labels.tobytes())
        digest.update('\n'.join(images.classes).encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]


# -------------------------------------------------------------------------------- single operations
# Each changes an image in place, as PIL's ImageEnhance would.

JITTER = ('brightness', 'contrast', 'saturation', 'hue')
MARKERS_WITHOUT_LENGTH = {0x00, 0x01, 0xff, *range(0xd0, 0xda)}


def set_up_process():
    """What a process that makes batches does first."""
    cv2.setNumThreads(0)  # such processes are the threads
    # The C library gives the memory of an image back to the system, and gets it again, page by
    # page, for the next one: 2 % of the time of an image. So let it keep 16 MB (M_TRIM_THRESHOLD),
    # and only map what is larger (M_MMAP_THRESHOLD). With more, memory creeps up for hours.
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 16 << 20)
    libc.mallopt(-3, 16 << 20)


def decode_image(path):
    """Read an image: uint8 [height, width, 3], turned as its EXIF says, or None if unreadable."""
    # cv2.imread crashes on names that are not UTF-8, and open() alone takes as long as two views
    # of 32 pixels need for their crops
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            encoded = os.read(file, os.fstat(file).st_size)
        finally:
            os.close(file)
        if encoded[:2] == b'\xff\xd8' and not has_end(encoded):
            return None
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, MemoryError, cv2.error):
        return None


def has_end(jpeg):
    """Whether a JPEG has its end marker.

    Of one that was cut off, OpenCV returns the rows that are missing as it finds the memory, which
    is pieces of other images. PIL, and so the official code, refuses it.
    """
    # The marker counts behind the first start of scan (0xda): a thumbnail before that has its own.
    # What may follow it, a video say, does not matter.
    at = 2
    while at + 4 <= len(jpeg):
        if jpeg[at] != 0xff or jpeg[at + 1] in MARKERS_WITHOUT_LENGTH:
            at += 1
        elif jpeg[at + 1] == 0xda:
            return jpeg.rfind(b'\xff\xd9', at) > 0
        else:
            at += 2 + int.from_bytes(jpeg[at + 2:at + 4], 'big')
    return False


@functools.lru_cache(maxsize=None)
def load_kernels():
    """The functions of augment.cc."""
    try:
        kernels = ctypes.CDLL(KERNELS)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        kernels.jitter.argtypes = [pointer, number, pointer, pointer, number]
        kernels.blur.argtypes = [pointer, number, number, pointer, number]
    except (OSError, AttributeError) as error:
        raise DataError('augment.cc is not built for this machine, run make env: {}'.format(error))
    return kernels


def point_to(image):
    """What kernels take as the address of an image's pixels, a fourth of the time of image.ctypes.

    Raises:
        ValueError: the image is not what they can work on.
    """
    if not (image.flags.c_contiguous and image.flags.writeable and image.dtype == np.uint8
            and image.ndim == 3 and image.shape[2] == 3):
        raise ValueError('this needs a contiguous, writable uint8 [height, width, 3], not {} {}'
                         .format(image.dtype, image.shape))
    return ctypes.byref(ctypes.c_char.from_buffer(image))


def jitter(image, steps):
    """Change colours, step by step, cutting to uint8 after each.

    Args:
        steps: list of (name, value), the names being of JITTER: brightness, contrast and saturation
            move colours away from black, from the rounded mean of the grayscale image and from that
            image itself by a factor of 0 to 2, and hue turns its circle by so many turns.
    """
    kinds = (ctypes.c_int32 * len(steps))(*[JITTER.index(name) for name, _ in steps])
    values = (ctypes.c_double * len(steps))(*[value for _, value in steps])
    load_kernels().jitter(point_to(image), image.size // 3, kinds, values, len(steps))


def convert_to_gray(image):
    """Make all channels the luma of ITU-R 601."""
    cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR, image)


def blur(image, sigma):
    """Gaussian blur of `sigma` pixels, the border repeated."""
    if sigma < 0.25:
        return  # a neighbour's weight, exp(-1 / 2 sigma^2), is so small that no uint8 changes
    taps = gaussian_taps(sigma)
    load_kernels().blur(point_to(image), image.shape[0], image.shape[1],
                        (ctypes.c_uint16 * len(taps))(*taps), len(taps) - 1)


def gaussian_taps(sigma):
    """Weights of a pixel and of its neighbours at 1, 2 .. ceil(3 sigma), in 256ths: list of int.

    Rounding leaves the sum of all off by some, which would change brightness: so the middle one,
    the largest, is corrected.
    """
    weights = [math.exp(-k * k / (2 * sigma * sigma)) for k in range(math.ceil(3 * sigma) + 1)]
    total = 2 * sum(weights) - weights[0]
    taps = [round(256 * weight / total) for weight in weights]
    taps[0] = 256 - 2 * sum(taps[1:])
    return taps


def flip(image):
    """Mirror left and right."""
    cv2.flip(image, 1, image)


# ------------------------------------------------------------------------------- sampled parameters
# rng is a random.Random: a tenth of the cost of NumPy's for single numbers.

ORDERS = list(itertools.permutations(range(4)))


def sample_crop(rng, height, width, area):
    """Sample a box as tensorpack's GoogleNetRandomCropAndResize does.

    Args:
        rng: random.Random.
        height, width: of the image, in pixels.
        area: (low, high), fractions of the image's.

    Returns:
        (y, x, height, width) in pixels; after ten boxes that do not fit, the central square.
    """
    for _ in range(10):
        target = (area[0] + (area[1] - area[0]) * rng.random()) * height * width
        aspect = 3 / 4 + (4 / 3 - 3 / 4) * rng.random()
        w = max(1, int(math.sqrt(target * aspect) + 0.5))
        h = max(1, int(math.sqrt(target / aspect) + 0.5))
        if rng.random() < 0.5:
            w, h = h, w
        if h <= height and w <= width:
            x = int(rng.random() * (width - w + 1))
            y = int(rng.random() * (height - h + 1))
            return y, x, h, w
    # tensorpack resizes all of the image, then crops; so a 20,000 x 10 image would take 300 MB
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def sample_jitter(rng, brightness, contrast, saturation, hue):
    """Sample colour jitter: factors uniform in 1 +- strength, a shift of hue in +- hue turns.

    Returns:
        list of (name, value) for jitter(), in a random order.
    """
    steps = (('brightness', 1 + brightness * (2 * rng.random() - 1)),
             ('contrast', 1 + contrast * (2 * rng.random() - 1)),
             ('saturation', 1 + saturation * (2 * rng.random() - 1)),
             ('hue', hue * (2 * rng.random() - 1)))
    return [steps[i] for i in ORDERS[int(rng.random() * len(ORDERS))]]


# -------------------------------------------------------------------------------------------- views
# image: uint8 [height, width, 3], left as it is; out: uint8 [S, S, 3], contiguous, filled in place.

def random_resized_crop(image, out, rng, area):
    """Fill `out` with a random box of the image, resized bilinearly."""
    y, x, h, w = sample_crop(rng, image.shape[0], image.shape[1], area)
    cv2.resize(image[y:y + h, x:x + w], (out.shape[1], out.shape[0]), out,
               interpolation=cv2.INTER_LINEAR)


def moco_v1_view(image, out, rng, area=(0.2, 1)):
    """Fill `out` with a view of MoCo v1."""
    random_resized_crop(image, out, rng, area)
    if rng.random() < 0.2:
        convert_to_gray(out)
    jitter(out, sample_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4))
    if rng.random() < 0.5:
        flip(out)


def moco_v2_view(image, out, rng, area=(0.2, 1)):
    """Fill `out` with a view of MoCo v2."""
    random_resized_crop(image, out, rng, area)
    if rng.random() < 0.8:
        jitter(out, sample_jitter(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    if rng.random() < 0.2:
        convert_to_gray(out)
    if rng.random() < 0.5:
        # the published sigma is in pixels of a 224-pixel view: take the same part of other views
        blur(out, (0.1 + 1.9 * rng.random()) * out.shape[0] / 224)
    if rng.random() < 0.5:
        flip(out)


def linear_train_view(image, out, rng, area=(0.08, 1)):
    """Fill `out` with a training view of linear classification."""
    random_resized_crop(image, out, rng, area)
    if rng.random() < 0.5:
        flip(out)


def center_crop_view(image, out):
    """Fill `out` with a validation view: shortest edge to 256/224 of the size, then the centre.

    An image that has the size already (CIFAR's at 32) is taken whole.
    """
    size = out.shape[0]
    h, w = image.shape[:2]
    if h == w == size:
        out[:] = image
        return
    if max(h, w) > 4 * min(h, w):
        # only the centre is wanted: do not resize (at 20,000 x 10, to 350 MB) what is far outside
        limit = 4 * min(h, w)
        image = image[max(0, (h - limit) // 2):, max(0, (w - limit) // 2):][:limit, :limit]
        h, w = image.shape[:2]
    scale = round(size * 256 / 224) / min(h, w)
    h, w = int(scale * h + 0.5), int(scale * w + 0.5)
    y, x = (h - size) // 2, (w - size) // 2
    out[:] = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)[y:y + size, x:x + size]


# ----------------------------------------------------------------------------------------- the plan

@functools.lru_cache(maxsize=2)
def epoch_permutation(seed, epoch, num_images):
    """The order of the images in an epoch: uint32 [num_images], read-only.

    RandomState, since NumPy promises that its numbers never change, as it does not for Generator.
    """
    order = np.random.RandomState([seed, epoch]).permutation(num_images).astype(np.uint32)
    order.setflags(write=False)
    return order


def images_of_batch(step, rank, size, batch, num_images, seed):
    """Which images a rank trains on in a step.

    The stream of images is epoch after epoch, each in its own order; step after step takes
    size x batch images from it, rank after rank. An epoch need not be a whole number of steps.

    Args:
        step: number of the step since the start of training, from 0.
        rank, size: of all ranks.
        batch: images per rank and step.
        num_images: images per epoch.
        seed: 0 to 2**32 - 1.

    Returns:
        list of (epoch, index), `batch` long.
    """
    position, images = (step * size + rank) * batch, []
    while len(images) < batch:
        epoch, first = divmod(position + len(images), num_images)
        order = epoch_permutation(seed, epoch, num_images)
        images += [(epoch, index) for index in order[first:first + batch - len(images)].tolist()]
    return images


def seed_of_image(seed, epoch, index):
    """What to seed a random.Random with, each argument below 2**32.

    It takes an integer as a list of 32-bit words and adds each word's position to it, over and
    over, so [k] and [k, k - 1] give the same numbers. The highest bit makes all lists equally long.
    """
    return 1 << 96 | seed << 64 | epoch << 32 | index


def num_bounded_batches(rank, size, batch, num_images):
    """How many batches a rank gets in a bounded pass; the last one may be smaller."""
    return -(-len(range(rank, num_images, size)) // batch)


def images_of_bounded_batch(step, rank, size, batch, num_images):
    """Which images a rank gets in a step of a bounded pass: of rank, rank + size, ... the next.

    Returns:
        range of indices, `batch` long, or shorter in the last step.
    """
    return range(rank, num_images, size)[step * batch:(step + 1) * batch]


# ------------------------------------------------------------------------------------------ batches
# A maker of batches has .num_batches (None: endless), .specs(step) -> [(shape, dtype), ...] of the
# arrays of that batch, and .fill(step, arrays), which writes them in place.

class ImageReader:
    """Reads images; in place of one that cannot be read, the next one in the list that can.

    Args:
        images: ImageList.
        report: is called with the index of an unreadable image, once.
    """
    def __init__(self, images, report):
        self.images, self._report = images, report
        self._unreadable = set()

    def read(self, index):
        """Returns (index of the image that was read, uint8 [height, width, 3])."""
        for _ in range(len(self.images.paths)):
            if index not in self._unreadable:
                image = decode_image(self.images.paths[index])
                if image is not None:
                    return index, image
                self._unreadable.add(index)
                self._report(index)
            index = (index + 1) % len(self.images.paths)
        raise DataError('none of the {} images can be read'.format(len(self.images.paths)))


class Batches:
    """What all makers of batches know.

    Args:
        reader: ImageReader.
        rank, size: of the rank that the batches are for, and the number of all ranks.
        batch: images per rank and step.
        image_size: S, in pixels.
    """
    num_batches = None

    def __init__(self, reader, rank, size, batch, image_size):
        self.reader, self.labels = reader, reader.images.labels
        self.num_images = len(reader.images.paths)
        self.rank, self.size, self.batch, self.image_size = rank, size, batch, image_size

    def _image_spec(self, count):
        return (count, self.image_size, self.image_size, 3), np.uint8


class RandomBatches(Batches):
    """Endless batches of random views.

    Args:
        seed: 0 to 2**32 - 1.
        area: (low, high) of the random crops, fractions of the image's.
    """

    def __init__(self, reader, rank, size, batch, image_size, seed, area):
        super().__init__(reader, rank, size, batch, image_size)
        self.seed, self.area = seed, area
        self._rng = random.Random()  # reseeded for every image

    def _read_batch(self, step):
        """Yield (position in the batch, index, image, rng)."""
        plan = images_of_batch(step, self.rank, self.size, self.batch, self.num_images,
                               self.seed)
        for i, (epoch, index) in enumerate(plan):
            self._rng.seed(seed_of_image(self.seed, epoch, index))
            index, image = self.reader.read(index)
            yield i, index, image, self._rng


class PretrainBatches(RandomBatches):
    """query, key: uint8 [batch, S, S, 3], two views of the same images.

    Args:
        view: moco_v1_view or moco_v2_view.
    """
    def __init__(self, reader, rank, size, batch, image_size, seed, area, view):
        super().__init__(reader, rank, size, batch, image_size, seed, area)
        self._view = view

    def specs(self, step):
        return [self._image_spec(self.batch)] * 2

    def fill(self, step, arrays):
        query, key = arrays
        for i, _, image, rng in self._read_batch(step):
            self._view(image, query[i], rng, self.area)
            self._view(image, key[i], rng, self.area)


class LinearBatches(RandomBatches):
    """images uint8 [batch, S, S, 3], labels int32 [batch]."""

    def specs(self, step):
        return [self._image_spec(self.batch), ((self.batch,), np.int32)]

    def fill(self, step, arrays):
        images, labels = arrays
        for i, index, image, rng in self._read_batch(step):
            linear_train_view(image, images[i], rng, self.area)
            labels[i] = self.labels[index]


class EvalBatches(Batches):
    """Every image once, over all ranks: images uint8 [n, S, S, 3], labels int32 [n], n <= batch."""

    def __init__(self, reader, rank, size, batch, image_size):
        super().__init__(reader, rank, size, batch, image_size)
        self.num_batches = num_bounded_batches(rank, size, batch, self.num_images)

    def _plan(self, step):
        return images_of_bounded_batch(step, self.rank, self.size, self.batch,
                                       self.num_images)

    def specs(self, step):
        count = len(self._plan(step))
        return [self._image_spec(count), ((count,), np.int32)]

    def fill(self, step, arrays):
        images, labels = arrays
        for i, index in enumerate(self._plan(step)):
            index, image = self.reader.read(index)
            center_crop_view(image, images[i])
            labels[i] = self.labels[index]


class FakeBatches:
    """Random images, made once, in the place of another maker's batches."""

    def __init__(self, batches):
        self.num_batches, self.specs = batches.num_batches, batches.specs
        rng, num_classes = np.random.RandomState(0), len(batches.reader.images.classes or [1])
        # images, or labels; the last batches may be smaller
        self._arrays = [rng.randint(0, 256 if len(shape) == 4 else num_classes, shape, dtype)
                        for shape, dtype in self.specs(0)]

    def fill(self, step, arrays):
        for array, fake in zip(arrays, self._arrays):
            array[:] = fake[:len(array)]


def fake_images(num_images, labelled):
    """An ImageList without files, of 1000 classes if labelled."""
    classes = ['{:03d}'.format(number) for number in range(1000)] if labelled else None
    return ImageList(PathList('fake', b'', np.zeros(num_images + 1, np.int64)), None, classes)


def create_batches(task, reader, rank, size, batch, image_size, seed, area):
    """The maker of batches for 'moco-v1', 'moco-v2', 'linear' or 'eval'; see the classes above."""
    if task == 'eval':
        return EvalBatches(reader, rank, size, batch, image_size)
    if task == 'linear':
        return LinearBatches(reader, rank, size, batch, image_size, seed, area)
    view = {'moco-v1': moco_v1_view, 'moco-v2': moco_v2_view}[task]
    return PretrainBatches(reader, rank, size, batch, image_size, seed, area, view)
