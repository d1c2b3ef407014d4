#!/usr/bin/env bash
# The whole of IAR2 on bundled images (Fashion-MNIST, 10,000 + 2,000), on a CPU or a GPU:
# classifiers -> tokenizer stage 1 -> stage 2 -> codes -> GPT -> samples -> figures -> runs/quickstart/report.md
# Finished phases are not done again; an interrupted phase carries on.  Options, as environment variables:
#   OUT=runs/quickstart   where everything goes
#   SCALE=1               multiplies all step counts (0.02 shows in two minutes that the plumbing holds)
source "$(dirname "$0")/phases.sh" runs/quickstart "$@"
DATA=scripts/data/fashion_mnist

SHAPE=(--image-size 32 --num-workers 0)
UNCOMPILED=(--compile off)  # on a GPU compiling takes longer than trainings of this length
PERCEPTUAL=(--perceptual-net classifier --perceptual-file "$OUT/teacher.safetensors")

# Two classifiers: one teaches the tokenizer what looks alike, the other, wider and of another seed, judges.
classifier() {
    python evaluations/c2i/classifier.py --data-path ${DATA}_train.npz --image-size 32 "$@"
}
phase teacher classifier --out "$OUT/teacher.safetensors" --epochs "$(steps 3 1)" --seed 1
phase judge classifier --out "$OUT/judge.safetensors" --widths 48 96 128 --epochs "$(steps 5 1)" --seed 2

tokenizer() {
    NPROC=1 STAGE1="--steps $(steps 500)" STAGE2="--steps $(steps 2800) --revive-every 50" \
        supervised bash scripts/tokenizer/train_dual_vq.sh \
        --run-dir "$OUT/vq" --data-path ${DATA}_train.npz --val-path ${DATA}_test.npz \
        --vq-model VQ-8-small --codebook-sizes 128 512 "${SHAPE[@]}" "${PERCEPTUAL[@]}" --no-random-crop --no-random-flip \
        --global-batch-size 16 --lr 1e-3 --lr-end 5e-5 --ema-decay 0.99 --codebook-init kmeans \
        --kmeans-vectors 32768 --log-every 50 --checkpoint-every 250 --mixed-precision none \
        "${UNCOMPILED[@]}"
}
phase tokenizer tokenizer

phase codes python autoregressive/train/extract_codes_c2i.py --data-path ${DATA}_train.npz "${SHAPE[@]}" \
    --vq-ckpt "$OUT/vq/dual" --code-path "$OUT/codes" --augmentation none

gpt() {
    NPROC=1 supervised bash scripts/autoregressive/train_c2i.sh --gpt-model GPT-tiny --image-size 32 --downsample-size 8 \
        --codebook-sizes 128 512 --num-classes 10 --code-path "$OUT/codes" --run-dir "$OUT/gpt" --data-parallel none \
        --steps "$(steps 520)" --global-batch-size 128 --lr 2e-3 --lr-end 2e-4 --lr-schedule cosine --warmup-steps 20 \
        --ema-decay 0.99 --num-workers 0 --log-every 20 --checkpoint-every 100 "${UNCOMPILED[@]}"
}
phase gpt gpt

MODELS=(--gpt-ckpt "$OUT/gpt" --vq-ckpt "$OUT/vq/dual" --decode eager)
sample() {
    python autoregressive/sample/sample_c2i_ddp.py "${MODELS[@]}" --per-class "$(steps 100 2)" --batch-size 250 "$@"
}
phase sample_guided sample --out "$OUT/guided.npz"
phase sample_unguided sample --cfg-scale 1 --out "$OUT/unguided.npz"
phase sample_grid python autoregressive/sample/sample_c2i.py "${MODELS[@]}" --out "$OUT/samples.png" --per-class 10 \
    --classes 0 1 2 3 4 5 6 7 8 9

reconstruct() {
    python tokenizer/tokenizer_image/reconstruction_vq_ddp.py --data-path ${DATA}_test.npz "${SHAPE[@]}" \
        "${PERCEPTUAL[@]}" "$@"
}
phase reconstruct_semantic reconstruct --vq-ckpt "$OUT/vq/semantic" --streams semantic --out "$OUT/stage1.npz"
phase reconstruct_dual reconstruct --vq-ckpt "$OUT/vq/dual" --out "$OUT/stage2.npz"

phase evaluate python evaluations/c2i/judge.py --classifier "$OUT/judge.safetensors" --reference ${DATA}_test.npz \
    --samples "$OUT/guided.npz" "$OUT/unguided.npz" "$OUT/stage1.npz" "$OUT/stage2.npz" --out "$OUT/judged.json"

python scripts/quickstart_report.py --folder "$OUT"
