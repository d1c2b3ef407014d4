#!/usr/bin/env bash
# Train a tokenizer in one stage: LlamaGen's single codebook, or another by --quantizer (product: table 7's unassociated
# dual codebook).  On all GPUs of this node (NPROC, NNODES: setup.sh).
#   bash scripts/tokenizer/train_vq.sh --data-path DIR
source "$(dirname "$0")/../setup.sh"
launch tokenizer/tokenizer_image/vq_train.py --stage single "$@"
