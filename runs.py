"""A run on disk: its log folder, where it is continued from, and how long it is."""
import contextlib
import fcntl
import glob
import json
import math
import os
import re
import socket
import tempfile

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.utils import logger

import checkpoints
import weights
from errors import UserError
from job import ranks

MARKER = 'resume-me'  # file in the log folder of a run that was asked to stop
STOPPED = 'stopped'  # in stats.json: that was not a whole epoch, or one without evaluation
STATS = 'stats.json'
LOCK = 'lock'
# what was being written when a run was killed
UNFINISHED = re.compile(r'model-\d+\.\S+\.tempstate\d+$|\.\d+-(stats\.json|checkpoint)$')


# ---- the log folder

def open_logdir(logdir: str):
    """Make the log folder and send the log there (rank 0). Returns its lock, which holds for as
    long as the caller keeps it, and ends with this process."""
    if hvd.rank() != 0:
        return None
    try:
        os.makedirs(logdir, exist_ok=True)
        tempfile.TemporaryFile(dir=logdir).close()
    except OSError as error:
        raise UserError(f'--logdir {logdir}: cannot be written: {error.strerror}')
    for name in (LOCK, STATS, MARKER, 'checkpoint', 'log.log'):
        path = os.path.join(logdir, name)
        if os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(f'{path}: is no file, but one of that name is to be written')
    lock = lock_folder(logdir)
    for entry in list(os.scandir(logdir)):
        if UNFINISHED.match(entry.name) and entry.is_file(follow_symlinks=False):
            os.remove(entry.path)
    logger.set_logger_dir(logdir, action='k')
    set_damaged_aside(os.path.join(logdir, STATS))
    return lock


def lock_folder(logdir):
    """Locks of the folder and of a file in it, which the system drops when the process ends,
    however it ends. The file says whose they are; it may be removed, NFS cannot lock a folder."""
    path, locks, problems = os.path.join(logdir, LOCK), contextlib.ExitStack(), []
    try:
        file = locks.enter_context(open(path, 'a+'))
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror}')
    folder = os.open(logdir, os.O_RDONLY)
    locks.callback(os.close, folder)
    for descriptor in (folder, file):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            locks.close()
            raise UserError(f'--logdir {logdir}: is in use by another job ({owner})')
        except OSError as error:
            problems.append(error.strerror)
    if len(problems) == 2:
        logger.warn(f'--logdir {logdir}: its disk has no locks ({problems[1]}): see that no two '
                    'jobs write there')
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    return locks


def read_stats(path: str) -> list:
    """The epochs, dicts, in a stats.json; [] if there is none. A ValueError if it is damaged."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        epochs = json.load(f)
    if not isinstance(epochs, list) or not all(
            isinstance(epoch, dict) and isinstance(epoch.get('global_step'), int)
            for epoch in epochs):
        raise ValueError('is no list of epochs')
    return epochs


def set_damaged_aside(path):
    """A stats.json that cannot be read (a full disk, a crash of the host) gets another name."""
    try:
        read_stats(path)
    except ValueError as error:
        number = 1
        while os.path.exists(f'{path}.damaged-{number}'):
            number += 1
        os.replace(path, f'{path}.damaged-{number}')
        logger.warn(f'{path} cannot be read ({error}): it is {path}.damaged-{number} now, and the '
                    'curves of this run begin anew')


# ---- where a run is continued from

def find_resume(logdir: str):
    """What a log folder has to continue from, as rank 0 sees it: (path of the newest checkpoint
    that can be read, its step). The path is None on other ranks, which get all variables from rank
    0. A UserError if there is something, but nothing to continue from: it would be written over."""
    path, steps = _find_readable(logdir) if hvd.rank() == 0 else (None, 0)
    return path, ranks.broadcast([steps])[0]


def _find_readable(logdir):
    latest = checkpoints.find_latest(logdir)
    older = [path for path in reversed(checkpoints.list_numbered(logdir)) if path != latest]
    for path in [latest] * (latest is not None) + list(filter(checkpoints.is_whole, older)):
        try:
            values = weights.read_weights(path)  # all of it: a part may be damaged
        except UserError as error:
            logger.warn(f'{error}; an older one is looked for')
            continue
        if 'global_step' not in values:
            raise UserError(f'{path}: is of weights only, no run to continue: give it to --load, '
                            'and another --logdir')
        return path, int(values['global_step'])
    # what has no index was being written when its run was killed
    found = [os.path.basename(path) for pattern in ('*.index', STATS + '.damaged-*')
             for path in sorted(glob.glob(os.path.join(glob.escape(logdir), pattern)))][:6]
    epochs = read_stats(os.path.join(logdir, STATS))
    found += [f'{STATS} of {len(epochs)} epochs'] * bool(epochs)
    found += ['the file checkpoint'] * bool(checkpoints.list_kept(logdir))
    if found:
        raise UserError(f'--logdir {logdir}: has no checkpoint that can be read, but '
                        f'{", ".join(found)}, which a new run would write over: mend that, or take '
                        'another folder')
    return None, 0


class Assign(SessionInit):
    """Starts from given values (dict of name -> array), and then runs given ops."""

    def __init__(self, values, ops=()):
        self._values, self._ops = values, list(ops)

    def _run_init(self, sess):
        assign(sess, self._values)
        sess.run(self._ops)


def resume(checkpoint: str) -> Assign:
    """Continues a run: the checkpoint must hold every variable of the graph, and nothing else."""
    return Assign(weights.load_weights(
        checkpoint, lambda name: name != weights.NETWORK, tf.global_variables()))


def assign(sess, values: weights.Weights) -> None:
    """Give variables of the session's graph new values."""
    variables = [v for v in sess.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
                 if v.op.name in values]
    # through the initialisers, as Variable.load() does, without new ops: the graph may be final
    sess.run([v.initializer for v in variables],
             {v.initializer.inputs[1]: values[v.op.name] for v in variables})


# ---- how long a run is

def count_steps(args, num_images: int):
    """(steps in an epoch, after how many in all to stop), from the flags of a training."""
    steps_per_epoch = args.steps_per_epoch or num_images // args.batch
    if steps_per_epoch == 0:
        raise UserError(f'--data {args.data}: {num_images} images are less than one --batch of '
                        f'{args.batch}')
    total = int(round(args.epochs * steps_per_epoch))
    if total == 0:
        raise UserError(f'--epochs {args.epochs:g}: is less than half a step of {steps_per_epoch} '
                        'in an epoch (--max-steps 0 writes initial weights)')
    return steps_per_epoch, total if args.max_steps is None else min(args.max_steps, total)


def count_epochs(steps_per_epoch: int, steps_done: int, max_steps: int) -> int:
    """How many epochs a run that is continued has done to their very end, evaluation included: its
    stats.json has them, and does not say that it was stopped. Warns if its epochs were others."""
    epochs = read_stats(os.path.join(logger.get_logger_dir(), STATS)) if hvd.rank() == 0 else []
    ends = {epoch['epoch_num']: epoch['global_step'] for epoch in epochs if epoch.get('epoch_num')}
    others = [end // number for number, end in ends.items() if end > number * steps_per_epoch
              or end < number * steps_per_epoch and number < max(ends)]  # the last may not be whole
    if others:
        logger.warn(f'the epochs of this run had {others[-1]} steps, now they have '
                    f'{steps_per_epoch}: --batch, or the number of images, is another one; the '
                    'schedule goes on as if it had always been so')
    if steps_done % steps_per_epoch and steps_done < max_steps:
        return steps_done // steps_per_epoch
    complete, = ranks.broadcast([int(hvd.rank() == 0 and any(
        epoch['global_step'] == steps_done and STOPPED not in epoch for epoch in epochs))])
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
