"""Files of weights: their formats, and what each format calls the variables.

Everywhere else, weights are a dict of the names of the released MoCo weights (conv0/W,
group0/block0/conv1_bn/gamma, linear0_128/b, momentum_encoder/..., queue, queue_ptr; linear/W and
linear/b are a classifier) -> array. Nothing in a file is executed when it is read.

Only checkpoints of TensorFlow need TensorFlow, and only PyTorch's files need PyTorch.
"""
import collections
import os
import pickle
import re
import subprocess
import tempfile
import zipfile
import zlib

import numpy as np

# depth of a ResNet -> (block, blocks in each of the four groups)
DEPTHS = {
    18: ('basic', (2, 2, 2, 2)),
    34: ('basic', (3, 4, 6, 3)),
    50: ('bottleneck', (3, 4, 6, 3)),
    101: ('bottleneck', (3, 4, 23, 3)),
}
PYTORCH_ENDINGS = ('.pth', '.pth.tar', '.pt')
# with what PyTorch before 1.6 began a file
PYTORCH_MAGIC = pickle.dumps(0x1950a86a20f9469cfc6c, protocol=2)
# before 2.6, a file could get round weights_only (CVE-2025-32434)
PYTORCH_VERSION = (2, 6)
CONVERT = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'tools', 'convert_checkpoint.py')


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message names the file and says why."""


# ---- names

# a variable of a backbone: its shape here, and its names here, in torchvision, in detectron2
# and in tensorpack's FasterRCNN
Variable = collections.namedtuple('Variable', 'shape ours pytorch detectron2 fasterrcnn')
BATCH_NORM = (('gamma', 'weight'), ('beta', 'bias'),
              ('mean/EMA', 'running_mean'), ('variance/EMA', 'running_var'))
# MoCo's two encoders, here and in PyTorch
ENCODERS = (('', 'encoder_q.'), ('momentum_encoder/', 'encoder_k.'))


def list_variables(depth=101, width=64, kernel=7):
    """All variables of a backbone.

    The names at depth 101 include those of all other depths.

    Args:
        depth: one of DEPTHS.
        width: channels of the first group.
        kernel: of the first convolution.

    Returns:
        list of Variable.
    """
    block, blocks = DEPTHS[depth]
    layers = [((kernel, kernel, 3, width), 'conv0', 'conv1', 'bn1', 'stem.conv1')]
    channels = width
    for g, num_blocks in enumerate(blocks):
        inner = width << g
        outer = inner * (4 if block == 'bottleneck' else 1)
        for b in range(num_blocks):
            ours, pytorch, detectron2 = (
                scope.format(g + first, b) for scope, first in
                (('group{}/block{}/', 0), ('layer{}.{}.', 1), ('res{}.{}.', 2)))
            shapes = ([(1, 1, channels, inner), (3, 3, inner, inner), (1, 1, inner, outer)]
                      if block == 'bottleneck' else
                      [(3, 3, channels, inner), (3, 3, inner, inner)])
            for i, shape in enumerate(shapes, 1):
                layers.append((shape, '{}conv{}'.format(ours, i), '{}conv{}'.format(pytorch, i),
                               '{}bn{}'.format(pytorch, i), '{}conv{}'.format(detectron2, i)))
            if channels != outer:
                layers.append(((1, 1, channels, outer), ours + 'convshortcut',
                               pytorch + 'downsample.0', pytorch + 'downsample.1',
                               detectron2 + 'shortcut'))
            channels = outer

    variables = []
    for shape, ours, conv, bn, detectron2 in layers:
        variables.append(Variable(
            shape, ours + '/W', conv + '.weight', detectron2 + '.weight', ours + '/W'))
        variables += [Variable(
            shape[-1:], ours + '_bn/' + name, bn + '.' + theirs, detectron2 + '.norm.' + theirs,
            ours + '/bn/' + name) for name, theirs in BATCH_NORM]
    return variables


def is_backbone(name):
    """Whether a variable of this name belongs to the (query) ResNet: not to a head,
    the key encoder or the optimizer."""
    return re.match(r'(conv0|group\d+/)', name) is not None and not name.endswith('/Momentum')


def is_head(name):
    """Whether a variable of this name belongs to the (query) contrastive head."""
    return re.match(r'linear\d+_', name) is not None and not name.endswith('/Momentum')


def is_model(name):
    """Whether a variable of this name belongs to the model,
    as opposed to the optimizer and the counter of steps."""
    return not name.endswith('/Momentum') and name != 'global_step'


def head_dims(names):
    """The dimensions of a head's layers, from its variables' names: [128] for v1, [2048, 128] for
    v2, [] if there is none."""
    layers = sorted(re.findall(r'^linear(\d+)_(\d+)/W$', '\n'.join(names), re.MULTILINE))
    return [int(dim) for _, dim in layers]


def pytorch_names(head):
    """What PyTorch calls the variables of an encoder.

    Args:
        head: pairs of names, ours and PyTorch's, of the layers after the backbone.

    Returns:
        dict: our name -> PyTorch's.
    """
    names = {v.ours: v.pytorch for v in list_variables()}
    for ours, theirs in head:
        names.update({ours + '/W': theirs + '.weight', ours + '/b': theirs + '.bias'})
    return names


def classifier_names():
    """What torchvision calls the variables of a classifier: dict of our name -> torchvision's."""
    return pytorch_names([('linear', 'fc')])


def moco_names(dims):
    """What the official MoCo calls its variables, but for `module.` in front.

    Args:
        dims: of the head's layers, [C] or [D, C].

    Returns:
        dict: our name -> the official name.
    """
    layers = ['fc'] if len(dims) == 1 else ['fc.{}'.format(2 * i) for i in range(len(dims))]
    encoder = pytorch_names([('linear{}_{}'.format(i, dim), layer)
                             for i, (dim, layer) in enumerate(zip(dims, layers))])
    names = {our_scope + ours: their_scope + theirs for our_scope, their_scope in ENCODERS
             for ours, theirs in encoder.items()}
    return dict(names, queue='queue', queue_ptr='queue_ptr')


def to_pytorch(name, array):
    """An array as PyTorch has it; `name` is ours."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
        array = array[:, ::-1] if name.endswith('conv0/W') else array  # BGR -> RGB
    elif array.ndim == 2:
        array = array.T  # linear layers, queue [K, C] -> [C, K]
    return np.array(array.reshape(1) if name == 'queue_ptr' else array, order='C')


def from_pytorch(name, array):
    """The inverse of to_pytorch()."""
    if array.ndim == 4:
        array = array[:, ::-1] if name.endswith('conv0/W') else array
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.array(array.reshape([]) if name == 'queue_ptr' else array, order='C')


# ---- files

def find_checkpoint(path):
    """The file of weights that `path` means.

    Args:
        path: an .npz, a file of PyTorch, a checkpoint (model-123, or one of its files), or a folder
            with checkpoints: its latest.

    Raises:
        WeightsError: there is none.
    """
    if os.path.isdir(path):
        latest = import_tensorflow('reading', path).train.latest_checkpoint(path)
        if latest is None:
            raise WeightsError(
                '{}: this folder holds no checkpoint '
                '(no file named "checkpoint" that points to one)'.format(path))
        return latest
    if os.path.isfile(path) and (
            path.endswith(('.npz',) + PYTORCH_ENDINGS) or tell_format(path)):
        return path
    prefix = re.sub(r'\.(index|meta|data-\d+-of-\d+)$', '', path)
    if os.path.isfile(prefix + '.index'):
        return prefix
    if os.path.basename(path) == 'checkpoint' and os.path.isfile(path):
        return find_checkpoint(os.path.dirname(path) or '.')
    reason = ('is not a checkpoint, an .npz or a file of PyTorch' if os.path.exists(path)
              else 'does not exist')
    raise WeightsError('{}: {}'.format(path, reason))


def tell_format(path):
    """'npz', 'pytorch' or None, from the content of a file."""
    with open(path, 'rb') as f:
        if f.read(len(PYTORCH_MAGIC)) == PYTORCH_MAGIC:
            return 'pytorch'
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return 'pytorch' if any(n.endswith('/data.pkl') for n in archive.namelist()) else 'npz'


def read_weights(path, wanted=lambda name: True):
    """Read the arrays of a file by name.

    Args:
        path: as in find_checkpoint().
        wanted: a predicate on our names; the others are not read.

    Returns:
        dict: name (without ':0') -> array.

    Raises:
        WeightsError: there is no such file, or it cannot be read.
    """
    return read(path, wanted)[0]


def read(path, wanted=lambda name: True):
    """read_weights(), and the list of what else the file holds."""
    path = find_checkpoint(path)
    try:
        if not os.path.isfile(path):
            return read_tensorflow(path, wanted)
        file_format = tell_format(path)
        if file_format is None:  # NumPy and PyTorch would tell of pickles
            raise ValueError('by its content it is neither an .npz nor a file of PyTorch')
        return (read_npz if file_format == 'npz' else read_pytorch)(path, wanted)
    except WeightsError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile,
            zlib.error) as error:
        raise WeightsError('{}: cannot be read as weights: {}'.format(
            path, str(error) or type(error).__name__))


def read_npz(path, wanted):
    with np.load(path, allow_pickle=False) as arrays:
        return read_wanted({_plain(key): key for key in arrays.files}, arrays.__getitem__, wanted)


def read_tensorflow(path, wanted):
    tf = import_tensorflow('reading', path)
    try:
        reader = tf.train.NewCheckpointReader(path)
        keys = {_plain(key): key for key in reader.get_variable_to_shape_map()}
        return read_wanted(keys, reader.get_tensor, wanted)
    except tf.errors.OpError as error:
        raise ValueError(error)


def read_wanted(keys, get, wanted):
    """Args: keys: dict of name -> key in the file; get: a function of the key."""
    return ({name: get(key) for name, key in keys.items() if wanted(name)},
            [name for name in keys if not wanted(name)])


def _plain(name):
    return name[:-2] if name.endswith(':0') else name


def compare(weights, shapes):
    """What is wrong with weights.

    Args:
        weights: dict of name -> array.
        shapes: dict of name -> shape, what they should be.

    Returns:
        list of sentences, empty if nothing is.
    """
    return (
        ['{} is missing'.format(name) for name in sorted(set(shapes) - set(weights))] +
        ['{} has no place here'.format(name) for name in sorted(set(weights) - set(shapes))] +
        ['{} has shape {} where {} is needed'.format(name, weights[name].shape, shapes[name])
         for name in sorted(set(shapes) & set(weights)) if weights[name].shape != shapes[name]])


def read_pytorch(path, wanted):
    """Read a checkpoint of the official MoCo, or a `state_dict` of torchvision's ResNet, bare or
    in a checkpoint."""
    try:
        torch = import_pytorch('reading', path)
    except WeightsError:
        if not os.environ.get('TORCH_PYTHON'):
            raise
        return read_pytorch_elsewhere(path, wanted)

    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search('unsupported .*|Unsupported .*', str(error))
        raise ValueError('it holds more than tensors and plain values, which might be code{}'
                         .format(': ' + reason.group() if reason else ''))
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in state.items()):
        raise ValueError('it holds no state_dict of tensors')
    dropped = ([str(key) for key in checkpoint if key != 'state_dict']
               if state is not checkpoint else [])

    # their names -> ours
    module = 'module.' if all(name.startswith('module.') for name in state) else ''
    layers = [module + 'encoder_q.' + layer + '.weight' for layer in ('fc', 'fc.0', 'fc.2')]
    names = (moco_names([len(state[layer]) for layer in layers if layer in state])
             if any(name.startswith(module + 'encoder_q.') for name in state)
             else classifier_names())
    names = {module + theirs: ours for ours, theirs in names.items()}

    counters = [name for name in state if name.endswith('.num_batches_tracked')]
    unknown = sorted(set(state) - set(names) - set(counters))
    if unknown:
        raise WeightsError('{}: {}'.format(path, '; '.join(
            '{} has no place in MoCo or a ResNet'.format(name) for name in unknown)))
    keys = {names[theirs]: theirs for theirs in state if theirs in names}
    weights, unwanted = read_wanted(
        keys, lambda key: from_pytorch(names[key], state[key].detach().numpy()), wanted)
    return weights, dropped + counters + unwanted


def read_pytorch_elsewhere(path, wanted):
    """read_pytorch() for a Python that has no PyTorch: the one named by TORCH_PYTHON converts."""
    with tempfile.TemporaryDirectory() as folder:
        npz = os.path.join(folder, 'weights.npz')
        process = subprocess.run(
            [os.environ['TORCH_PYTHON'], CONVERT, path, npz], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, universal_newlines=True,
            env=dict(os.environ, TORCH_PYTHON=''))  # which does not look any further
        if process.returncode:
            reason = re.split('[Ee]rror: ', process.stderr, 1)[-1]
            raise WeightsError('{}: read by TORCH_PYTHON={}: {}'.format(
                path, os.environ['TORCH_PYTHON'], ' '.join(reason.split())[:500]))
        weights, unwanted = read_npz(npz, wanted)
    return weights, re.findall('^dropped: (.*)$', process.stdout, re.MULTILINE) + unwanted


def tell_error(error):
    """What an error of TensorFlow says, in one line.

    2.15 says first where the graph was made, then `Node: name`, and then what is wrong.
    """
    text = re.split('^Node: .*\n', error.message, 1, re.MULTILINE)[-1]
    return re.sub(r'\A\d+ root error\(s\) found\.\s*', '', text).split('\n')[0]


def import_tensorflow(doing, path):
    """TensorFlow; `doing` and `path` are for the message if it is missing."""
    try:
        from tensorpack import tfv1
    except ImportError:
        raise WeightsError(
            '{} {}, a checkpoint of TensorFlow, needs TensorFlow and Tensorpack'.format(
                doing, path))
    return tfv1


def import_pytorch(doing, path):
    """PyTorch; `doing` and `path` are for the message if it is missing."""
    try:
        import torch
        found = torch.__version__
        if tuple(int(part) for part in found.split('.')[:2]) >= PYTORCH_VERSION:
            return torch
    except ImportError:
        found = None
    raise WeightsError(
        '{} {} needs PyTorch {}.{} or newer{}: pip install torch. If this Python cannot have it, {}'
        .format(doing, path, *PYTORCH_VERSION, ', not ' + found if found else '',
                'set TORCH_PYTHON to one that has it' if doing == 'reading' else
                'write an .npz, and convert that with one that has it'))
