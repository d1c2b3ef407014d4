#!/usr/bin/env bash
# Reproduce tables and figures of the paper; --help lists the options.
#   bash scripts/paper/run.sh table5 --scale toy
source "$(dirname "$0")/../setup.sh"
python "$REPOSITORY/scripts/paper/reproduce.py" "$@"
