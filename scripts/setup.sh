# Sourced by the other scripts.  Sets PYTHON to an interpreter that has requirements.txt, making .venv if none has, and
# defines `launch SCRIPT OPTIONS...`.  Environment variables, as for torchrun:
#   NPROC        processes on this node; default: the GPUs this shell may use, 1 without any
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes; the same command on each
#   MAX_RESTARTS how often several processes are started again after one was killed; default 3
set -euo pipefail
REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

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
        supervised "$PYTHON" "$script" "$@"
    else
        NPROC="$processes" NNODES="$nodes" supervised "$PYTHON" "$REPOSITORY/scripts/launch.py" "$script" "$@"
    fi
}

# supervised COMMAND...: run it and pass signals on to it, which bash alone would keep to itself.
supervised() {
    local child status=0
    "$@" <&0 & child=$!
    trap 'kill -TERM $child' TERM
    trap 'kill -USR1 $child' USR1
    trap 'kill -INT $child' INT
    while :; do
        status=0; wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break  # a signal ends the waiting, not the child
    done
    trap - TERM USR1 INT
    return "$status"
}

find_python
export PYTHON REQUIREMENTS_MET_BY="$PYTHON"
