"""What a session computes on: batches of a data server, fake ones, and passes for evaluation."""
import contextlib
from typing import Optional

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.input_source import StagingInput, TensorInput

import data
import image_lists
import zmq_ops
from errors import UserError
from job import ranks
from job.progress import Progress
from job.server import DataServer
from job.shutdown import shutdown


def pull_socket(server: DataServer, signature) -> zmq_ops.ZMQPullSocket:
    """Where batches of these tf.TensorSpecs come from."""
    return zmq_ops.ZMQPullSocket(
        server.end_points, [s.dtype for s in signature], bind=False,
        shapes=[s.shape for s in signature], timeout=shutdown.stall_limit)


def create_source(signature, server: Optional[DataServer], gpus: int):
    """A tensorpack.InputSource of batches, and the seconds that it has waited for data (a scalar
    tensor, or None); with a GPU, the next batch comes while this one is computed, and stays on the
    host, where moco.shuffle() permutes images. Without a server, images are random and the same at
    every step: to measure the speed of training alone."""
    def fake_batch():
        with tf.device('/cpu:0'), tf.variable_scope('fake'):
            return [tf.get_variable(
                s.name, trainable=False, collections=[tf.GraphKeys.LOCAL_VARIABLES],
                use_resource=True, initializer=tf.cast(
                    tf.random.uniform(s.shape, 0, 255, tf.int32), s.dtype)).read_value()
                    for s in signature]
    socket = server and pull_socket(server, signature)
    source = TensorInput(socket.pull if server else fake_batch)
    return StagingInput(source, device='/cpu:0') if gpus else source, socket and socket.waited()


class EvaluationPass:
    """A pass over labelled images, each exactly once, divided between all ranks: validation, or the
    bank of kNN. It may be run again and again; each run has a server of its own.

    Args:
        folder, num_workers, cpus: for DataServer.
        root, split: folder of images, and 'train' or 'val'.
        image_size, batch: S, and n, images of a rank in a step; the last step has fewer.

    Attributes:
        images, labels: what is to be evaluated, uint8 tensor [n, S, S, 3] and int32 tensor [n].
    """

    def __init__(self, folder, root, split, image_size, batch, num_workers=None, cpus=None,
                 task='eval'):
        self._split, self._batch = split, batch
        self._server = DataServer(folder, {
            'task': task, 'data': root, 'split': split, 'image-size': image_size, 'batch': batch,
        }, num_workers, cpus)
        self.images, self.labels = pull_socket(self._server, [
            tf.TensorSpec([None, image_size, image_size, 3], tf.uint8),
            tf.TensorSpec([None], tf.int32)]).pull()

    def run(self, sess, fetches):
        """Start the server and yield the value of `fetches` for every batch of this rank."""
        num_images = self._server.start()['images']
        batches = data.num_bounded_batches(hvd.rank(), hvd.size(), self._batch, num_images)
        images = len(range(hvd.rank(), num_images, hvd.size()))  # of this rank
        with contextlib.closing(Progress()) as progress:
            progress.begin(f'images of {self._split}/', images)
            for i in range(data.num_turns(batches, self._server.workers_per_rank)):
                result = ranks.run_alone(sess, fetches if i < batches else self.labels)
                if i < batches:
                    progress.update(min((i + 1) * self._batch, images))
                    yield result
        self._server.stop()


def check_labelled(root: str) -> None:
    """A UserError unless root has labelled images, train and val, for every rank."""
    for split in ('train', 'val') if hvd.rank() == 0 else ():
        images = image_lists.list_images(root, split, labelled=True)
        if len(images.files) < hvd.size():
            raise UserError(f'{root}/{split}: {len(images.files)} images for {hvd.size()} ranks')
        if len(images.classes) < 2:
            raise UserError(f'{root}/train: has one class only, {images.classes[0]}: nothing could '
                            'be told apart')
