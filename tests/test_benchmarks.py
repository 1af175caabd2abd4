"""benchmarks/: each runs to its figures, with the smallest settings; test_notebook.py has two."""
import os
import re
import subprocess
import sys

import pytest

from commands import NETWORK, PATIENCE, ROOT, write_images

FOLDER = os.path.join(ROOT, 'benchmarks')
SMALL = ' '.join(['--', *NETWORK, '--batch', '4'])
# what runs in benchmarks/, after which constants were made small; and a line of figures for each
# that is the result
RUNS = {
    'augment': (['augment.py', '--data', '{data}', '--images', '3', '--rounds', '1'],
                r'(?s)(\d+\.\d\d times as many images as OpenCV decodes.*){4}'),
    'end_to_end': (['end_to_end.py', '--data', '{data}', '--rounds', '1', '--steps', '1',
                    *SMALL.split()], r'median of 1: \d+\.\d{3} and \d+\.\d{3}'),
    'listing': (['-c', 'import listing; listing.IMAGES = 20; listing.CLASSES = 3; '
                       'listing.LIST = "import file_lists; file_lists.SLOW_LISTING = -1; " '
                       '"file_lists.SETTLED = -60" + listing.LIST; '
                       'listing.time.sleep = listing.drop_kernel_cache = lambda *_: "warm"; '
                       'listing.main({new!r})'], r'(?s)(20 images in \d+\.\d\d s.*){5}'),
    'packed': (['packed.py', '{data}', '--max-side', '16', '--rounds', '1'],
               r'packed, 16 pixels +reading +\d+ us an image; .* \d+\.\d\d times'),
    'pullers': (['-c', 'import argparse, pullers; pullers.RANKS = 1, 2; '
                       'pullers.SHARE_SECONDS = pullers.SAMPLE_SECONDS = 0.3; '
                       'pullers.main(argparse.Namespace(data={data!r}, image_size=16, '
                       'minutes=0.03, flags=[]))'],
                r'2 ranks, from minute .* slope -?\d+\.\d\d MB/min'),
    'step': (['-c', 'import step; step.ROUNDS = 1; step.run_main = lambda *_: 1.; '
                    'step.measure(16, 2, 1)'],  # end_to_end has run_main()
             r'median ratio \d+\.\d{3} of 1'),
    'transport': (['transport.py', '--seconds', '0.2', '--rounds', '1', '--workers', '1'],
                  r'(?s)\d+\.\d\d times as many images/s.*\d+\.\d\d times as many images for'),
}


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), 64, 3)


@pytest.mark.parametrize('name', RUNS)
def test_it_runs(name, images, tmp_path):
    words, result = RUNS[name]
    words = [word.format(data=images, new=str(tmp_path / 'new')) for word in words]
    run = subprocess.run([sys.executable, *words], cwd=FOLDER, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, universal_newlines=True, timeout=PATIENCE,
                         env=dict(os.environ, PYTHONPATH=ROOT))
    assert run.returncode == 0, run.stderr
    assert re.search(result, run.stdout), run.stdout


def test_all_are_tried():
    with open(os.path.join(FOLDER, 'README.md')) as file:
        named = set(re.findall(r'benchmarks/(\w+)\.py', file.read()))
    scripts = {name[:-3] for name in os.listdir(FOLDER) if name.endswith('.py')}
    # runtimes.py needs both environments, shuffle.py several ranks; data_server.py is a module
    assert scripts - {'data_server'} == named
    assert named == set(RUNS) | {'notebook', 'leak', 'runtimes', 'shuffle'}
