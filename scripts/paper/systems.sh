# Sourced after common.sh: the systems that are compared; each trains, samples and scores one row, named by its argument.
# PRESET_ONE and PRESET_TWO are the guidance of one and of two codebooks; empty: what the checkpoints carry.

# tokenizers: one single and one dual codebook, and the code maps of IAR and CTF
tokenizers() {
    tokenizer single single $SINGLE
    tokenizer dual dual $SEMANTIC $DETAIL
    codes single; codes dual
    rearrange iar balanced $CLUSTERS
    rearrange ctf coarse $COARSE
}

llamagen() {
    gpt "$1" single
    score "$1" "$1" single ${PRESET_ONE[@]+"${PRESET_ONE[@]}"}
    likelihood "$1" "$1" single
}

iar() {
    local map="--code-map $OUT/rearranged/iar/code_map.safetensors"
    gpt "$1" single $map --cluster-weight 1 --cluster-size $((SINGLE / CLUSTERS))
    score "$1" "$1" iar ${PRESET_ONE[@]+"${PRESET_ONE[@]}"}
    likelihood "$1" "$1" single "$map"
}

# CTF: two models, which share the training time of the others at toy scale
ctf() {
    local map="--code-map $OUT/rearranged/ctf" TIME=$(( ${TOY_SECONDS:-0} / 2 ))
    gpt "$1-coarse" single $map/coarse_map.safetensors
    gpt "$1-fine" single $map/fine_map.safetensors
    score "$1" "$1-coarse" single --fine-ckpt "$OUT/gpt/$1-fine$VARIANT" ${PRESET_ONE[@]+"${PRESET_ONE[@]}"}
    likelihood "$1" "$1-coarse $1-fine" single "${map}/coarse_map.safetensors" "${map}/fine_map.safetensors"
}

iar2() { dual_row "$1"; }

# dual_row NAME TRAINING OPTIONS...: one GPT on the dual codebook
dual_row() {
    local name="$1"; shift
    gpt "$name" dual "$@"
    score "$name" "$name" dual ${PRESET_TWO[@]+"${PRESET_TWO[@]}"}
    likelihood "$name" "$name" dual
}
