"""Images in, features out: normalisation, ResNet, and loading its weights.

Variable names are those of the released MoCo weights (conv0/W, group0/block0/conv1_bn/gamma ...),
so that a released .npz loads with nothing renamed.

Shapes: N images of a batch, S image size, H W height and width of a feature map, C channels,
D feature dimension.
"""
import numpy as np
from tensorpack import tfv1 as tf

# some of these are here for those who import resnet
from checkpoints import (  # noqa: F401
    DEPTHS, WeightsError, compare, find_checkpoint, head_dims, is_backbone, is_head, is_model,
    read_weights)

# stem -> (kernel, stride, whether a 3x3 max-pool of stride 2 follows)
STEMS = {
    'imagenet': (7, 2, True),
    '3x3': (3, 1, False),
    '3x3s2': (3, 2, False),
}
# of the ImageNet training set, in OpenCV's channel order
MEAN_BGR = np.array([0.406, 0.456, 0.485], np.float32) * 255
STD_BGR = np.array([0.225, 0.224, 0.229], np.float32) * 255


class ResNet:
    """A residual network (He et al. 2015, stride in the 3x3 convolution) up to its global average.

    Calling it twice in two variable scopes gives two networks;
    calling it again under `reuse=True` shares weights.

    Args:
        depth: one of DEPTHS.
        width: channels of the first group, 64 as published.
        stem: one of STEMS; 'imagenet' as published, '3x3' and '3x3s2' (stride 2) for small images.
        data_format: 'NCHW' (GPU) or 'NHWC' (CPU); images come as NHWC in both cases.
        bn_splits: in training, every BN layer normalises this many equal parts of the batch on
            their own, as that many GPUs would.
        mean_bgr, std_bgr: of the channels of images, 0..255.
    """

    BN_MOMENTUM = 0.9
    BN_EPSILON = 1.001e-5  # the smallest that cuDNN takes, and the released weights' value

    def __init__(self, depth=50, width=64, stem='imagenet', data_format='NHWC', bn_splits=1,
                 mean_bgr=MEAN_BGR, std_bgr=STD_BGR):
        self.block, self.blocks = DEPTHS[depth]
        self.depth, self.width, self.stem = depth, width, stem
        self.data_format, self.bn_splits = data_format, bn_splits
        self.mean_bgr, self.std_bgr = mean_bgr, std_bgr
        self.feature_dim = width * 8 * (4 if self.block == 'bottleneck' else 1)

    def __call__(self, images, training, trainable=True):
        """Compute features.

        Args:
            images: uint8 [N, S, S, 3], BGR.
            training: whether BN normalises with the batch's statistics. If it does and `trainable`
                is set too, updates of the moving averages are put into tf.GraphKeys.UPDATE_OPS.
            trainable: whether the variables are to be trained by gradient.

        Returns:
            float32 [N, D].
        """
        self._training, self._trainable = training, trainable
        with tf.variable_scope(tf.get_variable_scope(), use_resource=True):
            x = (tf.cast(images, tf.float32) - self.mean_bgr) * (1 / self.std_bgr)  # [N, S, S, 3]
            if self.data_format == 'NCHW':
                x = tf.transpose(x, [0, 3, 1, 2])  # [N, 3, S, S]

            kernel, stride, pool = STEMS[self.stem]
            x = self._conv('conv0', x, self.width, kernel, stride, relu=True)
            if pool:
                x = self._max_pool(x)  # [N, S/4, S/4, width]
            for g, num_blocks in enumerate(self.blocks):
                for b in range(num_blocks):
                    with tf.variable_scope('group{}/block{}'.format(g, b)):
                        x = self._residual(x, self.width << g, 2 if g > 0 and b == 0 else 1)
            return tf.reduce_mean(x, self._spatial_axes)  # [N, D]

    @property
    def _spatial_axes(self):
        return [2, 3] if self.data_format == 'NCHW' else [1, 2]

    def _per_axis(self, spatial, other):
        """[other, spatial, spatial, other] or [other, other, spatial, spatial],
        as the data format wants it."""
        return [spatial if axis in self._spatial_axes else other for axis in range(4)]

    def _residual(self, x, channels, stride):
        shortcut = x
        out_channels = channels * (4 if self.block == 'bottleneck' else 1)
        if stride != 1 or _num_channels(x, self.data_format) != out_channels:
            shortcut = self._conv('convshortcut', x, out_channels, 1, stride)
        if self.block == 'bottleneck':
            x = self._conv('conv1', x, channels, 1, 1, relu=True)
            x = self._conv('conv2', x, channels, 3, stride, relu=True)
            x = self._conv('conv3', x, out_channels, 1, 1)
        else:
            x = self._conv('conv1', x, channels, 3, stride, relu=True)
            x = self._conv('conv2', x, channels, 3, 1)
        return tf.nn.relu(x + shortcut)

    def _pad(self, x, amount):
        return tf.pad(x, self._per_axis([amount, amount], [0, 0]))

    def _conv(self, name, x, channels, kernel, stride, relu=False):
        shape = [kernel, kernel, _num_channels(x, self.data_format), channels]
        init = tf.variance_scaling_initializer(
            2.0, mode='fan_out', distribution='untruncated_normal')
        with tf.variable_scope(name):
            weights = tf.get_variable('W', shape, initializer=init, trainable=self._trainable)
        # with a stride, TensorFlow's SAME pads the bottom right only; PyTorch, hence MoCo,
        # pads all sides alike
        padding = 'SAME'
        if stride > 1 and kernel > 1:
            x, padding = self._pad(x, kernel // 2), 'VALID'
        x = tf.nn.conv2d(x, weights, strides=self._per_axis(stride, 1), padding=padding,
                         data_format=self.data_format)
        x = self._batch_norm(name + '_bn', x)
        return tf.nn.relu(x) if relu else x

    def _max_pool(self, x):
        # x follows a ReLU, so padding with zeros is padding with nothing
        return tf.nn.max_pool(
            self._pad(x, 1), ksize=self._per_axis(3, 1), strides=self._per_axis(2, 1),
            padding='VALID', data_format=self.data_format)

    def _batch_norm(self, name, x):
        shape = [_num_channels(x, self.data_format)]
        with tf.variable_scope(name):
            gamma = tf.get_variable(
                'gamma', shape, initializer=tf.ones_initializer(), trainable=self._trainable)
            beta = tf.get_variable(
                'beta', shape, initializer=tf.zeros_initializer(), trainable=self._trainable)
            ema_mean = tf.get_variable(
                'mean/EMA', shape, initializer=tf.zeros_initializer(), trainable=False)
            ema_var = tf.get_variable(
                'variance/EMA', shape, initializer=tf.ones_initializer(), trainable=False)

        def normalize(x, *statistics):
            return tf.nn.fused_batch_norm(x, gamma, beta, *statistics, epsilon=self.BN_EPSILON,
                                          data_format=self.data_format, is_training=not statistics)

        if not self._training:
            return normalize(x, ema_mean, ema_var)[0]
        parts = [normalize(part) for part in
                 (tf.split(x, self.bn_splits) if self.bn_splits > 1 else [x])]
        if self._trainable:
            # the fused op returns the unbiased variance, of n/(n-1),
            # which is what PyTorch averages too
            _, means, variances = zip(*parts)
            for ema, values in ((ema_mean, means), (ema_var, variances)):
                change = (1 - self.BN_MOMENTUM) * (tf.reduce_mean(values, axis=0) - ema)
                tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign_add(ema, change).op)
        return tf.concat([part[0] for part in parts], 0) if len(parts) > 1 else parts[0][0]


def _num_channels(x, data_format):
    return int(x.shape[1 if data_format == 'NCHW' else 3])


def fully_connected(name, x, dim, trainable=True):
    """A linear layer: zero bias, and normal(0, 0.01) for C = 2048, as published;
    else normal(0, 1/sqrt(C)).

    At 256 inputs, 0.01 makes outputs so small that the gradients of a normalised head blow up:
    within a hundred steps its biases outgrow everything that depends on the image, and all keys are
    alike.

    Args:
        x: float32 [N, C].

    Returns:
        float32 [N, dim].
    """
    with tf.variable_scope(name, use_resource=True):
        fan_in = int(x.shape[1])
        init = tf.random_normal_initializer(stddev=0.01 if fan_in == 2048 else fan_in ** -0.5)
        weights = tf.get_variable('W', [fan_in, dim], initializer=init, trainable=trainable)
        bias = tf.get_variable('b', [dim], initializer=tf.zeros_initializer(), trainable=trainable)
    return tf.nn.xw_plus_b(x, weights, bias)


def project(x, dims, trainable=True):
    """A head: linear layers with ReLU in between, named linear0_<dim>, linear1_<dim> ...

    Args:
        x: float32 [N, D].
        dims: output dimensions of the layers.

    Returns:
        float32 [N, dims[-1]].
    """
    for i, dim in enumerate(dims):
        x = tf.nn.relu(x) if i > 0 else x
        x = fully_connected('linear{}_{}'.format(i, dim), x, dim, trainable)
    return x


def compile_if(use_xla, function, x):
    """function(x), as one XLA cluster if wanted.
    No gradient can be taken through a cluster from outside."""
    if not use_xla:
        return function(x)
    output, = tf.xla.experimental.compile(lambda x: [function(x)], [x])
    output.set_shape(x.shape[:1].concatenate(output.shape[1:]))
    return output


def check_weights(path, weights, variables):
    """Strictly compare what a file holds with what a graph needs.

    Args:
        path: for the message.
        weights: dict of name -> array, all of which must have a place.
        variables: the variables that need a value, all of them.

    Raises:
        WeightsError: any is missing, left over, or of another shape; the message lists them.
    """
    problems = compare(weights, {v.op.name: tuple(v.shape.as_list()) for v in variables})
    if problems:
        rest = ['... and {} more'.format(len(problems) - 6)] if len(problems) > 6 else []
        raise WeightsError(
            '{}: does not fit this network (other depth, width, stem or recipe?): {}'.format(
                path, '; '.join(problems[:6] + rest)))


def load_weights(path, wanted):
    """Read weights and check them strictly against the variables of the default graph.

    Args:
        path: as in find_checkpoint().
        wanted: a predicate on names, is_backbone or is_model say: which part of both is compared.

    Returns:
        dict: name -> array, one for each wanted variable of the graph.

    Raises:
        WeightsError: there is no such file, or it does not fit exactly.
    """
    weights = read_weights(path, wanted)
    check_weights(path, weights, [v for v in tf.global_variables() if wanted(v.op.name)])
    return weights


def assign(sess, values):
    """Give variables of the session's graph new values.

    Args:
        values: dict of name -> array.
    """
    variables = [v for v in sess.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
                 if v.op.name in values]
    # through the initialisers, as Variable.load() does: no new ops,
    # so it works on a finalised graph
    sess.run([v.initializer for v in variables],
             {v.initializer.inputs[1]: values[v.op.name] for v in variables})


def add_arguments(parser):
    """The flags that describe a network."""
    parser.add_argument('--depth', type=int, default=50, choices=sorted(DEPTHS),
                        help='layers of the ResNet (default: 50)')
    parser.add_argument('--width', type=int, default=64,
                        help='channels of the first group (default: 64)')
    parser.add_argument('--stem', default='imagenet', choices=sorted(STEMS),
                        help='first layers: imagenet is 7x7 of stride 2 and a pool; 3x3 and 3x3s2 '
                        '(stride 2) are for small images (default: imagenet)')
    parser.add_argument('--image-size', type=int, default=224,
                        help='of the square input, in pixels (default: 224)')
