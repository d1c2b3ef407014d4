#!/usr/bin/env bash
# Set up the environment where needed and run the tests; arguments go to pytest.
TOOLS=1 source "$(dirname "$0")/setup.sh"
cd "$REPOSITORY"
exec "$PYTHON" -m pytest "$@"
