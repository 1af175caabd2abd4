"""How a job starts and ends, on the trainers' side: threads, the data server of this host, signals.

The rule of the house: whoever starts a process ends it, and nobody waits for the dead.

    trainer (local rank 0) ── starts, holds its lifeline ──▶ serve-data.py ──▶ workers
    every local rank ◀── control socket: one line of facts, then silence;
                         end of file means that the server is gone
"""
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import environment
import zmq_ops

HERE = os.path.dirname(os.path.abspath(__file__))


def begin():
    """What every script does first: quiet libraries, Horovod, signals.

    Returns:
        (int, Ending, bool): threads for this rank, how it is ended, whether there is a GPU.
    """
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()  # does nothing to TensorFlow 1
    # when training fails, tensorpack logs a message with a wrong format, and logging would complain
    logging.raiseExceptions = False
    # asked for in a way that does not initialise it
    gpu = bool(tf.config.experimental.list_physical_devices('GPU'))
    if not gpu:
        # a CPU's steps are long, and Horovod takes a core's time whenever it looks for work (ms)
        os.environ.setdefault('HOROVOD_CYCLE_TIME', '5')
    hvd.init()
    if hvd.rank() != 0:
        logger.setLevel(logging.ERROR)  # all ranks would say the same
    ending = Ending()
    ending.watch_signals()
    return environment.num_threads(), ending, gpu


def add_arguments(group, compiled):
    """The flags of every script that say how it runs; `compiled` is what XLA compiles."""
    group.add_argument('--workers', type=int, metavar='N',
                       help='data processes on each host (default: one a core)')
    group.add_argument('--cpus', type=environment.parse_cpus, metavar='LIST',
                       help='cores of the data processes on each host, as in 0-3,8; the trainers '
                       'keep to the others (default: all share all)')
    group.add_argument('--xla', dest='xla', action='store_true', default=None,
                       help='compile the {} with XLA (default: on a GPU)'.format(compiled))
    group.add_argument('--no-xla', dest='xla', action='store_false', help='do not')


def mixed_precision_rewrite(gpu):
    """TensorFlow's name of the graph rewrite that computes in 16 bits here, or None.

    On a GPU it is float16; on a CPU bfloat16, if the CPU has that, and TensorFlow too (2.15).
    """
    with open('/proc/cpuinfo') as f:
        name = ('auto_mixed_precision' if gpu else
                'auto_mixed_precision_onednn_bfloat16' if 'avx512_bf16' in f.read() else None)
    known = tf.ConfigProto().graph_options.rewrite_options.DESCRIPTOR.fields_by_name
    return name if name in known else None


def session_config(threads, gpu=False, amp=False):
    """A session's configuration, the same for training and evaluation.

    Args:
        threads: what begin() returned.
        gpu: whether to use the GPU of this local rank.
        amp: whether convolutions, and what lies between them, are computed in 16 bits. Variables
            stay float32, and so do BN statistics, the head, logits and loss.
    """
    config = tf.ConfigProto(allow_soft_placement=True)
    if amp:
        rewrites = config.graph_options.rewrite_options
        setattr(rewrites, mixed_precision_rewrite(gpu), rewrites.ON)
        for word in ('ALLOWLIST', 'WHITELIST'):  # TensorFlow 2.15's and 1.15's
            os.environ['TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_{}_REMOVE'.format(word)] = (
                'MatMul,BatchMatMul,BatchMatMulV2,Einsum')
    config.intra_op_parallelism_threads = threads
    # on a CPU one op at a time has all threads;
    # the ops that wait (data, collectives) are asynchronous
    config.inter_op_parallelism_threads = threads if gpu else 1
    if gpu:
        config.gpu_options.allow_growth = True
        config.gpu_options.visible_device_list = str(hvd.local_rank())
    else:
        config.device_count['GPU'] = 0
    return config


def fail(message=None):
    """End this rank with one line on standard error (None: it has been said); other ranks,
    which fail alike, are silent."""
    if hvd.is_initialized() and hvd.rank() != 0:
        # horovodrun ends everyone when the first one goes: let it be rank 0, which explains
        time.sleep(3)
        os._exit(1)
    if message is not None:
        print('{}: error: {}'.format(os.path.basename(sys.argv[0]), message),
              file=sys.stderr, flush=True)
    sys.exit(1)


class Ending:
    """Ends this process from any thread, even while its main thread is inside session.run.

    Python sees a signal only after session.run has returned, so a thread reads the wake-up pipe
    that the C-level handler writes to, and closes the session, which ends a blocked pull. A main
    thread that is stuck elsewhere (in a collective whose peers are gone, say) is given GRACE
    seconds.
    """
    GRACE = 5

    def __init__(self):
        self.reason = None
        self.code = 1
        self.session = None
        self._lock = threading.Lock()

    def watch_signals(self):
        """Turn SIGTERM and SIGINT into end(); call it in the main thread."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._raise)

        def wait():
            number = os.read(read, 1)[0]
            self.end('stopped by {}'.format(signal.Signals(number).name), 128 + number)
        threading.Thread(target=wait, daemon=True).start()

    def _raise(self, number, frame):
        raise SystemExit(128 + number)

    def end(self, reason, code=1, said=False):
        """Say why, unless it has been said, close the session, and let the main thread go;
        the first call wins."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason, self.code = reason, code
        if not said:
            print('rank {}: {}'.format(hvd.rank(), reason), file=sys.stderr, flush=True)
        timer = threading.Timer(self.GRACE, os._exit, [code])
        timer.daemon = True
        timer.start()
        if self.session is not None:
            self.session.close()

    def exit_if_ended(self):
        if self.reason is not None:
            sys.exit(self.code)

    @contextlib.contextmanager
    def explain(self, what):
        """Around what runs a session: a TensorFlow error ends this process with one line; any
        error, silently, once its end has been explained, for then the session is closed."""
        try:
            yield
        except Exception as error:
            self.exit_if_ended()
            if not isinstance(error, tf.errors.OpError):
                raise
            self.end('{}: {}'.format(what, error.message.split('\n')[0]))
            sys.exit(self.code)


def broadcast(integers):
    """Give every rank rank 0's list of integers, before there is a session to train in."""
    if hvd.size() == 1:
        return integers
    with tf.Graph().as_default(), tf.Session(config=session_config(1)) as sess:
        try:
            return sess.run(hvd.broadcast(tf.constant(integers, tf.int64), root_rank=0)).tolist()
        except tf.errors.OpError as error:  # another rank has failed
            fail(error.message.split('\n')[0])


def private_folder():
    """Agree on a folder name that no other job has; every host has its own folder of that name."""
    token = bytes(broadcast(list(os.urandom(8))))
    return os.path.join(tempfile.gettempdir(), 'moco-' + token.hex())


class DataServer:
    """The data server of this host, as one of its ranks sees it. What is wrong with the data, it
    says itself.

    Args:
        folder: a path from private_folder(), with a suffix of its own for each server of a job.
        options: dict of serve-data.py's flags, without dashes; None and False values are left out.
        ending: what to call when the server dies.
        num_workers: data processes on this host; None means one for each of their cores.
    """
    TIMEOUT = 60  # seconds for a server to list its files and come up

    def __init__(self, folder, options, ending, num_workers=None):
        try:
            zmq_ops.pull.load_ops(zmq_ops.pull.BUILD_DIR)  # before there is a server to pull from
        except ImportError as error:
            fail(error)
        self.folder, self.ending = folder, ending
        local_size = hvd.local_size()
        # horovod numbers the ranks host by host
        first = hvd.rank() - hvd.local_rank()
        num_workers = num_workers or environment.num_cores(environment.CPUS)
        self.workers_per_rank = -(-num_workers // local_size)
        options = dict(options, address=folder, workers=self.workers_per_rank * local_size,
                       size=hvd.size(), ranks=','.join(str(first + i) for i in range(local_size)))
        self._command = [sys.executable, os.path.join(HERE, 'serve-data.py')]
        if environment.CPUS:
            # setting the affinity here around the fork does not do: Intel's OpenMP resets it
            self._command[:0] = ['taskset', '-c', ','.join(map(str, sorted(environment.CPUS)))]
        for flag, value in sorted(options.items()):
            if value is None or value is False:
                continue
            self._command.append('--' + flag)
            if value is not True:
                self._command += ([str(v) for v in value] if isinstance(value, (list, tuple))
                                  else [str(value)])
        self._process = self._lifeline = self._control = None

    @property
    def end_points(self):
        """Where this rank pulls from, in turns."""
        return ['ipc://{}/rank{}-worker{}'.format(self.folder, hvd.rank(), i)
                for i in range(self.workers_per_rank)]

    def start(self, start_batch=0):
        """Start the server (local rank 0) and connect to it (everyone).

        Returns:
            dict: the server's facts: images, classes, digest.
        """
        if hvd.local_rank() == 0:
            read, self._lifeline = os.pipe()
            self._process = subprocess.Popen(
                self._command + ['--start-batch', str(start_batch), '--lifeline', str(read)],
                pass_fds=[read], stdin=subprocess.DEVNULL)
            os.close(read)
        self._control = self._connect()
        lines = self._control.makefile('r')
        facts = json.loads(lines.readline() or '{}')
        if 'images' not in facts:
            fail(None if 'error' in facts else 'the data server ended as it started')
        threading.Thread(target=self._watch, args=[self._control, lines], daemon=True).start()
        return facts

    def _connect(self):
        deadline = time.time() + self.TIMEOUT
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(os.path.join(self.folder, 'control'))
                return connection
            except OSError as error:
                connection.close()
                if self._process is not None and self._process.poll() is not None:
                    fail(None if self._process.returncode > 0 else
                         'the data server ended with exit code {} as it started: {}'.format(
                             self._process.returncode, ' '.join(self._command)))
                if time.time() > deadline:
                    fail('no data server at {} after {} s: {}'.format(
                        self.folder, self.TIMEOUT, error))
                self.ending.exit_if_ended()
                time.sleep(0.05)

    def _watch(self, connection, lines):
        """A thread: wait for the last line, if any, and the end of the connection."""
        try:
            last = json.loads(lines.readline() or '{}')
        except (OSError, ValueError):
            last = {}
        if self._control is not connection:
            return  # stop() was first
        self._remove_folder()
        self.ending.end(last.get('error', 'the data server of this host is gone'),
                        said='error' in last)

    def stop(self):
        """Leave the server, which ends when every rank of this host has;
        local rank 0 waits for that."""
        connection, self._control = self._control, None
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone would not
            connection.close()
        if self._process is not None:
            # the lifeline is held meanwhile: other ranks may still be pulling
            while self._process.poll() is None:
                self.ending.exit_if_ended()
                time.sleep(0.02)
            os.close(self._lifeline)
            self._process = None

    def _remove_folder(self):
        if hvd.local_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


class BoundedPass:
    """A pass over labelled images, each exactly once, divided between all ranks: validation,
    or the bank of kNN.

    It builds the pulling part of the graph and may be run again and again;
    each run has a server of its own.

    Args:
        folder: for DataServer.
        data: folder of images.
        split: 'train' or 'val'.
        image_size: S.
        batch: images of a rank in a step; the last step has fewer.
        ending, num_workers: for DataServer.

    Attributes:
        images: uint8 tensor [n, S, S, 3].
        labels: int32 tensor [n].
    """
    TIMEOUT = 300  # seconds without a batch from a server that is alive

    def __init__(self, folder, data, split, image_size, batch, ending, num_workers=None):
        self._batch = batch
        self._server = DataServer(folder, {
            'task': 'eval', 'data': data, 'split': split, 'image-size': image_size, 'batch': batch,
        }, ending, num_workers)
        pull = zmq_ops.ZMQPullSocket(
            self._server.end_points, [tf.uint8, tf.int32], hwm=1, bind=False,
            shapes=[[None, image_size, image_size, 3], [None]], timeout=self.TIMEOUT)
        self.images, self.labels = pull.pull()

    def run(self, sess, fetches):
        """Start the server and yield the value of `fetches` for every batch of this rank."""
        facts = self._server.start()
        if facts['images'] < hvd.size():
            fail('{} images for {} ranks'.format(facts['images'], hvd.size()))
        share = len(range(hvd.rank(), facts['images'], hvd.size()))
        batches = -(-share // self._batch)
        for i in range(batches + -batches % self._server.workers_per_rank):
            # empty batches complete the last round of turns,
            # so that the next run begins with worker 0 again
            with self._server.ending.explain('evaluation'):
                result = sess.run(fetches if i < batches else self.labels)
            if i < batches:
                yield result
        self._server.stop()
