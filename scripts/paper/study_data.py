"""Images of the study: training set, and the test set's two halves, one to choose by (validation), one to score on (test).

    python scripts/paper/study_data.py --data cifar10 --out FOLDER                            torchvision downloads it
    python scripts/paper/study_data.py --data cifar10 --out FOLDER --train T.npz --test T.npz   or images at hand

Both halves have the same number of every class (of an odd number the test half has one more).  Fashion-MNIST's grey images of 28
pixels get a black border of two and three channels.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np

from utils.config import UserError, parse, run_main
from utils.files import check_writable, replacing
from utils.images import open_images
from utils.untrusted import shortened

SIDE = 32  # pixels
NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion-mnist": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
}


@dataclass
class StudyDataConfig:
    """Options of the preparation."""

    out: Path
    """Folder for train.npz, validation.npz and test.npz."""
    data: Literal["cifar10", "fashion-mnist"] = "cifar10"
    """Which images; names the classes."""
    train: str = ""
    """Images and labels, as every command reads them; empty: torchvision downloads them into --out."""
    test: str = ""
    """The same of the test images."""


def from_file(path: str, option: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, 3] and labels [N] of an npz or a folder; raises UserError naming `option` for other sizes."""
    source = open_images(path, option)
    images = [source.load(row) for row in range(len(source))]
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or not shapes <= {(28, 28, 3), (SIDE, SIDE, 3)}:
        raise UserError(f"{option} {path} has images of the sizes {sorted(shapes)[:3]}: give images of 28 or 32 pixels, all "
                        "alike.")
    return np.stack(images), source.labels.astype(np.int64)


def downloaded(name: str, folder: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels by torchvision; raises UserError where they cannot be had."""
    from torchvision import datasets
    kind = {"cifar10": datasets.CIFAR10, "fashion-mnist": datasets.FashionMNIST}[name]
    try:
        found = kind(str(folder / "download"), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data {name} cannot be downloaded ({shortened(error)}): give --train and --test.") from error
    return np.asarray(found.data), np.asarray(found.targets, np.int64)


def framed(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, 3] -> [N, 32, 32, 3], smaller ones within a black border."""
    images = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
    border = (SIDE - images.shape[1]) // 2
    return np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n] of two halves with the same number of every class, in the order of the file: labels [N]."""
    place = np.empty(len(labels), np.int64)  # of each image within its class
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[rows] = np.arange(len(rows))
    return np.flatnonzero(place % 2 == 1), np.flatnonzero(place % 2 == 0)


def write(path: Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
    """Write a set in one piece, as the commands of this repository read it."""
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, images=images, labels=labels, class_names=np.array(names))


def main() -> None:
    """Parse options and write the three sets."""
    config = parse(StudyDataConfig)
    if bool(config.train) != bool(config.test):
        raise UserError(f"--train {config.train!r} and --test {config.test!r} go together: give both or none.")
    folder = check_writable(config.out, "--out")
    sets = [from_file(path, option) if path else downloaded(config.data, folder, option == "--train")
            for option, path in (("--train", config.train), ("--test", config.test))]
    (images, labels), (held_out, held_out_labels) = ((framed(found), numbers) for found, numbers in sets)
    validation, test = halves(held_out_labels)
    names = NAMES[config.data]
    write(folder / "validation.npz", held_out[validation], held_out_labels[validation], names)
    write(folder / "test.npz", held_out[test], held_out_labels[test], names)
    write(folder / "train.npz", images, labels, names)
    print(f"{len(images)} training, {len(validation)} validation and {len(test)} test images")


if __name__ == "__main__":
    run_main(main)
