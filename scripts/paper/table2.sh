#!/usr/bin/env bash
# Table 2: IAR2 without and with rejection sampling (XXL, 24x24, 300 epochs).  CLASSIFIER: a timm model for ImageNet.
MODEL="${MODEL:-GPT-XXL}" EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
[ "$TOY" = 1 ] && classifier="$OUT/teacher.safetensors" || classifier="${CLASSIFIER:-convnext_large.fb_in22k_ft_in1k}"
tokenizer "$DUAL"; codes "$DUAL"
gpt default "$DUAL"
score iar2 default "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"}
score iar2-rejection default "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"} --rejection-ratio 4 --classifier "$classifier"
table 2 iar2 iar2-rejection
