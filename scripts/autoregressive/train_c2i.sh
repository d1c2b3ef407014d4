#!/usr/bin/env bash
# Train a GPT with table 11's hyper-parameters for its size; every option of train_c2i.py can follow.
#   bash scripts/autoregressive/train_c2i.sh --gpt-model GPT-XXL --code-path DIR
# The run's folder is runs/MODEL-SIZE unless --run-dir says otherwise.
# NPROC processes a node (default: the GPUs seen, or 1); NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT as for torchrun.
source "$(dirname "$0")/../setup.sh"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"

run_dir="runs/$(value --gpt-model GPT-B "$@")-$(value --image-size 256 "$@")"
launch "$REPOSITORY/autoregressive/train/train_c2i.py" --run-dir "$run_dir" "$@"
