"""Baseline tokenizers: autoencoders of the package diffusers behind the interface that reconstruction reads.

    --vq-ckpt diffusers:FOLDER                                a folder that save_pretrained wrote, or a pipeline's that holds one
    --vq-ckpt diffusers:stabilityai/sd-vae-ft-mse             a name on the hub
    --vq-ckpt diffusers:OWNER/NAME/SUBFOLDER@REVISION         a part of a pipeline there, such as vae, at a tag or commit

`KINDS` says how each class is used.  All take images in [-1, 1] and give such: diffusers' VaeImageProcessor prepares them by
2 x - 1 of pixels in [0, 1].  Stable Diffusion's scaling factor (0.18215) is the diffusion model's: it multiplies latents after
encoding and divides them before decoding, which cancels in a reconstruction.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.checkpoint import fingerprint
from utils.config import UserError
from utils.packages import require_package
from utils.untrusted import parse_json, printable, read_text, shortened

PREFIX = "diffusers:"
PARTS = ("vae", "vqvae", "vqgan", "movq")  # of pipelines, which hold an autoencoder
T = TypeVar("T")
_REMEDY = "give a folder that save_pretrained of diffusers wrote, or its name on the hub where that can be reached"


@dataclass(frozen=True)
class Kind:
    """How a class of diffusers is used."""

    latents: Callable[[Any, Tensor], Tensor]
    """Model and images to what its `decode` takes."""
    pixels: Callable[[Any], int] = lambda model: 2 ** (len(model.config.block_out_channels) - 1)
    """Image pixels that a cell covers along one axis."""
    codebook: bool = False
    """Whether `decode` quantizes the latents by `quantize`."""


KINDS: dict[str, Kind] = {
    # The mode of the posterior, which makes figures repeatable.  LlamaGen's reconstruction_vae_ddp.py draws from the posterior.
    "AutoencoderKL": Kind(lambda model, images: model.encode(images).latent_dist.mode()),
    "VQModel": Kind(lambda model, images: model.encode(images).latents, codebook=True),
    "AutoencoderTiny": Kind(lambda model, images: model.encode(images).latents),
    "AutoencoderDC": Kind(lambda model, images: model.encode(images).latent, lambda model: model.spatial_compression_ratio),
}


class Baseline:
    """An autoencoder of diffusers as an `Autoencoder` (evaluate.py), in evaluation mode and without gradients."""

    def __init__(self, model: Any, kind: Kind) -> None:
        self.model, self.kind = model, kind
        self.fingerprint = fingerprint(model.state_dict())
        self.downsampling = kind.pixels(model)
        self.codebook_sizes: tuple[int, ...] = (model.config.num_vq_embeddings,) if kind.codebook else ()
        self.streams = len(self.codebook_sizes)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> reconstructions, and codes [B, 1, h, w], [B, 0, h, w] of continuous latents."""
        latents = self.kind.latents(self.model, images)  # [B, d, h, w]
        shape = len(latents), self.streams, *latents.shape[2:]
        codes = self.model.quantize(latents)[2][2].reshape(shape) if self.streams else latents.new_empty(shape).long()
        return self.model.decode(latents).sample, codes

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """The images as they are decoded."""
        return {"decoded": self.reconstruct(images)[0]}

    def warn(self, figures: dict[str, float], image_size: int) -> None:
        """Nothing: nobody here trains it."""


def load_baseline(text: str, device: torch.device, option: str = "--vq-ckpt") -> Baseline:
    """The autoencoder that an option names after `PREFIX`, in float32.

    Raises UserError, naming `option`, where diffusers is missing, there is no such model, or it is none of `KINDS`.
    """
    where = f"{option} {printable(text)}"
    diffusers, hub = require_package("diffusers", where), require_package("huggingface_hub", where)
    diffusers.utils.logging.disable_progress_bar()
    for library in (diffusers, hub):  # they log what they raise, and each of their tries to reach the hub
        library.utils.logging.set_verbosity(logging.CRITICAL)
    name, place = locate(text.removeprefix(PREFIX), where)
    found = _config_class(name, place, where, hub)
    if found not in KINDS:
        raise UserError(f"{where} is of the class {printable(found)}: give a model of {', '.join(KINDS)}.")
    # Safetensors alone: other files could run code.  accelerate, which diffusers would rather load by, is not needed.
    model, about = _loaded(where, lambda: getattr(diffusers, found).from_pretrained(
        name, **place, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True))
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has the unknown")):
        if about[key]:
            raise UserError(f"{where} {what} weights {printable(about[key][0])} of {found}: save it again by save_pretrained.")
    channels = model.config.in_channels, model.config.get("out_channels", model.config.in_channels)
    if channels != (3, 3):
        raise UserError(f"{where} is of images with {channels[0]} channels in and {channels[1]} out: give one of red, green and "
                        "blue.")
    return Baseline(model.to(device, torch.float32).eval().requires_grad_(False), KINDS[found])


def locate(text: str, where: str) -> tuple[str, dict[str, str]]:
    """Folder or hub name, with subfolder and revision as from_pretrained takes them; raises UserError where it is neither."""
    if text and Path(text).is_dir():
        parts = [part for part in ("", *PARTS) if (Path(text) / part / "config.json").exists()]
        return (text, {"subfolder": parts[0]} if parts and parts[0] else {})
    name, _, revision = text.partition("@")
    owner, model, subfolder = (*name.split("/", 2), "", "")[:3]
    if not owner or not model or owner in (".", "..", "~"):
        raise UserError(f"{where} is no folder and no name on the hub (OWNER/NAME): {_REMEDY}.")
    place = {"subfolder": subfolder.strip("/"), "revision": revision}
    return f"{owner}/{model}", {key: value for key, value in place.items() if value}


def _config_class(name: str, place: dict[str, str], where: str, hub: Any) -> str:
    """The class that a model's config.json names; hub: the package huggingface_hub."""
    def read() -> Any:
        if Path(name).is_dir():
            return parse_json(read_text(Path(name) / place.get("subfolder", "") / "config.json"))
        return parse_json(read_text(Path(hub.hf_hub_download(name, "config.json", **place))))

    config = _loaded(where, read)
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise UserError(f"{where} has a config.json without _class_name: {_REMEDY}.")
    return config["_class_name"]


def _loaded(where: str, load: Callable[[], T]) -> T:
    """What `load` gives; raises UserError for whatever it raises: of a damaged folder, of the network, of a private model."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be loaded ({shortened(str(error).split('. ')[0])}): {_REMEDY}.") from error
