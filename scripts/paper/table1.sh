#!/usr/bin/env bash
# Table 1: sizes of the semantic and the detail codebook, reconstruction and generation (B, 100 epochs; constant guidance,
# since its row 128, 4096 is table 6's).
#   DATA=... VAL=... REFERENCE=... bash scripts/paper/table1.sh      TOY=1 bash scripts/paper/table1.sh
source "$(dirname "$0")/common.sh"
scale=$(toy && echo 2 8 || echo 1 1)  # toy: half the semantic, an eighth of the detail codes
rows=(128-4096 256-4096 512-4096 256-2048 256-8192)
for row in "${rows[@]}"; do
    read -r semantic detail by_semantic by_detail <<< "${row/-/ } $scale"
    codes="dual-$((semantic / by_semantic))-$((detail / by_detail))"
    tokenizer "$codes"; codes "$codes"
    reconstruct "$row" "$codes"
    gpt default "$codes"
    score "$row" default "$codes" --guidance constant --cfg-scale "$CONSTANT"
done
NOTE=", half the semantic and an eighth of the detail codes" table 1 "${rows[@]}"
