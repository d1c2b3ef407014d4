#!/usr/bin/env bash
# Sample an npz for evaluation, 50 images of each class.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/sample_c2i.sh --gpt-ckpt runs/GPT-XXL-256 --vq-ckpt runs/vq/dual --out samples/xxl.npz
source "$(dirname "$0")/../setup.sh"
launch autoregressive/sample/sample_c2i_ddp.py "$@"
