"""Progress: what people see on a terminal, and what a log gets."""
import logging
import os
import re
import sys

import pytest

from commands import MOCO, finish, start, write_script
from job import progress
from job.progress import format_seconds
from job.terminal import DRAWN
from terminals import open_terminal, run_python, see, start_on

# three steps of four, drawn at once; a log would go to standard output
STEPS = """
import logging, sys
from job import progress
logger = logging.getLogger('tensorpack')
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.setLevel(logging.INFO)
progress.DRAW_INTERVAL = 0
shown = progress.Progress()
shown.begin('epoch 3/200', 4)
def step(number):
    shown.update(number, lambda pace: 'loss 7.1')
step(1)
step(2)
"""
LINE = 'epoch 3/200  50%|█████     | 2/4 [0:00<0:00] loss 7.1'


class Clock:
    """Time, a terminal without people, and a log."""

    def __init__(self, monkeypatch, seen):
        self.now, self.seen, self.drawn, self.logged = 0., seen, [], []
        monkeypatch.setattr(progress, 'time', self)
        monkeypatch.setattr(progress, 'Terminal', lambda of_horovodrun: self)
        logger, handler = logging.getLogger('tensorpack'), logging.Handler()
        handler.emit = lambda record: self.logged.append(record.getMessage())
        monkeypatch.setattr(logger, 'handlers', [handler])
        monkeypatch.setattr(logger, 'level', logging.INFO)

    def monotonic(self):
        return self.now

    def show(self, line):
        self.drawn += [line] * self.seen
        return self.seen

    def clear(self):
        pass


def show(what, total):
    shown = progress.Progress()
    shown.begin(what, total)
    return shown


@pytest.mark.parametrize('seconds, words', [
    (0, '0:00'), (42.9, '0:42'), (1042, '17:22'), (11110, '3:05:10'), (86399, '23:59:59'),
    (86400, '1 d 00:00'), (2 * 86400 + 3 * 3600 + 11 * 60 + 59, '2 d 03:11')])
def test_seconds_in_words(seconds, words):
    assert format_seconds(seconds) == words


def test_line_has_share_and_times(monkeypatch):
    clock, paces = Clock(monkeypatch, True), []
    shown = show('epoch 3/200', 5000)
    for clock.now, done in ((20, 1), (20.4, 2), (30, 51), (31, 56), (500, 2050)):
        shown.update(done, lambda pace: paces.append(pace) or 'loss 7.1')
    # the first step took 20 seconds, which tell nothing of others; too soon, nothing is drawn
    assert paces[:3] == [None, 0.2, 0.2] and len(paces) == 4
    assert clock.drawn == [
        'epoch 3/200   0%|          | 1/5000 [0:20<?] loss 7.1',
        'epoch 3/200   1%|          | 51/5000 [0:30<16:29] loss 7.1',
        'epoch 3/200   1%|          | 56/5000 [0:31<16:28] loss 7.1',
        'epoch 3/200  41%|████      | 2050/5000 [8:20<11:31] loss 7.1']
    assert not clock.logged


def test_pace_is_that_of_late(monkeypatch):
    clock, paces = Clock(monkeypatch, True), []
    shown = show('epoch 3/200', 10000)
    for done in range(1, 400):
        clock.now += 10 if done < 200 else 1
        shown.update(done, paces.append)
    assert paces[198] == 10 and paces[-1] == 1


def test_log_gets_a_line_a_minute(monkeypatch):
    clock = Clock(monkeypatch, False)
    shown = show('images of val/', 1000)
    for second in range(1, 151):
        clock.now += 1
        shown.update(4 * second)
    assert clock.logged == ['images of val/: 244 of 1000 (24 %), 3:09 left',
                            'images of val/: 488 of 1000 (48 %), 2:08 left']


@pytest.mark.parametrize('seen', [True, False])
def test_short_epochs_are_shown_too(monkeypatch, seen):
    clock, paces = Clock(monkeypatch, seen), []
    shown = progress.Progress()
    for epoch in range(1, 11):
        shown.begin(f'epoch {epoch}/10', 7)
        for step in range(1, 8):
            clock.now += 1
            shown.update(step, lambda pace: paces.append(pace) or '')
        shown.end()
        clock.now += 100 if epoch == 5 else 0  # an evaluation, which is none of the steps' time
    assert paces[0] is None and paces[1:] == [1] * (len(paces) - 1)
    if seen:
        assert len(clock.drawn) == 70 and clock.drawn[7].startswith('epoch 2/10  14%')
    else:
        assert clock.logged[0].startswith('epoch 6/10: 1 of 7')


def test_terminal_shows_the_last_line_and_it_goes():
    code = 'print("before", flush=True)' + STEPS
    assert see(run_python(code)) == ['before', '', LINE]
    foreign = code + 'print("of somebody else", flush=True);'
    assert see(run_python(foreign)) == ['before', 'of somebody else', LINE]
    assert see(run_python(foreign + 'step(2)')) == ['before', 'of somebody else', '', LINE]
    assert see(run_python(code + 'shown.close(); print("after\\nall")')) == [
        'before', 'after', 'all']


def test_line_is_not_wider_than_the_terminal():
    assert see(run_python(STEPS, columns=41)) == ['', LINE[:40]]


@pytest.mark.parametrize('settings', [
    {'columns': 39}, {'added': {'TERM': 'dumb'}}, {'added': {'TERM': ''}}],
    ids=['narrow', 'dumb', 'unknown'])
def test_terminal_that_cannot_show_it_is_none(settings):
    code = STEPS.replace('DRAW_INTERVAL', 'LOG_INTERVAL = progress.DRAW_INTERVAL')
    logged = ['epoch 3/200: 1 of 4 (25 %), ? left, loss 7.1',
              'epoch 3/200: 2 of 4 (50 %), 0:00 left, loss 7.1']
    assert run_python(code, **settings).splitlines() == logged


def test_other_ranks_show_nothing():
    assert run_python(STEPS, added={'HOROVOD_RANK': '1'}) == ''


def test_file_gets_nothing(tmp_path):
    with open(str(tmp_path / 'errors'), 'w') as errors:
        assert run_python(STEPS, stderr=errors) == ''
    assert (tmp_path / 'errors').read_text() == ''


def test_terminal_in_whose_background_it_runs_shows_nothing():
    code = 'import os; os.setpgid(0, 0)' + STEPS
    # of a shell with job control; else the process would lead its session
    assert run_python('import subprocess, sys; subprocess.check_call(sys.argv[1:])',
                      sys.executable, '-c', code) == ''


@pytest.mark.parametrize('stderr, seen', [('2', ['', LINE]), ('open(sys.argv[2], "w")', [])],
                         ids=['terminal', 'file'])
def test_rank_draws_on_the_terminal_of_its_horovodrun(tmp_path, stderr, seen):
    # as horovodrun starts ranks: in another session, through a shell, with pipes
    launcher = tmp_path / 'horovodrun'
    launcher.write_text(
        'import shlex, subprocess, sys\n'
        'words = " ".join(map(shlex.quote, [sys.executable, "-c", sys.argv[1]]))\n'
        'subprocess.run(words + "; true", shell=True, start_new_session=True, check=True,\n'
        '               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)')
    # its own parent has the terminal too, which is nobody's business
    parent = (f'import subprocess, sys; subprocess.check_call([sys.executable, {str(launcher)!r}, '
              f'sys.argv[1]], stderr={stderr})')
    assert see(run_python(parent, STEPS, str(tmp_path / 'errors'))) == seen


@pytest.mark.parametrize('hang_up', [False, True], ids=['not read', 'gone'])
def test_terminal_that_nobody_reads_stops_nothing(tmp_path, hang_up):
    code = STEPS + """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
print('ready', flush=True)
sys.stdin.readline()
for number in range(3000):
    step(2)
shown.close()
open(sys.argv[1], 'w').write('done')
"""
    ours, theirs = open_terminal()
    read, write = os.pipe()
    process = start_on(
        theirs, [sys.executable, '-c', code, str(tmp_path / 'end')], stdin=read)
    os.close(theirs)
    data = b''
    while b'ready\r\n' not in data:
        data += os.read(ours, 1000)
    assert DRAWN.search(data.decode())
    if hang_up:
        os.close(ours)
    os.write(write, b'\n')
    try:
        assert process.wait(60) == 0 and (tmp_path / 'end').read_text() == 'done'
    finally:
        process.kill()


def test_training_shows_epochs_on_the_terminal_of_horovodrun(tmp_path):
    script = write_script(tmp_path / 'train.py',
                          'from job import progress; progress.DRAW_INTERVAL = 0')
    ours, theirs = open_terminal()
    process = start(script, *MOCO, '--fake', '--steps-per-epoch', 3, '--max-steps', 5,
                    '--logdir', tmp_path / 'run', ranks=2, stderr=theirs, added={'TERM': 'xterm'})
    output, _ = finish(process)
    os.close(theirs)
    data = b''
    while True:
        try:
            data += os.read(ours, 2 ** 16)
        except OSError:  # that was all
            break
    os.close(ours)
    assert process.returncode == 0, output
    text = data.decode()
    drawn = [line.split(' [')[0] for line in DRAWN.findall(text)]
    assert drawn == ['epoch 1/2  33%|███       | 1/3', 'epoch 1/2  66%|██████    | 2/3',
                     'epoch 1/2 100%|██████████| 3/3', 'epoch 2/2  50%|█████     | 1/2',
                     'epoch 2/2 100%|██████████| 2/2']
    assert re.search(r' \[\d+:\d\d<0:00\] loss [\d.]+, \d+ images/s, run: \d+:\d\d left$',
                     DRAWN.findall(text)[-1])
    assert see(DRAWN.sub('', text)) == [] and '\r' not in output
