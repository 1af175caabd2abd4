"""Keeps TensorFlow's greetings off stderr. make_env.sh copies this file into an environment, where
every Python begins with install(): horovodrun imports TensorFlow too.

TensorFlow 2.21 logs while two of its libraries are being loaded, before it heeds
TF_CPP_MIN_LOG_LEVEL: a grep heeds it then. All else passes, even if loading ends the process, as on
a CPU that lacks instructions.
"""
import contextlib
import os
import sys
from importlib.machinery import ExtensionFileLoader, PathFinder

LIBRARIES = ('tensorflow.python.platform._pywrap_cpu_feature_guard',
             'tensorflow.python.profiler.internal._pywrap_profiler_plugin')
LEFT_OUT = {'1': 'I', '2': 'IW', '3': 'IWE'}  # severities of lines, by level


def install():
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # errors only
    sys.meta_path.insert(0, QuietFinder)


class QuietFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in LIBRARIES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec:
            spec.loader = QuietLoader(spec.loader.name, spec.loader.path)
        return spec


class QuietLoader(ExtensionFileLoader):
    def create_module(self, spec):
        with heeding_level():
            return super().create_module(spec)


@contextlib.contextmanager
def heeding_level():
    severities = LEFT_OUT.get(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))
    if not severities or not sys.__stderr__:
        yield
        return
    import subprocess  # not whenever Python starts
    grep = subprocess.Popen(
        ['grep', '-vE', f'^[{severities}][0-9]{{4}} |^WARNING: All log messages before absl::'],
        stdin=subprocess.PIPE, stdout=2)
    stderr = os.dup(2)
    os.dup2(grep.stdin.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        grep.communicate()  # closes its input and waits
