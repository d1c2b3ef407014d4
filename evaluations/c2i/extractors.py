"""The feature spaces that sets of images are compared in: a row for each network, with what the metrics take from its outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations.c2i import dinov2, inception

Network = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Output:
    """One output of a network, float32 [B, width], and the metrics that come of it; "" or () for those that do not."""

    name: str
    """Of its rows in a cache."""
    width: int
    distance: str = ""
    """Fréchet distance of the statistics."""
    statistics: tuple[str, ...] = ()
    """Names of mean and covariance in a cache, and in a file that stores them for the distance."""
    neighbours: tuple[str, ...] = ()
    """Precision and recall of the rows."""
    half: bool = False
    """Whether these two are computed in half precision, as ADM does."""
    score: str = ""
    """Inception score of the rows, which are class probabilities."""

    @property
    def statistics_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of mean and covariance by name."""
        return dict(zip(self.statistics, ((self.width,), (self.width, self.width))))


@dataclass(frozen=True)
class Extractor:
    """A network, and what its outputs are used for."""

    load: Callable[[Path | None, torch.device], tuple[Network, str]]
    """The network by its weights file (None: the download), and the file's SHA-256."""
    prepare: Callable[[np.ndarray], Tensor]
    """Images as they are stored, [n, H, W, 3] from 0 to 255, as the network takes them; done beside the network's work."""
    outputs: tuple[Output, ...]
    """In the order in which the network returns them."""
    source: str
    """Whose features they are, for messages."""

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of a number of images: rows for neighbours, statistics, scores."""
        found: dict[str, tuple[int, ...]] = {}
        for output in self.outputs:
            found |= ({output.name: (count, output.width)} if output.neighbours else {}) | output.statistics_shapes
            found |= {output.score: ()} if output.score else {}
        return found


EXTRACTORS: dict[str, Extractor] = {
    "inception": Extractor(inception.load_inception, inception.prepare, (
        Output("pool3", inception.POOL_FEATURES, "fid", ("mu", "sigma"), ("precision", "recall"), half=True),
        Output("spatial", inception.SPATIAL_FEATURES, "sfid", ("mu_s", "sigma_s")),
        Output("probs", inception.CLASSES, score="inception_score")), "ADM's Inception features"),
    "dinov2": Extractor(dinov2.load_dinov2, dinov2.prepare, (
        Output("class_token", dinov2.FEATURES, "fd_dinov2", ("mu_dinov2", "sigma_dinov2"),
               ("precision_dinov2", "recall_dinov2")),), "features of DINOv2's ViT-L/14"),
}


def stored_statistics() -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, whose features) of all statistics that a file may store in the place of its images', by name."""
    return {name: (shape, extractor.source) for extractor in EXTRACTORS.values() for output in extractor.outputs
            for name, shape in output.statistics_shapes.items()}
