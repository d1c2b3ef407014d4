#!/usr/bin/env bash
# Figure 3: MSE and LPIPS against the distance of replaced codes, and the pictures (single codebook).
source "$(dirname "$0")/common.sh"
tokenizer "$ONE"
run "$PYTHON" tokenizer/tokenizer_image/code_distance.py --vq-ckpt "$(vq "$ONE")" --data-path "$VAL" "${IMAGES[@]}" \
    ${PERCEPTUAL[@]+"${PERCEPTUAL[@]}"} --out "$OUT/figure3" "$@"
