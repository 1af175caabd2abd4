#!/usr/bin/env python
"""From data workers to tensors in a TensorFlow session: serve-data.py against tensorpack's chain.

    python benchmarks/transport.py    # 1 and 2 workers; 3 minutes

No image is decoded or augmented: serve-data.py copies its --fake images to where views would be
made, and the map function of tensorpack's MultiProcessMapAndBatchDataZMQ, behind which is
send_dataflow_zmq(format='zmq_ops'), returns a constant. Two views of 224 pixels in batches of 32,
pulled by the same op. In turns, each with a process for the server and one for the session, and
measured when all queues have been filled once; printed are images/s, the milliseconds of cores that
a batch takes in the session's process and in all of the server's, and the medians of the ratios of
neighbours: of images/s, of which the claim is at least 3, and of images for the same time of cores,
on which other jobs have little influence.
"""
import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

BENCHMARKS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(BENCHMARKS))

SIZE, BATCH = 224, 32
TENSORPACK_BUFFER = 5  # messages in each socket of send_dataflow_zmq and of the op
WARM_UP = 50  # batches, more than all queues hold


# ---------------------------------------------------------------- the process of the session

def pull(server, workers, seconds):
    """Print images/s that a session pulls from 'ours' or 'tensorpack', and ms of cores a batch."""
    from job import cores
    cores.set_up([])  # before TensorFlow is loaded, which reads what this sets

    import psutil
    from tensorpack import tfv1 as tf

    import zmq_ops
    from job import start

    threads, _ = start.begin()
    with {'ours': serve_ours, 'tensorpack': serve_tensorpack}[server](workers) as where:
        batch = zmq_ops.ZMQPullSocket(shapes=[[BATCH, SIZE, SIZE, 3]] * 2,
                                      types=[tf.uint8] * 2, timeout=120, **where).pull()
        step = tf.group(*batch)
        with tf.Session(config=start.session_config(threads)) as sess:
            for _ in range(WARM_UP):
                sess.run(step)
            began, steps, before = time.time(), 0, cores_used(psutil.Process())
            while time.time() < began + seconds:
                sess.run(step)
                steps += 1
            rate = steps * BATCH / (time.time() - began)
            used = [1000 * (b - a) / steps for a, b in zip(before, cores_used(psutil.Process()))]
            print('measured', rate, *used)


def cores_used(process):
    """Seconds of cores that a process has used, and all those below it: (float, float)."""
    def used(p):
        times = p.cpu_times()
        return times.user + times.system
    return used(process), sum(map(used, process.children(recursive=True)))


@contextlib.contextmanager
def serve_ours(workers):
    """Arguments of the pull op, as a trainer has them, while a server runs."""
    from job import ranks
    from job.server import DataServer
    server = DataServer(ranks.private_folder(), {
        'task': 'moco-v2', 'fake': 1281167, 'batch': BATCH, 'image-size': SIZE}, workers)
    server.start()
    yield dict(end_point=server.end_points, bind=False)
    server.stop()


@contextlib.contextmanager
def serve_tensorpack(workers):
    """Arguments of the pull op, as tensorpack's ZMQInput has them, while a server runs."""
    with tempfile.TemporaryDirectory() as folder:
        address = f'ipc://{folder}/batches'
        process = run('send_dataflow', address, workers)
        try:
            yield dict(end_point=address, hwm=TENSORPACK_BUFFER, bind=True)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # and its workers
            process.wait()


# --------------------------------------------------------------- the process of tensorpack's server

def send_dataflow(address, workers):
    """Never returns."""
    import numpy as np
    from tensorpack.dataflow import DataFromGenerator, MultiProcessMapAndBatchDataZMQ
    from tensorpack.dataflow.remote import send_dataflow_zmq

    views = list(np.random.RandomState(0).randint(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8))
    flow = MultiProcessMapAndBatchDataZMQ(
        DataFromGenerator(lambda: ([i] for i in range(1281167))), workers,
        lambda datapoint: views, BATCH, buffer_size=BATCH * 10)
    send_dataflow_zmq(flow, address, hwm=TENSORPACK_BUFFER, format='zmq_ops')


# -------------------------------------------------------------------------------------- measuring

def run(function, *args, **kwargs):
    """Start a function of this file in a process, and process group, of its own."""
    code = f'import transport; transport.{function}(*{args!r})'
    return subprocess.Popen([sys.executable, '-c', code], cwd=BENCHMARKS, start_new_session=True,
                            stderr=subprocess.DEVNULL, universal_newlines=True, **kwargs)


def measure(workers, seconds, rounds):
    ratios = []
    for _ in range(rounds):
        rates, used = [], []
        for server, name in (('ours', 'serve-data.py'), ('tensorpack', 'tensorpack')):
            output, _ = run('pull', server, workers, seconds,
                            stdout=subprocess.PIPE).communicate()
            rate, session, served = map(float, output.split('measured')[1].split())
            rates.append(rate)
            used.append(session + served)
            print(f'{workers} worker(s), {name}: {rate:.0f} images/s; ms of cores a batch: session '
                  f'{session:.2f}, server {served:.2f}', flush=True)
        ratios.append([rates[0] / rates[1], used[1] / used[0]])
    for ratio, what in zip(zip(*ratios), ('images/s', 'images for the same time of cores')):
        print(f'{workers} worker(s): {statistics.median(ratio):.2f} times as many {what} as '
              f'tensorpack ({min(ratio):.2f} to {max(ratio):.2f} in {rounds} rounds)', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=5, help='of each measurement (default: 5)')
    parser.add_argument('--rounds', type=int, default=5, help='of each side (default: 5)')
    parser.add_argument('--workers', type=int, nargs='+', default=[1, 2], help='default: 1 2')
    args = parser.parse_args()
    for workers in args.workers:
        measure(workers, args.seconds, args.rounds)
