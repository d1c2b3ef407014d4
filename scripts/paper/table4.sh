#!/usr/bin/env bash
# Table 4: association of the codebooks, local context, PAG-CFG (B, 100 epochs).  Ours: tokenizers with equal losses and phases,
# so that the rows differ by the codebook alone; both guidances.
source "$(dirname "$0")/common.sh"
associated="equal-$DUAL" unassociated="equal-$PRODUCT"
tokenizer "$associated" "$unassociated"; codes "$associated" "$unassociated"
constant=(--guidance constant --cfg-scale "$CONSTANT") pag=(--guidance attention --cfg-scale $RANGE)
# ablate CODES ROWS: without and with context
ablate() {
    gpt none "$1" --context none
    gpt default "$1"
    score "$2" none "$1" "${constant[@]}"
    score "$2-pag" none "$1" "${pag[@]}"
    score "$2-context" default "$1" "${constant[@]}"
}
ablate "$unassociated" unassociated
ablate "$associated" associated
score iar2 default "$associated" "${pag[@]}"
table 4 unassociated associated unassociated-context unassociated-pag associated-context associated-pag iar2 --all-published
