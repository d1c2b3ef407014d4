#!/usr/bin/env bash
# Table 2: IAR2 without and with rejection sampling (XXL, 24x24, 300 epochs).  CLASSIFIER: a timm model for ImageNet.
source "$(dirname "$0")/common.sh"
[ "$TOY" = 1 ] && judge="$OUT/teacher.safetensors" || judge="${CLASSIFIER:-convnext_large.fb_in22k_ft_in1k}"
[ "$TOY" = 1 ] || GPT=(--gpt-model GPT-XXL --image-size "$SIZE" --seed "$SEED")
[ "$TOY" = 1 ] && range=(--cfg-scale $RANGE) || range=()  # full scale: table 12's
tokenizer dual dual $SEMANTIC $DETAIL
codes dual
gpt table2 dual
score iar2 table2 dual ${range[@]+"${range[@]}"}
score iar2-rejection table2 dual ${range[@]+"${range[@]}"} --rejection-ratio 4 --classifier "$judge"
table 2 iar2 iar2-rejection
