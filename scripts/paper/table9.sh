#!/usr/bin/env bash
# Table 9: a grid of guidance ranges from one IAR2 (B), the models loaded once.
EPOCHS="${EPOCHS:-300}"
source "$(dirname "$0")/common.sh"
sweep table9 "$@"
"$PYTHON" - "$OUT/table9$VARIANT/sweep.json" "$FIGURES" <<'CODE'
import json, pathlib, sys
for text, entry in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
    (pathlib.Path(sys.argv[2]) / f"{text.replace(':', '-')}.json").write_text(json.dumps(entry["figures"]))
CODE
table 9 1.5-2.25 1.5-2.5 1.5-2.75 1.5-3.0 1.75-2.25 1.75-2.5 1.75-2.75 1.75-3.0 1.75-3.5 2.0-2.5 2.0-2.75 2.0-3.0
