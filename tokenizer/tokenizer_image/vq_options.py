"""Options of tokenizer training, and the recipes' defaults among them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenizer.tokenizer_image.perceptual import PerceptualOptions
from tokenizer.tokenizer_image.quantizer import GRADIENTS, QUANTIZERS
from tokenizer.tokenizer_image.vq_loss import ADVERSARIAL, INTERLEAVE_GRADIENTS, PROCEDURES, RECIPES
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.batches import BatchOptions
from utils.config import Count, NonNegative, Positive, UserError, choices
from utils.devices import Compile
from utils.image_dataset import ImageOptions
from utils.optim import OptimOptions, typed_schedule
from utils.run import RunOptions


@dataclass
class AugmentationOptions:
    """How training images are varied."""

    random_crop: bool = True
    """Train on random crops; off: centre crops."""
    random_flip: bool = True
    """Mirror half of the training images."""


@dataclass
class EvaluationOptions:
    """What the tokenizer is evaluated on, and when."""

    val_path: str = ""
    """Evaluation images; empty: the training images, centre-cropped."""
    val_limit: Count = 5000
    """Evaluate on at most this many images, evenly over classes; 0: all."""
    eval_every: Count = 5000
    """Steps between evaluations; 0: only at the end."""


@dataclass
class TokenizerOptions:
    """Which tokenizer to build."""

    vq_model: Annotated[str, choices(VQ_models)] = "VQ-16"
    """Preset of the autoencoder."""
    quantizer: Annotated[str, choices(("auto", *QUANTIZERS))] = "auto"
    """auto: single for --stage single, dual for the others; product: the unassociated dual codebook of table 7.  Not of the
    paper: residual: the dual codebooks in one stage; simvq, dual-simvq: one matrix moves all codes of a frozen codebook."""
    codebook_sizes: tuple[Positive, ...] = ()
    """Codes of each codebook; empty: 256 4096, or 16384 for a single one."""
    code_dim: Positive = 8
    """Dimension of a code."""
    beta: NonNegative = 0.25
    """Weight of the commitment term."""


@dataclass
class LossOptions:
    """What the tokenizer is trained for (`vq_loss.py`)."""

    recipe: Annotated[str, choices(dict.fromkeys(name for name, _ in RECIPES))] = "paper"
    """Loss weights (the next three) and procedure: equations 7 to 10 as printed, those of the released code, or the same
    terms in every stage (to compare codebooks)."""
    pixel_weight: NonNegative = 1.0
    """Weight of the squared error of pixels."""
    perceptual_weight: NonNegative = 1.0
    """Weight of LPIPS."""
    disc_weight: NonNegative = 0.5
    """Weight of the adversarial term, from --disc-start on."""
    disc_loss: Annotated[str, choices(ADVERSARIAL)] = "hinge"
    """Adversarial loss."""
    disc_start: Count = 20_000
    """First step of the adversarial term."""
    disc_channels: Positive = 64
    """Width of the discriminator."""
    disc_layers: Count = 3
    """Strided layers of the discriminator after the first."""
    disc_adaptive_weight: bool = False
    """Balance the adversarial term by gradient norms (VQGAN)."""
    interleave_gradients: Annotated[str, choices(INTERLEAVE_GRADIENTS)] = "all"
    """What every third step of stage 2 moves by stage 1's loss: encoder and decoder too, or the semantic codebook alone.
    The recipe decides: all, except in the released one."""


@dataclass
class CodebookOptions:
    """Care of codebooks, on small data above all; off by default, as in the paper."""

    codebook_init: Literal["uniform", "whitened", "kmeans"] = "uniform"
    """Start of the codebook that this stage introduces: uniform on the sphere; whitened: also spread the latents of a fresh
    encoder over it; kmeans: also move the codes onto their centres."""
    kmeans_vectors: Positive = 65_536
    """Latents that whitening and k-means see."""
    revive_every: Count = 0
    """Steps between revivals of codes that were never chosen, until 80% of the training; 0: never."""
    gradient: Annotated[str, choices(GRADIENTS)] = "straight-through"
    """How the decoder's gradient reaches the encoder: unchanged, or turned and scaled as the code is against the latent (the
    rotation trick)."""


@dataclass
class VQTrainConfig:
    """Defaults below are those of the recipe and stage that the other words select, for example --stage dual --help."""

    images: ImageOptions
    run: RunOptions
    augmentation: AugmentationOptions
    evaluation: EvaluationOptions
    tokenizer: TokenizerOptions
    loss: LossOptions
    perceptual: PerceptualOptions
    codebook: CodebookOptions
    batch: BatchOptions = field(default_factory=lambda: BatchOptions(epochs=40, global_batch_size=128))
    optim: OptimOptions = field(default_factory=OptimOptions)
    stage: Literal["semantic", "dual", "single"] = "semantic"
    """semantic: stage 1; dual: stage 2; single: all codebooks at once (LlamaGen)."""
    init_from: str = ""
    """Tokenizer whose weights start this run, all that fit; stage 2 needs stage 1's result, and takes it whole."""
    init_strict: bool = False
    """Refuse --init-from where any weight does not fit, instead of drawing that one anew."""
    compile: Compile = "auto"
    """torch.compile encoder and decoder; auto: on GPUs."""


# Options that must not change on resume.
FIXED_OPTIONS = ("seed", "global_batch_size", "ema_decay", "recipe", "lr_schedule", "weight_decay", "pixel_weight",
                 "perceptual_weight", "disc_weight", "interleave_gradients", "gradient", "init_strict")


# What decides fields of the model that are no options of the same name.
MODEL_FLAGS = dict.fromkeys(("channels", "encoder_multipliers", "decoder_multipliers", "latent_channels", "residual_blocks",
                             "stem", "norm_groups", "attention", "zero_residual"), "--vq-model")


# Epochs of 1,281,167 images in batches of 128, where they are not LlamaGen's 40: IAR2's released file is step 485,000 of stage 2.
EPOCHS = {("released", "dual"): 48.5}


def recipe(config: VQTrainConfig) -> dict[str, Any]:
    """Defaults for --recipe and --stage: the loss weights, the interleave, the length, the run's folder."""
    weights = RECIPES[config.loss.recipe, config.stage]
    return {"pixel_weight": weights.pixel, "perceptual_weight": weights.perceptual, "disc_weight": weights.adversarial,
            "interleave_gradients": PROCEDURES[config.loss.recipe].interleave_gradients,
            "epochs": EPOCHS.get((config.loss.recipe, config.stage), 40),
            "run_dir": Path("runs/vq") / config.stage} | typed_schedule(config.optim)


def quantizer_name(config: VQTrainConfig) -> str:
    """The row of `QUANTIZERS` to train; raises UserError where stage or options do not go with it."""
    name, codebook, interleave = config.tokenizer.quantizer, config.codebook, config.loss.interleave_gradients
    if name == "auto":
        name = "single" if config.stage == "single" else "dual"
    quantizer, _, stages = QUANTIZERS[name]
    if config.stage not in stages:
        raise UserError(f"--quantizer {name} does not go with --stage {config.stage}: it has --stage {' and '.join(stages)}.")
    if not quantizer.free_codes and codebook.codebook_init == "kmeans":
        raise UserError(f"--codebook-init kmeans places every code by itself but --quantizer {name} moves all of them by one "
                        "matrix: take uniform or whitened.")
    if not quantizer.free_codes and codebook.revive_every:
        raise UserError(f"--revive-every {codebook.revive_every} moves single codes but --quantizer {name} moves all of them by "
                        "one matrix: leave it out.")
    if config.stage != "dual" and interleave != PROCEDURES[config.loss.recipe].interleave_gradients:
        raise UserError(f"--interleave-gradients {interleave} is of stage 2, not of --stage {config.stage}: give it to --stage "
                        "dual alone.")
    return name
