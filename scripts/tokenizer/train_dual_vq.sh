#!/usr/bin/env bash
# Train IAR2's tokenizer: stage 1 (semantic), then stage 2 (semantic + detail) from its result.
#   bash scripts/tokenizer/train_dual_vq.sh --data-path DIR [options of both stages]
# --run-dir, or RUN_DIR (runs/vq), holds the runs semantic/ and dual/.  STAGE1 and STAGE2 hold options of one stage alone.
# NPROC processes a node (default: the GPUs seen, or 1); NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT as for torchrun.
source "$(dirname "$0")/../setup.sh"
NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
RUN_DIR="$(value --run-dir "${RUN_DIR:-runs/vq}" "$@")"
train="$REPOSITORY/tokenizer/tokenizer_image/vq_train.py"
launch "$train" --stage semantic "$@" ${STAGE1:-} --run-dir "$RUN_DIR/semantic"
launch "$train" --stage dual --init-from "$RUN_DIR/semantic" "$@" ${STAGE2:-} --run-dir "$RUN_DIR/dual"
