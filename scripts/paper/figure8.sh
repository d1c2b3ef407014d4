#!/usr/bin/env bash
# Figure 8: training losses by model size, 16x16 tokens (toy: one and two head layers).
# MODELS: the sizes (GPT-B GPT-L GPT-XL GPT-XXL).
SIZE="${SIZE:-256}" EPOCHS="${EPOCHS:-50}"
source "$(dirname "$0")/common.sh"
tokenizer "$DUAL"; codes "$DUAL"
runs=()
if toy; then
    gpt head-1 "$DUAL" --head-layers 1
    gpt default "$DUAL"
    runs=("$(gpt_run head-1 "$DUAL")" "$(gpt_run default "$DUAL")")
else
    for MODEL in ${MODELS:-GPT-B GPT-L GPT-XL GPT-XXL}; do
        gpt default "$DUAL"
        runs+=("$(gpt_run default "$DUAL")")
    done
fi
for metric in loss_semantic loss_detail; do
    run "$PYTHON" scripts/paper/plot_losses.py "${runs[@]}" --metric "$metric" --out "$OUT/figure8-$metric.png"
done
