#!/usr/bin/env bash
# Figure 8: training losses by model size.  MODELS names the sizes (default GPT-B GPT-L GPT-XL GPT-XXL; toy: two widths of head).
source "$(dirname "$0")/common.sh"
tokenizer dual dual $SEMANTIC $DETAIL
codes dual
runs=()
if [ "$TOY" = 1 ]; then
    for layers in 1 2; do gpt "head-$layers" dual --head-layers "$layers"; runs+=("$OUT/gpt/head-$layers$VARIANT"); done
else
    for model in ${MODELS:-GPT-B GPT-L GPT-XL GPT-XXL}; do gpt "size-$model" dual --gpt-model "$model"; runs+=("$OUT/gpt/size-$model$VARIANT"); done
fi
for metric in loss_semantic loss_detail; do
    "$PYTHON" scripts/paper/plot_losses.py "${runs[@]}" --metric "$metric" --out "$OUT/figure8-$metric.png"
done
