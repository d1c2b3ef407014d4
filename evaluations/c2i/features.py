"""Features of an npz in the spaces of `EXTRACTORS`: computed by the network, and kept beside the npz for the next evaluation."""

import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import torch

from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.extractors import EXTRACTORS, Extractor, Network
from evaluations.c2i.metrics import Moments, inception_score
from utils.config import UserError, choices, flag
from utils.files import replacing
from utils.logs import progress
from utils.npz import NPZ_ERRORS, read_small
from utils.untrusted import shortened

log = logging.getLogger("evaluator")

T = TypeVar("T")
Features = dict[str, np.ndarray]  # what the metrics need of one set of images, by the names of `Extractor.shapes`


@dataclass(frozen=True)
class FeatureOptions:
    """Which features of images are compared, and whose weights compute them."""

    features: tuple[Annotated[str, choices(EXTRACTORS)], ...] = ("inception",)
    """inception: ADM's five numbers; dinov2: FD-DINOv2, precision and recall; or both."""
    inception_weights: Path | None = None
    """torch-fidelity's Inception weights; None downloads them into torch's cache."""
    dinov2_weights: Path | None = None
    """DINOv2's ViT-L/14, dinov2_vitl14_pretrain.pth; None downloads it (1.2 GB) into torch's cache."""
    cache: bool = True
    """Keep the features of each npz in a file beside it, for later evaluations."""


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each fetched by a thread while the caller works on the one before."""
    iterator = iter(items)

    def fetch() -> list[T]:
        return list(islice(iterator, 1))  # empty at the end

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(fetch)
        while fetched := pending.result():
            pending = pool.submit(fetch)
            yield from fetched


def compute_features(file: EvaluationFile, extractor: Extractor, network: Network, device: torch.device,
                     batch_size: int) -> Features:
    """Run every image of `file` through the network, and show the progress on standard error."""
    outputs, done = extractor.outputs, 0
    rows = {output.name: np.empty((file.count, output.width), np.float32)
            for output in outputs if output.neighbours or output.score}
    moments = {output.name: Moments() for output in outputs if output.statistics}
    with progress(file.count, file.path.name, "images") as bar:
        for batch in ahead(map(extractor.prepare, file.batches(batch_size))):
            for output, values in zip(outputs, network(batch.to(device)), strict=True):  # [n, width]
                if output.name in moments:
                    moments[output.name].update(values)
                if output.name in rows:
                    rows[output.name][done : done + len(batch)] = values.cpu().numpy()
            done += len(batch)
            bar.update(len(batch))
    found: Features = {}
    for output in outputs:
        if output.neighbours:
            found[output.name] = rows[output.name]
        if output.statistics:
            found |= zip(output.statistics, moments[output.name].finish())
        if output.score:
            found[output.score] = np.array(inception_score(rows[output.name]))
    return found


class FeatureSource:
    """Features of files in one space, from the cache beside them or from the network.

    The cache's name holds a hash of the images and of the weights: features of other images or weights are never used.
    name: of `EXTRACTORS`; weights: the network's, None downloads them; batch_size: images that pass the network at once;
    cache: read and write features beside each npz.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device, batch_size: int = 64, cache: bool = True) -> None:
        self.name, self.extractor = name, EXTRACTORS[name]
        self.device, self.batch_size, self.cache = device, batch_size, cache
        self.network, self.weights_digest = self.extractor.load(weights, device)

    def cache_path(self, file: EvaluationFile) -> Path:
        """Where the features of `file` are kept."""
        return file.path.with_name(f"{file.path.stem}.features-{file.digest}-{self.weights_digest[:16]}.npz")

    def get(self, file: EvaluationFile) -> Features:
        """Features of one file; written to the cache as soon as they are complete."""
        if self.cache and (features := self._read(file)) is not None:
            log.info("features of %s taken from %s", file.where, self.cache_path(file).name)
            return features
        features = compute_features(file, self.extractor, self.network, self.device, self.batch_size)
        if self.cache:
            self._write(file, features)
        return features

    def _read(self, file: EvaluationFile) -> Features | None:
        path = self.cache_path(file)
        if not path.exists():
            return None
        try:
            found = {key: read_small(path, key, shape, "f") for key, shape in self.extractor.shapes(file.count).items()}
            if damaged := [key for key, values in found.items() if not np.isfinite(values).all()]:
                raise ValueError(f"{damaged[0]} has infinite or missing values")
            return found
        except (*NPZ_ERRORS, KeyError) as error:
            log.warning("%s cannot be read (%s): the features are computed again.", path, shortened(error))
            return None

    def _write(self, file: EvaluationFile, features: Features) -> None:
        try:
            with replacing(self.cache_path(file)) as aside, aside.open("wb") as stream:
                np.savez(stream, **features)  # type: ignore[arg-type]
            self._remove_outdated(file)
        except OSError as error:
            log.warning("features of %s could not be kept beside it (%s): the next run computes them again.",
                        file.where, error.strerror)

    def _remove_outdated(self, file: EvaluationFile) -> None:
        """Delete features of what the npz held earlier: at 50,000 images each file takes half a gigabyte."""
        stem, digest = re.escape(file.path.stem), "[0-9a-f]{16}"
        pattern = re.compile(rf"{stem}\.features-(?!{file.digest}){digest}-{digest}\.npz")
        for other in file.path.parent.iterdir():
            if pattern.fullmatch(other.name):
                other.unlink()


def open_sources(options: FeatureOptions, device: torch.device, batch_size: int = 64) -> list[FeatureSource]:
    """A source for each of --features, with its network loaded; raises UserError for weights of another."""
    weights = {"inception": options.inception_weights, "dinov2": options.dinov2_weights}
    for name, path in weights.items():
        if path is not None and name not in options.features:
            raise UserError(f"{flag(name + '_weights')} {path} is given but --features is {' '.join(options.features)}: add "
                            f"{name} to --features, or leave the weights out.")
    return [FeatureSource(name, weights[name], device, batch_size, options.cache) for name in dict.fromkeys(options.features)]
