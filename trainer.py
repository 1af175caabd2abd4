"""The trainer: a model's train op again and again."""
import math
import os

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.callbacks import Callback, MonitorBase, ScalarPrinter, TFEventWriter
from tensorpack.callbacks.steps import MaintainStepCounter
from tensorpack.tfutils.sesscreate import NewSessionCreator
from tensorpack.train import Trainer as TensorpackTrainer
from tensorpack.utils import logger

import runs
from callbacks import EpochMeans, Save, ShowProgress, Speed, Statistics
from job import ranks
from job.shutdown import shutdown


class Trainer(TensorpackTrainer):
    """Runs model.build_graph's op, one session.run a step.

    Each step also tells every rank whether any of them has been asked to stop. So all stop after
    the same step, with a checkpoint of it.

    Args:
        model: a tensorpack.ModelDesc, whose build_graph also makes model.monitored, a dict of
            name -> scalar tensor.
        source, waited: see inputs.create_source().
        config: the tf.ConfigProto to run with.
    """

    def __init__(self, model, source, waited, config):
        super().__init__()
        self.is_chief, self._config = hvd.rank() == 0, config
        self.register_callback(source.setup(model.get_input_signature()))
        self.train_op = model.build_graph(*source.get_input_tensors())
        self._means = EpochMeans(model.monitored)
        self._batch = model.batch_size * hvd.size()
        self._speed = Speed(self._batch, tf.constant(0.) if waited is None else waited)
        self._asked = tf.placeholder(tf.float32, [])
        any_asked = hvd.allreduce(self._asked, op=hvd.Sum) if hvd.size() > 1 else self._asked
        with tf.control_dependencies([self.train_op]):
            self._step = tf.identity(any_asked)  # StagingInput takes no mixture of ops and tensors

    def register_callback(self, callback):
        return super().register_callback(
            FollowStepCounter() if isinstance(callback, MaintainStepCounter) else callback)

    def initialize(self, session_creator, session_init):
        # of all variables, those of callbacks too
        self._broadcast = hvd.broadcast_global_variables(0) if hvd.size() > 1 else tf.no_op()
        super().initialize(session_creator, session_init)
        shutdown.session = self.sess
        self.broadcast()

    def broadcast(self):
        """Give every rank rank 0's variables: at the start, and before anything is evaluated or
        saved, since BN statistics differ between ranks until then."""
        ranks.run_together(self.sess, self._broadcast, what='training')

    def run_step(self):
        number = self.global_step + 1
        shutdown.begin_step(number)
        stop = ranks.run_together(self.hooked_sess, self._step,
                                  {self._asked: bool(shutdown.asked)}, what=f'step {number}')
        shutdown.unmark()
        if stop:
            self._stop()

    def _stop(self):
        """Write what belongs to the end of an epoch, but do not evaluate: there are seconds."""
        shutdown.phase = 'saving'
        self._callbacks.after_epoch()
        self.monitors.put_scalar(runs.STOPPED, 1)
        for callback in self._callbacks.cbs:
            if isinstance(callback, Save):
                callback.trigger()
        for callback in self._callbacks.cbs:
            if isinstance(callback, (EpochMeans, Speed, MonitorBase)):
                callback.trigger_epoch()
        ranks.broadcast([0])  # rank 0 has written
        shutdown.end_to_resume()
        raise SystemExit(shutdown.code)

    def run(self, callbacks, session_init, steps_per_epoch, steps_done, max_steps):
        """Train until `max_steps` steps have been done in all; the last epoch may be shorter.

        Args:
            callbacks: besides the usual ones (means, speed, console, stats.json, TensorBoard). Save
                goes before those that evaluate.
            session_init: gives rank 0's variables their first values; rank 0 gives them to others.
            steps_done: by the run that this one continues. If that was ended while it evaluated,
                the evaluation is done again.
        """
        if max_steps and steps_done >= max_steps:
            logger.warn(f'this run has done all its {max_steps} steps: nothing is left to train')
        monitors = [TFEventWriter(), Statistics(), ScalarPrinter()] if self.is_chief else []
        epochs_done = runs.count_epochs(steps_per_epoch, steps_done, max_steps)
        shutdown.step = steps_done
        if self.is_chief:
            shutdown.marker = os.path.join(logger.get_logger_dir(), runs.MARKER)
        session_creator = NewSessionCreator()
        session_creator.config = self._config  # as an argument, it would be warned of
        with shutdown.explain('training'):
            self.train(
                [AlignEpochs(steps_per_epoch, max_steps), self._means, self._speed,
                 ShowProgress(self._means, self._batch, steps_per_epoch, max_steps), *callbacks],
                monitors, session_creator, session_init, steps_per_epoch, epochs_done + 1,
                max_epoch=math.ceil(max_steps / steps_per_epoch))
        shutdown.phase = None
        shutdown.exit_if_ended()
        shutdown.unmark()


class FollowStepCounter(MaintainStepCounter):
    """The train op counts steps; this only tells the trainer."""

    def _setup_graph(self):
        tf.train.get_or_create_global_step()

    def _before_run(self, _):
        return None


class AlignEpochs(Callback):
    """Epochs end at multiples of steps_per_epoch, also after resuming in the middle of one or (with
    no steps) at its end, and at max_steps; and with the same variables on all ranks."""
    _chief_only = False

    def __init__(self, steps_per_epoch, max_steps):
        self._steps_per_epoch, self._max_steps = steps_per_epoch, max_steps

    def _before_epoch(self):
        end = min(self.epoch_num * self._steps_per_epoch, self._max_steps)
        self.trainer.loop.steps_per_epoch = end - self.global_step

    def _trigger_epoch(self):
        self.trainer.broadcast()
