"""Starts the ranks of a job as srun, mpirun and others do, as far as the ranks can tell: it sets
their variables, passes signals on and waits.

    python fake_launcher.py KIND SIZE COMMAND...

KIND is a key of VARIABLES. With --ranks FIRST:END only these are started here, the others being
elsewhere; with --cores each has cores of its own.
"""
import argparse
import os
import signal
import subprocess
import sys

VARIABLES = {  # {0}: rank, {1}: size, {2}: local rank, {3}: local size, {4}: number of hosts
    'srun': {'SLURM_PROCID': '{0}', 'SLURM_NTASKS': '{1}', 'SLURM_LOCALID': '{2}',
             'SLURM_JOB_ID': '77', 'SLURM_STEP_ID': '0', 'SLURM_NNODES': '{4}'},
    'srun-least': {'SLURM_PROCID': '{0}', 'SLURM_NTASKS': '{1}'},
    'mpirun': {'OMPI_COMM_WORLD_RANK': '{0}', 'OMPI_COMM_WORLD_SIZE': '{1}',
               'OMPI_COMM_WORLD_LOCAL_RANK': '{2}', 'OMPI_COMM_WORLD_LOCAL_SIZE': '{3}',
               # its own processes were started by srun, one a host
               'SLURM_PROCID': '0', 'SLURM_NTASKS': '{4}'},
    'mpiexec': {'PMI_RANK': '{0}', 'PMI_SIZE': '{1}', 'MPI_LOCALRANKID': '{2}',
                'MPI_LOCALNRANKS': '{3}'},
    'jsrun': {'JSM_NAMESPACE_RANK': '{0}', 'JSM_NAMESPACE_SIZE': '{1}',
              'JSM_NAMESPACE_LOCAL_RANK': '{2}', 'JSM_NAMESPACE_LOCAL_SIZE': '{3}'},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--ranks')
    parser.add_argument('--cores', action='store_true')
    parser.add_argument('kind', choices=sorted(VARIABLES))
    parser.add_argument('size', type=int)
    parser.add_argument('command', nargs=argparse.REMAINDER)
    args = parser.parse_args()
    first, end = map(int, args.ranks.split(':')) if args.ranks else (0, args.size)
    processes = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [p.send_signal(number) for p in processes])
    for rank in range(first, end):
        values = rank, args.size, rank - first, end - first, args.size // (end - first)
        env = {name: text.format(*values) for name, text in VARIABLES[args.kind].items()}
        words = ['taskset', '-c', str(rank - first)] if args.cores else []
        processes.append(subprocess.Popen(words + args.command, env=dict(os.environ, **env)))
    return max(abs(p.wait()) for p in processes)


if __name__ == '__main__':
    sys.exit(main())
