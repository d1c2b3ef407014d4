#!/usr/bin/env bash
# CLIP score of samples with their captions.  One process.
#   bash scripts/evaluations/clip_score.sh samples/t2i.npz
source "$(dirname "$0")/../setup.sh"
NPROC=1 NNODES=1 launch evaluations/t2i/clip_score.py "$@"
