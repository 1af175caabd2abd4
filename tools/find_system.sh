# shellcheck shell=bash
# What make_env.sh, which sources this, needs of the system: a Python, system packages, disk, and
# which GPUs there are.

# ---- Python

# try_python INTERPRETER VERSIONS: prints its full path if it really runs, is of one of the versions
# and can make environments and extensions; else fails and prints what is wrong. (Version managers
# put names on PATH that refuse to run.)
try_python() {
    "$1" - "$2" 2> /dev/null << 'PY' && return
import os, sys, sysconfig
version = "%d.%d" % sys.version_info[:2]
wrong = None
if version not in sys.argv[1].split():
    wrong = "is Python " + version
elif sys.maxsize < 2**32:
    wrong = "is a 32-bit Python"
else:
    try:
        import ctypes, ensurepip, ssl, venv, zlib
    except ImportError as e:
        wrong = "lacks a standard module (%s)" % e
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        wrong = "has no Python.h (the -dev or -devel package)"
if wrong:
    sys.stdout.write(wrong + "\n")
    sys.exit(3)
sys.stdout.write(sys.executable + "\n")
PY
    return 1
}

candidates() {  # candidates VERSION
    local dir
    type -aP "python$1" python3 python 2> /dev/null || true
    if command -v pyenv > /dev/null; then
        ls -1 "$(pyenv root)"/versions/"$1".*/bin/python 2> /dev/null || true
    fi
    for dir in "${CONDA_PREFIX:-}" "${CONDA_EXE:+${CONDA_EXE%/bin/*}}" "${MAMBA_ROOT_PREFIX:-}" \
        ~/.conda ~/{anaconda,miniconda,miniforge,mambaforge}{,3} ~/micromamba /opt/conda; do
        if [[ -z $dir ]]; then continue; fi
        ls -1 "$dir/bin/python$1" "$dir"/envs/*/bin/"python$1" 2> /dev/null || true
    done
    if command -v uv > /dev/null; then
        UV_PYTHON_DOWNLOADS=never uv python find "$1" 2> /dev/null || true
    fi
}

search_python() {  # prints the first that works; or fails and prints what one of them lacks
    local version candidate found nearly=
    for version in $pythons; do
        while IFS= read -r candidate; do
            if [[ $candidate == "$PWD"/.venv-* ]]; then continue; fi
            found=$(try_python "$candidate" "$version") && say "$found" && return
            if [[ -z $nearly && -n $found && $found != 'is Python '* ]]; then
                nearly="$(dirname "$candidate")/python$version $found"
            fi
        done < <(candidates "$version")
    done
    printf '%s' "$nearly"
    return 1
}

# where there is no Python but Debian's, which leaves venv and headers to other packages: these
get_python_packages() {
    local found name log=$venv.packages.log  # there is no environment yet
    if [[ -n ${PYTHON:-} ]] || found=$(search_python); then return; fi
    name=$(sed -n 's|^/usr/bin/\(python3\.[0-9]*\) .*|\1|p' <<< "$found")
    if [[ -z $name ]] || ! command -v apt-get > /dev/null; then return; fi
    : > "$log"
    install_system_packages "$name-venv" "$name-dev"
}

find_python() {
    local found
    if [[ -n ${PYTHON:-} ]]; then
        found=$(try_python "$PYTHON" "$pythons") && say "$found" && return
        fail "PYTHON=$PYTHON ${found:-does not run}; TensorFlow 1.15 needs Python 3.7, 2.21 needs" \
            '3.10 to 3.13, both with venv and headers'
    fi
    found=$(search_python) && say "$found" && return
    fail "${found:+$found. }TensorFlow $tf_version needs $python_range, and none that works is on" \
        "PATH or in pyenv, conda or uv: $(how_to_get_python), then run the same command again"
}

how_to_get_python() {
    local version=${pythons%% *}
    if command -v uv > /dev/null; then say "uv python install $version"
    elif command -v pyenv > /dev/null; then say "pyenv install $version"
    elif command -v conda > /dev/null; then say "conda create -y -n py${version/./} python=$version"
    elif command -v mamba > /dev/null; then say "mamba create -y -n py${version/./} python=$version"
    else say "pip install uv, then uv python install $version"
    fi
}

# ---- system packages: what counts is whether a program that uses them compiles

compiles() {  # compiles SOURCE FLAGS...
    printf '%s\n' "$1" > "$scratch/a.cc"
    ${CXX:-g++} -o "$scratch/a" "$scratch/a.cc" "${@:2}" > "$scratch/out" 2>&1
}
has_compiler() { compiles 'int main() { return 0; }'; }
compiles_with() {  # compiles_with LIBRARY SOURCE
    local flags
    read -ra flags < <(pkg-config --cflags --libs "lib$1" 2> /dev/null || echo "-l$1")
    compiles "$2" "${flags[@]}"
}
has_zmq() { compiles_with zmq $'#include <zmq.h>\nint main() { return zmq_errno(); }'; }
has_jpeg() {  # libjpeg-turbo; before 1.5.3, there were bugs in what decodes a part
    compiles_with jpeg '#include <stdio.h>
        #include <jpeglib.h>
        #if LIBJPEG_TURBO_VERSION_NUMBER < 1005003
        #error libjpeg-turbo is older than 1.5.3, or this is another libjpeg
        #endif
        int main() { return !jpeg_crop_scanline; }'
}
has_make() { command -v make > /dev/null; }
has_patch() { command -v patch > /dev/null; }

install_system_packages() {  # install_system_packages PACKAGES...
    local command root=()
    command="apt-get update && apt-get install -y --no-install-recommends $*"
    if ! command -v apt-get > /dev/null; then
        fail "missing on this system: $* (as Debian calls them); install them with its package" \
            'manager, then run the same command again'
    fi
    if ((EUID != 0)); then
        sudo -n true 2> /dev/null || fail "missing on this system: $*; please run:" \
            "sudo sh -c '$command', then the same command again"
        root=(sudo -n)
    fi
    say "      installing $* with apt-get (up to a minute)"
    run "${root[@]}" apt-get update -q
    run "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "$@"
}

get_system_packages() {
    local packages=()
    has_compiler || packages+=(g++)
    has_make || packages+=(make)
    has_patch || packages+=(patch)
    has_zmq || packages+=(libzmq3-dev pkg-config)
    has_jpeg || packages+=(libjpeg-dev)
    if ((${#packages[@]} == 0)); then return; fi
    install_system_packages "${packages[@]}"
    has_compiler || fail "${CXX:-g++} does not compile; all output is in $log"
    has_zmq || fail "zmq.h does not compile, though libzmq3-dev is installed; all output is in $log"
    has_jpeg || fail "jpeglib.h does not compile, or not as that of libjpeg-turbo 1.5.3 or newer," \
        "though libjpeg-dev is installed; all output is in $log"
}

need_disk() {
    local free venv_gb=3
    if [[ $runtime-$build == tf2-gpu ]]; then venv_gb=10; fi  # with CUDA's libraries
    free=$(df -Pk . | awk 'NR == 2 {print $4}')
    if ((free < venv_gb * 1024 * 1024)); then
        fail "the environment needs $venv_gb GB of disk; only $((free / 1024)) MB are free in $PWD"
    fi
}

# ---- GPUs

gpu_listed() { nvidia-smi -L 2> /dev/null | grep -q '^GPU '; }

capabilities() {  # their compute capabilities, like 8.0, a line each; drivers before 2021 tell none
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null |
        grep -xE '[0-9]+\.[0-9]+' | sort -uV || true
}

# TensorFlow 1.15 is built for CUDA 10, which knows no GPU after Turing (7.5)
too_new_for_tf1() { capabilities | awk '$1 > 7.5 { newer = 1 } END { exit !newer }'; }

took_long='it took more than 5 minutes'

# A build finds no GPU where its CUDA is missing. One GPU suffices, and what it has of memory.
# Returns 124 if it takes more than 5 minutes: a GPU newer than the build compiles all kernels
# first, once.
gpu_runs() {
    local status=0
    say '      running a test op on a GPU (up to 5 minutes: newer GPUs compile it first)'
    attempt env TF_CPP_MIN_LOG_LEVEL=1 timeout 300 "$venv/bin/python" -c '
import numpy as np
from tensorpack import tfv1 as tf
assert tf.config.experimental.list_physical_devices("GPU"), "TensorFlow finds no GPU it can use"
with tf.Graph().as_default(), tf.device("/gpu:0"):
    x = tf.ones([2, 3, 8, 8])
    y = tf.nn.conv2d(x, tf.ones([3, 3, 3, 4]), strides=[1, 1, 1, 1], padding="VALID",
                     data_format="NCHW")
    config = tf.ConfigProto(allow_soft_placement=False)
    config.gpu_options.allow_growth = True
    config.gpu_options.visible_device_list = "0"
    with tf.Session(config=config) as sess:
        assert np.all(sess.run(y) == 27), "a convolution on the GPU gave wrong numbers"
' || status=$?
    if ((status == 124)); then echo "$took_long" >> "$log"
    elif ((status > 128)); then echo "it was killed by signal $((status - 128))" >> "$log"
    fi
    return "$status"
}

# That the test op did not run is remembered, in a file with its output, for a week and for these
# GPUs with this driver.
these_gpus() { hash_of "$(nvidia-smi --query-gpu=name,driver_version --format=csv 2>&1 || true)"; }
no_gpu() {
    [[ $(find "$venv.no-gpu" -mtime -7 2> /dev/null) &&
        $(tail -n 1 "$venv.no-gpu") == "$(these_gpus)" ]]
}
was_slow() { grep -qx "$took_long" "$venv.no-gpu"; }
remember_no_gpu() { mv "$log" "$venv.no-gpu"; these_gpus >> "$venv.no-gpu"; }
