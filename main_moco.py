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

The algorithm is in moco.py, the order of a step in train_step.py.
"""
import sys

if __name__ == '__main__':
    from job import cores, launcher
    launcher.join(sys.argv[1:])
    cores.set_up(sys.argv[1:])  # before TensorFlow is loaded, which reads what this sets

import math
import os

import horovod.tensorflow as hvd
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import advice
import inputs
import network
import resnet
import runs
import weights
from callbacks import Save
from collapse import WatchRank
from errors import UserError
from eval_knn import OnlineKNN
from job import flags, ranks, start
from job.server import DataServer
from moco import MOCOModel
from trainer import Trainer

# What --v2 decides; --mlp, --aug-plus and --cos are the switches of the second paper's ablations.
RECIPES = {
    'v1': {'mlp': False, 'aug_plus': False, 'cos': False, 'temp': 0.07},
    'v2': {'mlp': True, 'aug_plus': True, 'cos': True, 'temp': 0.2},
}


def step_schedule(lr, total_batch, steps_per_epoch, epochs):
    """Without --cos: lr, meant for a batch of 256, scales with the batch of all ranks, is reached
    in 5 epochs if that makes it larger, and falls 10-fold at 60 and 80 %. Returns a function of the
    step (tensor), and the learning rate that it reaches."""
    peak = lr * total_batch / 256
    warm_up = 5 * steps_per_epoch if peak > lr else 0
    milestones = [int(round(epochs * part * steps_per_epoch)) for part in (0.6, 0.8)]

    def learning_rate(step):
        step = tf.cast(step, tf.int64)
        rate = tf.train.piecewise_constant(
            step, [m - 1 for m in milestones], [peak, peak * 0.1, peak * 0.01])
        if warm_up:
            rate = tf.minimum(rate, lr + (peak - lr) * tf.cast(step, tf.float32) / warm_up)
        return rate
    return learning_rate, peak


def cosine_schedule(lr, steps_per_epoch, epochs):
    """--cos: half a cosine from lr to 0 over all steps, whatever the batch; as step_schedule()."""
    def learning_rate(step):
        progress = tf.cast(step, tf.float32) / (epochs * steps_per_epoch)
        return lr * 0.5 * (1 + tf.cos(math.pi * tf.minimum(progress, 1.)))
    return learning_rate, lr


def check_sizes(batch, ranks, splits, queue_size):
    """The batch of one rank; what does not divide is an error with the nearest values that do."""
    n = runs.divide_batch(batch, ranks)
    if n % splits:
        divisors = ', '.join(str(d) for d in range(1, n + 1) if n % d == 0)
        raise UserError(f'--bn-splits {splits} does not divide the batch of one rank, {n} images: '
                        f'take one of {divisors}')
    if queue_size % batch:
        raise UserError(f'--queue-size {queue_size} is not a multiple of --batch {batch}: take '
                        f'{runs.nearest_multiples(queue_size, batch)}')
    return n


def parse_args(argv=None):
    parser = flags.create_parser(__doc__)
    group = parser.add_argument_group('what to run')
    add = group.add_argument
    add('--data', metavar='DIR',
        help='folder of images: with train/ in it, or any folder, flat or nested')
    add('--fake', action='store_true', help='train on one random batch, to measure speed')
    add('--logdir', metavar='DIR', help='where checkpoints and logs go; a run that is there is '
        'continued (default: train_log/ and the name of the recipe, as moco_v2)')
    add('--load', metavar='FILE', help='start from these weights, of both encoders and the queue: '
        'a checkpoint, its folder, an .npz or the official .pth.tar')
    add('--init', metavar='FILE', help='start from these weights of a backbone, in both encoders, '
        'with a fresh head and queue: as --load, or ResNet of torchvision')
    add('--knn-every', type=int, default=0, metavar='N', help='kNN classification of val/ by '
        'train/ every N epochs; needs class folders (default: never)')
    add('--knn-data', metavar='DIR', help='labelled images for --knn-every (default: --data)')
    add('--amp', action='store_true', help='compute convolutions in 16 bits: bfloat16 on a CPU '
        'that has it (TensorFlow 2.21), float16 on a GPU (never tried on one)')
    flags.add_run_flags(group, compiled='key encoder')

    group = parser.add_argument_group('the recipe; defaults are the published values')
    add = group.add_argument
    add('--v2', action='store_true', help='MoCo v2: --mlp --aug-plus --cos --temp 0.2')
    add('--mlp', action='store_true', help='head with a hidden layer')
    add('--aug-plus', action='store_true', help='augmentation of v2: weaker colours, and blur')
    add('--cos', action='store_true', help='cosine schedule of the learning rate')
    add('--temp', type=float, help='T, the temperature (default: 0.07, v2 0.2)')
    add('--queue-size', type=int, default=65536, help='K, keys in the queue (default: 65536)')
    add('--momentum', type=float, default=0.999, help='m, of the key encoder (default: 0.999)')
    add('--bn-splits', type=int, default=1, metavar='N', help='normalise N parts of a rank\'s '
        'batch on their own, as N GPUs would; take 4 or 8 when there is one rank (default: 1)')
    flags.add_network_flags(group)
    flags.add_training_flags(
        group, epochs=200, crop_area=[0.2, 1.], lr=0.03, lr_help='scaled by batch/256, unless '
        '--cos takes it as it is', decay=1e-4, decay_help='of all trainable variables')

    args = parser.parse_args(argv)
    if (args.data is not None) == args.fake:
        parser.error('give either --data DIR or --fake')
    args.knn_data = args.knn_data or args.data
    if args.knn_every and not args.knn_data:
        parser.error('--knn-every needs --data or --knn-data')
    if args.load and args.init:
        parser.error('give either --load FILE or --init FILE')
    if args.amp and args.xla:
        parser.error('--amp --xla: what XLA compiles stays in 32 bits: give one of the two')
    args.xla = False if args.amp else args.xla
    flags.check(parser, args, 'queue_size', 'bn_splits', 'temp')
    if not 0 <= args.momentum <= 1:
        parser.error(f'--momentum must be 0 to 1, not {args.momentum}')
    for name, value in RECIPES['v2' if args.v2 else 'v1'].items():
        if not getattr(args, name):
            setattr(args, name, value)
    return args


def name_recipe(args) -> str:
    """moco_v1 or moco_v2, and between them moco_v1-mlp, moco_v1-aug-plus-cos ..."""
    switches = [name for name in ('mlp', 'aug_plus', 'cos') if getattr(args, name)]
    name = '-'.join(['moco_v1'] + switches).replace('aug_plus', 'aug-plus')
    return 'moco_v2' if args.v2 else name


def main(args):
    threads, gpus = start.begin(args.stall_limit, args.grace)
    config = start.session_config(threads, gpus, args.amp)
    batch_size = check_sizes(args.batch, hvd.size(), args.bn_splits, args.queue_size)
    if args.knn_every:
        inputs.check_labelled(args.knn_data)
    logdir = args.logdir or os.path.join('train_log', name_recipe(args))
    lock = runs.open_logdir(logdir)
    checkpoint, steps_done = runs.find_resume(logdir)
    given = args.load or args.init
    load = weights.find_checkpoint(given) if given and hvd.rank() == 0 else None
    if load and checkpoint:
        logger.warn(f'{given} is not used: {logdir} holds a run, which goes on')
    described = network.settle(args, checkpoint or load)

    # data
    folder = ranks.private_folder()
    server, num_images = None, 1281167  # with --fake, as many as ImageNet has
    if not args.fake:
        server = DataServer(folder + '-train', {
            'task': 'moco-v2' if args.aug_plus else 'moco-v1', 'data': args.data,
            'batch': batch_size, 'image-size': args.image_size, 'crop-area': args.crop_area,
            'seed': args.seed, 'cache': args.cache}, args.workers, args.cpus)
        num_images = server.start(start_batch=steps_done)['images']
    steps_per_epoch, max_steps = runs.count_steps(args, num_images)

    # model
    learning_rate, peak = (
        cosine_schedule(args.lr, steps_per_epoch, args.epochs) if args.cos else
        step_schedule(args.lr, args.batch, steps_per_epoch, args.epochs))
    tf.set_random_seed(args.seed)
    net = network.build(described, gpus, args.bn_splits)
    model = MOCOModel(
        net, batch_size, queue_size=args.queue_size, momentum=args.momentum, temp=args.temp,
        mlp=args.mlp, weight_decay=args.weight_decay, learning_rate=learning_rate,
        image_size=args.image_size, seed=args.seed,
        use_xla=start.use_xla(args.xla, gpus),
        loss_scale=128 if args.amp and gpus else 1)
    trainer = Trainer(
        model, *inputs.create_source(model.get_input_signature(), server, gpus), config)
    logger.info(
        f'{num_images} images, {args.batch} in a step on {hvd.size()} ranks ({batch_size} each, BN '
        f'over {batch_size // args.bn_splits}), {steps_per_epoch} steps an epoch, learning rate '
        f'{peak:g}')
    side = (advice.find_side(args.data, num_images) if server and hvd.rank() == 0 else
            float('inf'))
    for line in advice.list_doubts(args, num_images, steps_per_epoch, peak, side):
        logger.warn(line)
    if server and hvd.rank() == 0:
        line = advice.propose(args, num_images, steps_per_epoch, side)
        if line:
            logger.info(line)
    network.save(described)

    # where to start: rank 0, from which the other ranks get all variables
    if checkpoint:
        first = runs.resume(checkpoint)
        logger.info(f'continuing {checkpoint} after step {steps_done}')
    elif load and args.load:
        first = runs.Assign(weights.load_weights(load, weights.is_model, tf.global_variables()))
    elif load:
        first = runs.Assign(
            weights.load_weights(load, weights.is_backbone, tf.global_variables()),
            model.copy_to_key_encoder())
    else:
        first = runs.Assign({}, model.copy_to_key_encoder())

    # train
    def features(images):
        return resnet.compile_if(model.use_xla, lambda x: net(x, training=False), images)
    knn = [OnlineKNN(args.knn_every, features, args.knn_data, args.image_size, folder + '-knn',
                     args.workers, args.cpus)] if args.knn_every else []
    trainer.run([Save(max_to_keep=10), WatchRank(model.queue)] + knn, first, steps_per_epoch,
                steps_done, max_steps)
    if server:
        server.stop()
    del lock  # held until here


if __name__ == '__main__':
    with start.user_errors():
        main(parse_args())
