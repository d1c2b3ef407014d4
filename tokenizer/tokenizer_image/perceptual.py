"""Perceptual distances for tokenizer training and evaluation: LPIPS through the `lpips` package, or a local classifier.

The calibrated layer weights come with `lpips`.  The backbone comes from its usual download or from a local torchvision state
dict, or it is random.  Small images, about which ImageNet networks say little, are compared by the features of a local
classifier (quickstart).
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.error import URLError

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.classifier import load_classifier
from utils.config import UserError, choices
from utils.hub import published_file

log = logging.getLogger("perceptual")


@dataclass
class PerceptualOptions:
    """Which perceptual distance to use."""

    perceptual_net: Annotated[str, choices(("vgg", "alex", "squeeze", "random", "classifier"))] = "vgg"
    """LPIPS backbone vgg, alex or squeeze; random (no download); or classifier, a local one."""
    perceptual_file: str = ""
    """Local weights: a torchvision state dict, or a classifier file; empty: the usual download."""


def distance_name(options: PerceptualOptions) -> str:
    """What the distance is called among figures: lpips, or a name of its own where it compares with no published number."""
    net = options.perceptual_net
    return f"perceptual_{net}" if net in ("random", "classifier") else "lpips"


class ClassifierDistance(nn.Module):
    """Squared distance of pixels and of a classifier's unit-normalised feature maps, averaged over cells and layers.

    The pixels are the first layer, as in DISTS: a small classifier's own layers see no absolute brightness.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.classifier = load_classifier(path, option="--perceptual-file")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], twice -> [B, 1, 1, 1]."""
        differences = [a - b]
        for x, y in zip(self.classifier.feature_maps(a), self.classifier.feature_maps(b), strict=True):
            differences.append(F.normalize(x, dim=1) - F.normalize(y, dim=1))
        return torch.stack([each.square().sum(1, keepdim=True).mean((2, 3), keepdim=True) for each in differences]).mean(0)


def build_perceptual(options: PerceptualOptions, device: torch.device) -> nn.Module:
    """A frozen distance: ([B, 3, H, W], [B, 3, H, W]) in [-1, 1] -> [B, 1, 1, 1].

    Raises UserError, naming the options, when the weights cannot be read or downloaded.
    """
    net, weights = options.perceptual_net, options.perceptual_file
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision.models")  # lpips' old calls
    if net == "classifier":
        model: nn.Module = ClassifierDistance(weights)
    elif net == "random":
        log.warning("--perceptual-net random: LPIPS runs on a RANDOM VGG16; its values compare with no published figure")
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    elif weights:
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        file = published_file(weights, "--perceptual-file", f"a torchvision {net} state dict")
        _load_backbone(model.get_submodule("net"), file)
    else:
        try:
            model = lpips.LPIPS(net=net, verbose=False)
        except (URLError, OSError) as error:
            raise UserError(f"--perceptual-net {net} needs weights that could not be downloaded ({error}): give "
                            "--perceptual-file PATH, or --perceptual-net random.") from error
    return model.to(device).eval().requires_grad_(False)


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    """Copy torchvision's `features.I.*` into lpips' `sliceS.I.*`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"--perceptual-file {path} cannot be read as a state dict ({type(error).__name__}): "
                        "give torchvision's file.") from error
    renamed = {}
    for name, parameter in backbone.state_dict().items():
        source = "features." + name.split(".", 1)[1]
        if source not in state or state[source].shape != parameter.shape:
            raise UserError(f"--perceptual-file {path} has no fitting {source}: give the backbone that --perceptual-net names.")
        renamed[name] = state[source]
    backbone.load_state_dict(renamed)
