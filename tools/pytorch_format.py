"""PyTorch's files of weights, and PyTorch's names of the variables.

The files are checkpoints of the official MoCo and `state_dict`s of torchvision's ResNet.
"""
import pickle
import re
from typing import Dict, List, Optional, Tuple

import numpy as np

import resnet
from errors import UserError

# before 2.6, a file could get round weights_only (CVE-2025-32434)
VERSION = (2, 6)

# the end of a name, here and in PyTorch
VARIABLES = {'W': 'weight', 'gamma': 'weight', 'beta': 'bias', 'mean/EMA': 'running_mean',
             'variance/EMA': 'running_var'}
# MoCo's two encoders, here and in PyTorch
ENCODERS = (('', 'encoder_q.'), ('momentum_encoder/', 'encoder_k.'))


# ---- names

def list_variables(depth: int, width: int = 64, kernel: int = 7) -> List[Tuple[str, tuple]]:
    """Our names and the shapes of a backbone, whose first convolution has that kernel."""
    convs = [('conv0', resnet.Conv('conv0', kernel, 3, width, None))]
    for block in resnet.list_blocks(depth, width):
        convs += [(f'{block.name}/{conv.name}', conv)
                  for conv in block.convs + [block.shortcut] if conv]
    variables = []
    for name, conv in convs:
        variables.append((name + '/W', (conv.kernel, conv.kernel, conv.inputs, conv.outputs)))
        variables += [(f'{name}_bn/{variable}', (conv.outputs,))
                      for variable in VARIABLES if variable != 'W']
    return variables


def split_name(name: str) -> Tuple[Optional[int], str, str, bool, str]:
    """The parts of a backbone variable's name: (group or None, block, convolution, whether it is of
    its BN, PyTorch's name of the variable)."""
    group, block, conv, bn, variable = re.match(
        r'(?:group(\d+)/block(\d+)/)?conv(\w+?)(_bn)?/(.+)$', name).groups()
    return None if group is None else int(group), block, conv, bn is not None, VARIABLES[variable]


def torchvision_name(name: str) -> str:
    """Torchvision's name of a backbone's variable."""
    group, block, conv, is_bn, variable = split_name(name)
    if group is None:
        return f'{"bn1" if is_bn else "conv1"}.{variable}'
    layer = (f'downsample.{int(is_bn)}' if conv == 'shortcut' else
             f'{"bn" if is_bn else "conv"}{conv}')
    return f'layer{group + 1}.{block}.{layer}.{variable}'


def classifier_names(head: Tuple[Tuple[str, str], ...] = (('linear', 'fc'),)) -> Dict[str, str]:
    """Our name -> torchvision's, of a network of any depth.

    Args:
        head: pairs of names, ours and PyTorch's, of the layers after the backbone.
    """
    names = {name: torchvision_name(name) for depth in resnet.DEPTHS
             for name, _ in list_variables(depth)}
    for ours, theirs in head:
        names.update({ours + '/W': theirs + '.weight', ours + '/b': theirs + '.bias'})
    return names


def moco_names(dims: List[int]) -> Dict[str, str]:
    """Our name -> the official MoCo's, but for `module.` in front.

    Args:
        dims: of the head's layers, [C] or [D, C].
    """
    layers = ['fc'] if len(dims) == 1 else [f'fc.{2 * i}' for i in range(len(dims))]
    encoder = classifier_names(tuple(
        (f'linear{i}_{dim}', layer) for i, (dim, layer) in enumerate(zip(dims, layers))))
    names = {our_scope + ours: their_scope + theirs for our_scope, their_scope in ENCODERS
             for ours, theirs in encoder.items()}
    return dict(names, queue='queue', queue_ptr='queue_ptr')


# ---- arrays

def to_pytorch(name: str, array: np.ndarray) -> np.ndarray:
    """An array as PyTorch has it; `name` is ours."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
        array = array[:, ::-1] if name.endswith('conv0/W') else array  # BGR -> RGB
    elif array.ndim == 2:
        array = array.T  # linear layers, queue [K, C] -> [C, K]
    return np.array(array.reshape(1) if name == 'queue_ptr' else array, order='C')


def from_pytorch(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of to_pytorch()."""
    if array.ndim == 4:
        array = array[:, ::-1] if name.endswith('conv0/W') else array
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.array(array.reshape([]) if name == 'queue_ptr' else array, order='C')


# ---- files

def read(path: str) -> Tuple[Dict[str, np.ndarray], List[str]]:
    """Read a checkpoint of the official MoCo, or a `state_dict`, bare or in a checkpoint.

    Returns:
        (dict of our name -> our array, names of the file's rest)

    Raises:
        UserError, ValueError: it is no such file; the reason.
    """
    torch = import_pytorch('reading', path)
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search('unsupported .*|Unsupported .*', str(error))
        raise ValueError('it holds more than tensors and plain values, which might be code' +
                         (': ' + reason.group() if reason else ''))
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
        raise UserError(f'{path}: ' + '; '.join(
            f'{name} has no place in MoCo or a ResNet' for name in unknown))
    weights = {names[theirs]: from_pytorch(names[theirs], tensor.detach().numpy())
               for theirs, tensor in state.items() if theirs in names}
    return weights, dropped + counters


def import_pytorch(doing: str, path: str):
    """PyTorch; `doing` and `path` are for the message if it is missing."""
    try:
        import torch
        found = torch.__version__
        if tuple(int(part) for part in found.split('.')[:2]) >= VERSION:
            return torch
    except ImportError:
        found = None
    version, found = '.'.join(map(str, VERSION)), f', not {found}' if found else ''
    otherwise = ('set TORCH_PYTHON to one that has it' if doing == 'reading' else
                 'write an .npz, and convert that with one that has it')
    raise UserError(f'{doing} {path} needs PyTorch {version} or newer{found}: pip install torch. '
                    f'If this Python cannot have it, {otherwise}')
