#!/usr/bin/env bash
# Table 13: reconstruction by LlamaGen's tokenizer and by IAR2's, beside all published rows.
source "$(dirname "$0")/common.sh"
tokenizer "$ONE" "$DUAL"
reconstruct llamagen "$ONE"
reconstruct iar2 "$DUAL"
table 13 llamagen iar2 --all-published
