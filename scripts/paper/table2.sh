#!/usr/bin/env bash
# Table 2: IAR2 without and with rejection sampling (XXL, 24x24, 300 epochs; MODEL, SIZE and EPOCHS for its other rows).
# CLASSIFIER: a timm model for ImageNet.
MODEL="${MODEL:-GPT-XXL}" EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
toy && classifier="$OUT/teacher.safetensors" || classifier="${CLASSIFIER:-convnext_large.fb_in22k_ft_in1k}"
tokenizer "$DUAL"; codes "$DUAL"
gpt default "$DUAL"
row="iar2-${MODEL#GPT-}"
score "$row" default "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"}
score "$row-rejection" default "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"} --rejection-ratio 4 --classifier "$classifier"
table 2 "$row" "$row-rejection"
