#!/usr/bin/env bash
# macros.sh COMPILER FLAGS_FILE INCLUDE_DIR: lists macros that our headers define, leave defined, and do not call TINYLLAMA_*.
set -euo pipefail
compiler=$1 flags=$2 include=$3
cd "$include"
# cpu/*-inl.h and dispatch.cpp speak Highway's protocol (HWY_*), which it defines and undefines itself.
grep -q TINYLLAMA_MPI "$flags" && without=() || without=(! -path tinyllama/distributed/mpi.hpp)
leaked=$(find tinyllama -name '*.hpp' ! -name xtensor.hpp ! -name cuda.hpp ! -name cuda_training.hpp ! -name 'cudnn*.hpp' "${without[@]}" | sort | sed 's/.*/#include "&"/' |
  "$compiler" @"$flags" -E -dD -x c++ - | awk '
    /^# [0-9]+ "/ { split($0, part, "\""); ours = part[2] ~ /(^|\/)tinyllama\/.*\.(hpp|h)$/; next }
    ours && /^#define / { name = $2; sub(/\(.*/, "", name); defined[name] = part[2] }
    /^#undef / { delete defined[$2] }
    END { for (name in defined) if (name !~ /^TINYLLAMA_/) print name " (" defined[name] ")" }')
if [[ -n $leaked ]]; then
  echo "macros that leak from our headers:"
  echo "$leaked"
  exit 1
fi
