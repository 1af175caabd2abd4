"""What test_horovod.py runs on every rank: three steps of MoCo, and what each rank then holds.

    horovodrun -np 2 python tests/horovod_ranks.py FOLDER    # writes FOLDER/rank0.npz,
                                                             # FOLDER/rank1.npz
"""
import os
import sys

import horovod.tensorflow as hvd
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tensorpack import tfv1 as tf  # noqa: E402
from tensorpack.callbacks import Callback  # noqa: E402
from tensorpack.input_source import TensorInput  # noqa: E402
from tensorpack.utils import logger  # noqa: E402

import launch  # noqa: E402
import main_moco  # noqa: E402
import resnet  # noqa: E402
import training  # noqa: E402

BATCH, SIZE, QUEUE, STEPS = 4, 16, 24, 3  # of one rank


class Record(Callback):
    """Keeps this rank's variables after each step, and after the broadcast that ends the epoch."""
    _chief_only = False

    def __init__(self, results):
        self._results = results

    def _setup_graph(self):
        self._variables = {v.op.name: v for v in tf.global_variables()}

    def _keep(self, when):
        for name, value in self.trainer.sess.run(self._variables).items():
            self._results[when + ':' + name] = value

    def _after_run(self, _, __):
        self._keep('step{}'.format(self.global_step))

    def _trigger_epoch(self):
        self._keep('epoch')


def my_images():
    """[BATCH, SIZE, SIZE, 3], other ones on each rank and in each step; twice."""
    step = tf.cast(tf.train.get_or_create_global_step(), tf.int32)
    return [tf.cast(255 * tf.random.stateless_uniform(
        [BATCH, SIZE, SIZE, 3], [hvd.rank() + 2 * i, step]), tf.uint8) for i in range(2)]


def main(folder):
    _, ending, _ = launch.begin()
    logger.set_logger_dir(os.path.join(folder, 'log{}'.format(hvd.rank())), action='d')
    results = {}

    # shuffling: an image is its number everywhere
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        model = main_moco.MOCOModel(None, BATCH, seed=5)
        numbers = tf.range(BATCH) + BATCH * hvd.rank()
        shuffled, unshuffle = model.shuffle(tf.tile(numbers[:, tf.newaxis, tf.newaxis], [1, 2, 2]))
        back = unshuffle(shuffled)
        with tf.Session(config=launch.session_config(1)) as sess:
            for i in range(10):
                global_step.load(i, sess)
                results['shuffled{}'.format(i)], results['back{}'.format(i)] = sess.run(
                    [shuffled, back])

    # steps, from weights that differ between the ranks before the first broadcast
    tf.set_random_seed(hvd.rank())
    net = resnet.ResNet(18, 8, '3x3s2')
    model = main_moco.MOCOModel(
        net, BATCH, feature_dim=16, queue_size=QUEUE, momentum=0.9, image_size=SIZE)
    trainer = training.Trainer(ending, launch.session_config(1),
                               lambda: model.updates_after_weights())
    trainer.setup_graph(model.get_input_signature(), TensorInput(my_images),
                        model.build_graph, model.get_optimizer)
    start = training.Assign({}, model.copy_to_key_encoder())
    trainer.run([Record(results)], start, steps_per_epoch=STEPS, steps_done=0, max_steps=STEPS)
    np.savez(os.path.join(folder, 'rank{}.npz'.format(hvd.rank())), **results)


if __name__ == '__main__':
    main(sys.argv[1])
