"""zmq_ops: the wire format, the pull op in real sessions, bad peers, and a bad build."""
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import pytest
import zmq
from tensorpack import tfv1 as tf
from tensorpack.input_source import ZMQInput

from processes import wait_until
from zmq_ops import (SharedMessages, ZMQPullSocket, dump_arrays, fetch_message, load_arrays,
                     new_message, shared)
from zmq_ops.pull import BUILD_DIR, load_ops

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DTYPES = ['bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
          'float16', 'float32', 'float64', 'complex64', 'complex128']
GIB = 2**30

# [[7, 8, 9]] of uint8 (4), then 0.5 of float64 (2), by hand from the wire format
BY_HAND = (struct.pack('=i', 2)
           + struct.pack('=ii', 4, 2) + struct.pack('=ii', 1, 3) + struct.pack('=q', 3)
           + b'\x07\x08\x09'
           + struct.pack('=ii', 2, 0) + struct.pack('=q', 8) + struct.pack('=d', 0.5))


def random_bytes(rng):
    """Up to 100 bytes of noise; half of them begin as a message of one tensor does."""
    message = bytes(rng.randrange(256) for _ in range(rng.randrange(100)))
    return struct.pack('=iii', 1, 4, 1) * rng.randrange(2) + message


def one_tensor(number, shape, nbytes, data):
    return struct.pack('=iii{}iq'.format(len(shape)), 1, number, len(shape), *shape, nbytes) + data


# what is wrong -> (message, part of the error)
MALFORMED = {
    'nothing': (b'', ''),
    'no whole count': (b'\x01\x00\x00', ''),
    'negative count': (struct.pack('=i', -1) + bytes(16), '-1 tensors'),
    'count beyond the length': (struct.pack('=i', 2**30) + bytes(16), '1073741824 tensors'),
    'string': (one_tensor(7, [1], 8, bytes(8)), 'dtype number 7'),
    'negative ndim': (struct.pack('=iiiq', 1, 4, -1, 0), 'ndim -1'),
    'ndim 255': (one_tensor(4, [1] * 255, 1, b'\0'), 'ndim 255'),
    'cut off in its shape': (struct.pack('=iiiii', 1, 4, 200, 1, 1), 'cut off'),
    'negative dimension': (one_tensor(4, [-1, -1], 1, b'\0'), '-1'),
    'overflow of the shape': (one_tensor(4, [2**16] * 4, 0, b''), 'shape'),
    'overflow before a zero': (one_tensor(4, [2**31 - 1] * 3 + [0], 0, b''), 'shape'),
    'overflow by the itemsize': (one_tensor(9, [2**30, 2**31 - 1], 0, b''), 'shape'),
    'negative nbytes': (one_tensor(4, [1], -1, b'\0'), '-1 bytes'),
    'too few nbytes': (one_tensor(3, [2], 7, bytes(7)), '7 bytes'),
    'cut off in the data': (BY_HAND[:-1], ' 7 left'),
    'bytes at the end': (BY_HAND + b'\0', '1 bytes too many'),
    'bool of 2': (one_tensor(10, [2], 2, b'\x01\x02'), 'bool'),
}


@pytest.fixture
def end_point():
    """An ipc end point; a folder of pytest's may be too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix='zmq-') as folder:
        yield 'ipc://{}/socket'.format(folder)


@pytest.fixture
def push():
    """A function that makes PUSH sockets, connected or bound."""
    with zmq.Context() as context:
        def make(address, bind=False):
            socket = context.socket(zmq.PUSH)
            (socket.bind if bind else socket.connect)(address)
            return socket
        yield make
        context.destroy(linger=0)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def run_in_thread(function):
    """Start function in a thread; the returned function waits for its result or its exception."""
    outcome = []

    def target():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def join():
        thread.join(30)
        assert outcome, 'still blocked'
        return outcome[0]
    return join


# the wire format


def test_message_is_literally_the_wire_format():
    arrays = [np.array([[7, 8, 9]], np.uint8), 0.5]
    assert bytes(dump_arrays(arrays)) == BY_HAND
    assert bytes(dump_arrays([])) == bytes(4)

    loaded = load_arrays(BY_HAND)
    assert [(a.dtype.name, a.shape, a.tolist()) for a in loaded] == [
        ('uint8', (1, 3), [[7, 8, 9]]), ('float64', (), 0.5)]
    assert load_arrays(bytes(4)) == []


def test_new_message_is_written_in_place():
    message, (images, number) = new_message([((1, 3), np.uint8), ((), '>f8')])
    images[0] = [7, 8, 9]
    number[...] = 0.5
    assert bytes(message) == BY_HAND


@pytest.mark.parametrize('name', sorted(MALFORMED))
def test_load_arrays_rejects(name):
    message, text = MALFORMED[name]
    with pytest.raises(ValueError) as info:
        load_arrays(message)
    assert 'malformed message' in str(info.value)


@pytest.mark.parametrize('array', [
    np.array([None]), np.array(['a']), np.array([b'a']), np.zeros(1, 'M8[s]'),
    np.zeros(1, np.longdouble), np.zeros(1, [('x', 'f4')])], ids=lambda array: array.dtype.name)
def test_dtypes_that_are_not_shared_are_rejected_by_name(array):
    with pytest.raises(TypeError) as info:
        dump_arrays([np.zeros(1), array])
    assert 'array 1' in str(info.value) and str(array.dtype) in str(info.value)


def test_dimension_beyond_int32_is_rejected():
    with pytest.raises(ValueError, match='array 0 .*int32'):
        dump_arrays([np.empty((0, 2**31))])


def test_parser_agrees_with_load_arrays_on_mutated_messages(tmp_path):
    sanitize = ['g++', '-std=c++11', '-g', '-O1', '-fsanitize=address,undefined',
                '-fno-sanitize-recover=all', '-I', os.path.join(ROOT, 'zmq_ops')]
    (tmp_path / 'empty.cc').write_text('int main() {}')
    if subprocess.call(sanitize + ['empty.cc', '-o', 'empty'], cwd=str(tmp_path)) != 0:
        pytest.skip('the compiler has no sanitizers')
    source = os.path.join(ROOT, 'tests', 'faults', 'fuzz_parser.cc')
    subprocess.check_call(sanitize + ['-DDESCRIBE', source, '-o', 'driver'], cwd=str(tmp_path))

    # mutations: what a field may be set to, flipped bits, cuts and insertions
    rng = random.Random(0)
    seeds = [BY_HAND] + [message for message, _ in MALFORMED.values()]
    for dtype in DTYPES:
        seeds.append(bytes(dump_arrays([np.zeros((2, 0, 3), dtype), np.ones((4, 5), dtype)])))
    fields = [-2**31, -1, 0, 1, 2, 3, 4, 7, 8, 10, 16, 23, 254, 255, 2**16, 2**30, 2**31 - 1]

    def mutate(message):
        message = bytearray(message)
        for _ in range(rng.randint(1, 2)):
            at, how = rng.randrange(len(message) + 1), rng.choice([0, 1, 1, 1, 2, 3])
            if how == 0 and len(message) >= 4:
                at = min(at // 4 * 4, len(message) - 4)
                struct.pack_into('=i', message, at, rng.choice(fields))
            elif how == 1 and at < len(message):
                message[at] ^= 1 << rng.randrange(8)
            elif how == 2:
                del message[at:at + rng.choice([1, 4, 8, 1000])]
            else:
                message[at:at] = bytes(rng.choice([1, 4, 8]))
        return bytes(message)

    messages = seeds + [mutate(rng.choice(seeds)) for _ in range(100000)]
    messages += [random_bytes(rng) for _ in range(10000)]
    result = subprocess.run(
        [str(tmp_path / 'driver')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        input=b''.join(struct.pack('=I', len(m)) + m for m in messages))
    assert (result.returncode, result.stderr.decode()) == (0, '')

    def describe(message):
        try:
            arrays = load_arrays(message)
        except ValueError:
            return 'rejected'
        assert bytes(dump_arrays(arrays)) == message
        return ''.join('{}:{} '.format(','.join(map(str, (a.dtype.name,) + a.shape)),
                                       a.tobytes().hex()) for a in arrays)

    lines = result.stdout.decode().split('\n')[:-1]
    assert len(lines) == len(messages)
    rejected = 0
    for message, line in zip(messages, lines):
        assert describe(message) == line, message
        rejected += line == 'rejected'
    assert rejected > 10000 and len(messages) - rejected > 10000


# the op


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_dtype_comes_through(dtype, end_point, push):
    rng = np.random.RandomState(0)
    values = rng.randn(4, 6) * 100
    values = (values + 1j * rng.randn(4, 6) if 'complex' in dtype else values).astype(dtype)
    arrays = [values, values[0, 0], values[:0], values[::2, ::-3], values.T,
              values.astype(values.dtype.newbyteorder('>'))]
    tensors = ZMQPullSocket(end_point, [tf.as_dtype(dtype)] * len(arrays), timeout=30).pull()
    push(end_point).send(dump_arrays(arrays), copy=False)
    with tf.Session() as sess:
        received = sess.run(tensors)
    for array, got in zip(arrays, received):
        assert got.dtype == np.dtype(dtype) and got.shape == array.shape
        np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize('name', sorted(MALFORMED))
def test_malformed_message_is_an_error_and_the_next_pull_works(name, end_point, push):
    message, text = MALFORMED[name]
    tensors = ZMQPullSocket(end_point, ['uint8', 'float64'], timeout=30).pull()
    socket = push(end_point)
    socket.send(message)
    socket.send(BY_HAND)
    with tf.Session() as sess:
        with pytest.raises(tf.errors.InvalidArgumentError) as info:
            sess.run(tensors)
        assert end_point + ': malformed message: ' in info.value.message
        assert text in info.value.message
        assert sess.run(tensors)[1] == 0.5


@pytest.mark.parametrize('arrays, text', [
    ([1.0], 'expected 2 tensors, received 1'),
    ([], 'expected 2 tensors, received 0'),
    ([np.zeros((5, 3), 'u1'), np.zeros(2)],
     'tensor 1: expected float32 <unknown>, received float64 [2]'),
    ([np.zeros((5, 4), 'u1'), np.float32(0)],
     'tensor 0: expected uint8 [?,3], received uint8 [5,4]'),
    ([np.zeros(3, 'u1'), np.float32(0)], 'tensor 0: expected uint8 [?,3], received uint8 [3]'),
])
def test_unexpected_tensors_are_named(arrays, text, end_point, push):
    tensors = ZMQPullSocket(
        end_point, ['uint8', 'float32'], shapes=[(None, 3), None], timeout=30).pull()
    assert tensors[0].shape.as_list() == [None, 3] and tensors[1].shape.ndims is None
    push(end_point).send(dump_arrays(arrays))
    with tf.Session() as sess, pytest.raises(tf.errors.InvalidArgumentError) as info:
        sess.run(tensors)
    assert 'pull from ' + end_point in info.value.message and text in info.value.message


def test_garbage_is_an_error_and_the_next_pull_works(end_point, push):
    rng = random.Random(0)
    cut = bytes(dump_arrays([np.ones((4, 5), 'u1'), 0.5]))
    garbage = [random_bytes(rng) for _ in range(100)] + [cut[:i] for i in range(len(cut))]
    tensors = ZMQPullSocket(end_point, ['uint8', 'float64'], timeout=30).pull()
    socket = push(end_point)
    with tf.Session() as sess:
        for message in garbage:
            socket.send(message)
            with pytest.raises(tf.errors.InvalidArgumentError, match='malformed message'):
                sess.run(tensors)
        socket.send(BY_HAND)
        assert sess.run(tensors)[1] == 0.5


def test_message_of_several_frames_is_one_error(end_point, push):
    tensors = ZMQPullSocket(end_point, ['uint8', 'float64'], timeout=30).pull()
    socket = push(end_point)
    socket.send_multipart([BY_HAND] * 3)
    socket.send(BY_HAND)
    with tf.Session() as sess:
        with pytest.raises(tf.errors.InvalidArgumentError, match='one frame'):
            sess.run(tensors)
        assert sess.run(tensors)[1] == 0.5


def test_bad_arguments_are_named(end_point):
    with pytest.raises(TypeError, match='tensor 1 is of type string'):
        ZMQPullSocket(end_point, [tf.uint8, tf.string])
    with pytest.raises(ValueError, match='0 end points'):
        ZMQPullSocket([], ['uint8'])
    with pytest.raises(ValueError, match='2 types, 1 shapes'):
        ZMQPullSocket(end_point, ['uint8'] * 2, shapes=[None])
    with pytest.raises(ValueError, match='hwm .*-2'):
        ZMQPullSocket(end_point, ['uint8'], hwm=-2)


def test_end_points_take_strict_turns(end_point, push):
    end_points = [end_point + str(i) for i in range(3)]
    tensor, = ZMQPullSocket(end_points, ['int64'], hwm=9, bind=False, timeout=30).pull()
    sockets = [push(address, bind=True) for address in end_points]
    with tf.Session() as sess:
        pulled = run_in_thread(lambda: [int(sess.run(tensor)) for _ in range(9)])
        for i in (2, 1, 0):  # the last has all its messages there first
            for message in range(3):
                sockets[i].send(dump_arrays([message * 10 + i]))
            time.sleep(0.05)
        assert pulled() == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_pulls_share_the_socket_and_block_no_thread(end_point, push):
    receiver = ZMQPullSocket(end_point, ['int64'], timeout=30)
    pulls = [receiver.pull()[0] for _ in range(3)]
    something_else = tf.random_uniform([])
    config = tf.ConfigProto(inter_op_parallelism_threads=1, intra_op_parallelism_threads=1)
    with tf.Session(config=config) as sess:
        pulled = run_in_thread(lambda: sess.run(pulls))
        time.sleep(0.2)
        assert 0 <= run_in_thread(lambda: sess.run(something_else))() < 1
        socket = push(end_point)
        for i in range(3):
            socket.send(dump_arrays([i]))
        assert sorted(pulled()) == [0, 1, 2]


def test_closing_the_session_ends_a_blocked_pull(end_point):
    tensors = ZMQPullSocket(end_point, ['int64']).pull()
    sess = tf.Session()
    pulled = run_in_thread(lambda: sess.run(tensors))
    time.sleep(0.3)
    sess.close()
    error = pulled()
    assert isinstance(error, tf.errors.CancelledError) and end_point in error.message


def test_cancelled_and_timed_out_pulls_take_no_message(end_point, push):
    receiver = ZMQPullSocket(end_point, ['int64'])
    tensor, = receiver.pull()
    socket = push(end_point)
    with tf.Session() as sess:
        # the session's own timeout cancels the step
        for _ in range(3):
            with pytest.raises(tf.errors.DeadlineExceededError):
                sess.run([tensor] + receiver.pull(), options=tf.RunOptions(timeout_in_ms=100))
        for i in range(5):
            socket.send(dump_arrays([i]))
        assert [int(sess.run(tensor)) for i in range(5)] == [0, 1, 2, 3, 4]


def test_timeout_names_the_end_point_whose_turn_it_is(end_point, push):
    end_points = [end_point + '0', end_point + '1']
    receiver = ZMQPullSocket(end_points, ['int64'], timeout=0.5)
    (tensor,), waited = receiver.pull(), receiver.waited()
    first, second = push(end_points[0]), push(end_points[1])
    with tf.Session() as sess:
        assert sess.run(waited) == 0
        start = time.time()
        with pytest.raises(tf.errors.DeadlineExceededError) as info:
            sess.run(tensor)
        assert end_points[0] + ': no message within 0.5 seconds' in info.value.message
        assert 0 < sess.run(waited) <= time.time() - start  # the thread may wake up late

        # the turn is still the first one's
        second.send(dump_arrays([2]))
        first.send(dump_arrays([1]))
        assert [int(sess.run(tensor)), int(sess.run(tensor))] == [1, 2]


def test_end_point_belongs_to_one_session_until_it_is_closed(end_point, push):
    tensor, = ZMQPullSocket(end_point, ['int64'], timeout=30).pull()
    for i in range(3):
        sess, other = tf.Session(), tf.Session()
        push(end_point).send(dump_arrays([i]))
        assert sess.run(tensor) == i
        with pytest.raises(tf.errors.FailedPreconditionError) as info:
            other.run(tensor)
        assert end_point in info.value.message and 'listens there' in info.value.message
        push(end_point).send(dump_arrays([i + 10]))
        assert sess.run(tensor) == i + 10  # the attempt did no harm
        if i == 1:
            tf.Session.reset('')
        sess.close()
        assert not os.path.exists(end_point[len('ipc://'):])


@pytest.mark.parametrize('address, bind', [
    ('ipc:///no/such/folder/socket', True), ('tcp://nonsense', True), ('nonsense', False),
    ('ipc:///' + 'x' * 200, False)])
def test_end_point_that_cannot_be_opened_is_named(address, bind):
    tensors = ZMQPullSocket(address, ['int64'], bind=bind).pull()
    with tf.Session() as sess:
        for _ in range(2):
            with pytest.raises(tf.errors.FailedPreconditionError) as info:
                sess.run(tensors)
            assert ('bind ' if bind else 'connect to ') + address + ': ' in info.value.message


# ---------------------------------------------------------------------------- in shared memory

def share(messages, arrays):
    """Make a shared message of arrays: the frame to send."""
    frame, views = messages.new_message([(array.shape, array.dtype) for array in arrays])
    for view, array in zip(views, arrays):
        view[...] = array
    return frame


def shared_memory(pid='self'):
    """(mappings, open files) of shared messages that a process has."""
    with open('/proc/{}/maps'.format(pid)) as maps:
        mapped = sum('/memfd:zmq_ops' in line for line in maps)
    files = 0
    for name in os.listdir('/proc/{}/fd'.format(pid)):
        try:
            files += '/memfd:zmq_ops' in os.readlink('/proc/{}/fd/{}'.format(pid, name))
        except OSError:
            pass  # that of the listing
    return mapped, files


def test_shared_messages_come_through_and_are_used_again(end_point, push):
    rng = np.random.RandomState(0)
    # of one size, and then of others
    batches = [[rng.randint(0, 256, (count, 100, 3)).astype(np.uint8), np.float64(i)]
               for i, count in enumerate([64] * 6 + [5, 0, 64, 64])]
    tensors = ZMQPullSocket(end_point, ['uint8', 'float64'], timeout=30).pull()
    messages, socket = SharedMessages(2), push(end_point)
    before = shared_memory()
    with tf.Session() as sess:
        for i, batch in enumerate(batches):
            frame = share(messages, batch)
            assert len(frame) == 32
            socket.send(frame)
            if i == 0:
                continue
            # one behind, so that two are under way
            images, number = sess.run(tensors)
            assert number == i - 1
            np.testing.assert_array_equal(images, batches[i - 1][0])
        assert sess.run(tensors)[1] == len(batches) - 1
        del batch
        # two messages: each is mapped by the sender, and open twice there (Python's mmap is one)
        # and the op releases the last one when it has answered
        wait_until(lambda: np.subtract(shared_memory(), before).tolist() == [2, 4])


def test_a_shared_message_is_not_written_over_before_it_is_read(end_point, push):
    tensor, = ZMQPullSocket(end_point, ['int64'], timeout=30).pull()
    messages, socket = SharedMessages(3), push(end_point)
    for i in range(3):
        socket.send(share(messages, [np.int64(i)]))
    fourth = run_in_thread(lambda: share(messages, [np.int64(3)]))
    with tf.Session() as sess:
        time.sleep(0.3)
        assert [int(sess.run(tensor)) for _ in range(3)] == [0, 1, 2]
        socket.send(fourth())
        assert sess.run(tensor) == 3


def test_shared_messages_of_a_sender_that_died_can_be_read_no_more(end_point, push):
    code = """if True:
        import sys, numpy as np, zmq
        from zmq_ops import SharedMessages
        messages = SharedMessages(1)
        frame, (array,) = messages.new_message([((3,), 'int64')])
        print(frame.hex(), flush=True)
        sys.stdin.read()
        """
    sender = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, universal_newlines=True)
    frame = bytes.fromhex(sender.stdout.readline().strip())
    assert len(load_arrays(fetch_message(frame))[0]) == 3
    sender.communicate('')
    with pytest.raises(FileNotFoundError, match='/proc/{}/fd/'.format(sender.pid)):
        fetch_message(frame)

    # the op says so, takes the message for one, and goes on with the next end point
    end_points = [end_point + '0', end_point + '1']
    tensor, = ZMQPullSocket(end_points, ['int64'], timeout=30).pull()
    first, second = map(push, end_points)
    first.send(frame)
    second.send(dump_arrays([1]))
    with tf.Session() as sess:
        with pytest.raises(tf.errors.DataLossError) as info:
            sess.run(tensor)
        assert 'pull from {}: cannot open the message in the sender\'s memory, /proc/{}/fd/'.format(
            end_points[0], sender.pid) in info.value.message
        assert 'No such file' in info.value.message
        assert sess.run(tensor) == 1


@pytest.mark.parametrize('field, change', [(2, 'a file'), (3, 'a file'), (4, 1), (5, 1),
                                           (5, -10**9)])
def test_a_reference_to_something_else_is_refused(field, change, end_point, push, tmp_path):
    messages = SharedMessages(1)
    fields = list(shared.REFERENCE.unpack(share(messages, [np.zeros(9)])))
    (tmp_path / 'file').write_text('precious')
    with open(str(tmp_path / 'file'), 'r+b') as file:
        fields[field] = file.fileno() if change == 'a file' else fields[field] + change
        frame = shared.REFERENCE.pack(*fields)
        with pytest.raises(OSError, match='is not the message'):
            fetch_message(frame)
        tensor, = ZMQPullSocket(end_point, ['float64'], timeout=30).pull()
        push(end_point).send(frame)
        with tf.Session() as sess, pytest.raises(tf.errors.DataLossError, match='something els'):
            sess.run(tensor)
    assert (tmp_path / 'file').read_text() == 'precious'


def test_a_reference_from_the_network_is_not_followed(push):
    messages = SharedMessages(1)
    frame = share(messages, [np.zeros(9)])
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        address = 'tcp://127.0.0.1:{}'.format(socket.bind_to_random_port('tcp://127.0.0.1'))
        tensor, = ZMQPullSocket(address, ['float64'], bind=False, timeout=30).pull()
        with tf.Session() as sess:
            pulled = run_in_thread(lambda: sess.run(tensor))
            socket.send(frame)
            error = pulled()
        assert isinstance(error, tf.errors.InvalidArgumentError) and '-1 tensors' in error.message


def test_fetching_releases_a_shared_message_and_leaves_others_alone():
    messages = SharedMessages(1)
    for i in range(3):
        array, = load_arrays(fetch_message(share(messages, [np.full(4, i)])))
        assert array.tolist() == [i] * 4
    with pytest.raises(TypeError):
        messages.new_message([((1,), 'O')])
    with pytest.raises(TypeError):
        messages.new_message([((1,), 'O')])  # and does not wait for ever
    assert fetch_message(BY_HAND) is BY_HAND
    as_long = dump_arrays([np.arange(12, dtype=np.uint8).reshape(1, 1, 12)])[:32]
    assert bytes(fetch_message(as_long)) == bytes(as_long)


def test_shared_memory_of_an_old_system_and_of_a_full_one(monkeypatch):
    class OldLibrary:
        def __init__(self, *args, **kwargs):
            pass
    monkeypatch.setattr(shared.ctypes, 'CDLL', OldLibrary)
    messages = SharedMessages(1)
    frame = share(messages, [np.arange(5)])
    memory = shared.REFERENCE.unpack(frame)[2]
    assert os.readlink('/proc/self/fd/{}'.format(memory)).startswith('/dev/shm/')
    assert load_arrays(fetch_message(frame))[0].tolist() == [0, 1, 2, 3, 4]

    def fails(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(shared.os, 'posix_fallocate', fails)
    with pytest.raises(OSError, match="No space left on device: '8000028 bytes of shared memory'"):
        messages.new_message([((1000, 1000), np.float64)])


# ------------------------------------------------------------------------------- large, tensorpack

def test_messages_above_2_gib(end_point, push):
    if psutil.virtual_memory().available < 10 * GIB:
        pytest.skip('needs 10 GB of free memory')
    array = np.zeros((3, GIB - 8), np.uint8)
    array[2, -3:] = [1, 2, 3]
    message = dump_arrays([array, np.int32(5)])
    assert len(message) > 2**31
    tensor, number = ZMQPullSocket(end_point, ['uint8', 'int32'], hwm=1, timeout=120).pull()
    push(end_point).send(message, copy=False)
    del message
    with tf.Session() as sess:
        shape, end, five = sess.run([tf.shape(tensor), tensor[2, -4:], number])
    assert shape.tolist() == [3, GIB - 8] and end.tolist() == [0, 1, 2, 3] and five == 5


# with tensorpack


@pytest.mark.parametrize('as_dataset', [False, True])
def test_tensorpack_sends_and_receives(as_dataset, end_point):
    code = '''
import sys
import numpy as np
from tensorpack.dataflow import DataFromList
from tensorpack.dataflow.remote import send_dataflow_zmq
points = [[np.full((2, 3), i, np.uint8), np.array([i, -i], np.int32)] for i in range(5)]
send_dataflow_zmq(DataFromList(points, shuffle=False), sys.argv[1], hwm=2, format='zmq_ops')
'''
    sender = subprocess.Popen(
        [sys.executable, '-c', code, end_point], env=dict(os.environ, PYTHONPATH=ROOT),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        signature = [tf.TensorSpec((None, 3), tf.uint8, 'image'),
                     tf.TensorSpec((None,), tf.int32, 'label')]
        source = ZMQInput(end_point, hwm=2)
        if as_dataset:
            dataset = source.to_dataset(signature).repeat()
            tensors = tf.data.make_one_shot_iterator(dataset).get_next()
        else:
            source.setup(signature)
            tensors = source.get_input_tensors()
        assert tensors[0].shape.as_list() == [None, 3]
        with tf.Session() as sess:
            # the five points in order, over and over
            for i in [0, 1, 2, 3, 4, 0, 1]:
                image, label = sess.run(tensors)
                assert image.tolist() == [[i] * 3] * 2 and label.tolist() == [i, -i]
    finally:
        sender.kill()
        sender.wait()


# without TensorFlow, without the op


def test_serializing_needs_no_tensorflow():
    code = '''
import sys
sys.modules['tensorflow'] = None  # makes any import of it fail
import zmq_ops
print(bytes(zmq_ops.dump_arrays([3])).hex(), zmq_ops.load_arrays(zmq_ops.dump_arrays([3])))
message, views = zmq_ops.new_message([((2,), 'int8')])
print(not any('pull_op' in line for line in open('/proc/self/maps')))
'''
    output = subprocess.check_output([sys.executable, '-c', code], cwd=ROOT).decode().split('\n')
    assert output[0] == struct.pack('=iiiqq', 1, 9, 0, 8, 3).hex() + ' [array(3)]'
    assert output[1] == 'True'


def test_import_errors_say_what_is_wrong(tmp_path, monkeypatch):
    running = tf.__version__
    op = os.path.join(BUILD_DIR, 'pull_op-tf{}.so'.format(running))

    def error_of(*files):
        folder = tempfile.mkdtemp(dir=str(tmp_path))
        for name, content in files:
            with open(os.path.join(folder, name), 'wb') as f:
                f.write(content)
        with pytest.raises(ImportError) as info:
            load_ops(folder)
        assert '`make env`' in str(info.value)
        return str(info.value)

    with open(op, 'rb') as f:
        content = f.read()
    name = os.path.basename(op)
    marker = b'built for TensorFlow <' + running.encode()
    other = marker[:-1] + b'x'
    assert content.count(marker) == 1

    # missing; there for another TensorFlow only; another one's under this name
    assert 'not built for TensorFlow ' + running in error_of()
    error = error_of(('pull_op-tf9.8.7.so', content))
    assert running + ', which is running, only for 9.8.7' in error
    error = error_of((name, content.replace(marker, other)))
    assert 'built for TensorFlow {}x, but {} is running'.format(running[:-1], running) in error

    # cut off at many places, which would kill the process; garbage; a text; not loadable
    for size in range(0, len(content), len(content) // 9):
        assert 'not a whole shared library' in error_of((name, content[:size]))
    assert 'not a whole shared library' in error_of((name, b'\x7fELF' + b'\xff' * 1000))
    assert 'cannot be loaded' in error_of((name, content.replace(b'libzmq.so', b'libzmx.so')))

    # the one error of whoever constructs the socket
    monkeypatch.setattr('zmq_ops.pull.BUILD_DIR', str(tmp_path))
    with pytest.raises(ImportError, match='not built'):
        ZMQPullSocket('ipc://unused', ['int64'])


def test_make_builds_once_and_leaves_nothing_half_written(tmp_path):
    folder = str(tmp_path / 'zmq_ops')
    shutil.copytree(os.path.join(ROOT, 'zmq_ops'), folder)
    for op in os.listdir(os.path.join(folder, 'build')):
        os.utime(os.path.join(folder, 'build', op))
    make = ['make', '-C', folder, 'PYTHON=' + sys.executable]
    assert b'building' not in subprocess.check_output(make)
    with open(os.path.join(folder, 'pull_op.cc'), 'w') as f:
        f.write('#error half an edit\n')
    before = os.listdir(os.path.join(folder, 'build'))
    assert subprocess.call(make, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) != 0
    assert os.listdir(os.path.join(folder, 'build')) == before
