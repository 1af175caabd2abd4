#!/usr/bin/env python
"""From JPEGs to training steps: main_moco.py against its two halves.

    python benchmarks/end_to_end.py --data /path/to/imagenet    # ResNet-50; 13 minutes on 2 cores
    python benchmarks/end_to_end.py --data DIR -- --v2 --depth 18 --image-size 64 --batch 64

In turns: images/s of the data server alone (serve-data.py --benchmark), of training alone
(main_moco.py --fake), and of both together (main_moco.py --data). Where they share the cores, the
limit of both together is 1 / (1/data + 1/training), the first ratio; where training has a GPU it is
the slower of the two, the second ratio. Flags behind -- go to main_moco.py; one process.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys

from step import HERE, run_main


def run_server(data, args):
    """Images/s of two views each."""
    output = subprocess.check_output(
        [sys.executable, os.path.join(HERE, 'serve-data.py'), '--benchmark', '--data', data,
         '--task', 'moco-v2' if args.aug_plus else 'moco-v1', '--batch', str(args.batch),
         '--image-size', str(args.image_size), '--crop-area', *map(str, args.crop_area)],
        universal_newlines=True)
    return float(re.match(r'(\d+) images/s', output).group(1))


def measure(data, steps, num_rounds, flags):
    sys.path.insert(0, HERE)
    import main_moco  # after the command line has been parsed, for it loads TensorFlow
    import network
    args = main_moco.parse_args(['--data', data] + flags)
    args.image_size = args.image_size or network.PUBLISHED['image_size']
    ratios = []
    for _ in range(num_rounds):
        fed = run_server(data, args)
        trained, both = (run_main(args.image_size, args.batch, steps, flags=source + flags)
                         for source in (['--fake'], ['--data', data]))
        limits = 1 / (1 / fed + 1 / trained), min(fed, trained)
        ratios.append([both / limit for limit in limits])
        print(f'images/s: data alone {fed:.1f}, training alone {trained:.1f}, both {both:.1f}; of '
              'the limit on shared cores {:.3f}, of the slower one {:.3f}'.format(*ratios[-1]),
              flush=True)
    medians = map(statistics.median, zip(*ratios))
    print('median of {}: {:.3f} and {:.3f}'.format(num_rounds, *medians))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help='folder of images')
    parser.add_argument('--steps', type=int, default=12, help='measured steps (default: 12)')
    parser.add_argument('--rounds', type=int, default=3, help='of each (default: 3)')
    parser.add_argument('flags', nargs='*', help='for main_moco.py, behind --')
    args = parser.parse_args()
    measure(args.data, args.steps, args.rounds, args.flags or ['--v2', '--batch', '16'])
