"""Arrays to and from one message, in the wire format of zmq_ops. Needs NumPy only.

A message is one ZMQ frame, or lies in shared memory (shared.py), in native byte order, with nothing
aligned:

    int32 n, then n times { int32 dtype, int32 ndim, int32 shape[ndim], int64 nbytes, data }

message.h is the receiving op's parser of the same format; both accept the same messages, but for
NumPy's own limit of 32 or 64 dimensions.
"""
import struct

import numpy as np

__all__ = ['dump_arrays', 'load_arrays', 'new_message']

# Every type of fixed size that NumPy and TensorFlow share: NumPy's name to TensorFlow's number.
DTYPE_NUMBERS = {
    'float32': 1, 'float64': 2, 'int32': 3, 'uint8': 4, 'int16': 5, 'int8': 6, 'complex64': 8,
    'int64': 9, 'bool': 10, 'uint16': 17, 'complex128': 18, 'float16': 19, 'uint32': 22,
    'uint64': 23,
}
DTYPES = {number: np.dtype(name) for name, number in DTYPE_NUMBERS.items()}

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_DIMS = 254  # TensorFlow's limit
MIN_TENSOR_BYTES = 16  # dtype, ndim and nbytes of a 0-d tensor, without its data


def dump_arrays(arrays):
    """Serialize arrays, copying their data once.

    Args:
        arrays: a list of arrays, or of what `np.asarray` takes. They may be 0-d, empty,
            non-contiguous or of foreign byte order; all together may exceed 2 GiB.

    Returns:
        memoryview: the message.

    Raises:
        TypeError: a dtype that NumPy and TensorFlow do not share or that has no fixed size.
        ValueError: a dimension above 2**31 - 1.
    """
    arrays = [np.asarray(array) for array in arrays]
    message, views = new_message([(array.shape, array.dtype) for array in arrays])
    for view, array in zip(views, arrays):
        np.copyto(view, array)
    return message


def new_message(specs, allocate=None):
    """Allocate a message whose data is still to be written, in place.

    Args:
        specs: a list of (shape, dtype).
        allocate: a function of a number of bytes that returns so large a writable buffer, None for
            memory of this process.

    Returns:
        memoryview: the message.
        list of np.ndarray: for each spec a view into the message, of that shape and (native)
        dtype, uninitialised, at any alignment.

    Raises:
        TypeError, ValueError: as `dump_arrays`.
    """
    # headers, and the number of bytes of data after each
    headers, sizes = [], []
    for index, (shape, dtype) in enumerate(specs):
        number = DTYPE_NUMBERS.get(np.dtype(dtype).name)
        if number is None:
            raise TypeError('array {} is of dtype {}, which zmq_ops cannot send; it sends {}'
                            .format(index, np.dtype(dtype), ', '.join(sorted(DTYPE_NUMBERS))))
        if any(not 0 <= dim <= INT32_MAX for dim in shape):
            raise ValueError('array {} is of shape {}, but the wire format has int32 dimensions'
                             .format(index, tuple(shape)))
        nbytes = DTYPES[number].itemsize
        for dim in shape:
            nbytes *= int(dim)
        ndim = len(shape)
        headers.append(struct.pack(f'=ii{ndim}iq', number, ndim, *shape, nbytes))
        sizes.append(nbytes)

    # np.empty does not fill with zeros, which a bytearray would
    allocate = allocate or (lambda size: np.empty(size, np.uint8))
    count = struct.pack('=i', len(headers))
    message = memoryview(allocate(len(count) + sum(map(len, headers)) + sum(sizes)))
    message[:len(count)] = count
    position, views = len(count), []
    for (shape, dtype), header, nbytes in zip(specs, headers, sizes):
        message[position:position + len(header)] = header
        position += len(header)
        native = DTYPES[DTYPE_NUMBERS[np.dtype(dtype).name]]
        views.append(np.ndarray(shape, native, buffer=message, offset=position))
        position += nbytes
    return message, views


def load_arrays(message):
    """Find the arrays of a message.

    Args:
        message: bytes-like, from a stranger perhaps.

    Returns:
        list of np.ndarray: views into the message, at any alignment; writable if the message is.

    Raises:
        ValueError: the message is malformed.
    """
    message = memoryview(message).cast('B')
    position = 0

    def read(code, what):
        nonlocal position
        size = struct.calcsize('=' + code)
        if size > len(message) - position:
            raise ValueError(f'malformed message: cut off in {what}')
        values = struct.unpack_from('=' + code, message, position)
        position += size
        return values

    count, = read('i', 'its number of tensors')
    if not 0 <= count <= (len(message) - position) // MIN_TENSOR_BYTES:
        raise ValueError('malformed message: announces {} tensors, but has {} bytes'.format(
            count, len(message)))

    arrays = []
    for index in range(count):
        where = f'tensor {index}'

        # header
        number, ndim = read('ii', where)
        if number not in DTYPES:
            raise ValueError(f'malformed message: {where}: unknown dtype number {number}')
        if not 0 <= ndim <= MAX_DIMS:
            raise ValueError(f'malformed message: {where}: ndim {ndim} is not within 0..{MAX_DIMS}')
        shape = read(f'{ndim}i', where)
        nbytes, = read('q', where)

        # shape against number of bytes; the zeros are left out for message.h's reason
        nonzero_bytes = DTYPES[number].itemsize
        for dim in shape:
            nonzero_bytes *= dim or 1
        if min(shape, default=0) < 0 or nonzero_bytes > INT64_MAX:
            raise ValueError(f'malformed message: {where}: impossible shape {shape}')
        expected = 0 if 0 in shape else nonzero_bytes
        if nbytes != expected or nbytes > len(message) - position:
            raise ValueError('malformed message: {} announces {} bytes of data, but its shape and '
                             'dtype make {} and the message has {} left'.format(
                                 where, nbytes, expected, len(message) - position))

        # data
        array = np.ndarray(shape, DTYPES[number], buffer=message, offset=position)
        if array.dtype == bool and array.size and array.view(np.uint8).max() > 1:
            raise ValueError(f'malformed message: {where}: a bool is neither 0 nor 1')
        arrays.append(array)
        position += nbytes
    if position != len(message):
        raise ValueError(f'malformed message: {len(message) - position} bytes too many at its end')
    return arrays
