#!/usr/bin/env bash
# Images from text on the bundled images, without a download: IAR2 and LlamaGen, in about eleven minutes on two CPU cores.
#   bash scripts/text_demo.sh
# classifiers, captions -> tokenizers -> codes, features -> GPTs -> samples of prompts -> runs/text_demo/report.md
# Finished phases are not done again; an interrupted phase carries on.  Options, as environment variables:
#   OUT=runs/text_demo    where everything goes
#   SCALE=1               multiplies all step counts (0.02 shows in two minutes that the plumbing holds)
source "$(dirname "$0")/phases.sh" runs/text_demo "$@"
export NPROC=1

BUNDLED=scripts/data/fashion_mnist_train.npz DATA="$OUT/data/train.npz"
SHAPE=(--image-size 32 --num-workers 0)
PERCEPTUAL=(--perceptual-net classifier --perceptual-file "$OUT/teacher.safetensors")

classifier() { python evaluations/c2i/classifier.py --data-path "$BUNDLED" --image-size 32 "$@"; }
phase teacher classifier --out "$OUT/teacher.safetensors" --epochs "$(steps 3 1)" --seed 1
phase judge classifier --out "$OUT/judge.safetensors" --widths 48 96 128 --epochs "$(steps 5 1)" --seed 2
phase captions python scripts/text_demo_data.py --out "$OUT/data"

TOKENIZER=(--data-path "$DATA" --val-path scripts/data/fashion_mnist_test.npz --val-limit 500 --vq-model VQ-8-small "${SHAPE[@]}" "${PERCEPTUAL[@]}" --no-random-crop --no-random-flip
    --global-batch-size 16 --lr 1e-3 --lr-end 5e-5 --ema-decay 0.99 --codebook-init kmeans --kmeans-vectors 32768
    --log-every 50 --checkpoint-every 250 --mixed-precision none --compile off)
dual() {
    STAGE1="--steps $(steps 400)" STAGE2="--steps $(steps 2000) --revive-every 50" \
        supervised bash scripts/tokenizer/train_dual_vq.sh --run-dir "$OUT/vq" --codebook-sizes 128 512 "${TOKENIZER[@]}"
}
phase tokenizer_iar2 dual
phase tokenizer_llamagen supervised bash scripts/tokenizer/train_vq.sh --run-dir "$OUT/vq/single" --codebook-sizes 1024 \
    --steps "$(steps 1100)" --revive-every 50 "${TOKENIZER[@]}"

# What is read: fixed random vectors of words stand for a language model.  The short caption names the class alone.
phase features python autoregressive/train/extract_text.py --data-path "$DATA" --text-path "$OUT/text" --text-encoder hashed \
    --text-length 16 --caption-cleaning mended --short-captions short

# system NAME TOKENIZER GUIDANCE...: a GPT on the tokenizer's codes, and its samples with guidance and without
system() {
    local name="$1" tokenizer="$OUT/vq/$2"; shift 2
    phase "codes_$name" python autoregressive/train/extract_codes_c2i.py --data-path "$DATA" "${SHAPE[@]}" --vq-ckpt "$tokenizer" \
        --code-path "$OUT/codes_$name" --augmentation none
    phase "gpt_$name" supervised bash scripts/autoregressive/train_t2i.sh --gpt-model GPT-tiny --image-size 32 --downsample-size 8 \
        --code-path "$OUT/codes_$name" --text-path "$OUT/text" --short-captions 0.2 --run-dir "$OUT/gpt_$name" \
        --data-parallel none --steps "$(steps 400)" --global-batch-size 128 --recipe beyond --lr 8e-3 --lr-end 4e-4 \
        --lr-schedule cosine --warmup-steps 20 --ema-decay 0.99 --num-workers 0 --log-every 20 --checkpoint-every 100 --compile off
    local sample=(python autoregressive/sample/sample_t2i_ddp.py --gpt-ckpt "$OUT/gpt_$name" --vq-ckpt "$tokenizer"
        --prompts "$OUT/data/prompts.jsonl" --per-prompt 8 --batch-size 240 --decode eager)
    phase "guided_$name" "${sample[@]}" --out "$OUT/${name}_guided.npz" "$@"
    phase "unguided_$name" "${sample[@]}" --out "$OUT/${name}_unguided.npz" --guidance constant --cfg-scale 1
}
system iar2 dual --guidance attention --cfg-scale 3 6
system llamagen single --guidance constant --cfg-scale 4.5

python scripts/text_demo_report.py --folder "$OUT"
