#!/usr/bin/env bash
# Table 9: a grid of guidance ranges from one IAR2 (B), the models loaded once.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
folder="$OUT/table9-$(variant)"
rows=(1.5-2.25 1.5-2.5 1.5-2.75 1.5-3.0 1.75-2.25 1.75-2.5 1.75-2.75 1.75-3.0 1.75-3.5 2.0-2.5 2.0-2.75 2.0-3.0)
sweep "$folder" --ranges "${rows[@]/-/:}"
for row in "${rows[@]}"; do figures "$row" "$folder/sweep.json" --keys "${row/-/:}" figures; done
table 9 "${rows[@]}"
