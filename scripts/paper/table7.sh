#!/usr/bin/env bash
# Table 7: single, unassociated dual and associated dual codebook, without local context and PAG-CFG (B, 100 epochs).
source "$(dirname "$0")/common.sh"
tokenizer "$ONE" "$PRODUCT" "$DUAL"; codes "$ONE" "$PRODUCT" "$DUAL"
# row ROW NAME CODES OPTIONS...
row() {
    reconstruct "$1" "$3"
    gpt "${@:2}"
    score "$1" "$2" "$3" --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$1" "$(gpt_run "$2" "$3")" "$3"
}
row single default "$ONE"
row unassociated none "$PRODUCT" --context none
row associated none "$DUAL" --context none
table 7 single unassociated associated
