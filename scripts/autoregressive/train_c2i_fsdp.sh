#!/usr/bin/env bash
# Train a GPT as train_c2i.sh does, its weights and optimizer sharded by FSDP2.  On all GPUs (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/train_c2i_fsdp.sh --gpt-model GPT-XXL --code-path DIR
source "$(dirname "$0")/../setup.sh"
launch autoregressive/train/train_c2i.py --data-parallel fsdp "$@"
