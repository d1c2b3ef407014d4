#!/usr/bin/env bash
# Table 6: the head's local context: none, concatenated neighbours, compressed neighbours, in the time of 100 epochs of
# the compressed ones; (128, 4096) codes, constant guidance.  WINDOW: side of the window (5).
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
toy || DUAL="dual-128-$DETAIL"
window="" suffix=""
if [ "${WINDOW:-5}" != 5 ]; then window="--window-size $WINDOW" suffix="-$WINDOW"; fi
PRESET_TWO=(--guidance constant --cfg-scale "$CONSTANT")
tokenizer "$DUAL"; codes "$DUAL"
dual_row compressed "default$suffix" $window
epochs="${EPOCHS:-}"
equal_time "--context none" "$window"
dual_row none none --context none
EPOCHS="$epochs"
equal_time "--context concatenated $window" "$window"
dual_row concatenated "concatenated$suffix" --context concatenated $window
table 6 none concatenated compressed
