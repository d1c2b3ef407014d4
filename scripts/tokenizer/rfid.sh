#!/usr/bin/env bash
# rFID, PSNR, SSIM, LPIPS and usage of a tokenizer on an image set, in one JSON.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/tokenizer/rfid.sh --vq-ckpt runs/vq/dual --data-path DIR --out runs/rfid/dual
source "$(dirname "$0")/../setup.sh"
launch scripts/rfid.py "$@"
