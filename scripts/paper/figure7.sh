#!/usr/bin/env bash
# Figure 7a: constant guidance against ranges of PAG-CFG, from one IAR2.  7b and 7c are table 3 over MODEL and EPOCHS.
source "$(dirname "$0")/common.sh"
sweep "$OUT/figure7-$(variant)" --ranges 1.5:1.5 2:2 2.5:2.5 3:3 1.5:2.5 1.5:3 1.75:2.5 1.75:3 2:3 2:4 "$@"
