#!/usr/bin/env bash
# Table 3: LlamaGen, IAR, CTF and IAR2 for one size and grid.  MODEL=GPT-B SIZE=256|384 EPOCHS=50|300.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
model="${MODEL:-GPT-B}" size="${model#GPT-}"
tokenizers
for system in llamagen iar ctf iar2; do
    "$system" "$system-$size"
done
table "3-$(( ${SIZE:-384} / 16 ))-$EPOCHS" "llamagen-$size" "iar-$size" "ctf-$size" "iar2-$size"
