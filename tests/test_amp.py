"""--amp: convolutions in 16 bits, and nothing that should be float32."""
import collections

import numpy as np
import pytest
from tensorpack import tfv1 as tf

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


@pytest.mark.skipif(start.mixed_precision_rewrite(gpu=False) is None,
                    reason='needs TensorFlow 2.15 and a CPU with avx512_bf16')
def test_only_convolutions_are_computed_in_bfloat16(monkeypatch):
    for word in ('ALLOWLIST', 'WHITELIST'):  # which session_config() sets for good
        monkeypatch.setenv('TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_{}_REMOVE'.format(word), '')
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
    for part in ('MatMul', 'Einsum', 'SoftmaxCrossEntropy', 'L2Loss', 'ApplyMomentum'):
        assert types(part) == {'float32'}, part
    for part in ('ScatterUpdate', 'AssignSub', 'AssignAdd'):  # queue, key encoder, BN statistics
        assert types(part, 'dtype') == {'float32'}, part
    assert types('VarHandleOp', 'dtype') == {'float32', 'int64'}
    assert np.isfinite(seen['cost'])
