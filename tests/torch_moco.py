"""Algorithm 1 of the MoCo paper (arXiv 1911.05722) in PyTorch and float64, parameters named as in
torchvision: what test_equivalence.py compares a step with. It knows nothing of this project.

    python tests/torch_moco.py GIVEN.npz ...    # writes GIVEN.torch.npz; a second or two for each

GIVEN.npz holds, for R ranks, N images of all ranks in a step, C features, K keys in the queue:
    depth (18 or 50), ranks, splits of a rank's batch for BN, temperature, momentum, weight_decay
    lr [steps]
    query, key: uint8 [steps, N, S, S, 3], BGR; rank 0's images first
    order: int [steps, N]; the permuted keys are key[order], rank 0 encodes the first N/R of them
    encoder_q.NAME, encoder_k.NAME, queue [C, K], queue_ptr: where to start from

GIVEN.torch.npz holds, with i = 1, 2, ... for the steps and r for the ranks:
    i/rank<r>/logits [N/R, 1+K], i/rank<r>/loss
    i/gradient.NAME, with weight decay, averaged over the ranks
    i/rank<r>/encoder_q.NAME, i/encoder_k.NAME, i/queue, i/queue_ptr: after the step
    closest: the smallest absolute input that a ReLU of f_q has had in any step
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BN_EPSILON = 1.001e-5
# of ImageNet, for RGB in 0..1
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(
    2, 3, 1, 1)


class BatchNorm(nn.BatchNorm2d):
    """Normalises equal parts of the batch on their own; the running statistics become the mean of
    what the parts would make of them."""

    def __init__(self, channels, splits, momentum):
        super().__init__(channels, eps=BN_EPSILON, momentum=momentum)
        self.splits = splits

    def forward(self, x):
        outputs, means, variances = [], [], []
        for part in x.chunk(self.splits):
            means.append(self.running_mean.clone())
            variances.append(self.running_var.clone())
            outputs.append(F.batch_norm(part, means[-1], variances[-1], self.weight, self.bias,
                                        training=True, momentum=self.momentum, eps=self.eps))
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(outputs)


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, channels, stride, norm):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 3, stride), norm(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3), norm(channels)
        self.downsample = make_downsample(inputs, channels, stride, norm)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, channels, stride, norm):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 1), norm(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3, stride), norm(channels)
        self.conv3, self.bn3 = conv(channels, 4 * channels, 1), norm(4 * channels)
        self.downsample = make_downsample(inputs, 4 * channels, stride, norm)
        self.relu = nn.ReLU()

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def make_downsample(inputs, outputs, stride, norm):
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))


class Encoder(nn.Module):
    """ResNet, head (v1: linear, v2: two layers) and normalisation: [n, 3, S, S] -> [n, C].

    Args:
        state: dict of name -> array; the sizes of all layers are those of its arrays.
    """

    def __init__(self, depth, state, splits, bn_momentum):
        super().__init__()
        block, blocks = {18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3))}[depth]
        width = len(state['conv1.weight'])

        def norm(channels):
            return BatchNorm(channels, splits, bn_momentum)

        self.conv1, self.bn1 = conv(3, width, 7, stride=2), norm(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for i, count in enumerate(blocks):
            layer = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(block(inputs, width * 2 ** i, stride, norm))
                inputs = width * 2 ** i * block.expansion
            self.add_module('layer{}'.format(i + 1), layer)
        if 'fc.weight' in state:
            self.fc = nn.Linear(inputs, len(state['fc.bias']))
        else:
            self.fc = nn.Sequential(
                nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, len(state['fc.2.bias'])))

        counters = {name: value for name, value in self.state_dict().items()
                    if name.endswith('num_batches_tracked')}
        self.load_state_dict(dict({name: torch.tensor(x) for name, x in state.items()}, **counters))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.normalize(self.fc(x.mean(dim=(2, 3))), dim=1)

    def arrays(self):
        return {name: value.numpy().copy() for name, value in self.state_dict().items()
                if not name.endswith('num_batches_tracked')}


def to_input(images):
    """uint8 [n, S, S, 3] in BGR -> float64 [n, 3, S, S], normalised RGB."""
    rgb = torch.tensor(images[..., ::-1].copy()).permute(0, 3, 1, 2)
    return (rgb / 255. - MEAN) / STD


def train(given):
    """All steps; `given` and what is returned are described above."""
    def state(prefix):
        return {name[len(prefix):]: given[name] for name in given if name.startswith(prefix)}

    depth, ranks, splits = (int(given[name]) for name in ('depth', 'ranks', 'splits'))
    m, decay = float(given['momentum']), float(given['weight_decay'])
    # every rank has a copy of f_q, since it has BN statistics of its own. f_k is the same on all,
    # for its running statistics stay as they are
    f_q = [Encoder(depth, state('encoder_q.'), splits, bn_momentum=0.1) for _ in range(ranks)]
    f_k = Encoder(depth, state('encoder_k.'), splits, bn_momentum=0.)
    optimizers = [torch.optim.SGD(f.parameters(), lr=0.1, momentum=0.9, nesterov=True,
                                  weight_decay=decay) for f in f_q]
    queue, queue_ptr = torch.tensor(given['queue']).double(), int(given['queue_ptr'])
    results, distances = {}, []
    for module in (module for f in f_q for module in f.modules() if isinstance(module, nn.ReLU)):
        module.register_forward_hook(
            lambda module, inputs, output: distances.append(inputs[0].detach().abs().min().item()))

    for step, lr in enumerate(given['lr'].tolist()):
        x_q, x_k = to_input(given['query'][step]), to_input(given['key'][step])
        order = torch.tensor(given['order'][step])
        out = {}

        # shuffled BN: every rank encodes its part of the permuted keys; then they are put back
        with torch.no_grad():
            k = torch.cat([f_k(part) for part in x_k[order].chunk(ranks)])
            k = k[torch.argsort(order)]  # [N, C]

        # contrastive loss, the gradient on every rank
        for rank, (f, x, k_rank) in enumerate(zip(f_q, x_q.chunk(ranks), k.chunk(ranks))):
            q = f(x)  # [n, C]
            l_pos = torch.bmm(q.unsqueeze(1), k_rank.unsqueeze(2)).squeeze(2)  # [n, 1]
            logits = torch.cat([l_pos, q @ queue], dim=1) / float(given['temperature'])  # [n, 1+K]
            loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
            f.zero_grad()
            loss.backward()
            out['rank{}/logits'.format(rank)] = logits.detach().numpy()
            out['rank{}/loss'.format(rank)] = loss.item()

        # the mean of the ranks' gradients; SGD
        for parameters in zip(*[f.named_parameters() for f in f_q]):
            name = parameters[0][0]
            gradient = torch.stack([p.grad for _, p in parameters]).mean(0)
            out['gradient.' + name] = (gradient + decay * parameters[0][1].detach()).numpy()
            for _, p in parameters:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]['lr'] = lr
            optimizer.step()

        # momentum update
        with torch.no_grad():
            for p_k, p_q in zip(f_k.parameters(), f_q[0].parameters()):
                p_k.copy_(m * p_k + (1 - m) * p_q)

        # enqueue these keys in place of the oldest ones
        queue[:, queue_ptr:queue_ptr + len(k)] = k.T
        queue_ptr = (queue_ptr + len(k)) % queue.shape[1]

        out.update({'queue': queue.numpy().copy(), 'queue_ptr': queue_ptr})
        out.update({'encoder_k.' + name: x for name, x in f_k.arrays().items()})
        for rank, f in enumerate(f_q):
            out.update({'rank{}/encoder_q.{}'.format(rank, name): x
                        for name, x in f.arrays().items()})
        results.update({'{}/{}'.format(step + 1, name): x for name, x in out.items()})
    return dict(results, closest=min(distances))


if __name__ == '__main__':
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        with np.load(path) as arrays:
            np.savez(path[:-len('.npz')] + '.torch.npz', **train(dict(arrays)))
