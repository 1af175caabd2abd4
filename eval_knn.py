#!/usr/bin/env python
"""kNN classification with frozen features: what a pre-training run has learned,
in minutes and without a classifier.

    ./eval_knn.py --load train_log/moco_v2 --data /path/to/imagenet        # the newest checkpoint
    ./eval_knn.py --load train_log/moco_v2 --data /path/to/imagenet --all  # every checkpoint
                                                                           # of the folder
    horovodrun -np 8 python eval_knn.py --load MoCo_v2.npz --data /path/to/imagenet

Validation images are classified by their nearest training images. The result is printed, and
written next to the checkpoint (model-123.knn.json). The reference took 10 minutes for a checkpoint
on 8 V100.

Shapes: B images of the bank (of one rank), Q queries, D feature dimension, k neighbours.
"""
import environment  # noqa: F401, I001  before all that reads it
import argparse
import glob
import json
import os
import re

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import tfv1 as tf
from tensorpack.callbacks import Callback
from tensorpack.utils import logger

import data
import heartbeat
import launch
import resnet


def find_nearest(similarity, labels, k):
    """The k most similar images of the bank.

    Args:
        similarity: float32 [Q, B], cosines.
        labels: int [B].
        k: neighbours; all of the bank if it has fewer.

    Returns:
        (similarities, labels), both [Q, min(k, B)], in no particular order.
    """
    first = max(0, len(labels) - k)
    nearest = np.argpartition(similarity, first, axis=1)[:, first:]  # [Q, k]
    return np.take_along_axis(similarity, nearest, axis=1), labels[nearest]


def knn_vote(similarity, labels, num_classes, temp=None):
    """Let neighbours vote.

    Args:
        similarity: float32 [Q, k].
        labels: int [Q, k], of the neighbours.
        num_classes: C.
        temp: t; a neighbour's vote weighs exp(similarity / t). None: every vote weighs 1.

    Returns:
        int [Q], the class with most votes; of equal ones the first.
    """
    weights = np.ones_like(similarity) if temp is None else np.exp(similarity / temp)
    rows = np.arange(len(labels))[:, np.newaxis]  # [Q, 1]
    votes = np.bincount(
        (rows * num_classes + labels).ravel(), weights.ravel(), len(labels) * num_classes)
    return votes.reshape(len(labels), num_classes).argmax(axis=1)


def normalize(x):
    """[n, D] -> [n, D] with rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class KNN:
    """kNN top-1 over all ranks.

    Every rank keeps the features of its part of the bank in host memory; queries travel to all
    ranks, and their nearest neighbours travel back, a chunk at a time. So the bank never needs to
    fit one machine, let alone a GPU.

    Args:
        features: a function from images, uint8 [n, S, S, 3], to features [n, D]; called once, while
            the graph is built.
        data, image_size, folder, ending, num_workers: see launch.BoundedPass.
        k: neighbours.
        temp: t of the weighted vote.
        batch: images of a rank in a step.
        chunk: queries of a rank that are compared with the bank at a time.
    """

    def __init__(self, features, data, image_size, folder, ending, num_workers=None, k=200,
                 temp=0.1, batch=256, chunk=256):
        self._k, self._temp, self._chunk = k, temp, chunk
        self._passes = {
            split: launch.BoundedPass(
                folder + '-' + split, data, split, image_size, batch, ending, num_workers)
            for split in ('train', 'val')}
        self._outputs = {split: [tf.cast(features(p.images), tf.float32), p.labels]
                         for split, p in self._passes.items()}
        dim = int(self._outputs['train'][0].shape[1])
        # in host memory, where banks fit, and by TensorFlow, whose threads are set
        with tf.device('/cpu:0'):
            self._asked, self._bank = (tf.placeholder(tf.float32, [None, dim]) for _ in range(2))
            self._similarity = tf.matmul(self._asked, self._bank, transpose_b=True)  # [Q, B]
        # what the ranks exchange
        self._gather_queries = Gather(tf.float32, [dim])
        self._gather_similarity = Gather(tf.float32, [None])
        self._gather_labels = Gather(tf.int32, [None])
        self._gather_counts = Gather(tf.int64, [])

    def run(self, sess, center=False):
        """Evaluate the weights as they are now; all ranks together.

        Args:
            center: whether to subtract the mean of the bank first.

        Returns:
            dict: knn_top1 and knn_top1_plain in per cent, images (validated), bank (its size).
        """
        bank, bank_labels = self._read(sess, 'train')
        queries, labels = self._read(sess, 'val')
        bank_size = self._gather_counts(sess, np.array([len(bank)])).sum()
        mean = (self._gather_queries(sess, bank.sum(axis=0, keepdims=True)).sum(axis=0) / bank_size
                if center else 0)
        bank, queries = normalize(bank - mean), normalize(queries - mean)
        num_classes = 1 + int(self._gather_counts(sess, np.array([bank_labels.max()])).max())
        sizes = self._gather_counts(sess, np.array([len(queries)]))

        correct = np.zeros(2, np.int64)
        for start in range(0, sizes.max(), self._chunk):
            mine = queries[start:start + self._chunk]
            # ranks differ by one query at most: pad, so that all take part in every exchange
            padded = np.zeros([min(self._chunk, sizes.max() - start), bank.shape[1]], np.float32)
            padded[:len(mine)] = mine
            asked = self._gather_queries(sess, padded)  # [ranks*chunk, D]
            similarity = sess.run(self._similarity, {self._asked: asked, self._bank: bank})
            similarity, neighbours = find_nearest(similarity, bank_labels, self._k)
            similarity = self._answers(
                sess, self._gather_similarity, similarity, len(padded), -np.inf)  # [chunk, ranks*k]
            neighbours = self._answers(sess, self._gather_labels, neighbours, len(padded), 0)
            if hvd.size() > 1:
                k = min(self._k, bank_size)
                best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
                similarity, neighbours = (
                    np.take_along_axis(x, best, axis=1) for x in (similarity, neighbours))
            truth = labels[start:start + self._chunk]
            for i, temp in enumerate((self._temp, None)):
                votes = knn_vote(
                    similarity[:len(truth)], neighbours[:len(truth)], num_classes, temp)
                correct[i] += np.sum(votes == truth)
        total = self._gather_counts(sess, correct).reshape(-1, 2).sum(axis=0)
        top1 = (100. * total / sizes.sum()).tolist()
        return {'knn_top1': top1[0], 'knn_top1_plain': top1[1], 'images': int(sizes.sum()),
                'bank': int(bank_size)}

    def _read(self, sess, split):
        parts = list(self._passes[split].run(sess, self._outputs[split]))
        features, labels = (np.concatenate(x) for x in zip(*parts))
        return features, labels

    def _answers(self, sess, gather, values, chunk, nothing):
        """Each rank's values for all queries -> all ranks' values for this rank's queries,
        side by side."""
        if hvd.size() == 1:
            return values
        # banks differ by one image at most, which matters if they are smaller than k:
        # pad with the farthest neighbours
        width = int(self._gather_counts(sess, np.array([values.shape[1]])).max())
        values = np.pad(values, [(0, 0), (0, width - values.shape[1])], 'constant',
                        constant_values=nothing)
        gathered = gather(sess, values).reshape(
            hvd.size(), hvd.size(), chunk, width)  # [from, for, Q, k]
        return np.concatenate(gathered[:, hvd.rank()], axis=1)


class Gather:
    """hvd.allgather for arrays; the graph is made at once,
    so that it can be finalised afterwards."""

    def __init__(self, dtype, shape):
        self._input = tf.placeholder(dtype, [None] + shape)
        self._output = hvd.allgather(self._input)

    def __call__(self, sess, values):
        heartbeat.meet()
        return values if hvd.size() == 1 else sess.run(self._output, {self._input: values})


class OnlineKNN(Callback):
    """kNN of the query encoder during pre-training, all ranks together, every few epochs.

    Args:
        every: epochs.
        others: for KNN; the features are made of the variables that are being trained.
    """
    _chief_only = False

    def __init__(self, every, *others):
        self._every, self._others = every, others

    def _setup_graph(self):
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            self._knn = KNN(*self._others)

    def _trigger_epoch(self):
        if self.epoch_num % self._every == 0:
            result = self._knn.run(self.trainer.sess)
            self.trainer.monitors.put_scalar('knn_top1', result['knn_top1'])


def check_data(root):
    """Raise data.DataError unless there are labelled images, train and val, for every rank."""
    if hvd.rank() == 0:
        for split in ('train', 'val'):
            images = data.list_images(root, split, labelled=True)
            if len(images.paths) < hvd.size():
                raise data.DataError('{}/{}: {} images for {} ranks'.format(
                    root, split, len(images.paths), hvd.size()))


def list_checkpoints(folder):
    """Every checkpoint of a folder, oldest first."""
    paths = [path[:-len('.index')]
             for path in glob.glob(os.path.join(glob.escape(folder), 'model-*.index'))
             if re.search(r'model-\d+\.index$', path)]
    if not paths:
        raise resnet.WeightsError(
            '{}: this folder holds no checkpoint (model-*.index)'.format(folder))
    return sorted(paths, key=lambda path: int(path.rsplit('-', 1)[1]))


def check_writable(paths):
    """Raise data.DataError unless rank 0 can write there; paths may be None."""
    for path in paths if hvd.rank() == 0 else []:
        try:
            if path:
                open(path, 'a').close()
                if not os.path.getsize(path):
                    os.remove(path)
        except OSError as error:
            raise data.DataError('{}: cannot be written: {} (--out says where the result goes)'
                                 .format(path, error.strerror))


def head_dims(path):
    """The dimensions of a checkpoint's head, from its names: [128] for v1, [2048, 128] for v2."""
    dims = resnet.head_dims(resnet.read_weights(path, resnet.is_head))
    if not dims:
        raise resnet.WeightsError('{}: holds no head (linear0_...)'.format(path))
    return dims


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--load', metavar='FILE',
                        help='a checkpoint, its folder (the newest one is taken), an .npz or a '
                        'file of PyTorch')
    parser.add_argument('--pixels', action='store_true',
                        help='instead of a network: raw pixels minus their mean, the baseline')
    parser.add_argument('--all', action='store_true', help='every checkpoint of the folder --load')
    parser.add_argument('--data', metavar='DIR', required=True,
                        help='folder with train/ and val/ of labelled images')
    parser.add_argument('--head', action='store_true',
                        help='features of the contrastive head instead of the backbone')
    parser.add_argument('--k', type=int, default=200, help='neighbours (default: 200)')
    parser.add_argument('--knn-temp', type=float, default=0.1,
                        help='t; a neighbour\'s weight is exp(cosine/t) (default: 0.1)')
    parser.add_argument('--batch', type=int, default=256,
                        help='images of one rank in a step (default: 256)')
    parser.add_argument('--out', metavar='FILE',
                        help='where the result goes as json (default: next to the checkpoint)')
    launch.add_arguments(parser, compiled='network')
    resnet.add_arguments(parser)
    args = parser.parse_args(argv)
    if bool(args.load) == args.pixels:
        parser.error('give either --load FILE or --pixels')
    launch.check_positive(parser, args, 'k', 'knn_temp', 'batch', 'image_size', 'width', 'workers',
                          'stall_limit')
    if args.pixels and (args.head or args.all):
        parser.error('--pixels has neither --head nor --all')
    if args.out and args.all:
        parser.error('--out is one file: --all writes one next to each checkpoint')
    return args


def main(args):
    threads, ending, gpu = launch.begin(args.stall_limit)
    try:
        check_data(args.data)
        paths = ([None] if args.pixels else list_checkpoints(args.load) if args.all
                 else [resnet.find_checkpoint(args.load)])
        dims = head_dims(paths[0]) if args.head else []
        outs = [args.out or (path and path + ('.head' if args.head else '') + '.knn.json')
                for path in paths]
        check_writable(outs)
    except (resnet.WeightsError, data.DataError) as error:
        launch.fail(error)

    net = resnet.ResNet(args.depth, args.width, args.stem, 'NCHW' if gpu else 'NHWC')

    def features(images):
        """uint8 [n, S, S, 3] -> [n, D]"""
        if args.pixels:
            return tf.reshape(images, [-1, args.image_size ** 2 * 3])
        return resnet.compile_if(gpu if args.xla is None else args.xla,
                                 lambda x: resnet.project(net(x, training=False), dims), images)

    with tf.variable_scope('', reuse=tf.AUTO_REUSE):
        knn = KNN(features, args.data, args.image_size, launch.private_folder(), ending,
                  args.workers, args.k, args.knn_temp, args.batch)
    config = launch.session_config(threads, gpu)
    with tf.Session(config=config) as sess:
        ending.session = sess
        for path, out in zip(paths, outs):
            if path is not None:
                try:
                    weights = resnet.load_weights(
                        path, lambda name: resnet.is_backbone(name) or
                        bool(dims) and resnet.is_head(name))
                except resnet.WeightsError as error:
                    launch.fail(error)
                resnet.assign(sess, weights)
            with ending.explain('evaluation'):
                result = knn.run(sess, center=args.pixels)
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
                    with open(out, 'w') as f:
                        json.dump(result, f, indent=1)


if __name__ == '__main__':
    main(parse_args())
