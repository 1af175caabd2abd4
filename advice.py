"""Settings that fit: doubts about those that were given, and what few images usually take."""
from typing import Iterator, Optional

import horovod.tensorflow as hvd
import numpy as np

import decoder
import image_lists

FEW = 1281167 // 4  # images: a quarter of ImageNet's


def list_doubts(args, num_images: int, steps_per_epoch: int, peak: float,
                side: float) -> Iterator[str]:
    """Sentences about settings with which training runs, but can hardly learn; `peak` is the
    highest learning rate, `side` what find_side() found."""
    keys, images = args.queue_size, steps_per_epoch * args.batch
    if keys > num_images:
        yield (f'--queue-size {keys}: is more than the {num_images} images, so an image is told '
               'from older keys of itself, too')
    elif keys > images:
        yield f'--queue-size {keys}: is not filled in an epoch, which has {images} images'
    if hvd.size() == 1 and args.bn_splits == 1 and args.batch > 1:
        yield ('one rank without --bn-splits: BN statistics tell which views belong together, and '
               'nothing else is learned; take --bn-splits 4 or 8')
    if args.knn_every > args.epochs:
        yield f'--knn-every {args.knn_every}: never comes in {args.epochs:g} epochs'
    usual = 0.03 * args.batch / 256
    if not 1 / 8 <= peak / usual <= 8:
        yield (f'a learning rate of {peak:g} is far from the {usual:g} that is usual with --batch '
               f'{args.batch}')
    least, most = args.crop_area
    crop = side * least ** 0.5  # pixels, of a square
    if crop < 8:
        yield (f'--crop-area {least:g} {most:g}: the smallest crops have {int(crop)} x {int(crop)} '
               f"pixels of images of {side:.0f}; in the authors' CIFAR-10 demo, 9 x 9")
    elif least > 0.5:
        yield (f'--crop-area {least:g} {most:g}: views show nearly the same part of an image; '
               'published recipes begin at 0.2, or 0.08')


def propose(args, num_images: int, steps_per_epoch: int, side: float) -> Optional[str]:
    """A line with settings for fewer images than a quarter of ImageNet's, or None if these are near
    them; `side` is what find_side() found.

    What stays as in the published recipe: the queue holds about 5 % of the images (65536 of 1.28
    million; 4096 of 50,000 in the authors' CIFAR-10 demo), and the key encoder averages over a
    fifth of an epoch (1 / (1 - 0.999) of 5004 steps; 1 / (1 - 0.99) of 390).
    """
    if num_images > FEW:
        return None
    keys = args.batch
    while keys * 2 <= max(args.batch, num_images / 10):
        keys *= 2
    momentum = round(1 - 1 / min(max(steps_per_epoch / 5, 10), 1000), 3)
    flags, reasons = [], []
    if not keys / 4 <= args.queue_size <= keys * 4:
        flags.append(f'--queue-size {keys}')
        reasons.append('a queue of about 5 % of the images')
    if not 1 / 3 <= (1 - momentum) / max(1 - args.momentum, 1e-9) <= 3:
        flags.append(f'--momentum {momentum:g}')
        reasons.append('a key encoder that averages over a fifth of an epoch')
    rate = 0.03 * args.batch / 256
    if args.cos and not rate / 3 <= args.lr <= rate * 3:
        flags.append(f'--lr {rate:g}')
        reasons.append('the published rate for this batch, which --cos does not scale')
    if side <= 64 and args.image_size > 2 * side:
        flags.append(f'--image-size {int(side)} --stem {"3x3" if side <= 40 else "3x3s2"}')
        reasons.append(f'images of {side:.0f} pixels, whose crops would be enlarged')
    if args.epochs * num_images < 200 * 50000:
        flags.append(f'--epochs {max(200, min(1000, round(200 * 50000 / num_images, -2))):.0f}')
        reasons.append('as many images in all as 200 epochs of CIFAR-10')
    if not flags:
        return None
    return (f'{num_images} images: others would take {" ".join(flags)} ({"; ".join(reasons)}); '
            'docs/flags.md has the sources')


def find_side(root: str, num_images: int) -> float:
    """The median of the shorter sides of some images, in pixels; of many images, infinity."""
    if num_images > FEW:
        return float('inf')
    files = image_lists.list_images(root).files
    sides = []
    for index in np.unique(np.linspace(0, len(files) - 1, 20).astype(int)).tolist():
        try:
            sides.append(min(decoder.decode(files.read(index))[0].shape[:2]))
        except (OSError, ValueError, MemoryError):
            continue  # the data server names it
    return float(np.median(sides)) if sides else float('inf')
