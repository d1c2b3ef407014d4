#!/usr/bin/env bash
# CIFAR-10 (not bundled) through the whole pipeline with real VGG16 LPIPS: the figures in tokenizer/README.md.
#   bash scripts/cifar10.sh TRAIN.npz TEST.npz VGG16.pth      npz: images [N, 32, 32, 3], labels; VGG16: torchvision's file
# OUT=runs/cifar10; SCALE=1 multiplies the step counts; raise it on a GPU.  Trainings resume; finished npz files are kept.
source "$(dirname "$0")/setup.sh"
if [ $# -ne 3 ]; then
    echo "error: usage: bash scripts/cifar10.sh TRAIN.npz TEST.npz VGG16.pth" >&2
    exit 2
fi
train="$1" test="$2" vgg="$3" OUT="${OUT:-runs/cifar10}" SCALE="${SCALE:-1}"
steps() { "$PYTHON" -c "import math; print(max(math.ceil($1 * $SCALE), 4))"; }
shape=(--image-size 32 --num-workers 0)
lpips=(--perceptual-net vgg --perceptual-file "$vgg")
export NPROC="${NPROC:-1}"

STAGE1="--steps $(steps 250)" STAGE2="--steps $(steps 1200) --revive-every 50" \
    supervised bash "$REPOSITORY/scripts/tokenizer/train_dual_vq.sh" --run-dir "$OUT/vq" --data-path "$train" --val-path "$test" \
    --val-limit 1000 "${shape[@]}" --vq-model VQ-4-small --codebook-sizes 256 1024 \
    --global-batch-size 16 --lr 8e-4 --lr-end 1e-4 --ema-decay 0.99 --codebook-init kmeans --kmeans-vectors 32768 \
    --no-random-crop "${lpips[@]}" --log-every 50 --checkpoint-every 400
launch autoregressive/train/extract_codes_c2i.py --data-path "$train" "${shape[@]}" --vq-ckpt "$OUT/vq/dual" \
    --code-path "$OUT/codes" --augmentation none --batch-size 128
supervised bash "$REPOSITORY/scripts/autoregressive/train_c2i.sh" --gpt-model GPT-tiny --image-size 32 --downsample-size 4 \
    --codebook-sizes 256 1024 --num-classes 10 --code-path "$OUT/codes" --run-dir "$OUT/gpt" --steps "$(steps 700)" \
    --global-batch-size 64 --lr 2e-3 --lr-end 2e-4 --lr-schedule cosine --warmup-steps 20 --ema-decay 0.99 \
    --num-workers 0 --log-every 20 --checkpoint-every 200

models=(--gpt-ckpt "$OUT/gpt" --vq-ckpt "$OUT/vq/dual")
python "$REPOSITORY/autoregressive/sample/sample_c2i.py" "${models[@]}" --out "$OUT/samples.png" --per-class 10 \
    --classes 0 1 2 3 4 5 6 7 8 9 --cfg-scale 1.5 3
launch autoregressive/sample/sample_c2i_ddp.py "${models[@]}" --per-class 100 --batch-size 250 --cfg-scale 1.5 3 \
    --out "$OUT/guided.npz"
[ -e "$OUT/reconstructed.json" ] || launch tokenizer/tokenizer_image/reconstruction_vq_ddp.py \
    --data-path "$test" "${shape[@]}" --vq-ckpt "$OUT/vq/dual" --out "$OUT/reconstructed.npz" "${lpips[@]}"
[ -e "$OUT/judge.safetensors" ] || python "$REPOSITORY/evaluations/c2i/classifier.py" --data-path "$train" \
    --out "$OUT/judge.safetensors" --epochs 3
python "$REPOSITORY/evaluations/c2i/judge.py" --classifier "$OUT/judge.safetensors" --reference "$test" \
    --samples "$OUT/guided.npz" "$OUT/reconstructed.npz" --out "$OUT/judged.json"
