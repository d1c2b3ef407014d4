#!/usr/bin/env bash
# Your own classes: the quickstart's GPT of ten classes is fine-tuned to three others on 60 pictures, in about two minutes on two CPU
# cores, and compared with a GPT that sees these pictures alone.
#   bash scripts/own_classes.sh
# pictures in class folders -> codes -> GPTs -> samples -> runs/own_classes/report.md
# Finished phases are not done again; an interrupted phase carries on.  Options, as environment variables:
#   QUICKSTART=runs/quickstart   the quickstart's folder, whose tokenizer and GPT are used
#   OUT=runs/own_classes         where everything goes
#   SCALE=1                      multiplies all step counts
QUICKSTART="${QUICKSTART:-$(cd "$(dirname "$0")/.." && pwd)/runs/quickstart}"
[[ "$QUICKSTART" = /* ]] || QUICKSTART="$PWD/$QUICKSTART"
for file in vq/dual/tokenizer.safetensors gpt/gpt.safetensors; do
    if [ $# = 0 ] && [ ! -e "$QUICKSTART/$file" ]; then
        echo "error: QUICKSTART $QUICKSTART has no $file: run bash scripts/quickstart.sh first, or say where its folder lies." >&2
        exit 2
    fi
done
source "$(dirname "$0")/phases.sh" runs/own_classes "$@"
export NPROC=1
TOKENIZER="$QUICKSTART/vq/dual"

phase pictures python scripts/own_classes_data.py --out "$OUT/pictures"

# The last size that is typed: the trainer and the samplers take it from the codes and the models.
codes() {
    python autoregressive/train/extract_codes_c2i.py --vq-ckpt "$TOKENIZER" --image-size 32 --num-workers 0 "$@"
}
phase codes codes --data-path "$OUT/pictures/train" --augmentation flip --code-path "$OUT/codes"
phase codes_held_out codes --data-path "$OUT/pictures/val" --augmentation none --code-path "$OUT/codes_held_out"

# gpt NAME OPTIONS...: train, and draw a row of each class
gpt() {
    local name="$1"; shift
    phase "gpt_$name" supervised bash scripts/autoregressive/train_c2i.sh --gpt-model GPT-tiny --code-path "$OUT/codes" \
        --val-code-path "$OUT/codes_held_out" --eval-every "$(steps 20)" --sample-every "$(steps 60)" --vq-ckpt "$TOKENIZER" \
        --run-dir "$OUT/$name" --data-parallel none --compile off --num-workers 0 --steps "$(steps 240)" --lr 5e-4 --lr-end 5e-5 \
        --warmup-steps 20 --dropout 0.2 --ema-decay 0.98 --log-every 20 --checkpoint-every 60 "$@"
    phase "samples_$name" python autoregressive/sample/sample_c2i.py --gpt-ckpt "$OUT/$name" --vq-ckpt "$TOKENIZER" \
        --out "$OUT/$name.png"
}
gpt tuned --init-from "$QUICKSTART/gpt"
gpt scratch

python scripts/own_classes_report.py --folder "$OUT"
