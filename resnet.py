"""Images in, features out: ResNet (He et al. 2015, stride in the 3x3 convolution).

Variable names are those of the released MoCo weights (conv0/W, group0/block0/conv1_bn/gamma ...).

Shapes: N images of a batch, S image size, H W height and width of a feature map, C channels,
D feature dimension.
"""
import collections
from typing import Iterator, List

import numpy as np

try:
    from tensorpack import tfv1 as tf
except ImportError:  # names and shapes are needed without TensorFlow too, to convert weights
    tf = None

# depth -> kernels of a block's convolutions, number of blocks in each of the four groups
BASIC, BOTTLENECK = (3, 3), (1, 3, 1)
DEPTHS = {
    18: (BASIC, (2, 2, 2, 2)),
    34: (BASIC, (3, 4, 6, 3)),
    50: (BOTTLENECK, (3, 4, 6, 3)),
    101: (BOTTLENECK, (3, 4, 23, 3)),
}
# stem -> kernel, stride, whether a 3x3 max-pool of stride 2 follows
STEMS = {
    'imagenet': (7, 2, True),
    '3x3': (3, 1, False),
    '3x3s2': (3, 2, False),
}
# of the ImageNet training set, in OpenCV's channel order
MEAN_BGR = np.array([0.406, 0.456, 0.485], np.float32) * 255
STD_BGR = np.array([0.225, 0.224, 0.229], np.float32) * 255

BN_MOMENTUM = 0.9
BN_EPSILON = 1.001e-5  # the smallest that cuDNN takes, and the released weights' value
BATCH_STATISTICS = 'batch_statistics'  # collection of (moving average, the batch's value)

Conv = collections.namedtuple('Conv', 'name kernel inputs outputs stride')
Block = collections.namedtuple('Block', 'name convs shortcut')  # shortcut: Conv, None for identity


def list_blocks(depth: int, width: int) -> Iterator[Block]:
    """The residual blocks, in the order of the data."""
    kernels, groups = DEPTHS[depth]
    inputs = width
    for g, num_blocks in enumerate(groups):
        inner = width << g
        outer = inner * (4 if kernels == BOTTLENECK else 1)
        for b in range(num_blocks):
            stride = 2 if g > 0 and b == 0 else 1
            shortcut = (Conv('convshortcut', 1, inputs, outer, stride)
                        if stride != 1 or inputs != outer else None)
            convs = []
            for i, kernel in enumerate(kernels):
                outputs = outer if i == len(kernels) - 1 else inner
                convs.append(Conv(f'conv{i + 1}', kernel, inputs, outputs,
                                  stride if i == kernels.index(3) else 1))
                inputs = outputs
            yield Block(f'group{g}/block{b}', convs, shortcut)


class ResNet:
    """A ResNet up to its global average. Calling it in two variable scopes gives two networks;
    calling it again under `reuse=True` shares weights.

    Args:
        depth, stem: one of DEPTHS, and of STEMS; '3x3' and '3x3s2' are for small images.
        width: channels of the first group, 64 as published.
        data_format: 'NCHW' (GPU) or 'NHWC' (CPU); images come as NHWC in both cases.
        bn_splits: in training, every BN layer normalises this many equal parts of the batch on
            their own, as that many GPUs would.
        mean_bgr, std_bgr: of the channels of images, 0..255.
    """

    def __init__(self, depth=50, width=64, stem='imagenet', data_format='NHWC', bn_splits=1,
                 mean_bgr=MEAN_BGR, std_bgr=STD_BGR):
        kernel, stride, self.has_pool = STEMS[stem]
        self.conv0 = Conv('conv0', kernel, 3, width, stride)
        self.blocks = list(list_blocks(depth, width))
        self.feature_dim = self.blocks[-1].convs[-1].outputs
        self.data_format, self.bn_splits = data_format, bn_splits
        self._spatial_axes = [2, 3] if data_format == 'NCHW' else [1, 2]
        self.mean_bgr, self.std_bgr = mean_bgr, std_bgr

    def __call__(self, images, training: bool, trainable: bool = True):
        """Compute features, uint8 BGR [N, S, S, 3] -> float32 [N, D].

        Args:
            training: whether BN normalises with the batch's statistics. If it does and `trainable`
                is set too, update_moving_averages() follows these.
            trainable: whether the variables are to be trained by gradient.
        """
        mode = training, trainable
        with tf.variable_scope(tf.get_variable_scope(), use_resource=True):
            x = (tf.cast(images, tf.float32) - self.mean_bgr) * (1 / self.std_bgr)  # [N, S, S, 3]
            if self.data_format == 'NCHW':
                x = tf.transpose(x, [0, 3, 1, 2])  # [N, 3, S, S]

            x = tf.nn.relu(self._conv(x, self.conv0, *mode))  # [N, S/2, S/2, width]
            if self.has_pool:
                x = self._max_pool(x)  # [N, S/4, S/4, width]
            for block in self.blocks:
                with tf.variable_scope(block.name):
                    shortcut = self._conv(x, block.shortcut, *mode) if block.shortcut else x
                    *inner, last = block.convs
                    for conv in inner:
                        x = tf.nn.relu(self._conv(x, conv, *mode))
                    x = tf.nn.relu(self._conv(x, last, *mode) + shortcut)  # [N, H, W, C]
            return tf.reduce_mean(x, self._spatial_axes)  # [N, D]

    def _per_axis(self, spatial, other):
        """[other, spatial, spatial, other] or [other, other, spatial, spatial], by data format."""
        return [spatial if axis in self._spatial_axes else other for axis in range(4)]

    def _pad(self, x, amount):
        return tf.pad(x, self._per_axis([amount, amount], [0, 0]))

    def _conv(self, x, conv, training, trainable):
        """Convolution and BN."""
        with tf.variable_scope(conv.name):
            weights = tf.get_variable(
                'W', [conv.kernel, conv.kernel, conv.inputs, conv.outputs], trainable=trainable,
                initializer=tf.variance_scaling_initializer(
                    2.0, mode='fan_out', distribution='untruncated_normal'))
        # with a stride, TensorFlow's SAME pads the bottom right only; PyTorch, hence MoCo, pads
        # all sides alike
        padding = 'SAME'
        if conv.stride > 1 and conv.kernel > 1:
            x, padding = self._pad(x, conv.kernel // 2), 'VALID'
        x = tf.nn.conv2d(x, weights, strides=self._per_axis(conv.stride, 1), padding=padding,
                         data_format=self.data_format)
        return self._batch_norm(conv.name + '_bn', x, conv.outputs, training, trainable)

    def _max_pool(self, x):
        # x follows a ReLU, so padding with zeros is padding with nothing
        return tf.nn.max_pool(
            self._pad(x, 1), ksize=self._per_axis(3, 1), strides=self._per_axis(2, 1),
            padding='VALID', data_format=self.data_format)

    def _batch_norm(self, name, x, channels, training, trainable):
        with tf.variable_scope(name):
            zeros, ones, C = tf.zeros_initializer(), tf.ones_initializer(), [channels]
            gamma = tf.get_variable('gamma', C, initializer=ones, trainable=trainable)
            beta = tf.get_variable('beta', C, initializer=zeros, trainable=trainable)
            ema_mean = tf.get_variable('mean/EMA', C, initializer=zeros, trainable=False)
            ema_variance = tf.get_variable('variance/EMA', C, initializer=ones, trainable=False)

        def normalize(x, *statistics):
            return tf.nn.fused_batch_norm(x, gamma, beta, *statistics, epsilon=BN_EPSILON,
                                          data_format=self.data_format, is_training=not statistics)

        if not training:
            return normalize(x, ema_mean, ema_variance)[0]
        parts = tf.split(x, self.bn_splits) if self.bn_splits > 1 else [x]
        outputs, means, variances = zip(*map(normalize, parts))
        if trainable:
            # the fused op returns the unbiased variance, of n/(n-1), which PyTorch averages too
            for ema, values in ((ema_mean, means), (ema_variance, variances)):
                tf.add_to_collection(BATCH_STATISTICS, (ema, tf.reduce_mean(values, axis=0)))
        return tf.concat(outputs, 0) if len(outputs) > 1 else outputs[0]


def update_moving_averages() -> list:
    """Ops that move the averages of every trained BN layer towards the batch's statistics."""
    return [ema.assign_add((1 - BN_MOMENTUM) * (value - ema.read_value())).op
            for ema, value in tf.get_collection(BATCH_STATISTICS)]


def fully_connected(name: str, x, dim: int, trainable: bool = True):
    """A linear layer, float32 [N, C] -> [N, dim]: zero bias, and weights normal(0, 0.01) for 2048
    inputs, as published, else normal(0, 1/sqrt(C)). At 256 inputs, 0.01 makes outputs so small that
    the gradients of a normalised head blow up: within a hundred steps its biases outgrow everything
    that depends on the image, and all keys are alike."""
    with tf.variable_scope(name, use_resource=True):
        fan_in = int(x.shape[1])
        init = tf.random_normal_initializer(stddev=0.01 if fan_in == 2048 else fan_in ** -0.5)
        weights = tf.get_variable('W', [fan_in, dim], initializer=init, trainable=trainable)
        bias = tf.get_variable('b', [dim], initializer=tf.zeros_initializer(), trainable=trainable)
    return tf.nn.xw_plus_b(x, weights, bias)


def project(x, dims: List[int], trainable: bool = True):
    """A head, float32 [N, D] -> [N, dims[-1]]: linear layers with ReLU in between, named
    linear0_<dim>, linear1_<dim> ..."""
    for i, dim in enumerate(dims):
        x = fully_connected(f'linear{i}_{dim}', tf.nn.relu(x) if i else x, dim, trainable)
    return x


def compile_if(use_xla: bool, function, x):
    """function(x), as one XLA cluster if wanted; no gradient can be taken through a cluster."""
    if not use_xla:
        return function(x)
    output, = tf.xla.experimental.compile(lambda x: [function(x)], [x])
    output.set_shape(x.shape[:1].concatenate(output.shape[1:]))
    return output
