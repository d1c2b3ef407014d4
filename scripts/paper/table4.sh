#!/usr/bin/env bash
# Table 4: association of the codebooks, local context, PAG-CFG (B, 100 epochs).
source "$(dirname "$0")/common.sh"
tokenizer "$DUAL" "$PRODUCT"; codes "$DUAL" "$PRODUCT"
constant=(--guidance constant --cfg-scale "$CONSTANT") pag=(--guidance attention --cfg-scale $RANGE)
# ablate CODES ROWS: without and with context
ablate() {
    gpt none "$1" --context none
    gpt default "$1"
    score "$2" none "$1" "${constant[@]}"
    score "$2-pag" none "$1" "${pag[@]}"
    score "$2-context" default "$1" "${constant[@]}"
}
ablate "$PRODUCT" unassociated
ablate "$DUAL" associated
score iar2 default "$DUAL" "${pag[@]}"
table 4 unassociated associated unassociated-context unassociated-pag associated-context associated-pag iar2
