"""PyTorch's files of weights, and PyTorch's names of the variables.

The files are checkpoints of the official MoCo and `state_dict`s of torchvision's ResNet, alone or
as a part of another model.
"""
import collections
import pickle
import re
from typing import Dict, List, Optional, Tuple

import numpy as np

import resnet
from errors import UserError, enumerate_some
from weights import NETWORK, is_head

# before 2.6, a file could get round weights_only (CVE-2025-32434)
VERSION = (2, 6)

# the end of a name, here and in PyTorch
VARIABLES = {'W': 'weight', 'gamma': 'weight', 'beta': 'bias', 'mean/EMA': 'running_mean',
             'variance/EMA': 'running_var'}
# MoCo's two encoders, here and in PyTorch
ENCODERS = (('', 'encoder_q.'), ('momentum_encoder/', 'encoder_k.'))

# the layers of torchvision's ResNet where an nn.Sequential numbers them
SEQUENCE = {'0': 'conv1', '1': 'bn1', '4': 'layer1', '5': 'layer2', '6': 'layer3', '7': 'layer4'}
# words in the names of a network that follows another one
COPY = re.compile(r'(^|[._])(k|key|ema|momentum|target)[._]')
COUNTER = 'num_batches_tracked'
# what checkpoints hold beside weights: Nothing stands in for it, so that none of it is executed
HARMLESS = ['argparse.Namespace', 'pathlib.PosixPath', 'pathlib._local.PosixPath', 'numpy.dtype',
            'numpy.ndarray'] + [f'numpy.{core}.multiarray.{function}' for core in ('core', '_core')
                                for function in ('scalar', '_reconstruct')]


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

def read(path: str, part: Optional[str] = None) -> Tuple[Dict[str, np.ndarray], List[str]]:
    """Read a checkpoint of the official MoCo, or the one ResNet in a file, whatever stands in front
    of its names. Heads that have no place here are left out.

    Args:
        part: which ResNet of several: what stands in front of its names, or a word of that.

    Returns:
        (dict of our name -> our array, what the file holds besides)

    Raises:
        UserError, ValueError: it is no such file; the reason.
    """
    checkpoint = load(path)
    tensors = {name: leaf for name, leaf in flatten(checkpoint).items() if hasattr(leaf, 'detach')}
    networks = find_networks(tensors)
    if not networks:
        raise ValueError('it holds no ResNet of torchvision (conv1.weight, layer1.0.conv1.weight), '
                         'but ' + (enumerate_some(sorted(tensors)) or 'no state_dict of tensors'))
    prefix = choose_network(path, networks, part)
    names = name_layers(prefix, networks[prefix], tensors)
    encoders, queue = [('', prefix)], []
    model = prefix[:-len('encoder_q.')]
    if (not part and prefix == model + 'encoder_q.' and model + 'encoder_k.' in networks
            and model + 'queue' in tensors and any(map(is_head, names.values()))):
        encoders = [(scope, model + encoder) for scope, encoder in ENCODERS]
        queue = [name for name in ('queue', 'queue_ptr') if model + name in tensors]

    found = {model + name: name for name in queue}  # the file's name -> ours
    for scope, prefix in encoders:
        network = networks[prefix]
        unknown = [network[name] for name in sorted(set(network) - set(names))
                   if re.match(r'(conv|bn|norm|layer)\d', name) and not name.endswith(COUNTER)]
        if unknown:
            raise UserError(f'{path}: holds no ResNet of torchvision, which has no '
                            + enumerate_some(unknown))
        found.update({network[name]: scope + names[name] for name in network if name in names})
    weights = {ours: from_pytorch(ours, to_numpy(tensors[theirs]))
               for theirs, ours in found.items()}
    description = checkpoint.get(NETWORK)
    if isinstance(description, str) and description.startswith('{'):
        weights[NETWORK] = np.frombuffer(description.encode(), np.uint8)
        found[NETWORK] = NETWORK
    return weights, list_rest(checkpoint, set(found), networks)


def load(path):
    """The dict in a file of PyTorch; nothing in it is executed."""
    torch = import_pytorch('reading', path)
    try:
        with torch.serialization.safe_globals([(Nothing, name) for name in HARMLESS]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (re.search(r'GLOBAL (\S+)', str(error)) or
                  re.search('([Uu]nsupported .*)', str(error)))
        raise ValueError('it holds more than tensors and plain values, which might be code' +
                         (': ' + reason.group(1) if reason else ''))
    return checkpoint if isinstance(checkpoint, dict) else {}


class Nothing:
    """Stands in for what is of no use here."""

    def __init__(self, *state):
        pass
    __setstate__ = __init__


def flatten(tree, front=''):
    """The leaves of nested dicts, by their keys with dots in between."""
    leaves = {}
    for key, value in tree.items():
        leaves.update(flatten(value, f'{front}{key}.') if isinstance(value, dict) else
                      {f'{front}{key}': value})
    return leaves


def find_networks(names):
    """The ResNets among a file's names: dict of what stands in front of a network's names -> dict
    of torchvision's name of a layer, or that of another one there -> the file's name."""
    networks = {}
    for first, second, layers in (('conv1.weight', 'layer1.0.conv1.weight', {}),
                                  ('0.weight', '4.0.conv1.weight', SEQUENCE)):
        for prefix in [name[:-len(first)] for name in names if name.endswith(first)]:
            if prefix + second in names and prefix[-1:] in ('', '.'):
                parts = [name[len(prefix):].partition('.') for name in names
                         if name.startswith(prefix)]
                networks[prefix] = {
                    ''.join([layers.get(layer, layer)] + rest): prefix + ''.join([layer] + rest)
                    for layer, *rest in parts}
    return networks


def choose_network(path, networks, part):
    """What stands in front of the names of the network that is meant: the only one, or the only
    one that follows no other, or the part that was asked for."""
    choice = sorted(networks)
    if part:
        part = part.strip('.') + '.'
        choice = [part] if part in networks else [name for name in choice
                                                  if '.' + part in '.' + name]
        if not choice:
            raise UserError(f'{path}: --part: it holds {enumerate_some(sorted(networks))}')
    if len(choice) > 1:
        choice = [name for name in choice if not COPY.search(name)] or choice
    if len(choice) > 1:
        raise UserError(f'{path}: holds several networks: {enumerate_some(choice)}; convert one: '
                        f'tools/convert_checkpoint.py --part {choice[-1].strip(".")}')
    return choice[0]


def name_layers(prefix, network, tensors):
    """Torchvision's name -> ours, of a network and its head or classifier. A head has a place here
    if it is one Linear layer, or two with a ReLU: others have more layers, or other parameters."""
    end = sorted(name for name in network if name.startswith('fc.'))
    layers = [name[:-len('.weight')] for name in end if name.endswith('.weight')]
    if layers not in (['fc'], ['fc.0', 'fc.2']) or len(end) != 2 * len(layers):
        layers = []
    if prefix.endswith(('encoder_q.', 'encoder_k.')):
        dims = [len(tensors[network[layer + '.weight']]) for layer in layers]
        head = [(f'linear{i}_{dim}', layer) for i, (dim, layer) in enumerate(zip(dims, layers))]
    else:
        head = [('linear', 'fc')] if layers == ['fc'] else []
    return {theirs: ours for ours, theirs in classifier_names(tuple(head)).items()}


def to_numpy(tensor):
    """Its values; float32 has all those of 16 bits."""
    is_half = tensor.is_floating_point() and tensor.element_size() == 2
    return (tensor.float() if is_half else tensor).detach().numpy()


def list_rest(checkpoint, found, networks):
    """What else a file holds: keys of which nothing was found, and names; in one entry what stands
    behind the same prefix of a network, and the counters of BN."""
    others = [prefix for prefix in networks if not found & set(networks[prefix].values())]
    counts = collections.Counter()
    for key, value in checkpoint.items():
        names = set(flatten({key: value}))
        for name in names - found if names & found else [str(key)]:
            group = ([prefix + '*' for prefix in others if name.startswith(prefix)] +
                     ['*.' + COUNTER] * name.endswith(COUNTER) + [name])[0]
            counts[group] += 1
    return sorted(f'{name} ({count})' if '*' in name else name for name, count in counts.items())


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
