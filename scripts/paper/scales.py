"""The two scales of the paper's experiments, as data: the bundled images in minutes, ImageNet as published."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.paper.steps import Word


@dataclass(frozen=True)
class Scale:
    """What the experiments of one scale have in common, beside what the command line says."""

    out: Path
    """Where everything goes unless --out says otherwise."""
    train: str
    validation: str
    """The images, empty where the command line has to say."""
    images: tuple[Word, ...]
    """Options of whatever reads images, but for the size that codes are extracted at."""
    tokenizer: tuple[Word, ...]
    """Options of all tokenizers."""
    tokenizer_unit: str
    tokenizer_length: int
    """Option that says how long a tokenizer is trained, and its value where the command line says none."""
    tokenizer_shares: tuple[float, float, float]
    """Of that length: a first phase, a second one, and the training of a tokenizer that has only one."""
    second_phase: tuple[Word, ...]
    """Options of a second phase that introduces no codebook."""
    augmentation: str
    """Of the training images' codes."""
    gpt: tuple[Word, ...]
    """Options of all GPTs, beside size and length."""
    keep_every: float
    """Epochs between the weights that a GPT's training keeps for good."""
    fine_model: str
    """Size of CTF's second model."""
    sample: tuple[Word, ...]
    """Options of all samplings."""
    ctf_sampling: tuple[Word, ...]
    """More of CTF's samplings."""
    semantic: int
    detail: int
    single: int
    """Sizes of the codebooks."""
    clusters: int
    coarse: int
    """IAR's and CTF's clusters."""
    constant_scale: float
    range: tuple[float, float]
    """Guidance of the ablations: the constant scale, start and end of a range."""
    preset_one: tuple[Word, ...]
    preset_two: tuple[Word, ...]
    """Guidance of systems of one and of two codebooks; empty: what the checkpoint carries."""
    processes: bool = True
    """Whether trainings, extractions and samplings run on all GPUs."""
    classifiers: Mapping[str, tuple[Word, ...]] = field(default_factory=dict)
    """Options of the small classifiers, the tokenizer's teacher and the judge of samples; empty: VGG16 and ADM's evaluator."""


TOY_BATCH = 128  # images of a training step

TOY = Scale(
    out=Path("runs/paper-toy"), train="scripts/data/fashion_mnist_train.npz", validation="scripts/data/fashion_mnist_test.npz",
    images=("--image-size", 32, "--num-workers", 0),
    tokenizer=("--vq-model", "VQ-8-small", "--no-random-crop", "--no-random-flip", "--global-batch-size", 16, "--lr", 1e-3,
               "--lr-end", 5e-5, "--ema-decay", 0.99, "--codebook-init", "kmeans", "--revive-every", 50, "--kmeans-vectors",
               32768, "--log-every", 50, "--checkpoint-every", 400),
    tokenizer_unit="--steps", tokenizer_length=1200, tokenizer_shares=(0.25, 1, 1.25),
    second_phase=("--codebook-init", "uniform"),  # keeps the codes of the first one
    augmentation="none",
    gpt=("--image-size", 32, "--downsample-size", 8, "--num-classes", 10, "--data-parallel", "none", "--num-workers", 0,
         "--global-batch-size", TOY_BATCH, "--lr", 2e-3, "--lr-end", 2e-4, "--lr-schedule", "cosine", "--warmup-steps", 20,
         "--ema-decay", 0.99, "--log-every", 20, "--checkpoint-every", 100),
    keep_every=0.5, fine_model="", sample=("--per-class", 100, "--batch-size", 250), ctf_sampling=(),
    semantic=128, detail=512, single=2048, clusters=32, coarse=128, constant_scale=3, range=(2, 4),
    preset_one=("--guidance", "constant", "--cfg-scale", 3), preset_two=("--cfg-scale", 2, 4), processes=False,
    classifiers={"teacher": ("--epochs", 3, "--seed", 1), "judge": ("--widths", 48, 96, 128, "--epochs", 5, "--seed", 2)})

PAPER = Scale(
    out=Path("runs/paper"), train="", validation="", images=("--image-size", 256), tokenizer=(),
    # 40 epochs of each phase, as LlamaGen's tokenizer, which has one.
    tokenizer_unit="--epochs", tokenizer_length=40, tokenizer_shares=(1, 1, 1), second_phase=(), augmentation="ten-crop",
    gpt=(),  # train_c2i.py's recipe of the size and the grid, table 11
    keep_every=50, fine_model="GPT-L",  # 343M parameters, beside any first model
    sample=("--image-size-eval", 256), ctf_sampling=("--temperature", 1.1, "--fine-temperature", 1.1),  # arXiv 2503.16194
    semantic=256, detail=4096, single=16384, clusters=128, coarse=512,
    # Table 9's best range; the one fixed scale that the paper states (figure 7c).
    constant_scale=2.25, range=(1.75, 3), preset_one=(), preset_two=())

SCALES = {"toy": TOY, "paper": PAPER}
