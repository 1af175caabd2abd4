"""Algorithm 1 of Momentum Contrast, v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297).

Shapes: n images of this rank's batch, N of all ranks, S image size, D feature dimension of the
backbone, C of the contrasted features (128), K queue size.
"""
import horovod.tensorflow as hvd
from tensorpack import ModelDesc
from tensorpack import tfv1 as tf

import resnet
from train_step import train_step


class MOCOModel(ModelDesc):
    """MoCo: two encoders, a queue of keys, and the update of all three in one train op.

    Args:
        net: a resnet.ResNet.
        batch_size, image_size, feature_dim: n, S, C.
        queue_size: K, the number of negatives.
        momentum: m, of the key encoder.
        temp: T, the temperature.
        mlp: whether the head has a hidden layer (v2).
        weight_decay: of every trainable variable, BN and biases included.
        learning_rate: a function of the step (int64 tensor) that returns a scalar tensor.
        seed: of the permutations; the same on all ranks.
        use_xla: whether to compile the key encoder, which no gradient goes through.
        loss_scale: see train_step().
    """

    def __init__(self, net, batch_size, feature_dim=128, queue_size=65536, momentum=0.999,
                 temp=0.07, mlp=False, weight_decay=1e-4,
                 learning_rate=lambda step: tf.constant(0.03), image_size=224, seed=0,
                 use_xla=False, loss_scale=1):
        self.net, self.batch_size, self.image_size = net, batch_size, image_size
        self.feature_dim, self.mlp = feature_dim, mlp
        self.K, self.m, self.T = queue_size, momentum, temp
        self.weight_decay, self.learning_rate = weight_decay, learning_rate
        self.seed, self.use_xla, self.loss_scale = seed, use_xla, loss_scale

    def inputs(self):
        shape = [self.batch_size, self.image_size, self.image_size, 3]
        return [tf.TensorSpec(shape, tf.uint8, 'query'), tf.TensorSpec(shape, tf.uint8, 'key')]

    def build_graph(self, query, key):
        """One step of Algorithm 1: two views of n images, uint8 [n, S, S, 3] -> the train op."""
        self.lr = self.learning_rate(tf.train.get_or_create_global_step())
        queue, queue_ptr = self.create_queue()  # [K, C], []
        self.queue = queue

        # queries, f_q(x_q)
        q = self.encode(query, trainable=True)  # [n, C]

        # keys, f_k(x_k), without gradient; images are permuted over all ranks and BN splits, so
        # that BN statistics tell nothing about the pairs
        with tf.variable_scope('momentum_encoder'):
            shuffled, unshuffle = self.shuffle(key)  # [n, S, S, 3]
            k = resnet.compile_if(
                self.use_xla, lambda x: self.encode(x, trainable=False), shuffled)  # [n, C]
            all_keys = unshuffle(tf.stop_gradient(k))  # [N, C]
        k = all_keys[hvd.rank() * self.batch_size:][:self.batch_size]  # [n, C]

        # logits, with the queue as it was before this step; a GPU may multiply float32 in TF32
        negatives = tf.stop_gradient(queue.read_value())  # [K, C]
        q, k, negatives = (tf.cast(x, tf.float64) for x in (q, k, negatives))
        l_pos = tf.einsum('nc,nc->n', q, k)[:, tf.newaxis]  # [n, 1]
        l_neg = tf.einsum('nc,kc->nk', q, negatives)  # [n, K]
        logits = tf.cast(tf.concat([l_pos, l_neg], axis=1) / self.T, tf.float32)  # [n, 1+K]

        # contrastive loss: the positive is class 0
        labels = tf.zeros([self.batch_size], tf.int32)
        loss = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        accuracy = tf.reduce_mean(tf.cast(tf.math.in_top_k(logits, labels, 1), tf.float32))
        # how near the views of an image are, and how far from all others (arXiv 2005.10242):
        # |q - k|^2, and log of the mean of exp(-2 |q - k'|^2); a part of the queue will do
        alignment = tf.reduce_mean(2 - 2 * l_pos)
        uniformity = tf.math.log(tf.reduce_mean(tf.exp(4 * l_neg[:, :4096] - 4)))
        decay = self.weight_decay * tf.reduce_sum(
            [tf.nn.l2_loss(v) for v in tf.trainable_variables()])
        # the queue's size goes along for tools/plot_curves.py, which draws the chance level ln(K+1)
        self.monitored = {'loss': loss, 'accuracy': accuracy, 'learning_rate': self.lr,
                          'alignment': alignment, 'uniformity': uniformity,
                          'queue_size': tf.constant(self.K, tf.float32)}

        # the step, in this order
        return train_step(
            loss + decay, self.optimizer(),  # gradients, then weights
            resnet.update_moving_averages,  # BN statistics, of the query encoder
            self.update_key_encoder,  # k <- m k + (1 - m) q
            lambda: self.push_queue(queue, queue_ptr, all_keys),  # the oldest keys go
            loss_scale=self.loss_scale)

    def encode(self, images, trainable):
        """Backbone, head, and L2 normalisation: uint8 [n, S, S, 3] -> float32 [n, C]."""
        x = self.net(images, training=True, trainable=trainable)  # [n, D]
        hidden = [self.net.feature_dim] if self.mlp else []
        return tf.nn.l2_normalize(resnet.project(x, hidden + [self.feature_dim], trainable), axis=1)

    def optimizer(self):
        return tf.train.MomentumOptimizer(self.lr, 0.9, use_nesterov=True)

    # ---- momentum encoder

    def update_key_encoder(self):
        """k <- m k + (1 - m) q; not the BN statistics, which the key encoder never uses."""
        # written so that fewer arrays of the model's size are made
        return [k.assign_sub((1 - self.m) * (k.read_value() - q.read_value())).op
                for k, q in self.key_and_query_variables() if not k.op.name.endswith('/EMA')]

    def copy_to_key_encoder(self):
        """Ops with which a fresh run begins: k <- q."""
        return [k.assign(q.read_value()).op for k, q in self.key_and_query_variables()]

    def key_and_query_variables(self):
        """Pairs (k, q) of the key encoder's variables and the query encoder's."""
        variables = {v.op.name: v for v in tf.global_variables()}
        prefix = 'momentum_encoder/'
        return [(v, variables[name[len(prefix):]])
                for name, v in variables.items() if name.startswith(prefix)]

    # ---- queue

    def create_queue(self):
        """The queue, [K, C] normalised rows that are random at first, and the row to write next."""
        def random_rows(shape, dtype, partition_info=None):
            return tf.nn.l2_normalize(tf.random.normal(shape, dtype=dtype), axis=1)
        queue = tf.get_variable('queue', [self.K, self.feature_dim], initializer=random_rows,
                                trainable=False, use_resource=True)
        queue_ptr = tf.get_variable('queue_ptr', [], tf.int64, initializer=tf.zeros_initializer(),
                                    trainable=False, use_resource=True)
        return queue, queue_ptr

    def push_queue(self, queue, queue_ptr, keys):
        """Replace the oldest keys by keys [N, C] of all ranks."""
        N = self.batch_size * hvd.size()
        # a queue that was filled by another N may end in the middle of them
        rows = (queue_ptr.read_value() + tf.range(N, dtype=tf.int64)) % self.K  # [N]
        with tf.control_dependencies([tf.scatter_update(queue, rows, keys)]):
            return [queue_ptr.assign((rows[-1] + 1) % self.K).op]

    # ---- shuffled BN

    def shuffle(self, images):
        """Permute all ranks' images over all ranks: images [n, ...] -> this rank's part of the
        permuted ones [n, ...], and a function of this rank's part of the results [n, C] that
        returns those of all ranks [N, C] in the original order."""
        N = self.batch_size * hvd.size()
        # on the host, since a GPU does not gather uint8; meanwhile it computes the queries
        with tf.device('/cpu:0'):
            # every rank computes the same permutation, and a resumed run repeats it
            step = tf.cast(tf.train.get_or_create_global_step(), tf.int32)
            order = tf.argsort(
                tf.random.stateless_uniform([N], seed=[self.seed, step]), stable=True)  # [N]
            inverse = tf.math.invert_permutation(order)
            shuffled = exchange(images, order, inverse)
        return shuffled, lambda results: tf.gather(allgather(results), inverse)


def exchange(x, order, inverse):
    """Permute the rows of all ranks, each rank receiving only the rows that it keeps: this rank's
    rows [n, ...] -> the rows for its places [n, ...]. The row for each place is `order` [N], the
    place of each row `inverse` [N], the same on all ranks."""
    if hvd.size() == 1:
        return tf.gather(x, order)
    n, first = int(x.shape[0]), int(x.shape[0]) * hvd.rank()
    ranks = inverse[first:first + n] // n  # [n], where this rank's rows go
    sent = tf.argsort(ranks, stable=True)  # [n]
    counts = tf.math.bincount(ranks, minlength=hvd.size())  # [ranks]
    # they arrive rank after rank, each rank's in their order: sorted
    arrived = tf.math.invert_permutation(tf.argsort(order[first:first + n]))  # [n]
    received, _ = hvd.alltoall(tf.stop_gradient(tf.gather(x, sent)), splits=counts)  # [n, ...]
    return tf.gather(received, arrived)


def allgather(x):
    """[n, ...] of every rank -> [N, ...]. No gradient may go through it, or through exchange(): the
    collective would wait for ever."""
    return hvd.allgather(tf.stop_gradient(x)) if hvd.size() > 1 else x
