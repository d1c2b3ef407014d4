# Sourced after common.sh: the systems that are compared; each trains, samples and scores one row, named by its argument.
# PRESET_ONE and PRESET_TWO are the guidance of one and of two codebooks; empty: what the checkpoints carry.

# tokenizers: one single and one dual codebook, and the code maps of IAR and CTF
tokenizers() {
    tokenizer "$ONE" "$DUAL"; codes "$ONE" "$DUAL"
    rearrange "$IAR" "$CTF"
}

llamagen() {
    gpt default "$ONE"
    score "$1" default "$ONE" ${PRESET_ONE[@]+"${PRESET_ONE[@]}"}
    likelihood "$1" "$(gpt_run default "$ONE")" "$ONE"
}

# IAR: its samples are decoded by the reordered tokenizer
iar() {
    local map; map="--code-map $(vq "$IAR")/code_map.safetensors"
    gpt iar "$ONE" $map --cluster-weight 1 --cluster-size $((SINGLE / CLUSTERS))
    score "$1" iar "$ONE" --vq-ckpt "$(vq "$IAR")" ${PRESET_ONE[@]+"${PRESET_ONE[@]}"}
    likelihood "$1" "$(gpt_run iar "$ONE")" "$ONE" "$map"
}

# CTF: two models, which share the training time of the others at toy scale.  At full scale CTF's own recipe: its second
# model has GPT-L's size (343M) beside any first one, both temperatures are 1.1.
ctf() {
    local maps coarse fine sampling="" TIME=$(( ${TOY_SECONDS:-0} / 2 )); maps="--code-map $(vq "$CTF")"
    toy || sampling="--temperature 1.1 --fine-temperature 1.1"
    gpt ctf-coarse "$ONE" $maps/coarse_map.safetensors
    MODEL=GPT-L gpt ctf-fine "$ONE" $maps/fine_map.safetensors
    coarse="$(gpt_run ctf-coarse "$ONE")" fine="$(MODEL=GPT-L gpt_run ctf-fine "$ONE")"
    score "$1" ctf-coarse "$ONE" --fine-ckpt "$fine" ${PRESET_ONE[@]+"${PRESET_ONE[@]}"} $sampling
    likelihood "$1" "$coarse $fine" "$ONE" "$maps/coarse_map.safetensors" "$maps/fine_map.safetensors"
}

# dual_row ROW NAME OPTIONS...: one GPT on the dual codebook
dual_row() {
    gpt "$2" "$DUAL" "${@:3}"
    score "$1" "$2" "$DUAL" ${PRESET_TWO[@]+"${PRESET_TWO[@]}"}
    likelihood "$1" "$(gpt_run "$2" "$DUAL")" "$DUAL"
}

iar2() { dual_row "$1" default; }

# Table 5's paradigms, without local context.
alternating() { dual_row "$1" alternating --paradigm alternating --context none; }
grouped() { dual_row "$1" grouped --paradigm grouped --context none; }
independent() { dual_row "$1" independent --paradigm independent --context none; }
hierarchical() { dual_row "$1" none --context none; }
