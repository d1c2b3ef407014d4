"""Captions for the bundled images, from their class and two measured properties, and prompts that no caption repeats.

    python scripts/text_demo_data.py --out FOLDER

A caption names the class and what is clear of two properties: dark or bright, narrow or wide, each against other images of its
class.  Of every class one of the four combinations never occurs in training (`held_out`), and prompts use phrasings that captions
do not.  Some captions carry damage of the kind that text from the web has, which ftfy mends.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np

from utils.config import Positive, Probability, Seed, parse, run_main
from utils.files import check_writable, replacing, write_json, write_text

DATA = Path(__file__).resolve().parent / "data"
CLEAR = 0.35     # share of a class's images on either side whose property is clear enough to be named
FOREGROUND = 32  # of 255; what is darker is the ground

# What captions call a class whose own name is a part of another's: the encoder reads words, and T-shirts have "shirt" in theirs.
CALLED = {"T-shirt": "tee", "shirt": "blouse"}
# Of every property its measure's name and the words for little and for much of it.
WORDS = {"brightness": (("dark", "dim"), ("bright", "light")), "width": (("narrow", "slim"), ("wide", "broad"))}
# {p}: properties, {c}: class.  A caption without properties leaves out what follows the last comma.
CAPTIONS = ("a {p} {c}", "a photo of a {p} {c}", "{c}: {p}", "a {c} that is {p}", "picture of one {p} {c} on a black ground",
            "the {c} in this picture is {p}", "{p} {c} from the catalogue", "one {c}, {p}")
PHRASINGS = ("we are looking at a {c} which is {p}", "shop photo: {p} {c}, new", "here you see the {p} {c} again")
PLAIN = ("a {c}", "a photo of a {c}", "one {c} from the catalogue", "the {c} in this picture")
# What goes wrong with text: UTF-8 read as another encoding, entities, full-width letters, lost spaces.
DAMAGE = (lambda text: f"{text} â€“ in stock", lambda text: f"â€œ{text}â€\x9d", lambda text: f"it&#39;s {text}",
          lambda text: text.translate({code: code + 0xFEE0 for code in range(0x61, 0x7B)}), lambda text: f"{text}â€¦")


@dataclass
class TextDemoDataConfig:
    """Options of the preparation."""

    out: Path
    """Folder for train.npz, prompts.jsonl and limits.json."""
    damaged: Probability = 0.15
    """Share of captions and prompts that are damaged."""
    images: Positive = 10_000
    """Training images of which captions are made, from the first on."""
    seed: Seed = 0
    """Of phrasings and damage."""


class Limits(NamedTuple):
    """Between which values of a property nothing is said, and the median: [classes] each."""

    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def measure(images: np.ndarray) -> dict[str, np.ndarray]:
    """Properties of grey or colour images uint8 [N, H, W] or [N, H, W, 3]: float [N] each.

    brightness: mean of the foreground in [0, 1]; width: spread of the brightness along a row over that along a column.
    """
    grey = (images if images.ndim == 3 else images.mean(-1)).astype(np.float64)      # [N, H, W]
    shown = grey > FOREGROUND
    brightness = (grey * shown).sum((1, 2)) / np.maximum(shown.sum((1, 2)), 1) / 255
    weights = grey * shown + 1e-9
    weights /= weights.sum((1, 2), keepdims=True)
    spread = []
    for axis in (1, 2):  # summed over rows: along x; over columns: along y
        profile, places = weights.sum(axis), np.arange(grey.shape[3 - axis])         # [N, W] or [N, H]
        centre = profile @ places
        spread.append(np.sqrt((profile * (places - centre[:, None]) ** 2).sum(1)) + 1e-6)
    return {"brightness": brightness, "width": spread[0] / spread[1]}


def find_limits(values: np.ndarray, labels: np.ndarray) -> Limits:
    """Limits of a property [N] for every class."""
    shares = np.array([CLEAR, 0.5, 1 - CLEAR])
    return Limits(*np.array([np.quantile(values[labels == label], shares) for label in range(labels.max() + 1)]).T)


def named_sides(values: np.ndarray, labels: np.ndarray, limits: Limits) -> np.ndarray:
    """Of a property [N]: 0 little, 1 much, -1 neither clearly."""
    return np.where(values < limits.low[labels], 0, np.where(values > limits.high[labels], 1, -1))


def held_out(label: int) -> tuple[int, int]:
    """The sides of brightness and width that a class never has together in training."""
    return label % 2, label // 2 % 2


def phrase(rng: np.random.Generator, template: str, name: str, sides: dict[str, int]) -> str:
    """A caption: sides of the named properties, in an order and in words that are drawn."""
    words = [str(rng.choice(WORDS[key][side])) for key, side in rng.permutation(list(sides.items())).tolist()
             for side in [int(side)]]
    joined = str(rng.choice([" and ", ", "])).join(words)
    return template.format(p=joined, c=name)


def damage(rng: np.random.Generator, text: str, share: float) -> str:
    """The text, or with a probability what a careless page would have made of it."""
    return DAMAGE[rng.integers(len(DAMAGE))](text) if rng.random() < share else text


def write_captions(config: TextDemoDataConfig, rng: np.random.Generator,
                   limits: dict[str, Limits]) -> tuple[list[str], list[str]]:
    """Write train.npz with captions and short captions; returns what classes are called and the captions."""
    with np.load(DATA / "fashion_mnist_train.npz") as arrays:
        images, labels = arrays["images"][: config.images], arrays["labels"][: config.images]
        names = arrays["class_names"].tolist()
    called = [CALLED.get(name, name) for name in names]
    found = measure(images)
    limits |= {key: find_limits(values, labels) for key, values in found.items()}
    sides = np.stack([named_sides(found[key], labels, limits[key]) for key in WORDS], axis=1)      # [N, 2]
    kept = np.flatnonzero([tuple(pair) != held_out(label) for pair, label in zip(sides, labels)])
    captions, short = [], []
    for row in kept:
        given = {key: int(side) for key, side in zip(WORDS, sides[row]) if side >= 0}
        templates = CAPTIONS if given else PLAIN
        name = called[labels[row]]
        captions.append(damage(rng, phrase(rng, str(rng.choice(templates)), name, given), config.damaged))
        short.append(str(rng.choice(PLAIN)).format(c=name))
    with replacing(config.out / "train.npz") as aside, aside.open("wb") as file:
        np.savez(file, images=images[kept], labels=labels[kept], class_names=np.array(names), captions=np.array(captions),
                 short=np.array(short))
    return called, captions


def prompts(rng: np.random.Generator, names: list[str], damaged: float) -> list[dict[str, object]]:
    """A prompt for every class, combination and phrasing, as lines of prompts.jsonl."""
    lines: list[dict[str, object]] = []
    for template in PHRASINGS:
        for label, name in enumerate(names):
            for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
                sides = dict(zip(WORDS, pair))
                lines.append({"prompt": damage(rng, phrase(rng, template, name, sides), damaged), "class": label, **sides,
                              "held_out": pair == held_out(label)})
    return lines


def main() -> None:
    """Parse options and write images with captions, prompts and the limits of the properties."""
    config = parse(TextDemoDataConfig)
    check_writable(config.out, "--out")
    rng, limits = np.random.default_rng(config.seed), dict[str, Limits]()
    names, captions = write_captions(config, rng, limits)
    write_text(config.out / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in prompts(rng, names, config.damaged)))
    write_json(config.out / "limits.json", {key: {name: each.tolist() for name, each in found._asdict().items()}
                                            for key, found in limits.items()})
    print(f"{len(captions)} captioned images, of which no class has its held-out combination; for example")
    print(*(f"  {caption}" for caption in captions[:8]), sep="\n")


if __name__ == "__main__":
    run_main(main)
