# Sourced by quickstart.sh, text_demo.sh and own_classes.sh, as `source phases.sh DEFAULT_OUT "$@"`: takes no words but --help, goes
# to the repository and sets OUT and SCALE.  Defines `steps N [LEAST]`, which scales a number of steps, and `phase NAME COMMAND...`,
# which runs a command unless it has finished before.
if [ $# -gt 1 ]; then
    case "$2" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;; esac
    echo "error: $(basename "$0") takes no options but was given '$2': set OUT and SCALE before the command, for example" \
        "OUT=runs/trial SCALE=0.02 bash $0." >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
enter_repository
OUT="${OUT:-$1}"
SCALE="${SCALE:-1}"
mkdir -p "$OUT/phases" 2>/dev/null || cannot_write "$OUT/phases"
if [ -e "$OUT/scale" ] && [ "$(cat "$OUT/scale")" != "$SCALE" ]; then
    echo "error: OUT $OUT was begun with SCALE=$(cat "$OUT/scale"), not $SCALE as now: choose another OUT or remove it." >&2
    exit 2
fi
keep "$OUT/scale" "$SCALE"

steps() { "$PYTHON" -c "import math; print(max(math.ceil($1 * $SCALE), ${2:-4}))"; }

# phase NAME COMMAND...: run a command unless it has finished before, and keep its seconds over all tries.
phase() {
    local name="$1" started before=0; shift
    [ ! -e "$OUT/phases/$name" ] || return 0
    echo "== $name" >&2
    [ ! -e "$OUT/phases/.$name" ] || before=$(cat "$OUT/phases/.$name")
    started=$(( $(date +%s) - before ))
    trap "(clock $name $started) 2>/dev/null || true" EXIT
    "$@"
    trap - EXIT
    clock "$name" "$started"
    mv "$OUT/phases/.$name" "$OUT/phases/$name"
}
# clock NAME SECOND: keep the seconds since then
clock() { keep "$OUT/phases/.$1" $(( $(date +%s) - $2 )); }
