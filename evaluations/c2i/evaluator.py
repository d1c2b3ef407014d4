"""Evaluate a sample npz against a reference npz: FID, sFID, inception score, precision and recall, as ADM does.

    python evaluations/c2i/evaluator.py REF.npz SAMPLE.npz

Both files hold `arr_0`, images (N, H, W, 3) from 0 to 255; statistics stored in a file (`mu`, `sigma`, `mu_s`,
`sigma_s`) replace those of its images for FID and sFID.  Definitions: Dhariwal and Nichol 2021 (arXiv 2105.05233); what
differs in the last digits is in the README beside this file.  Features are kept beside each npz and used again while
neither the npz nor the weights change.
"""

import logging
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, TypeVar

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluations.c2i.inception import (
    CLASSES,
    POOL_FEATURES,
    SPATIAL_FEATURES,
    Inception,
    load_inception,
    weights_file,
)
from evaluations.c2i.metrics import (
    NEAREST_K,
    SPLIT_SIZE,
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
)
from utils.config import UserError, parse, run_main, to_dict
from utils.files import check_exists, check_writable, write_json
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array

log = logging.getLogger("evaluator")

FULL_COUNT = 50_000  # images that published numbers are computed from
VIRTUAL_COUNT = 10_000  # images in ADM's VIRTUAL_imagenet batches, beside statistics of the whole training set
METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception score", "precision": "Precision",
           "recall": "Recall"}
STATISTICS = {"mu": (POOL_FEATURES,), "sigma": (POOL_FEATURES, POOL_FEATURES), "mu_s": (SPATIAL_FEATURES,),
              "sigma_s": (SPATIAL_FEATURES, SPATIAL_FEATURES)}
SAVE_AS_ADM = "save images as np.savez(path, images) with uint8 images of shape (N, H, W, 3)"

Purpose = Literal["auto", "generation", "reconstruction"]
T = TypeVar("T")


@dataclass(frozen=True)
class EvaluatorConfig:
    """What to compare, and how."""

    reference: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="REF.npz")]]
    """Reference npz: ADM's batch for generation, the validation images for reconstruction."""
    sample: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SAMPLE.npz")]]
    """npz of generated or reconstructed images."""
    inception_weights: Path | None = None
    """torch-fidelity's Inception weights; None downloads them into torch's cache."""
    json: Path | None = None
    """Write the result to this file too."""
    batch_size: int = 64
    """Images that pass the network at once; changes speed and memory, not the result beyond rounding."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where present."""
    purpose: Purpose = "auto"
    """What the samples are; decides which reference is right. auto reads it from the sample npz."""
    cache: bool = True
    """Keep the features of each npz beside it, so that they need not be computed again."""


@dataclass(frozen=True)
class Features:
    """What the metrics need of one set of images; stored as the feature cache."""

    pool3: np.ndarray  # float32 [N, 2048]
    mu: np.ndarray  # float64 [2048]
    sigma: np.ndarray  # float64 [2048, 2048]
    mu_s: np.ndarray  # float64 [2023]
    sigma_s: np.ndarray  # float64 [2023, 2023]
    inception_score: np.ndarray  # float64 []


class EvaluationFile:
    """One npz to evaluate, checked when it is opened and read in batches.

    name: the argument it came from (REF or SAMPLE).  Raises UserError for whatever ADM's evaluator could not use.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.where = path, f"{name} {path}"
        check_exists(path, name, "an npz of images")
        try:
            if not zipfile.is_zipfile(path):
                raise UserError(f"{self.where} is not an npz: {SAVE_AS_ADM}.")
            self.keys = array_keys(path)
            self.shape, self.dtype = array_header(path, "arr_0") if "arr_0" in self.keys else (None, None)
            self.kind = str(open_array(path, "kind")) if "kind" in self.keys else None
            self._check_statistics()
        except NPZ_ERRORS as error:
            raise UserError(f"{self.where} cannot be read ({error}): it may be damaged or incomplete, make it again."
                            ) from error
        if self.shape is not None:
            self._check_images()
        elif name != "REF" or not self.has_statistics:
            raise UserError(f"{self.where} has no arr_0, only {', '.join(self.keys) or 'nothing'}: {SAVE_AS_ADM}.")

    @property
    def has_statistics(self) -> bool:
        """True if the file stores a mean and a covariance that stand for its images in FID."""
        return "mu" in self.keys

    @property
    def count(self) -> int:
        """Number of images; 0 if the file holds statistics only."""
        return self.shape[0] if self.shape else 0

    def statistic(self, key: str) -> np.ndarray | None:
        """The stored mu, sigma, mu_s or sigma_s, or None."""
        return np.array(open_array(self.path, key)) if key in self.keys else None

    def labels(self) -> np.ndarray | None:
        """Class labels of the images (N,), or None where the file has none that can be read as such."""
        if "arr_1" not in self.keys:
            return None
        shape, dtype = array_header(self.path, "arr_1")
        return open_array(self.path, "arr_1") if dtype.kind in "iu" and shape == (self.count,) else None

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Images in order, uint8 or float (n, H, W, 3), in `size` rows at a time, without loading the rest.

        Raises UserError if the data is damaged or floats lie outside 0 to 255.
        """
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
                header = member.read(archive.getinfo("arr_0.npy").file_size - self.count * row_bytes)
                if b"'fortran_order': True" in header:
                    raise UserError(f"{self.where} has arr_0 in Fortran order: save np.ascontiguousarray(images).")
                for start in range(0, self.count, size):
                    rows = min(size, self.count - start)
                    batch = np.frombuffer(member.read(rows * row_bytes), self.dtype).reshape(rows, *self.shape[1:])
                    self._check_range(batch, first=start == 0)
                    yield batch
        except NPZ_ERRORS as error:
            raise UserError(f"{self.where} cannot be read to its end ({error}): it is damaged, make it again."
                            ) from error

    @cached_property
    def digest(self) -> str:
        """Identifies the images: their checksum as the zip directory holds it, with name, shape and type."""
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo("arr_0.npy")
        return sha256(f"{info.CRC} {info.file_size} {self.shape} {self.dtype}".encode()).hexdigest()[:16]

    def _check_images(self) -> None:
        if self.dtype != np.uint8 and self.dtype.kind != "f":
            raise UserError(f"{self.where} has arr_0 of type {self.dtype}, not uint8 or float: {SAVE_AS_ADM}.")
        if len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape:
            raise UserError(f"{self.where} has arr_0 of shape {self.shape}, not (N, H, W, 3): {SAVE_AS_ADM}.")
        if self.count <= NEAREST_K:
            raise UserError(f"{self.where} has {self.count} images, but precision and recall need at least "
                            f"{NEAREST_K + 1}: give a file with more images.")
        if self.dtype.kind == "f":
            next(self.batches(1 << 4))  # a wrong range shows here, before the network works for an hour

    def _check_range(self, batch: np.ndarray, first: bool) -> None:
        if batch.dtype.kind != "f":
            return
        low, high = float(batch.min()), float(batch.max())
        if not (low >= 0 and high <= 255) or (first and high <= 1):
            raise UserError(f"{self.where} has float images from {low:g} to {high:g}, not from 0 to 255: scale them "
                            "to 0 to 255 or save them as uint8.")

    def _check_statistics(self) -> None:
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            found = [key for key in (mean, covariance) if key in self.keys]
            if len(found) == 1:
                raise UserError(f"{self.where} has {found[0]} but not the other of {mean} and {covariance}: store "
                                "both or neither.")
        for key in (key for key in STATISTICS if key in self.keys):
            shape, dtype = array_header(self.path, key)
            if shape != STATISTICS[key] or dtype.kind != "f":
                raise UserError(f"{self.where} has {key} of type {dtype} and shape {shape}, not float "
                                f"{STATISTICS[key]}: take statistics of ADM's Inception features.")
            if not np.isfinite(open_array(self.path, key)).all():
                raise UserError(f"{self.where} has {key} with infinite or missing values: compute the statistics "
                                "again.")


def resolve_purpose(purpose: Purpose, sample: EvaluationFile) -> str:
    """`generation` or `reconstruction`: as asked for, else as the sample file says, else generation."""
    if purpose != "auto":
        return purpose
    return "reconstruction" if sample.kind == "reconstruction" else "generation"


def find_pitfalls(reference: EvaluationFile, sample: EvaluationFile, purpose: str) -> list[str]:
    """Sentences on what makes these numbers incomparable with published ones; empty when nothing does."""
    found = []
    if sample.count < FULL_COUNT:
        found.append(f"{sample.where} has {sample.count} images: FID of fewer than {FULL_COUNT} images is biased "
                     "upwards and does not compare with published numbers.")
    if sample.has_statistics:
        found.append(f"{sample.where} stores mu and sigma: as in ADM they replace the statistics of its images.")
    if not reference.has_statistics and reference.count < VIRTUAL_COUNT:
        found.append(f"{reference.where} has {reference.count} images and no stored statistics: too few for a "
                     "covariance that others would find too.")
    if "arr_1" in sample.keys and sample.labels() is None:
        found.append(f"{sample.where} has arr_1 that is not one integer label an image: the balance of classes is not "
                     "checked.")
    if purpose == "generation" and (labels := sample.labels()) is not None:
        _, counts = np.unique(labels, return_counts=True)
        if counts.min() != counts.max():
            found.append(f"{sample.where} has unbalanced labels, {counts.min()} to {counts.max()} images per class in "
                         f"{len(counts)} classes: published numbers use the same number for every class.")
        if len(labels) > SPLIT_SIZE and len(counts) > 1 and (np.diff(labels) >= 0).all():
            found.append(f"{sample.where} is sorted by class: the inception score is taken over {SPLIT_SIZE} images at "
                         "a time and comes out too low when these show few classes, so shuffle the samples.")
    if reference.shape and reference.shape[1:3] != sample.shape[1:3]:
        found.append(f"images of {reference.where} are {reference.shape[2]}x{reference.shape[1]} pixels and those of "
                     f"{sample.where} {sample.shape[2]}x{sample.shape[1]}: compare images of one size.")
    if reference.kind in ("samples", "reconstruction"):
        found.append(f"{reference.where} says that it holds {reference.kind}, not real images: REF comes first, SAMPLE "
                     "second.")
    if purpose == "reconstruction" and reference.has_statistics and reference.count == VIRTUAL_COUNT:
        found.append(f"{reference.where} looks like ADM's VIRTUAL_imagenet batch (training-set statistics and "
                     f"{VIRTUAL_COUNT} images): reconstruction FID is measured against the validation images, make "
                     "them an npz with tokenizer/validation/val_ddp.py.")
    if purpose == "reconstruction" and reference.count not in (0, VIRTUAL_COUNT, sample.count):
        found.append(f"{reference.where} has {reference.count} images and {sample.where} {sample.count}: "
                     "reconstruction FID compares the same images before and after.")
    if purpose == "generation" and reference.kind == "validation":
        found.append(f"{reference.where} holds validation images: published generation FID is measured against ADM's "
                     "VIRTUAL_imagenet batch of the training set; for reconstructions say --purpose reconstruction.")
    return found


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each fetched by a thread while the caller works on the one before."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, iterator, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, iterator, end)
            yield item


def compute_features(file: EvaluationFile, network: Inception, device: torch.device, batch_size: int) -> Features:
    """Run every image of `file` through the network, with a progress bar on standard error."""
    pool3 = np.empty((file.count, POOL_FEATURES), np.float32)
    probs = np.empty((file.count, CLASSES), np.float32)
    pool_moments, spatial_moments, done = Moments(), Moments(), 0
    with logging_redirect_tqdm(), tqdm(total=file.count, desc=file.path.name, unit="image") as bar:
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

    The cache's name carries a digest of the images and of the weights: a changed npz never meets old features.
    """

    def __init__(self, config: EvaluatorConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.network, self.weights_digest = load_inception(weights_file(config.inception_weights), device)

    def cache_path(self, file: EvaluationFile) -> Path:
        """Where the features of `file` are kept."""
        return file.path.with_name(f"{file.path.stem}.features-{file.digest}-{self.weights_digest[:16]}.npz")

    def get(self, file: EvaluationFile) -> Features:
        """Features of one file; written to the cache as soon as they are complete."""
        if self.config.cache and (features := self._read(file)) is not None:
            log.info("features of %s taken from %s", file.where, self.cache_path(file).name)
            return features
        features = compute_features(file, self.network, self.device, self.config.batch_size)
        if self.config.cache:
            self._write(file, features)
        return features

    def _read(self, file: EvaluationFile) -> Features | None:
        path = self.cache_path(file)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return Features(**{key: stored[key] for key in Features.__dataclass_fields__})
        except (*NPZ_ERRORS, KeyError) as error:
            log.warning("%s cannot be read (%s): the features are computed again.", path, error)
            return None

    def _write(self, file: EvaluationFile, features: Features) -> None:
        path = self.cache_path(file)
        beside = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez(beside, **vars(features))
            os.replace(beside, path)
            self._remove_outdated(file)
        except OSError as error:
            log.warning("features of %s could not be kept beside it (%s): the next run computes them again.",
                           file.where, error.strerror)
        finally:
            beside.unlink(missing_ok=True)

    def _remove_outdated(self, file: EvaluationFile) -> None:
        """Delete features of what the npz held earlier: at 50,000 images each file takes half a gigabyte."""
        stem, digest = re.escape(file.path.stem), "[0-9a-f]{16}"
        pattern = re.compile(rf"{stem}\.features-(?!{file.digest}){digest}-{digest}\.npz")
        for other in file.path.parent.iterdir():
            if pattern.fullmatch(other.name):
                other.unlink()


def compare(reference: EvaluationFile, sample: EvaluationFile, source: FeatureSource) -> dict[str, float | None]:
    """The five metrics of `sample` against `reference`; None where the reference does not hold what one needs."""
    of_reference = source.get(reference) if reference.count else None
    of_sample = source.get(sample)

    def distance(mean: str, covariance: str) -> float | None:
        sides = []
        for file, features in ((reference, of_reference), (sample, of_sample)):
            for key in (mean, covariance):
                sides.append(file.statistic(key) if key in file.keys else getattr(features, key, None))
        return None if any(side is None for side in sides) else frechet_distance(*sides)

    precision, recall = None, None
    if of_reference is not None:
        precision, recall = precision_recall(of_reference.pool3, of_sample.pool3, device=source.device)
    return {"fid": distance("mu", "sigma"), "sfid": distance("mu_s", "sigma_s"),
            "inception_score": float(of_sample.inception_score), "precision": precision, "recall": recall}


def choose_device(name: str) -> torch.device:
    """auto, cuda or cpu -> device; raises UserError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for but this machine shows no CUDA device: use --device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def print_result(metrics: dict[str, float | None]) -> None:
    """Print the metrics as an aligned table, n/a for a missing one."""
    width = max(map(len, METRICS.values()))
    for key, title in METRICS.items():
        value = metrics[key]
        print(f"{title:<{width}}  {'n/a' if value is None else format(value, '.4f'):>10}")


def main(args: list[str] | None = None) -> None:
    """Evaluate as the command line says; args: arguments instead of the command line's."""
    config = parse(EvaluatorConfig, args=args)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size} is not positive: give at least 1.")
    device = choose_device(config.device)
    if config.json is not None:
        if config.json.is_dir():
            raise UserError(f"--json {config.json} is a folder: give the name of a file.")
        check_writable(config.json.absolute().parent, "the folder of --json,")
    reference, sample = EvaluationFile(config.reference, "REF"), EvaluationFile(config.sample, "SAMPLE")
    purpose = resolve_purpose(config.purpose, sample)
    warnings = find_pitfalls(reference, sample, purpose)
    if not reference.count:
        warnings.append(f"{reference.where} holds statistics without images: precision and recall need images.")
    for warning in warnings:
        log.warning(warning)
    source = FeatureSource(config, device)
    metrics = compare(reference, sample, source)
    print_result(metrics)
    if config.json is not None:
        counts = {"reference": reference.count, "sample": sample.count}
        settings = {**to_dict(config), "purpose": purpose, "device": str(device),
                    "inception_weights_sha256": source.weights_digest,
                    "stored_statistics": {"reference": reference.has_statistics, "sample": sample.has_statistics}}
        write_json(config.json, {**metrics, "counts": counts, "settings": settings, "warnings": warnings})


if __name__ == "__main__":
    run_main(main)
