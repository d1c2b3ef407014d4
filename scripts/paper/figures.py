"""The paper's figures that hold measurements or samples, a declaration each; see tables.py."""

from dataclasses import replace

from scripts.paper.pipeline import Lab
from scripts.paper.results import OF_GPTS, Result, experiment
from scripts.paper.steps import Made, Own, Word
from scripts.paper.systems import iar, iar2, llamagen, on_codes
from scripts.paper.tables import swept


@experiment(epochs=300, gathers=True)
def figure1(lab: Lab) -> Result:
    """Figure 1: FID over the number of parameters, the systems of table 2.  Paper's scale: trains nothing, but draws what table2
    and table3 have measured with this --image-size, --epochs and --seed beside the published points.  Toy: IAR2 and LlamaGen of
    one size, on axes of their own."""
    if not lab.toy:
        return Result(plot="1", plotted=("table2", "table3"))
    return Result((lab.row("llamagen-tiny", llamagen(lab), bits=True, parameters=True),
                   lab.row("iar2-tiny", iar2(lab), bits=True, parameters=True)), plot="1")


@experiment(options=["drawing_options"], unread=(*OF_GPTS, "reference"))
def figure3(lab: Lab) -> Result:
    """Figure 3: MSE and LPIPS against the distance of replaced codes, and the pictures (single codebook)."""
    tokenizer = lab.single
    drawn = lab.step("figure3", tokenizer.label, "tokenizer/tokenizer_image/code_distance.py", "--vq-ckpt",
                     Made(tokenizer, "run"), "--data-path", lab.validation, *lab.scale.images, *lab.perceptual,
                     *lab.drawing_options, "--out", Own("figure3"))
    return Result(pictures=(Made(drawn, "figure3"),))


@experiment()
def figure4(lab: Lab) -> Result:
    """Figure 4: reconstruction and generation over the size of a single codebook (LlamaGen-B), beside IAR2's dual codebook: a
    table and a picture.  The paper speaks of seven sizes, "from 256, 1k, 4k, ..., to 256k"; the powers of four that it lists are
    six.  Ours: 100 epochs and the guidance, which the paper does not say here.  Published points: the two FIDs that its text
    states."""
    sizes = (64, 256, 1024, 2048) if lab.toy else (256, 1024, 4096, 16384, 65536, 262144)
    tokenizers = [*(lab.tokenizer("single", size) for size in sizes), lab.dual]
    return Result(tuple(lab.row(tokenizer.label, on_codes(lab, tokenizer), lab.constant, reconstruction=True)
                        for tokenizer in tokenizers), "figure4", plot="4")


@experiment(epochs=300, options=["drawing_options"], unread=["reference"])
def figure6(lab: Lab) -> Result:
    """Figure 6: attention to the class (its logarithm) and guidance scale of every cell, over images of one IAR2 with the
    guidance that its checkpoint carries.  Ours: B, 300 epochs and the classes, which the paper does not say."""
    system = iar2(lab)
    classes: tuple[Word, ...] = ("--classes", *range(10)) if lab.toy else ()
    drawn = lab.step("figure6", system.stages[0].gpt.label, "autoregressive/sample/guidance_map.py", "--gpt-ckpt",
                     system.checkpoint, "--vq-ckpt", system.decoder, "--seed", lab.seed, *classes, *lab.drawing_options,
                     "--out", Own("figure6.png"))
    return Result(pictures=(Made(drawn, "figure6.png"), Made(drawn, "figure6.json")))


@experiment(epochs=300, options=["models", "drawing_options"], unread=["gpt_model"])
def figure7a(lab: Lab) -> Result:
    """Figure 7a: constant guidance over its scale; PAG-CFG with the range that the checkpoint carries (table 12) is a horizontal
    line.  --models: the sizes (GPT-B GPT-L); 300 epochs.  Ours: the steps between the scales."""
    scales = ("1.0", "1.25", "1.5", "1.75", "1.8", "1.85", "1.9", "1.95", "2.0", "2.25", "2.5", "3.0")
    rows = []
    for model in (lab.model,) if lab.toy else lab.models or ("GPT-B", "GPT-L"):
        sweep = lab.sweep(iar2(lab.but(model)), "--ranges", "carried", *(f"{scale}:{scale}" for scale in scales),
                          "--guidance", "attention", *lab.drawing_options)
        rows += [swept(sweep, f"{model}-pag", "carried")]
        rows += [swept(sweep, f"{model}-{scale}", f"{scale}:{scale}") for scale in scales]
    return Result(tuple(rows), plot="7a")


@experiment(epochs=300, gathers=True)
def figure7b(lab: Lab) -> Result:
    """Figure 7b: FID and inception score of LlamaGen, IAR and IAR2 over the number of parameters.  Paper's scale: trains nothing,
    but draws what table3 has measured with this --image-size, --epochs and --seed beside the published points.  Toy: two sizes,
    GPT-tiny and GPT-small, in equal time, on axes of their own."""
    if not lab.toy:
        return Result(plot="7b", plotted=("table3",))
    return Result(tuple(lab.row(f"{name}-{size}", system(lab.but(f"GPT-{size}")), bits=True, parameters=True)
                        for size in ("tiny", "small")
                        for name, system in (("llamagen", llamagen), ("iar", iar), ("iar2", iar2))),
                  plot="7b", note=", and GPT-small")


@experiment(epochs=300)
def figure7c(lab: Lab) -> Result:
    """Figure 7c: FID and inception score of IAR2 and LlamaGen over training epochs at one constant guidance scale, from the
    weights that one training keeps every --keep-every epochs (300 epochs).  Toy: IAR2, whose steps take longer, trains for twice
    the time, so that both curves are about as long."""
    systems = {"llamagen": llamagen(lab), "iar2": iar2(lab.but(seconds=2 * lab.seconds))}
    rows = [lab.row(f"{name}-{epoch}", replace(system, weights=f"run/snapshots/epoch-{epoch}"), lab.constant)
            for name, system in systems.items() for epoch in lab.snapshots(system)]
    return Result(tuple(rows), plot="7c", note=" (IAR2: twice as long)")


@experiment(image_size=256, epochs=50, options=["models"], unread=["gpt_model", "reference"])
def figure8(lab: Lab) -> Result:
    """Figure 8: training losses by model size, 16x16 tokens, 50 epochs (toy: one and two head layers).  --models: the sizes
    (GPT-B GPT-L GPT-XL GPT-XXL)."""
    if lab.toy:
        systems = {"1 head layer": on_codes(lab, lab.dual, "--head-layers", 1), "2 head layers": iar2(lab)}
    else:
        systems = {model: iar2(lab.but(model)) for model in lab.models or ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL")}
    pictures = []
    for metric in ("loss_semantic", "loss_detail"):
        drawn = lab.step("figure8", metric, "scripts/paper/plot_losses.py", *(each.checkpoint for each in systems.values()),
                         "--names", *systems, "--metric", metric, "--out", Own(f"figure8-{metric}.png"))
        pictures += [Made(drawn, f"figure8-{metric}.png"), Made(drawn, f"figure8-{metric}.json")]
    return Result(pictures=tuple(pictures))


# Classes of figures 9 to 11, a row for each.
CLASSES = {
    "paper": {"9": {417: "balloon", 12: "house finch", 873: "triumphal arch", 460: "breakwater"},
              "10": {970: "alp", 279: "Arctic fox", 336: "marmot", 628: "liner"},
              "11": {272: "coyote", 780: "schooner", 832: "stupa", 985: "daisy"}},
    "toy": {"9": {0: "T-shirt", 1: "trousers", 2: "pullover", 3: "dress"},
            "10": {4: "coat", 5: "sandal", 6: "shirt", 7: "sneaker"},
            "11": {8: "bag", 9: "boot"}},
}


@experiment(model="GPT-XL", epochs=300, unread=["reference"])
def figure9(lab: Lab) -> Result:
    """Figures 9 to 11: samples of twelve classes by one IAR2-XL after 300 epochs, with the range of guidance that the paper
    names.  Toy: the ten classes of the bundled images."""
    system = iar2(lab)
    guidance = lab.guided("attention") if lab.toy else ("--guidance", "attention", "--cfg-scale", 1.35, 3)
    pictures = []
    for number, classes in CLASSES["toy" if lab.toy else "paper"].items():
        drawn = lab.step(f"figure{number}", system.stages[0].gpt.label, "autoregressive/sample/sample_c2i.py", "--gpt-ckpt",
                         system.checkpoint, "--vq-ckpt", system.decoder, *guidance, "--seed", lab.seed, "--classes", *classes,
                         "--class-names", *classes.values(), "--out", Own(f"figure{number}.png"))
        pictures.append(Made(drawn, f"figure{number}.png"))
    return Result(pictures=tuple(pictures))
