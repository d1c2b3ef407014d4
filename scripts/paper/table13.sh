#!/usr/bin/env bash
# Table 13: reconstruction by LlamaGen's tokenizer and by IAR2's.
source "$(dirname "$0")/common.sh"
tokenizer single single $SINGLE
tokenizer dual dual $SEMANTIC $DETAIL
reconstruct llamagen single
reconstruct iar2 dual
table 13 llamagen iar2
