"""subset.py: which labels are used, if few are."""
import argparse

import numpy as np
import pytest

import file_lists
import image_lists
import subset


def make_images(sizes, names='abc'):
    """A list with classes of these sizes."""
    files = [f'{name}/{i:03d}.jpg' for name, size in zip(names, sizes) for i in range(size)]
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    return image_lists.ImageList(
        file_lists.FileList('root', *file_lists.pack_names(files)), labels, list(names))


@pytest.mark.parametrize('share, counts', [
    ('1%', [2, 1, 1]), ('10%', [20, 5, 1]), ('100%', [200, 50, 3]), ('0.5%', [1, 1, 1]),
    ('5-per-class', [5, 5, 3]), ('1-per-class', [1, 1, 1])])
def test_every_class_has_its_share(share, counts):
    images = make_images([200, 50, 3])
    chosen = subset.choose(images, share)
    assert np.bincount(chosen.labels).tolist() == counts
    names = list(chosen.files.names())
    assert len(names) == sum(counts) == len(set(names)) and names == sorted(names)
    assert [image.split('/')[0] for image in names] == ['abc'[label] for label in chosen.labels]
    assert chosen.files[0] == 'root/' + names[0] and chosen.classes == ['a', 'b', 'c']


def test_it_is_the_same_in_every_run_and_a_part_of_larger_ones():
    images = make_images([200, 50, 3])
    parts = [set(subset.choose(images, share).files.names())
             for share in ('1%', '1%', '10%', '100%')]
    assert parts[0] == parts[1] < parts[2] < parts[3]
    # and these: a change would make results incomparable
    assert sorted(subset.choose(make_images([10]), '2-per-class').files.names()) == PINNED


PINNED = ['a/005.jpg', 'a/006.jpg']


@pytest.mark.parametrize('text', [
    '', '10', '0%', '101%', '-1%', '0-per-class', 'x-per-class', '1 %'])
def test_what_is_no_share(text):
    with pytest.raises(argparse.ArgumentTypeError, match='is no share like 1%'):
        subset.parse(text)


@pytest.mark.parametrize('text', ['1%', '0.1%', '100%', '1-per-class', '250-per-class'])
def test_what_is_a_share(text):
    assert subset.parse(text) == text
