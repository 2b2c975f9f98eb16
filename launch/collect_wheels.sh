#!/usr/bin/env bash
# Collect what a machine with Python 3.12, jax and CUDA but no network lacks: wheels, in a folder.
#
#   launch/collect_wheels.sh [FOLDER [JAX [PACKAGE ...]]]      default: wheels 0.11.2
#
# JAX is the version there; each PACKAGE is one more that is there already, as tensorstore or pillow.
#
# Run it where there is a network, on the same kind of processor, with Python 3.12 (PYTHON=... names it). Then there:
#
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
#
# jax and what it brings (jaxlib, numpy, scipy, ...) are left out. The version of our own wheel names the commit.
set -euo pipefail

folder=${1:-wheels}
jax=${2:-0.11.2}
python=${PYTHON:-python3.12}
# Besides: with these tokenizers would download, which it never does here.
there=(huggingface-hub hf-xet httpx2 httpcore2 truststore "${@:3}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
largest=60000000

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
  { echo "'$python' is no Python 3.12; name one with PYTHON=..." >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

# A build leaves its traces in the source tree, so it gets a copy of what git has.
mkdir "$work/source" "$work/wheels"
git -C "$root" ls-files -z | tar -C "$root" --null -T - -c | tar -C "$work/source" -x
commit=$(git -C "$root" rev-parse --short=10 HEAD)
[[ -z $(git -C "$root" status --porcelain) ]] || commit+=.changed
printf '[egg_info]\ntag_build = +g%s\n' "$commit" > "$work/version.cfg"
DIST_EXTRA_CONFIG="$work/version.cfg" pip wheel -q --no-deps -w "$work/wheels" "$work/source"

# What this package and jax need together, less what jax needs alone.
resolve() { pip install -q --dry-run --ignore-installed --only-binary=:all: --report "$1" "${@:2}"; }
resolve "$work/jax.json" "jax==$jax"
resolve "$work/all.json" "jax==$jax" "$work"/wheels/lens_jax-*.whl
"$python" - "$work" lens-jax "${there[@]}" > "$work/wanted.txt" <<'PY'
import json, re, sys

work, *there = sys.argv[1:]
plain = lambda name: re.sub("[-_.]+", "-", name).lower()

def packages(report):
    with open(f"{work}/{report}.json") as file:
        metadata = [entry["metadata"] for entry in json.load(file)["install"]]
    return {plain(m["name"]): m["version"] for m in metadata}

left_out = {*packages("jax"), *map(plain, there)}
print("\n".join(f"{name}=={version}" for name, version in packages("all").items() if name not in left_out))
PY
pip download -q --no-deps --only-binary=:all: -d "$work/wheels" -r "$work/wanted.txt"

size=$(du -cb "$work"/wheels/*.whl | tail -1 | cut -f1)
(( size <= largest )) || { echo "the wheels are $size bytes, more than $largest" >&2; exit 1; }
mkdir -p "$folder"
rm -f "$folder"/*.whl
cp "$work"/wheels/*.whl "$folder/"
ls "$folder"
echo "$(ls "$folder"/*.whl | wc -l) wheels, $(( size / 1000000 )) MB, in $folder"
