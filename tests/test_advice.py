"""advice.py: what is said about settings at the start."""
import horovod.tensorflow as hvd
import numpy as np
import pytest

import advice
import main_moco
import runs
from images import write_image

hvd.init()


@pytest.mark.parametrize('flags, num_images, words', [
    ([], 60, []),
    (['--queue-size', '64'], 60, ['--queue-size 64: is more than the 60 images']),
    (['--queue-size', '56'], 60, []),
    (['--steps-per-epoch', '2'], 60, ['--queue-size 32: is not filled in an epoch, which has 16']),
    (['--bn-splits', '1'], 60, ['one rank without --bn-splits']),
    (['--bn-splits', '1', '--batch', '1', '--queue-size', '4'], 60, []),
    (['--lr', '0.3', '--cos'], 60, ['a learning rate of 0.3 is far from the 0.0009375']),
    (['--lr', '0.00003'], 60, ['a learning rate of 9.375e-07 is far from the 0.0009375']),
    (['--knn-every', '9', '--epochs', '5'], 60, ['--knn-every 9: never comes in 5 epochs']),
    (['--crop-area', '0.08', '1'], 60, []),
    (['--crop-area', '0.06', '1'], 60, ['--crop-area 0.06 1: the smallest crops have 7 x 7 ']),
    (['--crop-area', '0.6', '1'], 60, ['--crop-area 0.6 1: views show nearly the same'])])
def test_settings_that_can_hardly_learn_are_said(flags, num_images, words):
    args = main_moco.parse_args(['--data', 'x', '--batch', '8', '--bn-splits', '2', '--queue-size',
                                 '32'] + flags)
    steps, _ = runs.count_steps(args, num_images)
    peak = args.lr if args.cos else args.lr * args.batch / 256
    lines = list(advice.list_doubts(args, num_images, steps, peak, 32))
    assert len(lines) == len(words), lines
    assert all(line.startswith(word) for line, word in zip(lines, words)), lines


SMALL = ['--batch', '128', '--queue-size', '4096', '--momentum', '0.99', '--image-size', '32',
         '--epochs', '200']


@pytest.mark.parametrize('flags, num_images, side, words', [
    ([], 1281167, 400, None),
    ([], 400000, 400, None),
    (SMALL, 50000, 32, None),
    ([], 50000, 32, ['--queue-size 4096', '--momentum 0.974', '--image-size 32 --stem 3x3 ']),
    (SMALL + ['--queue-size', '65536'], 50000, 32, ['--queue-size 4096', '5 % of the images']),
    (SMALL + ['--momentum', '0.9999'], 50000, 32, ['--momentum 0.987', 'a fifth of an epoch']),
    (SMALL + ['--image-size', '224'], 50000, 60, ['--image-size 60 --stem 3x3s2']),
    (SMALL + ['--v2'], 50000, 32, None),
    (SMALL + ['--v2', '--lr', '0.1'], 50000, 32, ['--lr 0.015 ', 'which --cos does not scale']),
    (SMALL + ['--epochs', '10'], 50000, 32, ['--epochs 200 ']),
    (['--batch', '32'], 800, 500, ['--queue-size 64', '--epochs 1000'])])
def test_proposals_for_few_images(flags, num_images, side, words):
    args = main_moco.parse_args(['--data', 'x'] + flags)
    args.image_size = args.image_size or 224
    line = advice.propose(args, num_images, num_images // args.batch, side)
    assert (line is None) == (words is None), line
    assert all(word in line for word in words or [])
    assert line is None or line.startswith(f'{num_images} images: ') and '\n' not in line


def test_many_images_are_not_looked_at():
    args = main_moco.parse_args(['--data', 'x'])
    side = advice.find_side('nowhere', 1281167)
    assert advice.propose(args, 1281167, 5004, side) is None
    assert not any('crop' in line for line in advice.list_doubts(args, 1281167, 5004, 0.03, side))


def test_usual_side_of_images(tmp_path):
    for i in range(9):
        write_image(tmp_path / f'{i}.png', size=(20 + 10 * i, 200))
    (tmp_path / '4.png').write_bytes(b'damaged')
    assert advice.find_side(str(tmp_path), 9) == np.median([20, 30, 40, 50, 70, 80, 90, 100])
