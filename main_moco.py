#!/usr/bin/env python
"""Unsupervised pre-training by Momentum Contrast, v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297).

The published recipe, on 8 GPUs (reference: 53 hours on 8 V100, 60.9 % for v1 and 67.7 % for v2
after main_lincls.py):

    horovodrun -np 8 python main_moco.py --data /path/to/imagenet [--v2]

One process, any folder of images, its own log folder; the same command again continues where it
stopped:

    ./main_moco.py --data /path/to/images --batch 32 --bn-splits 4 --logdir runs/mine

How fast the training itself is, without data:

    ./main_moco.py --fake --batch 16 --max-steps 40

Shapes: n images of this rank's batch, N of all ranks, S image size, D feature dimension of the
backbone, C of the contrasted features (128), K queue size.
"""
import environment  # noqa: F401, I001  before all that reads it
import argparse
import math
import os

import horovod.tensorflow as hvd
from tensorpack import ModelDesc
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import eval_knn
import launch
import resnet
import training


class MOCOModel(ModelDesc):
    """MoCo: two encoders, a queue of keys, and the update of all three in one train op.

    Args:
        net: a resnet.ResNet.
        batch_size: n, images of this rank in a step.
        feature_dim: C, dimension of queries and keys.
        queue_size: K, the number of negatives.
        momentum: m, of the key encoder.
        temp: T, the temperature.
        mlp: whether the head has a hidden layer (v2).
        weight_decay: of every trainable variable, BN and biases included.
        learning_rate: a function of the step (int64 tensor) that returns a scalar tensor.
        image_size: S.
        seed: of the permutations; the same on all ranks.
        use_xla: whether to compile the key encoder, which no gradient goes through.
        loss_scale: the loss is multiplied and its gradients are divided by this, lest they
            underflow in float16.
    """

    def __init__(self, net, batch_size, feature_dim=128, queue_size=65536, momentum=0.999,
                 temp=0.07, mlp=False, weight_decay=1e-4,
                 learning_rate=lambda step: tf.constant(0.03), image_size=224, seed=0,
                 use_xla=False, loss_scale=1):
        self.net, self.batch_size, self.image_size = net, batch_size, image_size
        self.feature_dim, self.mlp = feature_dim, mlp
        self.K, self.m, self.T = queue_size, momentum, temp
        self.weight_decay, self.learning_rate = weight_decay, learning_rate
        self.seed, self.use_xla, self.loss_scale = seed, use_xla, loss_scale

    def inputs(self):
        shape = [self.batch_size, self.image_size, self.image_size, 3]
        return [tf.TensorSpec(shape, tf.uint8, 'query'), tf.TensorSpec(shape, tf.uint8, 'key')]

    def build_graph(self, query, key):
        """Algorithm 1 of the paper.

        Args:
            query, key: uint8 [n, S, S, 3], two views of the same images.

        Returns:
            The scalar cost.
        """
        self.lr = self.learning_rate(tf.train.get_or_create_global_step())

        # f_q(x_q)
        q = self.encode(query, trainable=True)  # [n, C]

        # f_k(x_k), on images permuted over all ranks and BN splits, so that BN statistics tell
        # nothing about the pairs
        with tf.variable_scope('momentum_encoder'):
            shuffled, unshuffle = self.shuffle(key)  # [n, S, S, 3]
            k = resnet.compile_if(
                self.use_xla, lambda x: self.encode(x, trainable=False), shuffled)  # [n, C]
            all_keys = unshuffle(tf.stop_gradient(k))  # [N, C]
        k = all_keys[hvd.rank() * self.batch_size:][:self.batch_size]  # [n, C]

        # the queue as it was before this step: push_queue() waits for the weights,
        # which wait for the gradients
        queue, queue_ptr = self.create_queue()
        negatives = tf.stop_gradient(queue.read_value())  # [K, C]
        l_pos = tf.einsum('nc,nc->n', q, k)[:, tf.newaxis]  # [n, 1]
        l_neg = tf.einsum('nc,kc->nk', q, negatives)  # [n, K]
        logits = tf.concat([l_pos, l_neg], axis=1) / self.T  # [n, 1+K]

        # contrastive loss: the positive is class 0
        labels = tf.zeros([self.batch_size], tf.int32)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        accuracy = tf.reduce_mean(tf.cast(tf.math.in_top_k(logits, labels, 1), tf.float32))
        decay = self.weight_decay * tf.reduce_sum(
            [tf.nn.l2_loss(v) for v in tf.trainable_variables()])

        # the queue's size goes along for tools/plot_curves.py, which draws the chance level ln(K+1)
        self.monitored = {'loss': loss, 'accuracy': accuracy, 'learning_rate': self.lr,
                          'queue_size': tf.constant(self.K, tf.float32)}
        self.updates_after_weights = (
            lambda: self.update_key_encoder() + self.push_queue(queue, queue_ptr, all_keys))
        return loss + decay

    def encode(self, images, trainable):
        """Backbone, head, and L2 normalisation: uint8 [n, S, S, 3] -> float32 [n, C]."""
        x = self.net(images, training=True, trainable=trainable)  # [n, D]
        hidden = [self.net.feature_dim] if self.mlp else []
        return tf.nn.l2_normalize(resnet.project(x, hidden + [self.feature_dim], trainable), axis=1)

    def shuffle(self, images):
        """Permute all ranks' images over all ranks.

        Args:
            images: [n, ...], this rank's.

        Returns:
            [n, ...], this rank's part of the permuted ones, and a function that takes this rank's
            part of the results [n, C] and returns those of all ranks [N, C] in the original order.
        """
        N = self.batch_size * hvd.size()
        with tf.device('/cpu:0'):
            # every rank computes the same permutation, and a resumed run repeats it
            step = tf.cast(tf.train.get_or_create_global_step(), tf.int32)
            order = tf.argsort(
                tf.random.stateless_uniform([N], seed=[self.seed, step]), stable=True)  # [N]
            inverse = tf.math.invert_permutation(order)
        return (exchange(images, order, inverse),
                lambda results: tf.gather(allgather(results), inverse))

    def create_queue(self):
        """The queue, [K, C] normalised rows that are random at first, and the row to write next."""
        def random_rows(shape, dtype, partition_info=None):
            return tf.nn.l2_normalize(tf.random.normal(shape, dtype=dtype), axis=1)
        queue = tf.get_variable('queue', [self.K, self.feature_dim], initializer=random_rows,
                                trainable=False, use_resource=True)
        queue_ptr = tf.get_variable('queue_ptr', [], tf.int64, initializer=tf.zeros_initializer(),
                                    trainable=False, use_resource=True)
        return queue, queue_ptr

    def push_queue(self, queue, queue_ptr, keys):
        """Replace the oldest keys by keys [N, C] of all ranks."""
        N = self.batch_size * hvd.size()
        # a queue that was filled by another N may end in the middle of them
        rows = (queue_ptr.read_value() + tf.range(N, dtype=tf.int64)) % self.K  # [N]
        pushed = tf.scatter_update(queue, rows, keys)
        with tf.control_dependencies([pushed]):
            return [queue_ptr.assign((rows[-1] + 1) % self.K).op]

    def key_and_query_variables(self):
        """Pairs (k, q) of the key encoder's variables and the query encoder's."""
        variables = {v.op.name: v for v in tf.global_variables()}
        prefix = 'momentum_encoder/'
        return [(v, variables[name[len(prefix):]])
                for name, v in variables.items() if name.startswith(prefix)]

    def update_key_encoder(self):
        """k <- m k + (1 - m) q; not the BN statistics, which the key encoder never uses."""
        # written so that fewer arrays of the model's size are made
        return [k.assign_sub((1 - self.m) * (k.read_value() - q.read_value())).op
                for k, q in self.key_and_query_variables() if not k.op.name.endswith('/EMA')]

    def copy_to_key_encoder(self):
        """Ops with which a fresh run begins: k <- q."""
        return [k.assign(q.read_value()).op for k, q in self.key_and_query_variables()]

    def optimizer(self):
        optimizer = tf.train.MomentumOptimizer(self.lr, 0.9, use_nesterov=True)
        if self.loss_scale == 1:
            return optimizer
        return tf.train.experimental.MixedPrecisionLossScaleOptimizer(optimizer, self.loss_scale)


def exchange(x, order, inverse):
    """Permute the rows of all ranks, each rank receiving only what it keeps.

    Args:
        x: [n, ...], this rank's rows.
        order, inverse: [N], the row for each place and the place of each row; the same everywhere.

    Returns:
        [n, ...], the rows for this rank's places.
    """
    if hvd.size() == 1:
        return tf.gather(x, order)
    n, first = int(x.shape[0]), int(x.shape[0]) * hvd.rank()
    with tf.device('/cpu:0'):
        ranks = inverse[first:first + n] // n  # [n], where this rank's rows go
        sent = tf.argsort(ranks, stable=True)  # [n]
        counts = tf.math.bincount(ranks, minlength=hvd.size())  # [ranks]
        # they arrive rank after rank, each rank's in their order: sorted
        arrived = tf.math.invert_permutation(tf.argsort(order[first:first + n]))  # [n]
    received, _ = hvd.alltoall(tf.stop_gradient(tf.gather(x, sent)), splits=counts)  # [n, ...]
    return tf.gather(received, arrived)


def allgather(x):
    """[n, ...] of every rank -> [N, ...]. No gradient may go through it, or through exchange():
    the collective would wait for ever."""
    return hvd.allgather(tf.stop_gradient(x)) if hvd.size() > 1 else x


def step_schedule(lr, total_batch, steps_per_epoch, epochs):
    """v1: lr scales with the batch, reached in 5 epochs if that makes it larger, and falls 10-fold
    at 60 and 80 %.

    Args:
        lr: the learning rate at batch 256.
        total_batch: images of all ranks in a step.

    Returns:
        A function of the step (tensor), and the learning rate that it reaches.
    """
    peak = lr * total_batch / 256
    warm_up = 5 * steps_per_epoch if peak > lr else 0
    milestones = [int(round(epochs * part * steps_per_epoch)) for part in (0.6, 0.8)]

    def learning_rate(step):
        step = tf.cast(step, tf.int64)
        rate = tf.train.piecewise_constant(
            step, [m - 1 for m in milestones], [peak, peak * 0.1, peak * 0.01])
        if warm_up:
            ramp = lr + (peak - lr) * tf.cast(step, tf.float32) / warm_up
            rate = tf.minimum(rate, tf.cast(ramp, tf.float32))
        return rate
    return learning_rate, peak


def cosine_schedule(lr, steps_per_epoch, epochs):
    """v2: half a cosine from lr to 0 over all steps, whatever the batch; as step_schedule()."""
    def learning_rate(step):
        progress = tf.cast(step, tf.float32) / (epochs * steps_per_epoch)
        return lr * 0.5 * (1 + tf.cos(math.pi * tf.minimum(progress, 1.)))
    return learning_rate, lr


def check_sizes(batch, ranks, splits, queue_size):
    """The batch of one rank.

    Raises:
        ValueError: something does not divide; with the numbers and the nearest values that work.
    """
    n = training.divide_batch(batch, ranks)
    if n % splits:
        raise ValueError(
            '--bn-splits {} does not divide the batch of one rank, {} images: take one of {}'
            .format(splits, n, ', '.join(str(d) for d in range(1, n + 1) if n % d == 0)))
    if queue_size % batch:
        raise ValueError('--queue-size {} is not a multiple of --batch {}: take {}'.format(
            queue_size, batch, training.nearest_multiples(queue_size, batch)))
    return n


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group('what to run')
    group.add_argument('--data', metavar='DIR',
                       help='folder of images: with train/ in it, or any folder, flat or nested')
    group.add_argument('--fake', action='store_true',
                       help='train on one random batch, to measure speed')
    group.add_argument('--v2', action='store_true',
                       help='the recipe of MoCo v2: MLP head, stronger augmentation, '
                       'temperature 0.2, cosine schedule')
    group.add_argument('--logdir', metavar='DIR',
                       help='where checkpoints and logs go; a run that is there already is '
                       'continued (default: train_log/moco_v1 or moco_v2)')
    group.add_argument('--load', metavar='FILE',
                       help='start from these weights, of both encoders and the queue: '
                       'a checkpoint, its folder, an .npz or the official .pth.tar')
    group.add_argument('--knn-every', type=int, default=0, metavar='N',
                       help='kNN classification of val/ by train/ every N epochs; '
                       'needs class folders (default: never)')
    group.add_argument('--seed', type=int, default=0,
                       help='of weights, permutations and augmentation (default: 0)')
    group.add_argument('--max-steps', type=int, metavar='N',
                       help='stop after N steps; the schedule stays as it is')
    launch.add_arguments(group, compiled='key encoder')
    group.add_argument('--amp', action='store_true',
                       help='compute convolutions in 16 bits: bfloat16 on a CPU that has it '
                       '(TensorFlow 2.15), float16 on a GPU (never tried on one)')
    group = parser.add_argument_group('the recipe; defaults are the published values')
    resnet.add_arguments(group)
    training.add_arguments(group, epochs=200, crop_area=[0.2, 1.])
    group.add_argument('--lr', type=float, default=0.03,
                       help='learning rate at a total batch of 256: v1 scales it by '
                       'batch/256, v2 takes it as it is (default: 0.03)')
    group.add_argument('--weight-decay', type=float, default=1e-4,
                       help='of all trainable variables (default: 1e-4)')
    group.add_argument('--queue-size', type=int, default=65536,
                       help='K, keys in the queue (default: 65536)')
    group.add_argument('--momentum', type=float, default=0.999,
                       help='m, of the key encoder (default: 0.999)')
    group.add_argument('--temp', type=float, help='T, the temperature (default: 0.07, v2 0.2)')
    group.add_argument('--bn-splits', type=int, default=1, metavar='N',
                       help='normalise N parts of a rank\'s batch on their own, as N GPUs would; '
                       'take 4 or 8 when there is one rank (default: 1)')
    args = parser.parse_args(argv)
    if bool(args.data) == args.fake:
        parser.error('give either --data DIR or --fake')
    if args.fake and args.knn_every:
        parser.error('--knn-every needs --data')
    training.check_arguments(parser, args, 'queue_size', 'bn_splits', 'temp')
    return args


def main(args):
    threads, ending, gpu = launch.begin(args.stall_limit)
    if args.amp and launch.mixed_precision_rewrite(gpu) is None:
        launch.fail('--amp: TensorFlow {} computes in 16 bits on {}'.format(
            tf.__version__, 'a GPU only' if tf.__version__ < '2' else
            'a GPU, or a CPU with bfloat16 (avx512_bf16)'))
    logdir = args.logdir or os.path.join('train_log', 'moco_v2' if args.v2 else 'moco_v1')
    try:
        batch_size = check_sizes(args.batch, hvd.size(), args.bn_splits, args.queue_size)
        if args.knn_every:
            eval_knn.check_data(args.data)
        training.open_logdir(logdir)
        checkpoint, steps_done = training.find_resume(logdir)
    except (ValueError, resnet.WeightsError) as error:
        launch.fail(error)

    # data
    folder = launch.private_folder()
    if args.fake:
        num_images, source = 1281167, training.FakeInput()
    else:
        server = launch.DataServer(folder + '-train', {
            'task': 'moco-v2' if args.v2 else 'moco-v1', 'data': args.data, 'batch': batch_size,
            'image-size': args.image_size, 'crop-area': args.crop_area, 'seed': args.seed,
        }, ending, args.workers)
        num_images = server.start(start_batch=steps_done)['images']
        if num_images < hvd.size():
            launch.fail('--data {}: {} images for {} ranks'.format(
                args.data, num_images, hvd.size()))
        source = training.PullInput(server.end_points, args.stall_limit)
    steps_per_epoch, max_steps = training.count_steps(args, num_images)

    # model
    if args.v2:
        learning_rate, peak = cosine_schedule(args.lr, steps_per_epoch, args.epochs)
    else:
        learning_rate, peak = step_schedule(args.lr, args.batch, steps_per_epoch, args.epochs)
    tf.set_random_seed(args.seed)
    net = resnet.ResNet(args.depth, args.width, args.stem, 'NCHW' if gpu else 'NHWC',
                        args.bn_splits)
    model = MOCOModel(
        net, batch_size, queue_size=args.queue_size, momentum=args.momentum, mlp=args.v2,
        temp=args.temp or (0.2 if args.v2 else 0.07), weight_decay=args.weight_decay,
        learning_rate=learning_rate, image_size=args.image_size, seed=args.seed,
        use_xla=gpu if args.xla is None else args.xla,
        loss_scale=128 if args.amp and gpu else 1)
    trainer = training.Trainer(ending, launch.session_config(threads, gpu, args.amp),
                               lambda: model.updates_after_weights())
    trainer.setup_graph(model.get_input_signature(), training.staged_if(gpu, source),
                        model.build_graph, model.get_optimizer)
    logger.info(
        '{} images, {} in a step on {} ranks ({} each, BN over {}), {} steps an epoch, '
        'learning rate {:g}'.format(
            num_images, args.batch, hvd.size(), batch_size, batch_size // args.bn_splits,
            steps_per_epoch, peak))

    # where to start: rank 0, from which the others get all variables
    try:
        if checkpoint:
            start = training.Resume(checkpoint)
            logger.info('continuing {} after step {}'.format(checkpoint, steps_done))
        elif args.load and hvd.rank() == 0:
            start = training.Assign(resnet.load_weights(args.load, resnet.is_model))
        else:
            start = training.Assign({}, model.copy_to_key_encoder())
    except resnet.WeightsError as error:
        launch.fail(error)

    # train
    callbacks = [
        training.EpochMeans(model.monitored, ending),
        training.Speed(args.batch, None if args.fake else source.waited()),
        training.Save(ending, max_to_keep=10)]
    if args.knn_every:
        def features(images):
            return resnet.compile_if(model.use_xla, lambda x: net(x, training=False), images)
        callbacks.append(eval_knn.OnlineKNN(
            args.knn_every, features, args.data, args.image_size, folder + '-knn', ending,
            args.workers))
    trainer.run(callbacks, start, steps_per_epoch, steps_done, max_steps)
    if not args.fake:
        server.stop()


if __name__ == '__main__':
    main(parse_args())
