#!/usr/bin/env python
"""Linear classification: one layer on the frozen features of a pre-trained backbone.

    ./main_lincls.py --load train_log/moco_v2 --data /path/to/imagenet
    horovodrun -np 8 python main_lincls.py --load MoCo_v2.npz --data /path/to/imagenet

Reference: 100 epochs, about 8 hours on 8 V100; 60.9 % (v1) and 67.7 % (v2). Validation runs after
every epoch, each image exactly once. The same command continues a run that stopped.

Shapes: n images of this rank's batch, S image size, D feature dimension, C classes.
"""
import environment  # noqa: F401, I001  before all that reads it
import argparse
import os

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import ModelDesc
from tensorpack import tfv1 as tf
from tensorpack.callbacks import Callback
from tensorpack.utils import logger

import eval_knn
import heartbeat
import launch
import resnet
import training

MILESTONES = (0.6, 0.7, 0.8, 0.9)  # of the epochs: the learning rate falls 10-fold at each


class LinearModel(ModelDesc):
    """A linear classifier on frozen features.

    Args:
        net: a resnet.ResNet.
        num_classes: C.
        batch_size: n, images of this rank in a step.
        learning_rate: a function of the step (int64 tensor) that returns a scalar tensor.
        weight_decay: of the classifier.
        image_size: S.
        use_xla: whether to compile the backbone.
    """

    def __init__(self, net, num_classes, batch_size, learning_rate=lambda step: tf.constant(30.),
                 weight_decay=0., image_size=224, use_xla=False):
        self.net, self.num_classes, self.batch_size, self.image_size = (
            net, num_classes, batch_size, image_size)
        self.learning_rate, self.weight_decay, self.use_xla = learning_rate, weight_decay, use_xla

    def inputs(self):
        return [
            tf.TensorSpec(
                [self.batch_size, self.image_size, self.image_size, 3], tf.uint8, 'images'),
            tf.TensorSpec([self.batch_size], tf.int32, 'labels')]

    def classify(self, images):
        """uint8 [n, S, S, 3] -> logits, float32 [n, C];
        BN normalises with the moving statistics."""
        features = resnet.compile_if(
            self.use_xla, lambda x: self.net(x, training=False, trainable=False), images)  # [n, D]
        return resnet.fully_connected('linear', tf.stop_gradient(features), self.num_classes)

    def build_graph(self, images, labels):
        logits = self.classify(images)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        top1 = 100 * tf.reduce_mean(tf.cast(tf.math.in_top_k(logits, labels, 1), tf.float32))
        self.lr = self.learning_rate(tf.train.get_or_create_global_step())
        self.monitored = {'loss': loss, 'train_top1': top1, 'learning_rate': self.lr}
        decay = self.weight_decay * tf.reduce_sum(
            [tf.nn.l2_loss(v) for v in tf.trainable_variables()])
        return loss + decay

    def optimizer(self):
        return tf.train.MomentumOptimizer(self.lr, 0.9)


class Validate(Callback):
    """Top-1 and top-5 over the validation images after every epoch, all ranks together.

    Args:
        model: the LinearModel that is being trained.
        others: for launch.BoundedPass.
    """
    _chief_only = False

    def __init__(self, model, *others):
        self._model, self._others = model, others

    def _setup_graph(self):
        self._pass = launch.BoundedPass(*self._others)
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            logits = self._model.classify(self._pass.images)  # [n, C]
        top5 = min(5, self._model.num_classes)
        self._correct = [
            tf.reduce_sum(tf.cast(tf.math.in_top_k(logits, self._pass.labels, k), tf.int64))
            for k in (1, top5)]
        self._correct.append(tf.size(self._pass.labels, out_type=tf.int64))
        self._counts = tf.placeholder(tf.int64, [3])
        self._total = hvd.allreduce(self._counts, op=hvd.Sum)

    def _trigger_epoch(self):
        counts = np.sum(list(self._pass.run(self.trainer.sess, self._correct)), axis=0)
        heartbeat.meet()
        top1, top5, images = self.trainer.sess.run(self._total, {self._counts: counts})
        self.trainer.monitors.put_scalar('val_top1', 100. * top1 / images)
        self.trainer.monitors.put_scalar('val_top5', 100. * top5 / images)
        self.trainer.monitors.put_scalar('val_images', images)


def check_unchanged(sess, loaded):
    """Raise WeightsError if the backbone is not what was loaded:
    the result would be that of other features."""
    variables = {v.op.name: v for v in sess.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
                 if v.op.name in loaded}
    now = sess.run(variables)
    changed = [name for name in sorted(loaded) if not np.array_equal(loaded[name], now[name])]
    if changed:
        raise resnet.WeightsError(
            '{} variables of the frozen backbone are not as loaded, {} the first: they changed in '
            'training, or --logdir is of another backbone'.format(len(changed), changed[0]))


class CheckUnchanged(Callback):
    """check_unchanged() after training, and before it:
    a resumed run must have been one of this backbone."""

    def __init__(self, loaded):
        self._loaded = loaded

    def _check(self):
        try:
            check_unchanged(self.trainer.sess, self._loaded)
        except resnet.WeightsError as error:
            launch.fail(error)

    def _before_train(self):
        self._check()

    def _trigger_epoch(self):
        if self.epoch_num == self.trainer.max_epoch:
            self._check()
            logger.info('the backbone is unchanged ({} variables compared)'.format(
                len(self._loaded)))


def step_schedule(lr, total_batch, steps_per_epoch, epochs):
    """lr, scaled by total_batch/256, divided by 10 at each of MILESTONES.

    Returns:
        A function of the step (tensor).
    """
    peak = lr * total_batch / 256
    boundaries = [int(round(epochs * part * steps_per_epoch)) - 1 for part in MILESTONES]
    values = [peak * 0.1 ** i for i in range(len(boundaries) + 1)]
    return lambda step: tf.train.piecewise_constant(tf.cast(step, tf.int64), boundaries, values)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group('what to run')
    group.add_argument('--load', metavar='FILE', required=True,
                       help='pre-trained weights: a checkpoint, its folder (the newest one is '
                       'taken), an .npz or a file of PyTorch')
    group.add_argument('--data', metavar='DIR', required=True,
                       help='folder with train/ and val/ of labelled images')
    group.add_argument('--logdir', metavar='DIR', default=os.path.join('train_log', 'lincls'),
                       help='where checkpoints and logs go (default: train_log/lincls)')
    group.add_argument('--seed', type=int, default=0,
                       help='of weights and augmentation (default: 0)')
    group.add_argument('--max-steps', type=int, metavar='N',
                       help='stop after N steps; the schedule stays as it is')
    launch.add_arguments(group, compiled='backbone')
    group = parser.add_argument_group('the recipe; defaults are the published values')
    resnet.add_arguments(group)
    training.add_arguments(group, epochs=100, crop_area=[0.08, 1.])
    group.add_argument('--lr', type=float, default=30.,
                       help='learning rate at a total batch of 256; it is scaled by '
                       'batch/256 (default: 30)')
    group.add_argument('--weight-decay', type=float, default=0.,
                       help='of the classifier (default: 0)')
    args = parser.parse_args(argv)
    training.check_arguments(parser, args)
    return args


def main(args):
    threads, ending, gpu = launch.begin(args.stall_limit)
    try:
        # read by rank 0, from which the others get all variables
        path = resnet.find_checkpoint(args.load) if hvd.rank() == 0 else None
        batch_size = training.divide_batch(args.batch, hvd.size())
        eval_knn.check_data(args.data)
        training.open_logdir(args.logdir)
        checkpoint, steps_done = training.find_resume(args.logdir)
    except ValueError as error:
        launch.fail(error)

    # data
    folder = launch.private_folder()
    server = launch.DataServer(folder + '-train', {
        'task': 'linear', 'data': args.data, 'batch': batch_size, 'image-size': args.image_size,
        'crop-area': args.crop_area, 'seed': args.seed}, ending, args.workers)
    facts = server.start(start_batch=steps_done)
    steps_per_epoch, max_steps = training.count_steps(args, facts['images'])
    source = training.PullInput(server.end_points, args.stall_limit)

    # model
    tf.set_random_seed(args.seed)
    net = resnet.ResNet(args.depth, args.width, args.stem, 'NCHW' if gpu else 'NHWC')
    model = LinearModel(
        net, facts['classes'], batch_size,
        step_schedule(args.lr, args.batch, steps_per_epoch, args.epochs), args.weight_decay,
        args.image_size, use_xla=gpu if args.xla is None else args.xla)
    trainer = training.Trainer(ending, launch.session_config(threads, gpu))
    trainer.setup_graph(model.get_input_signature(), training.staged_if(gpu, source),
                        model.build_graph, model.get_optimizer)
    logger.info(
        '{} images of {} classes, {} in a step on {} ranks ({} each), {} steps an epoch, '
        'learning rate {:g}'.format(
            facts['images'], facts['classes'], args.batch, hvd.size(), batch_size,
            steps_per_epoch, args.lr * args.batch / 256))
    try:
        backbone = resnet.load_weights(path, resnet.is_backbone) if hvd.rank() == 0 else {}
    except resnet.WeightsError as error:
        launch.fail(error)
    logger.info('{} backbone variables from {}'.format(len(backbone), path))

    # train
    start = training.Resume(checkpoint) if checkpoint else training.Assign(backbone)
    trainer.run([
        training.EpochMeans(model.monitored, ending),
        training.Speed(args.batch, source.waited()),
        CheckUnchanged(backbone),
        training.Save(ending, max_to_keep=3),
        Validate(model, folder + '-val', args.data, 'val', args.image_size, batch_size, ending,
                 args.workers),
    ], start, steps_per_epoch, steps_done, max_steps)
    server.stop()


if __name__ == '__main__':
    main(parse_args())
