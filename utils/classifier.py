"""A small convolutional classifier for small images: judge of samples, perceptual distance, selector of candidates.

`evaluations/c2i/classifier.py` trains it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from utils.checkpoint import read_export, restore


@dataclass
class ClassifierConfig:
    """Shape of the classifier, and what its outputs mean."""

    num_classes: int = 10
    channels: tuple[int, ...] = (32, 64, 128)
    class_names: tuple[str, ...] = ()  # of its outputs; empty where the images had none


class SmallClassifier(nn.Module):
    """Convolution stages with batch normalisation, average pooling, one linear layer."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, *config.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, width, 3, padding=1, stride=2 if index == 0 else 1, bias=False),
                          nn.BatchNorm2d(width), nn.ReLU(),
                          nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for index, (before, width) in enumerate(zip(widths, widths[1:])))
        self.output = nn.Linear(widths[-1], config.num_classes)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [-1, 1] -> the maps after every stage, at 1/2, 1/4, 1/8 ... of the resolution."""
        maps, x = [], images
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else F.max_pool2d(x, 2))
            maps.append(x)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """Pooled last maps [B, channels[-1]]."""
        return self.feature_maps(images)[-1].mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> class logits [B, num_classes]."""
        return self.output(self.features(images))


def load_classifier(path: str | Path, option: str = "--classifier") -> SmallClassifier:
    """A classifier ready for use; raises UserError naming `option` when the file does not hold one."""
    config, tensors = read_export(path, "classifier", option)
    model = restore(SmallClassifier, ClassifierConfig, config["model"], tensors, f"{option} {path}")
    return model.eval().requires_grad_(False)
