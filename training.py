"""What both training scripts share: a Horovod trainer with an ordered step, and its callbacks."""
import contextlib
import functools
import glob
import math
import operator
import os
import shutil
import sys
import time

import horovod.tensorflow as hvd
import numpy as np
from tensorflow.python.ops import math_ops
from tensorpack import tfv1 as tf
from tensorpack.callbacks import (
    Callback, JSONWriter, ModelSaver, MonitorBase, ScalarPrinter, TFEventWriter)
from tensorpack.callbacks.steps import MaintainStepCounter
from tensorpack.input_source import StagingInput, TensorInput
from tensorpack.tfutils.sesscreate import NewSessionCreator
from tensorpack.tfutils.sessinit import SaverRestore, SessionInit
from tensorpack.train import HorovodTrainer
from tensorpack.utils import logger

import checkpoints
import heartbeat
import launch
import resnet
import zmq_ops

MARKER = 'resume-me'  # file in the log folder of a run that was asked to stop
STOPPED = 'stopped'  # in stats.json: that was not a whole epoch, or one without evaluation
TELL = 60  # seconds between two lines about a long epoch


class Trainer(HorovodTrainer):
    """HorovodTrainer whose one session.run a step happens in a defined order.

    Gradients from the old weights, then the weights, then `updates_after_weights()`, then the step
    counter, so that whatever reads the counter inside the step (schedule, permutation) reads the
    number of steps done before it. At the end of every epoch all variables are broadcast from rank
    0 (tensorpack's BROADCAST_EVERY_EPOCH), which is what gives every rank the same BN statistics
    before anything is evaluated or saved.

    Each step also tells every rank whether any of them has been asked to stop. So all stop after
    the same step, with a checkpoint of it.

    Args:
        ending: a launch.Ending.
        config: the tf.ConfigProto to run with.
        updates_after_weights: a function without arguments that builds and returns ops.
    """

    def __init__(self, ending, config, updates_after_weights=lambda: []):
        # tensorpack 0.11 takes TensorFlow 1's names from whichever TensorFlow there is
        sys.modules[HorovodTrainer.__module__].tf = tf
        super().__init__(average=True)
        self._ending, self._config, self._updates_after_weights = (
            ending, config, updates_after_weights)

    def register_callback(self, callback):
        if isinstance(callback, MaintainStepCounter):
            callback = CountStepLast()
        return self._register_callback(callback)

    def _setup_graph(self, input, get_cost_fn, get_opt_fn):
        with gradients_summed_in_pairs():
            callbacks = super()._setup_graph(input, get_cost_fn, get_opt_fn)
        bn_updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        with tf.control_dependencies([self.train_op]):
            updates = self._updates_after_weights()
        self.train_op = tf.group(self.train_op, *(bn_updates + updates))
        self._asked = tf.placeholder(tf.float32, [])
        self._any_asked = (hvd.allreduce(self._asked, op=hvd.Sum) if hvd.size() > 1 else
                           tf.identity(self._asked))
        return callbacks

    def initialize(self, session_creator, session_init):
        super().initialize(session_creator, session_init)
        self._ending.session = self.sess

    def broadcast(self, _):
        heartbeat.meet()
        super().broadcast(_)

    def run_step(self):
        heartbeat.meet()
        self._ending.steps_begun, self._ending.resumable = self.global_step + 1, 'step'
        with self._ending.explain('step {}'.format(self._ending.steps_begun)):
            _, stop = self.hooked_sess.run(
                [self.train_op, self._any_asked], {self._asked: bool(self._ending.asked)})
        self._ending.unmark()
        if stop:
            self._stop()

    def _stop(self):
        """Write what belongs to the end of an epoch, but do not evaluate: there are seconds."""
        self._ending.resumable = 'writing'
        self.monitors.put_scalar(STOPPED, 1)
        for callback in self._callbacks.cbs:
            if isinstance(callback, Save):
                callback.trigger()
        for callback in self._callbacks.cbs:
            if isinstance(callback, (EpochMeans, Speed, MonitorBase)):
                callback.trigger_epoch()
        launch.broadcast([0])  # rank 0 has written
        self._ending.end_to_resume()
        raise SystemExit(self._ending.code)

    def run(self, callbacks, session_init, steps_per_epoch, steps_done, max_steps):
        """Train until `max_steps` steps have been done in all.

        If the run that this one continues was ended while it evaluated, that is done again.

        Args:
            callbacks: besides the usual ones (console, stats.json, TensorBoard). Save goes before
                those that evaluate.
            session_init: what gives the variables their first values, on rank 0; the others get
                them from there.
            steps_per_epoch: an epoch is that many steps; the last one may be shorter.
            steps_done: by the run that this one continues.
        """
        monitors = [TFEventWriter(), Statistics(), ScalarPrinter()] if hvd.rank() == 0 else []
        epochs_done = count_epochs(steps_per_epoch, steps_done, max_steps)
        self._ending.steps_begun = steps_done
        if hvd.rank() == 0:
            self._ending.marker = os.path.join(logger.get_logger_dir(), MARKER)
        try:
            with self._ending.explain('training'):
                self.train_with_defaults(
                    callbacks=[AlignEpochs(steps_per_epoch, max_steps)] + callbacks,
                    extra_callbacks=[], monitors=monitors,
                    session_creator=SessionCreator(self._config),
                    session_init=session_init if hvd.rank() == 0 else None,
                    steps_per_epoch=steps_per_epoch,
                    starting_epoch=epochs_done + 1,
                    max_epoch=math.ceil(max_steps / steps_per_epoch))
        except resnet.WeightsError as error:
            launch.fail(error)
        self._ending.resumable = None
        self._ending.exit_if_ended()
        self._ending.unmark()


@contextlib.contextmanager
def gradients_summed_in_pairs():
    """While the graph is built, TensorFlow sums gradients with Add, not AddN.

    For each input of an AddN, Intel's TensorFlow 1.15 loses 1.8 KB whenever it runs: of ResNet-18
    that was 0.2 MB a step. No flag of its own avoids AddN.
    """
    add_n = math_ops.add_n
    math_ops.add_n = lambda inputs, name=None: functools.reduce(operator.add, inputs)
    try:
        yield
    finally:
        math_ops.add_n = add_n


class SessionCreator(NewSessionCreator):
    """Keeps the configuration it is given, of which HorovodTrainer would overwrite the threads."""

    def __init__(self, config):
        super().__init__()
        self._given = config

    def create_session(self):
        self.config = self._given
        return super().create_session()


class CountStepLast(MaintainStepCounter):
    """The step counter goes up when the rest of the train op has happened."""

    def _setup_graph(self):
        tf.train.get_or_create_global_step()
        with tf.control_dependencies([self.trainer.train_op]):
            super()._setup_graph()


class AlignEpochs(Callback):
    """Epochs end at multiples of steps_per_epoch, also after resuming in the middle of one or (with
    no steps) at its end, and at max_steps."""

    _chief_only = False

    def __init__(self, steps_per_epoch, max_steps):
        self._steps_per_epoch, self._max_steps = steps_per_epoch, max_steps

    def _before_epoch(self):
        end = min(self.epoch_num * self._steps_per_epoch, self._max_steps)
        self.trainer.loop.steps_per_epoch = end - self.global_step


class EpochMeans(Callback):
    """Puts the mean over the epoch's steps of some scalars into the log;
    stops at the step where one is not finite.

    Args:
        tensors: dict of name -> scalar tensor, fetched with the train op.
        ending: a launch.Ending.
    """
    _chief_only = False

    def __init__(self, tensors, ending):
        self._tensors, self._ending = tensors, ending

    def _before_epoch(self):
        self._values = {name: [] for name in self._tensors}
        self._told = time.time()

    def _before_run(self, _):
        return tf.train.SessionRunArgs(self._tensors)

    def _after_run(self, _, run_values):
        for name, value in run_values.results.items():
            self._values[name].append(value)
            if not np.isfinite(value):
                self._ending.end(
                    '{} is {} at step {}: stopped; checkpoints are of earlier steps'.format(
                        name, value, self.global_step))
                raise SystemExit(1)
        if time.time() > self._told + TELL:
            self._told = time.time()
            means = ', '.join('{} {:.4g}'.format(*mean) for mean in self._means())
            logger.info('step {}, means of this epoch: {}'.format(self.global_step, means))

    def _means(self):
        return [(name, np.mean(values)) for name, values in self._values.items() if values]

    def _trigger_epoch(self):
        for name, mean in self._means():
            self.trainer.monitors.put_scalar(name, mean)


class Statistics(JSONWriter):
    """Writes stats.json, and goes on with what is there of the steps that have been done.

    JSONWriter would begin anew when a run goes on in the middle of an epoch.
    """

    def _before_train(self):
        self._fname = os.path.join(logger.get_logger_dir(), self.FILENAME)
        self._stats = [epoch for epoch in read_statistics()
                       if epoch['global_step'] <= self.global_step]
        self._trigger()


def read_statistics():
    """What stats.json in the log folder holds: list of dicts."""
    return JSONWriter.load_existing_json() or []


class Speed(Callback):
    """Puts images/s of all ranks, and the share of the time that steps waited for data,
    into the log.

    Args:
        batch: images of all ranks in a step.
        waited: a scalar tensor, seconds that have been spent waiting, or None.
    """

    def __init__(self, batch, waited=None):
        self._batch, self._waited = batch, waited

    def _read_waited(self):
        return 0. if self._waited is None else self.trainer.sess.run(self._waited)

    def _before_epoch(self):
        self._steps = self._seconds = 0
        self._waited_before = None

    def _before_run(self, _):
        self._start = time.time()

    def _after_run(self, _, __):
        # the first step of an epoch, with the pipeline and kernels cold, is left out
        if self._waited_before is None:
            self._waited_before = self._read_waited()
            return
        self._steps += 1
        self._seconds += time.time() - self._start

    def _trigger_epoch(self):
        if self._steps:
            put = self.trainer.monitors.put_scalar
            put('images_per_second', self._steps * self._batch / self._seconds)
            put('data_wait', (self._read_waited() - self._waited_before) / self._seconds)


class Save(ModelSaver):
    """ModelSaver, but weights that are not finite are not saved, and a checkpoint that cannot be
    written ends the run instead of being forgotten.

    Args:
        ending: a launch.Ending.
    """
    _chief_only = False

    def __init__(self, ending, max_to_keep):
        super().__init__(max_to_keep=max_to_keep)
        self._ending = ending

    def _setup_graph(self):
        if hvd.rank() != 0:
            return
        super()._setup_graph()
        self._finite = {v.op.name: tf.reduce_all(tf.math.is_finite(v.read_value()))
                        for v in tf.global_variables() if v.dtype.base_dtype.is_floating}

    def _trigger_epoch(self):
        self._ending.resumable = 'writing'
        self._trigger()
        self._ending.has_written()

    def _trigger(self):
        if hvd.rank() != 0:
            return
        wrong = [name for name, finite in self.trainer.sess.run(self._finite).items() if not finite]
        if wrong:
            self._ending.end('{} is not finite after step {}: stopped; checkpoints are of earlier '
                             'steps'.format(wrong[0], self.global_step))
            raise SystemExit(1)
        try:
            path = self.saver.save(
                self.trainer.sess, self.path, global_step=tf.train.get_global_step(),
                write_meta_graph=False)
        except tf.errors.CancelledError:
            raise  # the session was closed meanwhile
        except (OSError, tf.errors.OpError) as error:
            self._ending.end(
                'cannot write a checkpoint to {}, on whose disk {:.1f} MB are free: {}'.format(
                    self.checkpoint_dir, shutil.disk_usage(self.checkpoint_dir).free / 2**20,
                    error if isinstance(error, OSError) else checkpoints.tell_error(error)))
            raise SystemExit(1)
        logger.info('saved {}'.format(path))

    def _before_train(self):
        # ModelSaver would write a meta graph, which nothing here reads
        if self.trainer.max_epoch == 0:
            self._trigger()  # no steps were asked for, but the initial weights are of use


class PullInput(TensorInput):
    """Batches from a data server, through the pull op.

    Args:
        end_points: of the server.
        timeout: seconds to wait for a batch.
    """

    def __init__(self, end_points, timeout):
        self._end_points, self._timeout = end_points, timeout
        super().__init__(lambda: self._socket.pull())

    def _setup(self, signature):
        super()._setup(signature)
        self._socket = zmq_ops.ZMQPullSocket(
            self._end_points, [s.dtype for s in signature], bind=False,
            shapes=[s.shape for s in signature], timeout=self._timeout)

    def waited(self):
        return self._socket.waited()


def staged_if(use_gpu, source):
    """On a GPU, copy the next batch to it while this one is computed."""
    return StagingInput(source) if use_gpu else source


class FakeInput(TensorInput):
    """The same random images at every step, to measure the speed of training alone."""

    def __init__(self):
        def images():
            with tf.variable_scope('fake'):
                return [tf.get_variable(
                    s.name, trainable=False, collections=[tf.GraphKeys.LOCAL_VARIABLES],
                    use_resource=True, initializer=tf.cast(
                        tf.random.uniform(s.shape, 0, 255, tf.int32), s.dtype)).read_value()
                        for s in self._spec]
        super().__init__(images)


class Resume(SaverRestore):
    """Continues a run: every variable of the graph from a checkpoint,
    which must hold exactly these.

    Raises:
        resnet.WeightsError: the checkpoint is not of this network and optimizer.
    """

    def _setup_graph(self):
        resnet.check_weights(self.path, resnet.read_weights(self.path), tf.global_variables())
        super()._setup_graph()


class Assign(SessionInit):
    """Starts from given values, and runs given ops.

    Args:
        values: dict of name -> array.
        ops: run afterwards.
    """

    def __init__(self, values, ops=()):
        self._values, self._ops = values, list(ops)

    def _run_init(self, sess):
        resnet.assign(sess, self._values)
        sess.run(self._ops)


def add_arguments(group, epochs, crop_area):
    """The flags of any training's recipe; epochs and crop_area are its published values."""
    group.add_argument('--epochs', type=float, default=epochs,
                       help='length of the schedule in epochs (default: {})'.format(epochs))
    group.add_argument('--steps-per-epoch', type=int, metavar='N',
                       help='steps in an epoch (default: number of images / total batch)')
    group.add_argument('--batch', type=int, default=256,
                       help='images in a step, of all ranks together (default: 256)')
    group.add_argument('--crop-area', type=float, nargs=2, default=crop_area,
                       metavar=('MIN', 'MAX'),
                       help='share of the image that a crop covers (default: {:g} {:g})'.format(
                           *crop_area))


def check_arguments(parser, args, *positive):
    """End with an error unless what is given with all trainings' flags, and `positive`, can be."""
    launch.check_positive(parser, args, 'batch', 'epochs', 'steps_per_epoch', 'workers',
                          'stall_limit', 'width', 'image_size', *positive)
    if not 0 < args.crop_area[0] <= args.crop_area[1] <= 1:
        parser.error('--crop-area {} {}: needs 0 < MIN <= MAX <= 1'.format(*args.crop_area))


def count_steps(args, images):
    """How long to train.

    Args:
        args: with --steps-per-epoch, --batch, --epochs, --max-steps and --data.
        images: number of those.

    Returns:
        (steps in an epoch, after how many in all to stop)
    """
    steps_per_epoch = args.steps_per_epoch or images // args.batch
    if steps_per_epoch == 0:
        launch.fail('--data {}: {} images are less than one --batch of {}'.format(
            args.data, images, args.batch))
    total_steps = int(round(args.epochs * steps_per_epoch))
    return (steps_per_epoch,
            total_steps if args.max_steps is None else min(args.max_steps, total_steps))


def count_epochs(steps_per_epoch, steps_done, max_steps):
    """How many epochs have been done to their very end, evaluation included, by a run that is
    continued: its stats.json has them, and does not say that it was stopped."""
    if steps_done % steps_per_epoch and steps_done < max_steps:
        return steps_done // steps_per_epoch
    complete, = launch.broadcast([int(hvd.rank() == 0 and any(
        epoch['global_step'] == steps_done and STOPPED not in epoch
        for epoch in read_statistics()))])
    return max(0, math.ceil(steps_done / steps_per_epoch) - (not complete))


def divide_batch(batch, ranks):
    """The batch of one rank.

    Raises:
        ValueError: the ranks do not divide the total batch.
    """
    if batch % ranks:
        raise ValueError(
            '--batch {} (of all ranks together) cannot be divided between {} ranks: take {}'.format(
                batch, ranks, nearest_multiples(batch, ranks)))
    return batch // ranks


def nearest_multiples(value, step):
    """The multiples of step around value, as words."""
    below = value // step * step
    return ' or '.join(str(v) for v in (below, below + step) if v > 0)


def find_resume(logdir):
    """What a log folder has to continue from, as rank 0 sees it: its folder may be on another host.

    Returns:
        (path of the newest checkpoint or None, steps done by it). The path is for rank 0, from
        which the others get all variables.

    Raises:
        resnet.WeightsError: the checkpoint is not of a run.
    """
    path = tf.train.latest_checkpoint(logdir) if hvd.rank() == 0 and os.path.isdir(logdir) else None
    steps = 0
    if path:
        counter = resnet.read_weights(path, lambda name: name == 'global_step')
        if not counter:
            raise resnet.WeightsError(
                '{}: is of weights only, no run to continue: give it to --load, and another '
                '--logdir'.format(path))
        steps = int(counter['global_step'])
    return path, launch.broadcast([steps])[0]


def open_logdir(logdir):
    """Make the log folder and send the log there (rank 0);
    a folder that cannot be written is an error."""
    if hvd.rank() != 0:
        return
    try:
        os.makedirs(logdir, exist_ok=True)
        probe = os.path.join(logdir, '.writable')
        open(probe, 'w').close()
        os.remove(probe)
    except OSError as error:
        launch.fail('--logdir {}: cannot be written: {}'.format(logdir, error.strerror))
    for path in glob.glob(os.path.join(glob.escape(logdir), 'model-*.tempstate*')):
        os.remove(path)  # of a checkpoint that was being written when a run was killed
    logger.set_logger_dir(logdir, action='k')
