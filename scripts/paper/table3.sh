#!/usr/bin/env bash
# Table 3: LlamaGen, IAR, CTF and IAR2 for one size and grid.  MODEL=GPT-B SIZE=256|384 EPOCHS=50|300.
source "$(dirname "$0")/common.sh"
model="${MODEL:-GPT-B}" size="${model#GPT-}" grid=$(( ${SIZE:-384} / 16 )) epochs="${EPOCHS:-300}"
[ "$TOY" = 1 ] || GPT=(--gpt-model "$model" --image-size "$SIZE" --epochs "$epochs" --seed "$SEED")
source "$(dirname "$0")/systems.sh"
tokenizers
for system in llamagen iar ctf iar2; do
    "$system" "$system-$size"
done
[ "$grid-$epochs" = 16-300 ] && ctf=("ctf-$size") || ctf=()
table "3-$grid-$epochs" "llamagen-$size" "iar-$size" ${ctf[@]+"${ctf[@]}"} "iar2-$size"
