#!/usr/bin/env python
"""Plot the curves of one or several runs.

    python tools/plot_curves.py runs/moco runs/lincls --out curves.png

reads stats.json of each log folder (one entry per epoch) and draws a panel for each of these, if a
run has it: the contrastive loss with its chance level ln(K+1), (K+1)-way accuracy, learning rate,
kNN top-1 and, of linear classification, learning rate, cross-entropy, training and validation
error. Runs are told apart by their folders' names.
"""
import os
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import collections
import json
import math

import outputs

# how to draw a key of stats.json: in which panel, the line's name and style, value -> value shown
Curve = collections.namedtuple('Curve', 'panel name style convert')
# what linear classification has under the same key: no axis shows rates of 0.03 and 30 together,
# and the losses are of different kinds
LINEAR = {'learning_rate': 'learning rate, linear classification',
          'loss': 'cross-entropy, linear classification'}
CURVES = collections.OrderedDict([
    ('loss', Curve('contrastive loss', '', '-', float)),
    ('accuracy', Curve('(K+1)-way accuracy, %', '', '-', lambda fraction: 100 * fraction)),
    ('learning_rate', Curve('learning rate', '', '-', float)),
    ('knn_top1', Curve('kNN top-1, %', '', '-', float)),
    *((name, Curve(name, '', '-', float)) for name in LINEAR.values()),
    ('train_top1', Curve('linear classification, error %', 'train', ':', lambda top1: 100 - top1)),
    ('val_top1', Curve('linear classification, error %', 'val', '-', lambda top1: 100 - top1)),
])

# name, the points and their style; `run` numbers the runs and so gives the colour
Series = collections.namedtuple('Series', 'run name style x y')
# levels: values to mark with a dashed line, each with its label
Panel = collections.namedtuple('Panel', 'title series levels')

# what a picture's metadata say, by its format; only pictures that say so are replaced
MARK = 'tools/plot_curves.py'
METADATA = {'png': {'Software': MARK}, 'pdf': {'Creator': MARK}, 'svg': {'Creator': MARK}}

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']


def read_stats(run):
    """The epochs of a run, dicts, from stats.json in its log folder.

    Raises:
        ValueError: it is missing or malformed; the message names the file.
    """
    path = os.path.join(run, 'stats.json')
    try:
        with open(path) as f:
            stats = json.load(f, parse_int=float)  # without limit
    except OSError as e:
        raise ValueError(f'cannot read {path}: {e.strerror}')
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is not JSON: {e}')
    if not isinstance(stats, list) or not stats or not all(isinstance(e, dict) for e in stats):
        raise ValueError(f'{path} is not a list of epochs, as training writes it')
    for entry in stats:
        for key in list(CURVES) + ['epoch_num', 'queue_size']:
            if not isinstance(entry.get(key, 0), (int, float)):
                raise ValueError(f'{path}: {key} is {entry[key]!r}, not a number')
    return stats


def name_runs(runs):
    """Folder names of the runs, with as many of their parents as it takes to tell them apart."""
    paths = [os.path.abspath(run).strip(os.sep).split(os.sep) for run in runs]
    for depth in range(1, max(map(len, paths)) + 1):
        names = [os.sep.join(path[-depth:]) for path in paths]
        if len(set(names)) == len(set(map(tuple, paths))):
            break
    return names


def collect_panels(runs):
    """What there is to draw.

    Args:
        runs: list of stats, one per run, each as `read_stats` gives it.

    Returns:
        list of `Panel`s, in the order of `CURVES`; only those with a point.
    """
    panels = collections.OrderedDict(
        (curve.panel, Panel(curve.panel, [], [])) for curve in CURVES.values())
    for run, stats in enumerate(runs):
        if any('train_top1' in entry or 'val_top1' in entry for entry in stats):
            stats = [dict(entry) for entry in stats]
            for entry in stats:
                entry.update((name, entry.pop(key)) for key, name in LINEAR.items() if key in entry)
        for key, curve in CURVES.items():
            points = [(entry.get('epoch_num', i), curve.convert(entry[key]))
                      for i, entry in enumerate(stats, 1) if key in entry and
                      math.isfinite(entry[key]) and math.isfinite(entry.get('epoch_num', i))]
            if points:
                x, y = zip(*points)
                panels[curve.panel].series.append(Series(run, curve.name, curve.style, x, y))

    queue_sizes = {entry['queue_size'] for stats in runs for entry in stats
                   if 'queue_size' in entry and 'loss' in entry}
    for size in sorted(size for size in queue_sizes if 0 < size < math.inf):
        chance = math.log(size + 1), f'chance, ln({size:.0f} + 1)'
        panels[CURVES['loss'].panel].levels.append(chance)
    return [panel for panel in panels.values() if panel.series]


def label(name):
    """A name as matplotlib shows it: in one line, short, and none of it as a formula."""
    text = ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in name)
    if len(text) > 40:
        text = text[:20] + '\N{HORIZONTAL ELLIPSIS}' + text[-19:]
    return text.replace('$', r'\$')


def draw(panels, names, out):
    """Write a picture of the panels, at least one; `names` are those of the runs."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names = [label(name) for name in names]
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = 4.4 * columns, 3.1 * rows + 0.5
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels):
        draw_panel(axis, panel)

    # one legend for all panels, of the runs
    lines_below = 0
    if len(names) > 1:
        lines = [plt.Line2D([], [], color=COLOURS[i % len(COLOURS)]) for i in range(len(names))]
        columns = min(len(names), 4, 1 + int(10 * size[0] / (8 + max(map(len, names)))))
        legend = fig.legend(lines, lines, loc='lower center', ncol=columns, frameon=False)
        for text, name in zip(legend.get_texts(), names):  # (of its own, it hides _names)
            text.set_text(name)
        lines_below = -(-len(names) // columns)
    else:
        fig.suptitle(names[0], x=0.01, ha='left', fontsize=11, color='0.35')
    inches_below = 0.2 + 0.22 * lines_below if lines_below else 0
    fig.tight_layout(rect=(0, min(inches_below / size[1], 0.7), 1, 1))
    form = picture_format(out)
    fig.savefig(out, dpi=130, format=form, metadata=METADATA.get(form))
    plt.close(fig)


def draw_panel(axis, panel):
    for series in panel.series:
        colour = COLOURS[series.run % len(COLOURS)]
        few = len(series.x) <= 25  # then the points themselves can be told apart
        axis.plot(series.x, series.y, series.style, color=colour, lw=1.8,
                  marker='o' if few else None, ms=3)
        axis.annotate(f'{series.y[-1]:.3g}', (series.x[-1], series.y[-1]), xytext=(5, 0),
                      textcoords='offset points', va='center', fontsize=8, color=colour)
    for value, label in panel.levels:
        axis.axhline(value, color='0.45', ls='--', lw=1)
        axis.annotate(label, (1, value), xycoords=('axes fraction', 'data'), xytext=(-2, 3),
                      textcoords='offset points', ha='right', fontsize=8, color='0.35')
    named = {series.name: series.style for series in panel.series if series.name}
    if named:
        lines = [axis.plot([], [], style, color='0.3')[0] for style in named.values()]
        axis.legend(lines, list(named), frameon=False, fontsize=8)

    axis.set_title(panel.title, fontsize=10, loc='left')
    axis.set_xlabel('epoch', fontsize=9)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.08, y=0.1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color='0.92')
    axis.set_axisbelow(True)
    for side in ('top', 'right'):
        axis.spines[side].set_visible(False)


def picture_format(path):
    return os.path.splitext(path)[1][1:].lower() or 'png'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='RUN', nargs='+', help='log folder of a run')
    parser.add_argument('--out', required=True, help='picture to write, e.g. curves.png')
    args = parser.parse_args()
    try:
        panels = collect_panels([read_stats(run) for run in args.runs])
        if not panels:
            raise ValueError('nothing to draw in stats.json of ' + ', '.join(args.runs))
        outputs.check_output(args.out, outputs.contains(MARK.encode()), '--out',
                             'picture that this made')
        with outputs.replace(args.out) as path:
            draw(panels, name_runs(args.runs), path)
    except (OSError, ValueError) as e:
        sys.exit(f'plot_curves.py: error: {e}')
    print('wrote ' + os.fsencode(args.out).decode(errors='replace'))


if __name__ == '__main__':
    main()
