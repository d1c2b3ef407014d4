# Sourced by the other scripts.  Sets PYTHON to an interpreter that has requirements.txt, making .venv if none has, and
# defines `launch SCRIPT OPTIONS...`.  Whatever takes long is started by it, `python` or `supervised`, which pass signals on.
# Environment variables, as for torchrun:
#   NPROC        processes on this node; default: the GPUs this shell may use, 1 without any
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes; the same command on each
#   MAX_RESTARTS how often several processes are started again after one was killed; default 3
set -euo pipefail
REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# enter_repository: go there; OUT, if it is a relative path, stays one of the folder that the script was started in.
enter_repository() {
    case "${OUT:-/}" in /*) ;; *) [ "$PWD" = "$REPOSITORY" ] || OUT="$PWD/$OUT" ;; esac
    cd "$REPOSITORY"
}

# has_requirements PYTHON: asks the packages' metadata, because importing them takes seconds.  The tools of the file's last
# part are asked for only where TOOLS is set (test.sh, .ci/run).
has_requirements() {
    [ "${REQUIREMENTS_MET_BY:-}" != "$1" ] || return 0  # the script that called this one has asked already
    "$1" - "$REPOSITORY/requirements.txt" "${TOOLS:-}" >/dev/null 2>&1 <<'CHECK'
import re, sys
from importlib.metadata import version

def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)]

assert sys.version_info >= (3, 11)
for line in open(sys.argv[1]):
    if line.startswith("# Tools") and not sys.argv[2]:
        break
    name, _, minimum = line.partition("#")[0].strip().partition(">=")
    assert not name or numbers(version(name)) >= numbers(minimum), line
CHECK
}

# install PYTHON: the tested versions, or the newest ones where those do not exist for this Python.
install() {
    local pip=("$1" -m pip --disable-pip-version-check install --quiet -r "$REPOSITORY/requirements.txt") output
    if ! output="$("${pip[@]}" -c "$REPOSITORY/scripts/constraints.txt" 2>&1)"; then
        echo "the tested versions (scripts/constraints.txt) cannot be installed here: installing the newest instead" >&2
        output="$("${pip[@]}" 2>&1)" || { echo "$output" >&2; exit 1; }
    fi
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "$REPOSITORY/.venv/bin/python" python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 && has_requirements "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    if ! python3 -c 'import sys; assert sys.version_info >= (3, 11)' >/dev/null 2>&1; then
        echo "error: python3 is missing or older than 3.11: install Python 3.11 or newer." >&2
        exit 2
    fi
    echo "installing the requirements into $REPOSITORY/.venv (once, some minutes)" >&2
    python3 -m venv "$REPOSITORY/.venv"
    PYTHON="$REPOSITORY/.venv/bin/python"
    install "$PYTHON"
}

# gpus: how many GPUs this shell may use, at least 1.
gpus() {
    local count=1
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        count="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]')" || true
    elif command -v nvidia-smi >/dev/null 2>&1; then
        count="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')" || true
    fi
    echo $((count > 1 ? count : 1))
}

# launch SCRIPT OPTIONS...: start a script, named relative to the repository, on NPROC processes; --help on one.
launch() {
    local script="$1" processes="${NPROC:-}" nodes="${NNODES:-1}"; shift
    [[ "$script" = /* ]] || script="$REPOSITORY/$script"
    [[ " $* " != *" --help "* && " $* " != *" -h "* ]] || processes=1 nodes=1
    processes="${processes:-$(gpus)}"
    if [ "$processes" = 1 ] && [ "$nodes" = 1 ]; then
        python "$script" "$@"
    else
        NPROC="$processes" NNODES="$nodes" python "$REPOSITORY/scripts/launch.py" "$script" "$@"
    fi
}

# What is ignored from the start, as INT is in the background, cannot be trapped, and `trap -` would make it deadly.
SIGNALS="TERM USR1 INT"
[ -z "$(trap -p INT)" ] || SIGNALS="TERM USR1"

# supervised COMMAND...: run it and pass signals on to it, which bash alone would keep to itself.  The status is the command's,
# but 143 (INT: 130) where it ended well after it was asked to stop: what follows must not start.
supervised() {
    local child="" asked="" status=0 each
    for each in $SIGNALS; do trap "pass_on $each" "$each"; done
    "$@" <&0 & child=$!
    [ -z "$asked" ] || pass_on "$asked"  # it came before the child had a number
    while :; do
        status=0; wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break  # a signal ends the waiting, not the child
    done
    trap - $SIGNALS
    if [ -n "$asked" ] && (( status == 0 || status > 128 )); then
        [ "$asked" = INT ] && status=130 || status=143
    fi
    return "$status"
}

python() { supervised "$PYTHON" "$@"; }

# pass_on SIGNAL: the part of `supervised` that a signal calls.  A shell in the background ignores INT, and so does Python there
# while it imports: they are told TERM, which ends them in the same way.
pass_on() {
    local signal="$1" name mask
    asked="${asked:-$1}"
    [ -n "$child" ] || return 0
    if [ "$signal" = INT ]; then
        while read -r name mask; do
            [ "$name" != SigIgn: ] || (( (0x$mask & 2) == 0 )) || signal=TERM
        done 2>/dev/null < "/proc/$child/status" || true  # no such file: another system, or it has ended
    fi
    kill "-$signal" "$child" 2>/dev/null || true
}

# keep FILE TEXT: write a file, whole or not at all
keep() { { echo "$2" > "$1.new" && mv "$1.new" "$1"; } 2>/dev/null || cannot_write "$1"; }
cannot_write() { echo "error: $1 cannot be written: make space; the same command then carries on." >&2; exit 2; }

find_python
export PYTHON REQUIREMENTS_MET_BY="$PYTHON"
