"""job/cores.py: how many cores may be used, and what scripts, but no imports, set up."""
import os
import subprocess
import sys

import pytest

from commands import ROOT
from job import cores


@pytest.mark.parametrize('files, number', [
    ({}, 8),
    ({'cpu.max': 'max 100000'}, 8),
    ({'cpu.max': '250000 100000'}, 2),  # seen inside a container
    ({'a/b/cpu.max': '100000 100000', 'a/cpu.max': '400000 100000'}, 1),
    ({'a/b/cpu.max': 'max 100000', 'a/cpu.max': '400000 100000'}, 4),
    ({'a/b/cpu.max': '1000 100000'}, 1),
    ({'cpu/cpu.cfs_quota_us': '300000', 'cpu/cpu.cfs_period_us': '100000'}, 3),
    ({'cpu/c/cpu.cfs_quota_us': '-1', 'cpu/c/cpu.cfs_period_us': '100000'}, 8),
    ({'cpu/c/cpu.cfs_quota_us': '150000', 'cpu/c/cpu.cfs_period_us': '25000'}, 6)])
def test_cores_are_what_control_groups_allow(tmp_path, files, number):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + '\n')
    groups = tmp_path / 'groups'
    groups.write_text('3:memory:/c\n2:cpu,cpuacct:/c\n0::/a/b\n')
    assert cores.num_cores(range(8), str(tmp_path), str(groups)) == number


SCRIPTS = ('main_moco', 'main_lincls', 'eval_knn')


def run_code(code, *flags, **env):
    """The output of code for a Python in ROOT, in an environment without what set_up() sets."""
    set_up = ('OMP_NUM_THREADS', 'KMP_BLOCKTIME', 'TF_CPP_MIN_LOG_LEVEL', 'OPENCV_LOG_LEVEL',
              'OPENCV_IO_MAX_IMAGE_PIXELS', 'XLA_FLAGS')
    kept = {name: value for name, value in os.environ.items() if name not in set_up}
    return subprocess.check_output(
        [sys.executable, '-u', '-c', code, *flags], cwd=ROOT, universal_newlines=True,
        env=dict(kept, **env))


def test_openmp_is_told_before_tensorflow_is_loaded():
    """Of what is loaded, only the script's first import may come before OpenMP's settings."""
    code = (
        'import os, runpy, sys\n'
        'class Watch:\n'
        '    def find_spec(self, name, *_):\n'
        '        if name in ("tensorflow", "horovod", "tensorpack"):\n'
        '            print(os.environ["OMP_NUM_THREADS"], os.environ["KMP_BLOCKTIME"])\n'
        '            os._exit(0)\n'
        'sys.meta_path.insert(0, Watch())\n'
        'sys.argv[0] = "{0}.py"\n'
        'runpy.run_path("{0}.py", run_name="__main__")\n')
    first, *others = sorted(cores.CORES)
    number = cores.num_cores()
    cases = [(1, [], number), (2, [], max(1, number // 2))]
    if others:
        cases.append((1, ['--cpus', str(first)], cores.num_cores(others)))
    for script in SCRIPTS:
        for ranks, flags, threads in cases:
            output = run_code(code.format(script), *flags, HOROVOD_LOCAL_SIZE=str(ranks))
            assert output == '{} 0\n'.format(threads)


def test_importing_a_script_changes_nothing_in_the_process():
    # the flag is in sys.argv; what libraries change, tensorpack say, is not ours
    code = f"""if True:
        import importlib, os, signal
        import cv2, horovod.tensorflow, tensorpack.callbacks, tensorpack.input_source, zmq
        from tensorpack import tfv1

        def look():
            return dict(os.environ), signal.getsignal(signal.SIGINT), os.sched_getaffinity(0)
        before = look()
        for script in {SCRIPTS}:
            importlib.import_module(script)
            print(script, look() == before)"""
    output = run_code(code, '--cpus', str(min(cores.CORES)))
    assert output.splitlines() == [f'{script} True' for script in SCRIPTS]


@pytest.mark.parametrize('given, expected', [
    ('', '--xla_gpu_cuda_data_dir={}'),
    ('--xla_dump_to=/x', '--xla_dump_to=/x --xla_gpu_cuda_data_dir={}'),
    ('--xla_gpu_cuda_data_dir=/opt/cuda', '--xla_gpu_cuda_data_dir=/opt/cuda')])
def test_xla_finds_what_pip_installs_of_cuda(tmp_path, given, expected):
    code = f"""if True:
        import os, sysconfig
        sysconfig.get_path = {{'purelib': {str(tmp_path)!r}}}.get
        from job import cores
        cores.set_up([])
        print(os.environ['XLA_FLAGS'])"""
    assert run_code(code, XLA_FLAGS=given) == given + '\n'
    cuda = tmp_path / 'nvidia' / 'cuda_nvcc'
    cuda.mkdir(parents=True)
    assert run_code(code, XLA_FLAGS=given) == expected.format(cuda) + '\n'


@pytest.mark.parametrize('call, result', [
    ('cores.set_up(sys.argv[1:])', 'ends at once'), ('', 'as before')])
def test_ctrl_c_ends_a_script_that_is_loading_libraries(call, result):
    # what imports a script, as pytest does, keeps Python's own way
    code = f"""if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from job import cores
        {call}
        print({{signal.SIG_DFL: 'ends at once', signal.default_int_handler: 'as before'}}[
            signal.getsignal(signal.SIGINT)])"""
    assert run_code(code) == result + '\n'


@pytest.mark.parametrize('files, left_out', [
    (['cv2/__init__.py'], True), (['numpy.py'], True), (['zmq.cpython-27.so'], True),
    (['mine.py'], False), ([], False)])
def test_other_packages_of_pythonpath_are_left_out(tmp_path, monkeypatch, capsys, files, left_out):
    ros, mine = tmp_path / 'ros[1]', tmp_path / 'mine'
    for file in files:
        (ros / file).parent.mkdir(parents=True, exist_ok=True)
        (ros / file).write_text('')
    own = [folder for folder in sys.path if folder not in (str(ros), str(mine))]
    monkeypatch.setenv('PYTHONPATH', f'{ros}:{mine}')
    monkeypatch.setattr(sys, 'path', [str(ros), str(mine)] + own)
    cores.leave_other_packages()
    kept = [str(mine)] if left_out else [str(ros), str(mine)]
    assert os.environ['PYTHONPATH'] == ':'.join(kept) and sys.path == kept + own
    said = f'PYTHONPATH: {ros} is left out, since it has a ' in capsys.readouterr().err
    assert said == left_out


def test_packages_that_only_pythonpath_has_stay(tmp_path, monkeypatch):
    (tmp_path / 'numpy').mkdir()  # as with a cluster's modules
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setattr(sys, 'path', [str(tmp_path), '/nowhere'])
    cores.leave_other_packages()
    assert os.environ['PYTHONPATH'] == str(tmp_path) and sys.path == [str(tmp_path), '/nowhere']
