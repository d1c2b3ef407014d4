# Sourced by the scripts of this folder: one function for each step.  What is done is kept below OUT and shared by all
# scripts: a tokenizer is named by what it is (dual-256-4096), a GPT by its codes, size, grid, epochs and seed.
#   TOY=1        bundled images (Fashion-MNIST), a tiny GPT, minutes on two CPU cores; otherwise ImageNet at the paper's scale
#   DRY=1        print the commands, run none
#   OUT          where everything goes; default runs/paper, runs/paper-toy
#   DATA, VAL    full scale: ImageNet's train and val folders;  REFERENCE: ADM's VIRTUAL_imagenet256_labeled.npz
#   MODEL, SIZE, EPOCHS   full scale: GPT-B, 384 and 100 unless said otherwise;  NPROC: GPUs of this one node (all)
#   GPT_OPTIONS  full scale: more options of train_c2i.py, for example "--data-parallel fsdp"
#   TOKENIZER_EPOCHS  full scale: epochs of each stage of a tokenizer (40, as LlamaGen's, which has one stage)
#   KEEP_EVERY   epochs between the GPT weights that a training keeps for good (50, toy 0.5; 0: none), for figure 7c
#   TOY_SECONDS, TOKENIZER_STEPS  toy: training time of a GPT (45), steps of a tokenizer's second stage (1200)
#   SEED         of GPT training and sampling (0)
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
cd "$REPOSITORY"
TOY="${TOY:-0}" DRY="${DRY:-0}" SEED="${SEED:-0}"
toy() { [ "$TOY" = 1 ]; }
dry() { [ "$DRY" = 1 ]; }
if toy; then
    OUT="${OUT:-runs/paper-toy}" DATA=scripts/data/fashion_mnist_train.npz VAL=scripts/data/fashion_mnist_test.npz
    TOY_SECONDS="${TOY_SECONDS:-45}" TOKENIZER_STEPS="${TOKENIZER_STEPS:-1200}" TOY_MODEL=GPT-tiny
    export NPROC=1
    IMAGES=(--image-size 32 --num-workers 0)
    PERCEPTUAL=(--perceptual-net classifier --perceptual-file "$OUT/teacher.safetensors")
    TOKENIZER=("${IMAGES[@]}" "${PERCEPTUAL[@]}" --vq-model VQ-8-small --no-random-crop --no-random-flip
               --global-batch-size 16 --lr 1e-3 --lr-end 5e-5 --ema-decay 0.99 --codebook-init kmeans --revive-every 50
               --kmeans-vectors 32768 --log-every 50 --checkpoint-every 400)
    GPT=(--image-size 32 --downsample-size 8 --num-classes 10 --data-parallel none --num-workers 0
         --global-batch-size 128 --lr 2e-3 --lr-end 2e-4 --lr-schedule cosine --warmup-steps 20 --ema-decay 0.99
         --log-every 20 --checkpoint-every 100 --keep-every "${KEEP_EVERY:-0.5}")
    SAMPLE=(--per-class 100 --batch-size 250)
    AUGMENTATION=none
    SEMANTIC=128 DETAIL=512 SINGLE=2048 CLUSTERS=32 COARSE=128  # codebooks: semantic, detail, single; IAR's, CTF's clusters
    RANGE="2 4" CONSTANT=3 PRESET_ONE=(--guidance constant --cfg-scale 3) PRESET_TWO=(--cfg-scale 2 4)
else
    OUT="${OUT:-runs/paper}" DATA="${DATA:?set it to the folder of ImageNet train, or TOY=1 for the bundled images.}"
    VAL="${VAL:?set it to the folder of ImageNet val.}" REFERENCE="${REFERENCE:?set it to VIRTUAL_imagenet256_labeled.npz.}"
    MODEL="${MODEL:-GPT-B}" SIZE="${SIZE:-384}" EPOCHS="${EPOCHS:-100}"
    IMAGES=(--image-size 256)
    TOKENIZER=("${IMAGES[@]}") TOKENIZER_EPOCHS="${TOKENIZER_EPOCHS:-40}"
    GPT=(--keep-every "${KEEP_EVERY:-50}" ${GPT_OPTIONS:-})  # beside train_c2i.py's recipe of MODEL and SIZE
    SAMPLE=(--image-size-eval 256)
    AUGMENTATION=ten-crop
    SEMANTIC=256 DETAIL=4096 SINGLE=16384 CLUSTERS=128 COARSE=512
    # The ablations' guidance: table 9's best range; the one fixed scale the paper states (figure 7c).
    RANGE="1.75 3" CONSTANT=2.25 PRESET_ONE=() PRESET_TWO=()  # empty: what the checkpoint carries
fi
# A name's prefix equal-: the same loss terms and two phases of the same lengths for every kind of codebook (tokenizer).
DUAL="dual-$SEMANTIC-$DETAIL" PRODUCT="product-$SEMANTIC-$DETAIL" ONE="single-$SINGLE"
IAR="balanced-$CLUSTERS" CTF="coarse-$COARSE"

# variant: what tells GPTs of one codebook and one name apart
variant() {
    if toy; then
        [ "$TOY_MODEL" = GPT-tiny ] || printf '%s-' "${TOY_MODEL#GPT-}"
        echo "${TIME:-$TOY_SECONDS}s-seed$SEED"
    else
        echo "${MODEL#GPT-}-$SIZE-$EPOCHS-seed$SEED"
    fi
}
SCRIPT="${SCRIPT:-$(basename "$0" .sh)-$(variant)}"  # rows of two tables may share a name
FIGURES="$OUT/figures/$SCRIPT" SAMPLES="$OUT/samples/$SCRIPT" RECONSTRUCTIONS="$OUT/reconstructions"
dry || mkdir -p "$FIGURES" "$SAMPLES" "$RECONSTRUCTIONS"

# run COMMAND...: what every command goes through;  start: the same on NPROC processes;  once FILE COMMAND...: if FILE is missing
run() { if dry; then printf '%q ' "$@"; echo; else supervised "$@"; fi; }
start() { if dry; then run "$PYTHON" "$@"; else launch "$@"; fi; }
once() { [ -e "$1" ] || "${@:2}"; }
# kept FILE COMMAND...: in KEPT what COMMAND set it to the first time (a training inside $(...) would hear no signal)
kept() {
    if [ -e "$1" ]; then KEPT="$(cat "$1")"; return; fi
    mkdir -p "$(dirname "$1")"
    "${@:2}"
    keep "$1" "$KEPT"
}

# Where things are.  vq NAME: a tokenizer of tokenizer() or rearrange();  code_path NAME: its codes;  gpt_run NAME CODES: a GPT,
# or with SNAPSHOT set (0050) the weights that its training kept at that epoch
vq() {
    case "$1" in
        dual-* | equal-dual-*) echo "$OUT/tokenizers/$1/dual" ;;
        equal-*) echo "$OUT/tokenizers/$1/second" ;;
        balanced-* | coarse-*) echo "$OUT/rearranged/$1" ;;
        *) echo "$OUT/tokenizers/$1" ;;
    esac
}
code_path() { if toy; then echo "$OUT/codes/$1"; else echo "$OUT/codes/$1-$SIZE"; fi; }
gpt_run() { echo "$OUT/gpt/$2/$1-$(variant)${SNAPSHOT:+/snapshots/epoch-$SNAPSHOT}"; }

# classifiers: toy: the tokenizer's teacher and the judge of samples, as in the quickstart
classifiers() {
    toy || return 0
    local train=("$PYTHON" evaluations/c2i/classifier.py --data-path "$DATA" --image-size 32)
    once "$OUT/teacher.safetensors" run "${train[@]}" --out "$OUT/teacher.safetensors" --epochs 3 --seed 1
    once "$OUT/judge.safetensors" run "${train[@]}" --out "$OUT/judge.safetensors" --widths 48 96 128 --epochs 5 --seed 2
}

# tokenizer [equal-]QUANTIZER-SIZE[-SIZE]...: train tokenizers, dual ones in two stages.  With the prefix equal- the others too
# are trained twice, the second time from the first one's result: learning rate, Adam, averaging and discriminator start anew for
# all kinds, and no kind has loss terms that another lacks.
tokenizer() {
    local name sizes options stage1 stage2 whole again=()
    if toy; then
        stage1="--steps $((TOKENIZER_STEPS / 4))" stage2="--steps $TOKENIZER_STEPS" whole="--steps $((TOKENIZER_STEPS * 5 / 4))"
        again=(--codebook-init uniform)  # keeps the codes of the first run
    else
        stage1="--epochs $TOKENIZER_EPOCHS" stage2="$stage1" whole="$stage1"
    fi
    classifiers
    for name in "$@"; do
        IFS=- read -r -a sizes <<< "${name#equal-}"  # the quantizer, then its codebook sizes
        options=(--data-path "$DATA" --val-path "$VAL" "${TOKENIZER[@]}" --codebook-sizes "${sizes[@]:1}")
        [[ "$name" != equal-* ]] || options+=(--recipe equal)
        if [ "${sizes[0]}" = dual ]; then
            run env STAGE1="$stage1" STAGE2="$stage2" bash scripts/tokenizer/train_dual_vq.sh \
                --run-dir "$OUT/tokenizers/$name" "${options[@]}"
            continue
        fi
        options+=(--quantizer "${sizes[0]}")
        if [[ "$name" = equal-* ]]; then
            run bash scripts/tokenizer/train_vq.sh --run-dir "$OUT/tokenizers/$name/first" "${options[@]}" $stage1
            run bash scripts/tokenizer/train_vq.sh --run-dir "$(vq "$name")" "${options[@]}" $stage2 \
                --init-from "$OUT/tokenizers/$name/first" ${again[@]+"${again[@]}"}
        else
            run bash scripts/tokenizer/train_vq.sh --run-dir "$(vq "$name")" "${options[@]}" $whole
        fi
    done
}

# codes TOKENIZER...: codes of the training images, and of the held-out ones for likelihoods
codes() {
    local name extract size=("${IMAGES[@]}")
    toy || size=(--image-size "$SIZE")
    for name in "$@"; do
        extract=(autoregressive/train/extract_codes_c2i.py --vq-ckpt "$(vq "$name")" "${size[@]}")
        start "${extract[@]}" --data-path "$DATA" --code-path "$(code_path "$name")" --augmentation "$AUGMENTATION"
        start "${extract[@]}" --data-path "$VAL" --code-path "$(code_path "$name")-val" --augmentation none
    done
}

# rearrange METHOD-CLUSTERS...: IAR's or CTF's code maps of the single codebook
rearrange() {
    local name
    for name in "$@"; do
        once "$(vq "$name")/clusters.json" run "$PYTHON" tokenizer/tokenizer_image/rearrange.py --vq-ckpt "$(vq "$ONE")" \
            --method "${name%-*}" --clusters "${name#*-}" --out "$(vq "$name")"
    done
}

# rate TRAINING...: KEPT becomes images per second, by a short run
rate() {
    local probe status=0; probe="$(mktemp -d)"
    supervised "$@" --run-dir "$probe" --steps 20 --log-every 10 >&2 || status=$?
    if [ "$status" = 0 ]; then
        KEPT="$(tail -n 1 "$probe/metrics.jsonl" | "$PYTHON" -c "import json; print(json.loads(input())['images_per_second'])")"
    fi
    rm -rf "$probe"
    return "$status"
}

# toy_steps TRAINING...: toy: KEPT becomes the steps that fit into TIME or TOY_SECONDS
toy_steps() {
    rate "$@"
    KEPT="$("$PYTHON" -c "print(max(int(${TIME:-$TOY_SECONDS} * $KEPT / 128), 20))")"
}

# equal_time "OPTIONS" "REFERENCE OPTIONS": full scale: set EPOCHS to those that take on the dual codebook as long as the
# reference's EPOCHS; at toy scale every GPT is given the same time anyway, and DRY=1 makes no probe
equal_time() {
    local options rates=()
    if toy || dry; then return 0; fi
    for options in "$1" "$2"; do
        local train=(bash scripts/autoregressive/train_c2i.sh --gpt-model "$MODEL" --image-size "$SIZE"
                     --code-path "$(code_path "$DUAL")" "${GPT[@]}" $options)
        kept "$OUT/rates/$DUAL/${MODEL#GPT-}-$SIZE${options// /}" rate "${train[@]}"
        rates+=("$KEPT")
    done
    EPOCHS="$("$PYTHON" -c "print(round($EPOCHS * ${rates[0]} / ${rates[1]}, 1))")"
}

# gpt NAME CODES OPTIONS...: train a GPT; NAME says what its options are
gpt() {
    local folder options; folder="$(gpt_run "$1" "$2")"
    options=(--code-path "$(code_path "$2")" "${GPT[@]}" --seed "$SEED" "${@:3}")
    if toy; then
        options=(--gpt-model "$TOY_MODEL" "${options[@]}")
    else
        options=(--gpt-model "$MODEL" --image-size "$SIZE" --epochs "$EPOCHS" "${options[@]}")
    fi
    local train=(bash scripts/autoregressive/train_c2i.sh "${options[@]}")
    if toy && ! dry; then
        kept "$folder/steps" toy_steps "${train[@]}"
        train+=(--steps "$KEPT")
    fi
    run "${train[@]}" --run-dir "$folder"
}

# score ROW NAME CODES OPTIONS...: sample from a GPT and evaluate, once for the same GPT and options; figures go to ROW
score() {
    local about="$(gpt_run "$2" "$3") ${SAMPLE[*]} ${*:4}" name npz
    name="$1-$(cksum <<< "$about" | cut -d ' ' -f 1)"
    npz="$SAMPLES/$name.npz"
    if [ ! -e "$SAMPLES/$name.judged.json" ]; then
        start autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt "$(gpt_run "$2" "$3")" --vq-ckpt "$(vq "$3")" \
            "${SAMPLE[@]}" --seed "$SEED" --out "$npz" "${@:4}"
        if toy; then
            run "$PYTHON" evaluations/c2i/judge.py --classifier "$OUT/judge.safetensors" --reference "$VAL" --samples "$npz" \
                --out "$SAMPLES/$name.judged.json"
        else
            run "$PYTHON" evaluations/c2i/evaluator.py "$REFERENCE" "$npz" --json "$SAMPLES/$name.judged.json"
        fi
    fi
    figures "$1" "$SAMPLES/$name.judged.json" $(if toy; then echo --keys "$name"; fi)
    # Missing where samples were selected, or their drawing was interrupted.
    [ ! -e "$SAMPLES/$name.rate.json" ] || figures "$1" "$SAMPLES/$name.rate.json"
}

# likelihood ROW "RUN..." CODES "OPTIONS"...: bits per image on held-out codes; of several stages the sum, options of each in turn
likelihood() {
    local row="$1" runs="$2" codes="$3" files=() folder; shift 3
    for folder in $runs; do
        once "$folder/bits.json" start autoregressive/train/evaluate_c2i.py --gpt-ckpt "$folder" \
            --code-path "$(code_path "$codes")-val" --out "$folder/bits.json" ${1:-}
        files+=("$folder/bits.json")
        [ $# = 0 ] || shift
    done
    figures "$row" "${files[@]}"
}

# reconstruct ROW TOKENIZER: PSNR, SSIM, LPIPS, usage, and at full scale rFID
reconstruct() {
    local npz="$RECONSTRUCTIONS/$2.npz" val="$OUT/val256.npz"
    once "$RECONSTRUCTIONS/$2.json" start tokenizer/tokenizer_image/reconstruction_vq_ddp.py --vq-ckpt "$(vq "$2")" \
        --data-path "$VAL" "${IMAGES[@]}" ${PERCEPTUAL[@]+"${PERCEPTUAL[@]}"} --out "$npz"
    figures "$1" "$RECONSTRUCTIONS/$2.json"
    if ! toy; then
        once "$val" run "$PYTHON" tokenizer/validation/val_ddp.py --data-path "$VAL" --image-size 256 --out "$val"
        once "$RECONSTRUCTIONS/$2.rfid.json" run "$PYTHON" evaluations/c2i/evaluator.py "$val" "$npz" \
            --json "$RECONSTRUCTIONS/$2.rfid.json"
        figures "$1" --prefix r "$RECONSTRUCTIONS/$2.rfid.json"
    fi
}

# sweep FOLDER OPTIONS...: guidance ranges of one IAR2 on the dual codebook, the models loaded once
sweep() {
    local evaluate=(--reference "${REFERENCE:-$VAL}")
    tokenizer "$DUAL"; codes "$DUAL"
    gpt default "$DUAL"
    if toy; then evaluate+=(--judge "$OUT/judge.safetensors"); fi
    start scripts/paper/sweep_c2i.py --gpt-ckpt "$(gpt_run default "$DUAL")" --vq-ckpt "$(vq "$DUAL")" \
        "${SAMPLE[@]}" --seed "$SEED" --folder "$1" "${evaluate[@]}" "${@:2}"
}

# figures ROW FILE...: merge figures into FIGURES/ROW.json;  parameters ROW NAME CODES: add the number of a GPT's parameters
figures() { run "$PYTHON" scripts/paper/table.py merge --folder "$FIGURES" --name "$@"; }
parameters() { figures "$1" --gpt-ckpt "$(gpt_run "$2" "$3")"; }

# measured: what toy figures are of
measured() { echo "Measured: Fashion-MNIST, 4x4 cells, GPT-tiny, $TOY_SECONDS s each${NOTE:-}. Published: ImageNet."; }

# table N ROW... [--all-published]: print and keep the table of such rows
table() {
    local note=()
    if toy; then note=(--note "$(measured)"); fi
    run "$PYTHON" scripts/paper/table.py show --folder "$FIGURES" --table "$1" --rows "${@:2}" ${note[@]+"${note[@]}"}
}

# plot N FOLDER...: draw figure N from the rows in such folders to OUT/figureN.png
plot() {
    local options=(--out "$OUT/figure$1.png")
    if [ $# -gt 1 ]; then options+=(--folders "${@:2}"); fi
    if toy; then options+=(--toy "$(measured)"); fi
    run "$PYTHON" scripts/paper/plot_figures.py "$1" "${options[@]}"
}
