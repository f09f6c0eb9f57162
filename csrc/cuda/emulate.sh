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

# What is on the path may be a script that calls the real one.
toolkit=$(dirname "$(nvcc --dryrun none.cu 2>&1 | sed -n 's/^#$ _HERE_=//p')")
includes=$("$python" -c 'from torch.utils.cpp_extension import include_paths; print(*include_paths())')
libraries=$("$python" -c 'from torch.utils.cpp_extension import library_paths; print(*library_paths())')

flags=(-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -ffp-contract=off -Wno-attributes)
flags+=(-DFASTALIGN_EMULATED -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000)
for path in $includes "$toolkit/include"; do flags+=(-isystem "$path"); done
for path in $libraries; do flags+=("-L$path"); done
# shellcheck disable=SC2086  # flags in words
"${CXX:-c++}" "${flags[@]}" ${CXXFLAGS:-} -x c++ "$folder"/*.cu "$folder/ops.cpp" \
  -x none -ltorch_cpu -o "$made"
