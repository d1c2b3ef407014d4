# Sourced after common.sh: the systems that are compared; each trains, samples and scores one row, named by its argument.
# CONSTANT and RANGE are the guidance of one and of two codebooks.

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
    score "$1" "$1" single --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$1" "$1" single
}

iar() {
    local map=(--code-map "$OUT/rearranged/iar/code_map.safetensors")
    gpt "$1" single "${map[@]}" --cluster-weight 1 --cluster-size $((SINGLE / CLUSTERS))
    score "$1" "$1" iar --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$1" "$1" single "${map[@]}"
}

# CTF: two models, which share the training time of the others at toy scale
ctf() {
    local maps="$OUT/rearranged/ctf" TIME=$(( ${TOY_SECONDS:-0} / 2 ))
    gpt "$1-coarse" single --code-map "$maps/coarse_map.safetensors"
    gpt "$1-fine" single --code-map "$maps/fine_map.safetensors" --paradigm fine
    score "$1" "$1-coarse" single --fine-ckpt "$OUT/gpt/$1-fine" --guidance constant --cfg-scale "$CONSTANT"
    likelihood "$1" "$1-coarse" single --code-map "$maps/coarse_map.safetensors"
    likelihood "$1" "$1-fine" single --code-map "$maps/fine_map.safetensors"
}

iar2() { dual_row "$1" "--cfg-scale $RANGE"; }

# dual_row NAME "SAMPLING OPTIONS" TRAINING OPTIONS...: one GPT on the dual codebook
dual_row() {
    local name="$1" sampling="$2"; shift 2
    gpt "$name" dual "$@"
    score "$name" "$name" dual $sampling
    likelihood "$name" "$name" dual
}
