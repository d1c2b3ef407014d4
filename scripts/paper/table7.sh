#!/usr/bin/env bash
# Table 7: single, unassociated dual and associated dual codebook, without local context and PAG-CFG (B, 100 epochs).
source "$(dirname "$0")/common.sh"
rows=(single unassociated associated)
tokenizer single single $SINGLE
tokenizer unassociated product $SEMANTIC $DETAIL
tokenizer associated dual $SEMANTIC $DETAIL
for row in "${rows[@]}"; do
    reconstruct "$row" "$row"
    codes "$row"
    gpt "table7-$row" "$row" --context none
    score "$row" "table7-$row" "$row" --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$row" "table7-$row" "$row"
done
table 7 "${rows[@]}"
