"""What each idea of the paper is worth: a study that two CPU cores do overnight, or one GPU in less than an hour.

    bash scripts/study.sh                              all parts; what is done is not done again, an interrupted one carries on
    bash scripts/study.sh --parts B beyond --dry       the commands of two parts

    A       tokenizers: is an associated dual codebook better than others of its budget?      CIFAR-10
    B       paradigms, on one frozen dual tokenizer                                           CIFAR-10
    beyond  ideas that are not the paper's, judged as B                                       CIFAR-10
    C       whole systems at matched reconstruction                                           Fashion-MNIST
    D       guidance schedules                                                                Fashion-MNIST

Each part's figures go into study.json, from which report.md and its pictures are made.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import torch

from scripts.paper import study_systems as systems
from scripts.paper.steps import Runner
from scripts.paper.study_parts import Figures, part_a, part_b
from scripts.paper.study_report import BASE, write_report
from scripts.paper.study_samples import part_c, part_d
from scripts.paper.study_steps import Data, Lengths
from utils.config import AboveZero, Count, Seed, UserError, choices, parse, run_main, to_dict
from utils.distributed import setup
from utils.files import check_exists, check_writable, read_json, write_json
from utils.logs import set_up_logging

PARTS = ("A", "B", "beyond", "C", "D")
Row = TypeVar("Row", systems.Tokenizer, systems.System, systems.Schedule)


@dataclass
class StudyConfig:
    """Options of the study."""

    out: Path = Path("runs/study")
    """Folder of everything that is made, of study.json and report.md."""
    parts: tuple[Annotated[str, choices(PARTS)], ...] = PARTS
    """Which parts."""
    rows: tuple[str, ...] = ()
    """Rows of parts A, B, beyond and D, by their names in study_systems.py; empty: all.  What others are set against stays."""
    cifar10: tuple[str, str] = ("", "")
    """CIFAR-10 as two npz, training and test images; empty: torchvision downloads it."""
    fashion_mnist: tuple[str, str] = ("", "")
    """Fashion-MNIST, in the same way."""
    vgg: str = ""
    """VGG16's weights (torchvision's file) for LPIPS in part A; empty: a classifier's distance stands for it."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of B, beyond and C; A and D use the first two."""
    rates: tuple[AboveZero, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates among which short trainings choose, for each system."""
    beyond: str = "muon"
    """The row of part beyond that part C sets beside the paper's systems; empty: none."""
    workers: Count = 0
    """Commands at a time; 0: one for each GPU or CPU core."""
    dry: bool = False
    """Print the commands and run none; where a result decides, with the first or middle choice."""
    lengths: Lengths = field(default_factory=Lengths)


def absolute(paths: tuple[str, str], option: str) -> tuple[str, str]:
    """The absolute paths of given files; raises UserError where one is missing."""
    if not any(paths):
        return paths
    first, second = (str(check_exists(path, option, "an npz of images").resolve()) for path in paths)
    return first, second


def make_runner(config: StudyConfig) -> Runner:
    """Workers for this machine."""
    gpus = torch.cuda.device_count()
    return Runner(config.workers or gpus or len(os.sched_getaffinity(0)), gpus, config.dry)


def machine(gpus: int) -> str:
    """What the study runs on, for the report."""
    name = f"{gpus} {torch.cuda.get_device_name()}" if gpus else f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{name}, torch {torch.__version__.partition('+')[0]}"


def chosen(rows: Sequence[Row], part: str, names: Sequence[str]) -> list[Row]:
    """The rows of a part that are asked for, and the one that others are set against."""
    return [row for row in rows if not names or row.name in (*names, BASE[part])]


def run_part(part: str, config: StudyConfig, cifar: Data, fashion: Data, runner: Runner) -> Figures:
    """The figures of one part."""
    seeds, few = config.seeds, config.seeds[:2]
    beyond = next((row for row in systems.BEYOND if row.name == config.beyond), None)
    if part == "A":
        return part_a(cifar, chosen(systems.A, part, config.rows), few, config.vgg, runner)
    if part == "B":
        return part_b(cifar, dict.fromkeys(chosen(systems.B, part, config.rows), seeds), config.rates, runner)
    if part == "beyond":
        rows = chosen((systems.IAR2, *systems.BEYOND), part, config.rows)
        return part_b(cifar, dict.fromkeys(rows, seeds), config.rates, runner)
    if part == "C":
        return part_c(fashion, beyond, seeds, config.rates, runner)
    return part_d(fashion, chosen(systems.D, part, config.rows), few, config.rates, runner)


def main() -> None:
    """Parse options and run the parts, each of which is reported when it is done."""
    config = parse(StudyConfig)
    set_up_logging(setup("cpu"))
    if config.beyond and config.beyond not in (names := [row.name for row in systems.BEYOND]):
        raise UserError(f"--beyond {config.beyond} is no row of part beyond: choose from {', '.join(names)}, or leave it empty.")
    for option, values in (("--seeds", config.seeds), ("--rates", config.rates), ("--parts", config.parts)):
        if len(set(values)) != len(values) or not values:
            raise UserError(f"{option} {' '.join(map(str, values))} is empty or names a value twice: give each once.")
    known = [row.name for row in (*systems.A, *systems.B, *systems.BEYOND, *systems.D)]
    if unknown := [name for name in config.rows if name not in known]:
        raise UserError(f"--rows {' '.join(unknown)}: no such row, choose from {', '.join(known)}.")
    root = config.out.resolve()
    cifar = Data(root, "cifar10", absolute(config.cifar10, "--cifar10"), config.lengths)
    fashion = Data(root, "fashion-mnist", absolute(config.fashion_mnist, "--fashion-mnist"), config.lengths)
    if config.vgg:
        config.vgg = str(check_exists(config.vgg, "--vgg", "VGG16's weights").resolve())
    runner, file = make_runner(config), root / "study.json"
    if not config.dry:
        check_writable(root, "--out")
    for part in config.parts:
        logging.getLogger("study").info("part %s", part)
        figures = run_part(part, config, cifar, fashion, runner)
        if not config.dry:
            study = read_json(file, "--out", "the study's figures") if file.exists() else {}
            made = {"machine": machine(runner.gpus), **to_dict(config.lengths)}
            write_json(file, study | {part: figures, "made": study.get("made", {}) | {part: made}})
            write_report(file, root)
    if not config.dry:
        print((root / "report.md").read_text())


if __name__ == "__main__":
    run_main(main)
