"""Inception features of an npz: computed by the network, and kept beside the npz for the next evaluation."""

import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from evaluations.c2i import evaluation_file
from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.inception import (
    CLASSES,
    POOL_FEATURES,
    Inception,
    load_inception,
    weights_file,
)
from evaluations.c2i.metrics import Moments, inception_score
from utils.files import replacing
from utils.logs import progress
from utils.npz import NPZ_ERRORS, read_small
from utils.untrusted import shortened

log = logging.getLogger("evaluator")

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """What the metrics need of one set of images; stored as the feature cache."""

    pool3: np.ndarray  # float32 [N, 2048]
    mu: np.ndarray  # float64 [2048]
    sigma: np.ndarray  # float64 [2048, 2048]
    mu_s: np.ndarray  # float64 [2023]
    sigma_s: np.ndarray  # float64 [2023, 2023]
    inception_score: np.ndarray  # float64 []


def _shapes(count: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields of `Features` for a number of images."""
    return {"pool3": (count, POOL_FEATURES), **evaluation_file.STATISTICS, "inception_score": ()}


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


def compute_features(file: EvaluationFile, network: Inception, device: torch.device, batch_size: int) -> Features:
    """Run every image of `file` through the network, and show the progress on standard error."""
    pool3 = np.empty((file.count, POOL_FEATURES), np.float32)
    probs = np.empty((file.count, CLASSES), np.float32)
    pool_moments, spatial_moments, done = Moments(), Moments(), 0
    with progress(file.count, file.path.name, "images") as bar:
        for batch in ahead(file.batches(batch_size)):
            images = torch.from_numpy(batch.astype(np.uint8 if batch.dtype == np.uint8 else np.float32))
            pool, spatial, prob = network(images.to(device).permute(0, 3, 1, 2))
            pool_moments.update(pool)
            spatial_moments.update(spatial)
            rows = slice(done, done + len(batch))
            pool3[rows], probs[rows] = pool.cpu().numpy(), prob.cpu().numpy()
            done += len(batch)
            bar.update(len(batch))
    return Features(pool3, *pool_moments.finish(), *spatial_moments.finish(), np.array(inception_score(probs)))


class FeatureSource:
    """Features of files, from the cache beside them or from the network.

    The cache's name holds a hash of the images and of the weights: features of other images or weights are never used.
    weights: torch-fidelity's Inception weights, None downloads them; batch_size: images that pass the network at once;
    cache: read and write features beside each npz.
    """

    def __init__(self, weights: Path | None, device: torch.device, batch_size: int = 64, cache: bool = True) -> None:
        self.device, self.batch_size, self.cache = device, batch_size, cache
        self.network, self.weights_digest = load_inception(weights_file(weights), device)

    def cache_path(self, file: EvaluationFile) -> Path:
        """Where the features of `file` are kept."""
        return file.path.with_name(f"{file.path.stem}.features-{file.digest}-{self.weights_digest[:16]}.npz")

    def get(self, file: EvaluationFile) -> Features:
        """Features of one file; written to the cache as soon as they are complete."""
        if self.cache and (features := self._read(file)) is not None:
            log.info("features of %s taken from %s", file.where, self.cache_path(file).name)
            return features
        features = compute_features(file, self.network, self.device, self.batch_size)
        if self.cache:
            self._write(file, features)
        return features

    def _read(self, file: EvaluationFile) -> Features | None:
        path = self.cache_path(file)
        if not path.exists():
            return None
        try:
            found = {key: read_small(path, key, shape, "f") for key, shape in _shapes(file.count).items()}
            if damaged := [key for key, values in found.items() if not np.isfinite(values).all()]:
                raise ValueError(f"{damaged[0]} has infinite or missing values")
            return Features(**found)
        except (*NPZ_ERRORS, KeyError) as error:
            log.warning("%s cannot be read (%s): the features are computed again.", path, shortened(error))
            return None

    def _write(self, file: EvaluationFile, features: Features) -> None:
        try:
            with replacing(self.cache_path(file)) as aside, aside.open("wb") as stream:
                np.savez(stream, **vars(features))
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
