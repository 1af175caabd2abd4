#!/usr/bin/env python
"""What tools/make_env.sh ends with: does all that was installed load, and work together?

    .venv-tf2/bin/python tools/check_env.py [--nccl]

With --nccl Horovod must have been built for GPUs, which can be checked without one: NCCL and CUDA
are in it, no symbol is missing, and it finds its libraries wherever the environment is.
"""
import ctypes
import glob
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cv2  # noqa: E402,F401
import horovod.tensorflow as hvd  # noqa: E402
import matplotlib  # noqa: E402,F401
import msgpack_numpy  # noqa: E402,F401
import psutil  # noqa: E402,F401
import tabulate  # noqa: E402,F401
import termcolor  # noqa: E402,F401
import zmq  # noqa: E402,F401
from tensorpack import tfv1 as tf  # noqa: E402

from zmq_ops import ZMQPullSocket  # noqa: E402


def check_session():
    hvd.init()
    with tf.Graph().as_default():  # (executed eagerly, the pull would wait for a message)
        ZMQPullSocket('ipc:///tmp/make-env-check', [tf.float32]).pull()
        y = hvd.allreduce(tf.reduce_sum(tf.ones([2, 3])), op=hvd.Sum)
        with tf.Session() as sess:
            total = sess.run(y)
    assert total == 6 * hvd.size(), total


def check_nccl():
    assert hvd.cuda_built() and hvd.nccl_built(), 'Horovod lacks CUDA or NCCL'
    library, = glob.glob(os.path.join(os.path.dirname(hvd.__file__), 'mpi_lib*.so'))
    # TensorFlow loads it with symbols that are looked up when they are needed: with NOW, all are
    ctypes.CDLL(library, mode=os.RTLD_NOW)
    dynamic = subprocess.check_output(['readelf', '-d', library], universal_newlines=True)
    folders = [line.split('[')[1].rstrip(']') for line in dynamic.splitlines() if 'PATH)' in line]
    folders = ':'.join(folders).split(':')
    for folder in folders:
        assert not folder.startswith(tempfile.gettempdir()), f'{folder} in RUNPATH'
    print(f'NCCL {hvd.nccl_built()}, RUNPATH {":".join(folders)}')


if __name__ == '__main__':
    check_session()
    if '--nccl' in sys.argv[1:]:
        check_nccl()
    print('all of it works')
