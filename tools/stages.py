"""Stages: command lines that are run once each, one after the other, and how far they have got.

A terminal shows a line for each finished stage and, below, what is being done and the time left of
all. Without one there are the commands, the epochs of a training, and now and then a sign of life.
"""
import codecs
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time

import outputs
from job.progress import format_bar, format_seconds
from job.terminal import DRAWN, Terminal

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIGN = 60  # seconds between two signs of life
ESCAPE = re.compile('\x1b\\[[0-9;?]*[A-Za-z]')  # of colours, and of a cursor that moves
EPOCHS = re.compile(r'epoch (\d+)/(\d+) +(\d+)%')  # the beginning of a training's progress
BAR = re.compile(' *\\|[█ ]*\\|')
HEAD = re.compile(r'^(\[[^]]*\](<\w+>:)? *)*')  # horovodrun's and tensorpack's, before a line


class Output:
    """What a stage writes to a terminal of its own; lines go on to a log file, progress does not.

    Attributes:
        stage: the stage's end of the terminal.
        state: what the stage has drawn last, or written while it had drawn nothing.
    """

    def __init__(self, log):
        self._end, self.stage = os.openpty()
        fcntl.ioctl(self.stage, termios.TIOCSWINSZ, struct.pack('4H', 50, 200, 0, 0))
        self._log, self._rest, self._drawn, self.state = log, '', [], 'starting'
        self._decode = codecs.getincrementaldecoder('utf-8')('replace').decode

    def read(self, seconds) -> bool:
        """Wait for more; returns whether there is any."""
        if not select.select([self._end], [], [], seconds)[0]:
            return False
        text = self._rest + self._decode(os.read(self._end, 2 ** 16))
        self._drawn = DRAWN.findall(text) or self._drawn
        *lines, self._rest = DRAWN.sub('', text).split('\n')
        for line in lines:
            # of one that was written over and over, the last state
            line = ESCAPE.sub('', line.rstrip('\r').rpartition('\r')[2])
            self._log.write(line + '\n')
            self.state = HEAD.sub('', line) or self.state
        self._log.flush()
        if self._drawn:
            self.state = self._drawn[-1]
        return True

    def close(self) -> None:
        os.close(self._end)
        os.close(self.stage)


class Stages:
    """Runs command lines once each, and remembers their seconds in a file.

    Args:
        folder: of that file, stages.json, and of logs.
        typical: dict of seconds that stages take somewhere, in their order. The first may be left
            out, if its time tells nothing about that of others.
    """

    def __init__(self, folder, typical=()):
        self._folder, self._typical = folder, dict(typical)
        self._path = os.path.join(folder, 'stages.json')
        os.makedirs(folder, exist_ok=True)
        self._done = read_json(self._path, None)  # in the order of the stages
        if not isinstance(self._done, dict):
            if os.path.exists(self._path):
                print(f'{self._path} cannot be read: every stage is looked at again', flush=True)
            self._done = {}
        self._asked = None  # signal that asked for the end
        self._terminal = Terminal()
        self._live = sys.stdout.isatty() and self._terminal.show()
        if self._live:
            print(f'commands and their output: {os.path.join(folder, "*.log")}', flush=True)

    def stop(self, number, frame):
        """The handler of a signal: end the stage, and then this process."""
        # an exception could come before the stage is known
        self._asked = number

    def _leave(self):
        if self._asked is not None:
            self._terminal.show()
            with contextlib.suppress(OSError):  # the terminal may have gone
                print('make demo: stopped; the same command goes on', flush=True)
            sys.exit(128 + self._asked)

    def run(self, name, title, command, output=None, stats=None):
        """Run a command line unless it has been done.

        If another command has been run in its place, this and all later stages begin anew.

        Args:
            name: of its log.
            title: of the stage, for people.
            command: as a user would type it in the project's folder.
            output: a file or folder that it writes, to be removed before it begins anew.
            stats: a stats.json whose new epochs are reported while it runs.

        Returns:
            Seconds it took.
        """
        if name in self._done and self._done[name]['command'] != command:
            for later in list(self._done)[list(self._done).index(name):]:
                self._remove(self._done[later]['output'])
                del self._done[later]
        record = self._done.get(
            name, {'command': command, 'output': output, 'seconds': 0, 'done': False})
        if not record['done']:
            self._leave()
            if not self._live:
                print(f'\n== {title}\n   {command}', flush=True)
            start = time.time()
            try:
                self._run(name, command, stats)
                record['done'] = True
            finally:
                self._terminal.show()
                record['seconds'] = round(record['seconds'] + time.time() - start, 1)
                self._done[name] = record
                with outputs.replace(self._path) as temporary, open(temporary, 'w') as f:
                    json.dump(self._done, f, indent=1)
            if self._live:
                result = read_json(stats or output, {})
                words = [f'{title}: {format_seconds(record["seconds"])}',
                         describe(result[-1] if isinstance(result, list) else result)]
                print(', '.join(filter(None, words)), flush=True)
        return record['seconds']

    def _run(self, name, command, stats):
        log = os.path.join(self._folder, name + '.log')
        with open(log, 'a', encoding='utf-8') as f, contextlib.closing(Output(f)) as output:
            f.write(f'$ {command}\n')
            report = self._show(name, output) if self._live else self._tell(output, stats)
            next(report)
            process = subprocess.Popen(shlex.split(command), stdout=output.stage,
                                       stderr=output.stage, cwd=HERE,
                                       env=dict(os.environ, TERM='xterm'))
            try:
                while process.poll() is None and self._asked is None:
                    output.read(0.5)
                    next(report)
            finally:
                if process.poll() is None:
                    process.terminate()
                while process.poll() is None or output.read(0):  # it waits for a reader
                    output.read(0.5)
            next(report)
        if process.returncode != 0:
            self._leave()
            self._terminal.show()
            with open(log, encoding='utf-8') as f:
                print(''.join(f.readlines()[-25:]))
            sys.exit(f'make demo: this failed with exit code {process.returncode}; all of its '
                     f'output is in {log}')

    def _show(self, name, output):
        """On a terminal: how much of all stages is done, the time left, and this one's progress."""
        start, first, typical = time.time(), None, self._typical
        known = [other for other in typical if self._done.get(other, {}).get('done')]
        # seconds of this machine for one of the typical ones
        slowness = (sum(self._done[other]['seconds'] for other in known) /
                    sum(typical[other] for other in known)) if known else 1
        before = sum(record['seconds'] for record in self._done.values())
        later = list(typical)[list(typical).index(name) + 1 if name in typical else 0:]
        while True:
            spent = time.time() - start
            left = max(0, typical.get(name, 0) * slowness - spent)
            epochs = EPOCHS.match(output.state)
            if epochs:
                epoch, of, percent = map(int, epochs.groups())
                share = (epoch - 1 + percent / 100) / of
                first = first or (spent, share)
                if share > first[1]:
                    left = (spent - first[0]) / (share - first[1]) * (1 - share)
            left += sum(typical[other] for other in later) * slowness
            share = (before + spent) / (before + spent + left + 1e-9)
            self._terminal.show(f'{format_bar(share)} {format_seconds(left)} left, {name}: '
                                f'{output.state}')
            yield

    def _tell(self, output, stats):
        """Without a terminal: new epochs and, if there has been nothing else, progress."""
        told, shown, next_sign = '', len(read_json(stats, [])), time.time() + SIGN
        while True:
            epochs = read_json(stats, [])
            lines = [f'epoch {epoch["epoch_num"]}: {describe(epoch)}' for epoch in epochs[shown:]]
            shown = len(epochs)
            if not lines and time.time() > next_sign:
                lines = ['... ' + BAR.sub(',', output.state)[:110]]
            if lines:
                next_sign = time.time() + SIGN
            if lines and lines != told:
                print('   ' + '\n   '.join(lines), flush=True)
                told = lines
            yield

    def _remove(self, path):
        """Remove a file or folder, if it is below this folder."""
        if not path or not os.path.lexists(path):
            return
        if not os.path.realpath(path).startswith(os.path.realpath(self._folder) + os.sep):
            sys.exit(f'make demo: {self._path} names {path}, which is not in {self._folder}: it is '
                     'not removed, name another --logdir')
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def read_json(path, default):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError, TypeError):
        return default


def describe(result):
    """What an epoch or a stage has come to, in words."""
    parts = []
    for key, words in (
            ('loss', 'loss {:.3f}'), ('accuracy', '(K+1)-way accuracy {:.3f}'),
            ('val_top1', 'validation top-1 {:.2f} %'),
            ('knn_top1', 'kNN top-1 {:.2f} %'), ('images_per_second', '{:.0f} images/s'),
            ('data_wait', 'waited for data {:.1%} of the time')):
        if key in result:
            parts.append(words.format(result[key]))
    return ', '.join(parts)
