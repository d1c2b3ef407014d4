"""Evaluate a sample npz against a reference npz: FID, sFID, inception score, precision and recall, as ADM does; or FD-DINOv2.

    python evaluations/c2i/evaluator.py REF.npz SAMPLE.npz [--features inception dinov2]

Both files hold `arr_0`, images [N, H, W, 3] from 0 to 255; statistics stored in a file (`mu`, `sigma`, `mu_s`, `sigma_s`,
`mu_dinov2`, `sigma_dinov2`) replace those of its images for FID, sFID and FD-DINOv2.  Definitions: Dhariwal and Nichol 2021
(arXiv 2105.05233), Stein et al. 2023 (arXiv 2306.04675); what differs in the last digits is in the README beside this file.
Features are kept beside each npz and used again while neither the npz nor the weights change.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import tyro

from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.features import FeatureOptions, FeatureSource, open_sources
from evaluations.c2i.metrics import SPLIT_SIZE, frechet_distance, precision_recall
from utils.class_names import different_names
from utils.config import Device, Positive, command_line, flatten, parse, run_main, to_dict
from utils.distributed import choose_device
from utils.files import check_file_to_write, write_json
from utils.logs import StandardError

log = logging.getLogger("evaluator")

FULL_COUNT = 50_000  # images that published numbers are computed from
VIRTUAL_COUNT = 10_000  # images in ADM's VIRTUAL_imagenet batches, beside statistics of the whole training set
METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception score", "precision": "Precision", "recall": "Recall",
           "fd_dinov2": "FD-DINOv2", "precision_dinov2": "Precision (DINOv2)", "recall_dinov2": "Recall (DINOv2)"}

Purpose = Literal["auto", "generation", "reconstruction"]


@dataclass(frozen=True)
class EvaluatorConfig:
    """What to compare, and how."""

    reference: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="REF.npz")]]
    """Reference npz: ADM's batch for generation, the validation images for reconstruction."""
    sample: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SAMPLE.npz")]]
    """npz of generated or reconstructed images."""
    networks: FeatureOptions
    json: Path | None = None
    """Write the result to this file too."""
    batch_size: Positive = 64
    """Images that pass the network at once; changes speed and memory, not the result beyond rounding."""
    device: Device = "auto"
    """auto takes CUDA where present."""
    purpose: Purpose = "auto"
    """What the samples are; decides which reference is right. auto reads it from the sample npz."""


def resolve_purpose(purpose: Purpose, sample: EvaluationFile) -> str:
    """`generation` or `reconstruction`: as asked for, else as the sample file says, else generation."""
    return purpose if purpose != "auto" else "reconstruction" if sample.kind == "reconstruction" else "generation"


def find_pitfalls(reference: EvaluationFile, sample: EvaluationFile, purpose: str,
                  features: Sequence[str] = ("inception",)) -> list[str]:
    """Sentences on what makes these numbers incomparable with published ones; empty when nothing does."""
    found = []
    if "dinov2" in features and reference.has_statistics and "mu_dinov2" not in reference.keys:
        found.append(f"{reference.where} stores statistics of Inception features alone: FD-DINOv2 is measured against its "
                     f"{reference.count} images, and does not compare with values against a whole training set.")
    if sample.count < FULL_COUNT:
        found.append(f"{sample.where} has {sample.count} images: FID of fewer than {FULL_COUNT} images is biased "
                     "upwards and does not compare with published numbers.")
    if sample.has_statistics:
        found.append(f"{sample.where} stores mu and sigma: as in ADM they replace the statistics of its images.")
    if not reference.has_statistics and reference.count < VIRTUAL_COUNT:
        found.append(f"{reference.where} has {reference.count} images and no stored statistics: too few for a "
                     "covariance that can be reproduced.")
    if "arr_1" in sample.keys and sample.labels() is None:
        found.append(f"{sample.where} has arr_1 that is not one integer label per image: the balance of classes is not checked.")
    if purpose == "generation" and (labels := sample.labels()) is not None:
        _, counts = np.unique(labels, return_counts=True)
        if counts.min() != counts.max():
            found.append(f"{sample.where} has unbalanced labels, {counts.min()} to {counts.max()} images per class in "
                         f"{len(counts)} classes: published numbers use the same number for every class.")
        if len(labels) > SPLIT_SIZE and len(counts) > 1 and (np.diff(labels) >= 0).all():
            found.append(f"{sample.where} is sorted by class: the inception score of every {SPLIT_SIZE} images comes out too "
                         "low when they show few classes, so shuffle the samples.")
    if reference.shape and reference.shape[1:3] != sample.shape[1:3]:
        found.append(f"images of {reference.where} are {reference.shape[2]}x{reference.shape[1]} pixels and those of "
                     f"{sample.where} {sample.shape[2]}x{sample.shape[1]}: compare images of one size.")
    if reference.kind in ("samples", "reconstruction"):
        found.append(f"{reference.where} says that it holds {reference.kind}, not real images: REF comes first, SAMPLE second.")
    if purpose == "reconstruction" and reference.has_statistics and reference.count == VIRTUAL_COUNT:
        found.append(f"{reference.where} looks like ADM's VIRTUAL_imagenet batch (training-set statistics, "
                     f"{VIRTUAL_COUNT} images): measure reconstruction FID against the validation images, in an npz "
                     "made by tokenizer/validation/val_ddp.py.")
    if purpose == "reconstruction" and reference.count not in (0, VIRTUAL_COUNT, sample.count):
        found.append(f"{reference.where} has {reference.count} images and {sample.where} {sample.count}: "
                     "reconstruction FID compares the same images before and after.")
    if difference := different_names(sample.class_names, reference.class_names, sample.where, reference.where):
        found.append(f"{difference}: the two may show different classes.")
    if purpose == "generation" and reference.kind == "validation" and "captions" not in sample.keys:
        found.append(f"{reference.where} holds validation images: published generation FID is measured against ADM's "
                     "VIRTUAL_imagenet batch of the training set; for reconstructions give --purpose reconstruction.")
    return found


def compare(reference: EvaluationFile, sample: EvaluationFile, source: FeatureSource,
            neighbours: bool = True) -> dict[str, float | None]:
    """The metrics of `sample` against `reference` in one space; None where the reference does not hold what one needs.

    neighbours: False leaves out precision and recall, whose time grows with the square of the number of images.
    """
    of_reference = source.get(reference) if reference.count else {}
    of_sample = source.get(sample)
    found: dict[str, float | None] = {}
    for output in source.extractor.outputs:
        if output.distance:
            sides = [file.statistic(key) if key in file.keys else features.get(key)
                     for file, features in ((reference, of_reference), (sample, of_sample)) for key in output.statistics]
            given = [side for side in sides if side is not None]
            found[output.distance] = frechet_distance(*given) if len(given) == len(sides) else None
        if neighbours and output.neighbours:
            found |= dict.fromkeys(output.neighbours)
            if of_reference:
                rows = of_reference[output.name], of_sample[output.name]
                found |= zip(output.neighbours, precision_recall(*rows, device=source.device, half=output.half))
        if output.score:
            found[output.score] = float(of_sample[output.score])
    return {name: found[name] for name in METRICS if name in found}


def print_result(metrics: dict[str, float | None]) -> None:
    """Print the metrics as an aligned table, n/a for a missing one."""
    width = max(len(METRICS[key]) for key in metrics)
    for key, value in metrics.items():
        print(f"{METRICS[key]:<{width}}  {'n/a' if value is None else format(value, '.4f'):>10}")


def main(args: list[str] | None = None) -> None:
    """Evaluate as the command line says; args: arguments instead of the command line's."""
    config = parse(EvaluatorConfig, args=args)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", handlers=[StandardError()])
    device = choose_device(config.device)
    if config.json is not None:
        check_file_to_write(config.json, "--json")
    reference, sample = EvaluationFile(config.reference, "REF"), EvaluationFile(config.sample, "SAMPLE")
    purpose = resolve_purpose(config.purpose, sample)
    warnings = find_pitfalls(reference, sample, purpose, config.networks.features)
    if not reference.count:
        warnings.append(f"{reference.where} holds statistics without images: precision and recall need images.")
    for warning in warnings:
        log.warning(warning)
    metrics: dict[str, float | None] = {}
    sources = open_sources(config.networks, device, config.batch_size)
    for source in sources:
        metrics |= compare(reference, sample, source)
    print_result(metrics)
    if config.json is not None:
        counts = {"reference": reference.count, "sample": sample.count}
        settings = {**flatten(to_dict(config)), "purpose": purpose, "device": str(device),
                    **{f"{source.name}_weights_sha256": source.weights_digest for source in sources},
                    "stored_statistics": {"reference": reference.has_statistics, "sample": sample.has_statistics}}
        write_json(config.json, {**metrics, "counts": counts, "settings": settings, "warnings": warnings,
                                 "command": command_line(args)})


if __name__ == "__main__":
    run_main(main)
