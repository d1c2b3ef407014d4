#!/usr/bin/env bash
# Extract the features of captions into one memory-mapped file.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/autoregressive/extract_text.sh --data-path DIR --text-path DIR
source "$(dirname "$0")/../setup.sh"
launch autoregressive/train/extract_text.py "$@"
