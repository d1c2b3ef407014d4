"""What the samples of text_demo.sh have of their prompts: class and properties, in figures.json, report.md and pictures."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np
import torch

from evaluations.c2i.judge import features_and_votes
from scripts.paper.table import markdown_table
from scripts.text_demo_data import DATA, WORDS, measure
from utils.classifier import SmallClassifier, load_classifier
from utils.config import parse, run_main
from utils.files import read_json, write_json, write_text
from utils.npz import open_array
from utils.pictures import captioned_grid, save_picture
from utils.texts import read_prompts

SYSTEMS = {"iar2": "IAR2", "llamagen": "LlamaGen"}
GUIDANCE = ("guided", "unguided")
SHOWN = 4  # images of a prompt in the pictures


@dataclass
class ReportConfig:
    """Options of the report."""

    folder: Path = Path("runs/text_demo")
    """Folder of the demonstration."""


def middles(folder: Path) -> dict[str, np.ndarray]:
    """Of every property the median of each class, on one side of which a sample must lie: [classes]."""
    limits = read_json(folder / "data" / "limits.json", "--folder", "the limits of the properties")
    return {key: np.array(limits[key]["middle"]) for key in WORDS}


def agreement(images: np.ndarray, asked: dict[str, np.ndarray], middle: dict[str, np.ndarray],
              judge: SmallClassifier) -> dict[str, np.ndarray]:
    """Whether images uint8 [N, H, W, 3] have the class and the sides of the properties that are asked for: bool [N] each."""
    _, votes = features_and_votes(judge, images, torch.device("cpu"))
    found = measure(images)
    return {"class": votes == asked["class"]} | {
        key: (found[key] > middle[key][asked["class"]]) == asked[key] for key in WORDS}


def of_real_images(judge: SmallClassifier) -> float:
    """Share of the bundled test images whose class the judge says."""
    with np.load(DATA / "fashion_mnist_test.npz") as arrays:
        images, labels = np.repeat(arrays["images"][..., None], 3, axis=-1), arrays["labels"]
    _, votes = features_and_votes(judge, images, torch.device("cpu"))
    return float((votes == labels).mean())


def gather(folder: Path) -> dict[str, Any]:
    """All figures; a row for each system, guidance, and whether training has seen the combination of properties."""
    judge, middle = load_classifier(folder / "judge.safetensors"), middles(folder)
    lines = [prompt.about for prompt in read_prompts(folder / "data" / "prompts.jsonl", "--folder")]
    rows = []
    for system in SYSTEMS:
        for guidance in GUIDANCE:
            images = np.array(open_array(folder / f"{system}_{guidance}.npz", "arr_0"))
            each = len(images) // len(lines)
            asked = {key: np.repeat([line[key] for line in lines], each) for key in ("class", *WORDS, "held_out")}
            right = agreement(images, asked, middle, judge)
            for held_out in (False, True):
                chosen = asked["held_out"] == held_out
                rows.append({"system": system, "guidance": guidance, "held_out": held_out, "images": int(chosen.sum()),
                             **{key: float(value[chosen].mean()) for key, value in right.items()}})
    seconds = {path.name: int(path.read_text()) for path in sorted((folder / "phases").iterdir()) if path.name[0] != "."}
    return {"rows": rows, "class_of_real_images": of_real_images(judge), "seconds": seconds}


def draw(folder: Path) -> None:
    """A picture for every system: guided samples of a prompt of each class, of the combinations that training has not seen."""
    prompts = read_prompts(folder / "data" / "prompts.jsonl", "--folder")
    new = [[index for index, prompt in enumerate(prompts) if prompt.about["held_out"] and prompt.about["class"] == label]
           for label in range(10)]
    chosen = [those[label % len(those)] for label, those in enumerate(new)]  # the phrasings in turn
    for system in SYSTEMS:
        images = open_array(folder / f"{system}_guided.npz", "arr_0")
        each = len(images) // len(prompts)
        shown = np.concatenate([images[index * each : index * each + min(SHOWN, each)] for index in chosen])
        save_picture(captioned_grid(shown, [prompts[index].text for index in chosen], 4), folder / f"{system}.png")


def report(figures: dict[str, Any]) -> str:
    """The report in markdown."""
    cells = [[SYSTEMS[row["system"]], row["guidance"], "new" if row["held_out"] else "seen", str(row["images"]),
              *(f"{row[key]:.1%}" for key in ("class", *WORDS))] for row in figures["rows"]]
    table = markdown_table(["system", "samples", "combination", "images", "class", "dark or bright", "narrow or wide"], cells)
    seconds = markdown_table(["phase", "seconds"], [[name, str(value)] for name, value in figures["seconds"].items()])
    return f"""# From text, on Fashion-MNIST

Captions name the class of an image and what is clear of two properties. No caption has the phrasings of the prompts, and of every
class one combination of the properties ("new") never occurs in training. Shares of samples that have the class a small classifier
says ({figures["class_of_real_images"]:.1%} of real test images), and that lie on the asked side of their class's median:

{table}
Guided samples of new combinations in new phrasings, by IAR2 and by LlamaGen:

![IAR2](iar2.png)

![LlamaGen](llamagen.png)

{seconds}"""


def main() -> None:
    """Write figures.json, report.md and the pictures, and print the report."""
    folder = parse(ReportConfig).folder
    figures = gather(folder)
    draw(folder)
    write_json(folder / "figures.json", figures)
    write_text(folder / "report.md", report(figures))
    print((folder / "report.md").read_text())


if __name__ == "__main__":
    run_main(main)
