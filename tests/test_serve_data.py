"""A real data server, from files to pulled batches, and how it ends."""
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib

import cv2
import numpy as np
import pytest
import zmq

import data
import decoder
import zmq_ops
from image_lists import digest_images, list_images
from images import PHOTO
from job import signals
from processes import is_alive, list_processes, read_status, wait_until

SERVER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'serve-data.py')
PATIENCE = 30  # seconds for anything, on a busy machine


@pytest.fixture
def folder(tmp_path):
    """root/{train,val}/{a,b}: 13 and 7 images; image i has the value 10 i everywhere."""
    for split, count in (('train', 13), ('val', 7)):
        for i in range(count):
            path = tmp_path / 'root' / split / ('a' if i < 5 else 'b') / '{:02d}.png'.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.full((10, 12, 3), 10 * i, np.uint8))
    return str(tmp_path / 'root')


class Server:
    """A running server and what a trainer has of it."""

    def __init__(self, address, flags, lifeline=True):
        read, self.lifeline = os.pipe()
        self.address = address
        command = [sys.executable, SERVER, '--address', address]
        if lifeline:
            command += ['--lifeline', str(read)]
        self.process = subprocess.Popen(command + [str(flag) for flag in flags], pass_fds=[read],
                                        stderr=subprocess.PIPE, universal_newlines=True)
        os.close(read)
        self.context, self.sockets, self.connections = zmq.Context(), {}, []

    def connect(self):
        """Connect to the control socket: the file of its lines."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connections.append(connection)
        connection.settimeout(PATIENCE)
        deadline = time.time() + PATIENCE
        while True:
            try:
                connection.connect(os.path.join(self.address, 'control'))
                return connection.makefile()
            except OSError:
                if time.time() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def hello(self):
        return json.loads(self.connect().readline())

    def pull(self, rank, worker):
        """One message: list of arrays."""
        if (rank, worker) not in self.sockets:
            pull_socket = self.context.socket(zmq.PULL)
            pull_socket.set(zmq.RCVHWM, 1)
            pull_socket.set(zmq.LINGER, 0)
            pull_socket.connect('ipc://{}/rank{}-worker{}'.format(self.address, rank, worker))
            self.sockets[rank, worker] = pull_socket
        assert self.sockets[rank, worker].poll(1000 * PATIENCE)
        return zmq_ops.load_arrays(zmq_ops.fetch_message(self.sockets[rank, worker].recv()))

    def pull_stream(self, rank, num_workers, steps):
        turns = itertools.cycle(range(num_workers))
        return [self.pull(rank, next(turns)) for _ in range(steps)]

    def workers(self):
        """Process ids of the workers."""
        return [pid for pid in list_processes() if read_status(pid)[1] == self.process.pid]

    def wait(self):
        """Wait for the end: (exit code, standard error)."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors

    def drop_lifeline(self):
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None


@pytest.fixture
def start(tmp_path):
    """start(flag, ..., lifeline=True) -> Server."""
    servers = []

    def start_server(*flags, **kwargs):
        servers.append(Server(str(tmp_path / 'sockets{}'.format(len(servers))), flags, **kwargs))
        return servers[-1]
    yield start_server
    for server in servers:
        server.drop_lifeline()
        for connection in server.connections:
            connection.close()
        for pull_socket in server.sockets.values():
            pull_socket.close()
        server.context.term()
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.communicate()


# --------------------------------------------------------------------------------------- batches

def same(stream, other):
    return len(stream) == len(other) and all(
        np.array_equal(a, b) for one, two in zip(stream, other) for a, b in zip(one, two))


def test_stream_depends_on_neither_workers_nor_start(folder, start):
    flags = ['--data', folder, '--task', 'moco-v2', '--batch', 4, '--image-size', 16, '--seed', 3]
    streams = []
    for workers in (1, 2, 3):
        server = start(*flags + ['--workers', workers])
        facts = server.hello()
        assert facts['images'] == 13 and facts['classes'] is None
        assert facts['workers_per_rank'] == workers
        streams.append(server.pull_stream(0, workers, 8))
    assert same(streams[0], streams[1]) and same(streams[0], streams[2])

    # what the server sends is what data.py makes
    reader = decoder.ImageReader(list_images(folder), pytest.fail)
    batches = data.Batches(data.TASKS['moco-v2'], reader, 0, 1, 4, 16, 3, (0.2, 1))
    views = [np.empty(shape, dtype) for shape, dtype in batches.specs(7)]
    batches.fill(7, views)
    assert same([views], streams[0][7:])

    resumed = start(*flags + ['--workers', 2, '--start-batch', 5])
    assert same(resumed.pull_stream(0, 2, 3), streams[0][5:])
    # a cache for all images, and one for a part
    for size in (1, 2e-6):
        cached = start(*flags + ['--workers', 2, '--cache', size])
        assert same(cached.pull_stream(0, 2, 8), streams[0])


def test_no_two_views_are_the_same_whatever_the_workers(tmp_path, start):
    # ten copies of a photograph: workers that drew the same random numbers would show, as would
    # the numbers of a worker in the place of an image's
    (tmp_path / 'root').mkdir()
    for i in range(10):
        shutil.copy(PHOTO, str(tmp_path / 'root' / '{}.jpg'.format(i)))
    streams = []
    for workers in (1, 3, 4):
        server = start('--data', tmp_path / 'root', '--task', 'moco-v2', '--batch', 5,
                       '--image-size', 32, '--workers', workers)
        server.hello()
        streams.append(server.pull_stream(0, workers, 6))
    assert same(streams[0], streams[1]) and same(streams[0], streams[2])
    views = {view.tobytes() for batch in streams[0] for array in batch for view in array}
    assert len(views) == 6 * 5 * 2


def test_two_ranks_share_an_epoch(folder, start):
    server = start('--data', folder, '--task', 'linear', '--batch', 3, '--image-size', 8,
                   '--ranks', '2,3', '--size', 4, '--workers', 3)
    facts = server.hello()
    assert facts['classes'] == 2 and facts['workers_per_rank'] == 2
    assert facts['digest'] == digest_images(list_images(folder, 'train', True))
    for rank in (2, 3):
        for step, (images, labels) in enumerate(server.pull_stream(rank, 2, 5)):
            plan = data.images_of_batch(step, rank, 4, 3, 13, 0)
            # flat images stay what they are in any crop
            assert images[:, 0, 0, 0].tolist() == [10 * index for _, index in plan]
            assert images.shape == (3, 8, 8, 3)
            assert labels.tolist() == [int(index >= 5) for _, index in plan]


@pytest.mark.parametrize('size', [100, 300])
@pytest.mark.parametrize('split, count', [('train', 13), ('val', 7)])
def test_bounded_pass(folder, start, split, count, size):
    server = start('--data', folder, '--task', 'eval', '--split', split, '--batch', 1,
                   '--image-size', size, '--ranks', '0,1', '--size', 2, '--workers', 4)
    lines = [server.connect(), server.connect()]
    assert [json.loads(line.readline())['images'] for line in lines] == [count, count]
    values = []
    for rank in (0, 1):
        # whether a batch fits into a socket's buffer or not, all wait for one who is late
        values += server.pull(rank, 0)[0][:, 4, 4, 1].tolist()
    time.sleep(1)
    for rank in (0, 1):
        steps = data.num_bounded_batches(rank, 2, 1, count)
        for step in range(1, steps):
            images, labels = server.pull(rank, step % 2)
            values += images[:, 4, 4, 1].tolist()
            assert labels.tolist() == [int(v >= 50) for v in images[:, 4, 4, 1]]
    assert sorted(values) == [10 * i for i in range(count)]
    for line, connection in zip(lines, server.connections):
        assert server.process.poll() is None
        connection.shutdown(socket.SHUT_RDWR)
        assert line.readline() == ''
    assert server.wait() == (0, '')
    assert not os.path.exists(server.address)


def test_fake(start):
    server = start('--fake', 1000, '--task', 'moco-v1', '--batch', 4, '--image-size', 8,
                   '--workers', 1)
    assert server.hello()['images'] == 1000
    first, second = server.pull_stream(0, 1, 2)
    assert [array.shape for array in first] == [(4, 8, 8, 3)] * 2 and same([first], [second])
    assert len(np.unique(first[0])) > 100

    server = start('--fake', 5, '--task', 'eval', '--batch', 4, '--image-size', 8, '--workers', 1)
    assert server.hello()['classes'] == 1000
    assert [len(labels) for _, labels in server.pull_stream(0, 1, 2)] == [4, 1]


def test_a_worker_waits_until_its_batches_are_read(start):
    server = start('--fake', 1000, '--task', 'linear', '--batch', 4, '--image-size', 8,
                   '--workers', 2)
    server.hello()
    pull_socket = server.context.socket(zmq.PULL)
    server.sockets['by hand'] = pull_socket
    pull_socket.connect('ipc://{}/rank0-worker0'.format(server.address))

    for expected, read in ((4, 3), (3, 1), (1, 0)):
        frames = []
        for _ in range(expected):
            assert pull_socket.poll(1000 * PATIENCE)
            frames.append(pull_socket.recv())
        assert len(set(frames)) == expected and not pull_socket.poll(1000)
        for frame in frames[:read]:
            zmq_ops.fetch_message(frame)


# ------------------------------------------------------------------------------- unreadable images

def test_an_unreadable_image_is_replaced_and_reported_once(folder, start):
    bad = os.path.join(folder, 'train/a/03\x1b.png')
    os.unlink(os.path.join(folder, 'train/a/03.png'))
    open(bad, 'w').close()
    server = start('--data', folder, '--task', 'linear', '--batch', 13, '--image-size', 8,
                   '--workers', 2)
    server.hello()
    for images, _ in server.pull_stream(0, 2, 4):
        expected = [10 * i for i in range(13) if i != 3] + [40]
        assert sorted(images[:, 0, 0, 0].tolist()) == sorted(expected)
    server.drop_lifeline()
    assert server.wait() == (0, 'serve-data: cannot read {}: is empty (number 1); the next image '
                             'takes its place\n'.format(bad.replace('\x1b', '?')))


def add_bad_profile(path):
    """Make libpng warn of a PNG."""
    with open(path, 'rb') as file:
        png = file.read()
    chunk = b'iCCP' + b'x\0\0' + zlib.compress(bytes(200))
    with open(path, 'wb') as file:
        file.write(png[:33] + struct.pack('>L', len(chunk) - 4) + chunk
                   + struct.pack('>L', zlib.crc32(chunk)) + png[33:])


@pytest.mark.parametrize('quiet', [False, True])
def test_warnings_of_libraries_do_not_flood_the_log(folder, start, quiet):
    first = os.path.join(folder, 'train/a/00.png')
    add_bad_profile(first)
    for i in range(13, 72):
        os.link(first, os.path.join(folder, 'train/b/{}.png'.format(i)))
    server = start('--data', folder, '--task', 'linear', '--batch', 72, '--image-size', 8,
                   '--workers', 2, *['--quiet'] * quiet)
    server.hello()
    for images, _ in server.pull_stream(0, 2, 6):
        assert (images[:, 0, 0, 0] == 0).sum() == 60
    server.drop_lifeline()
    code, errors = server.wait()
    lines = errors.splitlines()
    assert code == 0 and len(lines) == (0 if quiet else 12)
    for count, line in enumerate(lines[:10], 1):
        assert re.match('serve-data: {}/train/[ab]/[0-9]*.png: libpng warning: iCCP: .* '
                        '\\(number {}\\); the image is used$'.format(folder, count), line)
    assert lines[10:] == [] if quiet else ['serve-data: 20 images so far have such warnings',
                                           'serve-data: 40 images so far have such warnings']


def test_trainers_hear_of_unreadable_images_though_stderr_is_closed(folder, start):
    for name in ('a/03.png', 'b/12.png'):
        open(os.path.join(folder, 'train', name), 'w').close()
    server = start('--data', folder, '--task', 'moco-v2', '--batch', 13, '--workers', 1)
    server.process.stderr.close()
    server.process.stderr = None
    lines = server.connect()
    lines.readline()
    assert json.loads(lines.readline())['error'].startswith('2 of 13 images, more than 1 %')


def test_too_many_unreadable_images_end_the_server(folder, start):
    bad = [os.path.join(folder, 'train', name) for name in ('a/03.png', 'b/12\x1b.png')]
    for path in bad:
        open(path, 'w').close()
    server = start('--data', folder, '--task', 'moco-v2', '--batch', 13, '--workers', 1)
    lines = server.connect()
    lines.readline()
    error = json.loads(lines.readline())['error']
    assert error == ('2 of 14 images, more than 1 %, cannot be read: {}: is empty; {}: is empty'
                     .format(*bad).replace('\x1b', '?'))
    code, errors = server.wait()
    assert code == 1 and errors.splitlines()[-1] == 'serve-data: error: ' + error


def huge_jpeg():
    """631 bytes that declare 30,000 x 30,000 pixels, which OpenCV would decode in 5 GB."""
    small = cv2.imencode('.jpg', np.full((16, 16, 3), 99, np.uint8))[1].tobytes()
    at = small.index(b'\xff\xc0') + 5  # height and width in the frame's header
    return small[:at] + struct.pack('>HH', 30000, 30000) + small[at + 4:]


@pytest.fixture
def bad_folder(tmp_path):
    """train/a with 700 images, all flat and 50, and among them 7 that are none; these."""
    folder = tmp_path / 'root' / 'train' / 'a'
    (folder / 'folder.jpg').mkdir(parents=True)
    first = folder / 'folder.jpg' / 'image.png'
    cv2.imwrite(str(first), np.full((10, 12, 3), 50, np.uint8))
    for i in range(1, 693):
        os.link(str(first), str(folder / '{:03d}.png'.format(i)))
    with open(PHOTO, 'rb') as photo:
        cut_off = photo.read()[:-1000]
    bmp = cv2.imencode('.bmp', np.full((16, 16, 3), 99, np.uint8))[1].tobytes()
    bad = {'001empty.jpg': b'', '100text.JPEG': b'hello', '101gif.jpg': b'GIF89a\1\0\1\0\0\0\0;',
           '102cut_off.jpg': cut_off, '103cut_off.bmp': bmp[:-9], 'huge.jpg': huge_jpeg()}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / 'link.jpg').symlink_to(folder / 'nowhere')
    return str(tmp_path / 'root'), sorted(str(folder / name) for name in [*bad, 'link.jpg'])


# of those in bad_folder and 200.png
REASONS = ['is empty', 'is text, not an image',
           'is a GIF that cannot be decoded here',
           'is a JPEG that was cut off', 'is a BMP that cannot be decoded: image file is truncated '
           '(39 bytes not processed)', 'is empty', 'is a JPEG that cannot be decoded: Image size '
           '(900000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS '
           'attack.', 'No such file or directory']


def test_one_percent_of_unreadable_images_is_replaced(bad_folder, start):
    folder, bad = bad_folder
    server = start('--data', folder, '--task', 'linear', '--batch', 700, '--image-size', 8,
                   '--workers', 2)
    assert server.hello()['images'] == 700
    # an epoch from each worker
    for images, _ in server.pull_stream(0, 2, 2):
        assert len(images) == 700 and (images == 50).all()
    # they kept within their memory
    for pid in server.workers():
        with open('/proc/{}/status'.format(pid)) as status:
            peak, = [line.split()[1] for line in status if line.startswith('VmHWM:')]
        assert int(peak) < 2 * 2**20  # KiB
    server.drop_lifeline()
    code, errors = server.wait()
    assert code == 0 and [errors.count(path) for path in bad] == [1] * 7
    for path, reason in zip(bad, REASONS[:5] + REASONS[6:]):
        assert 'serve-data: cannot read {}: {} (number '.format(path, reason) in errors
    said = [line for line in errors.splitlines() if line.startswith('serve-data: ')]
    assert len(said) == 7 and '(number 7)' in said[6] and said == errors.splitlines()


def test_more_unreadable_images_end_the_server_with_a_list(bad_folder, start):
    folder, bad = bad_folder
    bad.append(os.path.join(folder, 'train/a/200.png'))
    os.unlink(bad[-1])
    open(bad[-1], 'w').close()
    server = start('--data', folder, '--task', 'moco-v2', '--batch', 700, '--workers', 1)
    lines = server.connect()
    lines.readline()
    error = json.loads(lines.readline())['error']
    expected = map(': '.join, zip(sorted(bad)[:6], REASONS))
    assert error == ('8 of 700 images, more than 1 %, cannot be read: ' + '; '.join(expected)
                     + '; and 2 more')
    code, errors = server.wait()
    assert code == 1 and errors.splitlines()[-1] == 'serve-data: error: ' + error


# --------------------------------------------------------------------- whose images are whose

# a job as the training scripts are one; it waits where the other one must be as far
JOB = '''
import sys
sys.path.insert(0, {!r})
from job import cores
cores.set_up(sys.argv[1:])
import numpy as np
from tensorpack import tfv1 as tf
import zmq_ops
from job import ranks, start
from job.server import DataServer

start.begin()
server = DataServer(ranks.private_folder() + '-train', {{
    'task': 'linear', 'data': 'images', 'batch': 4, 'image-size': 8}}, num_workers=2)
server.start()
images, _ = zmq_ops.ZMQPullSocket(
    server.end_points, [tf.uint8, tf.int32], hwm=1, bind=False, timeout={}).pull()
with tf.Session() as sess:
    for _ in range(2):
        print('here', flush=True)
        sys.stdin.readline()
        print(*{{value for _ in range(50) for value in np.unique(sess.run(images))}}, flush=True)
print('here', flush=True)
sys.stdin.readline()
server.stop()
'''.format(os.path.dirname(SERVER), 4 * PATIENCE)


def test_two_jobs_of_one_command_line_share_no_image(tmp_path):
    # the same folder for temporary files, the same command line, seed and all; but other folders
    # to start it in, and so other images
    tmp = tempfile.mkdtemp(prefix='t')  # short, for the paths of sockets
    jobs = []
    try:
        for value in (40, 200):
            folder = tmp_path / str(value) / 'images' / 'train' / 'a'
            folder.mkdir(parents=True)
            for i in range(8):
                cv2.imwrite(str(folder / '{}.png'.format(i)), np.full((9, 9, 3), value, np.uint8))
            jobs.append(subprocess.Popen(
                [sys.executable, '-c', JOB], cwd=str(tmp_path / str(value)), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, universal_newlines=True,
                env=dict(os.environ, TMPDIR=tmp, CUDA_VISIBLE_DEVICES='')))

        def go_on():
            for job in jobs:
                job.stdin.write('\n')
                job.stdin.flush()
            return [job.stdout.readline() for job in jobs]
        assert [job.stdout.readline() for job in jobs] == ['here\n'] * 2
        assert len(os.listdir(tmp)) == 2
        for _ in range(2):
            assert go_on() == ['40\n', '200\n']
            assert [job.stdout.readline() for job in jobs] == ['here\n'] * 2
        assert go_on() == ['', ''] and [job.wait(4 * PATIENCE) for job in jobs] == [0, 0]
        assert os.listdir(tmp) == []
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
        shutil.rmtree(tmp, ignore_errors=True)


NOBODY = 65534
CONNECT = '''
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
for path in sys.argv[2:]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        print('connected')
    except OSError as error:
        print(type(error).__name__)
'''


@pytest.mark.skipif(os.getuid() != 0, reason='only root can be another user')
def test_another_user_cannot_connect(folder, start, tmp_path):
    # in a folder that all can enter, with a mask that forbids nobody anything
    public = tempfile.mkdtemp(prefix='t')
    mask = os.umask(0)
    try:
        os.chmod(public, 0o777)
        server = start('--data', folder, '--task', 'linear', '--workers', 1,
                       '--address', public + '/private')
        server.address = public + '/private'
    finally:
        os.umask(mask)
    try:
        server.hello()
        server.pull(0, 0)
        sockets = [os.path.join(server.address, name) for name in ('control', 'rank0-worker0')]

        def connect(uid):
            return subprocess.check_output(
                [sys.executable, '-c', CONNECT, str(uid)] + sockets, cwd='/',
                universal_newlines=True, stderr=subprocess.STDOUT).split()
        assert connect(0) == ['connected'] * 2
        assert connect(NOBODY) == ['PermissionError'] * 2
    finally:
        server.drop_lifeline()
        server.wait()
        shutil.rmtree(public)


# --------------------------------------------------------------------------------------- bad input

def test_every_rank_learns_what_is_wrong_with_the_data(folder, start):
    os.mkdir(os.path.join(folder, 'train/c'))
    server = start('--data', folder, '--task', 'linear', '--ranks', '0,1', '--size', 2)
    message = 'there is no image in the class folder {}/train/c'.format(folder)
    first = server.connect()
    assert json.loads(first.readline()) == {'error': message}
    # it waits for the second
    second = server.connect()
    assert json.loads(second.readline()) == {'error': message}
    assert first.readline() == second.readline() == ''
    assert server.wait() == (1, 'serve-data: error: {}\n'.format(message))
    assert not os.path.exists(server.address)


def run(*flags):
    done = subprocess.run([sys.executable, SERVER] + list(flags), stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=PATIENCE)
    return done.returncode, done.stderr


def test_addresses_that_cannot_be_used(folder, tmp_path):
    flags = ['--data', folder, '--task', 'linear']
    long = str(tmp_path / ('x' * 100))
    code, errors = run('--address', long, *flags)
    assert code == 1 and 'can have 107 bytes' in errors and len(errors.splitlines()) == 1
    assert not os.path.exists(long)

    # somebody else's files stay
    used = tmp_path / 'used'
    used.mkdir(mode=0o700)
    (used / 'control').write_text('x')
    code, errors = run('--address', str(used), *flags)
    assert code == 1 and 'must be empty' in errors
    assert (used / 'control').read_text() == 'x'

    public = tmp_path / 'public'
    public.mkdir()
    public.chmod(0o755)
    code, errors = run('--address', str(public), *flags)
    assert code == 1 and 'mode 700' in errors


@pytest.mark.parametrize('flags, message', [
    (['--ranks', '0,2', '--size', '2'], '--ranks must be different numbers below --size 2'),
    (['--ranks', 'a'], '--ranks must be numbers'),
    (['--batch', '0'], '--batch must be at least 1, got 0'),
    (['--crop-area', '0.5', '0.2'], '--crop-area must be 0 < LO <= HI <= 1, got 0.5 0.2'),
    (['--seed', '-1'], '--seed must be'),
])
def test_bad_flags(tmp_path, flags, message):
    code, errors = run('--fake', '10', '--task', 'linear', '--address', str(tmp_path / 's'), *flags)
    assert code == 2 and message in errors.splitlines()[-1]


def test_too_few_open_files(tmp_path):
    command = 'ulimit -n 60; exec "$@"'
    done = subprocess.run(
        ['sh', '-c', command, 'sh', sys.executable, SERVER, '--fake', '10', '--task', 'linear',
         '--address', str(tmp_path / 's')],
        stderr=subprocess.PIPE, universal_newlines=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert '66 open files are needed, but the limit is 60' in done.stderr


def test_benchmark_tells_what_is_fed(folder):
    output = subprocess.check_output(
        [sys.executable, SERVER, '--benchmark', '--data', folder, '--task', 'moco-v2', '--batch',
         '4', '--image-size', '16', '--workers', '2', '--ranks', '0,1', '--size', '2'],
        universal_newlines=True, timeout=PATIENCE)
    numbers = [float(n) for n in re.findall(r'\d+(?:\.\d+)?', output)]
    rate, workers, _, _, _, limit, fed, ranks, images, minutes = numbers
    assert (workers, ranks, images) == (2, 2, 13) and rate > 0 and limit > 0
    assert fed == pytest.approx(rate / 2, abs=1)
    assert minutes == pytest.approx(13 / rate / 60, abs=0.1)


# --------------------------------------------------------------------------------------- the end

def start_two_ranks(folder, start, **kwargs):
    """A server, most of whose workers wait for a pull, its workers, and its two connections."""
    server = start('--data', folder, '--task', 'moco-v2', '--batch', 4, '--image-size', 16,
                   '--ranks', '0,1', '--size', 2, '--workers', 4, **kwargs)
    lines = [server.connect(), server.connect()]
    for line in lines:
        assert 'images' in json.loads(line.readline())
    workers = server.workers()
    assert len(workers) == 4
    server.pull(0, 0)
    return server, workers, lines


def assert_all_gone(server, workers):
    wait_until(lambda: not any(map(is_alive, workers)), PATIENCE)
    wait_until(lambda: not os.path.exists(server.address), PATIENCE)


def test_a_killed_worker_ends_everything(folder, start):
    server, workers, lines = start_two_ranks(folder, start)
    victim = sorted(workers)[2]
    os.kill(victim, signal.SIGKILL)
    for line in lines:
        error = json.loads(line.readline())['error']
        assert error == 'data worker 0 of rank 1 (pid {}) was killed by signal 9'.format(victim)
        assert line.readline() == ''
    assert server.wait() == (1, 'serve-data: error: {}\n'.format(error))
    assert_all_gone(server, workers)


def test_a_failing_worker_says_why(tmp_path, start):
    # one unreadable image is forgiven, but there is no other
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/1.png').write_bytes(b'')
    server = start('--data', tmp_path / 'images', '--task', 'moco-v2', '--workers', 1)
    lines = server.connect()
    lines.readline()
    error = json.loads(lines.readline())['error']
    assert error.startswith('data worker 0 of rank 0 (pid ')
    assert error.endswith(') failed: none of the 1 images can be read')
    code, errors = server.wait()
    assert code == 1 and errors.splitlines()[1:] == ['serve-data: error: ' + error]


def test_the_server_ends_with_its_lifeline(folder, start):
    server, workers, lines = start_two_ranks(folder, start)
    server.drop_lifeline()
    assert server.wait() == (0, '')
    assert_all_gone(server, workers)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_end_everything(folder, start, number):
    server, workers, lines = start_two_ranks(folder, start, lifeline=False)
    server.process.send_signal(number)
    message = 'the data server was ended by {}'.format(signal.Signals(number).name)
    assert [json.loads(line.readline()) for line in lines] == [{'error': message}] * 2
    assert server.wait()[0] == 128 + number
    assert_all_gone(server, workers)


def test_with_a_lifeline_signals_end_nothing(folder, start):
    server, workers, _ = start_two_ranks(folder, start)
    for number in signals.SIGNALS:
        for pid in [server.process.pid] + workers:
            os.kill(pid, number)
    # more than was ready before
    server.pull_stream(1, 2, 20)
    assert server.process.poll() is None and all(map(is_alive, workers))


def test_workers_and_folder_go_with_a_killed_server(folder, start):
    server, workers, lines = start_two_ranks(folder, start)
    server.process.kill()
    assert lines[0].readline() == ''
    assert_all_gone(server, workers)


def test_the_server_ends_when_all_trainers_are_gone(folder, start):
    server, workers, lines = start_two_ranks(folder, start)
    lines[0].close()
    server.connections[0].close()
    server.pull(1, 0)
    assert server.process.poll() is None and all(map(is_alive, workers))
    lines[1].close()
    server.connections[1].close()
    assert server.wait() == (0, '')
    assert_all_gone(server, workers)
# two passes over the same images, each with a server of its own in the same folder
PASSES = '''
import os
import sys
import time
sys.path.insert(0, {!r})
from job import cores
cores.set_up([])
from job import ranks, server, start

start.begin()
server.CLEAN_UP = server.CLEAN_UP.replace('read line;', 'read line; sleep 2;')
passes = server.DataServer(ranks.private_folder(), {{
    'task': 'eval', 'split': 'train', 'data': sys.argv[1], 'batch': 4, 'image-size': 8}}, 1)
for _ in range(2):
    assert passes.start()['images'] == 3
    time.sleep(3)
    assert os.path.isdir(passes.folder)
    passes.stop()
'''.format(os.path.dirname(SERVER))


def test_the_clean_up_of_a_server_spares_the_next_one(tmp_path):
    for i in range(3):
        (tmp_path / 'train' / str(i)).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / 'train' / str(i) / 'a.png'), np.zeros((9, 9, 3), np.uint8))
    process = subprocess.run(
        [sys.executable, '-c', PASSES, str(tmp_path)], stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, universal_newlines=True, timeout=4 * PATIENCE)
    assert process.returncode == 0, process.stderr
