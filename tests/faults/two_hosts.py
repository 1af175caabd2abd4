#!/usr/bin/env python
"""Training on two hosts, and what becomes of one when the other is lost.

    python tests/faults/two_hosts.py           # as root; a few minutes
    python tests/faults/two_hosts.py --fault link --limit 300
    python tests/faults/two_hosts.py --launcher srun

The hosts a and b are namespaces of this machine (network, host name, processes, mounts), joined by
a cable of their own, each with sshd, data and temporary folder; nothing leaves them. For each fault
`horovodrun -H a:1,b:1` on a, or a rank on each that a fake srun or mpirun has started, train a tiny
network on both, until

    none    the training is done
    b       all processes of b are killed
    a       all processes of a are killed: horovodrun, if that started them, and rank 0
    link    the cable is cut

Then no process of the job must be left on what remains within --limit seconds; the job's own
--stall-limit is a quarter of that. Printed is what was
done and seen; the exit code is 1 if something was not as it must be. Flags behind -- go to
main_moco.py. Needs root, and of Debian: openssh-server iproute2.
"""
import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from commands import MOCO, command, write_images  # noqa: E402

PATIENCE = 600  # seconds for a training to get anywhere, on a busy machine
ADDRESSES = {'a': '10.77.0.1', 'b': '10.77.0.2'}

# {work}/host is the host's own folder, under the same path on both. The last line ends when the
# write end of its standard input is closed, whatever closes it; the kernel then ends whatever else
# there is in the namespaces, and them.
INIT = '''
set -e
hostname {name}
mount --bind {work}/{name} {work}/host
mount --bind {work}/{name}/hosts /etc/hosts
mount --bind {work}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
echo ready
read line
ip addr add {address}/24 dev eth0
ip link set eth0 up
$(which sshd) -f {work}/sshd_config -o ListenAddress={address}
echo ready
exec cat
'''
SSH_CONFIG = '''
Host *
    IdentityFile {work}/key
    IdentitiesOnly yes
    IdentityAgent none
    BatchMode yes
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /dev/null
    LogLevel ERROR
'''
SSHD_CONFIG = '''
HostKey {work}/host_key
AuthorizedKeysFile {work}/key.pub
PermitRootLogin prohibit-password
StrictModes no
PidFile none
'''


class Host:
    """Namespaces with an init that ends with this process."""

    def __init__(self, work, name, addresses):
        self.work, self.name = work, name
        self.folder = os.path.join(work, name)
        os.makedirs(os.path.join(self.folder, 'tmp'))
        with open(os.path.join(self.folder, 'hosts'), 'w') as f:
            f.write(''.join(f'{address} {name}\n' for name, address in addresses.items()))
        write_images(os.path.join(self.folder, 'data'), 24, 0)
        self._unshare = subprocess.Popen(
            ['unshare', '--net', '--uts', '--mount', '--pid', '--fork', '--mount-proc',
             'sh', '-c', INIT.format(work=work, name=name, address=ADDRESSES[name])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
        self.await_init()
        with open('/proc/{0}/task/{0}/children'.format(self._unshare.pid)) as children:
            self.init = int(children.read())
        self._namespace = os.readlink('/proc/{}/ns/pid'.format(self.init))

    def await_init(self):
        if self._unshare.stdout.readline() != 'ready\n':
            sys.exit('two_hosts: cannot make host {}, see above'.format(self.name))

    def boot(self):
        """Begin with the network, once there is a cable."""
        self._unshare.stdin.write('\n')
        self._unshare.stdin.flush()
        self.await_init()

    def start(self, words, **kwargs):
        """Start a command there."""
        return subprocess.Popen(
            ['nsenter', '--target', str(self.init), '--net', '--uts', '--mount', '--pid'] + words,
            stdin=subprocess.DEVNULL, **kwargs)

    def processes(self):
        """Process id, as seen from outside, and command line of each that lives, but init."""
        found = {}
        for pid in map(int, filter(str.isdigit, os.listdir('/proc'))):
            with contextlib.suppress(OSError):  # gone meanwhile
                if os.readlink('/proc/{}/ns/pid'.format(pid)) == self._namespace:
                    with open('/proc/{}/cmdline'.format(pid)) as f:
                        words = f.read().replace('\0', ' ').strip()
                    if words and pid != self.init:  # a dead one has no words
                        found[pid] = words
        return found

    def job(self):
        """Those of the job."""
        return {pid: words for pid, words in self.processes().items()
                if self.work in words and 'sshd' not in words.split(' ')[0]}

    def kill_all(self):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self):
        self._unshare.stdin.close()
        self._unshare.wait()
        self._unshare.stdout.close()


@contextlib.contextmanager
def two_hosts(launcher):
    """Yields a and b; of what is made for them nothing is left."""
    work = tempfile.mkdtemp(prefix='hosts-')
    hosts = []
    try:
        os.mkdir(os.path.join(work, 'host'))
        for key in ('key', 'host_key'):
            subprocess.check_call(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f',
                                   os.path.join(work, key)])
        for name, text in [('ssh_config', SSH_CONFIG), ('sshd_config', SSHD_CONFIG)]:
            with open(os.path.join(work, name), 'w') as f:
                f.write(text.format(work=work))
        for name in ADDRESSES:
            # Debian lets a host know itself by this address, where no sshd of ours listens
            own = {} if launcher == 'horovodrun' else {name: '127.0.1.1'}
            hosts.append(Host(work, name, dict(ADDRESSES, localhost='127.0.0.1', **own)))
        subprocess.check_call(
            ['ip', 'link', 'add', 'eth0', 'netns', str(hosts[0].init), 'type', 'veth',
             'peer', 'name', 'eth0', 'netns', str(hosts[1].init)])
        for host in hosts:
            host.boot()
        yield hosts
    finally:
        for host in hosts:
            host.end()
        shutil.rmtree(work)


def train(hosts, launcher, flags, output):
    """Start the training; returns the process on host a."""
    here = os.path.join(hosts[0].work, 'host')
    words = command(
        'main_moco.py', '--data', os.path.join(here, 'data'), *MOCO, '--steps-per-epoch', 4,
        '--logdir', os.path.join(here, 'runs', 'log'), *flags)
    # all of it, for horovodrun passes it on
    env = {'PATH': os.path.dirname(sys.executable) + ':/usr/sbin:/usr/bin:/sbin:/bin',
           'HOME': here, 'TMPDIR': os.path.join(here, 'tmp'), 'CUDA_VISIBLE_DEVICES': '',
           'TF_DISABLE_MKL': '1', 'OMP_NUM_THREADS': '1'}
    if launcher == 'horovodrun':
        hosts, options = hosts[:1], [[
            os.path.join(os.path.dirname(sys.executable), 'horovodrun'), '-np', '2',
            '--disable-cache', '--start-timeout', str(PATIENCE), '-H', 'a:1,b:1']]
    else:
        fake = [sys.executable, os.path.join(os.path.dirname(HERE), 'fake_launcher.py')]
        options = [fake + ['--ranks', f'{i}:{i + 1}', launcher, '2'] for i in range(2)]
        # mpirun does not tell where rank 0 is
        env.update({'SLURM_NODELIST': 'a,b'} if launcher == 'srun' else {'MASTER_ADDR': 'a'})
    return [host.start(start + words, stdout=output, stderr=subprocess.STDOUT, env=env)
            for host, start in zip(hosts, options)][0]


def wait_until(condition, seconds):
    """Returns whether it came true in that time."""
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            return False
        time.sleep(0.1)
    return True


class Report:
    """Prints what is seen, and remembers whether it was as it must be."""

    def __init__(self):
        self.failed = False

    def say(self, text):
        print(text, flush=True)

    def check(self, what, condition):
        self.failed |= not condition
        self.say('    {}: {}'.format('yes' if condition else 'NO ', what))


def lose(fault, a, b):
    """Lose a host or the cable; returns the hosts that remain."""
    if fault == 'link':
        b.start(['ip', 'link', 'set', 'eth0', 'down']).wait()
        return [a, b]
    lost, other = (a, b) if fault == 'a' else (b, a)
    lost.kill_all()
    return [other]


def run(fault, launcher, flags, limit, report):
    report.say(f'{launcher}, fault: {fault}')
    with two_hosts(launcher) as (a, b), open(os.path.join(a.work, 'output'), 'w+') as output:
        log = os.path.join(a.folder, 'runs', 'log')
        # b cannot have a log folder
        open(os.path.join(b.folder, 'runs'), 'w').close()
        process = train([a, b], launcher, ['--stall-limit', limit / 4, '--epochs',
                            3 if fault == 'none' else 1000000] + flags, output)
        if fault == 'none':
            wait_until(lambda: process.poll() is not None, PATIENCE)
            report.check('the training ends with exit code 0', process.poll() == 0)
            report.check('its last checkpoint is on a',
                         os.path.exists(os.path.join(log, 'model-12.index')))
            left = [a, b]
        else:
            wait_until(lambda: os.path.exists(os.path.join(log, 'stats.json')) or
                       process.poll() is not None, PATIENCE)
            report.check('both hosts train, in {} and {} processes'.format(
                len(a.job()), len(b.job())), process.poll() is None and a.job() and b.job())
            left = lose(fault, a, b)

        # what remains
        start = time.time()
        for host in left:
            gone = wait_until(lambda: not host.job(), start + limit - time.time())
            report.check('{}: no process is left after {} s {}'.format(
                host.name, round(time.time() - start), sorted(host.job().values()) or ''), gone)
            for folder in os.listdir(os.path.join(host.folder, 'tmp')):
                # all of a data server's processes were killed at once
                report.say('    left in the temporary folder of {}: {}'.format(host.name, folder))
        process.kill()
        process.wait()
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
        said = [line for line in lines if re.search(r'\brank \d+: ', line)]
        if fault in ('b', 'link'):
            report.check('a says why', said)
        for line in said or lines[-20:]:
            report.say('        ' + line[:300])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fault', choices=['none', 'b', 'a', 'link'], action='append',
                        help='only this one; may be repeated')
    parser.add_argument('--launcher', choices=['horovodrun', 'srun', 'mpirun'],
                        default='horovodrun', help='(default: horovodrun)')
    parser.add_argument('--limit', type=int, default=120, help='seconds (default: 120)')
    parser.add_argument('flags', nargs='*', help='for main_moco.py, behind --')
    args = parser.parse_args()
    missing = [name for name in ('unshare', 'nsenter', 'ip', 'ssh', 'ssh-keygen', 'sshd')
               if shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin:/sbin') is None]
    if os.getuid() != 0 or missing:
        sys.exit('two_hosts: needs root{}'.format(''.join(', and ' + name for name in missing)))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # clean up
    report = Report()
    for fault in args.fault or ['none', 'b', 'a', 'link']:
        run(fault, args.launcher, args.flags, args.limit, report)
    return report.failed


if __name__ == '__main__':
    sys.exit(main())
