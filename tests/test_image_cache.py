"""image_cache.py: what is kept, never more than said, and views that stay the same."""
import mmap
import os
from unittest import mock

import cv2
import numpy as np
import psutil
import pytest

import data
import decoder
import image_cache
import image_lists
from errors import UserError
from image_cache import ImageCache, least_limit


@pytest.fixture
def images(tmp_path):
    """Ten JPEGs of 40 x 30."""
    rng = np.random.RandomState(0)
    for i in range(10):
        cv2.imwrite(str(tmp_path / f'{i}.jpg'), rng.randint(0, 256, (30, 40, 3)).astype(np.uint8))
    return image_lists.list_images(str(tmp_path))


def make_epochs(images, cache):
    """Two epochs of views, and the number of files that each has read."""
    reads, files = [], images.files

    class Counted:
        read = staticmethod(lambda index: reads.append(index) or files.read(index))
        __len__ = staticmethod(files.__len__)

    reader = decoder.ImageReader(images._replace(files=Counted()), pytest.fail, cache)
    batches = data.Batches(data.TASKS['moco-v2'], reader, 0, 1, 10, 16)
    made, counts = [], []
    for step in range(2):
        arrays = [np.empty(shape, dtype) for shape, dtype in batches.specs(step)]
        batches.fill(step, arrays)
        made += arrays
        counts.append(len(reads))
    return made, counts


def test_the_second_epoch_reads_nothing_and_views_stay_the_same(images):
    expected, counts = make_epochs(images, None)
    assert counts == [10, 20]
    cached, counts = make_epochs(images, ImageCache(10, 10 * 3600, pytest.fail))
    assert counts == [10, 10]
    np.testing.assert_array_equal(cached, expected)


@pytest.mark.parametrize('size, kept', [(0, 0), (3599, 0), (3600, 1), (4 * 3600 + 3599, 4)])
def test_never_more_than_said(images, size, kept):
    reports = []
    cache = ImageCache(10, size, reports.append)
    made, counts = make_epochs(images, cache)
    assert counts == [10, 20 - kept] and reports == [kept]
    np.testing.assert_array_equal(made, make_epochs(images, None)[0])
    assert cache.full and sum(cache.get(i) is not None for i in range(10)) == kept


def test_processes_share_it():
    cache = ImageCache(4, 1000, pytest.fail)
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    child = os.fork()
    if not child:
        cache.put(2, image)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(cache.get(2), image)
    cache.put(2, image + 1)  # another had it at the same time
    np.testing.assert_array_equal(cache.get(2), image)
    assert cache.get(1) is None and not cache.full


def test_limits_of_control_groups(tmp_path, monkeypatch):
    assert least_limit(str(tmp_path)) == float('inf')
    (tmp_path / 'proc/self').mkdir(parents=True)
    (tmp_path / 'proc/self/cgroup').write_text('3:cpu:/x\n0::/job/step/task\n')
    assert least_limit(str(tmp_path)) == float('inf')
    for group, limit in (('job', '3000000'), ('job/step', '2000000'), ('job/step/task', 'max')):
        (tmp_path / 'sys/fs/cgroup' / group).mkdir(parents=True)
        (tmp_path / 'sys/fs/cgroup' / group / 'memory.max').write_text(limit + '\n')
    assert least_limit(str(tmp_path)) == 2000000
    monkeypatch.setattr(image_cache, 'least_limit', lambda: 2000000)
    with pytest.raises(UserError, match='--cache 0.003: there are 0.002 GB of memory'):
        ImageCache(4, 3000000, pytest.fail)


def test_more_memory_than_there_is(monkeypatch):
    for size in (10**20, psutil.virtual_memory().total):
        with pytest.raises(UserError, match=r'--cache [\d.e+]+: there are [\d.e+]+ GB of memory'):
            ImageCache(4, size, pytest.fail)
    monkeypatch.setattr(mmap, 'mmap', mock.Mock(side_effect=OSError))
    with pytest.raises(UserError, match='--cache 1: this host does not give'):
        ImageCache(4, 10**9, pytest.fail)
