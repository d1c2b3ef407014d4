#!/usr/bin/env bash
# Make the reference npz of the validation images.  On as many processes as there are GPUs (NPROC, NNODES: setup.sh).
#   bash scripts/tokenizer/val.sh --data-path DIR --out samples/val256.npz
source "$(dirname "$0")/../setup.sh"
launch tokenizer/validation/val_ddp.py "$@"
