"""The paper's tables, a declaration each.

"Ours" marks what the paper does not say.  Unless a declaration says otherwise the model is a B of 24x24 tokens after 100 epochs.
"""

from dataclasses import replace

from scripts.paper.pipeline import Lab, System, Words
from scripts.paper.results import OF_GPTS, Figures, Result, Row, experiment, spelled
from scripts.paper.steps import Made, Step
from scripts.paper.systems import PARADIGMS, SYSTEMS, iar2, on_codes


@experiment()
def table1(lab: Lab) -> Result:
    """Table 1: sizes of the semantic and the detail codebook, reconstruction and generation; constant guidance, since its row
    128, 4096 is table 6's.  Toy: half the semantic, an eighth of the detail codes."""
    rows = []
    for semantic, detail in ((128, 4096), (256, 4096), (512, 4096), (256, 2048), (256, 8192)):
        sizes = (semantic // 2, detail // 8) if lab.toy else (semantic, detail)
        system = on_codes(lab, lab.tokenizer("dual", *sizes))
        rows.append(lab.row(f"{semantic}-{detail}", system, lab.constant, reconstruction=True))
    return Result(tuple(rows), "1", note=", half the semantic and an eighth of the detail codes")


@experiment(model="GPT-XXL", epochs=300, options=["classifier"])
def table2(lab: Lab) -> Result:
    """Table 2: IAR2 without and with rejection sampling, XXL, 300 epochs (--gpt-model, --image-size and --epochs for its other
    rows), beside all published rows.  Ours: the rejection ratio 4 (a quarter of the candidates is kept) and the classifier
    ConvNeXt, since the paper says neither."""
    name, system = f"iar2-{lab.row_size}", iar2(lab)
    classifier = lab.small_classifier("teacher") if lab.toy else lab.classifier
    rejecting = replace(system, sampling=("--rejection-ratio", 4, "--classifier", classifier))
    return Result((lab.row(name, system), lab.row(f"{name}-rejection", rejecting)), "2", all_published=True)


@experiment(epochs=300)
def table3(lab: Lab) -> Result:
    """Table 3: LlamaGen, IAR, CTF and IAR2 for one size and grid (--gpt-model, --image-size 256 or 384, --epochs 50 or 300)."""
    rows = tuple(lab.row(f"{name}-{lab.row_size}", system(lab), bits=True) for name, system in SYSTEMS.items())
    return Result(rows, f"3-{lab.image_size // 16}-{lab.epochs:g}")


def equal_tokenizers(lab: Lab) -> dict[str, Step]:
    """Single, unassociated and associated dual codebook, with equal losses and phases."""
    semantic, detail, single = lab.scale.semantic, lab.scale.detail, lab.scale.single
    return {"single": lab.tokenizer("single", single, equal=True),
            "unassociated": lab.tokenizer("product", semantic, detail, equal=True),
            "associated": lab.tokenizer("dual", semantic, detail, equal=True)}


@experiment()
def table4(lab: Lab) -> Result:
    """Table 4: association of the codebooks, local context, PAG-CFG.  Ours: tokenizers with equal losses and phases, so that the
    rows differ by the codebook alone; both guidances."""
    rows: dict[str, tuple[System, Words]] = {}
    for name in ("unassociated", "associated"):
        tokenizer = equal_tokenizers(lab)[name]
        plain, context = on_codes(lab, tokenizer, "--context", "none"), on_codes(lab, tokenizer)
        rows |= {name: (plain, lab.constant), f"{name}-pag": (plain, lab.guided("attention")),
                 f"{name}-context": (context, lab.constant)}
    rows["iar2"] = (context, lab.guided("attention"))
    order = ("unassociated", "associated", "unassociated-context", "unassociated-pag", "associated-context", "associated-pag",
             "iar2")
    return Result(tuple(lab.row(name, *rows[name]) for name in order), "4", all_published=True)


@experiment()
def table5(lab: Lab) -> Result:
    """Table 5: prediction paradigms in the time of 100 epochs of hierarchical prediction; (128, 4096) codes, no local context,
    constant guidance."""
    tokenizer, reference = lab.tokenizer("dual", 128, lab.scale.detail), PARADIGMS["hierarchical"]
    return Result(tuple(lab.row(name, on_codes(lab, tokenizer, *options, time_of=reference), lab.constant, bits=True)
                        for name, options in PARADIGMS.items()), "5")


@experiment(options=["window_size"])
def table6(lab: Lab) -> Result:
    """Table 6: the head's local context: none, concatenated neighbours, compressed neighbours, in the time of 100 epochs of the
    compressed ones; (128, 4096) codes, constant guidance."""
    tokenizer = lab.tokenizer("dual", 128, lab.scale.detail)
    window = () if lab.window_size == 5 else ("--window-size", lab.window_size)
    contexts = {"none": ("--context", "none"), "concatenated": ("--context", "concatenated", *window), "compressed": window}
    return Result(tuple(lab.row(name, on_codes(lab, tokenizer, *options, time_of=window), lab.constant, bits=True)
                        for name, options in contexts.items()), "6")


@experiment()
def table7(lab: Lab) -> Result:
    """Table 7: single, unassociated dual and associated dual codebook, without local context and PAG-CFG.  Ours: tokenizers with
    equal losses and phases, so that the rows differ by the codebook alone; the guidance scale."""
    def row(name: str, tokenizer: Step) -> Row:
        options = () if name == "single" else ("--context", "none")
        return lab.row(name, on_codes(lab, tokenizer, *options), lab.constant, bits=True, reconstruction=True)
    return Result(tuple(row(*each) for each in equal_tokenizers(lab).items()), "7")


@experiment(epochs=300)
def table8(lab: Lab) -> Result:
    """Table 8: constant, progressive, and progressive attention-guided CFG of one IAR2, 300 epochs (--epochs 100 for the other
    half)."""
    guidances = {"constant": lab.constant, "progressive": lab.guided("progressive"), "attention": lab.guided("attention")}
    return Result(tuple(lab.row(name, iar2(lab), guidance) for name, guidance in guidances.items()), f"8-{lab.epochs:g}")


@experiment(epochs=300)
def table9(lab: Lab) -> Result:
    """Table 9: a grid of guidance ranges from one IAR2, 300 epochs, the models loaded once."""
    ranges = ("1.5:2.25", "1.5:2.5", "1.5:2.75", "1.5:3.0", "1.75:2.25", "1.75:2.5", "1.75:2.75", "1.75:3.0", "1.75:3.5",
              "2.0:2.5", "2.0:2.75", "2.0:3.0")
    sweep = lab.sweep(iar2(lab), "--ranges", *ranges)
    return Result(tuple(swept(sweep, text.replace(":", "-"), text) for text in ranges), "9")


@experiment()
def table10(lab: Lab) -> Result:
    """Table 10: the weight λ_s of the semantic loss, constant guidance."""
    return Result(tuple(lab.row(f"lambda-{weight}", on_codes(lab, lab.dual, "--semantic-weight", weight), lab.constant)
                        for weight in (0.5, 1, 2, 3, 5)), "10")


@experiment(options=["baselines"], unread=(*OF_GPTS, "reference"))
def table13(lab: Lab) -> Result:
    """Table 13: reconstruction by LlamaGen's tokenizer and by IAR2's, and by --baselines, beside all published rows."""
    tokenizers: dict[str, Step | str] = {}  # baselines come first: they need no training, and a wrong name is told at once
    for given in lab.baselines:
        short = spelled([given.rstrip("/").rsplit("/")[-1]])
        tokenizers[spelled([given]) if short in tokenizers else short] = given
    tokenizers |= {"llamagen": lab.single, "iar2": lab.dual}
    return Result(tuple(Row(name, lab.reconstruction(tokenizer)) for name, tokenizer in tokenizers.items()), "13",
                  all_published=True)


def swept(sweep: Step, name: str, text: str) -> Row:
    """The row of one range of a sweep; text: the range, as `sweep_c2i.py` knows it."""
    return Row(name, (Figures(Made(sweep, "sweep/sweep.json"), keys=(text, "figures")),))
