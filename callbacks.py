"""Callbacks of any training: means, speed, progress, checkpoints and statistics."""
import json
import os
import shutil
import time

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import tfv1 as tf
from tensorpack.callbacks import Callback, JSONWriter, ModelSaver
from tensorpack.utils import logger

import checkpoints
import network
import outputs
import runs
from errors import UserError, one_line
from job import ranks
from job.progress import Progress, format_seconds
from job.shutdown import shutdown


class EpochMeans(Callback):
    """Logs the mean of some scalars (dict of name -> tensor) over the steps of an epoch and over
    all ranks; stops at the step where one is not finite."""
    _chief_only = False

    def __init__(self, tensors):
        self._tensors, self._gather = tensors, ranks.Gather(tf.float64, [len(tensors)])

    def _before_epoch(self):
        self._sum, self._steps = np.zeros(len(self._tensors)), 0

    def _before_run(self, _):
        return tf.train.SessionRunArgs(list(self._tensors.values()))

    def _after_run(self, _, run_values):
        self._sum += run_values.results
        self._steps += 1
        for name, value in zip(self._tensors, run_values.results):
            if not np.isfinite(value):
                raise UserError(f'{name} is {value} at step {self.global_step}: stopped; '
                                'checkpoints are of earlier steps')

    def so_far(self, name):
        """A mean of this epoch on this rank."""
        return self._sum[list(self._tensors).index(name)] / self._steps

    def _trigger_epoch(self):
        if self._steps:
            means = self._sum[np.newaxis] / self._steps  # [1, tensors]
            means = self._gather(self.trainer.sess, means).mean(axis=0)  # of all ranks
            for name, mean in zip(self._tensors, means):
                self.trainer.monitors.put_scalar(name, mean)


class Speed(Callback):
    """Logs images/s, all ranks' `batch` being that of a step, and the share of the time that steps
    waited for data; `waited` is a scalar tensor, the seconds that have been spent waiting."""

    def __init__(self, batch, waited):
        self._batch, self._waited = batch, waited

    def _before_epoch(self):
        self._seconds = []  # of each step

    def _before_run(self, _):
        self._start = time.time()

    def _after_run(self, _, __):
        self._seconds.append(time.time() - self._start)
        if len(self._seconds) == 1:
            self._waited_before = self.trainer.sess.run(self._waited)

    def _trigger_epoch(self):
        seconds = self._seconds[1:]  # in the first step of an epoch, pipeline and kernels are cold
        if seconds:
            waited = self.trainer.sess.run(self._waited) - self._waited_before
            put = self.trainer.monitors.put_scalar
            put('images_per_second', len(seconds) * self._batch / sum(seconds))
            put('data_wait', waited / sum(seconds))


class ShowProgress(Callback):
    """Shows steps of the epoch, loss, images/s, and the time left of the epoch and the run.

    Args:
        means: an EpochMeans.
        batch: that of a step of all ranks.
        steps_per_epoch, max_steps: see Trainer.run().
    """

    def __init__(self, means, batch, steps_per_epoch, max_steps):
        self._means, self._batch = means, batch
        self._steps_per_epoch, self._max_steps = steps_per_epoch, max_steps
        self._between = []  # seconds between epochs, of evaluation
        self._progress, self._ended = Progress(), None

    def _before_epoch(self):
        if self._ended is not None:
            self._between.append(time.time() - self._ended)
        self._first = (self.epoch_num - 1) * self._steps_per_epoch
        self._progress.begin(f'epoch {self.epoch_num}/{self.trainer.max_epoch}',
                             min(self._steps_per_epoch, self._max_steps - self._first))

    def _trigger_step(self):
        self._progress.update(self.global_step - self._first, self._describe)

    def _describe(self, pace):
        words = [f'loss {self._means.so_far("loss"):.4g}']
        if pace is not None:
            epochs = self.trainer.max_epoch - self.epoch_num + 1  # this one too
            left = (pace * (self._max_steps - self.global_step) +
                    epochs * (np.mean(self._between) if self._between else 0))
            words += [f'{self._batch / pace:.0f} images/s', f'run: {format_seconds(left)} left']
        return ', '.join(words)

    def _after_epoch(self):
        self._ended = time.time()
        self._progress.end()

    def _after_train(self):  # after an error too
        self._progress.close()


class Save(ModelSaver):
    """Writes a checkpoint after every epoch, and keeps the newest ones. Weights that are not finite
    are not saved; a checkpoint that cannot be written ends the run (ModelSaver would go on)."""
    _chief_only = False

    def __init__(self, max_to_keep):
        super().__init__(
            max_to_keep, var_collections=[tf.GraphKeys.GLOBAL_VARIABLES, network.COLLECTION])

    def _setup_graph(self):
        if hvd.rank() != 0:
            return
        super()._setup_graph()
        self._kept = checkpoints.list_kept(self.checkpoint_dir)
        self._finite = {v.op.name: tf.reduce_all(tf.math.is_finite(v.read_value()))
                        for v in tf.global_variables() if v.dtype.base_dtype.is_floating}

    def _before_train(self):
        # ModelSaver would write a meta graph, which nothing here reads
        if self.trainer.max_epoch == 0:
            self._trigger()  # no steps were asked for, but the initial weights are of use

    def _trigger_epoch(self):
        with shutdown.checkpoint():
            self._trigger()

    def _trigger(self):
        if hvd.rank() != 0:
            return
        wrong = [name for name, finite in self.trainer.sess.run(self._finite).items() if not finite]
        if wrong:
            raise UserError(f'{wrong[0]} is not finite after step {self.global_step}: stopped; '
                            'checkpoints are of earlier steps')
        try:
            if not os.path.isdir(self.checkpoint_dir):
                logger.warn(f'{self.checkpoint_dir} was moved or removed: it is made anew')
                os.makedirs(self.checkpoint_dir)
            path = self.saver.save(
                self.trainer.sess, self.path, global_step=tf.train.get_global_step(),
                write_meta_graph=False, write_state=False)
            # not the saver's: that does not find files in a folder with brackets in its name, and
            # forgets, as a run is continued, what it has kept
            kept = [other for other in self._kept if other != path] + [path]
            surplus, self._kept = kept[:-self._max_to_keep], kept[-self._max_to_keep:]
            checkpoints.write_pointer(self._kept)
            for other in surplus:
                checkpoints.remove(other)
        except tf.errors.CancelledError:
            raise  # the session was closed meanwhile
        except (OSError, tf.errors.OpError) as error:
            free = shutil.disk_usage(self.checkpoint_dir).free / 2**20
            reason = error if isinstance(error, OSError) else one_line(error)
            raise UserError(f'cannot write a checkpoint to {self.checkpoint_dir}, on whose disk '
                            f'{free:.1f} MB are free: {reason}')
        logger.info(f'saved {path}')


class Statistics(JSONWriter):
    """Writes stats.json, and goes on with what is there of the steps that have been done;
    JSONWriter would begin anew when a run goes on in the middle of an epoch."""

    def _before_train(self):
        self._fname = os.path.join(logger.get_logger_dir(), runs.STATS)
        self._stats = [epoch for epoch in runs.read_stats(self._fname)
                       if epoch['global_step'] <= self.global_step]
        self._trigger()

    def _write_stat(self):
        try:
            with outputs.replace(self._fname) as temporary, open(temporary, 'w') as f:
                json.dump(self._stats, f)
        except OSError as error:
            logger.warn(f'cannot write {self._fname}: {error.strerror}')
