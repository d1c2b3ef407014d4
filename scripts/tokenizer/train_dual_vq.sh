#!/usr/bin/env bash
# Train IAR2's tokenizer: stage 1 (semantic), then stage 2 (semantic + detail) from its result.
#   bash scripts/tokenizer/train_dual_vq.sh --data-path DIR [options of both stages]
# RUN_DIR (runs/vq) holds the runs semantic/ and dual/.  STAGE1 and STAGE2 hold options of one stage alone.
# NPROC processes a node (default: the GPUs seen, or 1).
source "$(dirname "$0")/../setup.sh"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
RUN_DIR="${RUN_DIR:-runs/vq}"
train="$REPOSITORY/tokenizer/tokenizer_image/vq_train.py"
launch "$train" --stage semantic --run-dir "$RUN_DIR/semantic" "$@" ${STAGE1:-}
launch "$train" --stage dual --run-dir "$RUN_DIR/dual" --init-from "$RUN_DIR/semantic" "$@" ${STAGE2:-}
