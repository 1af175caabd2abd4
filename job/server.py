"""The data server of this host, as one of its ranks sees it.

    trainer (local rank 0) ── starts, holds its lifeline ──▶ serve-data.py ──▶ workers
    every local rank ◀── control socket: one line of facts, then silence;
                         end of file means that the server is gone
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import List, Optional

import horovod.tensorflow as hvd

import data
import zmq_ops
from errors import UserError
from job import cores, ranks, signals
from job.shutdown import shutdown

SERVER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'serve-data.py')
# The last clean-up: horovodrun kills all descendants of a rank that does not end. This process,
# whose parent is init, waits for the end of the lifeline and removes the server's folder, $0.
CLEAN_UP = f'trap "" {signals.NAMES}; read line; rm -rf -- "$0"'
ORPHAN = 'exec 3<&0; setsid sh -c "$0" "$1" <&3 3<&- &'  # (old versions of setsid know no --fork)


class DataServer:
    """Starts the server, connects to it, and ends this process when the server is gone.

    Args:
        folder: from ranks.private_folder(), with a suffix of its own for each server of a job.
        options: serve-data.py's flags, without dashes, and their values.
        num_workers, cpus: number and cores of the data processes (default: one a core, on all).
    """

    def __init__(self, folder: str, options: dict, num_workers: Optional[int] = None, cpus=None):
        try:
            zmq_ops.pull.load_ops(zmq_ops.pull.BUILD_DIR)  # before there is a server to pull from
        except ImportError as error:
            raise UserError(error)
        local_size = hvd.local_size()
        first = hvd.rank() - hvd.local_rank()  # horovod numbers the ranks host by host
        self.folder = f'{folder}-{first}'  # hosts may share the folder for temporary files
        cpus = cpus or cores.CORES  # also of ranks that are bound to cores of their own
        num_workers = num_workers or cores.num_cores(cpus)
        self.workers_per_rank = data.workers_per_rank(num_workers, local_size)
        # what libraries and three servers (of online kNN, too) need
        cores.allow_open_files(256 + 3 * 2 * self.workers_per_rank)
        # setting the affinity here around the fork does not do: Intel's OpenMP resets it
        self._command = (['taskset', '-c', cores.format_cpus(cpus)]
                         if cpus != os.sched_getaffinity(0) else [])
        self._command += [sys.executable, SERVER]
        options = dict(options, address=self.folder, workers=num_workers, size=hvd.size(),
                       ranks=','.join(str(first + i) for i in range(local_size)))
        for flag, value in sorted(options.items()):
            values = value if isinstance(value, (list, tuple)) else [value]
            self._command += [f'--{flag}', *map(str, values)]
        self._process = self._lifeline = self._clean_up = self._control = None

    @property
    def end_points(self) -> List[str]:
        """Where this rank pulls from, in turns."""
        return [f'ipc://{self.folder}/rank{hvd.rank()}-worker{i}'
                for i in range(self.workers_per_rank)]

    def start(self, start_batch: int = 0) -> dict:
        """Start the server (local rank 0), and connect to it (every rank): its first line."""
        if hvd.local_rank() == 0:
            read, self._lifeline = os.pipe()
            self._process = subprocess.Popen(
                self._command + ['--start-batch', str(start_batch), '--lifeline', str(read)],
                pass_fds=[read], stdin=subprocess.DEVNULL)
            if '--quiet' not in self._command:
                self._command.append('--quiet')  # should it start again, for another pass
            shell = subprocess.Popen(['sh', '-c', ORPHAN, CLEAN_UP, self.folder], stdin=read,
                                     stdout=subprocess.PIPE)
            shell.wait()
            self._clean_up = shell.stdout  # open until the clean-up, which it leaves behind, ends
            os.close(read)
        self._control = self._connect()
        lines = self._control.makefile('r')
        facts = self._read(lines)
        if 'images' not in facts:
            raise UserError('' if 'error' in facts else 'the data server ended as it started')
        threading.Thread(target=self._watch, args=[self._control, lines], daemon=True).start()
        if facts['images'] < hvd.size():
            raise UserError(f'--data: {facts["images"]} images for {hvd.size()} ranks')
        if hvd.size() > hvd.local_size():
            ranks.compare_digests(facts['digest'])
        return facts

    def _connect(self):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.time() + shutdown.stall_limit
        while True:
            try:
                connection.connect(os.path.join(self.folder, 'control'))
                return connection
            except OSError as error:
                code = self._process and self._process.poll()
                if code is not None:
                    words = ' '.join(self._command)
                    raise UserError('' if code > 0 else  # it has said why
                                    f'the data server ended with exit code {code}: {words}')
                if time.time() > deadline:
                    raise UserError(f'no data server at {self.folder} after '
                                    f'{shutdown.stall_limit:g} s: {error}')
                shutdown.exit_if_ended()
                time.sleep(0.05)

    @staticmethod
    def _read(lines):
        """A line of the server; {} if it is gone."""
        try:
            return json.loads(lines.readline() or '{}')
        except (OSError, ValueError):
            return {}

    def _watch(self, connection, lines):
        """A thread: wait for the last line, if any, and the end of the connection."""
        last = self._read(lines)
        if self._control is not connection:
            return  # stop() was first
        if hvd.local_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        shutdown.end(last.get('error', 'the data server of this host is gone'),
                     said='error' in last)

    def stop(self) -> None:
        """Leave the server, which ends when every rank of this host has; local rank 0 waits."""
        connection, self._control = self._control, None
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() would not
            connection.close()
        if self._process is not None:
            # the lifeline is held meanwhile: other ranks may still be pulling
            while self._process.poll() is None:
                shutdown.exit_if_ended()
                time.sleep(0.02)
            os.close(self._lifeline)
            self._clean_up.read()  # the next server has the same folder
            self._clean_up.close()
            self._process = None
