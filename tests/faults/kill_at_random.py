#!/usr/bin/env python
"""Hit a training at random moments, again and again: nothing may be left, and nothing lost.

    python tests/faults/kill_at_random.py                  # 50 rounds of one rank
    python tests/faults/kill_at_random.py --ranks 2        # under horovodrun

A tiny network is trained once without a break, with all states kept. Then, in each round, the same
command runs in one log folder, with another number of data workers each time, until a random
victim gets a random signal at a random moment, three times in ten while it starts:

    trainer, launcher (horovodrun)      SIGKILL, SIGTERM or SIGINT
    data server, data worker            SIGKILL (they ignore the others)
    terminal                            all processes that Ctrl-C in a terminal reaches get SIGINT

Checked is that

    no process, socket, shared memory or temporary file is left, 5 s after the launcher or a trainer
    was hit, 15 s after a data server or worker (--limits);
    the exit code is not 0 (but horovodrun's may be, if it got the signal), and standard error fits
    (of one rank: one line that names what was hit);
    the run had gone on after the last checkpoint, and the one that it leaves is, bit for bit, what
    the run without a break had at that step;
    SIGTERM and SIGINT leave a checkpoint and the file resume-me, and the exit code 75 of one rank;
    the next run removes that file.

A training that reaches its end, and one more, which nothing hits, must end with the last state of
the run without a break. Each round prints what was hit when (at which newest checkpoint), what was
left of the run, and whatever is not as it must be; the exit code is then 1.
"""
import argparse
import collections
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]

from commands import MOCO, PATIENCE, start, write_images, write_script  # noqa: E402
from processes import find_job, list_processes, name_process  # noqa: E402

import checkpoints  # noqa: E402
from weights import read_weights  # noqa: E402

EPOCH, EPOCHS = 5, 60  # steps, and a checkpoint, in each
STEPS = EPOCH * EPOCHS
MOMENTS = 4  # seconds of training in which it is hit
RESUME = 75  # exit code of a rank that can be continued
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
GENTLE = SIGNALS[1:]

# saves every step, and keeps all
REFERENCE = '''
import callbacks


class SaveEveryStep(callbacks.Save):
    def __init__(self, max_to_keep):
        super().__init__(max_to_keep=10**6)

    def _trigger_step(self):
        self._trigger()

    def _trigger_epoch(self):
        pass


callbacks.Save = SaveEveryStep
'''


def newest_step(logdir):
    """Of the newest checkpoint in a log folder; -1 if there is none."""
    path = checkpoints.find_latest(logdir) if os.path.isdir(logdir) else None
    return -1 if path is None else int(path.rpartition('-')[2])


def read_state(logdir, step):
    """Digest of each variable in a checkpoint."""
    weights = read_weights(os.path.join(logdir, 'model-{}'.format(step)))
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in weights.items()}


def list_shared_memory():
    """Entries of /dev/shm that no living process uses."""
    entries = {os.path.join('/dev/shm', name) for name in os.listdir('/dev/shm')}
    for pid in list_processes() if entries else []:
        try:
            with open('/proc/{}/maps'.format(pid)) as f:
                entries -= {line.split(None, 5)[-1].strip() for line in f if '/dev/shm/' in line}
        except OSError:
            pass  # gone meanwhile
    return entries


class Job:
    """A training in a folder of its own for temporary files."""

    def __init__(self, work, ranks, *flags, script='main_moco.py'):
        self.tmp = os.path.join(work, 't')
        os.makedirs(self.tmp, exist_ok=True)
        self._files = [open(os.path.join(work, name), 'w+') for name in ('output', 'errors')]
        self._shared_memory = list_shared_memory()
        self.start = time.time()
        self._process = start(
            script, '--data', os.path.join(work, 'data'), *MOCO, '--steps-per-epoch', EPOCH,
            '--epochs', EPOCHS, *flags, ranks=ranks, tmp=self.tmp, start_new_session=True,
            stdout=self._files[0], stderr=self._files[1])

    def ended(self):
        return self._process.poll() is not None

    def wait(self, condition, seconds):
        """Wait for something, or the end; returns whether it came in that time."""
        end = time.time() + seconds
        while not self.ended() and not condition():
            if time.time() > end:
                return False
            time.sleep(0.02)
        return True

    def victims(self):
        """What there is to hit: dict of names -> process ids."""
        found = collections.defaultdict(list)
        for pid in find_job(self.tmp):
            name = name_process(pid)
            if name != 'launcher' or pid == self._process.pid:
                found[name].append(pid)
        found['terminal'] = [-self._process.pid]  # its group
        return found

    def wait_for_the_end(self):
        """Wait until nothing is left, for a minute at most; returns exit code, lines of output and
        errors, what is left, and the seconds that this took."""
        begin = time.time()
        left = True
        while left and time.time() < begin + 60:
            time.sleep(0.05)
            left = not self.ended() or self._left()
        seconds = time.time() - begin
        left = self._left()
        self.clean()
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append([line.rstrip() for line in file if line.strip()])
            file.close()
        return (self._process.returncode,) + tuple(texts) + (left, seconds)

    def _left(self):
        """What there still is of the job."""
        with open('/proc/net/unix') as f:
            sockets = [line.split()[-1] for line in f if self.tmp in line]
        return (['process {} ({})'.format(pid, name_process(pid)) for pid in find_job(self.tmp)] +
                [os.path.join(self.tmp, name) for name in os.listdir(self.tmp)] + sockets +
                sorted(list_shared_memory() - self._shared_memory))

    def clean(self):
        for pid in find_job(self.tmp):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait()
        shutil.rmtree(self.tmp)
        os.mkdir(self.tmp)


def choose_victim(job, chance):
    """Who is hit, and by what: its name, process id, signal."""
    victims = job.victims()
    name = chance.choice(sorted(victims))
    pid = chance.choice(sorted(victims[name]))
    return name, pid, (signal.SIGINT if name == 'terminal' else
                       signal.SIGKILL if name.startswith('data') else chance.choice(SIGNALS))


def expect_words(name, pid, number):
    """What one line of standard error must say, or None if nobody can say anything."""
    if name == 'data worker':
        return 'pid {}) was killed by signal {}'.format(pid, int(number))
    if name == 'data server':
        return 'the data server of this host is gone'
    return None if number == signal.SIGKILL else number.name


def judge(name, pid, number, code, errors, ranks, resume):
    """List what is not as it must be, of a run that was hit while it trained.

    Args:
        name, pid, number: of whom was hit, and the signal.
        code, errors: exit code and lines of standard error of the job.
        ranks: how many.
        resume: whether there is a file resume-me.
    """
    faults = []
    words = expect_words(name, pid, number)
    if ranks == 1 and len(errors) != (words is not None):
        faults.append('{} lines of errors'.format(len(errors)))
    # what horovodrun ends is not heard any more
    if words and (ranks == 1 or name.startswith('data')) and not any(words in e for e in errors):
        faults.append('no error says "{}"'.format(words))
    if number in GENTLE:
        if not resume:
            faults.append('no file resume-me')
        if ranks == 1 and code != RESUME:
            faults.append('exit code is not {}'.format(RESUME))
    return faults


class Test:
    """Rounds in one log folder after another.

    Args:
        work: folder for everything.
        args: from parse_args().
    """

    def __init__(self, work, args):
        self.work, self.args = work, args
        self.chance = random.Random(args.seed)
        self.counts = collections.defaultdict(collections.Counter)
        self.failed = False
        self._folders = 0
        self._open_folder()

    def _open_folder(self):
        self._folders += 1
        self.logdir = os.path.join(self.work, 'log{}'.format(self._folders))

    def say(self, text, faults):
        self.failed |= bool(faults)
        print(text + ''.join('\n    WRONG: ' + fault for fault in faults), flush=True)

    def train_without_a_break(self):
        """Keep the digests of all states, and how long a start takes."""
        script = write_script(os.path.join(self.work, 'reference.py'), REFERENCE)
        logdir = os.path.join(self.work, 'reference')
        job = Job(self.work, self.args.ranks, '--logdir', logdir, script=script)
        job.wait(lambda: newest_step(logdir) > 0, PATIENCE)
        self.startup = time.time() - job.start
        job.wait(lambda: False, PATIENCE)
        code, _, errors, left, _ = job.wait_for_the_end()
        if code != 0 or left:
            sys.exit('\n'.join(['kill_at_random: the run without a break failed'] + errors + left))
        self.reference = {step: read_state(logdir, step) for step in range(1, STEPS + 1)}
        shutil.rmtree(logdir)
        print('{} steps without a break; the first was done after {:.1f} s'.format(
            STEPS, self.startup), flush=True)

    def start(self):
        return Job(self.work, self.args.ranks, '--logdir', self.logdir,
                   '--workers', self.chance.randint(1, 3))

    def compare(self, before):
        """List what is wrong with the newest checkpoint, after a run that began at another."""
        step = newest_step(self.logdir)
        if step < before:
            return ['the checkpoint of step {} is gone'.format(before)]
        if step < 1:
            return []
        state = read_state(self.logdir, step)
        expected = self.reference[step]
        wrong = sorted(name for name in set(state) | set(expected)
                       if state.get(name) != expected.get(name))
        return ['{} of {} variables are not those of step {}: {}'.format(
            len(wrong), len(expected), step, ', '.join(wrong[:5]))] if wrong else []

    def check_completed(self, code, errors, left, before):
        faults = self.compare(before) + list(left)
        if code != 0 or newest_step(self.logdir) != STEPS:
            faults += ['exit code {} after step {}'.format(code, newest_step(self.logdir))] + errors
        self.say('          the training reached its end, step {}'.format(STEPS), faults)
        self._open_folder()

    def play(self, number):
        """A round; returns whether the training was hit."""
        before = newest_step(self.logdir)
        early = self.chance.random() < 0.3
        seconds = self.chance.uniform(0, self.startup if early else MOMENTS)
        job = self.start()
        try:
            # horovodrun may lose a signal that comes before it has started a rank
            job.wait((lambda: 'trainer' in job.victims()) if early else
                     (lambda: newest_step(self.logdir) > before), PATIENCE)
            faults = [] if early or not self.has_resume_file() else ['resume-me is still there']
            job.wait(lambda: False, seconds)
            name, pid, signum = choose_victim(job, self.chance)
            if job.ended():
                code, _, errors, left, _ = job.wait_for_the_end()
                self.check_completed(code, errors, left, before)
                return False
            step, after = newest_step(self.logdir), time.time() - job.start
            (os.kill if pid > 0 else os.killpg)(abs(pid), signum)
            code, output, errors, left, gone = job.wait_for_the_end()
        except BaseException:
            job.clean()
            raise

        faults += self.compare(before) + ['left: ' + what for what in left]
        limit = self.args.limits[name.startswith('data')]
        if gone > limit:
            faults.append('that is more than {:g} s'.format(limit))
        last = newest_step(self.logdir)
        if last < STEPS:
            # horovodrun may lose the exit codes of ranks that it was asked to end
            if code == 0 and (self.args.ranks == 1 or name not in ('launcher', 'terminal')):
                faults.append('exit code 0')
            if not early:
                faults += judge(name, pid, signum, code, errors, self.args.ranks,
                                self.has_resume_file())
                if before > 0 and not any('after step {}'.format(before) in o for o in output):
                    faults.append('it did not continue after step {}'.format(before))
        what = '{} {}'.format(signum.name, name)
        self.say('{:3} {:6.1f} s {:22} {}; left: {}{}; gone in {:.1f} s, exit code {}{}'.format(
            number, after, what, 'after step {}'.format(step) if step > max(before, 0) else
            'at start-up', 'step {}'.format(last) if last >= 0 else 'no step yet',
            ' and resume-me' if self.has_resume_file() else '', gone, code,
            ': ' + errors[-1][:200] if errors else ''), faults)
        count = self.counts[what]
        count['hits'] += 1
        count['at start-up'] += step <= max(before, 0)
        count['resume-me'] += self.has_resume_file()
        count['wrong'] += bool(faults)
        count['seconds'] = max(count['seconds'], gone)
        if last == STEPS:
            self._open_folder()
        return True

    def has_resume_file(self):
        return os.path.exists(os.path.join(self.logdir, 'resume-me'))

    def complete(self):
        """A run that nothing hits."""
        before = newest_step(self.logdir)
        job = self.start()
        try:
            job.wait(lambda: False, PATIENCE)
            code, _, errors, left, _ = job.wait_for_the_end()
        except BaseException:
            job.clean()
            raise
        self.check_completed(code, errors, left, before)

    def summarize(self):
        columns = ['hits', 'at start-up', 'resume-me', 'wrong']
        print('\n{:22}{}  longest'.format('', ''.join('{:>13}'.format(c) for c in columns)))
        for what, count in sorted(self.counts.items()):
            print('{:22}{}{:7.1f} s'.format(
                what, ''.join('{:13}'.format(count[c]) for c in columns), count['seconds']))
        print('{} hits in {} log folders: {}'.format(
            sum(count['hits'] for count in self.counts.values()), self._folders - 1,
            'not all was as it must be, see above' if self.failed else
            'nothing was left, nothing was lost'))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=50, help='how many hits (default: 50)')
    parser.add_argument('--ranks', type=int, choices=[1, 2], default=1, help='default: 1')
    parser.add_argument('--seed', type=int, default=0, help='of victims and moments (default: 0)')
    parser.add_argument('--limits', type=float, nargs=2, default=[5, 15],
                        metavar=('TRAINER', 'DATA'),
                        help='seconds until nothing is left of a job, when the launcher or a '
                        'trainer was hit, or the data server or a worker (default: 5 15)')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # clean up
    work = tempfile.mkdtemp(prefix='kill-')
    try:
        write_images(os.path.join(work, 'data'))
        test = Test(work, args)
        test.train_without_a_break()
        hits = 0
        while hits < args.rounds:
            hits += test.play(hits + 1)
        test.complete()
        test.summarize()
    finally:
        shutil.rmtree(work)
    return test.failed


if __name__ == '__main__':
    sys.exit(main())
