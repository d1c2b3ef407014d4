"""What own_classes.sh has measured: bits per held-out image of the fine-tuned GPT and of the one from scratch, in report.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np

from scripts.own_classes_data import CLASSES
from scripts.paper.table import markdown_table
from utils.config import UserError, parse, run_main
from utils.crops import center_crop
from utils.files import write_json, write_text
from utils.images import open_images
from utils.pictures import image_grid, save_picture
from utils.run import read_metrics

RUNS = {"tuned": "fine-tuned from the quickstart's ten classes", "scratch": "from scratch"}
BITS = "eval/bits_per_image"
SHOWN = 8  # training pictures of each class


@dataclass
class ReportConfig:
    """Options of the report."""

    folder: Path = Path("runs/own_classes")
    """Folder of the example."""


def gather(folder: Path) -> dict[str, Any]:
    """Of every GPT the fewest bits per held-out image, the step after which it had them, and its bits at the end."""
    figures = {}
    for name in RUNS:
        curve = {line["step"]: line[BITS] for line in read_metrics(folder / name / "metrics.jsonl") if BITS in line}
        if not curve:
            raise UserError(f"--folder {folder} has no evaluation of {name}: run scripts/own_classes.sh again.")
        best = min(curve, key=lambda step: curve[step])
        figures[name] = {"fewest_bits": curve[best], "after_steps": best, "last_bits": curve[max(curve)], "steps": max(curve)}
    seconds = {path.name: int(path.read_text()) for path in sorted((folder / "phases").iterdir()) if path.name[0] != "."}
    return {"runs": figures, "seconds": seconds}


def draw_pictures(folder: Path) -> None:
    """Some of the training pictures, a row of each class."""
    source = open_images(folder / "pictures" / "train", "--folder")
    chosen = [np.flatnonzero(source.labels == label)[:SHOWN] for label in range(source.num_classes)]
    columns = min(map(len, chosen))
    images = np.stack([center_crop(source.load(row), 32) for rows in chosen for row in rows[:columns]])
    save_picture(image_grid(images, columns, 2, source.class_names), folder / "pictures.png")


def report(figures: dict[str, Any]) -> str:
    """The report in markdown."""
    rows = [[RUNS[name], f"{found['fewest_bits']:.1f}", str(found["after_steps"]), f"{found['last_bits']:.1f}",
             str(found["steps"])] for name, found in figures["runs"].items()]
    table = markdown_table(["GPT", "fewest bits per held-out image", "after steps", "bits at the end", "steps"], rows)
    seconds = markdown_table(["phase", "seconds"], [[name, str(value)] for name, value in figures["seconds"].items()])
    return f"""# Own classes: {', '.join(CLASSES)}

Pictures that both GPTs are trained on:

![pictures](pictures.png)

{table}
Samples after the last step, fine-tuned and from scratch:

![fine-tuned](tuned.png)

![from scratch](scratch.png)

{seconds}"""


def main() -> None:
    """Write figures.json, report.md and the picture of the pictures, and print the report."""
    folder = parse(ReportConfig).folder
    figures = gather(folder)
    draw_pictures(folder)
    write_json(folder / "figures.json", figures)
    write_text(folder / "report.md", report(figures))
    print((folder / "report.md").read_text())


if __name__ == "__main__":
    run_main(main)
