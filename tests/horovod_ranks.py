"""What test_horovod.py runs on every rank: shuffling, three steps of MoCo, and what each rank
then holds and logs.

    horovodrun -np 2 python tests/horovod_ranks.py FOLDER shuffle train    # FOLDER/rank0.npz,
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

import resnet  # noqa: E402
import runs  # noqa: E402
from job import start  # noqa: E402
from moco import MOCOModel, allgather  # noqa: E402
from trainer import Trainer  # noqa: E402

BATCH, SIZE, QUEUE, STEPS = 4, 16, 24, 3  # of one rank


class Record(Callback):
    """Keeps this rank's variables after each step, and after the broadcast that ends the epoch;
    what is monitored, of each step, and what the monitors get, when the epoch ends."""
    _chief_only = False

    def __init__(self, results, monitored):
        self._results, self._monitored = results, monitored

    def _setup_graph(self):
        self._variables = {v.op.name: v for v in tf.global_variables()}

    def _keep(self, when):
        for name, value in self.trainer.sess.run(self._variables).items():
            self._results[when + ':' + name] = value

    def _before_run(self, _):
        return tf.train.SessionRunArgs(self._monitored)

    def _after_run(self, _, run_values):
        self._keep('step{}'.format(self.global_step))
        for name, value in run_values.results.items():
            self._results[f'monitored{self.global_step}:{name}'] = value

    def _trigger_epoch(self):
        self._keep('epoch')
        for name in self._monitored:
            self._results['logged:' + name] = self.trainer.monitors.get_latest(name)


def my_images():
    """[BATCH, SIZE, SIZE, 3], other ones on each rank and in each step; twice."""
    step = tf.cast(tf.train.get_or_create_global_step(), tf.int32)
    return [tf.cast(255 * tf.random.stateless_uniform(
        [BATCH, SIZE, SIZE, 3], [hvd.rank() + 2 * i, step]), tf.uint8) for i in range(2)]


class Allgather(MOCOModel):
    """Shuffles by giving every rank's images to every rank."""

    def shuffle(self, images):
        n, N = self.batch_size, self.batch_size * hvd.size()
        step = tf.cast(tf.train.get_or_create_global_step(), tf.int32)
        order = tf.argsort(
            tf.random.stateless_uniform([N], seed=[self.seed, step]), stable=True)  # [N]
        mine = order[n * hvd.rank():][:n]  # [n]
        return (tf.gather(allgather(images), mine),
                lambda results: tf.gather(
                    allgather(results), tf.math.invert_permutation(order)))


def shuffle(results):
    """Shuffle numbered images and real ones in ten steps, the latter by Allgather too."""
    global_step = tf.train.get_or_create_global_step()
    model = MOCOModel(None, BATCH, seed=5)
    numbers = tf.range(BATCH) + BATCH * hvd.rank()
    # an image is its number everywhere
    shuffled, unshuffle = model.shuffle(tf.tile(numbers[:, tf.newaxis, tf.newaxis], [1, 2, 2]))
    results['collectives'] = [op.type for op in shuffled.graph.get_operations()
                              if op.type.startswith('Horovod')]
    fetches = {'shuffled': shuffled, 'back': unshuffle(shuffled)}

    images, keys = my_images()[0], tf.random.stateless_normal([BATCH, 5], [7, hvd.rank()])
    for name, cls in (('', MOCOModel), ('expected_', Allgather)):
        fetches[name + 'images'], unshuffle = cls(None, BATCH, seed=5).shuffle(images)
        fetches[name + 'keys'] = unshuffle(keys)

    trained = tf.ones([BATCH, 2])
    results['no_gradient'] = tf.gradients(model.shuffle(trained)[0], trained) == [None]
    with tf.Session(config=start.session_config(1)) as sess:
        for i in range(10):
            global_step.load(i, sess)
            for name, value in sess.run(fetches).items():
                results['{}{}'.format(name, i)] = value


def train(results):
    """Train from weights that differ between the ranks before the first broadcast."""
    tf.set_random_seed(hvd.rank())
    net = resnet.ResNet(18, 8, '3x3s2')
    model = MOCOModel(
        net, BATCH, feature_dim=16, queue_size=QUEUE, momentum=0.9, image_size=SIZE)
    trainer = Trainer(model, TensorInput(my_images), None, start.session_config(1))
    trainer.run([Record(results, model.monitored)],
                runs.Assign({}, model.copy_to_key_encoder()),
                steps_per_epoch=STEPS, steps_done=0, max_steps=STEPS)


def main(folder, *parts):
    start.begin()
    logger.set_logger_dir(os.path.join(folder, 'log{}'.format(hvd.rank())), action='d')
    results = {}
    if 'shuffle' in parts:
        with tf.Graph().as_default():
            shuffle(results)
    if 'train' in parts:
        train(results)
    np.savez(os.path.join(folder, 'rank{}.npz'.format(hvd.rank())), **results)


if __name__ == '__main__':
    main(*sys.argv[1:])
