"""The receiving side: tensors from ZMQ PULL sockets."""
import functools
import os
import re
import struct
import uuid

from .serialize import DTYPE_NUMBERS

BUILD_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'build')


class ZMQPullSocket:
    """One or more ZMQ PULL sockets as a source of tensors.

    The sockets belong to the TensorFlow session: they are opened by its first pull, shared by all
    pulls of this object, and closed with the session.

    Messages may be in their frames, or, from the files of ipc end points, in memory that the sender
    shares (shared.py); keep such files in a folder that only you can enter.

    Args:
        end_point: a ZMQ end point such as 'ipc:///tmp/data', or a list of them. From a list of n,
            message number i is read from end point i % n, in strict turns, whichever has one first.
        types: a list of the types of a message's tensors.
        hwm (int): messages that may wait in each socket; 0 for no limit, None for libzmq's 1000.
        bind (bool): bind the end points, or else connect to them.
        name (str): prefix of the ops' names.
        shapes: a list of the tensors' shapes, None for what is unknown; a message of other shapes
            is an error. None for any shapes.
        timeout (float): seconds that a pull waits for its message, None for no limit.

    Raises:
        ImportError: the op is missing, broken, or built for another TensorFlow.
        TypeError: a type that cannot be received.
    """

    def __init__(self, end_point, types, hwm=None, bind=True, name=None, shapes=None,
                 timeout=None):
        import tensorflow as tf

        self._tf = tf
        self._ops = load_ops(BUILD_DIR)

        # check what the op itself would refuse less clearly
        end_points = [end_point] if isinstance(end_point, str) else list(end_point)
        types = [tf.as_dtype(dtype).base_dtype for dtype in types]
        for index, dtype in enumerate(types):
            if dtype.name not in DTYPE_NUMBERS:
                raise TypeError(
                    'tensor {} is of type {}, which zmq_ops cannot receive; it receives {}'.format(
                        index, dtype.name, ', '.join(sorted(DTYPE_NUMBERS))))
        shapes = [None] * len(types) if shapes is None else list(shapes)
        if not end_points or not types or len(shapes) != len(types):
            raise ValueError('ZMQPullSocket needs at least one end point and one type, and as many '
                             'shapes as types: got {} end points, {} types, {} shapes'.format(
                                 len(end_points), len(types), len(shapes)))
        if hwm is not None and hwm < 0:
            raise ValueError(f'hwm must not be negative: {hwm}')

        self._name = name or 'zmq_pull_socket'
        # of its own, since graphs, and in a cluster clients, may share a resource manager
        self._shared_name = f'{self._name}-{uuid.uuid4().hex}'
        self._pull_args = dict(
            types=types, shapes=[tf.TensorShape(shape) for shape in shapes], end_points=end_points,
            hwm=-1 if hwm is None else int(hwm), bind=bool(bind), timeout=float(timeout or 0))

    def pull(self):
        """Add an op that receives one message.

        Errors when it runs, all naming the end point; after any of them the next pull works:
        InvalidArgumentError for a malformed message or one of another number, type or shape of
        tensors (the message is used up), DeadlineExceededError after `timeout` and CancelledError
        when the session is closed (neither takes a message away), DataLossError when a message in
        shared memory cannot be opened (it is used up; a sender that lives has one message less from
        then on), FailedPreconditionError when an end point cannot be opened.

        Returns:
            list of tensors, on the CPU.
        """
        with self._tf.device('/cpu:0'):
            return list(self._ops.zmq_pull(
                shared_name=self._shared_name, name=self._name + '_pull', **self._pull_args))

    def waited(self):
        """Add an op that tells how many seconds pulls have waited with no message there, in all.

        Returns:
            float64 tensor, 0-d.
        """
        with self._tf.device('/cpu:0'):
            return self._ops.zmq_waited(
                shared_name=self._shared_name, name=self._name + '_waited')


@functools.lru_cache()
def load_ops(build_dir):
    """Load the compiled ops.

    Args:
        build_dir (str): the folder with pull_op-tf<version>.so, of several TensorFlows perhaps.

    Returns:
        the module of op functions that TensorFlow makes of the library.

    Raises:
        ImportError: the library is missing, broken, or built for another TensorFlow.
    """
    import tensorflow as tf

    running = tf.__version__
    path = os.path.join(build_dir, f'pull_op-tf{running}.so')
    try:
        with open(path, 'rb') as f:
            content = f.read()
    except FileNotFoundError:
        others = sorted(re.findall(r'pull_op-tf(\S+)\.so$', '\n'.join(list_dir(build_dir)), re.M))
        raise _import_error('is not built for TensorFlow {}, which is running{}'.format(
            running, ', only for ' + ', '.join(others) if others else '')) from None
    except OSError as error:
        raise _import_error(f'cannot be read: {error}') from error

    # A library that was cut off would not fail to load but kill the process with SIGBUS. Its table
    # of sections ends an ELF file: e_shoff, e_shentsize and e_shnum tell where.
    whole = content[:4] == b'\x7fELF' and len(content) >= 64
    if whole:
        offset, = struct.unpack_from('=Q', content, 40)
        entry_size, entries = struct.unpack_from('=HH', content, 58)
        whole = offset + entry_size * entries <= len(content)
    if not whole:
        raise _import_error(f'is broken: {path} is not a whole shared library')
    built_for = re.search(rb'zmq_ops built for TensorFlow <([^>]*)>', content)
    built_for = built_for.group(1).decode() if built_for else 'an unknown version'
    if built_for != running:
        raise _import_error('in {} is built for TensorFlow {}, but {} is running'.format(
            path, built_for, running))

    try:
        return tf.load_op_library(path)
    except (tf.errors.OpError, OSError) as error:
        raise _import_error(f'cannot be loaded: {error}') from error


def list_dir(path):
    return os.listdir(path) if os.path.isdir(path) else []


def _import_error(what):
    return ImportError(f'the pull op of zmq_ops {what}; `make env` builds it')
