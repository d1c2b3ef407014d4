#!/usr/bin/env bash
# Extract the codes of an image set into one memory-mapped file.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt runs/vq/dual --data-path DIR --code-path DIR
source "$(dirname "$0")/../setup.sh"
launch autoregressive/train/extract_codes_c2i.py "$@"
