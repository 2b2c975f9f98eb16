#!/usr/bin/env bash
# Set the compiler flags of a platform and the compilation cache, then become the command, which gets its signals:
#
#   launch/with_flags.sh gpu lens-jax train quickstart
#
# What the environment has set already wins: XLA takes the last of two equal flags.
set -euo pipefail

usage="usage: launch/with_flags.sh gpu|tpu COMMAND [ARGUMENTS]"
platform=${1:?$usage}
shift
: "${1:?$usage}"
list="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/flags/$platform.txt"
[[ -f $list ]] || { echo "no flags for '$platform'; $usage" >&2; exit 2; }
flags=$(grep -o '^--[^ ]*' "$list" | paste -sd ' ')

case $platform in
  gpu)
    export XLA_FLAGS="$flags ${XLA_FLAGS:-}"
    # Most of the memory for XLA's pool; the rest is for NCCL's buffers and cuDNN's workspaces.
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
    ;;
  tpu)
    export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS:-}"
    ;;
esac

# A restarted run finds its programs compiled. One process writes, all read: best on a disk that all nodes share.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/lens-jax/compiled}
mkdir -p "$JAX_COMPILATION_CACHE_DIR"

exec "$@"
