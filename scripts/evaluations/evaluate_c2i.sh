#!/usr/bin/env bash
# ADM's evaluation of an npz: FID, sFID, inception score, precision and recall.  One process.
#   bash scripts/evaluations/evaluate_c2i.sh VIRTUAL_imagenet256_labeled.npz samples/xxl.npz
source "$(dirname "$0")/../setup.sh"
NPROC=1 NNODES=1 launch evaluations/c2i/evaluator.py "$@"
