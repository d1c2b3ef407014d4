#!/usr/bin/env bash
# Figure 7b: FID and inception score of LlamaGen, IAR and IAR2 over the number of parameters.  Full scale: trains nothing, but
# draws what table3.sh has measured with this SIZE, EPOCHS and SEED (384, 300, 0) beside the published points.
# Toy: two sizes, GPT-tiny and GPT-small, in equal time, on axes of their own.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
if toy; then
    tokenizers
    for TOY_MODEL in GPT-tiny GPT-small; do
        size="${TOY_MODEL#GPT-}"
        llamagen "llamagen-$size"; parameters "llamagen-$size" default "$ONE"
        iar "iar-$size"; parameters "iar-$size" iar "$ONE"
        iar2 "iar2-$size"; parameters "iar2-$size" default "$DUAL"
    done
    NOTE=", and GPT-small"
    plot 7b "$FIGURES"
else
    shopt -s nullglob  # where nothing is measured the published points are drawn alone
    plot 7b "$OUT"/figures/table3-*-"$SIZE-$EPOCHS-seed$SEED"
fi
