#!/usr/bin/env bash
# The tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer; with nvcc
# also those of CUDA, by emulation.
#
#   csrc/sanitize.sh [PYTHON]      # with torch, pytest and hypothesis; GCC
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sanitizers="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
FASTALIGN_CUDA=0 CFLAGS="-O1 -g1 -fno-omit-frame-pointer $sanitizers" LDFLAGS="$sanitizers" \
  "$python" setup.py --quiet build_ext --build-lib "$work/lib" --build-temp "$work/objects" \
  >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cp kernels/fastalign_kernels/*.py "$work/lib/fastalign_kernels/"
if command -v nvcc >/dev/null; then
  CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer $sanitizers" csrc/cuda/emulate.sh "$python" "$work/emulated.so"
fi

# libstdc++ too: AddressSanitizer looks for its exceptions when the process starts. pytest may not
# capture the file of stderr: what a dying process reports would be lost.
compiler=${CXX:-c++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$work/lib:$PWD" OMP_NUM_THREADS=1 EMULATED_KERNELS="$work/emulated.so" \
  "$python" -m pytest -q --capture=sys -p no:cacheprovider -p no:xdist \
  tests/test_native.py tests/test_native_cuda.py \
  tests/test_hadamard_reweight.py tests/test_calibrate.py \
  tests/test_label_logits.py tests/test_structure_distill_paths.py \
  -k "(native or compiled) and not (absent or stable_abi or exported or share_no_symbol or need_no_triton)"
