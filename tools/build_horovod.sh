# shellcheck shell=bash
# How make_env.sh, which sources this, builds Horovod: from its source distribution, whose digest is
# checked, with the patches of tools/horovod/. With a GPU build of TensorFlow it moves tensors with
# NCCL if that can be built, else through the host's memory with Gloo.

horovod_digest=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0

# For a machine without a CUDA toolkit: the compiler and what it needs, with which all that runs
# later has nothing to do. (The -cu12 package of nvcc has no nvcc; of CUDA 13, the oldest asks for
# the oldest drivers.)
nvcc_packages='nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85'

get_source() {  # leaves the patched source in $scratch/horovod
    local version patch
    version=$(pins "$build" | grep '^horovod==')
    echo "$version --hash=sha256:$horovod_digest" > "$scratch/horovod.txt"
    run "$scratch/venv/bin/python" -m pip download -q --no-deps --no-build-isolation \
        --no-binary horovod -d "$scratch/sdist" -r "$scratch/horovod.txt"
    mkdir -p "$scratch/horovod"
    run tar -xzf "$scratch/sdist/${version/==/-}.tar.gz" -C "$scratch/horovod" --strip-components 1
    for patch in tools/horovod/*.patch; do
        if ! attempt patch -d "$scratch/horovod" -p1 --fuzz=0 --forward -i "$PWD/$patch"; then
            explain_lack
            fail "$patch does not apply to ${version/==/ }: it has to be made anew, or removed if" \
                "Horovod has mended what it mends (all output is in $log)"
        fi
    done
}

# ---- CUDA's compiler and NCCL

note() {  # in the log, as if a command had printed it
    from=$(($(wc -c < "$log") + 1))
    say "$*" >> "$log"
}

toolkit_of() {  # toolkit_of NVCC: the folder that its compiler, headers and libraries are in
    "$1" -v --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1
}

fits() {  # fits NVCC: whether Horovod can be built with it for this TensorFlow
    local release
    release=$("$1" --version 2> /dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
    case $runtime-$release in tf1-10 | tf2-12 | tf2-13) ;; *) return 1 ;; esac
}

# the caller's choice (which may be none), or on PATH, or where CUDA's installer puts it
installed_toolkit() {
    local nvcc choice=(nvcc /usr/local/cuda/bin/nvcc)
    if [[ ${HOROVOD_CUDA_HOME:-} ]]; then choice=("$HOROVOD_CUDA_HOME/bin/nvcc"); fi
    for nvcc in "${choice[@]}"; do
        if fits "$nvcc"; then toolkit_of "$nvcc"; return; fi
    done
    return 1
}

get_toolkit() {  # sets cuda_home
    if cuda_home=$(installed_toolkit) && [[ -x $cuda_home/bin/nvcc ]]; then
        say "      with the CUDA toolkit in $cuda_home"
        return
    fi
    if [[ $runtime == tf1 ]]; then
        note 'there is no nvcc of CUDA 10 in HOROVOD_CUDA_HOME, on PATH or in /usr/local/cuda'
        return 1
    fi
    say '      with a CUDA compiler for this build alone (a download of about 200 MB)'
    attempt "$venv/bin/python" -m venv "$scratch/nvcc" || return
    # shellcheck disable=SC2086  # one word per package
    attempt "$scratch/nvcc/bin/python" -m pip install -q $nvcc_packages || return
    cuda_home=$(echo "$scratch"/nvcc/lib/python3*/site-packages/nvidia/cu13)
    attempt ln -s lib "$cuda_home/lib64" &&
        attempt ln -s libcudart.so.13 "$cuda_home/lib/libcudart.so"
}

get_nccl() {  # sets nccl_home: the caller's, or that of PyPI, which is in the environment
    local nvidia
    nccl_home=${HOROVOD_NCCL_HOME:-}
    if [[ $nccl_home || $runtime == tf1 ]]; then return; fi
    nvidia=$(echo "$venv"/lib/python3*/site-packages/nvidia)
    nccl_home=$scratch/nccl
    mkdir -p "$nccl_home/lib"
    ln -s "$nvidia/nccl/include" "$nccl_home/include"
    ln -s "$nvidia/nccl/lib/libnccl.so.2" "$nccl_home/lib/libnccl.so"
}

# Sets list, the compute capabilities to build for, like 80,90: those of this machine's GPUs;
# without one, TensorFlow's own that the compiler knows. Newer GPUs run the last one's PTX.
get_architectures() {
    local known wanted cc
    list=
    known=$("$cuda_home/bin/nvcc" --list-gpu-arch 2> /dev/null || true)
    wanted=$(capabilities | tr -d .)
    for cc in ${wanted:-60 70 80 89 90}; do
        if grep -qx "compute_$cc" <<< "${known:-compute_$cc}"; then list+=,$cc
        elif [[ $wanted ]]; then
            note "$cuda_home/bin/nvcc does not compile for compute capability $cc"
            return 1
        fi
    done
    list=${list#,}
}

# ---- the build

build_wheel() {  # build_wheel SETTINGS...
    rm -rf "$scratch/wheels" "$scratch/horovod/build"
    attempt env HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
        HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_CMAKE="$scratch/cmake" \
        MAKEFLAGS="-j$(nproc)" "$@" "$scratch/venv/bin/python" -m pip wheel -v --no-cache-dir \
        --no-build-isolation --no-deps -w "$scratch/wheels" "$scratch/horovod"
}

build_with_nccl() {
    local list settings link=${HOROVOD_NCCL_LINK:-}
    get_toolkit && get_nccl && get_architectures || return
    if [[ -z ${HOROVOD_NCCL_HOME:-} ]]; then link=SHARED; fi  # NCCL of PyPI is
    settings=(HOROVOD_NCCL_LINK="$link"
        HOROVOD_CUDA_HOME="$cuda_home" CUDAToolkit_ROOT="$cuda_home"
        CUDACXX="$cuda_home/bin/nvcc" HOROVOD_BUILD_CUDA_CC_LIST="$list"
        HOROVOD_NCCL_HOME="$nccl_home" PATH="$cuda_home/bin:$scratch/venv/bin:$PATH")
    case $runtime in
        # no release of NCCL for CUDA 10.0 has the alltoall of 2.7: there Gloo moves the images
        tf1) settings+=(HOROVOD_GPU_{ALLREDUCE,ALLGATHER,BROADCAST}=NCCL) ;;
        tf2) settings+=(HOROVOD_GPU_OPERATIONS=NCCL) ;;
    esac
    build_wheel "${settings[@]}"
}

install_horovod() {
    begin horovod '[3/5] compiling Horovod for this TensorFlow (2 to 4 minutes on 2 cores)'
    # Half the time: no debug symbols, and only the library for TensorFlow with what that links.
    # Libraries are found relative to Horovod's own.
    local path=PATH="$scratch/venv/bin:$PATH"
    local folders="\$ORIGIN/../../tensorflow;\$ORIGIN/../../nvidia/nccl/lib"
    folders+=${HOROVOD_NCCL_HOME:+";$HOROVOD_NCCL_HOME/lib"}
    cat > "$scratch/cmake" << SH
#!/bin/sh
if [ "\$1" = --build ]; then shift 2; exec cmake --build . --target tensorflow "\$@"; fi
exec cmake "\$@" "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O2 -DNDEBUG" \\
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$folders'
SH
    chmod +x "$scratch/cmake"
    # its build knows no spaces in paths: it gets to see the environment through a link
    ln -sfn "$venv" "$scratch/venv"
    get_system_packages
    get_source
    rm -f "$venv/with_nccl"
    if [[ $build == cpu ]]; then
        build_wheel "$path" || explain
    elif build_with_nccl; then
        touch "$venv/with_nccl"
    else
        explain_lack
        say '      Horovod was not built with NCCL: several GPUs will exchange gradients and images' \
            "through the host's memory, which costs time in every step; one GPU loses nothing. Why" \
            "is in $log"
        build_wheel "$path" || explain
    fi
    run "$venv/bin/python" -m pip install --no-deps --force-reinstall "$scratch"/wheels/*.whl
}
