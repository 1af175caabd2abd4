"""job/start.py: what a session computes on."""
import horovod.tensorflow as hvd
import pytest

from job import start


@pytest.mark.parametrize('gpus, devices', [
    (4, '0123'),
    (1, '0000'),  # each sees its own one, or all share one
    (2, '0101')])
def test_local_ranks_take_the_gpus_that_they_see(monkeypatch, gpus, devices):
    for rank, device in enumerate(devices):
        monkeypatch.setattr(hvd, 'local_rank', lambda: rank)
        config = start.session_config(1, gpus)
        assert config.gpu_options.visible_device_list == device
        assert 'GPU' not in config.device_count


def test_staging_which_waits_is_not_alone_in_its_thread(monkeypatch):
    monkeypatch.setattr(hvd, 'local_rank', lambda: 0)
    config = start.session_config(threads=1, gpus=1)
    assert config.inter_op_parallelism_threads == 2 and config.use_per_session_threads


def test_without_gpus_none_is_used():
    config = start.session_config(1, 0)
    assert config.device_count['GPU'] == 0 and not config.gpu_options.visible_device_list
