#!/bin/sh
# Makes a release in dist/: builds the last commit twice to the same bytes, tries the wheel as an ordinary user, and writes the release
# notes from the newest section of CHANGELOG.md. Publishes nothing.
set -eu
python=$(realpath --no-symlinks "$1")

say() { printf '%s\n' "$*"; }

as_user() {
  if [ "$(id -u)" = 0 ]; then
    setpriv --reuid 65534 --regid 65534 --clear-groups env HOME="$work/home" "$@"
  else
    env HOME="$work/home" "$@"
  fi
}

find_python() {
  for candidate in "$("$python" -c 'import sys; print(sys._base_executable)')" /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11; do
    if as_user "$candidate" -c 'import sqlite3, ssl, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  say "no Python that an ordinary user can start: install python3 (3.11 or newer)" >&2
  exit 1
}

build() { # FOLDER: builds in a copy of its own, so that nothing that is not committed gets in
  mkdir -p "$1/source"
  git archive HEAD | tar -x -C "$1/source"
  (cd "$1/source" && "$python" -m hatchling build --directory "$1/dist" >"$1/log" 2>&1) || { cat "$1/log"; exit 1; }
}

[ -z "$(git status --porcelain --untracked-files=no)" ] || { say "there are changes that are not committed"; exit 1; }
version=$(git show HEAD:reconciler/__init__.py | sed -n 's/^__version__ = "\(.*\)"$/\1/p')
newest=$(git show HEAD:CHANGELOG.md | sed -n 's/^## \([^ ]*\).*/\1/p' | head -n 1)
[ "$newest" = "$version" ] || { say "the newest section of CHANGELOG.md is $newest, the version is $version"; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

build "$work/first"
(umask 077 && TZ=Asia/Tokyo LC_ALL=C build "$work/second/in/another/place")
diff -r "$work/first/dist" "$work/second/in/another/place/dist" || { say "two builds of one commit differ"; exit 1; }
say "built twice to the same bytes"

base=$(find_python)
"$base" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" --disable-pip-version-check -qq install "$work"/first/dist/*.whl
mkdir -p "$work/home/node"
[ "$(id -u)" != 0 ] || chown 65534:65534 "$work/home/node"
for file in root.json snapshot.json; do
  git show "HEAD:$file" >"$work/home/$file"
done
reconcile() {
  say "\$ reconcile $*"
  (cd "$work/home/node" && as_user "$work/venv/bin/reconcile" "$@" >"$work/output" 2>&1) || { cat "$work/output"; exit 1; }
}
reconcile --help
reconcile init --root "$work/home/root.json" --snapshot "$work/home/snapshot.json"
reconcile lock
reconcile plan
git show HEAD:models.lock | cmp - "$work/home/node/models.lock"
as_user "$work/venv/bin/reconcile" --version
[ "$(as_user "$work/venv/bin/reconcile" --version)" = "reconcile, version $version" ]
say "the wheel works for an ordinary user, without llama-cpp-python"

rm -rf dist
mkdir dist
cp "$work"/first/dist/* dist/
git show HEAD:CHANGELOG.md | awk '/^## /{ section++; next } section == 1' | sed '/./,$!d' >dist/NOTES.md
(cd dist && sha256sum reconcile_models-* | tee SHA256SUMS)
say "dist/ holds reconcile-models $version and its notes"
