#!/bin/sh
# Makes the virtual environment, with every version pinned by hash. llama-cpp-python comes as source and is compiled once: pip keeps
# the wheel that it built, so the next environment takes seconds.
set -eu
python=$1
venv=$2

say() { printf '%s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 1; }
"$python" -m venv "$venv" || { say "this Python has no venv: install python3-venv"; exit 1; }

pip="$venv/bin/python -m pip --disable-pip-version-check"
log=$venv/setup.log
say "Setting up $venv (once)."
say "  llama-cpp-python is compiled from its source package unless pip kept the wheel: about 3 minutes on 2 cores."
say "  Everything that happens is in $log."

# Only what a test job uses is built, and built in less time; whoever sets CMAKE_ARGS, for CUDA say, has the build of its own defaults.
if [ -z "${CMAKE_ARGS:-}" ]; then
  export CMAKE_ARGS="'-DCMAKE_PROJECT_INCLUDE=$(pwd)/.ci/llama_cpp.cmake'"
fi

$pip install --quiet --upgrade pip >"$log" 2>&1 || { cat "$log"; exit 1; }
$pip install --require-hashes --requirement requirements.lock --verbose >>"$log" 2>&1 &
job=$!
trap 'kill $job 2>/dev/null || true' INT TERM

began=$(date +%s)
shown=""
while kill -0 $job 2>/dev/null; do
  sleep 5
  step=$(grep -aoE '^ *\[[0-9]+/[0-9]+\]|^Collecting [A-Za-z0-9_-]+|^Building wheel[^(]*|^Installing collected packages' "$log" | tail -n 1 | tr -s ' ')
  now=$(($(date +%s) - began))
  if [ -n "$step" ] && [ "$step" != "$shown" ]; then
    say "  ${now}s $step"
    shown=$step
  fi
done
wait $job || { tail -n 40 "$log"; say "Setting up failed; the whole log is $log"; exit 1; }
$pip install --quiet --no-deps --no-build-isolation --editable . >>"$log" 2>&1 || { tail -n 40 "$log"; exit 1; }
# Where Python may not write what it compiled (PYTHONDONTWRITEBYTECODE, a tree that is read-only later), each start would compile it again.
"$venv/bin/python" -m compileall -q reconciler >>"$log" 2>&1 || true  # pip compiles what it installs by itself
say "Ready after $(($(date +%s) - began))s."
