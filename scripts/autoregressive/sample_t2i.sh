#!/usr/bin/env bash
# Sample a file of prompts to an npz, and to GenEval's or PartiPrompts' folder.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/sample_t2i.sh --gpt-ckpt RUN --vq-ckpt runs/vq/dual --prompts prompts.txt --out samples/x.npz
source "$(dirname "$0")/../setup.sh"
launch autoregressive/sample/sample_t2i_ddp.py "$@"
