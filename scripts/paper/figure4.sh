#!/usr/bin/env bash
# Figure 4: reconstruction and generation over the size of a single codebook, beside IAR2's dual codebook.
source "$(dirname "$0")/common.sh"
[ "$TOY" = 1 ] && sizes=(64 256 1024 2048) || sizes=(1024 4096 16384 65536)
rows=()
for size in "${sizes[@]}" dual; do
    if [ "$size" = dual ]; then
        name=dual
        tokenizer dual dual $SEMANTIC $DETAIL
    else
        name="single-$size"
        tokenizer "$name" single "$size"
    fi
    reconstruct "$name" "$name"
    codes "$name"
    gpt "figure4-$name" "$name"
    score "$name" "figure4-$name" "$name" --guidance constant --cfg-scale "$CONSTANT"
    rows+=("$name")
done
table figure4 "${rows[@]}"
