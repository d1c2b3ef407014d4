# Sourced by the scripts of this folder: one function for each step, every step done once and kept below OUT.
#   TOY=1        bundled images (Fashion-MNIST), a tiny GPT, minutes on two CPU cores; otherwise ImageNet at the paper's scale
#   OUT          where everything goes; default runs/paper, runs/paper-toy
#   DATA, VAL    full scale: ImageNet's train and val folders;  REFERENCE: ADM's VIRTUAL_imagenet256_labeled.npz
#   MODEL, SIZE, EPOCHS   full scale: GPT-B, 384 and 100 unless said otherwise;  NPROC: processes, the GPUs seen
#   TOY_SECONDS  toy: training time of a GPT (45);  SEED: of GPT training and sampling (0)
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$REPOSITORY"
TOY="${TOY:-0}" SEED="${SEED:-0}"
if [ "$TOY" = 1 ]; then
    OUT="${OUT:-runs/paper-toy}" DATA=scripts/data/fashion_mnist_train.npz VAL=scripts/data/fashion_mnist_test.npz
    TOY_SECONDS="${TOY_SECONDS:-45}" TOKENIZER_STEPS="${TOKENIZER_STEPS:-1200}"
    export NPROC=1
    IMAGES=(--image-size 32 --num-workers 0)
    PERCEPTUAL=(--perceptual-net classifier --perceptual-weights "$OUT/teacher.safetensors")
    TOKENIZER=("${IMAGES[@]}" "${PERCEPTUAL[@]}" --vq-model VQ-8-small --no-random-crop --no-random-flip
               --global-batch-size 16 --lr 1e-3 --lr-end 5e-5 --ema-decay 0.99 --codebook-init kmeans --revive-every 50
               --kmeans-vectors 32768 --log-every 50 --checkpoint-every 400)
    GPT=(--gpt-model GPT-tiny --image-size 32 --downsample-size 8 --num-classes 10 --data-parallel none --num-workers 0
         --global-batch-size 128 --lr 2e-3 --lr-end 2e-4 --lr-schedule cosine --warmup-steps 20 --ema-decay 0.99
         --log-every 20 --checkpoint-every 100 --seed "$SEED")
    SAMPLE=(--per-class 100 --batch-size 250 --seed "$SEED")
    AUGMENTATION=none EVAL=()
    SEMANTIC=128 DETAIL=512 SINGLE=2048 CLUSTERS=32 COARSE=128  # codebooks: semantic, detail, single; IAR's, CTF's clusters
    RANGE="2 4" CONSTANT=3 PRESET_ONE=(--guidance constant --cfg-scale 3) PRESET_TWO=(--cfg-scale 2 4)
    VARIANT=""
else
    OUT="${OUT:-runs/paper}" DATA="${DATA:?DATA: ImageNet train folder}" VAL="${VAL:?VAL: ImageNet val folder}"
    REFERENCE="${REFERENCE:?REFERENCE: VIRTUAL_imagenet256_labeled.npz}"
    MODEL="${MODEL:-GPT-B}" SIZE="${SIZE:-384}" EPOCHS="${EPOCHS:-100}"
    export NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
    IMAGES=(--image-size 256)
    TOKENIZER=("${IMAGES[@]}")
    GPT=(--gpt-model "$MODEL" --image-size "$SIZE" --epochs "$EPOCHS" --seed "$SEED")
    SAMPLE=(--image-size-eval 256 --seed "$SEED")
    AUGMENTATION=ten-crop EVAL=()
    SEMANTIC=256 DETAIL=4096 SINGLE=16384 CLUSTERS=128 COARSE=512
    RANGE="1.75 3" CONSTANT=2 PRESET_ONE=() PRESET_TWO=()  # the ablations' guidance; empty: what the checkpoint carries
    VARIANT="-${MODEL#GPT-}-$SIZE-$EPOCHS"                 # runs and figures of other sizes and lengths are others
fi
# Rows of two tables may share a name.
FIGURES="$OUT/figures/$(basename "$0" .sh)$VARIANT" SAMPLES="$OUT/samples/$(basename "$0" .sh)$VARIANT"
mkdir -p "$FIGURES" "$SAMPLES"

# classifiers: toy: the tokenizer's teacher and the judge of samples, as in the quickstart
classifiers() {
    [ "$TOY" = 1 ] || return 0
    local train=("$PYTHON" evaluations/c2i/classifier.py --data-path "$DATA" --image-size 32)
    [ -e "$OUT/teacher.safetensors" ] || "${train[@]}" --out "$OUT/teacher.safetensors" --epochs 3 --seed 1
    [ -e "$OUT/judge.safetensors" ] || "${train[@]}" --out "$OUT/judge.safetensors" --widths 48 96 128 --epochs 5 --seed 2
}

# tokenizer NAME QUANTIZER SIZE...: train a tokenizer; dual has two stages, single and product have one
tokenizer() {
    local name="$1" quantizer="$2"; shift 2
    local options=(--data-path "$DATA" --val-path "$VAL" "${TOKENIZER[@]}" --codebook-sizes "$@")
    classifiers
    if [ "$quantizer" = dual ]; then
        [ "$TOY" = 1 ] && export STAGE1="--steps $((TOKENIZER_STEPS / 4))" STAGE2="--steps $TOKENIZER_STEPS"
        RUN_DIR="$OUT/tokenizers/$name" bash scripts/tokenizer/train_dual_vq.sh "${options[@]}"
    else
        [ "$TOY" = 1 ] && options+=(--steps $((TOKENIZER_STEPS * 5 / 4)))
        RUN_DIR="$OUT/tokenizers/$name/dual" bash scripts/tokenizer/train_vq.sh --quantizer "$quantizer" "${options[@]}"
    fi
}

# codes NAME: codes of the training images, and of the held-out ones for likelihoods
codes() {
    local extract=(autoregressive/train/extract_codes_c2i.py --vq-ckpt "$(vq "$1")")
    local size=("${IMAGES[@]}")
    [ "$TOY" = 1 ] || size=(--image-size "$SIZE")
    launch "${extract[@]}" "${size[@]}" --data-path "$DATA" --code-path "$OUT/codes/$1" --augmentation "$AUGMENTATION"
    launch "${extract[@]}" "${size[@]}" --data-path "$VAL" --code-path "$OUT/codes/$1-val" --augmentation none
}

# vq NAME: where a tokenizer is, of tokenizer() or of rearrange()
vq() { if [ -e "$OUT/rearranged/$1/tokenizer.safetensors" ]; then echo "$OUT/rearranged/$1"; else echo "$OUT/tokenizers/$1/dual"; fi; }

# rearrange NAME METHOD CLUSTERS: IAR's or CTF's code maps of the tokenizer `single`
rearrange() {
    [ -e "$OUT/rearranged/$1/clusters.json" ] || "$PYTHON" tokenizer/tokenizer_image/rearrange.py \
        --vq-ckpt "$(vq single)" --method "$2" --clusters "$3" --out "$OUT/rearranged/$1"
}

# steps_in SECONDS CODES OPTIONS...: toy: steps that fit into the time, by the rate of a short run
steps_in() {
    local seconds="$1" code_path="$2" probe; shift 2
    probe="$(mktemp -d)"
    bash scripts/autoregressive/train_c2i.sh --code-path "$code_path" --run-dir "$probe" "${GPT[@]}" "$@" --steps 20 --log-every 10 >&2
    "$PYTHON" -c "
import json
rates = [json.loads(line)['images_per_second'] for line in open('$probe/metrics.jsonl')]
print(max(int($seconds * rates[-1] / 128), 20))"
    rm -rf "$probe"
}

# gpt NAME CODES OPTIONS...: train a GPT; toy: for TOY_SECONDS, or TIME where a script sets it
gpt() {
    local name="$1" code_path="$OUT/codes/$2"; shift 2
    local run="$OUT/gpt/$name$VARIANT" options=("${GPT[@]}")
    if [ "$TOY" = 1 ]; then
        if [ ! -e "$run/steps" ]; then
            mkdir -p "$run"
            steps_in "${TIME:-$TOY_SECONDS}" "$code_path" "$@" > "$run/.steps"
            mv "$run/.steps" "$run/steps"
        fi
        options+=(--steps "$(cat "$run/steps")")
    fi
    bash scripts/autoregressive/train_c2i.sh --code-path "$code_path" --run-dir "$run" "${options[@]}" "$@"
}

# score NAME GPT TOKENIZER OPTIONS...: sample and evaluate; figures go to FIGURES/NAME.json
score() {
    local name="$1" gpt="$OUT/gpt/$2$VARIANT" tokenizer="$3" rate; shift 3
    local npz="$SAMPLES/$name.npz"
    [ -e "$FIGURES/$name.scored" ] && return 0
    launch autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt "$gpt" --vq-ckpt "$(vq "$tokenizer")" "${SAMPLE[@]}" \
        --out "$npz" "$@"
    if [ "$TOY" = 1 ]; then
        "$PYTHON" evaluations/c2i/judge.py --classifier "$OUT/judge.safetensors" --reference "$VAL" --samples "$npz" \
            --out "$SAMPLES/$name.judged.json"
    else
        "$PYTHON" evaluations/c2i/evaluator.py "$REFERENCE" "$npz" --json "$SAMPLES/$name.judged.json"
    fi
    rate="$SAMPLES/$name.rate.json"  # missing where samples were selected, or their drawing was interrupted
    figures "$name" "$SAMPLES/$name.judged.json" $([ ! -e "$rate" ] || echo "$rate")
    touch "$FIGURES/$name.scored"
}

# likelihood NAME "GPT..." CODES "OPTIONS"...: bits an image on held-out codes; of several stages the sum, options of each in turn
likelihood() {
    local name="$1" gpts="$2" code_path="$OUT/codes/$3-val" files=() gpt; shift 3
    for gpt in $gpts; do
        gpt="$OUT/gpt/$gpt$VARIANT"
        [ -e "$gpt/bits.json" ] || launch autoregressive/train/evaluate_c2i.py --gpt-ckpt "$gpt" --code-path "$code_path" \
            --out "$gpt/bits.json" ${1:-}
        files+=("$gpt/bits.json")
        [ $# = 0 ] || shift
    done
    figures "$name" "${files[@]}"
}

# reconstruct NAME TOKENIZER: PSNR, SSIM, LPIPS, usage, and at full scale rFID
reconstruct() {
    local npz="$SAMPLES/$1-reconstructed.npz"
    [ -e "$FIGURES/$1.reconstructed" ] && return 0
    launch tokenizer/tokenizer_image/reconstruction_vq_ddp.py --vq-ckpt "$(vq "$2")" --data-path "$VAL" "${IMAGES[@]}" \
        ${PERCEPTUAL[@]+"${PERCEPTUAL[@]}"} --out "$npz"
    figures "$1" "${npz%.npz}.json"
    if [ "$TOY" != 1 ]; then
        "$PYTHON" tokenizer/validation/val_ddp.py --data-path "$VAL" --image-size 256 --out "$OUT/val256.npz"
        "$PYTHON" evaluations/c2i/evaluator.py "$OUT/val256.npz" "$npz" --json "$SAMPLES/$1-rfid.json"
        figures "$1" --prefix r "$SAMPLES/$1-rfid.json"
    fi
    touch "$FIGURES/$1.reconstructed"
}

# sweep FOLDER OPTIONS...: guidance ranges of one IAR2 on the dual codebook, the models loaded once
sweep() {
    local folder="$OUT/$1$VARIANT" evaluate=(--reference "${REFERENCE:-$VAL}"); shift
    tokenizer dual dual $SEMANTIC $DETAIL
    codes dual
    gpt iar2 dual
    [ "$TOY" != 1 ] || evaluate+=(--judge "$OUT/judge.safetensors")
    launch autoregressive/sample/sweep_c2i.py --gpt-ckpt "$OUT/gpt/iar2$VARIANT" --vq-ckpt "$(vq dual)" "${SAMPLE[@]}" \
        --folder "$folder" "${evaluate[@]}" "$@"
}

# figures NAME FILE...: merge figures into FIGURES/NAME.json;  table N ROW...: print and keep the table of such rows
figures() { "$PYTHON" scripts/paper/table.py merge --folder "$FIGURES" --name "$@"; }
table() { "$PYTHON" scripts/paper/table.py show --folder "$FIGURES" --table "$1" --rows "${@:2}"; }
