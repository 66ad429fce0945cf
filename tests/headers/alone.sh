#!/usr/bin/env bash
# alone.sh COMPILER FLAGS_FILE INCLUDE_DIR static|dispatch: compiles each *.hpp by itself; names those that fail.
set -euo pipefail
compiler=$1 flags=$2 include=$3 mode=$4
[[ $mode == dispatch ]] && extra=-DTINYLLAMA_DISPATCH || extra=-UTINYLLAMA_DISPATCH

check() {
  local header=$1
  # Headers of optional packages are checked where the package is.
  case $header in
    tinyllama/tensor/xtensor.hpp) grep -q XTENSOR "$flags" || return 0 ;;
    tinyllama/distributed/mpi.hpp) grep -q TINYLLAMA_MPI "$flags" || return 0 ;;
    tinyllama/cuda.hpp | tinyllama/cuda_training.hpp | tinyllama/kernels/cuda/cudnn*.hpp) return 0 ;;
  esac
  printf '#include "%s"\n' "$header" |
    "$compiler" @"$flags" "$extra" -fsyntax-only -x c++ - || { echo "does not compile alone: $header"; return 1; }
}
export -f check
export compiler flags extra

cd "$include"
# Under dispatch headers include least, so that is where a missing #include shows. Static dispatch: the headers that it changes, and the whole.
if [[ $mode == dispatch ]]; then
  mapfile -t headers < <(find tinyllama -name '*.hpp' | sort)
else
  mapfile -t headers < <({ grep -rlE 'TINYLLAMA_DISPATCH|-inl\.h"' --include='*.hpp' tinyllama; ls tinyllama/*.hpp; } | sort -u)
fi
(( ${#headers[@]} > 0 )) || { echo "no headers under $include"; exit 1; }
printf '%s\n' "${headers[@]}" | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} bash -c 'check {}'
echo "${#headers[@]} headers compile alone ($mode)"
