#!/usr/bin/env bash
# A TPU slice without Kubernetes: the same command on every host.
#
#   export TPU_NAME=lens ZONE=us-east5-b                  # and PROJECT, if it is not gcloud's default
#   launch/tpu_vm.sh install                              # copies the last commit to every host and installs it
#   launch/tpu_vm.sh train quickstart --out SHARED/runs/quickstart --data.path SHARED/data/openmoji
#   launch/tpu_vm.sh log                                  # follows the log of the first host
#   launch/tpu_vm.sh stop                                 # the trainer saves and leaves; train goes on from there
#
# SHARED is a folder that all hosts see (Filestore, or a bucket mounted with gcsfuse).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

: "${TPU_NAME:?name of the TPU}" "${ZONE:?zone of the TPU}"
place=(--zone "$ZONE")
[[ -n ${PROJECT:-} ]] && place+=(--project "$PROJECT")

on_hosts() { # WHICH COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker="$1" --command="$2"
}

train() {
  local arguments
  # Quoted once more, for the shell of the host.
  arguments=$(printf '%q ' "$@")
  # LENS_DISTRIBUTED: a bare TPU VM has no variable that names its peers, so JAX is told to ask for them.
  # setsid and nohup: the run must outlive the ssh connection.
  on_hosts all "cd lens-jax && source .venv/bin/activate && export LENS_DISTRIBUTED=1 && \
    { setsid nohup launch/with_flags.sh tpu lens-jax train $arguments >train.log 2>&1 </dev/null & \
      echo \$! >train.pid; }"
}

case ${1:-} in
  install)
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format tar.gz --prefix lens-jax/ --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:lens-jax.tar.gz" "${place[@]}" --worker=all
    # The images of TPU VMs come with Python 3.10, which is too old.
    python=${PYTHON:-python3.11}
    on_hosts all "tar -xzf lens-jax.tar.gz && cd lens-jax && \
      { command -v $python || sudo apt-get install -y -q $python-venv; } && \
      $python -m venv .venv && .venv/bin/pip install -q '.[tpu,demo]'"
    ;;
  train)
    shift
    [[ $# -gt 0 ]] || { echo "train what? give a config" >&2; exit 2; }
    train "$@"
    ;;
  log)
    on_hosts 0 "tail -n 50 -f lens-jax/train.log"
    ;;
  stop)
    on_hosts all "kill -TERM \"\$(cat lens-jax/train.pid)\""
    ;;
  *)
    echo "usage: launch/tpu_vm.sh install|train|log|stop" >&2
    exit 2
    ;;
esac
