"""The study's report: a table and a picture for each part that is done, every difference with its verdict.

    python scripts/paper/study_report.py --study runs/study/study.json --out FOLDER     the same report of figures at hand

A mean over seeds has its standard error beside it.  Two rows differ where the mean difference of paired seeds exceeds two
standard errors of that difference; otherwise the report says that it found no difference.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

from scripts.paper.estimates import Estimate, at, differs, estimate, paired, verdict
from scripts.paper.plots import Curve, Panel, draw
from scripts.paper.table import markdown_table
from utils.config import UserError, parse, run_main
from utils.files import check_writable, read_json, write_text
from utils.pictures import save_picture
from utils.untrusted import shortened

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Seeds = dict[int, float]
BATCH = 64  # images in a step of a GPT
BASE = {"A": "associated", "B": "compressed", "beyond": "compressed", "C": "iar2", "D": "constant"}  # what others are set against


@dataclass
class ReportConfig:
    """Options of the report."""

    study: Path
    """study.json."""
    out: Path
    """Folder for report.md and its pictures."""


def of_seeds(row: Row, value: Callable[[Any], float]) -> Seeds:
    """A figure of a row by seed; value: takes it from what a seed has."""
    return {int(seed): value(figures) for seed, figures in row["seeds"].items()}


def mean(row: Row, value: Callable[[Any], float]) -> Estimate:
    """A figure's mean over seeds."""
    return estimate(list(of_seeds(row, value).values()))


def against(row: Row, base: Row, value: Callable[[Any], float], digits: int, lower_is_better: bool = True,
            base_value: Callable[[Any], float] | None = None) -> str:
    """The paired difference to the base row, or to another figure of it, and its verdict."""
    if row is base:
        return "–"
    difference = paired(of_seeds(row, value), of_seeds(base, base_value or value))
    word = verdict(difference, lower_is_better)
    sign = "+" if difference.mean > 0 else ""
    return f"{sign}{difference.text(digits)}: {f'**{word}**' if differs(difference) else word}"


def named(key: str) -> Callable[[Any], float]:
    """Takes a figure by its name."""
    return lambda figures: figures[key]


# A

def perceptual(figures: Any) -> float:
    """LPIPS, or without VGG16's weights the distance by a classifier's features."""
    return figures["lpips"] if "lpips" in figures else figures["perceptual_classifier"]


def bits_per_cell(figures: Any) -> float:
    """Entropy of the codes of a cell, were its streams independent: log2 of the perplexities."""
    return sum(math.log2(value) for name, value in figures.items() if name.startswith("perplexity_"))


def tokenizers(rows: Rows) -> tuple[str, list[Panel]]:
    """Part A's table and picture."""
    base = rows[BASE["A"]]
    cells = [[row["label"], str(row["entries"]), mean(row, bits_per_cell).text(2), mean(row, named("psnr")).text(2),
              mean(row, named("ssim")).text(3), mean(row, perceptual).text(4), mean(row, named("frechet")).text(3),
              against(row, base, named("psnr"), 2, False), against(row, base, named("frechet"), 3)] for row in rows.values()]
    measured = all("lpips" in figures for row in rows.values() for figures in row["seeds"].values())
    distance = "LPIPS" if measured else "classifier's distance"
    head = ["tokenizer", "table entries", "bits per cell", "PSNR (dB)", "SSIM", distance, "Fréchet", "PSNR against IAR2's",
            "Fréchet against IAR2's"]
    panels = [Panel("", x, y, [Curve(row["label"], [where(row)], [mean(row, named(key)).mean], look)
                               for look, row in enumerate(rows.values())], log_x=log)
              for key, y in (("psnr", "PSNR (dB)"), ("frechet", "Fréchet distance"))
              for x, where, log in (("table entries", lambda row: row["entries"], True),
                                    ("bits per cell", lambda row: mean(row, bits_per_cell).mean, False))]
    return markdown_table(head, cells), panels


# B and beyond

def mean_curve(row: Row, seconds: float = 0.0) -> tuple[list[float], list[float]]:
    """Validation bits along the training, averaged over seeds: over images seen, or over seconds where a step takes so many."""
    curves = [figures["curve"] for figures in row["seeds"].values()]
    images = [point[0] for point in curves[0]]
    bits = [sum(curve[index][1] for curve in curves) / len(curves) for index in range(len(images))]
    return [count * seconds for count in images] if seconds else images, bits


def in_time(row: Row, time: float, batch: int) -> Callable[[Any], float]:
    """Takes the validation bits after so many seconds of training, between evaluations."""
    images = time / row["seconds"] * batch
    return lambda figures: at(images, *zip(*figures["curve"], strict=True))


def paradigms(rows: Rows, base: Row, batch: int) -> tuple[str, list[Panel]]:
    """Part B's table and picture."""
    # The longest time that all curves reach: the whole training of the row with the cheapest step.
    time = min(row["seconds"] / batch * next(iter(row["seeds"].values()))["curve"][-1][0] for row in rows.values())
    cells = []
    for row in rows.values():
        timed = paired(of_seeds(row, in_time(row, time, batch)), of_seeds(base, in_time(base, time, batch)))
        late = "–" if row is base else (f"{'+' if timed.mean > 0 else ''}{timed.text(1)}: "
                                        f"{f'**{verdict(timed)}**' if differs(timed) else verdict(timed)}")
        cells.append([row["label"], f"{row['parameters'] / 1e6:.2f}", f"{row['lr']:g}", f"{row['seconds']:.3f}",
                      mean(row, named("bits_per_image")).text(1), mean(row, named("nats_semantic")).text(3),
                      mean(row, named("nats_detail")).text(3), against(row, base, named("bits_per_image"), 1), late])
    head = ["system", "parameters (M)", "learning rate", "s a step", "bits per image", "semantic nats", "detail nats",
            "against IAR2, equal images", f"against IAR2 (validation), equal time ({time:.0f} s)"]
    panels = [Panel("", x, "validation bits per image", [
        Curve(row["label"], *mean_curve(row, row["seconds"] / batch if timed else 0.0), look)
        for look, row in enumerate(rows.values())], log_x=True)
        for x, timed in (("images seen", False), ("seconds of training", True))]
    return markdown_table(head, cells), panels


# C

def whole_systems(part: Row) -> tuple[str, list[Panel]]:
    """Part C's table and picture."""
    rows, bound = part["systems"], part["reconstructions"]
    base, cells = rows[BASE["C"]], []
    for row in rows.values():
        def point(name: str, when: str) -> Callable[[Any], float]:
            return lambda figures: figures[when][name]
        parameters = sum(stage["parameters"] for stage in row["stages"].values())
        cells.append([row["label"], f"{parameters / 1e6:.2f}", f"{row['seconds']:.3f}", row["range"].replace(":", " to "),
                      *(mean(row, point(name, "images")).text(digits) for name, digits in
                        (("frechet", 2), ("precision", 3), ("recall", 3), ("class_accuracy", 3))),
                      against(row, base, point("frechet", "images"), 2), mean(row, point("frechet", "time")).text(2),
                      against(row, base, point("frechet", "time"), 2), f"{row['images_per_second']:.0f}"])
    for name, figures in bound.items():
        label = "real images" if name == "real" else f"reconstructions of the {name} tokenizer ({figures['psnr']:.2f} dB)"
        cells.append([label, "", "", "", f"{figures['frechet']:.2f}", f"{figures['precision']:.3f}", f"{figures['recall']:.3f}",
                      f"{figures['class_accuracy']:.3f}", "", "", "", ""])
    head = ["system", "parameters (M)", "s a step", "guidance", "Fréchet", "precision", "recall", "class accuracy",
            "Fréchet against IAR2", "Fréchet, equal time", "against IAR2", "images/s"]
    levels = [Curve(f"reconstructions ({name})", [], [bound[name]["frechet"]], 8 + index)
              for index, name in enumerate(("dual", "single"))]
    def averages(row: Row, name: str, *when: str) -> list[float]:
        return [sum(figures[point][name] for figures in row["seeds"].values()) / len(row["seeds"]) for point in when]
    ends = {name: [row["seconds"] * row["steps_at_equal_time"], row["seconds"] * part["steps"]] for name, row in rows.items()}
    panels = [
        Panel("", "training seconds", "Fréchet distance", [*(
            Curve(row["label"], ends[name], averages(row, "frechet", "time", "images"), look)
            for look, (name, row) in enumerate(rows.items())), *levels]),
        Panel("", "recall", "precision", [
            Curve(row["label"], averages(row, "recall", "images"), averages(row, "precision", "images"), look)
            for look, row in enumerate(rows.values())])]
    return markdown_table(head, cells), panels


# D

def frechet_at(text: str) -> Callable[[Any], float]:
    """Takes the Fréchet distance at one range of scales."""
    return lambda figures: figures[text]["frechet"]


def best_scales(row: Row) -> str:
    """The range of scales whose distance is lowest in the mean over seeds."""
    return min(next(iter(row["seeds"].values())), key=lambda text: mean(row, frechet_at(text)).mean)


def at_scales(row: Row, text: str) -> dict[str, float]:
    """The means of a schedule's figures at one range of scales."""
    seeds = list(row["seeds"].values())
    return {name: sum(figures[text][name] for figures in seeds) / len(seeds)
            for name in ("precision", "recall", "frechet", "class_accuracy")}


def schedules(rows: Rows) -> tuple[str, list[Panel]]:
    """Part D's table and picture."""
    base, cells, curves, prices = rows[BASE["D"]], [], [], []
    for look, row in enumerate(rows.values()):
        scales = list(next(iter(row["seeds"].values())))
        means, best = {text: at_scales(row, text) for text in scales}, best_scales(row)
        cells.append([row["label"], best.replace(":", " to "), mean(row, frechet_at(best)).text(3),
                      *(f"{means[best][name]:.3f}" for name in ("precision", "recall", "class_accuracy")),
                      against(row, base, frechet_at(best), 3, base_value=frechet_at(best_scales(base)))])
        curves.append(Curve(row["label"], [means[text]["recall"] for text in scales],
                            [means[text]["precision"] for text in scales], look))
        prices.append(Curve(row["label"], [means[text]["class_accuracy"] for text in scales],
                            [means[text]["frechet"] for text in scales], look))
    head = ["schedule", "best scales", "Fréchet", "precision", "recall", "class accuracy", "Fréchet against constant's"]
    return markdown_table(head, cells), [Panel("", "recall", "precision", curves),
                                         Panel("", "class accuracy", "Fréchet distance", prices, log_y=True)]


TITLES = {
    "A": "A. Tokenizers (CIFAR-10)", "B": "B. Paradigms on one frozen dual tokenizer (CIFAR-10)",
    "beyond": "Beyond the paper, judged as B (CIFAR-10)", "C": "C. End to end (Fashion-MNIST)",
    "D": "D. Guidance (Fashion-MNIST)",
}


def made_by(part: str, made: Row) -> str:
    """On what and for how long a part was trained, and what a person noted beside it in study.json."""
    first, second = made["tokenizer_steps"]
    gpts = "" if part == "A" else (f", GPTs of {made['gpt_steps']} steps of {BATCH} images, learning rates chosen after "
                                   f"{made['pilot_steps']} steps")
    return " ".join([f"On {made['machine']}: tokenizers of {first} + {second} steps of 16 images{gpts}.", *made.get("notes", ())])


def section(part: str, study: Row) -> tuple[str, list[Panel]]:
    """The table and the panels of a part."""
    figures = study[part]
    if part == "A":
        return tokenizers(figures)
    if part == "C":
        return whole_systems(figures)
    if part == "D":
        return schedules(figures)
    return paradigms(figures, figures[BASE[part]], BATCH)


def write_report(file: Path, folder: Path) -> None:
    """Write report.md and study-PART.png of the figures in `file`; raises UserError where it is no study."""
    study = read_json(file, "--study", "the study's figures")
    if not isinstance(study, dict) or not study.keys() & TITLES.keys():
        raise UserError(f"--study {file} has none of the parts {', '.join(TITLES)}: give study.json of study.py.")
    text = ["# The study\n"]
    for part in (name for name in TITLES if study.get(name)):
        try:
            (table, panels), made = section(part, study), made_by(part, study["made"][part])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"--study {file} has a part {part} that is none ({shortened(error)}): run it again.") from error
        figure = draw(panels, size=(8.6, 4.0), columns=1)  # the rows' names are long
        save_picture(figure, folder / f"study-{part}.png", dpi=90)
        text.append(f"## {TITLES[part]}\n\n{made}\n\n{table}\n![{TITLES[part]}](study-{part}.png)\n")
        if (folder / (samples := f"study-{part}-samples.png")).exists():  # drawn where the samples are
            text.append(f"![Samples]({samples})\n")
    write_text(folder / "report.md", "\n".join(text))


def main() -> None:
    """Parse options and write the report."""
    config = parse(ReportConfig)
    check_writable(config.out, "--out")
    write_report(config.study, config.out)
    print((config.out / "report.md").read_text())


if __name__ == "__main__":
    run_main(main)
