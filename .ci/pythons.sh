#!/bin/sh
# Runs pytest with the given arguments on each supported Python beside 3.11 that is installed here. Every pinned package is installed
# but llama-cpp-python.
set -eu

find_python() {
  for candidate in "$(command -v "python$1" || true)" "${HOME-}/.pyenv/versions/$1".*/bin/"python$1"; do
    # A shim on the path may name an interpreter that it cannot start.
    "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != tuple(map(int, sys.argv[1].split("."))))' "$1" 2>/dev/null || continue
    echo "$candidate"
    return
  done
}

install() {
  "$1" -m venv --clear "$2"
  awk '/^[^ #]/ { left_out = /^llama-cpp-python==/ } !left_out' requirements.lock >"$2/requirements.txt"
  "$2/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
    --requirement "$2/requirements.txt"
  "$2/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
  touch "$2/.ready"
}

failed=""
for version in 3.12 3.13; do
  python=$(find_python "$version")
  if [ -z "$python" ]; then
    echo "Python $version: not installed here, not tested"
    continue
  fi
  venv=.venv-$version
  [ "$venv/.ready" -nt requirements.lock ] || install "$python" "$venv"
  echo "Python $version: $("$venv/bin/python" --version), $python"
  "$venv/bin/python" -m pytest "$@" || failed="$failed $version"
done
[ -z "$failed" ] || { echo "Failed on Python$failed"; exit 1; }
