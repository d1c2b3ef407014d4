"""Judge small images by a small classifier: how often it predicts the label, and Fréchet distance, precision and recall of its
features.

Inception features say little about such images. The reference is a set of real images that the classifier was not trained
on; other real images judged against it give the smallest distance to expect.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch

from evaluations.c2i.classifier import load_all
from evaluations.c2i.metrics import NEAREST_K, feature_statistics, frechet_distance, precision_recall
from utils.class_names import ClassNames, require_same_names
from utils.classifier import SmallClassifier, load_classifier
from utils.config import Device, Positive, UserError, parse, run_main
from utils.crops import to_tensor
from utils.distributed import setup
from utils.files import check_exists, check_writable, write_json
from utils.images import open_images
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array, read_small
from utils.untrusted import printable, shortened


@dataclass
class JudgeConfig:
    """Options of judging."""

    classifier: Path
    """File that classifier.py wrote."""
    reference: Path
    """Image folder or npz of real images."""
    out: Path
    """JSON to write."""
    samples: tuple[Path, ...] = ()
    """npz files with `arr_0` images and `arr_1` labels; each appears in the results under its file's name."""
    image_size: Positive = 32
    """Side of the square images in pixels."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


@torch.no_grad()
def features_and_votes(classifier: SmallClassifier, images: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 3] -> features [N, F] and predicted classes [N]."""
    features, votes = [], []
    for first in range(0, len(images), 256):
        batch = to_tensor(images[first : first + 256]).to(device)
        features.append(classifier.features(batch))
        votes.append(classifier.output(features[-1]).argmax(1))
    return torch.cat(features).cpu().numpy(), torch.cat(votes).cpu().numpy()


def judge(classifier: SmallClassifier, images: np.ndarray, labels: np.ndarray, reference: np.ndarray,
          device: torch.device) -> dict[str, float | None]:
    """Figures of one set: class_accuracy, precision and recall in [0, 1], frechet (squared distance of Gaussians), images.

    images: uint8 [N, H, W, 3]; labels [N]; reference: features of real images [M, F].  Precision and recall are None for sets
    of too few images to have neighbours.
    """
    features, votes = features_and_votes(classifier, images, device)
    enough = min(len(features), len(reference)) > NEAREST_K
    precision, recall = precision_recall(reference, features, device) if enough else (None, None)
    return {"class_accuracy": float((votes == labels).mean()),
            "frechet": frechet_distance(*feature_statistics(reference), *feature_statistics(features)),
            "precision": precision, "recall": recall, "images": len(images)}


def read_samples(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, str, ClassNames]:
    """Images uint8 [N, size, size, 3], labels [N], `kind` (or "") and class names of an npz.

    Raises UserError when it holds no such.
    """
    check_exists(path, "--samples", "an npz of samples")
    try:
        keys = array_keys(path)
        if not {"arr_0", "arr_1"} <= set(keys):
            raise UserError(f"--samples {path} has the keys {printable(', '.join(keys))}: give an npz with arr_0 and arr_1.")
        shape, _ = array_header(path, "arr_0")
        if shape != (*shape[:1], size, size, 3) or 0 in shape[:1]:
            raise UserError(f"--samples {path} has arr_0 of shape {shape}, not (N, {size}, {size}, 3): give images of "
                            "--image-size.")
        images, labels = read_small(path, "arr_0", shape, "u"), read_small(path, "arr_1", shape[:1], "iu")
        if images.dtype != np.uint8:
            raise ValueError(f"arr_0 is of type {images.dtype}, not uint8")
        kind = str(read_small(path, "kind", (), "U")) if "kind" in keys else ""
        names = open_array(path, "class_names") if "class_names" in keys else ()
        return images, labels, kind, tuple(map(str, names))
    except NPZ_ERRORS as error:
        raise UserError(f"--samples {path} cannot be read ({shortened(error)}): make it again.") from error


def main() -> None:
    """Parse options, judge every set, write JSON and a table."""
    config = parse(JudgeConfig)
    processes = setup(config.device)
    device = processes.device
    if config.out.is_dir():
        raise UserError(f"--out {config.out} is a folder: give the name of a file.")
    check_writable(config.out.parent, "--out")
    classifier = load_classifier(config.classifier).to(device)
    source = open_images(config.reference, "--reference")
    images, labels = load_all(source, config.image_size)
    names, judged_by = classifier.config.class_names, f"--classifier {config.classifier}"
    require_same_names(source.class_names, names, f"--reference {config.reference}", judged_by)
    # Two disjoint halves: one is the reference of all sets, the other shows what real images score against it.
    half = np.arange(len(images)) % 2 == 0
    reference, _ = features_and_votes(classifier, images[half], device)
    results = {"real": judge(classifier, images[~half], labels[~half], reference, device)}
    results["real"]["class_accuracy"] = float((features_and_votes(classifier, images, device)[1] == labels).mean())
    for path in config.samples:
        samples, wanted, kind, sample_names = read_samples(path, config.image_size)
        require_same_names(sample_names, names, f"--samples {path}", judged_by)
        if kind == "reconstruction" and len(samples) == len(images):
            samples, wanted = samples[~half], wanted[~half]  # not of the images that make the reference
        results[path.stem] = judge(classifier, samples, wanted, reference, device)
    write_json(config.out, results)
    for name, figures in results.items():
        print(f"{name:24} class accuracy {figures['class_accuracy']:.3f}   Fréchet {figures['frechet']:.4f}   "
              f"{figures['images']} images")
    processes.close()


if __name__ == "__main__":
    run_main(main)
