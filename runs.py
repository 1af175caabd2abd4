"""A run on disk: its log folder, where it is continued from, and how long it is."""
import glob
import math
import os
import tempfile

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.callbacks import JSONWriter
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.utils import logger

import weights
from errors import UserError
from job import ranks

MARKER = 'resume-me'  # file in the log folder of a run that was asked to stop
STOPPED = 'stopped'  # in stats.json: that was not a whole epoch, or one without evaluation


def open_logdir(logdir: str) -> None:
    """Make the log folder and send the log there (rank 0)."""
    if hvd.rank() != 0:
        return
    try:
        os.makedirs(logdir, exist_ok=True)
        tempfile.TemporaryFile(dir=logdir).close()
    except OSError as error:
        raise UserError(f'--logdir {logdir}: cannot be written: {error.strerror}')
    for path in glob.glob(os.path.join(glob.escape(logdir), 'model-*.tempstate*')):
        os.remove(path)  # of a checkpoint that was being written when a run was killed
    logger.set_logger_dir(logdir, action='k')


def find_resume(logdir: str):
    """What a log folder has to continue from, as rank 0 sees it: (path of the newest checkpoint,
    its step). The path is None on other ranks, which get all variables from rank 0."""
    path = tf.train.latest_checkpoint(logdir) if hvd.rank() == 0 and os.path.isdir(logdir) else None
    steps = 0
    if path:
        counter = weights.read_weights(path, lambda name: name == 'global_step')
        if not counter:
            raise UserError(f'{path}: is of weights only, no run to continue: give it to --load, '
                            'and another --logdir')
        steps = int(counter['global_step'])
    return path, ranks.broadcast([steps])[0]


class Assign(SessionInit):
    """Starts from given values (dict of name -> array), and then runs given ops."""

    def __init__(self, values, ops=()):
        self._values, self._ops = values, list(ops)

    def _run_init(self, sess):
        assign(sess, self._values)
        sess.run(self._ops)


def resume(checkpoint: str) -> Assign:
    """Continues a run: the checkpoint must hold every variable of the graph, and nothing else."""
    return Assign(weights.load_weights(checkpoint, lambda name: True, tf.global_variables()))


def assign(sess, values: weights.Weights) -> None:
    """Give variables of the session's graph new values."""
    variables = [v for v in sess.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
                 if v.op.name in values]
    # through the initialisers, as Variable.load() does, without new ops: the graph may be final
    sess.run([v.initializer for v in variables],
             {v.initializer.inputs[1]: values[v.op.name] for v in variables})


def count_steps(args, num_images: int):
    """(steps in an epoch, after how many in all to stop), from the flags of a training."""
    steps_per_epoch = args.steps_per_epoch or num_images // args.batch
    if steps_per_epoch == 0:
        raise UserError(f'--data {args.data}: {num_images} images are less than one --batch of '
                        f'{args.batch}')
    total = int(round(args.epochs * steps_per_epoch))
    return steps_per_epoch, total if args.max_steps is None else min(args.max_steps, total)


def count_epochs(steps_per_epoch: int, steps_done: int, max_steps: int) -> int:
    """How many epochs a run that is continued has done to their very end, evaluation included: its
    stats.json has them, and does not say that it was stopped."""
    if steps_done % steps_per_epoch and steps_done < max_steps:
        return steps_done // steps_per_epoch
    complete, = ranks.broadcast([int(hvd.rank() == 0 and any(
        epoch['global_step'] == steps_done and STOPPED not in epoch
        for epoch in JSONWriter.load_existing_json() or []))])
    return max(0, math.ceil(steps_done / steps_per_epoch) - (not complete))


def divide_batch(batch: int, num_ranks: int) -> int:
    """The batch of one rank; a UserError if the ranks do not divide the total batch."""
    if batch % num_ranks:
        raise UserError(f'--batch {batch} (of all ranks together) cannot be divided between '
                        f'{num_ranks} ranks: take {nearest_multiples(batch, num_ranks)}')
    return batch // num_ranks


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of step around value, as words."""
    below = value // step * step
    return ' or '.join(str(v) for v in (below, below + step) if v > 0)
