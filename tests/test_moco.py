"""moco.py, train_step.py and main_moco.py: one step of MoCo against NumPy, the order of everything
in it, schedules, sizes and recipes."""
import functools
import types

import horovod.tensorflow as hvd
import numpy as np
import pytest
from tensorpack import tfv1 as tf

import inputs
import main_lincls
import main_moco
import moco
import network
import resnet
import runs
from test_resnet import is_compiled
from weights import is_model

N, SIZE, DIM, K = 8, 16, 16, 24  # the queue is three batches long: pushes wrap
M, T, LR, DECAY = 0.9, 0.2, 0.1, 1e-3


class RecordedModel(moco.MOCOModel):
    """Keeps the tensors of its graph that a test looks at."""

    def build_graph(self, query, key):
        self.encoded = []
        train_step = moco.train_step

        def record(cost, *args, **kwargs):
            self.cost = cost
            return train_step(cost, *args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moco, 'train_step', record)
            return super().build_graph(query, key)

    def encode(self, images, trainable):
        self.encoded.append(super().encode(images, trainable))  # query, then key, still permuted
        return self.encoded[-1]

    def shuffle(self, images):
        self.shuffled, unshuffle = super().shuffle(images)

        def record(results):
            self.keys = unshuffle(results)
            return self.keys
        return self.shuffled, record


class Step:
    """A graph with one train op, as main_moco.py has it, in one process."""

    def __init__(self, seed=3, splits=2, loss_scale=1):
        hvd.init()
        with tf.Graph().as_default() as self.graph:
            tf.set_random_seed(1)
            self.net = resnet.ResNet(18, 8, '3x3s2', bn_splits=splits)
            self.model = model = RecordedModel(
                self.net, N, feature_dim=DIM, queue_size=K, momentum=M, temp=T, weight_decay=DECAY,
                learning_rate=lambda step: tf.constant(LR), image_size=SIZE, seed=seed,
                loss_scale=loss_scale)
            self.query, self.key = (
                tf.placeholder(spec.dtype, spec.shape, spec.name) for spec in model.inputs())
            self.train_op = model.build_graph(self.query, self.key)
            self.op_types = {op.type for op in self.graph.get_operations()}
            self.count_op, = [op for op in ancestors(self.train_op)
                              if op.type.startswith('Assign') and
                              op.inputs[0].op.name == 'global_step']
            assert self.count_op.type.startswith('AssignAdd')
            self.variables = {v.op.name: v for v in tf.global_variables()}
            self.trainable = {v.op.name: v for v in tf.trainable_variables()}
            self.gradients = dict(zip(
                self.trainable, tf.gradients(model.cost, list(self.trainable.values()))))
            self.copy_ops = model.copy_to_key_encoder()
            self.init_op = tf.global_variables_initializer()
            self.logits, = [op.inputs[0] for op in self.graph.get_operations()
                            if op.type == 'SparseSoftmaxCrossEntropyWithLogits']
            self.key_of_part = self._encode_part()
            self.seen = {
                'q': model.encoded[0], 'permuted_k': model.encoded[1], 'k': model.keys,
                'shuffled': model.shuffled, 'logits': self.logits, 'loss': model.monitored['loss'],
                'cost': model.cost, 'accuracy': model.monitored['accuracy'],
                # q, not yet normalised
                'u': self.graph.get_operation_by_name('l2_normalize/Square').inputs[0]}

    def _encode_part(self):
        """The key encoder over one BN split alone."""
        self.part = tf.placeholder(tf.uint8, [None, SIZE, SIZE, 3])
        alone = moco.MOCOModel(resnet.ResNet(18, 8, '3x3s2'), N // 2, feature_dim=DIM)
        with tf.variable_scope('momentum_encoder', reuse=True):
            return alone.encode(self.part, trainable=False)

    def open(self):
        # graphs so small take longer to optimise than to run
        config = tf.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        self.sess = tf.Session(graph=self.graph, config=config)
        self.sess.run(self.init_op)
        # no variable has its initial value
        rng = np.random.RandomState(0)
        self.first = self.sess.run(self.variables)
        for name, value in self.first.items():
            if name not in ('queue', 'queue_ptr', 'global_step'):
                self.first[name] = value + rng.uniform(0.01, 0.1, value.shape)

    def start(self):
        """The session, all variables as they were at first."""
        runs.assign(self.sess, self.first)
        return self.sess

    def feed(self, seed=0):
        query, key = np.random.RandomState(seed).randint(0, 256, [2, N, SIZE, SIZE, 3])
        return {self.query: query, self.key: key}

    def run(self, feed):
        """One step: the values in it, by name.

        TensorFlow prepares every set of fetches anew: so fetch all, always.
        """
        return types.SimpleNamespace(
            **self.sess.run([self.seen, self.train_op], feed)[0])

    def differentiate(self, feed):
        """The same values, and the gradients by variable, without a step."""
        values, gradients = self.sess.run([self.seen, self.gradients], feed)
        return types.SimpleNamespace(**values), gradients


@pytest.fixture(scope='module')
def step():
    step = Step()
    step.open()
    yield step
    step.sess.close()


def softmax_loss(logits):
    """Mean over rows of -log softmax of column 0."""
    return np.mean(np.log(np.exp(logits - logits[:, :1]).sum(axis=1)))


# ---- algorithm 1

def test_loss_is_of_the_queue_before_the_step(step):
    sess = step.start()
    for i in range(4):
        queue = sess.run(step.variables)['queue'].astype(np.float64)
        seen = step.run(step.feed(i))
        np.testing.assert_allclose(
            [np.linalg.norm(x, axis=1) for x in (seen.q, seen.k)], 1, rtol=1e-5)
        positive = np.sum(seen.q * seen.k, axis=1, keepdims=True) / T
        logits = np.concatenate([positive, seen.q @ queue.T / T], axis=1)
        np.testing.assert_allclose(seen.logits, logits, atol=1e-5)
        np.testing.assert_allclose(seen.loss, softmax_loss(logits), rtol=1e-5)
        assert seen.accuracy == np.mean(logits.argmax(axis=1) == 0)
        # with the queue after it, it would be another
        after = sess.run(step.variables)['queue']
        assert abs(softmax_loss(
            np.concatenate([positive, seen.q @ after.T / T], axis=1)) - seen.loss) > 1e-3


def test_gradient_is_of_the_old_weights_and_queue(step):
    sess = step.start()
    for i in range(3):
        before = sess.run(step.variables)
        _, gradients = step.differentiate(step.feed(i))
        step.run(step.feed(i))
        after = sess.run(step.variables)
        for name, gradient in gradients.items():
            # Nesterov momentum
            slot = 0.9 * before[name + '/Momentum'] + gradient
            np.testing.assert_allclose(
                after[name + '/Momentum'], slot, rtol=1e-3, atol=1e-4, err_msg=name)
            np.testing.assert_allclose(
                after[name], before[name] - LR * (gradient + 0.9 * slot), rtol=1e-3, atol=1e-5,
                err_msg=name)


def test_gradient_of_the_loss_by_numpy(step):
    # of the head's bias, through the normalisation q = u / |u|
    variables = step.start().run(step.variables)
    seen, gradients = step.differentiate(step.feed())
    p = np.exp(seen.logits) / np.exp(seen.logits).sum(axis=1, keepdims=True)
    dq = ((p[:, :1] - 1) * seen.k + p[:, 1:] @ variables['queue']) / T / N
    du = ((dq - seen.q * np.sum(seen.q * dq, axis=1, keepdims=True)) /
          np.linalg.norm(seen.u, axis=1, keepdims=True))
    expected = du.sum(axis=0) + DECAY * variables['linear0_16/b']
    np.testing.assert_allclose(gradients['linear0_16/b'], expected, rtol=1e-3, atol=1e-6)


def test_logits_are_multiplied_in_float64(step):
    # a GPU may multiply float32 with 10 bits of mantissa (TF32)
    encoders = ancestors(step.seen['q'].op) | ancestors(step.seen['k'].op)
    products = [op for op in ancestors(step.logits.op) - encoders
                if op.type == 'Einsum' or 'MatMul' in op.type]
    assert products and step.logits.dtype == tf.float32
    assert {tensor.dtype for op in products for tensor in op.inputs} == {tf.float64}


def test_one_train_op_updates_everything_in_order(step):
    sess = step.start()
    for i in range(4):
        old = sess.run(step.variables)
        keys = step.run(step.feed(i)).k
        new = sess.run(step.variables)
        assert new['global_step'] == old['global_step'] + 1 == i + 1

        # the queue, a third of it a step
        rows = np.arange(8 * i, 8 * i + 8) % K
        np.testing.assert_array_equal(new['queue'][rows], keys)
        others = np.setdiff1d(np.arange(K), rows)
        np.testing.assert_array_equal(new['queue'][others], old['queue'][others])
        assert new['queue_ptr'] == 8 * (i + 1) % K

        # the key encoder follows the new weights
        for name in step.trainable:
            key_name = 'momentum_encoder/' + name
            assert not np.array_equal(new[name], old[name])
            expected = M * old[key_name].astype(np.float64) + (1 - M) * new[name]
            np.testing.assert_allclose(new[key_name], expected, rtol=1e-5, atol=1e-7)
        for name in new:
            if name.endswith('/EMA'):
                # BN statistics move in the query encoder only
                assert np.array_equal(new[name], old[name]) == name.startswith('momentum_encoder/')
            assert np.isfinite(new[name]).all()


# ---- the same, from the graph: what a lucky order of execution would hide

@functools.lru_cache(maxsize=None)
def ancestors(op):
    """All ops that have run when op runs."""
    seen, todo = set(), [op]
    while todo:
        op = todo.pop()
        if op not in seen:
            seen.add(op)
            todo += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    return seen


def users(variable, type_prefix):
    return [op for op in variable.handle.consumers() if op.type.startswith(type_prefix)]


@pytest.fixture(scope='module')
def order(step):
    """Of the ops of a step: all, weights' updates, those of BN statistics and of the key encoder,
    the push, the pointer."""
    in_step = ancestors(step.train_op)
    weights = [op for op in in_step if op.type == 'ResourceApplyMomentum']
    statistics = [op for name, v in step.variables.items() if name.endswith('/EMA')
                  for op in users(v, 'Assign') if op in in_step]
    keys = [op for v in step.variables.values() if v.op.name.startswith('momentum_encoder/') and not
            v.op.name.endswith('/EMA') for op in users(v, 'Assign') if op in in_step]
    push, = [op for op in users(step.variables['queue'], 'ResourceScatterUpdate')]
    pointer, = [op for op in users(step.variables['queue_ptr'], 'Assign') if op in in_step]
    assert len(weights) == len(keys) == len(step.trainable)
    assert {op.inputs[0].op.name for op in statistics} == {
        name for name in step.variables
        if name.endswith('/EMA') and not name.startswith('momentum_encoder/')}
    return types.SimpleNamespace(
        step=in_step, weights=weights, statistics=statistics, keys=keys, push=push,
        pointer=pointer)


def test_the_queue_is_read_before_it_is_written(step, order):
    reads = [op for op in step.variables['queue'].handle.consumers()
             if op in order.step and op is not order.push]
    assert reads and set(reads) <= ancestors(order.push)
    reads = [op for op in users(step.variables['queue_ptr'], 'ReadVariable') if op in order.step]
    assert reads and set(reads) <= ancestors(order.pointer)
    # and the gradients have been taken by then
    assert set(order.weights) <= ancestors(order.push)


def test_weights_come_before_the_key_encoder(step, order):
    for key in order.keys:
        assert set(order.weights) <= ancestors(key)
    # what it follows is read after all weights are new
    names = [key.inputs[0].op.name[len('momentum_encoder/'):] for key in order.keys]
    for key, name in zip(order.keys, names):
        read = [op for op in users(step.variables[name], 'ReadVariable') if op in ancestors(key)
                and set(order.weights) <= ancestors(op)]
        assert len(read) == 1


def test_forward_passes_come_before_the_updates(step, order):
    for name, v in step.variables.items():
        if (name in step.trainable or
                name.startswith('momentum_encoder/') and not name.endswith('/EMA')):
            writes = [op for op in v.handle.consumers() if op in order.step and
                      op.type.startswith(('Assign', 'ResourceApply'))]
            assert len(writes) == 1
            reads = [op for op in users(v, 'ReadVariable') if op in order.step]
            early = [op for op in reads if op in ancestors(writes[0])]
            late = [op for op in reads if writes[0] in ancestors(op)]
            # the key encoder's next value is all that is made of new weights
            assert (early and len(early) + len(late) == len(reads) and
                    len(late) == (name in step.trainable))


def test_forward_passes_read_everything_as_it_was(step, order):
    # both encoders' weights and the queue, before the first of all updates
    loss = ancestors(step.model.monitored['loss'].op)
    reads = {name: [op for op in users(v, 'ReadVariable') if op in loss]
             for name, v in step.variables.items() if name != 'global_step'}
    assert {name for name in reads if reads[name]} == set(step.trainable) | {
        'momentum_encoder/' + name for name in step.trainable} | {'queue'}
    for update in order.weights + order.statistics + order.keys + [order.push, order.pointer]:
        assert set().union(*reads.values()) <= ancestors(update)


def test_updates_follow_one_another(step, order):
    # weights, BN statistics, key encoder, queue
    assert len(order.statistics) == 2 * 20
    for op in order.statistics:
        assert op.type == 'AssignAddVariableOp' and set(order.weights) <= ancestors(op)
    for op in order.keys:
        assert set(order.statistics) <= ancestors(op)
    for op in (order.push, order.pointer):
        assert set(order.statistics) | set(order.keys) <= ancestors(op)


def test_the_counter_goes_up_last(step, order):
    # so all that reads it, the permutation and the schedule,
    # reads the number of steps that have been done
    assert ({order.push, order.pointer} | set(order.weights) | set(order.keys) |
            set(order.statistics) <= ancestors(step.count_op))
    # what reads it may have no copy of it
    readers = {op for op in order.step - {step.count_op} for tensor in op.inputs
               if tensor.op.name in ('global_step', 'global_step/read')}
    assert len(readers) >= 2 and readers <= ancestors(step.count_op)


# ---- shuffled BN

def test_images_stay_on_the_host_until_they_are_permuted(monkeypatch):
    # of one of two ranks, as on a GPU
    hvd.init()
    monkeypatch.setattr(hvd, 'size', lambda: 2)
    with tf.Graph().as_default() as graph:
        model = RecordedModel(resnet.ResNet(18, 8, '3x3s2'), N, feature_dim=DIM, queue_size=2 * N,
                              image_size=SIZE)
        source, _ = inputs.create_source(model.get_input_signature(), None, gpus=1)
        source.setup(model.get_input_signature())
        model.build_graph(*source.get_input_tensors())
    images = [op for op in graph.get_operations() if any(
        x.dtype.base_dtype == tf.uint8 for x in [*op.inputs, *op.outputs])]
    encoding = [op for op in images if op.outputs and op.outputs[0].dtype == tf.float32]
    assert [op.type for op in encoding] == ['Cast', 'Cast']
    assert {op.device for op in encoding} == {''}  # on the GPU
    assert {op.device for op in set(images) - set(encoding)} == {'/device:CPU:0'}
    types = {op.type for op in images}
    assert {'ReadVariableOp', 'Stage', 'Unstage', 'GatherV2', 'HorovodAlltoall'} <= types
    # the permutation too; but not features
    order = {op for op in ancestors(model.shuffled.op) if 'global_step' not in op.name}
    assert {op.device for op in order if op.inputs} == {'/device:CPU:0'}
    assert all(op.device == '' for op in (model.keys.op, model.keys.op.inputs[0].op))
    assert model.keys.op.inputs[0].op.type == 'HorovodAllgather'


def test_unshuffling_is_the_inverse_of_shuffling():
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        model = moco.MOCOModel(None, 8, seed=5)
        images = tf.reshape(tf.range(8 * 2 * 2 * 3), [8, 2, 2, 3])
        shuffled, unshuffle = model.shuffle(images)
        back = unshuffle(shuffled)
        assert not any(op.type.startswith('Horovod') for op in back.graph.get_operations())
        moved = []
        with tf.Session() as sess:
            for i in range(20):
                global_step.load(i, sess)
                a, b, c = sess.run([images, shuffled, back])
                np.testing.assert_array_equal(c, a)
                moved.append(tuple(b[:, 0, 0, 0] // 12))
                np.testing.assert_array_equal(b, a[list(moved[-1])])
    assert all(sorted(order) == list(range(8)) for order in moved) and len(set(moved)) == 20


def permutations(seed, steps):
    with tf.Graph().as_default():
        global_step = tf.train.get_or_create_global_step()
        shuffled, _ = moco.MOCOModel(None, 8, seed=seed).shuffle(tf.range(8))
        tf.random.normal([])  # another op, hence other default seeds
        with tf.Session() as sess:
            for i in steps:
                global_step.load(i, sess)
                yield tuple(sess.run(shuffled))


def test_permutations_depend_on_seed_and_step_only():
    first = list(permutations(5, range(6)))
    assert list(permutations(5, [4, 2, 2])) == [first[4], first[2], first[2]]
    assert not set(permutations(6, range(6))) & set(first)


def test_bn_splits_cut_the_permuted_batch(step):
    mixed = 0
    sess = step.start()
    for i in range(6):
        feed = step.feed(i)
        before = sess.run(step.variables)
        seen = step.run(feed)
        order = [np.flatnonzero((feed[step.key] == image).all(axis=(1, 2, 3))).item()
                 for image in seen.shuffled]
        assert sorted(order) == list(range(N))
        runs.assign(sess, before)
        # each half of the permuted batch is normalised on its own,
        # and its keys go back to their images
        for half in (slice(0, N // 2), slice(N // 2, N)):
            alone = sess.run(step.key_of_part, {step.part: seen.shuffled[half]})
            np.testing.assert_allclose(seen.permuted_k[half], alone, atol=1e-4)
            np.testing.assert_allclose(seen.k[order[half]], alone, atol=1e-4)
        mixed += 0 < sum(image < N // 2 for image in order[:N // 2]) < N // 2
        step.run(feed)
    # queries share their statistics with other images than their keys do
    assert mixed >= 5


# ---- start

def test_a_fresh_run_starts_with_two_equal_encoders(step):
    sess = step.start()
    sess.run(step.copy_ops)
    values = sess.run(step.variables)
    pairs = [(name, name[len('momentum_encoder/'):])
             for name in values if name.startswith('momentum_encoder/')]
    assert len(pairs) == 20 * 5 + 2
    for key_name, name in pairs:
        np.testing.assert_array_equal(values[key_name], values[name])


def test_nothing_is_summed_by_an_op_that_loses_memory(step):
    # see train_step.gradients_summed_in_pairs(); the graph sums all the same
    assert 'AddN' not in step.op_types and step.op_types & {'Add', 'AddV2'}


def test_weight_decay_reaches_every_trainable_variable(step):
    query_encoder = {name for name in step.variables if is_model(name) and not
                     name.startswith(('momentum_encoder/', 'queue')) and not name.endswith('/EMA')}
    assert set(step.trainable) == query_encoder
    step.start()
    seen = step.run(step.feed())
    expected = DECAY * sum(
        np.sum(step.first[name].astype(np.float64) ** 2) / 2 for name in query_encoder)
    assert expected > 0.1
    np.testing.assert_allclose(seen.cost - seen.loss, expected, rtol=1e-4)


def test_xla_gives_the_same_keys():
    with tf.Graph().as_default():
        tf.set_random_seed(1)
        keys = []
        for use_xla in (False, True):
            model = RecordedModel(
                resnet.ResNet(18, 4, '3x3s2', bn_splits=2), N, feature_dim=DIM, queue_size=K,
                image_size=32, use_xla=use_xla)
            images = [
                tf.constant(np.random.RandomState(i).randint(0, 256, [N, 32, 32, 3]), tf.uint8)
                for i in range(2)]
            with tf.variable_scope('', reuse=tf.AUTO_REUSE):
                model.build_graph(*images)
            keys.append(model.keys)
            assert is_compiled(model.keys) == use_xla
        with tf.Session() as sess:
            sess.run(tf.global_variables_initializer())
            plain, compiled = sess.run(keys)
    assert plain.std() > 0.01
    np.testing.assert_allclose(compiled, plain, atol=1e-3)


def test_a_push_wraps_where_another_batch_left_the_pointer():
    # the queue was filled by batches of 4, and is continued by batches of 8
    with tf.Graph().as_default(), tf.Session() as sess:
        model = moco.MOCOModel(None, N, feature_dim=DIM, queue_size=K)
        queue, pointer = model.create_queue()
        keys = np.random.RandomState(0).normal(size=[N, DIM]).astype(np.float32)
        push = model.push_queue(queue, pointer, tf.constant(keys))
        sess.run(tf.global_variables_initializer())
        sess.run(pointer.assign(K - 4))
        expected = sess.run(queue)
        sess.run(push)
        expected[K - 4:], expected[:4] = keys[:4], keys[4:]
        np.testing.assert_array_equal(sess.run(queue), expected)
        assert sess.run(pointer) == 4


# ---- schedules

def evaluate(schedule, steps):
    with tf.Graph().as_default(), tf.Session() as sess:
        step = tf.placeholder(tf.int64, [])
        rate = schedule(step)
        return [float(sess.run(rate, {step: i})) for i in steps]


# a run of 200 epochs of 10 steps
@pytest.mark.parametrize('batch, epochs, table', [
    (256, 200, {0: .03, 49: .03, 1199: .03, 1200: .003, 1599: .003, 1600: .0003, 1999: .0003}),
    (128, 200, {0: .015, 49: .015, 1199: .015, 1200: .0015, 1600: .00015}),
    # warms up from 0.03 to 0.06 in 50 steps
    (512, 200, {0: .03, 1: .0306, 25: .045, 49: .0594, 50: .06, 1199: .06, 1200: .006, 1599: .006,
                1600: .0006}),
    # from 0.03 to 0.12
    (1024, 200, {0: .03, 1: .0318, 25: .075, 49: .1182, 50: .12, 1199: .12, 1200: .012, 1599: .012,
                 1600: .0012, 1999: .0012}),
    # milestones at 60 and 80 % of 25 steps
    (256, 2.5, {0: .03, 14: .03, 15: .003, 19: .003, 20: .0003, 24: .0003}),
    (512, 2.5, {0: .03, 14: .0384, 15: .006, 20: .0006})])
def test_step_schedule(batch, epochs, table):
    schedule, peak = main_moco.step_schedule(0.03, batch, 10, epochs)
    assert peak == 0.03 * batch / 256
    np.testing.assert_allclose(evaluate(schedule, table), list(table.values()), rtol=1e-5)


@pytest.mark.parametrize('epochs, table', [
    # cos(pi/3) = 1/2, cos(pi/2) = 0, cos(2 pi/3) = -1/2
    (300, {0: .03, 1: .03, 1000: .0225, 1500: .015, 2000: .0075, 3000: 0, 3001: 0}),
    (3, {0: .03, 10: .0225, 15: .015, 20: .0075, 30: 0})])
def test_cosine_schedule(epochs, table):
    schedule, peak = main_moco.cosine_schedule(0.03, 10, epochs)
    assert peak == 0.03
    np.testing.assert_allclose(
        evaluate(schedule, table), list(table.values()), rtol=1e-4, atol=1e-9)


def test_linear_schedule():
    schedule = main_lincls.step_schedule(30., 512, 10, 100)
    table = {0: 60, 599: 60, 600: 6, 699: 6, 700: .6, 799: .6, 800: .06, 899: .06,
             900: .006, 999: .006}
    np.testing.assert_allclose(evaluate(schedule, table), list(table.values()), rtol=1e-5)


# ---- the command line

def test_defaults_are_the_published_recipe():
    args = main_moco.parse_args(['--fake'])
    assert network.settle(args, None) == network.PUBLISHED
    assert (args.depth, args.width, args.stem, args.image_size) == (50, 64, 'imagenet', 224)
    assert (args.batch, args.epochs, args.lr, args.weight_decay) == (256, 200, 0.03, 1e-4)
    assert (args.queue_size, args.momentum, args.bn_splits, args.crop_area) == (
        65536, 0.999, 1, [0.2, 1])
    args = main_lincls.parse_args(['--load', 'x', '--data', 'y'])
    assert (args.batch, args.epochs, args.lr, args.weight_decay, args.crop_area) == (
        256, 100, 30, 0, [0.08, 1])


SWITCHES = ['--mlp', '--aug-plus', '--cos']


@pytest.mark.parametrize('flags, mlp, aug_plus, cos, temp, name', [
    ([], False, False, False, 0.07, 'moco_v1'),
    (['--temp', '0.1'], False, False, False, 0.1, 'moco_v1'),
    (['--mlp'], True, False, False, 0.07, 'moco_v1-mlp'),
    (['--aug-plus'], False, True, False, 0.07, 'moco_v1-aug-plus'),
    (['--cos'], False, False, True, 0.07, 'moco_v1-cos'),
    (['--mlp', '--aug-plus'], True, True, False, 0.07, 'moco_v1-mlp-aug-plus'),
    (['--mlp', '--cos'], True, False, True, 0.07, 'moco_v1-mlp-cos'),
    (['--cos', '--aug-plus'], False, True, True, 0.07, 'moco_v1-aug-plus-cos'),
    (SWITCHES, True, True, True, 0.07, 'moco_v1-mlp-aug-plus-cos'),
    (['--v2'], True, True, True, 0.2, 'moco_v2'),
    (['--v2', '--mlp'], True, True, True, 0.2, 'moco_v2'),
    (['--v2', '--temp', '0.1'], True, True, True, 0.1, 'moco_v2')])
def test_switches_of_the_recipe(flags, mlp, aug_plus, cos, temp, name):
    args = main_moco.parse_args(['--fake'] + flags)
    assert (args.mlp, args.aug_plus, args.cos, args.temp) == (mlp, aug_plus, cos, temp)
    assert main_moco.name_recipe(args) == name
    # they decide nothing else
    other = dict(vars(main_moco.parse_args(['--fake'])), v2='--v2' in flags, mlp=mlp,
                 aug_plus=aug_plus, cos=cos, temp=temp)
    assert vars(args) == other


def test_v2_is_all_switches_and_its_temperature():
    v2, switches = (vars(main_moco.parse_args(['--fake'] + flags))
                    for flags in (['--v2'], SWITCHES + ['--temp', '0.2']))
    assert dict(v2, v2=False) == switches


def test_sizes_that_divide():
    assert main_moco.check_sizes(256, 8, 1, 65536) == 32
    assert main_moco.check_sizes(256, 1, 8, 65536) == 256


@pytest.mark.parametrize('sizes, words', [
    ((256, 7, 1, 65536), ['--batch 256', '7 ranks', '252 or 259']),
    ((5, 8, 1, 65536), ['--batch 5', '8 ranks', 'take 8']),
    ((24, 2, 5, 96), ['--bn-splits 5', '12 images', '1, 2, 3, 4, 6, 12']),
    ((48, 1, 4, 1000), ['--queue-size 1000', '--batch 48', '960 or 1008']),
    ((256, 1, 4, 100), ['--queue-size 100', '--batch 256', 'take 256'])])
def test_sizes_that_do_not_divide(sizes, words):
    with pytest.raises(ValueError) as error:
        main_moco.check_sizes(*sizes)
    for word in words:
        assert word in str(error.value)
