#!/usr/bin/env bash
# benchmarks/gpu_check.sh OUT [BUILD [STEP...]]: all that only a GPU can tell, in one command and about 20 minutes.
#
# Needs Linux, an NVIDIA GPU, nvcc, a C++ compiler, and Python >= 3.10 with torch and triton; no network. Builds a
# copy of the sources in BUILD (default: a temporary folder, removed at the end; a second call finds its caches
# there), runs the GPU tests, compute-sanitizer where it is installed, and the benchmarks. OUT gets STEP.log, the
# JUnit XML, the JSON lines and summary.txt. A step that fails or runs out of time stops no other; the exit code is 1
# then. PYTHON chooses the interpreter, VOXTRAST_CHECK_SECONDS the time in all; VOXTRAST_COMMIT names the commit in
# the results where there is no git. Named STEPs alone run, after versions and build: cuda_library gpu_tests view_tests
# small_sizes memcheck view_memcheck racecheck view_racecheck bench_quick bench_data, and bench_OP for every operator that
# `voxtrast bench kernels --op` knows. view_tests need numpy and scipy too, those of the DALI operator also DALI.
# shellcheck disable=SC2329  # functions that run as steps are called by name
set -u -o pipefail

readonly SECONDS_IN_ALL=${VOXTRAST_CHECK_SECONDS:-1200}
usage="usage: benchmarks/gpu_check.sh OUT [BUILD [STEP...]]"
out=${1:?$usage}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

if ! gpu=$("$python" -c 'import torch
print("" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device")' 2>&1); then
    echo "gpu_check: $python cannot import torch: ${gpu##*$'\n'}" >&2
    exit 2
elif [ -n "$gpu" ]; then
    echo "gpu_check: $gpu; this check needs a machine with a GPU, and nothing was done" >&2
    exit 2
fi

mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
if [ $# -ge 2 ]; then
    mkdir -p "$2" || exit 2
    build=$(cd "$2" && pwd)
else
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
fi
chosen=" ${*:3} "
source=$build/source
venv=$build/venv

PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc and compute-sanitizer are often here and not in the path

# Every cache goes below BUILD.
mkdir -p "$build/tmp"
export TMPDIR=$build/tmp XDG_CACHE_HOME=$build/cache TRITON_CACHE_DIR=$build/triton
export TORCHINDUCTOR_CACHE_DIR=$build/inductor KEOPS_CACHE_FOLDER=$build/keops CUDA_CACHE_PATH=$build/cuda
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
VOXTRAST_COMMIT=${VOXTRAST_COMMIT:-$(git -C "$root" describe --always --dirty 2>/dev/null || true)}
export VOXTRAST_COMMIT

steps=()
failed=0

# step NAME SECONDS COMMAND...: in the copy of the sources, its output in OUT/NAME.log.
step() {
    local name=$1 limit=$2 code started=$SECONDS
    shift 2
    if [[ "$chosen" == *[a-z]* && " versions build $chosen" != *" $name "* ]]; then return; fi
    if [ $((SECONDS + limit)) -gt $SECONDS_IN_ALL ]; then limit=$((SECONDS_IN_ALL - SECONDS)); fi
    if [ "$limit" -lt 5 ]; then
        echo "no time left of $SECONDS_IN_ALL seconds" >"$out/$name.log"
        code=124
    else
        (cd "$source" && exec timeout --kill-after=15 "$limit" "$@") >"$out/$name.log" 2>&1
        code=$?
    fi
    steps+=("$(printf '%-26s %4d %8d' "$name" "$code" $((SECONDS - started)))")
    echo "${steps[-1]}"
    if [ "$code" -ne 0 ]; then
        failed=1
        tail -n 5 "$out/$name.log" | sed 's/^/    /'
    fi
}

# The functions below run as steps of their own: `timeout` starts programs, not functions.
step_function() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" bash -u -o pipefail -c "$(declare -f "$1"); $1 \"\${@:2}\"" bash "$@"
}

versions() {
    nvidia-smi -L
    nvidia-smi --query-gpu=driver_version,memory.total,clocks.max.sm --format=csv,noheader
    nvcc --version | tail -n 2
    "$1" -c 'import sys, torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)'
}

# pip, or, where its setuptools is too old for pyproject.toml or it is not there, setup.py alone and a path.
install() {
    local python=$1 site=$2 path=$3 folder
    "$python" -m pip install --no-build-isolation --no-deps --editable . && return
    echo "pip could not: setup.py build_ext --inplace"
    mv pyproject.toml pyproject.aside
    "$python" setup.py build_ext --inplace
    local code=$?
    mv pyproject.aside pyproject.toml
    mkdir -p "$path/voxtrast"
    for folder in kernels methods engine benchmarks; do ln -sfn "$PWD/$folder" "$path/voxtrast/$folder"; done
    echo "$path" >"$site/voxtrast.pth"
    return "$code"
}

gpu_tests() {
    if ! "$1" -c 'import pytest'; then
        echo "pytest is not installed here: the GPU tests did not run"
        return 3
    fi
    "$1" -c 'import numpy' || echo "numpy is not installed here: tests that need it fail"
    # Side by side: most of the time goes into compiling a kernel for every type.
    local part=0 failed=0 running=()
    for chosen in float32 bfloat16 "float16 and not bfloat16" "not float"; do
        part=$((part + 1))
        "$1" -m pytest -v -p no:cacheprovider --continue-on-collection-errors -m "gpu and not slow" tests/kernels -k "$chosen" \
            --junitxml "$2/gpu_tests_$part.xml" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process" || failed=1; done
    return $failed
}

# The kernels that make views, without DALI; and DALI's operator beside the CPU's, where DALI is installed.
view_tests() {
    local tests=(tests/engine/data/test_view_kernels.py)
    if "$1" -c 'import nvidia.dali, dynamic_network_architectures'; then
        tests+=(tests/engine/data/test_operators_on_a_gpu.py)
    else
        echo "DALI or the networks are not installed here: the operator inside DALI was not tested"
    fi
    "$1" -m pytest -v -p no:cacheprovider -m "gpu and not slow" "${tests[@]}" --junitxml "$2/view_tests.xml"
}

view_sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$2" --error-exitcode 9 --target-processes all \
        "$1" -m pytest -p no:cacheprovider -m gpu tests/engine/data/test_view_kernels.py -k "batch or every_output"
}

sanitize() {
    # Without torch's cache of memory: within one large block nothing is out of bounds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$2" --error-exitcode 9 \
        "$1" -m voxtrast.benchmarks.kernels.small_sizes
}

mkdir -p "$source"
tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./.typing --exclude=./build --exclude=./runs --exclude='*.so' \
    --exclude='*.egg-info' --exclude=__pycache__ -cf - . | tar -C "$source" -xf -
# An environment that sees what "$python" sees, its pip and setuptools too, and that alone can be written to.
"$python" -m venv --without-pip "$venv" >"$out/venv.log" 2>&1
ours=$venv/bin/python
site=$("$ours" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" -c 'import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")' >"$site/outer.pth"
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export VOXTRAST_CUDA_ARCHITECTURES=${VOXTRAST_CUDA_ARCHITECTURES:-$architecture}

printf '%-26s %4s %8s\n' step exit seconds
step_function versions 60 versions "$ours"
step_function build 240 install "$ours" "$site" "$build/path"
step cuda_library 60 "$ours" -c 'import sys; from voxtrast.kernels._native import load_cuda; sys.exit(not load_cuda())'
step_function gpu_tests 300 gpu_tests "$ours" "$out"
step_function view_tests 240 view_tests "$ours" "$out"
step small_sizes 240 "$ours" -m voxtrast.benchmarks.kernels.small_sizes
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        step_function "$tool" 150 sanitize "$ours" "$tool"
        step_function "view_$tool" 120 view_sanitize "$ours" "$tool"
    else
        steps+=("$(printf '%-26s %4s %8s  %s' "$tool" - - "compute-sanitizer is not installed here")")
        echo "${steps[-1]}"
    fi
done
bench=("$ours" -m voxtrast.benchmarks.kernels --device cuda)
step bench_quick 150 "${bench[@]}" --quick --output "$out/quick.jsonl"
step bench_data 420 "$ours" -m voxtrast.benchmarks.data --device cuda --crop 96 --rounds 3 --output "$out"
ops=(info_nce nt_xent positional_info_nce bank_info_nce local_correlation warp warped_cosine_loss vector_pyramid)
for op in "${ops[@]}"; do # a process each: a lost CUDA context loses one of them
    step "bench_$op" 420 "${bench[@]}" --op "$op" --output "$out"
done

{
    printf '%-26s %4s %8s\n' step exit seconds
    printf '%s\n' "${steps[@]}"
    echo
    cat "$out/versions.log"
    for log in "$out"/bench_*.log; do
        printf '\n%s\n' "$(basename "$log" .log)"
        cat "$log"
    done
} >"$out/summary.txt"
echo "see $out/summary.txt"
exit $failed
