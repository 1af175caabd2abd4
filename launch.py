"""How a job starts and ends, on the trainers' side: threads, the data server of this host, signals.

The rule of the house: whoever starts a process ends it, and nobody waits for the dead.

    trainer (local rank 0) ── starts, holds its lifeline ──▶ serve-data.py ──▶ workers
    every local rank ◀── control socket: one line of facts, then silence;
                         end of file means that the server is gone
    every rank ◀── heartbeat.py: the ranks that a collective waits for

A job that is asked to end (SIGTERM, Ctrl-C) finishes the step, on which all ranks agree, writes a
checkpoint and a file named resume-me, and exits with code 75: the same command goes on from there.
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

import checkpoints
import environment
import heartbeat
import zmq_ops

HERE = os.path.dirname(os.path.abspath(__file__))
STALL_LIMIT = 300  # seconds
SERVER_PATIENCE = 5  # seconds for a data server to say why a batch is lost
# Of a rank that does not end, horovodrun kills all descendants at once. So this, whose parent is
# init, waits for the end of the lifeline too, and removes what no server is left to remove.
CLEAN_UP = 'trap "" TERM INT HUP; read line; rm -rf -- "$0"'


def begin(stall_limit=STALL_LIMIT):
    """What every script does first: quiet libraries, Horovod, signals, heartbeat.

    Args:
        stall_limit: seconds to wait for a rank, or a batch, that does not come.

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
    # Gloo gives up after 30 s, and names nobody: the heartbeat is to come first
    os.environ.setdefault('HOROVOD_GLOO_TIMEOUT_SECONDS', str(int(2 * stall_limit) + 60))
    ending = Ending(stall_limit)
    ending.watch_signals()
    watched = watch_ranks(ending)
    heartbeat.meet()
    hvd.init()
    if hvd.rank() != 0:
        logger.setLevel(logging.ERROR)  # all ranks would say the same
    elif hvd.size() > 1 and not watched:
        logger.warn('not started by horovodrun with Gloo: a rank that stops will not be named')
    return environment.num_threads(), ending, gpu


def watch_ranks(ending):
    """Begin to watch the other ranks, which may never come to hvd.init(), if horovodrun has left
    its key-value store's address; returns whether it has."""
    names = ['RANK', 'SIZE', 'GLOO_RENDEZVOUS_PORT', 'GLOO_RENDEZVOUS_ADDR']
    rank, size, port, address = (os.environ.get('HOROVOD_' + name) for name in names)
    if address is None:
        return False
    heartbeat.Heartbeat(int(rank), int(size), (address, int(port)), ending.stall_limit,
                        heartbeat.progress, ending.end).start()
    return True


def add_arguments(group, compiled):
    """The flags of every script that say how it runs; `compiled` is what XLA compiles."""
    group.add_argument('--workers', type=int, metavar='N',
                       help='data processes on each host (default: one a core)')
    group.add_argument('--cpus', type=environment.parse_cpus, metavar='LIST',
                       help='cores of the data processes on each host, as in 0-3,8; the trainers '
                       'keep to the others (default: all share all)')
    group.add_argument('--stall-limit', type=float, default=STALL_LIMIT, metavar='SECONDS',
                       help='end if a rank, or a batch, lets the others wait for longer '
                       '(default: {})'.format(STALL_LIMIT))
    group.add_argument('--xla', dest='xla', action='store_true', default=None,
                       help='compile the {} with XLA (default: on a GPU)'.format(compiled))
    group.add_argument('--no-xla', dest='xla', action='store_false', help='do not')


def check_positive(parser, args, *names):
    """End with an error unless each of these flags, if it is given, is positive."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error('--{} must be positive, not {}'.format(name.replace('_', '-'), value))


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
    """End this rank with one line on standard error (None: it has been said)."""
    rank = this_rank()
    if rank != 0:
        # If all fail alike, rank 0 says why: horovodrun ends everyone when the first one goes. Who
        # is still here has a reason of its own.
        time.sleep(5)
    if message is not None:
        print('{}: error: {}{}'.format(os.path.basename(sys.argv[0]), message,
                                       ' (rank {})'.format(rank) if rank else ''),
              file=sys.stderr, flush=True)
    if rank != 0:
        os._exit(1)
    sys.exit(1)


def this_rank():
    """The rank, also where Horovod does not tell: before it starts and after it has ended."""
    return int(os.environ.get('HOROVOD_RANK', 0))


class Ending:
    """Ends this process from any thread, even while its main thread is inside session.run.

    Python sees a signal only after session.run has returned, so a thread reads the wake-up pipe
    that the C-level handler writes to. What must end closes the session, which ends a blocked pull.
    A main thread that is stuck elsewhere (in a collective whose peers are gone, say) is given GRACE
    seconds, and so is the step that is to be the last one: horovodrun kills 5 s after SIGTERM.

    Attributes:
        stall_limit: seconds, for whoever waits.
        steps_begun: the training step that is under way, or was the last one.
        resumable: where training is: in a 'step', 'writing' a checkpoint, or behind it, so that a
            'checkpoint' of the last step is there (while it evaluates, say); None outside training.
        marker: where rank 0 says that the run is to be continued, or None.
    """
    GRACE = 4
    RESUME = 75  # exit code; EX_TEMPFAIL of sysexits.h

    def __init__(self, stall_limit=STALL_LIMIT):
        self.stall_limit = stall_limit
        self.reason = self.asked = self.session = self.resumable = self.marker = None
        self.code, self.steps_begun = 1, 0
        self._overdue = self._unmarked = False
        self._lock, self._closed = threading.Lock(), threading.Event()

    def watch_signals(self):
        """Watch for SIGTERM and SIGINT; call it in the main thread."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._leave)

        def wait():
            while True:
                self._obey(os.read(read, 1)[0])
        threading.Thread(target=wait, daemon=True).start()

    def _leave(self, number, frame):
        """In the main thread."""
        if self.resumable is None:
            raise SystemExit(128 + number)

    def _obey(self, number):
        """In the thread that watches."""
        name, again, self.asked = signal.Signals(number).name, self.asked, number
        if again and number != signal.SIGINT:
            return  # a cluster's manager and horovodrun may both send it
        if self.resumable is None or again:
            self.end('stopped by {}'.format(name), 128 + number)
            return

        def give_up():
            self._overdue = True
            if self.resumable == 'checkpoint':
                self.end_to_resume()
            elif self.resumable == 'step':
                self.end_to_resume('stopped by {}, with no time for a checkpoint: the same command '
                                   'continues from the last one'.format(name))
        timer = threading.Timer(self.GRACE, give_up)
        timer.daemon = True
        timer.start()

    def has_written(self):
        """A checkpoint of the last step is there."""
        self.resumable = 'checkpoint'
        if self._overdue:
            self.end_to_resume()
            raise SystemExit(self.code)

    def end_to_resume(self, reason=None):
        """End, saying that the run is to be continued; without a reason, from this step on."""
        if reason is None:
            reason = 'stopped by {} after step {}: the same command continues'.format(
                signal.Signals(self.asked).name if self.asked else 'a signal to another rank',
                self.steps_begun)
        if self.marker and self.reason is None:
            with contextlib.suppress(OSError):  # a full disk
                with open(self.marker, 'w') as f:
                    f.write(reason + '\n')
        self.end(reason, self.RESUME, grace=1)  # all has been written

    def unmark(self):
        """This run has got further than the one that was asked to end."""
        if self.marker and self.asked is None and not self._unmarked:
            self._unmarked = True
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.marker)

    def end(self, reason, code=1, said=False, grace=GRACE):
        """Say why, unless it has been said, close the session, and let the main thread go within
        `grace` seconds; the first call wins."""
        with self._lock:
            is_first = self.reason is None
            if is_first:
                self.reason, self.code = reason, code
        if not is_first:
            self._closed.wait()
            return
        timer = threading.Timer(grace, os._exit, [code])
        timer.daemon = True
        timer.start()  # first: whoever reads standard error may have stopped
        if not said:
            with contextlib.suppress(OSError):  # horovodrun, who reads it, may be gone
                print('rank {}: {}'.format(this_rank(), reason), file=sys.stderr, flush=True)
        try:
            if self.session is not None:
                self.session.close()
        finally:
            self._closed.set()

    def exit_if_ended(self):
        if self.reason is not None:
            # Python, when it exits, aborts if another thread is in TensorFlow
            self._closed.wait()
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
            if isinstance(error, tf.errors.DataLossError):
                # a batch went with the worker that made it: the server is about to say why
                self._closed.wait(SERVER_PATIENCE)
                self.exit_if_ended()
            self.end('{}: {}'.format(what, checkpoints.tell_error(error)))
            sys.exit(self.code)


def broadcast(integers):
    """Give every rank rank 0's list of integers, before there is a session to train in."""
    if hvd.size() == 1:
        return integers
    heartbeat.meet()
    with tf.Graph().as_default(), tf.Session(config=session_config(1)) as sess:
        try:
            return sess.run(hvd.broadcast(tf.constant(integers, tf.int64), root_rank=0)).tolist()
        except tf.errors.OpError as error:  # another rank has failed
            fail(checkpoints.tell_error(error))


def gather(integers):
    """Give every rank the lists of all: [ranks, length], before there is a session to train in."""
    heartbeat.meet()
    with tf.Graph().as_default(), tf.Session(config=session_config(1)) as sess:
        try:
            return sess.run(hvd.allgather(tf.constant([integers], tf.int64))).tolist()
        except tf.errors.OpError as error:  # another rank has failed
            fail(checkpoints.tell_error(error))


def private_folder():
    """Agree on a folder name that no other job has; every host has its own folder of that name."""
    token = bytes(broadcast(list(os.urandom(8))))
    return os.path.join(tempfile.gettempdir(), 'moco-' + token.hex())


def compare_digests(digest):
    """End if the hosts have different images: each rank would take its part of another list."""
    digests = gather([int(digest[:15], 16)])
    different = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        fail('--data holds other images on the hosts of the ranks {} than on that of rank 0'.format(
            ', '.join(different)))


class DataServer:
    """The data server of this host, as one of its ranks sees it. What is wrong with the data, it
    says itself.

    Args:
        folder: a path from private_folder(), with a suffix of its own for each server of a job.
        options: dict of serve-data.py's flags, without dashes; None and False values are left out.
        ending: what to call when the server dies.
        num_workers: data processes on this host; None means one for each of their cores.
    """
    def __init__(self, folder, options, ending, num_workers=None):
        try:
            zmq_ops.pull.load_ops(zmq_ops.pull.BUILD_DIR)  # before there is a server to pull from
        except ImportError as error:
            fail(error)
        local_size = hvd.local_size()
        # horovod numbers the ranks host by host
        first = hvd.rank() - hvd.local_rank()
        # hosts may share the folder for temporary files
        self.folder, self.ending = '{}-{}'.format(folder, first), ending
        num_workers = num_workers or environment.num_cores(environment.CPUS)
        self.workers_per_rank = -(-num_workers // local_size)
        try:  # what libraries and three servers (of online kNN, too) need
            environment.allow_open_files(256 + 3 * 2 * self.workers_per_rank)
        except ValueError as error:
            fail(error)
        options = dict(options, address=self.folder, workers=self.workers_per_rank * local_size,
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
            if '--quiet' not in self._command:
                self._command.append('--quiet')  # should it start again, for another pass
            subprocess.check_call(['setsid', '--fork', 'sh', '-c', CLEAN_UP, self.folder],
                                  stdin=read)
            os.close(read)
        self._control = self._connect()
        lines = self._control.makefile('r')
        facts = json.loads(lines.readline() or '{}')
        if 'images' not in facts:
            fail(None if 'error' in facts else 'the data server ended as it started')
        threading.Thread(target=self._watch, args=[self._control, lines], daemon=True).start()
        if hvd.size() > hvd.local_size():
            compare_digests(facts['digest'])
        return facts

    def _connect(self):
        deadline = time.time() + self.ending.stall_limit
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
                    fail('no data server at {} after {:g} s: {}'.format(
                        self.folder, self.ending.stall_limit, error))
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

    def __init__(self, folder, data, split, image_size, batch, ending, num_workers=None):
        self._batch = batch
        self._server = DataServer(folder, {
            'task': 'eval', 'data': data, 'split': split, 'image-size': image_size, 'batch': batch,
        }, ending, num_workers)
        pull = zmq_ops.ZMQPullSocket(
            self._server.end_points, [tf.uint8, tf.int32], bind=False,
            shapes=[[None, image_size, image_size, 3], [None]], timeout=ending.stall_limit)
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
            heartbeat.work()
            if i < batches:
                yield result
        self._server.stop()
