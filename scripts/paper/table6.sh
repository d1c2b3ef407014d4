#!/usr/bin/env bash
# Table 6: the head's local context: none, concatenated neighbours, compressed neighbours (B, 100 epochs).
# WINDOW: side of the window (5).
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
window=() suffix=""
if [ "${WINDOW:-5}" != 5 ]; then window=(--window-size "$WINDOW") suffix="-$WINDOW"; fi
PRESET_TWO=(--guidance constant --cfg-scale "$CONSTANT")
tokenizer "$DUAL"; codes "$DUAL"
dual_row none none --context none
dual_row concatenated "concatenated$suffix" --context concatenated ${window[@]+"${window[@]}"}
dual_row compressed "default$suffix" ${window[@]+"${window[@]}"}
table 6 none concatenated compressed
