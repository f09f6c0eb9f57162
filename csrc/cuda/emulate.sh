#!/usr/bin/env bash
# The CUDA kernels compiled for the CPU (emulation.h), so that tests run them where no GPU is.
#
#   csrc/cuda/emulate.sh [PYTHON [FILE]]      # with torch; GCC, and nvcc for its headers
#
# Builds FILE, emulated.so beside this script unless named; tests/_emulated.py loads it. CXXFLAGS
# are added.
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
python=${1:-python}
made=${2:-$folder/emulated.so}

build=$(PYTHONPATH="$folder/../.." "$python" -c \
  'from csrc.build import STABLE, nvcc, toolkit; print(toolkit(nvcc() or exit("no nvcc")), *STABLE)')
read -r toolkit stable <<<"$build"
includes=$("$python" -c 'from torch.utils.cpp_extension import include_paths; print(*include_paths())')
libraries=$("$python" -c 'from torch.utils.cpp_extension import library_paths; print(*library_paths())')

flags=(-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -ffp-contract=off -Wno-attributes)
flags+=(-DFASTALIGN_EMULATED)
for path in $includes "$toolkit/include"; do flags+=(-isystem "$path"); done
for path in $libraries; do flags+=("-L$path"); done
# shellcheck disable=SC2086  # flags in words
"${CXX:-c++}" "${flags[@]}" $stable ${CXXFLAGS:-} -x c++ "$folder"/*.cu "$folder/ops.cpp" \
  -x none -ltorch_cpu -o "$made"
