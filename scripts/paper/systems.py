"""The systems that are compared: each trains its models on a lab's codes."""

from scripts.paper.pipeline import Lab, Stage, System, Words
from scripts.paper.steps import Made, Step, Word


def on_codes(lab: Lab, tokenizer: Step, *options: Word, time_of: Words | None = None, guidance: Words = ()) -> System:
    """One GPT on the codes of a tokenizer: LlamaGen on those of one codebook, IAR2 on those of two, unless options say otherwise.

    options, time_of: see `Lab.gpt`; guidance: where a row says none.
    """
    return System(tokenizer, (Stage(lab.gpt(tokenizer, *options, time_of=time_of)),), Made(tokenizer, "run"), guidance)


def llamagen(lab: Lab) -> System:
    """LlamaGen: one codebook."""
    return on_codes(lab, lab.single, guidance=lab.scale.preset_one)


def iar2(lab: Lab) -> System:
    """IAR2: the dual codebook, hierarchical prediction with compressed local context."""
    return on_codes(lab, lab.dual, guidance=lab.scale.preset_two)


def iar(lab: Lab) -> System:
    """IAR: the single codebook reordered by clusters, which also decodes the samples, and the cluster loss."""
    clusters = lab.code_map("balanced", lab.scale.clusters)
    code_map = ("--code-map", Made(clusters, "map/code_map.safetensors"))
    gpt = lab.gpt(lab.single, *code_map, "--cluster-weight", 1, "--cluster-size", lab.scale.single // lab.scale.clusters)
    return System(lab.single, (Stage(gpt, code_map),), Made(clusters, "map"), lab.scale.preset_one)


def ctf(lab: Lab) -> System:
    """CTF: two models, which share the training time of the others at toy scale."""
    lab = lab.but(seconds=lab.seconds / 2)
    clusters = lab.code_map("coarse", lab.scale.coarse)
    stages = []
    for each, size in (("coarse", ""), ("fine", lab.scale.fine_model)):
        code_map = ("--code-map", Made(clusters, f"map/{each}_map.safetensors"))
        stages.append(Stage(lab.but(model=size).gpt(lab.single, *code_map), code_map))
    return System(lab.single, tuple(stages), Made(lab.single, "run"), lab.scale.preset_one, lab.scale.ctf_sampling)


SYSTEMS = {"llamagen": llamagen, "iar": iar, "ctf": ctf, "iar2": iar2}

# Table 5's paradigms, without local context.
PARADIGMS = {"alternating": ("--paradigm", "alternating", "--context", "none"),
             "grouped": ("--paradigm", "grouped", "--context", "none"),
             "independent": ("--paradigm", "independent", "--context", "none"),
             "hierarchical": ("--context", "none")}
