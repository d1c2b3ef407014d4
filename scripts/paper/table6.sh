#!/usr/bin/env bash
# Table 6: the head's local context: none, concatenated neighbours, compressed neighbours, at equal training time.
source "$(dirname "$0")/common.sh"
rows=(none concatenated compressed)
tokenizer dual dual $SEMANTIC $DETAIL
codes dual
for row in "${rows[@]}"; do
    gpt "table6-$row" dual --context "$row" --window-size "${WINDOW:-5}"
    score "$row" "table6-$row" dual --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$row" "table6-$row" dual
done
table 6 "${rows[@]}"
