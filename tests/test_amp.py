"""--amp: convolutions in 16 bits, and nothing that should be float32."""
import collections

import numpy as np
import pytest
from tensorpack import tfv1 as tf

import main_moco
import resnet
from job import start
from test_moco import Step


def test_scaling_the_loss_changes_nothing():
    weights = []
    for loss_scale in (1, 128):
        step = Step(loss_scale=loss_scale)
        step.open()
        step.start()
        for i in range(3):
            step.run(step.feed(i))
        weights.append(step.sess.run(step.variables))
        step.sess.close()
    assert set(weights[0]) == set(weights[1])
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('flags, xla', [
    ([], None), (['--xla'], True), (['--amp'], False), (['--amp', '--no-xla'], False)])
def test_nothing_is_compiled_in_16_bits(flags, xla):
    assert main_moco.parse_args(['--fake', *flags]).xla is xla  # None: on a GPU


HAS_BFLOAT16 = pytest.mark.skipif(
    start.mixed_precision_rewrite(gpu=False) is None,
    reason='needs TensorFlow 2.21 and a CPU with avx512_bf16')


@pytest.fixture
def remove_nothing(monkeypatch):
    """session_config() sets these for good."""
    for word in ('ALLOWLIST', 'WHITELIST'):
        monkeypatch.setenv('TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_{}_REMOVE'.format(word), '')


@HAS_BFLOAT16
def test_the_rewrite_does_not_reach_into_what_xla_compiles(remove_nothing):
    # should it ever, --amp could leave XLA on
    images = np.random.RandomState(0).randint(0, 256, [4, 32, 32, 3])
    with tf.Graph().as_default():
        tf.set_random_seed(1)
        x = tf.placeholder(tf.uint8, [4, 32, 32, 3])
        net = resnet.ResNet(18, 8, '3x3s2')
        with tf.variable_scope('', reuse=tf.AUTO_REUSE):
            outputs = [
                resnet.compile_if(use_xla, lambda x: net(x, training=True, trainable=False), x)
                for use_xla in (False, True)]
        init = tf.global_variables_initializer()

        def compute(amp):
            with tf.Session(config=start.session_config(1, amp=amp)) as sess:
                sess.run(init)
                return [sess.run(output, {x: images}) for output in outputs]
        (plain, compiled), (plain_amp, compiled_amp) = compute(False), compute(True)
    assert not np.array_equal(plain_amp, plain)
    np.testing.assert_array_equal(compiled_amp, compiled)


@HAS_BFLOAT16
def test_only_convolutions_are_computed_in_bfloat16(remove_nothing):
    step = Step()
    ran = collections.defaultdict(set)  # operation -> the types it has
    with tf.Session(graph=step.graph, config=start.session_config(1, amp=True)) as sess:
        sess.run(step.init_op)
        metadata = tf.RunMetadata()
        seen, _ = sess.run([step.seen, step.train_op], step.feed(), run_metadata=metadata,
                           options=tf.RunOptions(output_partition_graphs=True))
    for graph in metadata.partition_graphs:
        for node in graph.node:
            for key in ('T', 'U', 'dtype'):
                if node.attr[key].type:
                    ran[node.op, key].add(tf.as_dtype(node.attr[key].type).name)

    def types(part, key='T'):
        return set().union(*(names for (op, k), names in ran.items() if part in op and k == key))
    assert types('Conv2D') == {'bfloat16'}
    assert types('BatchNorm', 'U') == {'float32'}  # statistics
    for part in ('MatMul', 'SoftmaxCrossEntropy', 'L2Loss', 'ApplyMomentum'):
        assert types(part) == {'float32'}, part
    assert types('Einsum') == {'float64'}  # of the logits
    for part in ('ScatterUpdate', 'AssignSub', 'AssignAdd'):  # queue, key encoder, BN statistics
        assert types(part, 'dtype') == {'float32'}, part
    assert types('VarHandleOp', 'dtype') == {'float32', 'int64'}
    assert np.isfinite(seen['cost'])
