"""Ranks that srun, mpirun and others start, as a fake launcher does: they train together, or one
line says why not; never each for itself."""
import json
import os
import re
import socket
import sys
import time

import psutil
import pytest

from commands import MOCO, PATIENCE, ROOT, command, finish, read_json, start_command, write_images
from errors import UserError
from fake_launcher import VARIABLES
from job import launcher
from job.launcher import Rank

FAKE = [sys.executable, os.path.join(ROOT, 'tests', 'fake_launcher.py')]


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), 24, 8)


def launch(kind, script, *flags, size=2, options=(), **kwargs):
    return start_command(FAKE + [*options, kind, str(size)] + command(script, *flags), **kwargs)


# ---- trainings

@pytest.mark.parametrize('kind', sorted(VARIABLES))
def test_ranks_train_together(kind, images, tmp_path):
    process = launch(kind, 'main_moco.py', '--data', images, *MOCO, '--steps-per-epoch', 3,
                     '--max-steps', 3, '--logdir', tmp_path / 'log', tmp=tmp_path)
    output, errors = finish(process)
    assert process.returncode == 0, errors
    assert '8 in a step on 2 ranks (4 each' in output + errors
    assert [epoch['global_step'] for epoch in read_json(tmp_path, 'log', 'stats.json')] == [3]
    assert os.listdir(str(tmp_path)) == ['log']
    assert 'will not be named' not in output + errors  # there is a heartbeat


def test_evaluations_and_classifiers_run_under_launchers_too(images, tmp_path):
    moco = tmp_path / 'moco'
    for script, flags in [
            ('main_moco.py', ['--max-steps', 0, *MOCO, '--logdir', moco]),
            ('main_lincls.py', ['--load', moco, '--max-steps', 1, '--batch', 8, *MOCO[:8],
                                '--logdir', tmp_path / 'classifier']),
            ('eval_knn.py', ['--load', moco, *MOCO[:8]])]:
        process = launch('srun', script, '--data', images, *flags)
        output, errors = finish(process)
        assert process.returncode == 0, errors
        if script == 'eval_knn.py':
            assert output.count('top-1') == 1, output


def test_cores_of_a_rank_are_not_divided_again(images, tmp_path):
    # the data server, which is one of the host, has those of both
    if os.cpu_count() < 2:
        pytest.skip('needs two cores')
    script = tmp_path / 'show.py'
    script.write_text(f"""if True:
        import os, sys, time
        sys.path.insert(0, {ROOT!r})
        from job import cores, launcher
        launcher.join([])
        cores.set_up([])
        print('threads', cores.num_threads(), 'own', cores.format_cpus(os.sched_getaffinity(0)),
              'host', cores.format_cpus(cores.CORES), flush=True)
        time.sleep(2)  # the store ends with rank 0
        """)
    for options, expected in [(['--cores'], 'threads 1 own {} host 0,1'),
                              ([], 'threads 1 own 0,1 host 0,1')]:
        words = ['taskset', '-c', '0,1'] + FAKE + options + ['srun', '2', sys.executable,
                                                             str(script)]
        process = start_command(words)
        output, errors = finish(process)
        assert process.returncode == 0, errors
        assert sorted(output.splitlines()) == [expected.format(rank) for rank in range(2)]


# ---- the end

def wait_for(condition):
    deadline = time.time() + PATIENCE
    while not condition():
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.fixture
def training(images, tmp_path):
    """A job of two ranks that trains: its process, and a function that finds a rank's."""
    process = launch('srun', 'main_moco.py', '--data', images, *MOCO, '--steps-per-epoch', 2,
                     '--logdir', tmp_path / 'log', '--stall-limit', 10, tmp=tmp_path)
    wait_for(lambda: (tmp_path / 'log' / 'stats.json').exists() or process.poll() is not None)
    everything = psutil.Process(process.pid).children(recursive=True)

    def rank(number):
        return next(p for p in everything if p.parent().pid == process.pid and
                    p.environ()['SLURM_PROCID'] == str(number))
    yield process, rank
    _, alive = psutil.wait_procs(everything, timeout=30)
    for p in alive:
        p.kill()
    process.kill()
    process.communicate()
    assert not alive


def test_sigterm_leaves_a_checkpoint(training, tmp_path):
    process, _ = training
    process.terminate()
    _, errors = finish(process)
    assert process.returncode == 75, errors
    assert (tmp_path / 'log' / 'resume-me').exists()


def test_a_rank_that_stops_is_named(training):
    process, rank = training
    stopped = rank(1)
    stopped.suspend()
    words = f'waited for rank 1 (process {stopped.pid} on {socket.gethostname()})'
    said = ''
    while words not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    stopped.kill()


def test_all_end_when_rank_0_is_killed_and_nothing_is_left(training):
    process, rank = training
    rank(0).kill()
    finish(process)
    assert process.returncode != 0


# ---- what cannot be

@pytest.mark.parametrize('env, complaint', [
    ({'PMIX_RANK': '0'}, 'PMIX_RANK is set by a launcher that is not known here'),
    ({'PMI_RANK': '0'}, 'PMI_RANK is set, but PMI_SIZE is not'),
    ({'OMPI_COMM_WORLD_RANK': '0', 'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'},
     'the ranks of mpirun are on several hosts: set MASTER_ADDR'),
    ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '2', 'HOROVOD_START_TIMEOUT': '1'},
     'of the 2 ranks of srun, 1 have not come (rank 1, for one); if srun has not started this '
     'process, unset SLURM_PROCID'),
    ({'SLURM_PROCID': '1', 'SLURM_NTASKS': '2', 'HOROVOD_START_TIMEOUT': '1'},
     'rank 0 of srun was not found at 127.0.0.1, port '),
    ({'SLURM_PROCID': '1', 'SLURM_NTASKS': '2', 'MASTER_ADDR': 'no.such.host.invalid'},
     "rank 0's host, no.such.host.invalid, has no address"),
    ({'SLURM_PROCID': '1', 'SLURM_NTASKS': '2', 'MASTER_PORT': 'x'}, 'MASTER_PORT is x, which is'),
])
def test_what_cannot_be_is_one_line(env, complaint, tmp_path):
    process = start_command(
        ['env'] + [f'{name}={value}' for name, value in env.items()] +
        command('main_moco.py', '--fake', *MOCO, '--logdir', tmp_path / 'log'))
    output, errors = finish(process)
    assert process.returncode == 1 and output == ''
    assert errors.startswith('main_moco.py: error: ' + complaint) and errors.count('\n') == 1
    assert not (tmp_path / 'log').exists()


def test_a_second_job_without_a_number_does_not_join_the_first(tmp_path):
    first = launch('srun-least', 'main_moco.py', '--fake', *MOCO, '--logdir', tmp_path / 'first')
    try:
        wait_for((tmp_path / 'first').exists)
        second = launch('srun-least', 'main_moco.py', '--fake', *MOCO, '--logdir',
                        tmp_path / 'second')
        _, errors = finish(second)
        assert second.returncode == 1
        assert re.search(r'another job that calls itself \d+ uses port \d+; set MASTER_PORT', errors)
        assert not (tmp_path / 'second').exists() and first.poll() is None
    finally:
        first.terminate()
        finish(first)


# ---- single functions

@pytest.mark.parametrize('env, expected', [
    ({}, None),
    ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '1'}, None),
    # salloc's shell is a step of one task
    ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_TASKS': '1'}, None),
    ({'SLURM_PROCID': '3', 'SLURM_NTASKS': '8', 'HOROVOD_RANK': '1'}, None),
    ({'SLURM_PROCID': '3', 'SLURM_NTASKS': '8', 'SLURM_NNODES': '2'}, ('srun', 3, 8, False)),
    ({'SLURM_PROCID': '3', 'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_NODES': '1', 'SLURM_NNODES': '2'},
     ('srun', 3, 8, True)),
    ({'PMI_RANK': '1', 'PMI_SIZE': '4', 'SLURM_PROCID': '0', 'SLURM_NTASKS': '2'},
     ('mpiexec', 1, 4, True)),
    ({'PMI_RANK': '1', 'PMI_SIZE': '4', 'SLURM_PROCID': '1', 'SLURM_NTASKS': '4',
      'SLURM_NNODES': '2'}, ('mpiexec', 1, 4, False)),  # srun --mpi=pmi2
    ({'PMI_RANK': '1', 'PMI_SIZE': '4', 'MPI_LOCALNRANKS': '4', 'SLURM_NNODES': '2'},
     ('mpiexec', 1, 4, True)),
])
def test_ranks_are_found(env, expected):
    me = launcher.find_rank(env)
    assert (me and (me.launcher, me.rank, me.size, me.one_host)) == expected


@pytest.mark.parametrize('nodes, first', [
    ('node', 'node'), ('a-1,b', 'a-1'), ('node[07-12,15],other', 'node07'), ('n[3]-ib,m', 'n3-ib')])
def test_first_host_of_slurms_lists(nodes, first):
    assert launcher.first_host(nodes) == first


def entries(hosts):
    return [{'host': [host, 'boot']} for host in hosts]


def test_ranks_are_placed_as_horovodrun_places_them():
    def variables(rank):
        placed = launcher.place(Rank('srun', '', rank, 5, False), entries('aaabb'))
        return [placed[name] for name in ('LOCAL_RANK', 'LOCAL_SIZE', 'CROSS_RANK', 'CROSS_SIZE',
                                          'HOSTNAME')]
    assert [variables(rank) for rank in range(5)] == [
        [0, 3, 0, 2, 'a-0'], [1, 3, 0, 2, 'a-0'], [2, 3, 0, 1, 'a-0'],
        [0, 2, 1, 2, 'b-3'], [1, 2, 1, 2, 'b-3']]
    with pytest.raises(UserError, match=r'not numbered host by host: a has \[0, 2\]; start'):
        launcher.place(Rank('srun', '', 0, 4, False), entries('abab'))


def test_the_interface_of_an_address():
    assert psutil.net_if_addrs()[launcher.find_interface('127.0.0.1')]
    assert json.dumps(launcher.find_interface('127.0.0.1')) == '"lo"'


def test_horovodrun_works_where_the_home_folder_cannot_be_written():
    horovodrun = command('', ranks=2)[:3]
    process = start_command(['env', 'HOME=/proc/none'] + horovodrun + ['echo', 'it runs'])
    output, errors = finish(process)
    assert process.returncode == 0 and output.count('it runs') == 2, errors
