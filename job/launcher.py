"""Launchers other than horovodrun: srun, mpirun, mpiexec, jsrun. They start the ranks and tell each
one its number; what horovodrun does besides is done here, before any library is loaded.

    rank 0 ── starts, holds its lifeline ──▶ rendezvous.py, a key-value store
    every rank ── its host and cores ──▶ store ──▶ all ranks' ──▶ Horovod's variables
"""
import hashlib
import http.client
import os
import re
import socket
import subprocess
import sys
import time
from typing import List, NamedTuple, Optional

import psutil

from errors import UserError
from job import cores
from job.store import request

# The launcher, and the variables with which it tells a rank: its number, the number of ranks, and
# how many of them are on this host. mpirun may start its own processes with srun, so srun is the
# last one.
LAUNCHERS = [
    ('mpirun', ['OMPI_COMM_WORLD_RANK'], ['OMPI_COMM_WORLD_SIZE'], ['OMPI_COMM_WORLD_LOCAL_SIZE']),
    ('mpirun', ['MV2_COMM_WORLD_RANK'], ['MV2_COMM_WORLD_SIZE'], ['MV2_COMM_WORLD_LOCAL_SIZE']),
    ('jsrun', ['JSM_NAMESPACE_RANK'], ['JSM_NAMESPACE_SIZE'], ['JSM_NAMESPACE_LOCAL_SIZE']),
    ('mpiexec', ['PMI_RANK'], ['PMI_SIZE'], ['MPI_LOCALNRANKS']),  # srun --mpi=pmi2, too
    ('srun', ['SLURM_PROCID'], ['SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS', 'SLURM_NPROCS'], []),
]
# how many hosts there are, where a launcher does not say how many ranks are on this one
NUM_HOSTS = ['SLURM_STEP_NUM_NODES', 'SLURM_NNODES', 'SLURM_JOB_NUM_NODES']
# of launchers that say no more than this
OTHERS = ['PMIX_RANK', 'PALS_RANKID', 'ALPS_APP_PE', 'FLUX_TASK_RANK', 'LSF_PM_TASKID']
# what tells this job from others of the same user
JOB = ['SLURM_JOB_ID', 'SLURM_STEP_ID', 'LSB_JOBID', 'OMPI_MCA_ess_base_jobid', 'PMIX_NAMESPACE',
       'PMI_JOBID', 'JSM_NAMESPACE_ID']
NODES = ['SLURM_STEP_NODELIST', 'SLURM_JOB_NODELIST', 'SLURM_NODELIST']
PATIENCE = 120  # seconds for all ranks to come; HOROVOD_START_TIMEOUT is another number
SCOPE = '/moco-start/'  # of the keys
LOOPBACK = '127.0.0.1'
RENDEZVOUS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'rendezvous.py')


class Rank(NamedTuple):
    """One of a job's ranks, as its launcher describes it."""
    launcher: str
    variable: str  # that says which one this is
    rank: int
    size: int
    one_host: bool  # whether all are known to be on this host


def find_rank(env) -> Optional[Rank]:
    """This process's, or None if it is alone or horovodrun has started it."""
    if 'HOROVOD_RANK' in env or env.get('HOROVOD_CONTROLLER') == 'mpi':
        return None
    for launcher, *names in LAUNCHERS:
        rank_names, size_names, _ = names
        rank, size, local_size, hosts = (next((env[name] for name in some if name in env), None)
                                         for some in (*names, NUM_HOSTS))
        if rank is None:
            continue
        if size is None:
            raise UserError(f'{rank_names[0]} is set, but {size_names[0]} is not: how many ranks '
                            'are there? horovodrun starts them too')
        several = local_size != size if local_size else int(hosts or 1) > 1
        return (Rank(launcher, rank_names[0], int(rank), int(size), not several)
                if int(size) > 1 else None)
    for name in OTHERS:
        if name in env:
            raise UserError(f'{name} is set by a launcher that is not known here: start the ranks '
                            'with horovodrun, srun or mpirun')
    return None


def first_host(node_list: str) -> str:
    """Of a list as Slurm writes it: node[07-12,15],other -> node07."""
    prefix, number, suffix = re.match(r'([^,[]*)(?:\[(\w+)[^]]*\]([^,]*))?', node_list).groups('')
    return prefix + number + suffix


def find_address(env, me: Rank) -> str:
    """The IP address of rank 0's host."""
    nodes = [env[name] for name in NODES if name in env]
    host = env.get('MASTER_ADDR') or (
        LOOPBACK if me.one_host else first_host(nodes[0]) if nodes else None)
    if host is None:
        raise UserError(f'the ranks of {me.launcher} are on several hosts: set MASTER_ADDR to the '
                        'name of the one that has rank 0, or start them with horovodrun')
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"rank 0's host, {host}, has no address ({error}): set MASTER_ADDR")


def find_ports(env, token: str) -> List[int]:
    """Where the rendezvous server may listen: the first of these that is free; below those that
    systems give to outgoing connections."""
    if 'MASTER_PORT' in env:
        if not env['MASTER_PORT'].isdigit():
            raise UserError(f'MASTER_PORT is {env["MASTER_PORT"]}, which is no port')
        return [int(env['MASTER_PORT'])]
    first = int(hashlib.sha256(token.encode()).hexdigest(), 16)
    return [20000 + (first + 997 * i) % 12000 for i in range(8)]


class Store:
    """The key-value store of the rendezvous server."""

    def __init__(self, address, port):
        self.address, self.port = address, port

    def request(self, method, key, value=None):
        return request((self.address, self.port), method, SCOPE + key, value)


def start_server(token, ports) -> int:
    """Start the store, which ends when this process has, however; returns its port."""
    read, write = os.pipe()  # nothing is written; the kernel closes `write` with this process
    server = subprocess.Popen(
        [sys.executable, RENDEZVOUS, str(read), SCOPE, token, *map(str, ports)],
        pass_fds=[read], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, universal_newlines=True)
    os.close(read)
    line = server.stdout.readline().strip()
    server.stdout.close()
    if not line.isdigit():
        raise UserError(f'no rendezvous server: {line or "it ended as it started"}; set '
                        'MASTER_PORT to a port that is free on the host of rank 0')
    return int(line)


def find_store(me: Rank, address, ports, token, deadline) -> Store:
    """Wait for the store of this job."""
    while time.time() < deadline:
        for port in ports:
            try:
                if Store(address, port).request('GET', 'job') == token:
                    return Store(address, port)
            except (OSError, http.client.HTTPException, ValueError):
                pass  # not there yet, or somebody else's
        time.sleep(0.1)
    raise UserError(f'rank 0 of {me.launcher} was not found at {address}, port '
                    f'{" or ".join(map(str, ports))}: it has not started, or is on another host '
                    '(then set MASTER_ADDR)')


def meet(me: Rank, store: Store, deadline) -> List[dict]:
    """Tell all ranks of this one, and wait for what they tell."""
    with open('/proc/sys/kernel/random/boot_id') as f:
        host = [socket.gethostname(), f.read().strip()]
    if store.request('GET', str(me.rank)) is not None:
        raise UserError(f'there are two processes with the number {me.rank}: another job uses port '
                        f'{store.port} of {store.address}; set MASTER_PORT to another one')
    store.request('PUT', str(me.rank), {'host': host, 'address': store.address,
                                        'cores': sorted(cores.CORES)})
    if me.rank == 0:
        store.request('PUT', 'all', collect(me, store, deadline))
    while time.time() < deadline + 5:  # rank 0 is the one to say who is missing
        entries = store.request('GET', 'all')
        if entries is not None:
            return entries
        time.sleep(0.1)
    raise UserError('rank 0 waits for others')


def collect(me: Rank, store: Store, deadline) -> List[dict]:
    """Rank 0's part: what each rank has told."""
    notice = time.time() + 10
    while True:
        entries = [store.request('GET', str(rank)) for rank in range(me.size)]
        missing = [str(rank) for rank, entry in enumerate(entries) if entry is None]
        if not missing:
            return entries
        waits = (f'of the {me.size} ranks of {me.launcher}, {len(missing)} have not come (rank '
                 f'{missing[0]}, for one); if {me.launcher} has not started this process, unset '
                 f'{me.variable}')
        if time.time() > deadline:
            raise UserError(waits)
        if time.time() > notice:
            notice = float('inf')
            print(f'waiting: {waits}', file=sys.stderr)
        time.sleep(0.1)


def place(me: Rank, entries: List[dict]) -> dict:
    """Horovod's variables of a rank, from what all ranks have told."""
    hosts = {}  # host: its ranks
    for rank, entry in enumerate(entries):
        hosts.setdefault(tuple(entry['host']), []).append(rank)
    for (name, _), ranks in hosts.items():
        if ranks[-1] - ranks[0] >= len(ranks):
            raise UserError(f'ranks are not numbered host by host: {name} has {ranks}; start them '
                            'with srun --distribution=block, or mpirun --map-by slot')
    mine = hosts[tuple(entries[me.rank]['host'])]
    local_rank = me.rank - mine[0]
    peers = [ranks[local_rank] for ranks in hosts.values() if len(ranks) > local_rank]
    return {
        'RANK': me.rank, 'SIZE': me.size, 'LOCAL_RANK': local_rank, 'LOCAL_SIZE': len(mine),
        'CROSS_RANK': peers.index(me.rank), 'CROSS_SIZE': len(peers),
        'HOSTNAME': f'{entries[me.rank]["host"][0]}-{mine[0]}'}


def find_interface(address: str) -> str:
    """The network interface that leads to an address, or has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
    return next(name for name, addresses in psutil.net_if_addrs().items()
                if any(a.address == own for a in addresses))


def join(argv: List[str]) -> None:
    """To be called before anything else by a script that may have ranks. If a launcher other than
    horovodrun has started several, find the others and set Horovod's variables; an error of any
    kind ends this process with one line. No process then trains alone by accident."""
    try:
        me = None if {'-h', '--help'} & set(argv) else find_rank(os.environ)
        if me is not None:
            _join(me, os.environ)
    except UserError as error:
        sys.exit(f'{os.path.basename(sys.argv[0])}: error: {error}')


def _join(me, env):
    deadline = time.time() + float(env.get('HOROVOD_START_TIMEOUT', PATIENCE))
    token = '-'.join([str(os.getuid())] + [env[name] for name in JOB if name in env])
    address, ports = find_address(env, me), find_ports(env, token)
    if me.rank == 0:
        ports, address = [start_server(token, ports)], LOOPBACK
    store = find_store(me, address, ports, token, deadline)
    try:
        entries = meet(me, store, deadline)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"rank 0's rendezvous server at {address}:{store.port}: {error}")
    variables = place(me, entries)
    # as other hosts see it: this one may know itself as 127.0.1.1
    outside = [entry['address'] for entry in entries if entry['host'] != entries[0]['host']]
    address = outside[0] if outside else LOOPBACK
    interface = find_interface(address)
    variables.update({
        'CONTROLLER': 'gloo', 'CPU_OPERATIONS': 'gloo', 'GLOO_RENDEZVOUS_ADDR': address,
        'GLOO_RENDEZVOUS_PORT': store.port,
        'GLOO_IFACE': env.get('HOROVOD_GLOO_IFACE', interface)})
    env.update({f'HOROVOD_{name}': str(value) for name, value in variables.items()})
    env.setdefault('NCCL_SOCKET_IFNAME', interface)
    cores.add_ranks([set(entry['cores']) for entry in entries
                     if entry['host'] == entries[me.rank]['host']])
