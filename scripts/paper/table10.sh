#!/usr/bin/env bash
# Table 10: the weight λ_s of the semantic loss (B, 100 epochs, constant guidance).
source "$(dirname "$0")/common.sh"
rows=()
tokenizer "$DUAL"; codes "$DUAL"
for weight in 0.5 1 2 3 5; do
    gpt "lambda-$weight" "$DUAL" --semantic-weight "$weight"
    score "lambda-$weight" "lambda-$weight" "$DUAL" --guidance constant --cfg-scale "$CONSTANT"
    rows+=("lambda-$weight")
done
table 10 "${rows[@]}"
