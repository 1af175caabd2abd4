"""benchmarks/notebook.py and leak.py: the recipe is what they say, and they run."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from tensorpack import tfv1 as tf

from commands import ROOT, write_images

sys.path.insert(0, os.path.join(ROOT, 'benchmarks'))
import leak  # noqa: E402
import notebook  # noqa: E402

SMALL = '''
import argparse, sys
sys.path.insert(0, {!r})
import notebook
notebook.BATCH, notebook.SPLITS = 8, 2
notebook.main(argparse.Namespace(amp=False, data={!r}, logdir={!r}, epochs={}, seed=0))
'''


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv('TF_DISABLE_MKL', '1')  # see commands.start()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), 16, 6)


def test_the_notebook_runs_and_goes_on(images, tmp_path):
    for epochs in (1, 2):
        code = SMALL.format(os.path.join(ROOT, 'benchmarks'), images, str(tmp_path), epochs)
        output = subprocess.check_output(
            [sys.executable, '-c', code], stderr=subprocess.STDOUT, universal_newlines=True)
    table = output.splitlines()[-2:]
    assert [line.split()[0] for line in table] == ['1', '2']
    assert [line.split()[2] for line in table] == ['6.96', '7.25']
    with open(str(tmp_path / 'stats.json')) as f:
        stats = json.load(f)
    assert [epoch['global_step'] for epoch in stats] == [2, 4]
    assert all(np.isfinite(epoch['loss']) and 0 <= epoch['knn_top1'] <= 100 for epoch in stats)


def test_the_rate_falls_once_an_epoch():
    with tf.Graph().as_default(), tf.Session() as sess:
        step = tf.placeholder(tf.int64)
        rate = notebook.cosine_by_epoch(0.06, 97)(step)
        rates = [sess.run(rate, {step: s}) for s in (0, 96, 97, 100 * 97, 199 * 97)]
    cosine = np.cos(np.pi / 200)
    np.testing.assert_allclose(
        rates, [0.06, 0.06, 0.03 * (1 + cosine), 0.03, 0.03 * (1 - cosine)], rtol=1e-3)


def test_new_layers_begin_as_pytorchs():
    weights = notebook.initial_weights(512, 0)
    assert {name: values.shape for name, values in weights.items()} == {
        'linear0_128/W': (512, 128), 'linear0_128/b': (128,), 'conv0/W': (3, 3, 3, 64)}
    for name, values in weights.items():
        bound = (27 if name == 'conv0/W' else 512) ** -0.5
        assert 0.95 * bound < np.abs(values).max() < bound


def test_views_of_the_notebook():
    # one colour stays one colour: only jitter and grayscale change it
    image = np.full([32, 32, 3], (30, 120, 200), np.uint8)
    views = []
    for seed in range(2000):
        out = np.empty_like(image)
        notebook.notebook_view(image, (0, 0, 32, 32), out, random.Random(seed))
        assert np.ptp(out, axis=(0, 1)).max() == 0
        views.append(out[0, 0].astype(int))
    gray = np.mean([np.ptp(view) == 0 for view in views])
    same = np.mean([np.array_equal(view, image[0, 0]) for view in views])
    assert abs(gray - 0.2) < 0.03 and abs(same - 0.2 * 0.8) < 0.03


def test_keys_are_permuted_or_not(images, tmp_path, monkeypatch):
    flags = list(leak.FLAGS)
    for flag, value in (('--batch', '8'), ('--bn-splits', '2'), ('--queue-size', '32')):
        flags[flags.index(flag) + 1] = value
    monkeypatch.setattr(leak, 'FLAGS', flags)
    losses = [leak.train(name, images, 1, str(tmp_path))[0]['loss']
              for name in ('permuted', 'unpermuted')]
    # the same weights, queue and views: only what keys are normalised with differs
    assert abs(losses[0] - losses[1]) > 1e-3
