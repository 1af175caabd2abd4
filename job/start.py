"""How a script starts: errors in a line, Horovod, signals, heartbeat, and a session's settings."""
import contextlib
import logging
import os
import sys
import time
from typing import Optional, Tuple

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

from errors import UserError
from job import cores, heartbeat
from job.shutdown import GRACE, STALL_LIMIT, shutdown, this_rank


@contextlib.contextmanager
def user_errors():
    """Around a script's main: a UserError ends it with one line instead of a traceback."""
    try:
        yield
    except UserError as error:
        rank, message = this_rank(), str(error)
        if rank != 0:
            # An error of all ranks is rank 0's to show: horovodrun ends all when the first one has
            # gone. A rank that is still here has an error of its own.
            time.sleep(5)
        if message:
            script, suffix = os.path.basename(sys.argv[0]), f' (rank {rank})' if rank else ''
            print(f'{script}: error: {message}{suffix}', file=sys.stderr, flush=True)
        if rank != 0:
            os._exit(1)
        sys.exit(1)


def begin(stall_limit: float = STALL_LIMIT, grace: float = GRACE) -> Tuple[int, int]:
    """What every script does first; returns (threads for this rank, number of GPUs it can see)."""
    tf.logging.set_verbosity(tf.logging.ERROR)
    tf.disable_v2_behavior()  # does nothing to TensorFlow 1
    # when training fails, tensorpack logs a message with a wrong format, and logging would complain
    logging.raiseExceptions = False
    # asked for in a way that does not initialise it
    gpus = len(tf.config.experimental.list_physical_devices('GPU'))
    if not gpus:
        # a CPU's steps are long, and Horovod takes a core's time whenever it looks for work (ms)
        os.environ.setdefault('HOROVOD_CYCLE_TIME', '5')
    # Gloo gives up after 30 s, and names no rank: the heartbeat is to come first
    os.environ.setdefault('HOROVOD_GLOO_TIMEOUT_SECONDS', str(int(2 * stall_limit) + 60))
    shutdown.stall_limit, shutdown.grace = stall_limit, grace
    shutdown.watch_signals()
    # before hvd.init(), to which a rank may never come
    rank, size, port, address = (os.environ.get('HOROVOD_' + name) for name in (
        'RANK', 'SIZE', 'GLOO_RENDEZVOUS_PORT', 'GLOO_RENDEZVOUS_ADDR'))
    if address is not None:
        heartbeat.Heartbeat(int(rank), int(size), (address, int(port)), stall_limit,
                            heartbeat.progress, shutdown.end).start()
    heartbeat.reach_barrier()
    hvd.init()
    if hvd.rank() != 0:
        logger.setLevel(logging.ERROR)  # all ranks would log the same
    elif hvd.size() > 1 and address is None:
        logger.warn('started with MPI instead of Gloo: a rank that stops will not be named')
    return cores.num_threads(), gpus


def use_xla(wanted: Optional[bool], gpus: int) -> bool:
    """Whether to compile: as --xla or --no-xla say, or else on a GPU."""
    return gpus > 0 if wanted is None else wanted


def mixed_precision_rewrite(gpu: bool):
    """TensorFlow's name of the graph rewrite that computes in 16 bits here, or None: float16 on a
    GPU, bfloat16 on a CPU if both the CPU and TensorFlow (2.21) have it."""
    with open('/proc/cpuinfo') as f:
        name = ('auto_mixed_precision' if gpu else
                'auto_mixed_precision_onednn_bfloat16' if 'avx512_bf16' in f.read() else None)
    known = tf.ConfigProto().graph_options.rewrite_options.DESCRIPTOR.fields_by_name
    return name if name in known else None


def session_config(threads: int, gpus: int = 0, amp: bool = False):
    """The tf.ConfigProto of training and evaluation, from what begin() returned. With amp,
    convolutions and what lies between them are computed in 16 bits; variables, BN statistics, the
    head, logits and loss stay float32."""
    config = tf.ConfigProto(allow_soft_placement=True)
    if amp:
        rewrites, name = config.graph_options.rewrite_options, mixed_precision_rewrite(gpus > 0)
        if name is None:
            raise UserError(f'--amp: TensorFlow {tf.__version__} computes in 16 bits on ' + (
                'a GPU only' if tf.__version__ < '2' else
                'a GPU, or a CPU with bfloat16 (avx512_bf16)'))
        setattr(rewrites, name, rewrites.ON)
        for word in ('ALLOWLIST', 'WHITELIST'):  # TensorFlow 2.21's and 1.15's
            os.environ[f'TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_{word}_REMOVE'] = (
                'MatMul,BatchMatMul,BatchMatMulV2,Einsum')
    config.intra_op_parallelism_threads = threads
    # on a CPU one op at a time has all threads; ops that wait (data, collectives) are asynchronous,
    # but for staging, which a GPU needs
    config.inter_op_parallelism_threads = max(2, threads) if gpus else 1
    config.use_per_session_threads = True  # else those of the process's first session
    if gpus:
        config.gpu_options.allow_growth = True
        # a scheduler may show each rank its own GPU only, or let ranks share one
        config.gpu_options.visible_device_list = str(hvd.local_rank() % gpus)
    else:
        config.device_count['GPU'] = 0
    return config
