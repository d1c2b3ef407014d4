#!/usr/bin/env bash
# Set up the environment where needed and run the tests, on up to four cores; arguments go to pytest (-n 0: in one process).
TOOLS=1 source "$(dirname "$0")/setup.sh"
cd "$REPOSITORY"
cores="$(nproc)"
export OMP_NUM_THREADS=1  # a test beside another one takes a core
exec "$PYTHON" -m pytest -n "$((cores < 4 ? cores : 4))" --dist worksteal "$@"
