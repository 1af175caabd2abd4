"""Weights: what their names mean, the files that hold them, and strict loading.

Weights are a dict of the names of the released MoCo weights (conv0/W, group0/block0/conv1_bn/gamma,
linear0_128/b, momentum_encoder/..., queue, queue_ptr; linear/W and linear/b are a classifier) ->
array. Nothing in a file is executed when it is read. Only checkpoints of TensorFlow need it.
"""
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from typing import Callable, Dict, Iterable, List, Tuple

import numpy as np

import checkpoints
from errors import UserError, enumerate_some

Weights = Dict[str, np.ndarray]
Predicate = Callable[[str], bool]  # on names
PYTORCH_MAGIC = pickle.dumps(0x1950a86a20f9469cfc6c, protocol=2)  # first in files before 1.6
NETWORK = 'network'  # name, in a file, of read_network()'s JSON as uint8 [bytes]
CONVERT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tools', 'convert_checkpoint.py')


def is_slot(name: str) -> bool:
    """Whether this is an optimizer's slot: its name is that of a variable, and goes on."""
    return re.search('/(W|b|gamma|beta|EMA)/', name) is not None


def is_backbone(name: str) -> bool:
    """Whether this variable belongs to the (query) ResNet, not to a head or the key encoder."""
    return re.match(r'(conv0|group\d+/)', name) is not None and not is_slot(name)


def is_head(name: str) -> bool:
    """Whether this variable belongs to the (query) contrastive head."""
    return re.match(r'linear\d+_', name) is not None and not is_slot(name)


def is_model(name: str) -> bool:
    """Whether this variable belongs to the model, not to an optimizer or the counter of steps."""
    return not is_slot(name) and name not in (
        'global_step', 'beta1_power', 'beta2_power', NETWORK)


def head_dims(names: Iterable[str]) -> List[int]:
    """The dimensions of a head's layers: [128] for v1, [2048, 128] for v2, [] without a head."""
    layers = re.findall(r'^linear(\d+)_(\d+)/W$', '\n'.join(names), re.MULTILINE)
    return [int(dim) for _, dim in sorted(layers)]


def load_weights(path: str, wanted: Predicate, variables) -> Weights:
    """Read the wanted weights (is_backbone, say); they must be exactly the wanted variables."""
    weights = read_weights(path, wanted)
    check_weights(path, weights, [v for v in variables if wanted(v.op.name)])
    return weights


def check_weights(path: str, weights: Weights, variables) -> None:
    """A UserError that lists variables that are missing, left over, of another shape, or without
    meaning."""
    problems = compare(weights, {v.op.name: tuple(v.shape.as_list()) for v in variables})
    if problems:
        raise UserError(f'{path}: does not fit this network (other depth, width, stem, recipe or '
                        'script?): ' + enumerate_some(problems, '; '))
    problems = find_dead(weights)
    if problems:
        raise UserError(f'{path}: is of a network that computes nothing: '
                        + enumerate_some(problems, '; '))


def find_dead(weights: Weights) -> List[str]:
    """Which weights are no numbers, not finite in float32, or a layer of zeros: sentences."""
    sentences = []
    for name, array in sorted(weights.items()):
        with np.errstate(over='ignore'):
            if array.dtype.kind not in 'fiub':
                sentences.append(f'{name} is no array of numbers')
            elif not np.isfinite(array.astype(np.float32)).all():
                sentences.append(f'{name} is not finite')
            elif name.endswith('/W') and not array.any():
                sentences.append(f'{name} is zero')
    return sentences


def compare(weights: Weights, shapes: Dict[str, tuple]) -> List[str]:
    """What is wrong with weights that should have these shapes: sentences."""
    return (
        [f'{name} is missing' for name in sorted(set(shapes) - set(weights))] +
        [f'{name} has no place here' for name in sorted(set(weights) - set(shapes))] +
        [f'{name} has shape {weights[name].shape} where {shapes[name]} is needed'
         for name in sorted(set(shapes) & set(weights)) if weights[name].shape != shapes[name]])


def find_checkpoint(path: str) -> str:
    """The file that a path means: an .npz, a file of PyTorch, a checkpoint (model-123, or one of
    its files), or the latest checkpoint of a folder."""
    if os.path.isdir(path):
        latest = checkpoints.find_latest(path)
        if latest is None:
            raise UserError(f'{path}: this folder holds no checkpoint that is whole '
                            '(model-123.index and model-123.data-00000-of-00001)')
        return latest
    if os.path.isfile(path) and (
            path.endswith(('.npz', '.pth', '.pth.tar', '.pt')) or tell_format(path)):
        return path
    prefix = re.sub(r'\.(index|meta|data-\d+-of-\d+)$', '', path)
    if os.path.isfile(prefix + '.index'):
        return prefix
    if os.path.basename(path) == 'checkpoint' and os.path.isfile(path):
        return find_checkpoint(os.path.dirname(path) or '.')
    raise UserError(path + (': is not a checkpoint, an .npz or a file of PyTorch'
                            if os.path.exists(path) else ': does not exist'))


def read_network(path: str) -> dict:
    """What the network of these weights was: depth, width, stem, image_size (pixels), mean_bgr and
    std_bgr (of channels, 0..255). Files of others, and old ones, do not tell: {}."""
    text = read_weights(path, lambda name: name == NETWORK).get(NETWORK)
    if text is None:
        return {}
    try:
        return dict(json.loads(text.tobytes().decode()))
    except (ValueError, TypeError) as error:
        raise UserError(f'{path}: its {NETWORK!r} cannot be read: {error}')


def tell_format(path: str):
    """'npz', 'pytorch' or None, from the content of a file."""
    with open(path, 'rb') as f:
        if f.read(len(PYTORCH_MAGIC)) == PYTORCH_MAGIC:
            return 'pytorch'
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return 'pytorch' if any(n.endswith('/data.pkl') for n in archive.namelist()) else 'npz'


def read_weights(path: str, wanted: Predicate = lambda name: True) -> Weights:
    """Read the arrays of a file whose names are wanted; what cannot be read is a UserError."""
    return read(path, wanted)[0]


def read(path: str, wanted: Predicate, pytorch_reader=None) -> Tuple[Weights, List[str]]:
    """read_weights(), perhaps by another read_pytorch(), and the names of the file's rest."""
    path = find_checkpoint(path)
    try:
        if not os.path.isfile(path):
            return read_tensorflow(path, wanted)
        file_format = tell_format(path)
        if file_format is None:  # NumPy would tell of pickles
            raise ValueError('by its content it is neither an .npz nor a file of PyTorch')
        return (read_npz if file_format == 'npz' else pytorch_reader or read_pytorch)(path, wanted)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f'{path}: cannot be read as weights: {str(error) or type(error).__name__}')


def read_npz(path, wanted):
    with np.load(path, allow_pickle=False) as arrays:
        return read_wanted(arrays.files, arrays.__getitem__, wanted)


def read_tensorflow(path, wanted):
    tf = checkpoints.import_tensorflow('reading', path)
    try:
        with checkpoints.plain_name(path) as name:
            reader = tf.train.NewCheckpointReader(name)
            return read_wanted(reader.get_variable_to_shape_map(), reader.get_tensor, wanted)
    except tf.errors.OpError as error:
        raise ValueError(error)


def read_pytorch(path, wanted):
    """Have an .npz made by this Python, or the one that TORCH_PYTHON names, and read that."""
    with tempfile.TemporaryDirectory() as folder:
        npz = os.path.join(folder, 'weights.npz')
        python = os.environ.get('TORCH_PYTHON')
        process = subprocess.run(
            [python or sys.executable, CONVERT, path, npz], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, universal_newlines=True,
            env=dict(os.environ, TORCH_PYTHON=''))  # it looks no further
        if process.returncode:
            reason = ' '.join(re.split('[Ee]rror: ', process.stderr, maxsplit=1)[-1].split())[:500]
            by = f'{path}: read by TORCH_PYTHON={python}: ' if python else ''
            raise UserError(by + reason)
        weights, rest = read_npz(npz, wanted)
    return weights, re.findall('^dropped: (.*)$', process.stdout, re.MULTILINE) + rest


def read_wanted(keys, get, wanted):
    """(dict of name -> get(key), names of the rest); some files have names that end in ':0'."""
    names = {key[:-2] if key.endswith(':0') else key: key for key in keys}
    return ({name: get(key) for name, key in names.items() if wanted(name)},
            [name for name in names if not wanted(name)])
