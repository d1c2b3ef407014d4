# Sourced by the other scripts: sets PYTHON to an interpreter that has the requirements, making .venv if none has, and
# defines `launch`, which starts a script on NPROC processes (torchrun) or, for one, directly, and `value`.
set -euo pipefail
REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

has_requirements() {
    [ "${REQUIREMENTS_MET_BY:-}" != "$1" ] || return 0  # a script that called this one has looked
    "$1" - >/dev/null 2>&1 <<'CHECK'
import sys
assert sys.version_info >= (3, 11)
import lpips, matplotlib, numpy, PIL, pytest, safetensors, scipy, skimage, sklearn, tensorboard, torch, torch_fidelity
import timm, torchvision, tqdm, tyro
assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
CHECK
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
    "$REPOSITORY/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$REPOSITORY/requirements.txt" >&2
    PYTHON="$REPOSITORY/.venv/bin/python"
}

launch() {
    if [ "${NPROC:-1}" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        "$PYTHON" "$@"
    else
        "$PYTHON" -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:-1}" \
            --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
    fi
}

# value FLAG DEFAULT ARGUMENTS...: what a command line gives a flag; of several the last.
value() {
    local flag="$1" found="$2"; shift 2
    while [ $# -gt 0 ]; do
        case "${1//_/-}" in
            "$flag") found="${2:-$found}" ;;
            "$flag"=*) found="${1#*=}" ;;
        esac
        shift
    done
    echo "$found"
}

find_python
export PYTHON REQUIREMENTS_MET_BY="$PYTHON"
