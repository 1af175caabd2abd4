"""The processes of a job, as tests see them in /proc."""
import os
import time

from commands import PATIENCE


def wait_until(condition, patience=PATIENCE):
    deadline = time.time() + patience
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def list_processes():
    return [int(name) for name in os.listdir('/proc') if name.isdigit()]


def read_words(pid, name='cmdline'):
    """The command line of a process, or the variables of its environment (`environ`); no words if
    it is dead."""
    try:
        with open('/proc/{}/{}'.format(pid, name), errors='replace') as f:
            return f.read().split('\0')[:-1]
    except OSError:
        return []


def read_rank(pid):
    """The rank of a trainer; 0 without horovodrun."""
    ranks = [word for word in read_words(pid, 'environ') if word.startswith('HOROVOD_RANK=')]
    return int(ranks[0].split('=')[1]) if ranks else 0


def read_status(pid):
    """The letter of a process's state, the id of the process that it descends from, and when it
    began, in ticks; Z, as for a zombie, and zeros if it is gone."""
    try:
        with open('/proc/{}/stat'.format(pid)) as f:
            words = f.read().rpartition(')')[2].split()
    except OSError:
        return 'Z', 0, 0
    return words[0], int(words[1]), int(words[19])


def is_alive(pid):
    return read_status(pid)[0] != 'Z'


def find_processes(word):
    """Ids of the living processes that have the word in their command line,
    in the order of their start."""
    found = [pid for pid in list_processes()
             if word in ''.join(text + '\0' for text in read_words(pid))]
    # ids begin anew when they have reached their maximum
    return sorted(found, key=lambda pid: (read_status(pid)[2], pid))


def find_job(tmp):
    """Ids of the living processes that were given this folder for their temporary files."""
    return [pid for pid in list_processes() if 'TMPDIR=' + tmp in read_words(pid, 'environ')]


def name_process(pid):
    """What a process is to a job of main_moco.py: trainer, data server, data worker, or launcher,
    which includes all that horovodrun starts besides."""
    script = find_script(pid)
    if script == 'serve-data.py':
        return 'data worker' if find_script(read_status(pid)[1]) == script else 'data server'
    # a trainer's child is about to become the data server
    if script == 'main_moco.py' and find_script(read_status(pid)[1]) != script:
        return 'trainer'
    return 'launcher'


def find_script(pid):
    """Name of the script that a Python runs, or whatever the second word is."""
    return os.path.basename(''.join(read_words(pid)[1:2]))
