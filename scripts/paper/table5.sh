#!/usr/bin/env bash
# Table 5: prediction paradigms in the time of 100 epochs of hierarchical prediction; (128, 4096) codes, no local context,
# constant guidance.
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
toy || DUAL="dual-128-$DETAIL"
PRESET_TWO=(--guidance constant --cfg-scale "$CONSTANT")
tokenizer "$DUAL"; codes "$DUAL"
epochs="${EPOCHS:-}"
for row in alternating grouped independent; do
    EPOCHS="$epochs"
    equal_time "--paradigm $row --context none" "--context none"
    "$row" "$row"
done
EPOCHS="$epochs"
hierarchical hierarchical
table 5 alternating grouped independent hierarchical
