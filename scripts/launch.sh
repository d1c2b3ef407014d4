#!/usr/bin/env bash
# Start any Python script of this repository on all GPUs of this node, or of several nodes (NPROC and NNODES: setup.sh).
#   bash scripts/launch.sh autoregressive/train/evaluate_c2i.py --gpt-ckpt G --code-path C
# The script is named relative to the present folder or to the repository.
source "$(dirname "$0")/setup.sh"
script="${1:?name the script to start, for example autoregressive/train/train_c2i.py.}"
[[ "$script" = /* || ! -e "$script" ]] || script="$PWD/$script"
launch "$script" "${@:2}"
