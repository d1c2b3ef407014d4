#!/usr/bin/env bash
# Reconstruct an image set: npz for rFID, and PSNR, SSIM, LPIPS.  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/tokenizer/reconstruction_vq.sh --vq-ckpt runs/vq/dual --data-path DIR --out samples/reconstructed.npz
source "$(dirname "$0")/../setup.sh"
launch tokenizer/tokenizer_image/reconstruction_vq_ddp.py "$@"
