"""Sixty pictures of three classes that the bundled data have not, made of their test images, which no quickstart model has seen.

    python scripts/own_classes_data.py --out FOLDER

    outfit         a shirt above trousers, both at half size
    pair           two sneakers, one above the other, which look at each other
    upturned boot  a boot on its head

FOLDER gets `train`, with 20 pictures of each class, and `val`, with others for the held-out likelihood: PNG files in folders with
the names of the classes, as one's own pictures would lie there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np
from PIL import Image

from utils.config import Positive, Seed, UserError, parse, run_main
from utils.files import check_writable
from utils.pictures import save_picture

DATA = Path(__file__).resolve().parent / "data"


@dataclass
class OwnClassesDataConfig:
    """Options of the preparation."""

    out: Path
    """Folder for `train` and `val`."""
    images: Positive = 20
    """Training pictures of each class."""
    held_out: Positive = 40
    """Held-out pictures of each class."""
    seed: Seed = 0
    """Of the choice of the images that pictures are made of."""


class NewClass(NamedTuple):
    """The bundled classes that a picture of a new one is made of, an image of each, and how."""

    of: tuple[str, ...]
    make: Callable[..., np.ndarray]


def halved(image: np.ndarray) -> np.ndarray:
    """An image [H, W] at half its size, in the middle of [H / 2, W]."""
    height, width = image.shape
    small = image.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
    return np.pad(small, ((0, 0), (width // 4, width // 2 - width // 4)))


def middle_rows(image: np.ndarray) -> np.ndarray:
    """The half of the rows of an image [H, W] around the middle of what it shows: [H / 2, W]."""
    shown = np.flatnonzero(image.max(1) > 32)
    half = len(image) // 2
    first = int(np.clip((shown[0] + shown[-1] + 1 - half) // 2, 0, len(image) - half)) if len(shown) else half // 2
    return image[first : first + half]


CLASSES: dict[str, NewClass] = {
    "outfit": NewClass(("shirt", "trousers"), lambda shirt, trousers: np.concatenate([halved(shirt), halved(trousers)])),
    "pair": NewClass(("sneaker", "sneaker"), lambda one, other: np.concatenate([middle_rows(one), middle_rows(other)[:, ::-1]])),
    "upturned boot": NewClass(("boot",), lambda boot: boot[::-1]),
}


def make_pictures(images: np.ndarray, labels: np.ndarray, names: list[str], count: int,
                  seed: int) -> dict[str, list[np.ndarray]]:
    """Pictures uint8 [H, W] of every new class, `count` each, no two of which share an image.

    images: grey, uint8 [N, H, W]; names: of the classes by label.  Raises UserError where there are too few images.
    """
    left = {name: np.random.default_rng(seed).permutation(np.flatnonzero(labels == label)).tolist()
            for label, name in enumerate(names)}
    found: dict[str, list[np.ndarray]] = {}
    for name, row in CLASSES.items():
        if any(len(left[part]) < count * row.of.count(part) for part in row.of):
            raise UserError(f"--images and --held-out ask for {count} pictures of {name} but the bundled test images have too "
                            f"few of {' or '.join(dict.fromkeys(row.of))}: ask for fewer.")
        found[name] = [row.make(*(images[left[part].pop()] for part in row.of)).astype(np.uint8) for _ in range(count)]
    return found


def main() -> None:
    """Parse options and write the pictures."""
    config = parse(OwnClassesDataConfig)
    check_writable(config.out, "--out")
    with np.load(DATA / "fashion_mnist_test.npz") as arrays:
        images, labels, names = arrays["images"], arrays["labels"], arrays["class_names"].tolist()
    pictures = make_pictures(images, labels, names, config.images + config.held_out, config.seed)
    for part, first, last in (("train", 0, config.images), ("val", config.images, None)):
        for name, found in pictures.items():
            folder = check_writable(config.out / part / name, "--out")
            for number, picture in enumerate(found[first:last]):
                save_picture(Image.fromarray(picture), folder / f"{number:02d}.png")
    print(f"{config.out}: {config.images} pictures of each of {', '.join(CLASSES)}, and {config.held_out} held out")


if __name__ == "__main__":
    run_main(main)
