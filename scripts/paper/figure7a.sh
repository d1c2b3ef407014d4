#!/usr/bin/env bash
# Figure 7a: constant guidance over its scale; PAG-CFG with the range that the checkpoint carries (table 12) is a horizontal line.
# MODELS: the sizes (GPT-B GPT-L); 300 epochs, 24x24 tokens.  Ours: the steps between the scales.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
scales=(1.0 1.25 1.5 1.75 1.8 1.85 1.9 1.95 2.0 2.25 2.5 3.0)
toy && models=GPT-tiny || models="${MODELS:-GPT-B GPT-L}"
ranges=()
for scale in "${scales[@]}"; do ranges+=("$scale:$scale"); done
for MODEL in $models; do
    folder="$OUT/figure7a-$(variant)"
    sweep "$folder" --ranges carried "${ranges[@]}" --guidance attention "$@"
    figures "$MODEL-pag" "$folder/sweep.json" --keys carried figures
    for scale in "${scales[@]}"; do figures "$MODEL-$scale" "$folder/sweep.json" --keys "$scale:$scale" figures; done
done
plot 7a "$FIGURES"
