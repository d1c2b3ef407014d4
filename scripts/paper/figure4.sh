#!/usr/bin/env bash
# Figure 4: reconstruction and generation over the size of a single codebook, beside IAR2's dual codebook.
source "$(dirname "$0")/common.sh"
toy && sizes=(64 256 1024 2048) || sizes=(1024 4096 16384 65536)
rows=("${sizes[@]/#/single-}" "$DUAL")
for row in "${rows[@]}"; do
    tokenizer "$row"; codes "$row"
    reconstruct "$row" "$row"
    gpt default "$row"
    score "$row" default "$row" --guidance constant --cfg-scale "$CONSTANT"
done
table figure4 "${rows[@]}"
