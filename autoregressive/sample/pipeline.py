"""From class labels to images: the two models a sampler needs, checked against each other and loaded once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.generate import SamplingOptions, cfg_ranges, draw_uniforms, generate, per_stream
from utils.checkpoint import load_gpt, load_tokenizer
from utils.config import UserError
from utils.images import to_uint8


@dataclass
class ModelOptions:
    """The models to sample from; their shapes are read from the files."""

    gpt_ckpt: Path
    """gpt.safetensors or the run folder that holds it."""
    vq_ckpt: Path
    """tokenizer.safetensors or the run folder that holds it."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of the GPT; auto: bf16 on GPUs."""
    image_size_eval: int = 0
    """Resize samples to this side, bicubic, as LlamaGen does; 0: keep the model's size."""
    device: str = "auto"
    """auto, cuda or cpu."""


class Pipeline:
    """GPT and tokenizer on one device."""

    def __init__(self, models: ModelOptions, sampling: SamplingOptions, device: torch.device) -> None:
        """Raises UserError when the files do not fit each other or the sampling options fit no model."""
        bf16 = models.precision == "bf16" or (models.precision == "auto" and device.type == "cuda")
        self.gpt = load_gpt(models.gpt_ckpt, device, torch.bfloat16 if bf16 else torch.float32)
        self.tokenizer = load_tokenizer(models.vq_ckpt, device).to(memory_format=torch.channels_last)
        self.sampling, self.device, self.image_size_eval = sampling, device, models.image_size_eval
        seen, expected = self.tokenizer.extra["fingerprint"], self.gpt.extra["tokenizer"]
        if seen != expected:
            raise UserError(f"--vq-ckpt {models.vq_ckpt} is tokenizer {seen} but --gpt-ckpt {models.gpt_ckpt} was trained "
                            f"on codes of tokenizer {expected}: give the tokenizer that made the codes.")
        cfg_ranges(sampling, self.gpt)
        streams = len(self.gpt.config.codebook_sizes)
        for values, option, fits, wanted in (
                (sampling.top_k, "--top-k", lambda v: v >= 0, "0 or more"),
                (sampling.top_p, "--top-p", lambda v: 0 < v <= 1, "in (0, 1]"),
                (sampling.temperature, "--temperature", lambda v: v >= 0, "0 or more")):
            for value in per_stream(values, streams, option):
                if not fits(value):
                    raise UserError(f"{option} {value} must be {wanted}.")

    @property
    def num_classes(self) -> int:
        """Classes the GPT knows."""
        return self.gpt.config.num_classes

    @property
    def image_size(self) -> int:
        """Side of the images `sample` returns."""
        return self.image_size_eval or self.gpt.config.grid_size * self.tokenizer.config.downsampling

    @torch.inference_mode()
    def sample(self, labels: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Draw images uint8 [B, S, S, 3] of class ids [B]; samples: their global indices [B], which fix the randomness."""
        config = self.gpt.config
        uniforms = draw_uniforms(self.sampling.seed, samples, len(config.codebook_sizes), config.cells)
        codes = generate(self.gpt, torch.from_numpy(labels).to(self.device), self.sampling, uniforms)
        images = self.tokenizer.decode_codes(codes.unflatten(-1, (config.grid_size, config.grid_size)))
        if self.image_size_eval:
            images = F.interpolate(images, size=(self.image_size_eval,) * 2, mode="bicubic")
        return to_uint8(images).cpu().numpy()


def check_classes(classes: np.ndarray | Tensor, num_classes: int, option: str) -> None:
    """Raise UserError naming the first class id outside [0, num_classes)."""
    for value in np.asarray(classes).tolist():
        if not 0 <= value < num_classes:
            raise UserError(f"{option} {value} is out of range: the model knows classes 0 to {num_classes - 1}.")
