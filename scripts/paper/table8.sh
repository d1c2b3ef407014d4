#!/usr/bin/env bash
# Table 8: constant, progressive, and progressive attention-guided CFG of one IAR2 (B, 300 epochs; EPOCHS=100 for the other half).
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
tokenizer "$DUAL"; codes "$DUAL"
gpt default "$DUAL"
score constant default "$DUAL" --guidance constant --cfg-scale "$CONSTANT"
score progressive default "$DUAL" --guidance progressive --cfg-scale $RANGE
score attention default "$DUAL" --guidance attention --cfg-scale $RANGE
table "8-${EPOCHS}" constant progressive attention
