#!/usr/bin/env bash
# Figure 7c: FID and inception score of IAR2 and LlamaGen over training epochs at one constant guidance scale, from the weights
# that one training keeps every KEEP_EVERY epochs (B, 24x24 tokens, 300 epochs).
# Toy: IAR2, whose steps take longer, trains for twice the time, so that both curves are about as long.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
tokenizer "$ONE" "$DUAL"; codes "$ONE" "$DUAL"
# epochs RUN: those whose weights a training has kept
epochs() {
    local folder
    if dry; then toy && echo 0000.50 || seq -f %04.0f 50 50 "$EPOCHS"; return; fi
    for folder in "$1"/snapshots/epoch-*; do
        [ ! -d "$folder" ] || echo "${folder##*/epoch-}"
    done
}
# curve SYSTEM CODES: train, then score every epoch
curve() {
    local epoch run kept; run="$(gpt_run default "$2")"
    gpt default "$2"
    kept="$(epochs "$run")"
    if [ -z "$kept" ]; then
        echo "error: $run has kept no weights: train longer or with a smaller KEEP_EVERY, after removing that folder." >&2
        exit 2
    fi
    for epoch in $kept; do
        SNAPSHOT="$epoch" score "$1-$epoch" default "$2" --guidance constant --cfg-scale "$CONSTANT"
    done
}
curve llamagen "$ONE"
TIME=$(( ${TOY_SECONDS:-0} * 2 )) curve iar2 "$DUAL"
NOTE=" (IAR2: twice as long)"
plot 7c "$FIGURES"
