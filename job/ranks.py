"""What all ranks do together: the one place that runs collectives, each counted as a barrier
(heartbeat.py), and its errors explained (shutdown.py)."""
import os
import tempfile
from typing import List

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import tfv1 as tf

from errors import UserError, one_line
from job import cores, heartbeat
from job.shutdown import shutdown
from job.start import session_config


def run_together(sess, fetches, feeds=None, what='evaluation'):
    """session.run of fetches with a collective among them; `what` begins the line about errors."""
    heartbeat.reach_barrier()
    with shutdown.explain(what):
        return sess.run(fetches, feeds)


def run_alone(sess, fetches, feeds=None, what='evaluation'):
    """session.run without a collective, one of many between two barriers."""
    with shutdown.explain(what):
        result = sess.run(fetches, feeds)
    heartbeat.finish_work()
    return result


class Gather:
    """hvd.allgather for arrays with rows of one dtype and shape; its graph is built at once."""

    def __init__(self, dtype, shape: List[int]):
        self._input = tf.placeholder(dtype, [None] + shape)
        self._output = hvd.allgather(self._input) if hvd.size() > 1 else self._input

    def __call__(self, sess, values: np.ndarray) -> np.ndarray:
        """Rows of this rank -> rows of all ranks, in their order."""
        return values if hvd.size() == 1 else run_together(
            sess, self._output, {self._input: values})


def gather(integers: List[int]) -> List[List[int]]:
    """The lists of all ranks, equally long, before there is a session to train in."""
    if hvd.size() == 1:
        return [integers]
    heartbeat.reach_barrier()
    # the first session of a process decides how many threads there are within an op
    config = session_config(cores.num_threads())
    with tf.Graph().as_default(), tf.Session(config=config) as sess:
        try:
            return sess.run(hvd.allgather(tf.constant([integers], tf.int64))).tolist()
        except tf.errors.OpError as error:  # another rank has failed
            raise UserError(one_line(error))


def broadcast(integers: List[int]) -> List[int]:
    """Rank 0's list, before there is a session to train in."""
    return gather(integers)[0]


def broadcast_text(text: str) -> str:
    """Rank 0's text, likewise."""
    words = text.encode()
    length, = broadcast([len(words)])
    return bytes(broadcast(list(words[:length].ljust(length)))).decode()


def private_folder() -> str:
    """Agree on a path that no other job has; every host has a folder of its own there."""
    token = bytes(broadcast(list(os.urandom(8))))
    return os.path.join(tempfile.gettempdir(), 'moco-' + token.hex())


def compare_digests(digest: str) -> None:
    """A UserError if the hosts have different images: each rank takes its part of one list."""
    digests = gather([int(digest[:15], 16)])
    different = ', '.join(str(rank) for rank, x in enumerate(digests) if x != digests[0])
    if different:
        raise UserError(f'--data holds other images on the hosts of the ranks {different} than on '
                        'that of rank 0')
