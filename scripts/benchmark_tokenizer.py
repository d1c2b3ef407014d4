"""Time a tokenizer beside the same weights as the published code runs them: `benchmark.py tokenizer`.

There images lie in NCHW order, the activation is a product with a sigmoid, and attention writes its scores to memory
(LlamaGen's `vq_model.py`, which IAR2 keeps).  All three are exchanged for the time of a call; the layers are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQModel, build_tokenizer
from utils.devices import image_layout


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, 1, T, E] with the matrix of scores in memory."""
    scores = torch.bmm(q[:, 0], k[:, 0].transpose(1, 2)) * q.shape[-1] ** -0.5   # [B, T, S]
    return torch.bmm(scores.softmax(-1), v[:, 0])[:, None]


@contextmanager
def published() -> Iterator[None]:
    """Within the block activations and attention are computed as in the published code."""
    with mock.patch.object(F, "silu", lambda x: x * torch.sigmoid(x)), \
            mock.patch.object(F, "scaled_dot_product_attention", _attention):
        yield


def both_ways(work: Callable[[VQModel, torch.memory_format], object], model: VQModel,
              device: torch.device) -> dict[str, Callable[[], object]]:
    """The same work here and as published."""
    def as_published() -> object:
        with published():
            return work(model.to(memory_format=torch.contiguous_format), torch.contiguous_format)

    return {"ours": lambda: work(model.to(memory_format=image_layout(device)), image_layout(device)), "published": as_published}


def tokenizer_tasks(model: VQModel, images: Tensor, device: torch.device,
                    bf16: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """encode, decode and train (forward and backward pass with the squared error of pixels) of `images` [B, 3, H, W]."""
    codes = model.eval().encode(images)

    def encode(tokenizer: VQModel, layout: torch.memory_format) -> Tensor:
        return tokenizer.encode(images.contiguous(memory_format=layout), bf16)

    @torch.no_grad()
    def decode(tokenizer: VQModel, layout: torch.memory_format) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return tokenizer.decode_codes(codes)

    def train(tokenizer: VQModel, layout: torch.memory_format) -> None:
        pixels = images.contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            reconstructions, quantized = tokenizer(pixels)
            loss = (reconstructions.float() - pixels).square().mean() + quantized.codebook_loss
        loss.backward()
        tokenizer.zero_grad(set_to_none=True)

    return {name: both_ways(work, model, device) for name, work in (("encode", encode), ("decode", decode), ("train", train))}


def make_tokenizer(name: str, device: torch.device) -> VQModel:
    """A randomly initialised tokenizer with IAR2's codebooks."""
    torch.manual_seed(0)
    return build_tokenizer(name, quantizer="dual", codebook_sizes=(256, 4096)).to(device)
