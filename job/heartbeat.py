"""Heartbeat: which rank keeps the others waiting?

A rank that stops, or whose host is lost, leaves the others in a collective that neither ends soon
nor names the missing rank. So a thread of each rank writes [beat, progress, process id, host] into
the key-value store of the rendezvous, which horovodrun keeps, or rank 0. Rank 0 reads all entries
and writes a verdict when a rank is silent, or behind, for too long; the others read the verdict,
and rank 0's beat. A rank is behind if it does no work and has come to fewer barriers than another:
all come to the same ones (training steps, and every other collective) in the same order. Time is
counted in rounds of the reader's own thread, so that a job stopped as a whole (a laptop sleeps) can
go on.
"""
import http.client
import os
import socket
import threading
import time

from job import store

REFUSED = 3  # rounds with a refused connection until the store counts as gone
SCOPE = '/moco/'  # of the keys: a rank's number, and "verdict"
_progress = [0, 0]  # of this process: barriers that it has come to, and pieces of work in between


def reach_barrier() -> None:
    """To be called before this rank waits for all others."""
    _progress[0] += 1


def finish_work() -> None:
    """To be called after each piece of much work between two barriers."""
    _progress[1] += 1


def progress():
    return list(_progress)


class Heartbeat:
    """One rank's part: `server` is the (host, port) of the key-value store, `limit` the seconds
    that a rank may be silent, or behind, `progress` returns this rank's [barriers, pieces of work],
    and `end` is called with the reason to end."""

    def __init__(self, rank, size, server, limit, progress, end):
        self._rank, self._size, self._store, self._limit = rank, size, server, limit
        self._progress, self._end = progress, end
        self._interval = min(5., limit / 20)  # seconds between two rounds
        self._rounds = int(limit / self._interval)
        self._timeout = max(2., self._interval)  # of a request, in seconds
        self._beats = {}  # rank: its newest entry, [beat, progress, process id, host]
        self._before = {}  # rank: its progress a round ago
        self._silent, self._behind = {}, {}  # rank: for how many rounds
        self._beat = self._unreachable = 0

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        reason = None
        while reason is None:
            time.sleep(self._interval)
            reason = self.do_round()
        if self._rank == 0:
            time.sleep(3 * self._interval)  # the others read it before horovodrun ends them
        self._end(reason)

    def do_round(self):
        """Write this rank's entry and read those of others; returns the reason to end, or None."""
        self._beat += 1
        mine = [self._beat, self._progress(), os.getpid(), socket.gethostname()]
        self._beats[self._rank] = mine
        try:
            self._request('PUT', self._rank, mine)
            reason = self._find_fault() if self._rank == 0 else self._read_verdict()
            self._unreachable = 0
            return reason
        except ConnectionRefusedError:
            self._unreachable += self._rounds / REFUSED
        except socket.timeout:
            self._unreachable += 1 + self._timeout / self._interval
        except (OSError, http.client.HTTPException, ValueError):
            self._unreachable += 1
        if self._unreachable >= self._rounds:
            return ('the rendezvous server cannot be reached at {}:{}: what started the job, or '
                    'its host, is gone'.format(*self._store))

    def _request(self, method, key, value=None):
        return store.request(self._store, method, SCOPE + str(key), value, self._timeout)

    def _listen_to(self, rank):
        beat = self._request('GET', rank)
        self._silent[rank] = self._silent.get(rank, 0) + 1 if beat == self._beats.get(rank) else 0
        self._beats[rank] = beat

    def _find_fault(self):
        """Rank 0's part: the verdict, or None."""
        for rank in range(1, self._size):
            self._listen_to(rank)
        now = {rank: beat[1] if beat else [0, 0] for rank, beat in self._beats.items()}
        latest = max(barriers for barriers, _ in now.values())
        for rank, progress in now.items():
            # a beat is some seconds old: the progress of a rank that keeps up grows all the same
            waits = progress[0] < latest and progress == self._before.get(rank)
            self._behind[rank] = self._behind.get(rank, 0) + 1 if waits else 0
        self._before = now
        silent = [rank for rank, rounds in self._silent.items() if rounds > self._rounds]
        # a silent rank is behind too, which says less
        behind = [rank for rank, rounds in self._behind.items() if rounds > self._rounds + 2]
        if silent or behind:
            verdict = self._describe((silent + behind)[0], 'has not been heard of' if silent else
                                     'lives, but has not got as far as others')
            self._request('PUT', 'verdict', verdict)
            return verdict

    def _read_verdict(self):
        """The other ranks' part: rank 0's verdict, or that rank 0 is silent, or None."""
        verdict = self._request('GET', 'verdict')
        self._listen_to(0)
        if verdict is None and self._silent[0] > self._rounds + 2:
            return self._describe(0, 'has not been heard of')
        return verdict

    def _describe(self, rank, fault):
        _, _, pid, host = self._beats.get(rank) or (0, 0, '?', '?')
        return (f'waited for rank {rank} (process {pid} on {host}), which {fault} for '
                f'{self._limit:g} s')
