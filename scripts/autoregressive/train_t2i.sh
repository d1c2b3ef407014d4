#!/usr/bin/env bash
# Train a GPT from captions, as train_c2i.sh does from classes.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/train_t2i.sh --gpt-model GPT-XL --code-path DIR --epochs 50
source "$(dirname "$0")/../setup.sh"
launch autoregressive/train/train_t2i.py "$@"
