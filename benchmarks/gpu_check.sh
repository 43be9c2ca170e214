#!/bin/sh
# Unpacks a bundle (benchmarks/gpu_bundle.py) on a machine with an NVIDIA GPU, and runs the check in it: no network, no registry.
#
#   sh benchmarks/gpu_check.sh BUNDLE [FOLDER]     BUNDLE: the archive, or the folder that it was unpacked to; FOLDER: for the results
#
# GO_ON=1 goes on without a GPU, to rehearse the rest: everything that needs one falls. PYTHON names the interpreter, 3.12.
set -eu

say() { printf 'gpu-check: %s\n' "$*"; }

bundle=${1:?name the bundle}
out=${2:-gpu-check-results}
if [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ] && [ ! -e /proc/driver/nvidia ] && [ -z "${GO_ON-}" ]; then
  say "this machine has no NVIDIA GPU: none of /dev/nvidiactl, /dev/dxg and /proc/driver/nvidia is there"
  exit 1
fi

find_python() {
  for candidate in "${PYTHON-}" python3 python3.12 "${HOME-}"/.pyenv/versions/3.12.*/bin/python3.12; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || continue
    command -v "$candidate"
    return
  done
}
python=$(find_python)
[ -n "$python" ] || { say "Python 3.12 is not here, and the bundle's wheels are for it; name it in PYTHON"; exit 1; }

mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/reconcile-gpu.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
if [ -f "$bundle" ]; then
  "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$bundle" "$work"
  bundle=$(echo "$work"/reconcile-gpu-*)
fi
bundle=$(cd "$bundle" && pwd)

site=$work/site-packages
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$bundle"/wheels/*.whl

# Bubblewrap is trusted only where root alone can change it.
if [ ! -e /usr/bin/bwrap ] && [ ! -e /usr/local/bin/bwrap ] && [ ! -e /bin/bwrap ] && [ "$(id -u)" = 0 ] && [ -n "${INSTALL_BWRAP-1}" ]; then
  mkdir -p /usr/local/lib/reconcile-gpu /usr/local/bin
  cp "$bundle"/programs/lib*.so* /usr/local/lib/reconcile-gpu/
  install -m 755 "$bundle/programs/bwrap" /usr/local/bin/bwrap
fi

# The CUDA backend: the one in the wheel, if it is there and loads; else the sources are built here, which takes nvcc, CMake and ninja.
PYTHONPATH=$site:$bundle/checkout
export PYTHONPATH
if ! "$python" -m benchmarks.gpu_backend --loads; then
  say "the CUDA backend is built here"
  "$python" -m benchmarks.gpu_backend "$bundle/backend" "$site/llama_cpp/lib" >"$out/backend.log" 2>&1 || say "building it failed; see $out/backend.log"
fi

cd "$bundle/checkout"
exec_ok=0
GPU_BENCH=$bundle/programs/llama-bench "$python" -m benchmarks.gpu_check --out "$out" ${GO_ON:+--go-on} || exec_ok=$?
exit $exec_ok
