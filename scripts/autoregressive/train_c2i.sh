#!/usr/bin/env bash
# Train a GPT by table 11's recipe for its size and grid.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/train_c2i.sh --gpt-model GPT-XXL --code-path DIR
source "$(dirname "$0")/../setup.sh"
launch autoregressive/train/train_c2i.py "$@"
