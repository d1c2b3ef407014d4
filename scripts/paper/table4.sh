#!/usr/bin/env bash
# Table 4: association of the codebooks, local context, PAG-CFG (B, 100 epochs).
source "$(dirname "$0")/common.sh"
tokenizer dual dual $SEMANTIC $DETAIL
tokenizer product product $SEMANTIC $DETAIL
codes dual; codes product
constant=(--guidance constant --cfg-scale "$CONSTANT") pag=(--guidance attention --cfg-scale $RANGE)
for codebook in product dual; do
    [ "$codebook" = dual ] && name=associated || name=unassociated
    gpt "table4-$name" "$codebook" --context none
    gpt "table4-$name-context" "$codebook"
    score "$name" "table4-$name" "$codebook" "${constant[@]}"
    score "$name-pag" "table4-$name" "$codebook" "${pag[@]}"
    score "$name-context" "table4-$name-context" "$codebook" "${constant[@]}"
done
score iar2 table4-associated-context dual "${pag[@]}"
table 4 unassociated associated unassociated-context unassociated-pag associated-context associated-pag iar2
