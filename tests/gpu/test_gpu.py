"""Training on a GPU against training on a CPU, and how fast a GPU is.

    make test-gpu    # never run on a GPU yet

What can run on a CPU runs there too, in the usual suite, so that it does not rot. All training is
done by commands: the tests' own process has no GPU (see conftest.py).
"""
import os
import subprocess
import sys

import horovod.tensorflow as hvd
import numpy as np
import pytest
from tensorpack import tfv1 as tf

from commands import GPUS, MOCO, NETWORK, finish, read_json, run, start, write_images, write_script
from job.start import mixed_precision_rewrite
from test_equivalence import error, make_case

# of |a - b| / |b|
SAME = 1e-3  # for every tensor: float32, which is rounded elsewhere; as in test_equivalence.py
CLOSE = {'cpu': 0.2, 'gpu': 0.05}  # 16 bits: bfloat16 has 8 of mantissa, float16 has 11

# TF32, with 10 bits of mantissa, would hide small mistakes
ON_GPUS = {'CUDA_VISIBLE_DEVICES': GPUS, 'NVIDIA_TF32_OVERRIDE': '0'}
ONE_GPU = {'CUDA_VISIBLE_DEVICES': GPUS.split(',')[0]}
# what commands add to their environment, where they compute
ENVIRONMENTS = {'cpu': {}, 'gpu': ON_GPUS, 'one GPU': dict(ON_GPUS, **ONE_GPU),
                'two GPUs': ON_GPUS}


@pytest.fixture(scope='module')
def gpus():
    """The number of GPUs that commands can use."""
    if not tf.test.is_built_with_cuda():
        return 0
    code = ('from tensorpack import tfv1 as tf\n'
            'print(len(tf.config.experimental.list_physical_devices("GPU")))')
    return int(subprocess.check_output(
        [sys.executable, '-c', code], env=dict(os.environ, **ON_GPUS)).split()[-1])


@pytest.fixture(params=['cpu', 'gpu'])
def device(request, gpus):
    if request.param == 'gpu' and not gpus:
        pytest.skip('no GPU')
    return request.param


# ---- one step, by equivalence_ranks.py

@pytest.fixture(scope='module')
def take_step(tmp_path_factory):
    def take_step(environment, ways, ranks=1):
        """Take the same step in several ways, name -> what a case may hold besides: a dict, name ->
        of each rank the results, also by name."""
        folder = tmp_path_factory.mktemp('steps')
        for way, options in ways.items():
            case = make_case(18, 'v1', ranks)
            case.update(options, query=case['query'][:1], key=case['key'][:1])
            np.savez(str(folder / way), **case)
        run('tests/equivalence_ranks.py', *[folder / f'{way}.npz' for way in ways], ranks=ranks,
            added=environment)
        return {way: [dict(np.load(str(folder / f'{way}.rank{rank}.npz')))
                      for rank in range(ranks)] for way in ways}
    return take_step


@pytest.fixture(scope='module')
def cpu(take_step):
    """A CPU's step: plain, which test_equivalence.py compares with PyTorch, and in other ways."""
    ways = {'plain': {}, 'xla': {'xla': True}}
    if mixed_precision_rewrite(gpu=False):
        ways['amp'] = {'amp': True}
    steps = take_step({}, ways)
    if tf.__version__ < '2':  # Intel's build can, see test_resnet.py
        steps.update(take_step({'TF_DISABLE_MKL': '0'}, {'NCHW': {'data_format': 'NCHW'}}))
    return steps


@pytest.fixture(scope='module')
def gpu(take_step):
    steps = take_step(ON_GPUS, {way: dict(options, data_format='NCHW') for way, options in {
        'NCHW': {}, 'xla': {'xla': True}, 'amp': {'amp': True}}.items()})
    return dict(steps, plain=steps['NCHW'])


def compare(steps, way, expected, tolerance, summary=dict):
    """That the step which was taken this way is the expected one; returns the largest error."""
    if way not in steps:
        pytest.skip(f'this TensorFlow on this CPU has no {way}')
    (results,), (expected,) = steps[way], expected
    assert set(results) == set(expected)
    for name in ('1/shuffled', '1/queue_ptr'):
        np.testing.assert_array_equal(results[name], expected[name])
    results, expected = summary(results), summary(expected)
    errors = {name: error(results[name], x) for name, x in expected.items() if np.any(x)}
    wrong = {name: e for name, e in errors.items() if not e <= tolerance}
    assert not wrong
    return max(errors.values())


def join_gradients(results):
    """All gradients as one: those of single layers are small, and rounding errors of others."""
    names = sorted(name for name in results if '/gradient.' in name)
    joined = {name: x for name, x in results.items() if name not in names}
    return dict(joined, gradient=np.concatenate([results[name].ravel() for name in names]))


@pytest.fixture
def steps(request, device):
    return request.getfixturevalue(device)


def test_the_layout_of_gpus_gives_the_step_of_a_cpu(steps, cpu):
    compare(steps, 'NCHW', cpu['plain'], SAME)


def test_xla_changes_no_step(steps):
    compare(steps, 'xla', steps['plain'], SAME)


def test_16_bits_change_a_step_little(steps, device):
    worst = compare(steps, 'amp', steps['plain'], CLOSE[device], join_gradients)
    assert worst > 1e-4  # they are 16 bits


@pytest.mark.parametrize('device', ['cpu', 'one GPU', 'two GPUs'])
def test_two_ranks_take_the_step_of_one(take_step, cpu, gpus, device):
    if device != 'cpu' and not gpus:
        pytest.skip('no GPU')
    if device == 'one GPU' and hvd.nccl_built():
        pytest.skip('NCCL refuses two ranks on one GPU, and this Horovod was built with it')
    if device == 'two GPUs' and (gpus < 2 or not hvd.nccl_built()):
        pytest.skip('one GPU' if gpus < 2 else 'this Horovod was built without NCCL')
    layout = 'NHWC' if device == 'cpu' else 'NCHW'
    ranks = take_step(ENVIRONMENTS[device], {'plain': {'data_format': layout}}, 2)['plain']
    expected, = cpu['plain']
    for name, value in expected.items():
        parts = [value, value]  # both hold the same, if not each its half of the batch
        if name in ('1/shuffled', '1/logits'):
            parts = np.split(value, 2)
        elif name.endswith(('/EMA', '1/loss', 'queue_ptr')):
            continue  # of each rank's images, until the epoch ends
        for rank, part in zip(ranks, parts):
            assert error(rank[name], part.astype(float)) <= SAME or not part.any(), name


# ---- commands

# on a CPU too, the next batch is staged, which keeps one of two threads waiting
STAGED = '''import inputs
from job import start
create, configure = inputs.create_source, start.session_config
inputs.create_source = lambda signature, server, gpus: create(signature, server, 1)
def session_config(*args):
    config = configure(*args)
    config.inter_op_parallelism_threads = 2
    return config
start.session_config = session_config'''


def pre_training(device, tmp_path):
    """The script."""
    return 'main_moco.py' if device == 'gpu' else write_script(tmp_path / 'staged.py', STAGED)


def test_pre_training_and_evaluation(tmp_path, device):
    images, logdir = write_images(tmp_path / 'images'), tmp_path / 'moco'
    run(pre_training(device, tmp_path), '--data', images, *MOCO, '--logdir', logdir,
        '--knn-every', 1, '--max-steps', 10, added=ENVIRONMENTS[device])
    run('main_lincls.py', '--load', logdir, '--data', images, *NETWORK, '--batch', 10,
        '--max-steps', 12, '--logdir', tmp_path / 'linear', added=ENVIRONMENTS[device])
    last = read_json(logdir, 'stats.json')[-1]
    assert last['global_step'] == 10 and 0 <= last['knn_top1'] <= 100
    linear = read_json(tmp_path / 'linear', 'stats.json')[-1]
    assert linear['val_images'] == 20 and 0 <= linear['val_top1'] <= 100


def test_speed(tmp_path, device, capsys):
    """Printed, never asserted."""
    flags, batches, switches, steps, ranks = {
        'cpu': (NETWORK, [32], [[]], 10, 2),  # staging would wait for ever in one thread
        'gpu': ([], [32, 64, 128, 256], [[], ['--no-xla'], ['--amp']], 30, 1)}[device]
    for switch in switches:
        for batch in batches:
            logdir = tmp_path / ''.join([str(batch), *switch])
            end_watch = watch_memory(tmp_path / 'memory') if device == 'gpu' else lambda: 'no GPU'
            process = start(pre_training(device, tmp_path), '--fake', *flags, '--batch', batch,
                            *switch, '--steps-per-epoch', steps, '--max-steps', 2 * steps,
                            '--logdir', logdir, ranks=ranks,
                            added={} if device == 'cpu' else ONE_GPU)
            errors, memory = finish(process)[1], end_watch()
            failed = process.returncode != 0
            assert not failed or batch > 32, errors  # more may not fit
            speed = (errors.strip().splitlines()[-1] if failed else '{:.1f} images/s'.format(
                read_json(logdir, 'stats.json')[-1]['images_per_second']))
            with capsys.disabled():
                print(f'\n{device}, batch {batch} {" ".join(switch)}: {speed}, memory: {memory}')


def watch_memory(path):
    """Returns a function that ends the watch over the GPUs' memory, and returns what was in use at
    most. TensorFlow takes memory in pieces that grow, so this is more than it needs."""
    with open(str(path), 'w') as f:
        watcher = subprocess.Popen(['nvidia-smi', '--query-gpu=memory.used', '-lms', '200',
                                    '--format=csv,noheader,nounits'], stdout=f)

    def end_watch():
        watcher.terminate()
        watcher.wait()
        return f'{max(map(int, path.read_text().split()))} MiB'
    return end_watch
