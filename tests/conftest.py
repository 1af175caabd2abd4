"""For all tests: TensorFlow on one thread of a CPU that does not spin, since graphs are tiny,
and without its chatter."""
import os
import signal

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('KMP_BLOCKTIME', '0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import commands  # noqa: E402, F401  (keeps what the next line hides)
from job import signals  # noqa: E402

os.environ['CUDA_VISIBLE_DEVICES'] = ''

# A suite in the background of a script, or under nohup, would have every command ignore signals.
for number in signals.SIGNALS:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

from tensorpack import tfv1 as tf  # noqa: E402

tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()  # as job/start.py does
