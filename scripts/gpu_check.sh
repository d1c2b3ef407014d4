#!/usr/bin/env bash
# What only a GPU can show, in at most 40 minutes on one: tests, kernels in graphs, compiled and sharded training, speeds, and a
# whole run on the bundled images.  Leaves a report with every command, its time and its last lines: OUT/report.md.
#   bash scripts/gpu_check.sh
# Options, as environment variables:
#   OUT=runs/gpu_check   where everything goes
#   LIMIT=600            seconds after which one check is ended
#   SCALE=5              multiplies the quickstart's step counts
#   CPU=1                try the script itself on a machine without a GPU, with tiny models
# A check that fails does not stop the others; what is done is not done again.
export TOOLS=1
source "$(dirname "$0")/setup.sh"
enter_repository
OUT="${OUT:-runs/gpu_check}" LIMIT="${LIMIT:-600}" SCALE="${SCALE:-5}" CPU="${CPU:-0}"
mkdir -p "$OUT/checks"

if [ "$CPU" = 1 ]; then
    DEVICE=cpu BATCHES=2 LARGE=2 SIZES=GPT-tiny SIDE=(--image-size 64 --images 4 --repeats 1)
    MODELS=(--gpt-model GPT-tiny)
else
    "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
        echo "error: this machine shows no CUDA device: run this on one, or with CPU=1 to try the script." >&2
        exit 2
    }
    DEVICE=cuda BATCHES="1 64 256" LARGE=64 SIZES="GPT-B GPT-L GPT-XL" SIDE=()
    MODELS=(--gpt-model GPT-B)
fi

# check NAME COMMAND...: run a command once, at most LIMIT seconds, and keep its output, exit code and time
check() {
    local name="$1" started status=0; shift
    [ ! -e "$OUT/checks/$name.code" ] || return 0
    echo "== $name" >&2
    started=$(date +%s)
    supervised timeout --kill-after=30 "$LIMIT" "$@" > "$OUT/checks/$name.out" 2> "$OUT/checks/$name.err" || status=$?
    case "$status" in 130 | 143) exit "$status" ;; esac
    printf '%q ' "$@" > "$OUT/checks/$name.command"
    echo $(($(date +%s) - started)) > "$OUT/checks/$name.seconds"
    echo "$status" > "$OUT/checks/$name.code"
    [ "$status" = 0 ] || echo "   ended with $status" >&2
}

benchmark() { check "$1" "$PYTHON" scripts/benchmark.py "${@:2}" --device "$DEVICE"; }

check device "$PYTHON" -c 'import torch
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print(*(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), sep="\n")'
check tests_gpu "$PYTHON" -m pytest -q -m gpu tests
for batch in $BATCHES; do
    for mode in compiled eager; do
        benchmark "decode_iar2_${mode}_$batch" decode "${MODELS[@]}" --batch-size "$batch" --decode "$mode" "${SIDE[@]}"
    done
    benchmark "decode_llamagen_$batch" decode "${MODELS[@]}" --paradigm single --batch-size "$batch" "${SIDE[@]}"
done
for size in $SIZES; do
    benchmark "train_$size" train --gpt-model "$size" --batch-size "$LARGE" "${SIDE[@]}"
done
benchmark tokenizer tokenizer --batch-size "$LARGE" "${SIDE[@]}"
benchmark extract extract "${SIDE[@]}"
benchmark sample sample "${MODELS[@]}" --batch-size "$LARGE" "${SIDE[@]}"
benchmark evaluate evaluate --repeats 2
benchmark checkpoint checkpoint "${MODELS[@]}" "${SIDE[@]}"

# A recipe as it stands, sharded on one device and compiled, on codes of the bundled images by a random tokenizer of their size.
check quickstart env OUT="$OUT/quickstart" SCALE="$SCALE" bash scripts/quickstart.sh
train() {
    check "$1" env NPROC=1 bash scripts/autoregressive/train_c2i.sh "${MODELS[@]}" --image-size 32 --downsample-size 8 \
        --num-classes 10 --code-path "$OUT/quickstart/codes" --run-dir "$OUT/$1" --steps 200 --global-batch-size 128 \
        --log-every 20 --ema-decay 0.999 "${@:2}"
}
train train_fsdp_compiled --data-parallel fsdp
train train_ddp_compiled --data-parallel ddp
train train_eager --data-parallel none --compile off
train train_recomputing --data-parallel fsdp --activation-checkpointing

"$PYTHON" scripts/gpu_check_report.py --folder "$OUT"
