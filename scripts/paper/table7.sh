#!/usr/bin/env bash
# Table 7: single, unassociated dual and associated dual codebook, without local context and PAG-CFG (B, 100 epochs).  Ours:
# tokenizers with equal losses and phases, so that the rows differ by the codebook alone; the guidance scale.
source "$(dirname "$0")/common.sh"
single="equal-$ONE" unassociated="equal-$PRODUCT" associated="equal-$DUAL"
tokenizer "$single" "$unassociated" "$associated"; codes "$single" "$unassociated" "$associated"
# row ROW NAME CODES OPTIONS...
row() {
    reconstruct "$1" "$3"
    gpt "${@:2}"
    score "$1" "$2" "$3" --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$1" "$(gpt_run "$2" "$3")" "$3"
}
row single default "$single"
row unassociated none "$unassociated" --context none
row associated none "$associated" --context none
table 7 single unassociated associated
