#!/usr/bin/env bash
# Make an environment of this clone, with TensorFlow, Horovod and the pull op: .venv-tf1/ has
# TensorFlow 1.15 on Python 3.7, .venv-tf2/ has 2.21 on Python 3.10 to 3.13. Both fit side by side.
#
#   tools/make_env.sh                        what `make env` calls: about 4 minutes on 2 cores,
#                                            under 2 s when all is there
#   RUNTIME=tf2 tools/make_env.sh            force one of the two, tf1 or tf2; the default takes tf1
#                                            if Python 3.7 is here and no GPU that it cannot use
#   BUILD=cpu tools/make_env.sh              force the cpu (or gpu) build of TensorFlow; the default
#                                            takes the gpu build if it runs on a GPU here
#   PYTHON=/opt/py37/bin/python tools/make_env.sh     use this Python, with the TensorFlow it fits
#   tools/make_env.sh --venv                 only print the folder of the environment that is chosen
#   tools/make_env.sh --find-python          only print the interpreter that would be used
#
# Each step leaves a stamp in the environment: a hash of what it was made from, and its seconds. A
# step whose stamp is missing or differs is done again, so an interrupted set-up heals by running
# this once more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# settings of the caller that would lead pip, make or python astray
unset PYTHONPATH PYTHONHOME MAKEFLAGS MFLAGS MAKELEVEL HOROVOD_WITH_MPI "${!HOROVOD_GPU@}"
export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*"; }
fail() { printf 'make env: %s\n' "$*" >&2; exit 1; }

# ---- the two runtimes

use() {  # use RUNTIME
    runtime=$1
    venv=$PWD/.venv-$runtime
    log=$venv/setup.log
    case $runtime in
        tf1) tf_version=1.15 pythons=3.7 python_range='Python 3.7'
            build_tools='pip==24.0 setuptools==59.8.0 wheel==0.42.0 cmake==3.31.6' ;;
        # (Horovod imports distutils, which setuptools 81 no longer has)
        tf2) tf_version=2.21 pythons='3.13 3.12 3.11 3.10' python_range='Python 3.10 to 3.13'
            build_tools='pip==25.3 setuptools==80.9.0 wheel==0.45.1 cmake==3.31.6' ;;
    esac
}

# ---- stamps

hash_of() { printf '%s\n' "$@" | sha256sum | cut -c1-16; }
stamped() { [[ -f $venv/stamps/$1 && $(cut -d' ' -f1 "$venv/stamps/$1") == "$2" ]]; }
stamp() { printf '%s %s\n' "$2" "$((SECONDS - step_start))" > "$venv/stamps/$1"; }

begin() {  # begin STEP LINE: the step counts as undone until it is stamped again
    mkdir -p "$venv/stamps"
    rm -f "$venv/stamps/$1"
    step_start=$SECONDS
    say "$2"
}

requirements() {  # requirements BUILD: the file
    case $runtime-$1 in
        tf1-gpu) echo requirements.txt ;;
        tf1-cpu) echo requirements-cpu.txt ;;
        *) echo requirements-tf2.txt ;;
    esac
}
pins() {  # pins BUILD: its packages
    local swap=
    if [[ $runtime-$1 == tf2-cpu ]]; then
        swap='s/^tensorflow\[and-cuda]==/tensorflow-cpu==/; /^nvidia-/d'
    fi
    grep -vE '^ *(#|$)' "$(requirements "$1")" | sed "$swap"
}

# keys BUILD: the hash of the inputs of every step, and the file of the pull op
keys() {
    local tensorflow horovod
    tensorflow=$(pins "$1" | grep -E '^[a-z-]*tensorflow[^=]*==')
    op=zmq_ops/build/pull_op-tf${tensorflow##*==}.so
    horovod=$(pins "$1" | grep '^horovod==')
    key_base=$(hash_of "$venv" "$tensorflow" "$build_tools")
    key_packages=$(hash_of "$key_base" "$(pins "$1" | grep -v '^horovod==')")
    key_horovod=$(hash_of "$key_base" "$horovod" "$horovod_digest" "$(cat tools/horovod/*.patch)")
    key_op=$(hash_of "$key_base" "$(find augment.cc jpeg.cc zmq_ops -name build -prune -o -type f \
        \( -name Makefile -o -name '*.cc' -o -name '*.h' \) -print \
        | LC_ALL=C sort | xargs -r -d '\n' cat | sha256sum)")
    key_check=$(hash_of "$key_packages" "$key_horovod" "$key_op" \
        "$(cat tools/quiet_tensorflow.py tools/check_env.py)")
}

compiled() { [[ -f $op && -f build/augment.so && -f build/jpeg.so ]]; }

complete() {
    stamped packages "$key_packages" && stamped horovod "$key_horovod" &&
        stamped op "$key_op" && compiled &&
        stamped check "$key_check" && "$venv/bin/python" -c ''
}

# ---- running what takes long

# usable FOLDER: whether programs run there, as pip's and Horovod's builds do, and 4 GB fit in, as
# the packages of a GPU build do
usable() {
    printf '#!/bin/sh\n' > "$1/probe" && chmod +x "$1/probe" && "$1/probe" &&
        (($(df -Pk "$1" | awk 'NR == 2 {print $4}') >= 4 * 1024 * 1024))
} 2> /dev/null

callers_tmpdir=${TMPDIR:-/tmp}
scratch=$(mktemp -d 2> /dev/null) || scratch=
trap 'rm -rf "$scratch"' EXIT
if [[ -z $scratch ]] || ! usable "$scratch"; then
    rm -rf "$scratch"
    scratch=$(mktemp -d "$PWD/.venv-tmp.XXXXXX") || fail "$PWD cannot be written"
fi
export TMPDIR=$scratch

child=
stop() {  # a signal ends the running command with all its children, then this script
    trap - INT TERM HUP
    if [[ -n $child ]]; then kill -TERM -- "-$child" 2> /dev/null || true; fi
    fail 'interrupted; the same command goes on where it stopped'
}
trap stop INT TERM HUP

# attempt COMMAND...: its output goes to the log, every half minute a sign of life to the terminal
attempt() {
    local start=$SECONDS next=$((SECONDS + 30)) status=0
    from=$(($(wc -c < "$log") + 1))
    printf '\n$ %s\n' "$*" >> "$log"
    set -m  # a process group of its own, which `stop` can end
    "$@" >> "$log" 2>&1 < /dev/null &
    child=$!
    set +m
    while kill -0 "$child" 2> /dev/null; do
        sleep 0.2
        if ((SECONDS >= next)); then
            next=$((SECONDS + 30))
            say "      ... $((SECONDS - start)) s $(percent)"
        fi
    done
    wait "$child" || status=$?
    child=
    return "$status"
}

run() { attempt "$@" || explain; }  # on failure, the one sentence that helps

percent() { tail -c "+$from" "$log" | grep -o '\[ *[0-9]*%\]' | tail -n 1; }  # as make prints it

explain_lack() {  # ends if the output of the last command says that this machine lacks something
    local output again="run the same command again (all output is in $log)"
    output=$(tail -c "+$from" "$log")
    case $output in
        *'No space left on device'*)
            fail "the disk is full; make room, then $again" ;;
        *NewConnectionError* | *ConnectTimeoutError* | *ReadTimeoutError* | *ProxyError* | \
            *'Max retries exceeded'* | *'Name or service not known'* | *'Temporary failure '* | \
            *'Network is unreachable'*)
            fail "no network, or the packages' server cannot be reached; once it can, $again" ;;
        *'Killed signal'* | *'out of memory'* | *'annot allocate memory'*)
            fail "the compiler ran out of memory; free some, then $again" ;;
        *'DO NOT MATCH THE HASHES'*)
            fail "a download is not the file that was published; $again" ;;
    esac
}

explain() {  # ends with what the output of the last command says went wrong
    local output
    explain_lack
    output=$(tail -c "+$from" "$log")
    printf '%s\n' "$output" | cut -c1-200 | grep -iE '(error|fatal):? |^E: ' | head -n 5 >&2 || true
    fail "this step failed; all output is in $log"
}

. tools/find_system.sh  # find_python, get_system_packages, need_disk, gpu_runs and more of GPUs
. tools/build_horovod.sh  # install_horovod

# ---- which build of which TensorFlow

has_python() { "$venv/bin/python" -c '' 2> /dev/null || search_python; }

# sets runtime by RUNTIME, or to the one that PYTHON fits, or by the rule: TensorFlow 1.15, unless
# it has no Python here or a GPU that it does not run on
choose_runtime() {
    local found
    by_rule=
    because=
    case ${RUNTIME:-} in
        tf1 | tf2) use "$RUNTIME"; return ;;
        ?*) fail "RUNTIME=$RUNTIME: it must be tf1 (TensorFlow 1.15) or tf2 (TensorFlow 2.21)" ;;
    esac
    use tf1
    if [[ -n ${PYTHON:-} ]]; then
        found=$(try_python "$PYTHON" "$pythons") || [[ $found != 'is Python '* ]] || use tf2
        find_python > /dev/null
        because="chosen by PYTHON=$PYTHON"
        return
    fi
    by_rule=1
    if ! found=$(has_python); then
        use tf2
        because="no Python 3.7 that works was found${found:+ ($found)}"
    elif [[ ${BUILD:-} == cpu ]]; then
        because='Python 3.7 was found, and BUILD=cpu needs no GPU'
    elif too_new_for_tf1; then
        because="1.15 does not run on a GPU of compute capability $(capabilities | tail -n 1)"
        prefer_tf2
    elif no_gpu; then
        because='a test op of TensorFlow 1.15 did not run on the GPU'
        prefer_tf2
    elif [[ -f $venv/build ]]; then
        because='.venv-tf1 is there'
    elif gpu_listed; then
        because='Python 3.7 was found; whether it runs on the GPU is tried next'
    else
        because='Python 3.7 was found, and nvidia-smi lists no GPU'
    fi
}

prefer_tf2() {
    use tf2
    if ! has_python > /dev/null; then
        use tf1
        because="$because, but there is no Python 3.10 to 3.13 for 2.21"
    fi
}

# Sets build. `auto` takes the GPU build wherever a GPU is listed, unless a test op has failed on it;
# without one it keeps what is there: the nodes of a cluster that people log in to have none.
choose_build() {
    local kept=
    why= asked=
    if [[ -f $venv/build ]]; then read -r kept asked < "$venv/build" || true; fi
    case ${BUILD:-auto} in
        cpu | gpu) build=$BUILD asked=asked ;;
        auto)
            if [[ ${BUILD:-} ]]; then asked=; fi
            if [[ $asked ]]; then build=$kept
            elif ! gpu_listed; then build=${kept:-cpu} why=', nvidia-smi lists no GPU'
            elif no_gpu && ! was_slow; then build=cpu why=', a test op did not run on the GPU'
            else build=gpu why=', nvidia-smi lists a GPU'
            fi ;;
        *) fail "BUILD=$BUILD: it must be auto, cpu or gpu" ;;
    esac
}

# whether the GPU build is to be tested, for which a GPU must be listed: BUILD=gpu takes it as it
# is, except that the rule for the runtime needs to know
tests_gpu() {
    [[ $build == gpu ]] && gpu_listed && ! no_gpu && [[ ! $asked || $by_rule-$runtime == 1-tf1 ]]
}

# whether this environment stays: not if the test op fails; if it is only slow, another must be there
suits_gpu() {
    local status=0
    gpu_runs || status=$?
    if ((status == 124)) && ! { [[ $by_rule && $runtime == tf1 ]] && (use tf2; has_python); } \
        > /dev/null
    then
        say '      it took more than 5 minutes; the GPU build stays, and starts slowly the first time'
        return
    fi
    return "$status"
}

# ---- the steps

make_venv() {
    local python
    [[ $(uname -sm) == 'Linux x86_64' ]] ||
        fail "this set-up is for Linux on x86_64 only, not $(uname -sm)"
    get_python_packages
    python=$(find_python)
    if [[ -e $venv ]]; then
        say "      removing the half-made or outdated $(basename "$venv")"
        rm -rf "$venv"
    fi
    need_disk
    mkdir -p "$venv"
    : > "$log"
    begin base "[1/5] Python environment from $python (about 10 s)"
    get_system_packages
    run "$python" -m venv "$venv"
    # shellcheck disable=SC2086  # one word per package
    run "$venv/bin/python" -m pip install $build_tools
    stamp base "$key_base"
}

install_packages() {
    begin packages "[2/5] packages from $(requirements "$build") (about a minute)"
    pins "$build" | grep -v '^horovod==' > "$venv/requirements"
    run "$venv/bin/python" -m pip install -r "$venv/requirements"
}

build_op() {
    begin op '[4/5] compiling the pull op, zmq_ops/, augment.cc and jpeg.cc (about 20 s)'
    run make -C zmq_ops PYTHON="$(printf %q "$venv/bin/python")"
    run make build/augment.so build/jpeg.so
    compiled || fail "this made no $op; all output is in $log"
}

final_check() {
    local folder nccl=
    if [[ -f $venv/with_nccl ]]; then nccl=--nccl; fi
    begin check '[5/5] checking: imports, the op, Horovod and a TensorFlow session (about 10 s)'
    # horovodrun imports TensorFlow too, and would begin every run with its greetings
    for folder in "$venv"/lib/python3*/site-packages; do
        cp tools/quiet_tensorflow.py "$folder/"
        echo 'import quiet_tensorflow; quiet_tensorflow.install()' > "$folder/quiet_tensorflow.pth"
    done
    run env PATH="$venv/bin:$PATH" TF_CPP_MIN_LOG_LEVEL=2 CUDA_VISIBLE_DEVICES= \
        "$venv/bin/python" tools/check_env.py $nccl
}

# what was asked for counts from now on, even if it is there already
write_build() {
    if [[ $(cat "$venv/build" 2> /dev/null) != "$build $asked" ]]; then
        echo "$build $asked" > "$venv/build"
    fi
}

write_seconds() { cat "$venv"/stamps/* | awk '{s += $2} END {print s}' > "$venv/setup_seconds"; }

again() {  # decides anew, from what is on disk now
    rm -rf "$scratch"
    TMPDIR=$callers_tmpdir exec tools/make_env.sh
}

main() {
    choose_runtime
    if [[ $because ]]; then say "TensorFlow $tf_version: $because"; fi
    choose_build
    keys "$build"
    if complete; then
        write_build
        say "environment: .venv-$runtime is complete ($build build)"
        return
    fi

    # one at a time; commands left over from a killed set-up hold the lock too, until they end
    exec 9> "$venv.lock"
    if ! flock -n 9; then
        say "another set-up of .venv-$runtime is running; waiting for it to end"
        flock 9
        again
    fi

    say "making the environment .venv-$runtime ($build build$why)"
    # (packages half installed may look whole to pip)
    if ! stamped base "$key_base" || [[ ! -f $venv/stamps/packages ]] ||
        ! "$venv/bin/python" -c '' 2> /dev/null; then
        make_venv
    fi
    if ! stamped packages "$key_packages"; then
        install_packages
        if tests_gpu && ! suits_gpu; then
            say "      no: $(grep -v '^[[:space:]]' "$log" | tail -n 1 | cut -c1-200)"
            remember_no_gpu
            rm -rf "$venv"
            again
        fi
        stamp packages "$key_packages"
    fi
    write_build
    if ! stamped horovod "$key_horovod"; then install_horovod; stamp horovod "$key_horovod"; fi
    if ! stamped op "$key_op" || ! compiled; then
        get_system_packages
        build_op
        stamp op "$key_op"
    fi
    if ! stamped check "$key_check"; then final_check; stamp check "$key_check"; fi
    write_seconds
    say "environment: .venv-$runtime is ready ($build build, $(< "$venv/setup_seconds") s)"
}

case ${1:-} in
    --venv) choose_runtime; say "$venv" ;;
    --find-python) choose_runtime; find_python ;;
    *) main ;;
esac
