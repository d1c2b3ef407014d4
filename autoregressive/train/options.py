"""Options of GPT training: table 11's recipes, and the model that options and codes describe."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from autoregressive.models.conditions import CONDITIONS
from autoregressive.models.gpt import GPT_models
from autoregressive.models.guidance import ATTENTION_WEIGHT, LARGER
from autoregressive.models.losses import ObjectiveOptions
from autoregressive.models.paradigms import HEAD, PARADIGMS, WINDOW
from autoregressive.models.transformer import GPTConfig
from autoregressive.train.optimizers import OPTIMIZERS
from autoregressive.train.preview import PreviewOptions
from autoregressive.train.sources import Told, find_source
from utils.batches import BatchOptions
from utils.code_map import CodeMap, load_code_map
from utils.code_shards import CodeHeader, read_joint_header
from utils.config import Count, Fraction, NonNegative, Positive, Probability, UserError, Values, choices, flag, require_multiple
from utils.devices import Compile
from utils.distributed import nodes
from utils.hub import hub_path
from utils.optim import OptimOptions, typed_schedule
from utils.run import RunOptions
from utils.shards import require_fit
from utils.text_encoders import EncoderRecord
from utils.text_shards import CaptionOptions, read_text_header


@dataclass
class CodeOptions:
    """Which codes to train on."""

    code_path: tuple[Annotated[Path, hub_path("--code-path")], ...]
    """Folders written by extract_codes_c2i.py for the same images (say, ten-crops of range 1.1 and 1.05): crops are drawn from
    all of them."""
    code_map: str = ""
    """Code map written by rearrange.py, applied while reading: IAR's new order, CTF's coarse or (coarse, fine) labels."""
    val_code_path: str = ""
    """Held-out codes: their cross-entropy and bits per image are logged every --eval-every steps; empty: none."""
    eval_every: Count = 5000
    """Steps between evaluations on --val-code-path; 0: only at the end."""
    keep_best: bool = False
    """Keep the model of the evaluation with the fewest bits per image in best/gpt.safetensors (early stopping)."""
    num_workers: Count = 4
    """Loader processes for each training process, at most one a CPU."""


@dataclass
class GPTOptions:
    """Which GPT to build."""

    gpt_model: Annotated[str, choices(GPT_models)] = "GPT-B"
    """Size; with the grid and the codebooks it selects the recipe (none for GPT-tiny, GPT-small and other grids)."""
    image_size: Count = 0
    """Side of the images in pixels; with --downsample-size it gives the grid; 0: that of the codes (256 before there are any)."""
    downsample_size: Count = 0
    """Pixels a grid cell covers along one axis; 0: those of the codes (16)."""
    condition: Annotated[str, choices(CONDITIONS)] = "class"
    """What images are asked for by: their class, or a caption whose features --code-path holds."""
    num_classes: Count = 0
    """Classes of the data set; 0: those of the codes (1000)."""
    caption_rotary: Literal["identity", "zero"] = "identity"
    """Rotation of a caption's positions: none, or LlamaGen's zero rows, which give every word the same attention."""
    codebook_sizes: tuple[Positive, ...] = ()
    """Codes of each codebook, checked against the codes; empty: those of --code-path (after --code-map)."""
    paradigm: Annotated[str, choices(("auto", *PARADIGMS))] = "auto"
    """Prediction paradigm (table 5); auto: single for one codebook, hierarchical for two, fine for a map of fine labels."""
    context: Literal["compressed", "concatenated", "none"] = "compressed"
    """Local context of the hierarchical head (table 6), and of the conditional MLPs: neighbours compressed, concatenated whole,
    or none."""
    head_layers: Count = 0
    """Layers of the hierarchical head; 0: the size's own."""
    head_width: Count = 0
    """Width of the hierarchical head, a multiple of the dimension of the trunk's heads; 0: the trunk's width."""
    window_size: Annotated[int, Values(int, "ODD INT>=3", "an odd integer of 3 or more", lambda k: k >= 3 and k % 2 == 1)] = 5
    """Side K of the local window (equation 15)."""
    qk_norm: bool = False
    """Normalise queries and keys of every layer before they are rotated."""
    rotary: Literal["grid", "repeated"] = "grid"
    """Rotary rows: one per cell, or the released table, which repeats rows."""
    head_rotary: Literal["none", "zero_summary"] = "none"
    """Rotation of the head's slots: none, or the released zero row for the summary."""
    order: Literal["raster", "random"] = "raster"
    """Order of prediction in training: raster, or random annealed to raster (RAR); sampling is in raster order either way."""
    order_anneal: tuple[Probability, Probability] = (0.5, 0.75)
    """Random order: shares of the training, START END, between which the probability of a random order falls from 1 to 0."""
    dropout: Fraction = 0.1
    """Dropout of tokens, residual branches and feed-forward layers."""
    class_dropout: Probability = 0.1
    """Probability of training a sample without its class or caption."""


@dataclass
class ParallelOptions:
    """How the model is spread over processes, and what is traded for memory or speed."""

    data_parallel: Annotated[str, choices(("none", "ddp", "fsdp", "hsdp"))] = "ddp"
    """none, ddp, fsdp (FSDP2 over all processes), hsdp (shards inside groups, replicates between)."""
    shard_size: Count = 0
    """hsdp: processes of a shard group; 0: those of a node."""
    activation_checkpointing: bool = False
    """Recompute every layer in the backward pass: less memory, a third more arithmetic.  On a GPU this is chosen where nothing
    else fits and --micro-batch-size is 0."""
    compile: Compile = "auto"
    """torch.compile every layer; auto: on GPUs."""

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded; FSDP2 then casts to bf16 itself."""
        return self.data_parallel in ("fsdp", "hsdp")


@dataclass
class DeviceOptions:
    """The devices that a training is planned for, and a look at the plan."""

    device_memory: NonNegative = 0.0
    """GiB of a device; 0: what this machine's GPU has.  --micro-batch-size 0 takes the largest share that fits it."""
    peak_tflops: NonNegative = 0.0
    """Dense bf16 TFLOP/s of a device, for the utilisation in the log; 0: from a table of GPUs."""
    world_size: Count = 0
    """Dry run: processes to plan for; 0: those that were started."""
    dry_run: bool = False
    """Print model, steps, memory, time and the options that differ from --help's, and exit."""


BATCH = 256  # images of a step, but for XXL at 24x24 cells and data sets of fewer images


@dataclass
class TrainConfig:
    """Defaults below are those of the recipe that the other words select, for example --gpt-model GPT-XXL --help.

    The recipe sets batch, epochs, learning rate, schedule, λ_s and parallelism.
    """

    codes: CodeOptions
    run: RunOptions
    gpt: GPTOptions
    captions: CaptionOptions
    objective: ObjectiveOptions
    parallel: ParallelOptions
    batch: BatchOptions = field(default_factory=lambda: BatchOptions(epochs=300, global_batch_size=BATCH))
    optim: OptimOptions = field(default_factory=lambda: OptimOptions(weight_decay=0.05))
    optimizer: Annotated[str, choices(OPTIMIZERS)] = "adamw"
    """adamw, as in table 11, or muon (not of the paper; --recipe beyond): Muon for hidden matrices, AdamW for the rest."""
    recipe: Annotated[str, choices(ATTENTION_WEIGHT)] = "paper"
    """Learning rates, λ_s and w of the guidance.  paper: table 11 and the paper's text; released: IAR2's trainers and sampler;
    beyond: the paper's with Muon, the best of the study's rows that are not the paper's (scripts/paper)."""
    init_from: str = ""
    """gpt.safetensors or run folder whose weights start this run: all that fit; the log says what is drawn anew."""
    init_strict: bool = False
    """Refuse --init-from where any weight, class name or text encoder differs, instead of drawing that part anew."""
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    devices: DeviceOptions = field(default_factory=DeviceOptions)


# LlamaGen's images, where there are no codes yet to say what they are of.
IMAGENET = {"image_size": 256, "downsample_size": 16, "num_classes": 1000}

# Options that must not change on resume.
FIXED_OPTIONS = ("seed", "global_batch_size", "ema_decay", "lr_schedule", "weight_decay", "semantic_weight", "cluster_weight",
                 "cluster_size", "order_anneal", "optimizer", "init_strict")
# What decides fields of the model, and facts of the codes, that are no options of the same name.
MODEL_FLAGS = (dict.fromkeys(("dim", "n_layer", "n_head"), "--gpt-model") | {"grid_size": "--image-size and --downsample-size"}
               | dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), "--dropout")
               | dict.fromkeys(("tokenizer", "images_checksum"), "--code-path") | {"coarse": "--code-map"}
               | dict.fromkeys(("caption_length", "caption_dim", *(each.name for each in fields(EncoderRecord))), "--text-path"))


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a training; an end of the learning rate means cosine decay to it."""

    global_batch_size: int = BATCH
    lr: float = 1e-4
    lr_end: float = 0.0
    epochs: float = 300
    semantic_weight: float = 1.0
    data_parallel: str = "ddp"


# By number of codebooks, size and side of the grid.  AdamW (0.9, 0.95), weight decay 0.05, clipping at 1.0 for all.
RECIPES: dict[tuple[int, str, int], Recipe] = {
    # IAR2: table 11.  Deviation: XXL at 16x16 is sharded; otherwise weights, gradients and moments take 23 GiB of each device.
    (2, "GPT-B", 16): Recipe(semantic_weight=2.0, data_parallel="fsdp"),
    (2, "GPT-L", 16): Recipe(data_parallel="fsdp"),
    (2, "GPT-XL", 16): Recipe(lr=1.5e-4, lr_end=5e-5, epochs=50),
    (2, "GPT-XXL", 16): Recipe(lr=1.5e-4, lr_end=5e-5, epochs=50, data_parallel="fsdp"),
    (2, "GPT-B", 24): Recipe(semantic_weight=2.0, data_parallel="fsdp"),
    (2, "GPT-L", 24): Recipe(data_parallel="fsdp"),
    (2, "GPT-XL", 24): Recipe(lr=1.5e-4, lr_end=5e-5),
    (2, "GPT-XXL", 24): Recipe(global_batch_size=512, lr=3e-4, lr_end=1e-4, semantic_weight=1.5, data_parallel="fsdp"),
    # LlamaGen's training, which IAR and CTF follow; XL and XXL at 16x16 for 50 epochs, as in table 3.
    (1, "GPT-B", 16): Recipe(),
    (1, "GPT-L", 16): Recipe(),
    (1, "GPT-XL", 16): Recipe(epochs=50),
    (1, "GPT-XXL", 16): Recipe(epochs=50, data_parallel="fsdp"),
    (1, "GPT-B", 24): Recipe(),
    (1, "GPT-L", 24): Recipe(),
    (1, "GPT-XL", 24): Recipe(),
    (1, "GPT-XXL", 24): Recipe(data_parallel="fsdp"),
}


def released(row: Recipe, size: str, sharded: bool) -> Recipe:
    """What IAR2's released trainers do instead of a row of table 11: one schedule for DDP, another for FSDP, for every size.

    λ_s is 1, and 2 for L in the release's README.  Batch and epochs, which are typed there, stay the row's.
    """
    lr, lr_end = (3e-4, 1e-4) if sharded else (1.5e-4, 5e-5)
    return replace(row, lr=lr, lr_end=lr_end, semantic_weight=2.0 if size == "GPT-L" else 1.0,
                   data_parallel="fsdp" if sharded else "ddp")


def recipe(config: TrainConfig) -> dict[str, Any]:
    """Defaults for the codes, size and grid that the command line names: their shape, a row of RECIPES, the run's folder."""
    header, code_map = known_header(config.codes)
    options = shaped(config.gpt, header)
    size = "GPT-XXL" if options.gpt_model in LARGER else options.gpt_model  # which have no row in table 11
    codebook_sizes = known_sizes(config.gpt, header, code_map)
    # Both stages of CTF read one codebook through a map and train as LlamaGen does, also on pairs of labels.
    codebooks = 1 if code_map and code_map.coarse else len(codebook_sizes)
    row = RECIPES.get((codebooks, size, options.image_size // options.downsample_size))
    kind = "" if options.condition == "class" else f"-{options.condition}"
    defaults: dict[str, Any] = {"run_dir": Path(f"runs/{options.gpt_model}-{options.image_size}{kind}")}
    defaults |= {name: getattr(options, name) for name in IMAGENET if name != "num_classes" or options.condition == "class"}
    if row and codebooks == 2 and config.recipe == "released":
        row = released(row, size, config.parallel.sharded or size == "GPT-XXL")
    if row:
        defaults |= asdict(row) | {"lr_schedule": "cosine" if row.lr_end else "constant"}
        if row.data_parallel == "fsdp" and nodes() > 1:  # shards that cross nodes wait for the network at every layer
            defaults["data_parallel"] = "hsdp"
    if config.recipe == "beyond":
        defaults["optimizer"] = "muon"
    if options.condition == "text" and not has_short_captions(config):
        defaults["short_captions"] = 0.0
    if header and header.images < defaults.get("global_batch_size", BATCH):  # two steps or more an epoch
        defaults["global_batch_size"] = 2 ** max((header.images // 2).bit_length() - 1, 0)
    return defaults | typed_schedule(config.optim)


def mapped_header(options: CodeOptions) -> tuple[CodeHeader, CodeMap | None]:
    """The header of the codes as the GPT will see them, and the map that makes them so."""
    header = read_joint_header(options.code_path)
    if not options.code_map:
        return header, None
    code_map = load_code_map(options.code_map)
    return code_map.header(header, f"--code-map {options.code_map}"), code_map


def known_header(options: CodeOptions) -> tuple[CodeHeader | None, CodeMap | None]:
    """`mapped_header`; without a header where there are no codes (a dry run)."""
    if all((folder / "header.json").exists() for folder in options.code_path):
        return mapped_header(options)
    return None, load_code_map(options.code_map) if options.code_map else None


def known_sizes(options: GPTOptions, header: CodeHeader | None, code_map: CodeMap | None) -> tuple[int, ...]:
    """Codebook sizes as the GPT will see them; IAR2's where nothing says them."""
    known = header or code_map
    return options.codebook_sizes or (tuple(known.codebook_sizes) if known else (256, 4096))


def shaped(options: GPTOptions, header: CodeHeader | None = None) -> GPTOptions:
    """The options with what is not typed of the shape: from the codes, or ImageNet's where there are none."""
    shape: dict[str, Any] = IMAGENET if header is None else {
        "image_size": header.image_size, "downsample_size": max(header.image_size // header.grid_size, 1),
        "num_classes": header.num_classes}
    return replace(options, **{name: getattr(options, name) or value for name, value in shape.items()})


def told(config: TrainConfig) -> Told:
    """What the codes tell of the condition; nothing where there are no codes (a dry run).

    Raises UserError where they hold no captions but --condition says so, or an option is of another condition.
    """
    options, default = config.gpt, GPTOptions()
    for condition, row in CONDITIONS.items():
        for name in row.own if condition != options.condition else ():
            if (value := getattr(options, name)) != getattr(default, name):
                raise UserError(f"{flag(name)} {value} is of --condition {condition} but --condition is {options.condition}: "
                                "leave it out.")
    for name, value in vars(config.captions).items():
        if options.condition != "text" and value != getattr(CaptionOptions, name):
            raise UserError(f"{flag(name)} {value} is of captions but --condition is {options.condition}: leave it out, or give "
                            "--condition text.")
    if not all((folder / "header.json").exists() for folder in config.codes.code_path):
        return Told()
    return find_source(options.condition).tell(config.codes.code_path, "--code-path", config.captions)


def has_short_captions(config: TrainConfig) -> bool:
    """Whether the features of --code-path have short captions, or there are none yet, of which `told` says what is wrong."""
    try:
        return read_text_header(config.codes.code_path[0], config.captions.text_path).crops > 1
    except UserError:
        return True


def choose_paradigm(options: GPTOptions, codebook_sizes: tuple[int, ...], code_map: CodeMap | None) -> str:
    """The paradigm for codes of the given codebooks; raises UserError where it does not go with codes or options."""
    fine = code_map is not None and bool(code_map.coarse)
    paradigm = options.paradigm
    if paradigm == "auto":
        paradigm = "fine" if fine else "single" if len(codebook_sizes) == 1 else "hierarchical"
    if PARADIGMS[paradigm].codebooks != len(codebook_sizes):
        raise UserError(f"--paradigm {paradigm} predicts {PARADIGMS[paradigm].codebooks} codes a cell but there are "
                        f"{len(codebook_sizes)} codebooks, {codebook_sizes}: choose a paradigm or codes that fit.")
    if fine != (paradigm == "fine"):
        raise UserError(f"--paradigm {paradigm} does not go with --code-map {'of fine labels' if fine else 'of other codes'}: "
                        "the fine paradigm needs rearrange.py's fine_map, and that map the fine paradigm.")
    default = GPTOptions()
    for name in (*WINDOW, *HEAD):
        value = getattr(options, name)
        if name not in PARADIGMS[paradigm].own and value not in (getattr(default, name), "none"):  # none: what it has anyway
            raise UserError(f"{flag(name)} {value} is of the {'local window' if name in WINDOW else 'hierarchical head'}, which "
                            f"--paradigm {paradigm} has not: leave it out.")
    return paradigm


def check_order(options: GPTOptions, paradigm: str) -> None:
    """Raise UserError where the order of prediction does not go with the paradigm or other options."""
    start, end = options.order_anneal
    if options.order == "raster":
        if options.order_anneal != GPTOptions.order_anneal:
            raise UserError(f"--order-anneal {start} {end} is of random order but --order is raster: leave it out or give "
                            "--order random.")
        return
    if paradigm == "fine":
        raise UserError("--order random does not go with --paradigm fine, which predicts all cells at once: leave it out.")
    if options.rotary == "repeated":
        raise UserError("--order random does not go with --rotary repeated, whose rows belong to places of raster order and not "
                        "to cells: leave one of them out.")
    if start > end:
        raise UserError(f"--order-anneal {start} {end} is upside down: give START END with START <= END.")


def gpt_config(options: GPTOptions, codebook_sizes: tuple[int, ...], code_map: CodeMap | None = None,
               caption: dict[str, Any] | None = None) -> GPTConfig:
    """The model that the options describe, for codes of the given codebooks; caption: fields that the data tell (`Told`).

    Raises UserError for values that fit none.
    """
    options = shaped(options)
    require_multiple("--image-size", options.image_size, options.downsample_size, "--downsample-size")
    paradigm = choose_paradigm(options, codebook_sizes, code_map)
    check_order(options, paradigm)
    shape = GPT_models[options.gpt_model] | ({"head_layers": options.head_layers} if options.head_layers else {})
    require_multiple("--head-width", options.head_width, shape["dim"] // shape["n_head"], "the dimension of the trunk's heads")
    config = GPTConfig(
        **shape, codebook_sizes=codebook_sizes, paradigm=paradigm, context=options.context,
        num_classes=options.num_classes if options.condition == "class" else GPTConfig.num_classes,
        grid_size=options.image_size // options.downsample_size, window_size=options.window_size,
        token_dropout=options.dropout, resid_dropout=options.dropout, ffn_dropout=options.dropout,
        class_dropout=options.class_dropout, rotary=options.rotary, head_rotary=options.head_rotary, order=options.order,
        qk_norm=options.qk_norm, head_width=options.head_width, condition=options.condition,  # type: ignore[arg-type]
        caption_rotary=options.caption_rotary)
    return replace(config, **(caption or {}))


def check_codes(config: TrainConfig, model: GPTConfig, header: CodeHeader) -> None:
    """Raise UserError for codes that do not fit the model, or clusters that do not divide the codebook."""
    wanted = list(config.gpt.codebook_sizes or header.codebook_sizes)
    require_fit(header, " ".join(map(str, config.codes.code_path)), {
        "codebook_sizes": (wanted, "--codebook-sizes"),
        "grid_size": (model.grid_size, f"--image-size {config.gpt.image_size} / {config.gpt.downsample_size}"),
        **({"num_classes": (model.num_classes, "--num-classes")} if model.condition == "class" else {}),
    })
    size = config.objective.cluster_size
    if config.objective.cluster_weight and any(codes % size for codes in header.codebook_sizes):
        raise UserError(f"--cluster-size {size} does not divide the codebooks {header.codebook_sizes}: give the size that "
                        "rearrange.py made.")
