"""Who is waited for is named: rounds of several ranks, by hand, in horovodrun's own store."""
import http.client
import socket
import time

import pytest
from horovod.runner.http.http_server import RendezvousServer

from job.heartbeat import REFUSED, Heartbeat

LIMIT, ROUNDS = 100, 20  # seconds; rounds in that time


class Ranks:
    """Ranks, each of which has come to barriers[rank] barriers, and done work[rank] in between."""

    def __init__(self, size):
        self._server = RendezvousServer()
        self.barriers, self.work = [0] * size, [0] * size
        store = '127.0.0.1', self._server.start()
        self._ranks = [
            Heartbeat(rank, size, store, LIMIT,
                      lambda rank=rank: [self.barriers[rank], self.work[rank]], None)
            for rank in range(size)]

    def do_rounds(self, count, living, barriers=0):
        """Rounds of the ranks that live, which come to so many barriers in each.

        Returns:
            dict: rank -> reason to end, of those that have one.
        """
        for _ in range(count):
            for rank in living:
                self.barriers[rank] += barriers
            reasons = {rank: self._ranks[rank].do_round() for rank in living}
        return {rank: reason for rank, reason in reasons.items() if reason}

    def stop_server(self):
        if self._server:
            self._server.stop()
            self._server._httpd.server_close()
        self._server = None


@pytest.fixture
def ranks():
    ranks = Ranks(3)
    yield ranks
    ranks.stop_server()


@pytest.mark.parametrize('barriers', [0, 1, 50])
def test_who_lives_is_not_named(ranks, barriers):
    assert ranks.do_rounds(5 * ROUNDS, [0, 1, 2], barriers) == {}


@pytest.mark.parametrize('lost, finders', [(2, [0, 1]), (1, [0, 2]), (0, [1, 2])])
def test_a_silent_rank_is_named_by_all_others(ranks, lost, finders):
    assert ranks.do_rounds(5, [0, 1, 2]) == {}
    assert ranks.do_rounds(ROUNDS - 1, finders) == {}
    reasons = ranks.do_rounds(5, finders)
    assert set(reasons) == set(finders)
    for reason in reasons.values():
        assert reason.startswith('waited for rank {} (process '.format(lost))
        assert reason.endswith('which has not been heard of for 100 s')


def test_a_rank_that_never_came_is_named(ranks):
    reasons = ranks.do_rounds(ROUNDS + 5, [0, 1])
    assert set(reasons) == {0, 1} and 'waited for rank 2 (process ? on ?)' in reasons[1]


@pytest.mark.parametrize('slow', [0, 1, 2])
def test_a_rank_that_lives_but_does_not_go_on_is_named(ranks, slow):
    assert ranks.do_rounds(5, [0, 1, 2], barriers=1) == {}
    for rank in {0, 1, 2} - {slow}:
        ranks.barriers[rank] += 1
    assert ranks.do_rounds(ROUNDS, [0, 1, 2]) == {}
    reasons = ranks.do_rounds(5, [0, 1, 2])
    assert set(reasons) == {0, 1, 2}
    for reason in reasons.values():
        assert reason.startswith('waited for rank {} (process '.format(slow))
        assert reason.endswith('which lives, but has not got as far as others for 100 s')


@pytest.mark.parametrize('what', ['barriers', 'work'])
def test_a_slow_rank_that_goes_on_is_not_named(ranks, what):
    ranks.barriers[0] = ranks.barriers[1] = 1000
    for _ in range(5 * ROUNDS):
        getattr(ranks, what)[2] += 1
        assert ranks.do_rounds(1, [0, 1, 2]) == {}


def test_a_job_that_was_stopped_as_a_whole_goes_on(ranks, monkeypatch):
    assert ranks.do_rounds(5, [0, 1, 2]) == {}
    for clock in ('time', 'monotonic', 'perf_counter'):
        monkeypatch.setattr(time, clock, lambda now=getattr(time, clock): now() + 1e6)
    assert ranks.do_rounds(5, [0, 1, 2]) == {}


def test_a_launcher_that_does_not_answer_is_named_in_time(ranks, monkeypatch):
    def request(*_, **__):
        raise socket.timeout
    monkeypatch.setattr(http.client.HTTPConnection, 'request', request)
    # a round takes an interval of 5 s and as long again for the answer that does not come
    assert ranks.do_rounds(ROUNDS // 2 - 1, [1]) == {}
    assert 'the rendezvous server cannot be reached' in ranks.do_rounds(1, [1])[1]


def test_a_launcher_that_is_gone_is_named(ranks):
    assert ranks.do_rounds(5, [0, 1, 2]) == {}
    ranks.stop_server()
    assert ranks.do_rounds(REFUSED - 1, [0, 1, 2]) == {}
    reasons = ranks.do_rounds(1, [0, 1, 2])
    assert set(reasons) == {0, 1, 2}
    for reason in reasons.values():
        assert reason.startswith('the rendezvous server cannot be reached at 127.0.0.1:')
