"""How tests run the command lines, and images for them."""
import concurrent.futures
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 600  # seconds for any command, on a busy machine
# which GPUs commands may use, if they are to use any: conftest.py hides them
GPUS = os.environ.get('CUDA_VISIBLE_DEVICES', '0,1,2,3,4,5,6,7')

# a network of which a step takes milliseconds
NETWORK = ['--depth', '18', '--width', '8', '--stem', '3x3s2', '--image-size', '16']
MOCO = NETWORK + ['--batch', '8', '--bn-splits', '2', '--queue-size', '32', '--lr', '0.5']


def write_images(root, num_train=60, num_val=20):
    """Class folders of noisy JPEGs of 40 x 40 pixels: a class has more of its colour,
    but not always the most."""
    rng = np.random.RandomState(0)
    for split, count in (('train', num_train), ('val', num_val)):
        for i in range(count):
            folder = os.path.join(str(root), split, 'bgr'[i % 3])
            os.makedirs(folder, exist_ok=True)
            image = rng.randint(0, 120, [40, 40, 3]) + rng.randint(0, 100, 3)
            image[:, :, i % 3] += 35
            cv2.imwrite(os.path.join(folder, '{:02d}.jpg'.format(i)), image.astype(np.uint8))
    return str(root)


def command(script, *flags, ranks=1, root=ROOT, python=sys.executable):
    """The words of a command line."""
    launcher = ([os.path.join(os.path.dirname(python), 'horovodrun'), '-np', str(ranks)]
                if ranks > 1 else [])
    return launcher + [python, os.path.join(root, script)] + [str(flag) for flag in flags]


def start(script, *flags, ranks=1, root=ROOT, python=sys.executable, tmp=None, **kwargs):
    """Start a command line.

    Args:
        root: of the program's files.
        python: of which environment.
        tmp: folder for its temporary files.

    Returns:
        subprocess.Popen, whose output is text.
    """
    return start_command(command(script, *flags, ranks=ranks, root=root, python=python), tmp,
                         **kwargs)


def start_command(words, tmp=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, added=None,
                  **kwargs):
    """start() of any words of a command line; added: to its environment."""
    # Intel's build takes 8 seconds to rewrite a graph for kernels of its own,
    # which small images do not repay
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='', TF_DISABLE_MKL='1', OMP_NUM_THREADS='1',
               **({'TMPDIR': str(tmp)} if tmp else {}))
    env.update(added or {})
    return subprocess.Popen(words, stdout=stdout, stderr=stderr, universal_newlines=True, env=env,
                            **kwargs)


def finish(process):
    """Wait for the end of a command; returns (its output, its errors)."""
    try:
        return process.communicate(timeout=PATIENCE)
    except BaseException:
        process.kill()
        process.communicate()
        raise


def run(*args, **kwargs):
    """Start a command and wait until it has succeeded; returns (its output, its errors)."""
    process = start(*args, **kwargs)
    output, errors = finish(process)
    assert process.returncode == 0, '{}\n{}\n{}'.format(' '.join(process.args), output, errors)
    return output, errors


def torch_python():
    """A Python with PyTorch: $TORCH_PYTHON or .venv-torch of this clone; skips the test where there
    is none."""
    path = os.environ.get('TORCH_PYTHON') or os.path.join(ROOT, '.venv-torch', 'bin', 'python')
    if not os.path.exists(path):
        pytest.skip('no PyTorch: {} does not exist (TORCH_PYTHON says where it is)'.format(path))
    return path


def write_script(path, lines):
    """Write a script that is main_moco.py, but first the lines are run; returns its path."""
    with open(str(path), 'w') as f:
        f.write(f'''import sys
sys.path.insert(0, {ROOT!r})
from job import cores
cores.set_up(sys.argv[1:])
{lines}
import main_moco
from job import start
with start.user_errors():
    main_moco.main(main_moco.parse_args())
''')
    return path


def two_at_a_time(function, arguments):
    """Results of a function that runs commands: before its steps, one keeps a single core busy."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, arguments))


def read_json(*path):
    with open(os.path.join(*map(str, path))) as f:
        return json.load(f)
