#!/usr/bin/env bash
# Table 5: prediction paradigms at equal training time, (128, 4096) codes, without local context and PAG-CFG.
# Full scale: equal time means other numbers of epochs; set EPOCHS_alternating, EPOCHS_grouped, EPOCHS_independent from a probe.
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
rows=(alternating grouped independent hierarchical)
[ "$TOY" = 1 ] || SEMANTIC=128
[ "$TOY" = 1 ] && name=dual || name=dual-128
tokenizer "$name" dual $SEMANTIC $DETAIL
codes "$name"
for row in "${rows[@]}"; do
    epochs="EPOCHS_$row" length=()
    [ -n "${!epochs:-}" ] && length=(--epochs "${!epochs}")
    gpt "table5-$row" "$name" --paradigm "$row" --context none ${length[@]+"${length[@]}"}
    score "$row" "table5-$row" "$name" --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$row" "table5-$row" "$name"
done
table 5 "${rows[@]}"
