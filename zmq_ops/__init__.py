"""Tensors from a ZMQ socket straight into a TensorFlow graph.

Importing this package, and everything in it but `ZMQPullSocket`, needs neither TensorFlow nor the
compiled op, so that a data server stays free of both. tensorpack's `ZMQInput` and
`send_dataflow_zmq(format='zmq_ops')` find the package by its name.
"""
from .pull import ZMQPullSocket
from .serialize import dump_arrays, load_arrays, new_message
from .shared import SharedMessages, fetch_message

__all__ = ['SharedMessages', 'ZMQPullSocket', 'dump_arrays', 'fetch_message', 'load_arrays',
           'new_message']
