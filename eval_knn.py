#!/usr/bin/env python
"""kNN classification with frozen features: what a pre-training run has learned, in minutes and
without a classifier.

    ./eval_knn.py --load train_log/moco_v2 --data /path/to/imagenet        # the newest checkpoint
    ./eval_knn.py --load train_log/moco_v2 --data /path/to/imagenet --all  # all of its checkpoints
    horovodrun -np 8 python eval_knn.py --load MoCo_v2.npz --data /path/to/imagenet

Validation images are classified by their nearest training images. The result is printed, and
written next to the checkpoint (model-123.knn.json). The reference took 10 minutes for a checkpoint
on 8 V100.

Shapes: B images of the bank (of one rank), Q queries, D feature dimension, k neighbours, C classes.
"""
import sys

if __name__ == '__main__':
    from job import cores, launcher
    launcher.join(sys.argv[1:])
    cores.set_up(sys.argv[1:])  # before TensorFlow is loaded, which reads what this sets

import contextlib
import json

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import tfv1 as tf
from tensorpack.callbacks import Callback
from tensorpack.utils import logger

import checkpoints
import inputs
import network
import outputs
import resnet
import runs
import weights
from errors import UserError
from job import flags, ranks, start
from job.shutdown import shutdown


def find_nearest(similarity, labels, k):
    """The k most similar images of the bank, all of it if it has fewer, in no particular order:
    cosines float32 [Q, B] and labels int [B] or [Q, B] -> those of the nearest, [Q, min(k, B)]."""
    first = max(0, similarity.shape[1] - k)
    nearest = np.argpartition(similarity, first, axis=1)[:, first:]  # [Q, k]
    return tuple(np.take_along_axis(np.broadcast_to(x, similarity.shape), nearest, axis=1)
                 for x in (similarity, labels))


def knn_vote(similarity, labels, num_classes, temp=None):
    """Let neighbours vote, similarity float32 [Q, k] and labels int [Q, k] -> int [Q], the class
    with most votes, of equal ones the first. A vote weighs exp(similarity / temp), or 1 if temp is
    None."""
    # of float64, and relative to the nearest neighbour's: exp(1 / 0.01) is beyond float32
    weights = np.ones_like(similarity) if temp is None else np.exp(
        (similarity - similarity.max(axis=1, keepdims=True)).astype(np.float64) / temp)
    rows = np.arange(len(labels))[:, np.newaxis]  # [Q, 1]
    votes = np.bincount(
        (rows * num_classes + labels).ravel(), weights.ravel(), len(labels) * num_classes)
    return votes.reshape(len(labels), num_classes).argmax(axis=1)


def normalize(x):
    """[n, D] -> [n, D] with rows of length 1."""
    norm = np.sqrt(np.einsum('nd,nd->n', x, x, dtype=np.float64))  # its squares may be large
    return x / np.maximum(norm, 1e-12).astype(x.dtype)[:, np.newaxis]


class KNN:
    """kNN top-1 over all ranks.

    Every rank keeps the features of its part of the bank in host memory; queries travel to all
    ranks, and their nearest neighbours back, a chunk at a time. So no machine, let alone a GPU,
    needs to hold the bank.

    Args:
        features: a function, images uint8 [n, S, S, 3] -> [n, D], called while the graph is built.
        root, image_size, folder, batch, num_workers, cpus: for inputs.EvaluationPass.
        temp: t of the weighted vote.
        chunk: queries of a rank that are compared with the bank at a time.
    """

    def __init__(self, features, root, image_size, folder, num_workers=None, cpus=None, k=200,
                 temp=0.1, batch=256, chunk=256):
        self._k, self._temp, self._chunk = k, temp, chunk
        self._passes = {
            split: inputs.EvaluationPass(
                f'{folder}-{split}', root, split, image_size, batch, num_workers, cpus)
            for split in ('train', 'val')}
        self._outputs = {split: [tf.cast(features(p.images), tf.float32), p.labels]
                         for split, p in self._passes.items()}
        self.tensors = self._passes['train'].images, self._outputs['train'][0]  # one of the other
        dim = int(self._outputs['train'][0].shape[1])
        # in host memory, where banks fit, in float32 (a GPU: TF32), by TensorFlow's threads
        with tf.device('/cpu:0'):
            self._asked, self._bank = (tf.placeholder(tf.float32, [None, dim]) for _ in range(2))
            self._similarity = tf.matmul(self._asked, self._bank, transpose_b=True)  # [Q, B]
        # what the ranks exchange
        self._gather_queries = ranks.Gather(tf.float32, [dim])
        self._gather_nearest = [ranks.Gather(dtype, [None]) for dtype in (tf.float32, tf.int32)]
        self._gather_counts = ranks.Gather(tf.int64, [])

    def run(self, sess, center=False):
        """Evaluate the weights as they are now, all ranks together; `center` subtracts the mean of
        the bank first. Returns a dict: knn_top1 and knn_top1_plain in per cent, images (validated),
        bank (its size)."""
        bank, bank_labels = self._read(sess, 'train')
        queries, labels = self._read(sess, 'val')
        bank_size = self._gather_counts(sess, np.array([len(bank)])).sum()
        mean = (self._gather_queries(sess, bank.sum(axis=0, keepdims=True)).sum(axis=0) / bank_size
                if center else 0)
        bank, queries = normalize(bank - mean), normalize(queries - mean)
        num_classes = 1 + int(self._gather_counts(sess, np.array([bank_labels.max()])).max())
        sizes = self._gather_counts(sess, np.array([len(queries)]))

        correct = np.zeros(2, np.int64)
        for i in range(0, sizes.max(), self._chunk):
            mine, truth = (x[i:i + self._chunk] for x in (queries, labels))
            # ranks differ by one query at most: pad, so that all take part in every exchange
            rows = min(self._chunk, sizes.max() - i)
            asked = self._gather_queries(
                sess, np.pad(mine, [(0, rows - len(mine)), (0, 0)], 'constant'))  # [ranks*rows, D]
            similarity = sess.run(self._similarity, {self._asked: asked, self._bank: bank})
            nearest = find_nearest(similarity, bank_labels, self._k)  # 2 x [ranks*rows, k]
            # of all ranks' banks, for this rank's queries
            first = hvd.rank() * rows
            nearest = (gather(sess, x.T).T[first:first + len(mine)]  # [Q, ranks*k]
                       for gather, x in zip(self._gather_nearest, nearest))
            similarity, neighbours = find_nearest(*nearest, self._k)  # [Q, k]
            correct += [np.sum(knn_vote(similarity, neighbours, num_classes, temp) == truth)
                        for temp in (self._temp, None)]
        total = self._gather_counts(sess, correct).reshape(-1, 2).sum(axis=0)
        top1 = (100. * total / sizes.sum()).tolist()
        return {'knn_top1': top1[0], 'knn_top1_plain': top1[1], 'images': int(sizes.sum()),
                'bank': int(bank_size)}

    def _read(self, sess, split):
        batches = self._passes[split].run(sess, self._outputs[split])
        features, labels = [np.concatenate(x) for x in zip(*batches)]  # [n, D], [n]
        if not np.isfinite(features).all():
            raise UserError(f'features of {split} images are not finite')
        if len(features) > 1 and not np.ptp(features, axis=0).any():
            raise UserError(f'features of all {split} images are the same')
        return features, labels


class OnlineKNN(Callback):
    """kNN of the query encoder during pre-training, all ranks together, every few epochs; args are
    for KNN, whose features are made of the variables that are being trained."""
    _chief_only = False

    def __init__(self, every, *args):
        self._every = every
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            self._knn = KNN(*args)

    def _trigger_epoch(self):
        if self.epoch_num % self._every == 0:
            result = self._knn.run(self.trainer.sess)
            self.trainer.monitors.put_scalar('knn_top1', result['knn_top1'])


def is_result(path: str) -> bool:
    """Whether a file is a result of this script."""
    with contextlib.suppress(ValueError):
        with open(path) as f:
            result = json.load(f)
        return isinstance(result, dict) and 'knn_top1' in result
    return False


def parse_args(argv=None):
    parser = flags.create_parser(__doc__)
    add = parser.add_argument
    add('--load', metavar='FILE', help='a checkpoint, its folder (the newest one is taken), an '
        '.npz or a file of PyTorch')
    add('--pixels', action='store_true',
        help='instead of a network: raw pixels minus their mean, the baseline')
    add('--all', action='store_true', help='every checkpoint of the folder --load')
    add('--data', metavar='DIR', required=True,
        help='folder with train/ and val/ of labelled images')
    add('--head', action='store_true',
        help='features of the contrastive head instead of the backbone')
    add('--k', type=int, default=200, help='neighbours (default: 200)')
    add('--knn-temp', type=float, default=0.1,
        help='t; a neighbour\'s weight is exp(cosine/t) (default: 0.1)')
    add('--batch', type=int, default=256, help='images of one rank in a step (default: 256)')
    add('--out', metavar='FILE',
        help='where the result goes as json (default: next to the checkpoint)')
    flags.add_run_flags(parser, compiled='network')
    flags.add_network_flags(parser)
    args = parser.parse_args(argv)
    if (args.load is not None) == args.pixels:
        parser.error('give either --load FILE or --pixels')
    flags.check(parser, args, 'k', 'knn_temp')
    if args.pixels and (args.head or args.all):
        parser.error('--pixels has neither --head nor --all')
    if args.pixels and (args.depth or args.width or args.stem):
        parser.error('--pixels has no network: of its flags, only --image-size')
    if args.out and args.all:
        parser.error('--out is one file: --all writes one next to each checkpoint')
    return args


def main(args):
    threads, gpus = start.begin(args.stall_limit)
    inputs.check_labelled(args.data)
    paths = ([None] if args.pixels else checkpoints.list_numbered(args.load) if args.all
             else [weights.find_checkpoint(args.load)])
    if not paths:
        raise UserError(f'{args.load}: this folder holds no checkpoint (model-123.index)')
    described = network.settle(args, paths[-1])
    dims = []  # of the head's layers
    if args.head:
        dims = weights.head_dims(weights.read_weights(paths[0], weights.is_head))
        if not dims:
            raise UserError(f'{paths[0]}: holds no head (linear0_...)')
    outs = [args.out or (path and path + ('.head' if args.head else '') + '.knn.json')
            for path in paths]
    for out in filter(None, outs if hvd.rank() == 0 else []):
        outputs.check_output(out, is_result, '--out' if args.out else 'without --out:')

    net = network.build(described, gpus)

    def features(images):
        """uint8 [n, S, S, 3] -> [n, D]"""
        if args.pixels:
            return tf.reshape(images, [-1, args.image_size ** 2 * 3])
        return resnet.compile_if(start.use_xla(args.xla, gpus),
                                 lambda x: resnet.project(net(x, training=False), dims), images)

    def is_needed(name):
        return weights.is_backbone(name) or args.head and weights.is_head(name)

    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        knn = KNN(features, args.data, args.image_size, ranks.private_folder(), args.workers,
                  args.cpus, args.k, args.knn_temp, args.batch)
    with tf.Session(config=start.session_config(threads, gpus)) as sess:
        shutdown.session = sess
        for path, out in zip(paths, outs):
            if path is not None:
                runs.assign(sess, weights.load_weights(path, is_needed, tf.global_variables()))
                network.check_features(sess, *knn.tensors, path)
            with shutdown.explain('evaluation'):
                result = knn.run(sess, center=args.pixels)
            if result['bank'] <= args.k:
                logger.warn(f'--k {args.k}: all of the {result["bank"]} images of the bank vote')
            result.update(
                load=path or 'raw pixels',
                features='pixels' if args.pixels else 'head' if args.head else 'backbone',
                k=args.k, temp=args.knn_temp)
            if hvd.rank() == 0:
                logger.info(
                    '{load}: kNN top-1 {knn_top1:.2f} % (plain vote {knn_top1_plain:.2f} %), '
                    '{images} images by {bank}, {features} features, k {k}, t {temp}'
                    .format(**result))
                if out:
                    try:
                        with outputs.replace(out) as temporary, open(temporary, 'w') as f:
                            json.dump(result, f, indent=1)
                    except OSError as error:
                        raise UserError(f'{out}: cannot be written: {error.strerror}')


if __name__ == '__main__':
    with start.user_errors():
        main(parse_args())
