"""What the network of some weights is: a description that is saved with them.

So an evaluation needs no flags for it, and cannot be one of another network by mistake.
"""
import json
from typing import Optional

import horovod.tensorflow as hvd
import numpy as np
from tensorpack import tfv1 as tf
from tensorpack.utils import logger

import resnet
import weights
from errors import UserError
from job import ranks

COLLECTION = 'network'  # of what is saved, but is no variable of the model
PUBLISHED = {'depth': 50, 'width': 64, 'stem': 'imagenet', 'image_size': 224,
             'mean_bgr': resnet.MEAN_BGR.tolist(), 'std_bgr': resnet.STD_BGR.tolist()}


def is_size(value) -> bool:
    return type(value) is int and 0 < value < 2**16


def is_colour(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(
        isinstance(number, (int, float)) and 0 < number < 256 for number in value)


# what a description may hold, and which values
KNOWN = {'depth': lambda value: is_size(value) and value in resnet.DEPTHS, 'width': is_size,
         'stem': lambda value: isinstance(value, str) and value in resnet.STEMS,
         'image_size': is_size, 'mean_bgr': is_colour, 'std_bgr': is_colour}


def settle(args, path: Optional[str]) -> dict:
    """What the network is, as PUBLISHED: as flags say, or the weights in a file (None for none, on
    all but rank 0, which tells the others), or else as published; args follow. A UserError if a
    flag says something else than the weights: the features would mean nothing."""
    told = json.loads(ranks.broadcast_text(json.dumps(
        weights.read_network(path) if path and hvd.rank() == 0 else {})))
    for name, value in told.items():
        if not (name in KNOWN and KNOWN[name](value)):
            raise UserError(f'{path}: is of a network with {name} {value}, which is not known here')
    network = dict(PUBLISHED, **told)
    for name in ('depth', 'width', 'stem', 'image_size'):
        given, flag = getattr(args, name), '--' + name.replace('_', '-')
        if given is not None:
            if name in told and given != told[name]:
                words = f'{flag} {given}: the weights of {path} are of {flag} {told[name]}'
                if name != 'image_size':
                    raise UserError(words)
                logger.warn(words + '; features of another size are less good')
            network[name] = given
        setattr(args, name, network[name])
    return network


def build(network: dict, gpus: int, bn_splits: int = 1) -> resnet.ResNet:
    """The network that is described, in the layout that is fast on a GPU or a CPU."""
    return resnet.ResNet(
        network['depth'], network['width'], network['stem'], 'NCHW' if gpus else 'NHWC', bn_splits,
        np.array(network['mean_bgr'], np.float32), np.array(network['std_bgr'], np.float32))


def save(network: dict) -> None:
    """Have the description saved with the weights, for read_network()."""
    text = np.frombuffer(json.dumps(network).encode(), np.uint8)
    with tf.device('/cpu:0'):
        tf.get_variable(weights.NETWORK, trainable=False, use_resource=True,
                        initializer=tf.constant(text),
                        collections=[tf.GraphKeys.LOCAL_VARIABLES, COLLECTION])


def check_features(sess, images, features, path: Optional[str]) -> None:
    """A UserError if a network that is to be evaluated computes nothing: tensors of images uint8
    [n, S, S, 3] and of their features [n, D]."""
    shape = [size or 2 for size in images.shape.as_list()]
    black, white = (ranks.run_alone(sess, features, {images: np.full(shape, value, np.uint8)})[0]
                    for value in (0, 255))  # [D]
    if not (np.isfinite(black).all() and np.isfinite(white).all()):
        raise UserError(f'{path}: its features are not finite')
    if np.array_equal(black, white):
        raise UserError(f'{path}: its features of a black and of a white image are the same: what '
                        'is computed from them would mean nothing')
