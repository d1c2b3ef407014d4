#!/usr/bin/env bash
# Figure 4: reconstruction and generation over the size of a single codebook (LlamaGen-B), beside IAR2's dual codebook: a table
# and a picture.  The paper speaks of seven sizes, "from 256, 1k, 4k, ..., to 256k"; the powers of four that it lists are six.
# Ours: 100 epochs and the guidance, which the paper does not say here.  Published points: the two FIDs that its text states.
source "$(dirname "$0")/common.sh"
toy && sizes=(64 256 1024 2048) || sizes=(256 1024 4096 16384 65536 262144)
rows=("${sizes[@]/#/single-}" "$DUAL")
for row in "${rows[@]}"; do
    tokenizer "$row"; codes "$row"
    reconstruct "$row" "$row"
    gpt default "$row"
    score "$row" default "$row" --guidance constant --cfg-scale "$CONSTANT"
done
table figure4 "${rows[@]}"
plot 4 "$FIGURES"
