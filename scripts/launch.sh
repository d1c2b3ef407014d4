#!/usr/bin/env bash
# Start any script of this repository on all GPUs of this node, or of several nodes.
#   bash scripts/launch.sh autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt G --vq-ckpt V --out samples.npz
# NPROC processes a node (default: the GPUs seen, or 1); NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT as for torchrun.
source "$(dirname "$0")/setup.sh"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
launch "$@"
