#!/usr/bin/env bash
# Table 8: constant, progressive, and progressive attention-guided CFG of one IAR2 (B, 300 epochs; EPOCHS=100 for the other half).
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
tokenizer dual dual $SEMANTIC $DETAIL
codes dual
gpt iar2 dual
score constant iar2 dual --guidance constant --cfg-scale "$CONSTANT"
score progressive iar2 dual --guidance progressive --cfg-scale $RANGE
score attention iar2 dual --guidance attention --cfg-scale $RANGE
table 8 constant progressive attention
