#!/usr/bin/env bash
# Figures 9 to 11: samples of twelve classes by one IAR2-XL at 384 pixels with the range of guidance that the paper names.
# Toy: the ten classes of the bundled images.
MODEL="${MODEL:-GPT-XL}" EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
tokenizer "$DUAL"; codes "$DUAL"
gpt default "$DUAL"
toy || RANGE="1.35 3"
# grid N "CLASSES" NAMES...: figure N, a row for each class
grid() {
    run "$PYTHON" autoregressive/sample/sample_c2i.py --gpt-ckpt "$(gpt_run default "$DUAL")" --vq-ckpt "$(vq "$DUAL")" \
        --guidance attention --cfg-scale $RANGE --seed "$SEED" --classes $2 --class-names "${@:3}" --out "$OUT/figure$1.png"
}
if toy; then
    grid 9 "0 1 2 3" T-shirt trousers pullover dress
    grid 10 "4 5 6 7" coat sandal shirt sneaker
    grid 11 "8 9" bag boot
else
    grid 9 "417 12 873 460" balloon "house finch" "triumphal arch" breakwater
    grid 10 "970 279 336 628" alp "Arctic fox" marmot liner
    grid 11 "272 780 832 985" coyote schooner stupa daisy
fi
