#!/usr/bin/env python
"""How fast each TensorFlow trains ResNet-50 on this machine: main_moco.py --fake with 1.15, with
2.21, and with 2.21 and --amp, in turns.

    make env RUNTIME=tf1; make env RUNTIME=tf2
    python3 benchmarks/runtimes.py    # 224 px batch 16 and 32 px batch 64; 9 minutes on 2 cores

Printed are images/s, and the median over the rounds of each ratio to TensorFlow 1.15.
"""
import argparse
import os
import statistics

from step import HERE, run_main

ROUNDS = 3
CASES = [('1.15', 'tf1', []), ('2.21', 'tf2', []), ('2.21 --amp', 'tf2', ['--amp'])]


def measure(size, batch, steps):
    rates = {name: [] for name, _, _ in CASES}
    for _ in range(ROUNDS):
        for name, runtime, flags in CASES:
            python = os.path.join(HERE, '.venv-' + runtime, 'bin', 'python')
            rates[name].append(run_main(size, batch, steps, python, ['--fake'] + flags))
        print(f'{size} px, batch {batch}, images/s: ' + ', '.join(
            f'{name} {values[-1]:.2f}' for name, values in rates.items()), flush=True)
    for name, values in list(rates.items())[1:]:
        ratio = statistics.median(v / first for v, first in zip(values, rates['1.15']))
        print(f'{size} px, batch {batch}: {name} is {ratio:.2f} times as fast as 1.15', flush=True)


if __name__ == '__main__':
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measure(224, 16, 6)
    measure(32, 64, 20)
