#!/usr/bin/env bash
# The study of scripts/paper/README.md: what each idea of the paper is worth, on CIFAR-10 and Fashion-MNIST.  Options are
# study.py's; an interrupted study carries on by the same command.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python "$REPOSITORY/scripts/paper/study.py" "$@"
