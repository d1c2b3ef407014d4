#!/usr/bin/env bash
# All systems at equal training time on the bundled images, several seeds: bits an image, Fréchet distance and class accuracy
# by a small classifier, samples a second.  SEEDS="0 1 2"; TOY_SECONDS: training time of each; SYSTEMS: which.
export TOY=1
seeds="${SEEDS:-0 1 2}" systems="${SYSTEMS:-llamagen iar ctf iar2 alternating grouped independent hierarchical}"
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
for paradigm in alternating grouped independent hierarchical; do
    eval "$paradigm() { dual_row \"\$1\" --paradigm $paradigm --context none; }"
done
tokenizers
reconstruct single single
reconstruct dual dual
for seed in $seeds; do
    GPT+=(--seed "$seed") SAMPLE+=(--seed "$seed")
    for system in $systems; do "$system" "$system-seed$seed"; done
done
table comparison $systems
