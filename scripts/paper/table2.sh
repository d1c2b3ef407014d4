#!/usr/bin/env bash
# Table 2: IAR2 without and with rejection sampling (XXL, 24x24, 300 epochs; MODEL, SIZE and EPOCHS for its other rows), beside
# all published rows.  CLASSIFIER: a timm model for ImageNet.  Ours: the rejection ratio 4 (a quarter of the candidates is kept)
# and ConvNeXt, since the paper says neither.
MODEL="${MODEL:-GPT-XXL}" EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
toy && classifier="$OUT/teacher.safetensors" || classifier="${CLASSIFIER:-convnext_large.fb_in22k_ft_in1k}"
tokenizer "$DUAL"; codes "$DUAL"
gpt default "$DUAL"
row="iar2-${MODEL#GPT-}"
score "$row" default "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"}
score "$row-rejection" default "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"} --rejection-ratio 4 --classifier "$classifier"
table 2 "$row" "$row-rejection" --all-published
