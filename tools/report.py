#!/usr/bin/env python
"""A page to look at: the curves of a run, and what its features say of images.

    ./embed.py --load runs/mine --data my_images --out runs/mine/features
    python tools/report.py runs/mine        # writes runs/mine/report.html, which needs no network
    python tools/report.py runs/mine --projector projector && tensorboard --logdir projector

Of more than 5,000 images a sample is shown, always the same one; the file of features must fit in
memory. With scikit-learn installed there are a t-SNE map and clusters.

Shapes: n images are shown; rows float32 [n, D], their features, have length 1.
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import collections
import colorsys
import contextlib
import glob
import json
import re
import tempfile
import zipfile

import cv2
import numpy as np

import decoder
import file_lists
import image_files
import outputs
import weights
from errors import UserError
from tools import plot_curves, report_page
from tools.report_page import paragraph
from tools.stages import read_json

SAMPLE = 5000  # images
SIDE = 64  # of a thumbnail, pixels
COLUMNS, ROWS, CELL = 24, 16, 40  # of a map; CELL in pixels
IS_OURS = outputs.contains(report_page.MARK.encode())
PROJECTOR = 'projector_config.pbtxt', 'metadata.tsv', 'tensors.tsv', 'sprite.png'
CONFIG = f'''# {report_page.MARK}
embeddings {{ tensor_name: "features" tensor_path: "{PROJECTOR[2]}" metadata_path: "{PROJECTOR[1]}"
  sprite {{ image_path: "{PROJECTOR[3]}" single_image_dim: {SIDE} single_image_dim: {SIDE} }} }}
'''
# names [n]; labels int [n] and classes, or None both; made: what embed.py says; total: in the file
Features = collections.namedtuple('Features', 'rows names labels classes made total')


def read_features(path):
    """A features.npz of embed.py, or a sample of it; a UserError if it is none."""
    try:
        with np.load(path) as file:
            names, rows, made = file['names'], file['features'], json.loads(str(file['made']))
            total = len(names)
            if rows.shape != (total, rows.shape[-1]) or total < 2:
                raise ValueError(f'{total} names, and features of shape {rows.shape}')
            kept = np.sort(np.random.RandomState(0).permutation(total)[:SAMPLE])
            rows, labels, classes = rows[kept], None, None
            if 'labels' in file.files:
                labels, classes = file['labels'][kept], file['classes'].tolist()
        if not np.isfinite(rows).all() or labels is not None and labels.max() >= len(classes):
            raise ValueError('its features are not finite, or a label has no class')
        made['folder'], made.update(made.pop('network'))
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror or error}')
    except (AttributeError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f'{path}: is no result of embed.py: {e}')
    lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
    rows = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return Features(rows, names[kept].tolist(), labels, classes, made, total)


class Thumbnails(dict):
    """Of each image its middle, uint8 BGR [SIDE, SIDE, 3], gray if it cannot be read: `missing`."""

    def __init__(self, folder, names):
        self._files, _ = file_lists.find_images(folder)
        self._names, self.missing, wanted = names, 0, set(names)
        self._places = {name: place for place, name in enumerate(self._files.names())
                        if name in wanted}

    def __missing__(self, index):
        try:
            image, _ = decoder.decode(self._files.read(self._places[self._names[index]]))
        except (LookupError, OSError, ValueError, MemoryError):
            self.missing += 1
            image = np.full([SIDE, SIDE, 3], 128, np.uint8)
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        self[index] = cv2.resize(image[top:top + side, left:left + side], (SIDE, SIDE),
                                 interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC)
        return self[index]


# ---- what features say

def choose_queries(n, labels):
    """12 of n images, of as many classes as there are."""
    rng = np.random.RandomState(1)
    order = rng.permutation(n)
    first = [0] if labels is None else np.unique(labels[order], return_index=True)[1]
    first = rng.permutation(first)  # of each class
    return np.append(order[first], np.delete(order, first))[:12].tolist()


def find_neighbours(rows, query):
    """The nearest other images, at most 8: [(index, cosine)], the nearest first."""
    cosines = rows @ rows[query]  # [n]
    order = np.argsort(-cosines, kind='stable')
    return [(index, cosines[index]) for index in order[order != query][:8].tolist()]


def find_groups(rows, k):
    """(t-SNE [n, 2], indices of each cluster's images, its middle first); (None, []) without
    scikit-learn."""
    try:
        from sklearn import cluster, manifold
    except ImportError:
        return None, []
    positions = manifold.TSNE(init='pca', learning_rate=200., random_state=0,
                              perplexity=min(30, len(rows) / 4)).fit_transform(rows)
    found = cluster.KMeans(min(k, len(rows)), n_init=3, random_state=0).fit(rows)
    order = np.argsort(np.square(rows - found.cluster_centers_[found.labels_]).sum(axis=1))
    clusters = [order[found.labels_[order] == label].tolist() for label in np.unique(found.labels_)]
    return positions, sorted(clusters, key=len, reverse=True)


def draw_map(positions, thumbnails, colours):
    """Positions [n, 2] -> uint8 BGR. In each cell is the image that is nearest to its middle, on a
    colour [n]."""
    low, high = np.percentile(positions, [1, 99], axis=0)
    positions = np.clip((positions - low) / np.maximum(high - low, 1e-12), 0, 1) * [COLUMNS, ROWS]
    cells = np.minimum(positions.astype(int), [COLUMNS - 1, ROWS - 1])
    order = np.argsort(np.square(positions - cells - 0.5).sum(axis=1))
    picture = np.full([ROWS * CELL, COLUMNS * CELL, 3], 235, np.uint8)
    for i in np.unique(cells[order] @ [1, COLUMNS], return_index=True)[1]:
        left, top = CELL * cells[order[i]]
        cell = picture[top:top + CELL, left:left + CELL]
        cell[:] = colours[order[i]]
        cell[3:-3, 3:-3] = cv2.resize(thumbnails[order[i]], (CELL - 6, CELL - 6),
                                      interpolation=cv2.INTER_AREA)
    return picture


# ---- the sections of the page: (heading, HTML)

def show_run(folder, stats, network):
    command, knn, panels = '', [], plot_curves.collect_panels([stats])
    with contextlib.suppress(OSError), open(os.path.join(folder, 'log.log'), errors='replace') as f:
        command = next((line.split('Argv: ', 1)[1].strip() for line in f if 'Argv: ' in line), '')
    for path in glob.glob(os.path.join(glob.escape(folder), 'model-*.knn.json')):
        step, result = re.search(r'-(\d+)\.knn\.json$', path), read_json(path, None)
        if step and isinstance(result, dict) and 'knn_top1' in result:
            knn.append((int(step.group(1)), float(result['knn_top1'])))
    first, last = (stats[0], stats[-1]) if stats else ({}, {})
    if knn and first.get('epoch_num') and first.get('global_step'):
        x, y = zip(*((step * first['epoch_num'] / first['global_step'], top1)
                     for step, top1 in sorted(knn)))
        panels.append(plot_curves.Panel('kNN top-1 of checkpoints, %', [
            plot_curves.Series(0, '', '-', x, y)], []))
    figures = ''
    for panel in panels:
        words = [f'{line.name} {line.y[0]:.4g} in epoch {line.x[0]:.4g}, {line.y[-1]:.4g} in epoch '
                 f'{line.x[-1]:.4g}'.strip() for line in panel.series]
        words += [f'{label} = {value:.4g}' for value, label in panel.levels]
        with tempfile.TemporaryDirectory() as temporary:
            path = os.path.join(temporary, 'curve.svg')
            plot_curves.draw([panel], [''], path)
            with open(path, 'rb') as f:
                figures += report_page.figure('curve', report_page.data_uri('svg+xml', f.read()),
                                              f'{panel.title}: {"; ".join(words)}')
    if figures:
        yield 'Curves', f'<div class="grid" style="--least:21rem">{figures}</div>'
    content = ''.join(f'<div>{report_page.table(caption, rows)}</div>' for caption, rows in (
        ('Last epoch', last.items()), ('Network', network.items()),
        ('kNN top-1 by step, %', sorted(knn))) if rows)
    if os.path.exists(os.path.join(folder, 'resume-me')):
        command += ' (asked to stop; the same command goes on)'
    yield 'Configuration', (
        paragraph(command) + f'<div class="grid" style="--least:21rem">{content}</div>')


def show_features(features, thumbnails):
    rows, names, labels, classes = features[:4]

    def show(indices, words=None, kinds=None):
        return report_page.images([
            (thumbnails[index], names[index], words[i] if words else '', kinds[i] if kinds else '')
            for i, index in enumerate(indices)])

    shown, same = '', []
    for query in choose_queries(len(rows), labels):
        nearest, cosines = zip(*find_neighbours(rows, query))
        kinds = ['' if labels is None else 'same' if labels[index] == labels[query] else 'other'
                 for index in nearest]
        shown += show((query,) + nearest, ['query'] + [f'{cosine:.3f}' for cosine in cosines],
                      ['query'] + kinds)
        same += [kind == 'same' for kind in kinds]
    words = 'An image and the others that are nearest, with their cosine similarity.' + (
        '' if labels is None else f' {np.mean(same):.0%} of those shown are of its class, green; '
        'the others are red and dashed.')
    yield 'Nearest neighbours', paragraph(words) + f'<div class="grid">{shown}</div>'

    count = len(classes or [])
    palette = [[int(240 * part) for part in colorsys.hsv_to_rgb(i / count, 0.75, 0.9)]
               for i in range(count)]
    colours = [[235] * 3] * len(rows) if labels is None else [palette[i] for i in labels]
    centred = rows - rows.mean(axis=0)
    _, variances, axes = np.linalg.svd(centred.T @ centred)  # PCA: [D], [D, D]
    share = variances[:2].sum() / max(variances.sum(), 1e-12)
    tsne, clusters = find_groups(rows, min(count, 20) or 10)
    maps = {f'PCA: the two directions of most variance, {share:.0%} of it': centred @ axes[:2].T,
            't-SNE: near images are alike; long distances mean little': tsne}
    swatches = [(np.full([12, 48, 3], colour, np.uint8), '', name, 'swatch')
                for name, colour in zip(classes or [], palette)]
    yield 'Map', (report_page.images(swatches) if 0 < count <= 20 else '') + ''.join(
        report_page.figure('map', report_page.jpeg(draw_map(places, thumbnails, colours)), words)
        for words, places in maps.items() if places is not None)

    # the mean cosine to all others
    similarity = (rows @ rows.sum(axis=0) - np.square(rows).sum(axis=1)) / (len(rows) - 1)  # [n]
    order = np.argsort(-similarity, kind='stable')
    yield 'Most and least like the rest', ''.join(
        paragraph(words) + show(indices, [f'{similarity[index]:.3f}' for index in indices])
        for words, indices in (('Most, with the mean cosine similarity to all others:', order[:8]),
                               ('Least, the least first:', order[::-1][:8])))

    content = ''
    for number, members in enumerate(clusters, 1):
        words = f'Cluster {number}: {len(members)} images'
        if labels is not None:
            label, of = collections.Counter(labels[members].tolist()).most_common(1)[0]
            words += f', {of / len(members):.0%} of them {classes[label]}'
        content += f'<div>{paragraph(words)}{show(members[:9])}</div>'
    yield 'Clusters', f'<div class="grid">{content}</div>' if clusters else paragraph(
        'pip install scikit-learn adds a t-SNE map and clusters.')
    yield 'Features', paragraph(
        f'{len(rows)} of the {features.total} images of the file, {rows.shape[1]} numbers each.' + (
            f' {thumbnails.missing} of those shown cannot be read: they are gray.'
            if thumbnails.missing else '')) + report_page.table('Made from', features.made.items())


def write_projector(folder, features, thumbnails):
    """What TensorBoard's projector reads."""
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in PROJECTOR]
    outputs.check_output(paths[0], IS_OURS, '--projector')
    for path in paths[1:]:
        outputs.check_output(path, lambda path: os.path.exists(paths[0]), '--projector')
    width = int(np.ceil(np.sqrt(len(features.rows))))  # of the square sprite, images
    sprite = np.full([width, width, SIDE, SIDE, 3], 255, np.uint8)
    for i in range(len(features.rows)):
        sprite[i // width, i % width] = thumbnails[i]
    lines = [re.sub(r'\s', ' ', name) for name in features.names]
    if features.labels is not None:
        lines = ['name\tclass'] + [f'{name}\t{features.classes[label]}'
                                   for name, label in zip(lines, features.labels)]
    table = ['\t'.join(f'{value:.5g}' for value in row) for row in features.rows.tolist()]
    sprite = sprite.swapaxes(1, 2).reshape(width * SIDE, width * SIDE, 3)
    contents = [text.encode(errors='replace')
                for text in (CONFIG, '\n'.join(lines), '\n'.join(table))]
    for path, content in zip(paths, contents + [cv2.imencode('.png', sprite)[1]]):
        with outputs.replace(path) as temporary, open(temporary, 'wb') as f:
            f.write(content)


def report(args):
    """Write what was asked for; returns the path of the page."""
    out, network, features = args.out or os.path.join(args.run, 'report.html'), {}, None
    outputs.check_output(out, IS_OURS, '--out', 'report that this made')
    path = os.path.join(args.features or os.path.join(args.run, 'features'), 'features.npz')
    stats = (plot_curves.read_stats(args.run)
             if os.path.lexists(os.path.join(args.run, 'stats.json')) else [])
    with contextlib.suppress(UserError):  # no checkpoint, or no TensorFlow
        network = weights.read_network(args.run)
    summary = [f'{len(stats)} epochs'] * bool(stats)
    sections = dict(show_run(args.run, stats, network))
    if args.features or os.path.lexists(path):
        features = read_features(path)
        folder = args.images or features.made['folder']
        if not (os.path.isdir(folder) or image_files.is_tar(folder)):
            raise UserError(f'{folder}: is gone, with the images of {path} (--images: where they '
                            'are now)')
        for name in ('depth', 'width', 'stem'):
            told = features.made.get(name)
            if network.get(name, told) != told:
                raise UserError(f'{path}: is of --{name} {told}, but {args.run} of --{name} '
                                f'{network[name]}')
        thumbnails = Thumbnails(folder, features.names)
        sections.update(show_features(features, thumbnails))
        summary.append(f'features of {features.total} images')
    elif not stats or args.projector:
        raise UserError(f'{path}: is not there: embed.py --out makes it' + (
            '' if args.projector else f'; nor has {args.run} a stats.json'))
    with outputs.replace(out) as temporary, open(temporary, 'w', encoding='utf-8') as f:
        f.write(report_page.page(os.path.basename(os.path.abspath(args.run)), ', '.join(summary),
                                 sections))
    if args.projector:
        write_projector(args.projector, features, thumbnails)
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('run', metavar='RUN', help='log folder of a run')
    add('--features', metavar='DIR', help='what embed.py wrote (default: RUN/features, if there)')
    add('--images', metavar='DIR', help='where the images are, if they were moved')
    add('--out', metavar='FILE', help='page to write (default: RUN/report.html)')
    add('--projector', metavar='DIR', help="folder for the files of TensorBoard's projector")
    try:
        print('wrote ' + os.fsencode(report(parser.parse_args())).decode(errors='replace'))
    except (OSError, ValueError) as error:
        sys.exit(f'report.py: error: {error}')


if __name__ == '__main__':
    main()
