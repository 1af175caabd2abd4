#!/usr/bin/env python
"""The official authors' CIFAR-10 notebook, by the code of this project: does it learn as fast?

    python tools/prepare_cifar10.py datasets/cifar10
    python benchmarks/notebook.py --data datasets/cifar10    # 2 epochs: 35 minutes on 2 cores

prints loss and kNN top-1 of every epoch beside what the notebook's authors print: losses 6.96 and
7.25, kNN 32.0 and 33.5 %; 82.6 % after all 200 epochs (`--epochs 200`). The same command again
continues where it stopped.

The recipe is neither v1 nor v2: ResNet-18 without the first pool, a linear head, batch 512 whose
BN is in 8 splits, K 4096, m 0.99, T 0.1, SGD without Nesterov, and kNN on the head's output.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == '__main__':
    from job import cores
    cores.set_up(sys.argv[1:])  # before TensorFlow is loaded, which reads what this sets

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402

import numpy as np  # noqa: E402
from tensorpack import QueueInput  # noqa: E402
from tensorpack import tfv1 as tf  # noqa: E402
from tensorpack.dataflow import DataFromGenerator  # noqa: E402

import data  # noqa: E402
import image_lists  # noqa: E402
import inputs  # noqa: E402
import resnet  # noqa: E402
import runs  # noqa: E402
import views  # noqa: E402
from callbacks import Save  # noqa: E402
from decoder import ImageReader  # noqa: E402
from eval_knn import OnlineKNN  # noqa: E402
from job import ranks, start  # noqa: E402
from moco import MOCOModel  # noqa: E402
from trainer import Trainer  # noqa: E402

SIZE, BATCH, SPLITS, DIM, EPOCHS = 32, 512, 8, 128, 200
MEAN_BGR = np.array([0.4465, 0.4822, 0.4914], np.float32) * 255
STD_BGR = np.array([0.2010, 0.1994, 0.2023], np.float32) * 255
PUBLISHED = [(6.96, 32.0), (7.25, 33.5)]  # loss and kNN after each of the first epochs


class Notebook(MOCOModel):
    def optimizer(self):
        return tf.train.MomentumOptimizer(self.lr, 0.9)


def notebook_view(image, box, out, rng):
    """Fill `out` with a view of the notebook: crop, flip, colour jitter, grayscale; no blur."""
    views.resized_crop(image, box, out)
    if rng.random() < 0.5:
        views.flip(out)
    if rng.random() < 0.8:
        views.jitter(out, views.sample_jitter(
            rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    if rng.random() < 0.2:
        views.convert_to_gray(out)


def generate(images, first_step, seed):
    """Yield the batches of the steps from first_step on: [query, key]."""
    def report(index, text, unreadable):
        if unreadable:
            sys.exit(f'cannot read {images.files[index]}: {text}')

    task = data.Task(notebook_view, 2, False, (0.08, 1), False)
    batches = data.Batches(task, ImageReader(images, report), 0, 1, BATCH, SIZE, seed)
    for step in itertools.count(first_step):
        arrays = [np.empty(shape, dtype) for shape, dtype in batches.specs(step)]
        batches.fill(step, arrays)
        yield arrays


def cosine_by_epoch(lr, steps_per_epoch):
    """Half a cosine over the notebook's 200 epochs, which falls once an epoch."""
    def learning_rate(step):
        epoch = tf.cast(step // steps_per_epoch, tf.float32)
        return lr * 0.5 * (1 + tf.cos(math.pi * epoch / EPOCHS))
    return learning_rate


def initial_weights(dim, seed):
    """The first weights of the layers that the notebook makes anew, as PyTorch draws them: uniform
    in +- 1/sqrt(inputs).

    The first convolution then is 1.9 times as large as ResNet's own, and with BN behind it learns
    more slowly: the loss of the first epochs is 0.2 higher.
    """
    rng = np.random.RandomState(seed)
    head = f'linear0_{DIM}/'
    layers = [(head + 'W', [dim, DIM], dim), (head + 'b', [DIM], dim),
              ('conv0/W', [3, 3, 3, 64], 27)]
    return {name: rng.uniform(-1, 1, shape) / math.sqrt(fan_in) for name, shape, fan_in in layers}


def main(args):
    threads, gpus = start.begin()
    inputs.check_labelled(args.data)
    images = image_lists.list_images(args.data)
    runs.open_logdir(args.logdir)
    checkpoint, steps_done = runs.find_resume(args.logdir)
    steps_per_epoch = len(images.files) // BATCH

    tf.set_random_seed(args.seed)
    net = resnet.ResNet(18, 64, '3x3', 'NCHW' if gpus else 'NHWC', SPLITS, MEAN_BGR, STD_BGR)
    model = Notebook(
        net, BATCH, queue_size=4096, momentum=0.99, temp=0.1, weight_decay=5e-4,
        learning_rate=cosine_by_epoch(0.06, steps_per_epoch), image_size=SIZE, seed=args.seed)
    source = QueueInput(DataFromGenerator(generate(images, steps_done, args.seed)))
    trainer = Trainer(model, source, None, start.session_config(threads, gpus, args.amp))
    first = (runs.resume(checkpoint) if checkpoint else
             runs.Assign(initial_weights(net.feature_dim, args.seed), model.copy_to_key_encoder()))
    knn = OnlineKNN(1, lambda x: resnet.project(net(x, training=False), [DIM]), args.data, SIZE,
                    ranks.private_folder())
    trainer.run([Save(max_to_keep=2), knn], first, steps_per_epoch, steps_done,
                args.epochs * steps_per_epoch)

    with open(os.path.join(args.logdir, 'stats.json')) as f:
        stats = [epoch for epoch in json.load(f) if runs.STOPPED not in epoch]
    print('epoch  loss  (notebook)  kNN top-1  (notebook)  images/s')
    for epoch, (loss, top1) in zip(stats, PUBLISHED + [('', '')] * len(stats)):
        print('{epoch_num:5} {loss:5.2f}  {:>10} {knn_top1:8.2f} %  {:>10}  '
              '{images_per_second:8.1f}'.format(loss, top1, **epoch))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR',
                        help='CIFAR-10, from tools/prepare_cifar10.py')
    parser.add_argument('--epochs', type=int, default=2,
                        help='where to stop in the schedule of 200 (default: 2)')
    parser.add_argument('--logdir', default='train_log/notebook', metavar='DIR',
                        help='where checkpoints and logs go (default: train_log/notebook)')
    parser.add_argument('--amp', action='store_true',
                        help='convolutions in 16 bits, as in main_moco.py: faster')
    parser.add_argument('--seed', type=int, default=0, help='of everything random (default: 0)')
    with start.user_errors():
        main(parser.parse_args())
