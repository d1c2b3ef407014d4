"""Which models a sampler loads, and what it is told by the GPT's file before the models are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from autoregressive.models.decode_modes import MODES
from autoregressive.models.generate import carried_fields
from autoregressive.models.transformer import GPTConfig
from utils.checkpoint import read_export
from utils.config import Count, Device, choices

# LlamaGen's eight ImageNet classes.
SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)


@dataclass
class ModelOptions:
    """The models to sample from; their shapes are read from the files."""

    gpt_ckpt: Path
    """gpt.safetensors, the run folder that holds it, a training checkpoint step-*, or hf:owner/name on the hub."""
    vq_ckpt: Path
    """tokenizer.safetensors, the run folder that holds it, or hf:owner/name."""
    fine_ckpt: Path | None = None
    """Second stage of a GPT that predicts coarse labels (CTF)."""
    precision: Annotated[str, choices(("auto", "bf16", "float32"))] = "auto"
    """Of the GPT; on GPUs of the tokenizer's decoder too.  auto: bf16 on GPUs, and for a GPT that outgrows the cache of a CPU
    which computes in bf16."""
    decode: Annotated[str, choices(("auto", *MODES))] = "auto"
    """How codes are drawn: by separate kernels, or compiled in a minute at the start; auto: compiled on GPUs."""
    image_size_eval: Count = 0
    """Resize samples to this side, bicubic, as LlamaGen does; 0: keep the model's size."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def carried_options(config: Any) -> dict[str, Any]:
    """The sampling options that --gpt-ckpt carries, as defaults of a command line whose `models` are ModelOptions."""
    description, _ = read_export(config.models.gpt_ckpt, "gpt", "--gpt-ckpt", tensors=False)
    return carried_fields(description.get("sampling", {}))


def carried_grid_options(config: Any) -> dict[str, Any]:
    """The same, and the classes that a picture shows unless others are typed."""
    description, _ = read_export(config.models.gpt_ckpt, "gpt", "--gpt-ckpt", tensors=False)
    known = description["model"].get("num_classes", GPTConfig.num_classes)
    return carried_options(config) | ({"classes": shown_classes(known)} if type(known) is int and known > 0 else {})


def shown_classes(num_classes: int) -> tuple[int, ...]:
    """Class ids that a picture shows: LlamaGen's eight of ImageNet's 1,000, else the first eight of those that the GPT knows."""
    return SHOWN if num_classes == GPTConfig.num_classes else tuple(range(min(num_classes, len(SHOWN))))
