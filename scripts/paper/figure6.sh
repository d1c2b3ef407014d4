#!/usr/bin/env bash
# Figure 6: attention to the class (its logarithm) and guidance scale of every cell, over images of one IAR2 with the guidance
# that its checkpoint carries.  Ours: B, 300 epochs and the classes, which the paper does not say.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
tokenizer "$DUAL"; codes "$DUAL"
gpt default "$DUAL"
toy && classes=(--classes {0..9}) || classes=()
run "$PYTHON" autoregressive/sample/guidance_map.py --gpt-ckpt "$(gpt_run default "$DUAL")" --vq-ckpt "$(vq "$DUAL")" \
    --seed "$SEED" ${classes[@]+"${classes[@]}"} --out "$OUT/figure6.png" "$@"
