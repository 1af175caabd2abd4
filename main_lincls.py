#!/usr/bin/env python
"""Linear classification: one layer on the frozen features of a pre-trained backbone.

    ./main_lincls.py --load train_log/moco_v2 --data /path/to/imagenet
    horovodrun -np 8 python main_lincls.py --load MoCo_v2.npz --data /path/to/imagenet

With few labels, and with a backbone that is trained too:

    ./main_lincls.py --load train_log/moco_v2 --data /path/to/imagenet --labels 1% --finetune

Reference: 100 epochs, about 8 hours on 8 V100; 60.9 % (v1) and 67.7 % (v2). Validation runs after
every epoch, each image exactly once. The same command continues a run that stopped.

Shapes: n images of this rank's batch, S image size, D feature dimension, C classes.
"""
import sys

if __name__ == '__main__':
    from job import cores, launcher
    launcher.join(sys.argv[1:])
    cores.set_up(sys.argv[1:])  # before TensorFlow is loaded, which reads what this sets

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import ModelDesc
from tensorpack import tfv1 as tf
from tensorpack.callbacks import Callback
from tensorpack.utils import logger

import inputs
import network
import resnet
import runs
import subset
import weights
from callbacks import Save
from errors import UserError
from job import flags, ranks, start
from job.server import DataServer
from train_step import train_step
from trainer import Trainer

MILESTONES = (0.6, 0.7, 0.8, 0.9)  # of the epochs: the learning rate falls 10-fold at each
# fine-tuning, as SwAV's (arXiv 2006.09882) on 10 % of ImageNet's labels: epochs, learning rate of
# the classifier at a batch of 256, share of it that the backbone has, milestones
FINETUNE = {'epochs': 20, 'lr': 0.2}
BACKBONE_RATE, FINETUNE_MILESTONES = 1 / 20, (0.6, 0.8)


class LinearModel(ModelDesc):
    """A linear classifier on frozen features or, to finetune, on those of a backbone that learns.

    Args:
        net: a resnet.ResNet, compiled if use_xla.
        num_classes, batch_size, image_size: C, n, S.
        learning_rate: a function of the step (int64 tensor) that returns a scalar tensor.
        weight_decay: of what is trained.
        num_labels: images to train on, for the record.
        finetune: whether the backbone is trained too.
    """

    def __init__(self, net, num_classes, batch_size, image_size, learning_rate, weight_decay,
                 use_xla, num_labels=0, finetune=False):
        self.num_labels, self.finetune = num_labels, finetune
        self.net, self.num_classes, self.use_xla = net, num_classes, use_xla
        self.batch_size, self.image_size = batch_size, image_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def inputs(self):
        n, S = self.batch_size, self.image_size
        return [tf.TensorSpec([n, S, S, 3], tf.uint8, 'images'),
                tf.TensorSpec([n], tf.int32, 'labels')]

    def encode(self, images):
        """uint8 [n, S, S, 3] -> features [n, D]; BN normalises with the moving statistics."""
        return tf.stop_gradient(resnet.compile_if(
            self.use_xla, lambda x: self.net(x, training=False, trainable=False), images))

    def classify(self, features):
        """[n, D] -> logits [n, C]"""
        return resnet.fully_connected('linear', features, self.num_classes)

    def build_graph(self, images, labels):
        """uint8 [n, S, S, 3], int32 [n] -> the train op."""
        features = (scale_gradient(self.net(images, training=True), BACKBONE_RATE)
                    if self.finetune else self.encode(images))  # [n, D]
        self.tensors = images, features
        logits = self.classify(features)  # [n, C]
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        top1 = 100 * tf.reduce_mean(tf.cast(tf.math.in_top_k(logits, labels, 1), tf.float32))
        rate = self.learning_rate(tf.train.get_or_create_global_step())
        self.monitored = {'loss': loss, 'train_top1': top1, 'learning_rate': rate,
                          'labels': tf.constant(self.num_labels, tf.float32)}
        decay = self.weight_decay * tf.reduce_sum(
            [tf.nn.l2_loss(v) for v in tf.trainable_variables()])
        return train_step(loss + decay, tf.train.MomentumOptimizer(rate, 0.9),
                          *[resnet.update_moving_averages] * self.finetune)


def scale_gradient(x, factor):
    """x, whose gradient is multiplied: with SGD, what made it has so much of the learning rate."""
    return factor * x + tf.stop_gradient((1 - factor) * x)


class Validate(Callback):
    """Top-1 and top-5 of a LinearModel over the validation images after every epoch, all ranks
    together; args are for inputs.EvaluationPass."""
    _chief_only = False

    def __init__(self, model, *args):
        self._pass = inputs.EvaluationPass(*args)
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            logits = model.classify(model.encode(self._pass.images))  # [n, C]
        labels = self._pass.labels  # [n]
        self._counts = [tf.reduce_sum(tf.cast(tf.math.in_top_k(logits, labels, k), tf.int64))
                        for k in (1, min(5, model.num_classes))]
        self._counts.append(tf.size(labels, out_type=tf.int64))
        self._gather = ranks.Gather(tf.int64, [3])

    def _trigger_epoch(self):
        counts = np.sum(list(self._pass.run(self.trainer.sess, self._counts)), axis=0)  # [3]
        top1, top5, images = self._gather(self.trainer.sess, counts[np.newaxis]).sum(axis=0)
        put = self.trainer.monitors.put_scalar
        put('val_top1', 100. * top1 / images)
        put('val_top5', 100. * top5 / images)
        put('val_images', images)


def check_unchanged(sess, loaded):
    """A UserError if the backbone is not as loaded: the result would be that of other features."""
    now = sess.run({v.op.name: v
                    for v in sess.graph.get_collection(tf.GraphKeys.GLOBAL_VARIABLES)
                    if v.op.name in loaded})
    changed = [name for name in sorted(loaded) if not np.array_equal(loaded[name], now[name])]
    if changed:
        raise UserError(
            f'{len(changed)} variables of the frozen backbone are not as loaded, {changed[0]} the '
            'first: they changed in training, or --logdir is of another backbone')


class CheckUnchanged(Callback):
    """check_unchanged() after training, and before it: a resumed run must have been one of this
    backbone."""

    def __init__(self, loaded, model, path):
        self._loaded, self._model, self._path = loaded, model, path

    def _before_train(self):
        check_unchanged(self.trainer.sess, self._loaded)
        network.check_features(self.trainer.sess, *self._model.tensors, self._path)

    def _trigger_epoch(self):
        if self._loaded and self.epoch_num == self.trainer.max_epoch:
            check_unchanged(self.trainer.sess, self._loaded)
            logger.info(f'the backbone is unchanged ({len(self._loaded)} variables compared)')


def step_schedule(lr, total_batch, steps_per_epoch, epochs, milestones=MILESTONES):
    """lr, scaled by total_batch/256 and divided by 10 at each of the milestones, as a function."""
    peak = lr * total_batch / 256
    boundaries = [int(round(epochs * part * steps_per_epoch)) - 1 for part in milestones]
    values = [peak * 0.1 ** i for i in range(len(boundaries) + 1)]
    return lambda step: tf.train.piecewise_constant(tf.cast(step, tf.int64), boundaries, values)


def parse_args(argv=None):
    parser = flags.create_parser(__doc__)
    group = parser.add_argument_group('what to run')
    add = group.add_argument
    add('--load', metavar='FILE', required=True, help='pre-trained weights: a checkpoint, its '
        'folder (the newest one is taken), an .npz or a file of PyTorch')
    add('--data', metavar='DIR', required=True,
        help='folder with train/ and val/ of labelled images')
    add('--logdir', metavar='DIR', default='train_log/lincls',
        help='where checkpoints and logs go (default: train_log/lincls)')
    add('--labels', type=subset.parse, metavar='SHARE', help='train on a part of the labelled '
        'images only: 1%%, 10%% or 5-per-class, the same ones in every run (default: all)')
    add('--finetune', action='store_true', help='train the backbone too, with a twentieth of the '
        'learning rate; --epochs and --lr are then {epochs} and {lr} by default'.format(**FINETUNE))
    flags.add_run_flags(group, compiled='backbone')
    group = parser.add_argument_group('the recipe; defaults are the published values')
    flags.add_network_flags(group)
    flags.add_training_flags(group, epochs=100, crop_area=[0.08, 1.], lr=30., decay=0.,
                             lr_help='it is scaled by batch/256', decay_help='of the classifier')
    if '--finetune' in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**FINETUNE)
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return args


def main(args):
    threads, gpus = start.begin(args.stall_limit, args.grace)
    # read by rank 0, from which the other ranks get all variables
    path = weights.find_checkpoint(args.load) if hvd.rank() == 0 else None
    batch_size = runs.divide_batch(args.batch, hvd.size())
    inputs.check_labelled(args.data)
    lock = runs.open_logdir(args.logdir)
    checkpoint, steps_done = runs.find_resume(args.logdir)
    described = network.settle(args, path)

    # data
    folder = ranks.private_folder()
    server = DataServer(folder + '-train', {
        'task': 'linear', 'data': args.data, 'batch': batch_size, 'image-size': args.image_size,
        'crop-area': args.crop_area, 'seed': args.seed, 'cache': args.cache,
        **({'labels': args.labels} if args.labels else {})}, args.workers, args.cpus)
    facts = server.start(start_batch=steps_done)
    steps_per_epoch, max_steps = runs.count_steps(args, facts['images'])

    # model
    tf.set_random_seed(args.seed)
    model = LinearModel(
        network.build(described, gpus), facts['classes'], batch_size, args.image_size,
        step_schedule(args.lr, args.batch, steps_per_epoch, args.epochs,
                      FINETUNE_MILESTONES if args.finetune else MILESTONES), args.weight_decay,
        use_xla=start.use_xla(args.xla, gpus), num_labels=facts['images'],
        finetune=args.finetune)
    trainer = Trainer(model, *inputs.create_source(model.get_input_signature(), server, gpus),
                      start.session_config(threads, gpus))
    logger.info(
        f'{facts["images"]} images of {facts["classes"]} classes, {args.batch} in a step on '
        f'{hvd.size()} ranks ({batch_size} each), {steps_per_epoch} steps an epoch, learning rate '
        f'{args.lr * args.batch / 256:g}; their list is {facts["digest"]}')
    backbone = weights.load_weights(
        path, weights.is_backbone, tf.global_variables()) if path else {}
    logger.info(f'{len(backbone)} backbone variables from {path}')
    network.save(described)

    # train
    first = runs.resume(checkpoint) if checkpoint else runs.Assign(backbone)
    validate = Validate(model, folder + '-val', args.data, 'val', args.image_size, batch_size,
                        args.workers, args.cpus)
    frozen = {} if args.finetune else backbone
    trainer.run([CheckUnchanged(frozen, model, path), Save(max_to_keep=3), validate], first,
                steps_per_epoch, steps_done, max_steps)
    server.stop()
    del lock  # held until here


if __name__ == '__main__':
    with start.user_errors():
        main(parse_args())
