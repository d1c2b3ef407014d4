#!/usr/bin/env bash
# Train a tokenizer in one stage: LlamaGen's single codebook, or with --quantizer product the unassociated dual codebook.
#   bash scripts/tokenizer/train_vq.sh --data-path DIR [options of vq_train.py]
# RUN_DIR (runs/vq/single) holds the run; NPROC processes a node (default: the GPUs seen, or 1).
source "$(dirname "$0")/../setup.sh"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
launch "$REPOSITORY/tokenizer/tokenizer_image/vq_train.py" --stage single --run-dir "${RUN_DIR:-runs/vq/single}" "$@"
