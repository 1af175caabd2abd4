"""The files of TensorFlow's checkpoints: which a folder has, which are whole, and the newest.

A checkpoint model-123 is the files model-123.index and model-123.data-00000-of-00001.
"""
import contextlib
import glob
import json
import logging
import os
import re
import tempfile
from typing import Iterator, List, Optional

import outputs
from errors import UserError


def find_latest(folder: str) -> Optional[str]:
    """The newest whole checkpoint of a folder, whatever its file `checkpoint` says. (TensorFlow's
    own function believes that, and finds nothing in a folder with brackets in its name.)"""
    numbered = [path for path in list_numbered(folder) if is_whole(path)]
    named = (list_kept(folder) or [''])[-1]
    latest = numbered[-1] if numbered else named if is_whole(named) else None
    if latest and latest != named:
        logging.getLogger('tensorpack').warning(
            f'{folder}: its file "checkpoint" ' + (f'names {named}' if named else 'says nothing') +
            f'; {latest} is the newest one that is whole')
    return latest


def list_numbered(folder: str) -> List[str]:
    """Every checkpoint of a folder that has a number (model-123), the oldest first."""
    paths = [path[:-len('.index')]
             for path in glob.glob(os.path.join(glob.escape(folder), '*.index'))
             if re.search(r'-\d+\.index$', path)]
    return sorted(paths, key=lambda path: int(path.rsplit('-', 1)[1]))


def is_whole(path: str) -> bool:
    """Whether all files of a checkpoint are there."""
    # not PART.tempstate123, which is there while TensorFlow writes it, or if it was killed then
    parts = glob.glob(glob.escape(path) + '.data-?????-of-?????')
    return (os.path.isfile(path + '.index') and parts != []
            and len(parts) == int(parts[0].rsplit('-', 1)[1]))


@contextlib.contextmanager
def plain_name(path: str) -> Iterator[str]:
    """A name of a checkpoint by which TensorFlow can read it: that takes brackets, stars and the
    like for a pattern."""
    if not re.search(r'[][*?\\]', path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in glob.glob(glob.escape(path) + '.*'):
            os.symlink(os.path.abspath(file), os.path.join(folder, 'model' + file[len(path):]))
        yield os.path.join(folder, 'model')


def list_kept(folder: str) -> List[str]:
    """What the run in a folder has written there and not removed, as the file `checkpoint` says,
    the oldest first; [] if that is missing or damaged."""
    with contextlib.suppress(ValueError):  # TensorFlow 2.21's, of an empty file
        state = import_tensorflow('reading', folder).train.get_checkpoint_state(folder)
        if state and state.model_checkpoint_path:
            # of this folder, whatever it was called when TensorFlow wrote that
            return [os.path.join(folder, os.path.basename(path))
                    for path in state.all_model_checkpoint_paths]
    return []


def write_pointer(paths: List[str]) -> None:
    """Write the file `checkpoint` of a folder: the last of these is what the folder means, and all
    were written there by one run. (Without the folder's path, so that it can be moved.)"""
    lines = ['model_checkpoint_path: ' + json.dumps(os.path.basename(paths[-1]))] + [
        'all_model_checkpoint_paths: ' + json.dumps(os.path.basename(path)) for path in paths]
    with outputs.replace(os.path.join(os.path.dirname(paths[-1]), 'checkpoint')) as temporary:
        with open(temporary, 'w') as f:
            f.write('\n'.join(lines) + '\n')


def remove(path: str) -> None:
    # without its index, the rest is no checkpoint
    for file in [path + '.index'] + glob.glob(glob.escape(path) + '.data-*-of-*'):
        with contextlib.suppress(FileNotFoundError):
            os.remove(file)


def import_tensorflow(doing: str, path: str):
    """TensorFlow; `doing` and `path` are for the message if it is missing."""
    try:
        from tensorpack import tfv1
        return tfv1
    except ImportError:
        raise UserError(
            f'{doing} {path}, a checkpoint of TensorFlow, needs TensorFlow and Tensorpack')
