#!/usr/bin/env bash
# Figure 1: FID over the number of parameters, the systems of table 2.  Full scale: trains nothing, but draws what table2.sh and
# table3.sh have measured with this SIZE, EPOCHS and SEED (384, 300, 0) beside the published points.
# Toy: IAR2 and LlamaGen of one size, on axes of their own.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
if toy; then
    tokenizer "$ONE" "$DUAL"; codes "$ONE" "$DUAL"
    llamagen llamagen-tiny; parameters llamagen-tiny default "$ONE"
    iar2 iar2-tiny; parameters iar2-tiny default "$DUAL"
    plot 1 "$FIGURES"
else
    shopt -s nullglob  # where nothing is measured the published points are drawn alone
    plot 1 "$OUT"/figures/table[23]-*-"$SIZE-$EPOCHS-seed$SEED"
fi
