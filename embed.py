#!/usr/bin/env python
"""Features of images, to search in, to cluster, or to classify.

    ./embed.py --load train_log/moco_v2 --data my_images --out features
    horovodrun -np 8 python embed.py --load MoCo_v2.npz --data /path/to/imagenet --split val --out f

The images are those of --data, as main_moco.py reads it, each once. --out gets features.npz:

    features  float32 [N, D], of the backbone; in the order of names
    names     [N], paths below `folder` in made
    labels    int32 [N], and classes, their names, if the images have such, or lie in class folders
    made      JSON: of which weights, network, folder and images

    file = numpy.load('features/features.npz')    # file['features'] ...

--format csv or parquet writes a table of name, label and features besides. Features go to the disk
batch by batch, so N is bounded by the disk. An image that cannot be read has no row.

Shapes: n images of a rank in a step, S image size, D feature dimension, N images in all.
"""
import sys

if __name__ == '__main__':
    from job import cores, launcher
    launcher.join(sys.argv[1:])
    cores.set_up(sys.argv[1:])  # before TensorFlow is loaded, which reads what this sets

import contextlib
import csv
import importlib.util
import json
import os
import tempfile
import zipfile

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import data
import image_lists
import inputs
import network
import outputs
import resnet
import runs
import tar_files
import weights
from errors import UserError
from job import flags, ranks, start
from job.shutdown import shutdown

CHUNK = 4096  # rows that are in memory at a time
FILE = 'features.npz'


def parse_args(argv=None):
    parser = flags.create_parser(__doc__)
    add = parser.add_argument
    add('--load', metavar='FILE', required=True, help='a checkpoint, its folder (the newest one is '
        'taken), an .npz or a file of PyTorch')
    add('--data', metavar='DIR', required=True, help='folder of images, labelled or not')
    add('--split', choices=['train', 'val'], default='train',
        help='which images of a folder with train/ and val/ (default: train)')
    add('--out', metavar='DIR', required=True, help='folder for features.npz')
    add('--format', choices=['csv', 'parquet'], help='a table besides; parquet needs pyarrow')
    add('--batch', type=int, default=256, help='images of one rank in a step (default: 256)')
    flags.add_run_flags(parser, compiled='network')
    flags.add_network_flags(parser)
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return args


def find_labels(images: image_lists.ImageList):
    """(int32 [N], names of classes) if every image has a class number, or lies in a folder, of its
    class; else None."""
    numbers = tar_files.find_class_numbers(images.files)
    given = numbers.tolist() if numbers is not None else [
        name.split('/', 1)[0] if '/' in name else None for name in images.files.names()]
    classes = sorted(set(given) - {None})
    if None in given or len(classes) < 2:
        return None
    places = {value: place for place, value in enumerate(classes)}
    return np.array([places[value] for value in given], np.int32), list(map(str, classes))


def embed(sess, evaluation, features, num_images, dim, batch):
    """Yield, on all ranks together, (indices int32 [k], features float32 [k, D]) of all ranks' next
    images. An image that cannot be read is never among them, though the next one took its place."""
    gather_features = ranks.Gather(tf.float32, [dim])
    gather_indices = ranks.Gather(tf.int32, [])
    steps = data.num_bounded_batches(0, hvd.size(), batch, num_images)  # rank 0 has the most
    results = evaluation.run(sess, [evaluation.labels, features])
    for step in range(steps):
        expected = np.array(data.images_of_bounded_batch(step, hvd.rank(), hvd.size(), batch,
                                                         num_images), np.int32)
        found, rows = next(results) if len(expected) else (expected, np.zeros([0, dim]))
        own = found == expected
        yield gather_indices(sess, found[own]), gather_features(
            sess, rows[own].astype(np.float32))
    for _ in results:  # to its end: there is none left
        pass


class Rows:
    """float32 [num_rows, dim] on disk, of which some are written; rank 0's."""

    def __init__(self, folder, num_rows, dim):
        self._file = tempfile.TemporaryFile(dir=folder)
        self.dim, self.written = dim, np.zeros(num_rows, bool)

    def write(self, indices, rows):
        for index, row in zip(indices.tolist(), rows):
            os.pwrite(self._file.fileno(), row.tobytes(), 4 * self.dim * index)
        self.written[indices] = True

    def chunks(self):
        """The rows that were written, in their order, some at a time."""
        for first in range(0, len(self.written), CHUNK):
            kept = self.written[first:first + CHUNK]
            block = os.pread(self._file.fileno(), 4 * self.dim * len(kept), 4 * self.dim * first)
            block += bytes(4 * self.dim * len(kept) - len(block))  # behind the last one written
            yield np.frombuffer(block, np.float32).reshape(len(kept), self.dim)[kept]


    def __iter__(self):
        return (row for chunk in self.chunks() for row in chunk)


def write_npz(path, rows, arrays):
    """An .npz of rows, which may be more than memory holds, and arrays."""
    with outputs.replace(path) as temporary, zipfile.ZipFile(temporary, 'w', allowZip64=True) as z:
        with z.open('features.npy', 'w', force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, {
                'descr': '<f4', 'fortran_order': False,
                'shape': (int(rows.written.sum()), rows.dim)})
            for chunk in rows.chunks():
                f.write(chunk.tobytes())
        for name, array in arrays.items():
            with z.open(name + '.npy', 'w', force_zip64=True) as f:
                np.lib.format.write_array(f, array, allow_pickle=False)


def write_csv(path, rows, names, labels):
    with outputs.replace(path) as temporary, open(
            temporary, 'w', newline='', errors='surrogateescape') as f:
        table = csv.writer(f)
        table.writerow(['name', 'label'] + [f'f{i}' for i in range(rows.dim)])
        for name, label, row in zip(names, labels, rows):
            table.writerow([name, label] + row.tolist())


def write_parquet(path, rows, names, labels):
    """Columns name, label (null without labels) and features, a list of float32."""
    import pyarrow as pa
    from pyarrow import parquet
    columns = [('name', pa.string()), ('label', pa.string()),
               ('features', pa.list_(pa.float32(), rows.dim))]
    schema, first = pa.schema(columns), 0
    with outputs.replace(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for chunk in rows.chunks():
            last = first + len(chunk)
            values = pa.FixedSizeListArray.from_arrays(pa.array(chunk.ravel()), rows.dim)
            writer.write_table(pa.table([
                pa.array([name.encode(errors='replace').decode() for name in names[first:last]]),
                pa.array([label or None for label in labels[first:last]], pa.string()),
                values], schema))
            first = last


WRITERS = {'csv': write_csv, 'parquet': write_parquet}


def is_result(path: str) -> bool:
    """Whether a file is a result of this script."""
    with contextlib.suppress(ValueError, OSError, zipfile.BadZipFile), np.load(path) as file:
        return {'features', 'names', 'made'} <= set(file.files)
    return False


def main(args):
    threads, gpus = start.begin(args.stall_limit)
    path = weights.find_checkpoint(args.load)
    described = network.settle(args, path)
    images = labels = None  # rank 0's, which writes
    if hvd.rank() == 0:
        images = image_lists.list_images(args.data, args.split)
        labels = find_labels(images)
        if args.format == 'parquet' and not importlib.util.find_spec('pyarrow'):
            raise UserError('--format parquet: needs pyarrow: pip install pyarrow')
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise UserError(f'--out {args.out}: cannot be written: {error.strerror}')
        outputs.check_output(os.path.join(args.out, FILE), is_result, '--out')
    num_images, = ranks.broadcast([len(images.files) if images else 0])

    evaluation = inputs.EvaluationPass(
        ranks.private_folder(), args.data, args.split, args.image_size, args.batch, args.workers,
        args.cpus, task='embed')
    net = network.build(described, gpus)
    features = resnet.compile_if(start.use_xla(args.xla, gpus),
                                 lambda x: net(x, training=False), evaluation.images)  # [n, D]
    rows = Rows(args.out, num_images, net.feature_dim) if hvd.rank() == 0 else None
    with tf.Session(config=start.session_config(threads, gpus)) as sess:
        shutdown.session = sess
        runs.assign(sess, weights.load_weights(path, weights.is_backbone, tf.global_variables()))
        network.check_features(sess, evaluation.images, features, path)
        with shutdown.explain('embedding'):
            for indices, values in embed(sess, evaluation, features, num_images, net.feature_dim,
                                         args.batch):
                if rows is not None:
                    rows.write(indices, values)
    if rows is not None:
        write(args, path, described, images, labels, rows)


def write(args, path, described, images, labels, rows):
    """Write what was asked for (rank 0)."""
    kept = np.flatnonzero(rows.written)
    if not len(kept):
        raise UserError(f'none of the {len(rows.written)} images can be read')
    all_names = list(images.files.names())
    names = [all_names[index] for index in kept]
    made = {'load': os.path.abspath(path), 'network': described, 'split': args.split,
            'folder': os.path.abspath(images.files.root), 'image_size': args.image_size,
            'images': len(rows.written), 'unreadable': len(rows.written) - len(kept)}
    arrays = {'names': np.array(names), 'made': np.array(json.dumps(made))}
    if labels:
        arrays.update(labels=labels[0][kept], classes=np.array(labels[1]))
    write_npz(os.path.join(args.out, FILE), rows, arrays)
    if args.format:
        words = [labels[1][number] for number in labels[0][kept]] if labels else [''] * len(names)
        WRITERS[args.format](os.path.join(args.out, 'features.' + args.format), rows, names, words)
    logger.info(f'{args.out}: features of {len(kept)} images, {rows.dim} numbers each' + (
        f', of {len(labels[1])} classes' if labels else '') + (
        f'; {made["unreadable"]} could not be read' if made['unreadable'] else ''))


if __name__ == '__main__':
    with start.user_errors():
        main(parse_args())
