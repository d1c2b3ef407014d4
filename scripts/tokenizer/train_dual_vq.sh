#!/usr/bin/env bash
# Train IAR2's tokenizer: stage 1 (semantic), then stage 2 (semantic + detail) from its result.
#   bash scripts/tokenizer/train_dual_vq.sh --data-path DIR [options of both stages]
# --run-dir, or RUN_DIR (runs/vq), holds the runs semantic/ and dual/.  STAGE1 and STAGE2 hold options of one stage alone.
# On all GPUs of this node (NPROC, NNODES: setup.sh).
source "$(dirname "$0")/../setup.sh"
RUN_DIR="${RUN_DIR:-runs/vq}" previous=""
for word in "$@"; do
    case "$word" in --run[-_]dir=*) RUN_DIR="${word#*=}" ;; esac
    case "$previous" in --run[-_]dir) RUN_DIR="$word" ;; esac
    previous="$word"
done
train=tokenizer/tokenizer_image/vq_train.py
launch "$train" --stage semantic "$@" ${STAGE1:-} --run-dir "$RUN_DIR/semantic"
launch "$train" --stage dual --init-from "$RUN_DIR/semantic" "$@" ${STAGE2:-} --run-dir "$RUN_DIR/dual"
