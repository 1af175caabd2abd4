"""Whether the contrasted features still tell images apart, without labels."""
import numpy as np
from tensorpack.callbacks import Callback
from tensorpack.utils import logger

COLLAPSED = 2  # below this effective rank, features lie on little more than one line


def effective_rank(rows: np.ndarray) -> float:
    """How many directions rows [N, C] use: exp of the entropy of their singular values' shares,
    1 to C (Roy and Vetterli 2007; RankMe, arXiv 2210.02885)."""
    rows = rows.astype(np.float64)
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(rows.T @ rows), 0))  # [C], singular values
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


class WatchRank(Callback):
    """Logs the effective rank of the keys in the queue after every epoch (rank 0), and warns when
    it says that all features are alike."""

    def __init__(self, queue):
        self._queue = queue  # variable [K, C]

    def _trigger_epoch(self):
        rank = effective_rank(self.trainer.sess.run(self._queue))
        self.trainer.monitors.put_scalar('queue_rank', rank)
        if rank < COLLAPSED:
            logger.warn(f'the features have collapsed: the keys in the queue use {rank:.2f} of '
                        f'{int(self._queue.shape[1])} directions; nothing more is learned')
