"""What test_equivalence.py runs on every rank: three steps of MoCo on given images, and everything
that comes out of them.

    horovodrun -np 2 python tests/equivalence_ranks.py CASE.npz ...    # writes CASE.rank0.npz and
                                                                       # CASE.rank1.npz
CASE.npz holds depth, mlp, splits, temperature, momentum, weight_decay, queue_size, queue_ptr, seed
of the weights, and images of all ranks, query and key: uint8 [steps, N, S, S, 3]. It may hold
data_format, xla and amp.
"""
import os
import sys

import horovod.tensorflow as hvd
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tensorpack import tfv1 as tf  # noqa: E402

import main_moco  # noqa: E402
import resnet  # noqa: E402
import runs  # noqa: E402
from job import start  # noqa: E402
from moco import MOCOModel  # noqa: E402
from weights import is_model  # noqa: E402

WIDTH = 4


class Model(MOCOModel):
    """Keeps the permuted images."""

    def shuffle(self, images):
        self.shuffled, unshuffle = super().shuffle(images)
        return self.shuffled, unshuffle


def schedule(mlp):
    """Short forms of the published ones; test_equivalence.py has the values."""
    return (main_moco.cosine_schedule(0.1, steps_per_epoch=1, epochs=6) if mlp else
            main_moco.step_schedule(0.1, total_batch=512, steps_per_epoch=1, epochs=10))[0]


def draw_weights(shapes, depth, seed):
    """Values to start from, the same on every rank.

    They keep most inputs of ReLUs away from 0 (large betas) and residual branches weak (small
    gammas), since a rounding error that decides whether a ReLU passes a gradient is not small any
    more.

    Args:
        shapes: dict of name -> list, of all variables of the model.

    Returns:
        dict: name -> array, for all of them but queue_ptr.
    """
    rng = np.random.RandomState(seed)
    last_bn = 'conv3_bn' if depth == 50 else 'conv2_bn'  # of a residual branch
    values = {}
    for name in sorted(set(shapes) - {'queue_ptr'}):
        shape, weak = shapes[name], last_bn in name
        if name == 'queue':
            values[name] = rng.normal(size=shape)
            values[name] /= np.linalg.norm(values[name], axis=1, keepdims=True)
        elif name.endswith('/W'):
            values[name] = rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape)
        elif name.endswith('/gamma'):
            values[name] = rng.uniform(0.7, 1.3, shape) * (0.2 if weak else 0.4)
        elif name.endswith('/beta'):
            values[name] = (rng.uniform(0.8, 1.2, shape) * rng.choice([-1, 1], shape) *
                            (0.5 if weak else 0.7))
        elif name.endswith('/variance/EMA'):
            values[name] = rng.uniform(0.5, 1.5, shape)
        else:
            values[name] = rng.normal(0, 0.3, shape)
    # a key encoder that is somewhat like the query encoder
    for name in values:
        if name.startswith('momentum_encoder/'):
            values[name] = 0.6 * values[name] + 0.4 * values[name[len('momentum_encoder/'):]]
    return values


def take_steps(case, threads, gpus):
    """Results by name: 0/VARIABLE before the first step, i/VARIABLE after the i-th,
    i/logits, i/loss, i/shuffled and i/gradient.VARIABLE in it."""
    n = case['query'].shape[1] // hvd.size()
    mine = slice(n * hvd.rank(), n * (hvd.rank() + 1))
    amp = bool(case.get('amp'))
    net = resnet.ResNet(int(case['depth']), WIDTH, bn_splits=int(case['splits']),
                        data_format=str(case.get('data_format', 'NHWC')))
    model = Model(
        net, n, queue_size=int(case['queue_size']), momentum=float(case['momentum']),
        mlp=bool(case['mlp']), temp=float(case['temperature']),
        weight_decay=float(case['weight_decay']), learning_rate=schedule(case['mlp']),
        image_size=case['query'].shape[2], use_xla=bool(case.get('xla')),
        loss_scale=128 if amp and gpus else 1)
    config = start.session_config(threads, gpus, amp)
    # a graph so small takes longer to optimise than to run; 16 bits are an optimisation
    config.graph_options.rewrite_options.disable_meta_optimizer = not amp
    query_and_key = [tf.placeholder(spec.dtype, spec.shape) for spec in model.inputs()]
    train_op = model.build_graph(*query_and_key)

    graph = tf.get_default_graph()
    cross_entropy, = [op for op in graph.get_operations()
                      if op.type == 'SparseSoftmaxCrossEntropyWithLogits']
    fetches = {'logits': cross_entropy.inputs[0], 'loss': model.monitored['loss'],
               'shuffled': model.shuffled}
    # the gradients that the optimizer is given
    for op in graph.get_operations():
        if op.type == 'ResourceApplyMomentum':
            fetches['gradient.' + op.inputs[0].op.name] = op.inputs[3]

    variables = {v.op.name: v for v in tf.global_variables() if is_model(v.op.name)}
    first = draw_weights({name: v.shape.as_list() for name, v in variables.items()},
                         int(case['depth']), int(case['seed']))
    results = {}
    with tf.Session(config=config) as sess:
        def keep(step, values):
            results.update({'{}/{}'.format(step, name): x for name, x in values.items()})

        sess.run(tf.global_variables_initializer())
        runs.assign(sess, dict(first, queue_ptr=case['queue_ptr']))
        keep(0, sess.run(variables))
        for i, views in enumerate(zip(case['query'], case['key'])):
            fed = {placeholder: images[mine] for placeholder, images in zip(query_and_key, views)}
            keep(i + 1, sess.run([fetches, train_op], fed)[0])
            keep(i + 1, sess.run(variables))
    return results


def main(paths):
    threads, gpus = start.begin()
    for path in paths:
        with tf.Graph().as_default(), np.load(path) as case:
            results = take_steps(dict(case), threads, gpus)
        np.savez('{}.rank{}.npz'.format(path[:-len('.npz')], hvd.rank()), **results)


if __name__ == '__main__':
    main(sys.argv[1:])
