"""PyTorch's side of test_convert.py: runs under a Python that has PyTorch and no TensorFlow.

    python tests/torch_features.py < jobs.json > results.json

A job is the name of a function below and its arguments; its result is what the function returns.
"""
import argparse
import contextlib
import io
import json
import os
import pathlib
import sys

import numpy as np
import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tools import convert_checkpoint  # noqa: E402

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Block(nn.Module):
    """A residual block with torchvision's names; of three convolutions if `deep`."""

    def __init__(self, channels, inner, outer, stride, deep):
        super().__init__()
        sizes = ([(channels, inner, 1, 1), (inner, inner, 3, stride), (inner, outer, 1, 1)]
                 if deep else [(channels, inner, 3, stride), (inner, outer, 3, 1)])
        self.count = len(sizes)
        for i, size in enumerate(sizes, 1):
            setattr(self, 'conv%d' % i, conv(*size))
            setattr(self, 'bn%d' % i, nn.BatchNorm2d(size[1]))
        self.downsample = nn.Sequential()
        if stride != 1 or channels != outer:
            self.downsample = nn.Sequential(
                conv(channels, outer, 1, stride), nn.BatchNorm2d(outer))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, 'bn%d' % i)(getattr(self, 'conv%d' % i)(y))
            y = torch.relu(y) if i < self.count else y
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """torchvision's ResNet of another width, with `head` as its last layer."""

    def __init__(self, depth, width, head):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        channels = width
        for g, count in enumerate(BLOCKS[depth]):
            inner = width << g
            outer = inner * (4 if depth >= 50 else 1)
            blocks = []
            for b in range(count):
                blocks.append(Block(channels, inner, outer, 2 if g and not b else 1, depth >= 50))
                channels = outer
            setattr(self, 'layer%d' % (g + 1), nn.Sequential(*blocks))
        self.fc = head(channels)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def conv(inputs, outputs, kernel, stride):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class MoCo(nn.Module):
    def __init__(self, depth, width, mlp, queue_size):
        super().__init__()

        def head(dim):
            return (nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 128)) if mlp
                    else nn.Linear(dim, 128))
        self.encoder_q, self.encoder_k = (ResNet(depth, width, head) for _ in range(2))
        self.register_buffer('queue', torch.randn(128, queue_size))
        self.register_buffer('queue_ptr', torch.tensor([7]))


def build(what, depth, width):
    """A model of random weights, BN statistics included; names as a file has them."""
    torch.manual_seed(depth)
    model = (ResNet(depth, width, lambda dim: nn.Linear(dim, 10)) if what == 'torchvision'
             else nn.ModuleDict({'module': MoCo(depth, width, what == 'v2', 32)}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5),
                                (module.running_mean, -0.5), (module.running_var, 0.5)):
                nn.init.uniform_(tensor, low, low + 1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out')
    return model


def create(what, depth, width, path, legacy=False):
    """Save a model: torchvision's, or MoCo's, v1 or v2, as the official code does."""
    model = build(what, depth, width)
    content = model.state_dict()
    if what != 'torchvision':
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
        content = {'epoch': 200, 'arch': 'resnet%d' % depth, 'state_dict': content,
                   'optimizer': optimizer.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def create_other(layout, path):
    """Save a ResNet-18, with values of its own, as other authors' code does: plain() is what is to
    be read of it, average() another network of the same names."""
    def below(front, *states):
        return {front + name: tensor for state in states for name, tensor in state.items()}

    def layers(*names):
        return {name + end: torch.ones([3] * (1 + (end == '.weight')))
                for name in names for end in ('.weight', '.bias')}

    whole = build('torchvision', 18, 4)
    plain = whole.state_dict()
    body = {name: tensor for name, tensor in plain.items() if not name.startswith('fc.')}
    average = {name: tensor + 1 for name, tensor in body.items()}
    numbers = {'conv1': '0', 'bn1': '1', 'layer1': '4', 'layer2': '5', 'layer3': '6', 'layer4': '7'}
    numbered = {name.replace(layer, number, 1): tensor for name, tensor in body.items()
                for layer, number in numbers.items() if name.startswith(layer + '.')}
    mlp = {'fc.0.weight': torch.ones(32, 32), 'fc.0.bias': torch.ones(32),
           'fc.2.weight': torch.ones(128, 32), 'fc.2.bias': torch.ones(128)}
    query, key = below('module.encoder_q.', body, mlp), below('module.encoder_k.', average, mlp)
    queue = {'module.queue': torch.ones(128, 8), 'module.queue_ptr': torch.tensor([3])}
    args = argparse.Namespace(folder=pathlib.Path('x'), lr=np.float64(0.03))
    torch.save({
        'plain': lambda: plain,
        'compiled': lambda: {'model': below('module._orig_mod.net.', plain), 'epoch': 3},
        'lightly': lambda: {'state_dict': below('backbone.', numbered) | below(
            'backbone_momentum.', average) | layers('projection_head.layers.0'),
            'hyper_parameters': {'lr': 0.1}},
        'moco3': lambda: {'state_dict': below('module.base_encoder.', body, layers('fc.0', 'fc.1'))
                          | below('module.momentum_encoder.', average)
                          | layers('module.predictor.0'), 'args': args},
        'simsiam': lambda: {'state_dict': below('module.encoder.', body, layers('fc.0', 'fc.6'))},
        'byol': lambda: below('online_network.encoder.', body) | below(
            'target_network.encoder.', average),
        'dino': lambda: {'student': below('module.backbone.', average), 'args': args,
                         'teacher': below('backbone.', plain) | layers('head.mlp.0'),
                         'curve': np.arange(3)},
        'query': lambda: query,
        'no_queue': lambda: {'state_dict': query | key},
        'no_key': lambda: {'state_dict': query | queue},
        'other_head': lambda: {'state_dict': {name: tensor for name, tensor in (
            query | key | queue).items() if '.fc.2.' not in name}},
        'half': lambda: {name: tensor.half() if tensor.is_floating_point() else tensor
                         for name, tensor in plain.items()},
        'bfloat': lambda: {'encoder': {name: tensor.bfloat16() for name, tensor in body.items()}},
        'no_layer4': lambda: {name: tensor for name, tensor in plain.items()
                              if not name.startswith('layer4')},
        'excited': lambda: plain | below('layer1.0.se.', *[layers(f'fc{i}') for i in range(5)]),
        'grouped': lambda: {name: tensor[:, :1] if 'conv2' in name else tensor
                            for name, tensor in plain.items()},
        'transformer': lambda: {'model': layers(*[f'blocks.{i}.attn' for i in range(9)])},
        'list': lambda: [plain],
        'object': lambda: whole,
    }[layout](), path)


def dump(path, npz):
    """Write the arrays of a file under PyTorch's names."""
    content = torch.load(path, weights_only=True)
    np.savez(npz, **{k: v.numpy() for k, v in content.get('state_dict', content).items()})


def features(path, what, depth, width, image, npy):
    """Write the backbone's features of an image, uint8 [1, S, S, 3] in BGR."""
    content = torch.load(path, weights_only=True)
    content = content.get('state_dict', content)
    model = build(what, depth, width)
    # strictly but for torchvision's classifier, which weights of MoCo do not have
    missing, unexpected = model.load_state_dict(content, strict=False)
    assert not unexpected and set(missing) <= {'fc.weight', 'fc.bias'}, (missing, unexpected)
    net = model if what == 'torchvision' else model['module'].encoder_q
    rgb = np.load(image)[..., ::-1] / np.float32(255)
    rgb = (rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        result = net.eval()(torch.tensor(rgb, dtype=torch.float32).permute(0, 3, 1, 2))
    np.save(npy, result.numpy())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def create_bomb(path, exploded, legacy):
    """Save a file that makes another one when it is loaded without care."""
    torch.save({'state_dict': {'conv1.weight': Bomb(exploded)}}, path,
               _use_new_zipfile_serialization=not legacy)


def convert(*argv):
    """Run tools/convert_checkpoint.py: its output, or its error."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            convert_checkpoint.main(list(argv))
    except SystemExit as error:
        return str(error)
    return output.getvalue()


if __name__ == '__main__':
    assert 'tensorflow' not in sys.modules
    json.dump([globals()[name](*arguments) for name, *arguments in json.load(sys.stdin)],
              sys.stdout)
