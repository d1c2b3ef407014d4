"""From class labels or captions to images: the models a sampler needs, checked against each other and loaded once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.conditions import Given, each
from autoregressive.models.ctf import FineOptions, refine
from autoregressive.models.decode_modes import MODES
from autoregressive.models.generate import Decoder, SamplingOptions, carried_fields, cfg_ranges, draw_uniforms, per_stream
from autoregressive.models.gpt import GPT, load_gpt, place
from autoregressive.models.transformer import GPTConfig
from autoregressive.sample.image_decoder import ImageDecoder, Images
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.checkpoint import fingerprint, read_export
from utils.class_names import ClassNames, require_same_names
from utils.config import Count, Device, UserError, choices, flag
from utils.optim import native_bf16, uses_bf16

# Who samples from what.
SAMPLERS = {"class": "sample_c2i.py or sample_c2i_ddp.py", "text": "sample_t2i.py or sample_t2i_ddp.py"}
COARSE = "coarse-"  # how fingerprints of coarse labels begin (rearrange.py)
# LlamaGen's eight ImageNet classes.
SHOWN = (207, 360, 387, 974, 88, 979, 417, 279)
# Weights that a CPU's cache about holds: for so few, half the bytes gain little.
_CACHED = 2**23


@dataclass
class ModelOptions:
    """The models to sample from; their shapes are read from the files."""

    gpt_ckpt: Path
    """gpt.safetensors, the run folder that holds it, or a training checkpoint step-*."""
    vq_ckpt: Path
    """tokenizer.safetensors or the run folder that holds it."""
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


class Pipeline:
    """GPT, second stage where there is one, and tokenizer on one device."""

    def __init__(self, models: ModelOptions, sampling: SamplingOptions, fine: FineOptions, device: torch.device,
                 condition: str = "class") -> None:
        """condition: what the caller will give to `sample`.  Raises UserError when the GPT reads another, the files do not fit
        each other or the sampling options fit no model."""
        self.gpt = load_in(models.precision, load_gpt(models.gpt_ckpt), device)
        self.fine = None if models.fine_ckpt is None else load_in(
            models.precision, load_gpt(models.fine_ckpt, option="--fine-ckpt"), device)
        self.tokenizer = load_tokenizer(models.vq_ckpt, device)
        self.sampling, self.fine_options, self.device = sampling, fine, device
        self.image_size_eval, self.decode_mode = models.image_size_eval, models.decode
        if self.gpt.config.condition != condition:
            raise UserError(f"--gpt-ckpt {models.gpt_ckpt} is conditioned on {self.gpt.config.condition}: sample from it with "
                            f"{SAMPLERS[self.gpt.config.condition]}.")
        self._check_models(models)
        self.decoder = Decoder(self.gpt, models.decode)
        bf16 = device.type == "cuda" and uses_bf16(models.precision, device)
        self.image_decoder = ImageDecoder(self.tokenizer, self.gpt.config.grid_size, models.image_size_eval,
                                          torch.bfloat16 if bf16 else torch.float32)
        check_sampling(sampling, self.gpt)
        if self.fine is not None:
            self.coarse_of = torch.tensor(self.fine.provenance.coarse_of, device=device)

    def _check_models(self, models: ModelOptions) -> None:
        """Raise UserError unless coarse labels meet their second stage and codes their tokenizer."""
        giver, option = self.gpt, f"--gpt-ckpt {models.gpt_ckpt}"
        if giver.config.paradigm == "fine":
            raise UserError(f"{option} is a second stage: give the coarse GPT here and this one as --fine-ckpt.")
        if self.fine is not None:
            seen, expected = self.gpt.provenance.tokenizer, self.fine.provenance.coarse
            giver, option = self.fine, f"--fine-ckpt {models.fine_ckpt}"
            if giver.config.paradigm != "fine":
                raise UserError(f"{option} is no second stage but predicts by the {giver.config.paradigm} paradigm: give the GPT "
                                "that was trained with rearrange.py's fine_map.")
            for name in ("grid_size", "condition", "num_classes", "caption_length", "caption_dim"):
                if getattr(giver.config, name) != getattr(self.gpt.config, name):
                    raise UserError(f"{option} has {name} {getattr(giver.config, name)} but --gpt-ckpt {models.gpt_ckpt} has "
                                    f"{getattr(self.gpt.config, name)}: give two stages of one size.")
            require_same_names(giver.provenance.class_names, self.class_names, option, f"--gpt-ckpt {models.gpt_ckpt}")
            if seen != expected:
                raise UserError(f"--gpt-ckpt {models.gpt_ckpt} predicts {seen} but {option} refines {expected}: give two stages "
                                "trained with the maps of one rearrange.py run.")
        if giver.provenance.tokenizer.startswith(COARSE):
            raise UserError(f"{option} predicts coarse labels, which no tokenizer decodes: give its --fine-ckpt.")
        require_tokenizer(self.tokenizer, models.vq_ckpt, giver.provenance.tokenizer, giver.config, option)

    @property
    def num_classes(self) -> int:
        """Classes the GPT knows."""
        return self.gpt.config.num_classes

    @property
    def class_names(self) -> ClassNames:
        """Their names by id; empty where the GPT does not carry them."""
        return self.gpt.provenance.class_names

    @property
    def image_size(self) -> int:
        """Side of the images `sample` returns."""
        return self.image_size_eval or self.gpt.config.grid_size * self.tokenizer.config.downsampling

    def identity(self) -> dict[str, str]:
        """Fingerprints of the models: a partial file made by other models is not continued."""
        stages = {"gpt": self.gpt} | ({"fine": self.fine} if self.fine is not None else {})
        return {name: fingerprint(gpt.state_dict()) for name, gpt in stages.items()} | {
            "tokenizer": self.tokenizer.provenance.fingerprint}

    @torch.inference_mode()
    def sample_codes(self, given: Given, samples: np.ndarray) -> Tensor:
        """Draw codes [B, C, N] of the tokenizer for class ids [B] or captions, on any device; samples: their global indices."""
        config, stages = self.gpt.config, 1 if self.fine is None else 2
        streams = len(config.codebook_sizes)
        uniforms = draw_uniforms(self.sampling.seed, samples, streams * stages, config.cells)
        codes = self.decoder.draw(given, self.sampling, uniforms[:, :streams])
        if self.fine is None:
            return codes
        return refine(self.fine, each(lambda part: part.to(self.device), given), codes, self.fine_options, uniforms[:, -1],
                      self.coarse_of, self.decode_mode)

    def start(self, given: np.ndarray | Given, samples: np.ndarray) -> Images:
        """`sample` without waiting for the images, so that they are decoded beside the next codes."""
        return self.image_decoder.start(self.sample_codes(torch.from_numpy(given) if isinstance(given, np.ndarray) else given,
                                                          samples))

    def sample(self, given: np.ndarray | Given, samples: np.ndarray) -> np.ndarray:
        """Draw images uint8 [B, S, S, 3] of class ids [B] or captions, features [B, P', E] and mask [B, P']; samples: their
        global indices [B], which fix the randomness."""
        return self.start(given, samples)()

    def decode(self, codes: Tensor) -> np.ndarray:
        """Codes of the tokenizer [B, C, N] -> images uint8 [B, S, S, 3]."""
        return self.image_decoder.start(codes)()


def require_tokenizer(tokenizer: VQModel, path: str | Path, expected: str, gpt: GPTConfig, option: str) -> None:
    """Raise UserError unless the tokenizer of --vq-ckpt made the codes of a GPT.

    expected: fingerprint of the one that did, empty where a published file does not say it; option: the GPT, as messages call it.
    """
    seen, own = tokenizer.provenance.fingerprint, tuple(tokenizer.config.codebook_sizes)
    if expected and seen != expected:
        raise UserError(f"--vq-ckpt {path} is tokenizer {seen} but {option} was trained on codes of tokenizer {expected}: give "
                        "the tokenizer that made the codes.")
    if tuple(gpt.codebook_sizes[-len(own):]) != own:
        raise UserError(f"--vq-ckpt {path} has codebooks {own} but {option} predicts {tuple(gpt.codebook_sizes)}: give the "
                        "tokenizer that made the codes.")


def load_in(precision: str, gpt: GPT, device: torch.device) -> GPT:
    """Move a GPT to the device in the precision that it is sampled with, by ModelOptions.precision."""
    outgrows = sum(parameter.numel() for parameter in gpt.parameters()) > _CACHED
    bf16 = uses_bf16(precision, device) or precision == "auto" and outgrows and native_bf16(device)
    return place(gpt, device, torch.bfloat16 if bf16 else torch.float32)


def check_classes(classes: tuple[int, ...], names: tuple[str, ...], pipeline: Pipeline) -> list[str]:
    """A caption for every class id; raises UserError for an unknown class, or as many names as there are not classes."""
    if names and len(names) != len(classes):
        raise UserError(f"--class-names has {len(names)} names for the {len(classes)} --classes.")
    if (highest := max(classes)) >= pipeline.num_classes:
        raise UserError(f"--classes {highest} is out of range: the model knows classes 0 to {pipeline.num_classes - 1}.")
    return list(names) or [pipeline.class_names[value] if pipeline.class_names else f"class {value}" for value in classes]


def check_sampling(sampling: SamplingOptions, gpt: GPT) -> None:
    """Raise UserError, naming the flag, for a guidance range, or a count of temperatures or filters, that fits no model."""
    streams = len(gpt.config.codebook_sizes)
    try:
        cfg_ranges(sampling, gpt)
        for name in ("temperature", "top_k", "top_p"):
            per_stream(getattr(sampling, name), streams, name)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UserError(f"{flag(name)} {rest}") from error
