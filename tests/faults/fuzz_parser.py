#!/usr/bin/env python
"""The pull op's parser under libFuzzer, whose mutations follow the parser's branches.

    python tests/faults/fuzz_parser.py --seconds 120

prints executions and the verdict. Bytes that break the parser stay in the current folder; the exit
code is then 1. Needs NumPy, and clang with libFuzzer (Debian: clang libclang-rt-14-dev). The short
form, 100,000 mutations with g++, is in tests/test_zmq_ops.py.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)

from zmq_ops.serialize import DTYPE_NUMBERS, dump_arrays  # noqa: E402


def build(folder):
    """Compile the fuzzer: its path."""
    path = os.path.join(folder, 'fuzz_parser')
    command = ['clang++', '-std=c++11', '-g', '-O1', '-fsanitize=fuzzer,address,undefined',
               '-fno-sanitize-recover=all', '-I', os.path.join(ROOT, 'zmq_ops'),
               os.path.join(HERE, 'fuzz_parser.cc'), '-o', path]
    if shutil.which(command[0]) is None or subprocess.call(command) != 0:
        sys.exit('fuzz_parser: needs clang++ with libFuzzer '
                 '(Debian: apt-get install clang libclang-rt-14-dev)')
    return path


def write_corpus(folder):
    """A message of each type, with a 0-d, an empty and a full tensor."""
    for name in DTYPE_NUMBERS:
        message = dump_arrays([np.ones(shape, name) for shape in ((), (2, 0, 3), (4, 5))])
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(message)


def main(args):
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        fuzzer = build(folder)
        corpus = os.path.join(folder, 'corpus')
        os.mkdir(corpus)
        write_corpus(corpus)
        # more than 16 MB at once is more than any of these messages can ask for
        done = subprocess.run(
            [fuzzer, corpus, '-max_total_time={}'.format(args.seconds), '-seed=1', '-max_len=4096',
             '-malloc_limit_mb=16', '-timeout=10', '-use_value_profile=1', '-print_final_stats=1',
             '-artifact_prefix={}/fuzz_parser-'.format(os.getcwd())],
            stderr=subprocess.PIPE, universal_newlines=True, errors='replace')
    if done.returncode:
        print(done.stderr[-10000:])
        sys.exit('fuzz_parser: broken, see above')
    executions = re.search(r'number_of_executed_units: +(\d+)', done.stderr).group(1)
    coverage = re.findall(r'cov: (\d+)', done.stderr)[-1]
    print('{} executions in {} s, {} edges of the code reached, nothing found'.format(
        executions, args.seconds, coverage))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=int, default=120, help='how long (default: 120)')
    main(parser.parse_args())
