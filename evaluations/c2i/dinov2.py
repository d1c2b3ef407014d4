"""DINOv2's ViT-L/14, of whose features FD-DINOv2 is a Fréchet distance (Stein et al. 2023, arXiv 2306.04675).

The features are the normalised class token of 224-pixel images.  Resizing is Pillow's bicubic to bytes, and positions are
resampled as DINOv2's own code does it: both as in the authors' evaluation code (dgm-eval), whose values are the published ones.
The network is timm's.  torch-fidelity 0.4 has a DINOv2 extractor too.  It is not used because it takes no weights file, runs code
that it fetches from GitHub, and resizes by TensorFlow 1's bilinear rule: its distances do not compare with published ones.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evaluations.c2i.metrics import full_float32
from evaluations.c2i.weights import Weights

INPUT_SIZE, PATCH = 224, 14
FEATURES = 1024
SHAPE: dict[str, Any] = {"embed_dim": FEATURES, "depth": 24, "num_heads": 16}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, from 0 to 1
_OFFSET = 0.1  # cells that DINOv2 adds to the size it resamples positions to (its interpolate_offset)
WEIGHTS = Weights("--dinov2-weights", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
                  "DINOv2's ViT-L/14 weights", "DINOv2's ViT-L/14 without registers")


class DINOv2(nn.Module):
    """The vision transformer, in evaluation mode and without gradients; its tensors have the names of DINOv2's file."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = VisionTransformer(INPUT_SIZE, PATCH, num_classes=0, global_pool="token", init_values=1.0,
                                       norm_layer=partial(nn.LayerNorm, eps=1e-6), **SHAPE)
        self.requires_grad_(False)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor]:
        """uint8 [B, 3, 224, 224] -> the class token after the last norm, float32 [B, 1024]."""
        mean, deviation = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (_MEAN, _DEVIATION))
        # The context manager's own default switches cuDNN off.
        with full_float32(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return (self.trunk((images.float() / 255 - mean) / deviation),)


def prepare(images: np.ndarray) -> Tensor:
    """Images as the network takes them: uint8 or float [n, H, W, 3] from 0 to 255 -> uint8 [n, 3, 224, 224].

    Floats are rounded first, since Pillow resizes bytes.
    """
    pixels = images if images.dtype == np.uint8 else np.rint(images).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(each).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)) for each in pixels]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def resample_positions(embedding: Tensor) -> Tensor:
    """Position embeddings for the grid of 224 pixels: [1, 1 + M·M, D], the class token's first -> [1, 1 + 16·16, D].

    DINOv2 was trained last with M = 37.  Its code resamples bicubically, not antialiased, by a factor of (16 + 0.1) / M: the 0.1
    guards against a grid that is rounded down, and moves every position a little.
    """
    cells, side = INPUT_SIZE // PATCH, math.isqrt(embedding.shape[1] - 1)
    if side == cells:
        return embedding
    grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)                 # [1, D, M, M]
    grid = F.interpolate(grid.float(), scale_factor=(cells + _OFFSET) / side, mode="bicubic")
    return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2).to(embedding.dtype)], 1)


def load_dinov2(path: Path | None, device: torch.device) -> tuple[DINOv2, str]:
    """The network with the weights in `path` (None: the download), and their file's SHA-256.

    Raises UserError if they are not those of DINOv2's ViT-L/14.
    """
    file = WEIGHTS.file(path)
    tensors, digest = WEIGHTS.read(file)
    tensors.pop("mask_token", None)  # of training alone
    with torch.device("meta"):  # drawing weights that are replaced at once would take seconds
        network = DINOv2()
    try:
        tensors["pos_embed"] = resample_positions(tensors["pos_embed"])
        network.trunk.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise WEIGHTS.misfit(file) from error
    return network.requires_grad_(False).to(device), digest
