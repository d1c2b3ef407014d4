#!/usr/bin/env bash
# Table 5: prediction paradigms at equal training time, (128, 4096) codes, without local context and PAG-CFG.
# Full scale: equal time means other numbers of epochs; set EPOCHS_alternating, EPOCHS_grouped, EPOCHS_independent from a probe.
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
rows=(alternating grouped independent hierarchical)
[ "$TOY" = 1 ] || DUAL="dual-128-$DETAIL"
PRESET_TWO=(--guidance constant --cfg-scale "$CONSTANT")
tokenizer "$DUAL"; codes "$DUAL"
epochs="${EPOCHS:-}"
for row in "${rows[@]}"; do
    own="EPOCHS_$row"
    EPOCHS="${!own:-$epochs}"
    "$row" "$row"
done
table 5 "${rows[@]}"
