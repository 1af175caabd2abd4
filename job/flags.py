"""Flags that several scripts share, and what their values must be."""
import argparse

import resnet
from job import cores
from job.shutdown import GRACE, STALL_LIMIT


def create_parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_run_flags(group, compiled: str) -> None:
    """How a script runs; `compiled` is what XLA compiles."""
    add = group.add_argument
    add('--workers', type=int, metavar='N',
        help='data processes on each host (default: one a core)')
    add('--cpus', type=cores.parse_cpus, metavar='LIST', help='cores of the data processes on each '
        'host, as in 0-3,8; the trainers keep to the others (default: all share all)')
    add('--stall-limit', type=float, default=STALL_LIMIT, metavar='SECONDS', help='end if a rank, '
        f'or a batch, lets the others wait for longer (default: {STALL_LIMIT})')
    add('--xla', action='store_true', default=None,
        help=f'compile the {compiled} with XLA (default: on a GPU)')
    add('--no-xla', dest='xla', action='store_false', help='do not')


def add_network_flags(group) -> None:
    """What the network is; weights that were trained here tell it themselves."""
    add = group.add_argument
    add('--depth', type=int, choices=sorted(resnet.DEPTHS),
        help='layers of the ResNet (default: those of the weights, or 50)')
    add('--width', type=int,
        help='channels of the first group (default: those of the weights, or 64)')
    add('--stem', choices=sorted(resnet.STEMS), help='first layers: imagenet is 7x7 of stride 2 '
        'and a pool; 3x3 and 3x3s2 (stride 2) are for small images (default: that of the weights, '
        'or imagenet)')
    add('--image-size', type=int, help='of the square input, in pixels (default: that of the '
        'training, or 224)')


def add_training_flags(group, epochs: int, crop_area, lr: float, lr_help: str, decay: float,
                       decay_help: str) -> None:
    """The recipe of any training, with its published values."""
    add = group.add_argument
    add('--epochs', type=float, default=epochs,
        help=f'length of the schedule in epochs (default: {epochs})')
    add('--steps-per-epoch', type=int, metavar='N',
        help='steps in an epoch (default: number of images / total batch)')
    add('--max-steps', type=int, metavar='N',
        help='stop after N steps; the schedule stays as it is')
    add('--batch', type=int, default=256,
        help='images in a step, of all ranks together (default: 256)')
    add('--lr', type=float, default=lr,
        help=f'learning rate at a total batch of 256; {lr_help} (default: {lr:g})')
    add('--weight-decay', type=float, default=decay, help=f'{decay_help} (default: {decay:g})')
    add('--crop-area', type=float, nargs=2, default=crop_area, metavar=('MIN', 'MAX'), help='share '
        'of the image that a crop covers (default: {:g} {:g})'.format(*crop_area))
    add('--cache', type=float, default=0, metavar='GB', help='keep so many GB of decoded images in '
        'the memory of each host, from the first epoch on (default: 0)')
    add('--grace', type=float, default=GRACE, metavar='SECONDS', help='after SIGTERM, for the step '
        f'that is under way and its checkpoint (default: {GRACE}: horovodrun kills after 5)')
    add('--seed', type=int, default=0,
        help='of weights, permutations and augmentation (default: 0)')


def check(parser, args, *positive: str) -> None:
    """A usage error unless numbers, also of a script's own flags, are positive, crops exist, and no
    path is empty, as that of a shell's variable may be."""
    for name in ('data', 'load', 'init', 'logdir', 'out', 'knn_data'):
        if getattr(args, name, None) == '':
            parser.error(f'--{name.replace("_", "-")} is empty')
    for name in ('batch', 'epochs', 'steps_per_epoch', 'workers', 'stall_limit', 'grace', 'width',
                 'image_size', *positive):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < float('inf'):
            parser.error(f'--{name.replace("_", "-")} must be positive, not {value}')
    for name in ('max_steps', 'lr', 'weight_decay', 'knn_every', 'cache'):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < float('inf'):
            parser.error(f'--{name.replace("_", "-")} must not be negative, not {value}')
    if 'crop_area' in args and not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        parser.error('--crop-area {} {}: needs 0 < MIN <= MAX <= 1'.format(*args.crop_area))
