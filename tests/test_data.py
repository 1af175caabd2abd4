"""data.py: the plan, which image goes where, and batches that follow from it."""
import itertools
import random

import cv2
import numpy as np
import pytest

import data
import decoder
import image_lists
import views
from images import PHOTO, read_image, write_image


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
    reader = decoder.ImageReader(image_lists.list_images(folder, 'train', labelled), pytest.fail)
    batches = data.Batches(data.TASKS[task], reader, rank, size, batch, 16, seed, (0.2, 1))
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
    seen = {}
    for step in range(4):
        query, _ = fill(folder, 'moco-v2', step, size=1, batch=9)
        for view, (epoch, index) in zip(query, data.images_of_batch(step, 0, 1, 9, 9, 0)):
            assert epoch == step
            seen.setdefault(index, set()).add(view.tobytes())
    assert [len(seen[index]) for index in range(9)] == [4] * 9


@pytest.mark.parametrize('task', ['moco-v1', 'moco-v2', 'linear', 'embed'])
def test_parts_of_images_are_enough(tmp_path, task, monkeypatch):
    """And it does not matter whether a worker has met those before that cannot be read. They are of
    other sizes than the next, which takes their place, and broken in the middle."""
    images = tmp_path / 'train'
    images.mkdir()
    photo = cv2.imread(PHOTO)
    for i, size in enumerate([(500, 375), (90, 300), (300, 90), (120, 121)]):
        content = cv2.imencode('.jpg', cv2.resize(photo, size))[1].tobytes()
        if i in (1, 2):
            content = content[:len(content) // 2] + b'\xff\xd9'
        (images / '{}.jpg'.format(i)).write_bytes(content)
    (images / '4.png').write_bytes(cv2.imencode('.png', photo)[1].tobytes())

    unreadable, steps = [], [0] if task == 'embed' else [0, 1]
    files = image_lists.list_images(str(tmp_path), 'train')._replace(labels=np.arange(5))

    def make():
        reader = decoder.ImageReader(files, lambda index, *_: unreadable.append(index))
        return data.Batches(data.TASKS[task], reader, 0, 1, 5, 32)

    def fill(batches, step):
        arrays = [np.full(shape, 77, dtype) for shape, dtype in batches.specs(step)]
        batches.fill(step, arrays)
        return arrays

    batches = make()
    first = [fill(batches, step) for step in steps]
    assert sorted(unreadable) == [1, 2]
    again = [fill(batches, step) for step in steps]
    monkeypatch.setattr(decoder, 'decode_box', lambda *_: None)
    whole = [fill(make(), step) for step in steps]
    for arrays in zip(itertools.chain(*first), itertools.chain(*again), itertools.chain(*whole)):
        np.testing.assert_array_equal(arrays[0], arrays[1])
        np.testing.assert_array_equal(arrays[0], arrays[2])


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
    views.center_crop_view(read_image(image_lists.list_images(folder).files[7]), None, expected)
    np.testing.assert_array_equal(images[0], expected)
