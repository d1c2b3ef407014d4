#!/usr/bin/env bash
# All systems at equal training time on the bundled images, several seeds: bits per image, Fréchet distance and class accuracy
# by a small classifier, samples per second.  SEEDS="0 1 2"; TOY_SECONDS: training time of each; SYSTEMS: which.
export TOY=1
seeds="${SEEDS:-0 1 2}" systems="${SYSTEMS:-llamagen iar ctf iar2 alternating grouped independent hierarchical}"
SCRIPT=compare
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/systems.sh"
tokenizers
reconstruct single "$ONE"
reconstruct dual "$DUAL"
for SEED in $seeds; do
    for system in $systems; do "$system" "$system-seed$SEED"; done
done
table comparison $systems
