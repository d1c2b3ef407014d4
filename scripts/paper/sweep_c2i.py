"""Sweep guidance ranges: sample and evaluate a grid of them from one checkpoint (table 9, figure 7a).

The models are loaded once.  Every range has its own npz and its own entry in `sweep.json`, so that an interrupted sweep goes on
with the missing ranges.  Figures are ADM's five, or with --judge those of a small classifier.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch

from autoregressive.sample.model_options import carried_options
from autoregressive.sample.pipeline import Pipeline, check_sampling
from autoregressive.sample.sample_c2i_ddp import SampleConfig, write_samples
from evaluations.c2i.classifier import load_all
from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.evaluator import compare
from evaluations.c2i.features import FeatureSource
from evaluations.c2i.judge import features_and_votes, judge
from scripts.paper.plots import Curve, Panel, draw
from scripts.paper.table import markdown_table
from utils.classifier import load_classifier
from utils.config import UserError, parse, run_main
from utils.distributed import Processes, setup
from utils.files import check_exists, check_writable, read_json, write_json, write_text
from utils.images import open_images
from utils.logs import set_up_logging
from utils.pictures import save_picture
from utils.run import figures_text

log = logging.getLogger("sweep_c2i")

# Table 9: guidance ranges of IAR2-B.
TABLE_9 = ("1.5:2.25", "1.5:2.5", "1.5:2.75", "1.5:3.0", "1.75:2.25", "1.75:2.5", "1.75:2.75", "1.75:3.0", "1.75:3.5",
           "2.0:2.5", "2.0:2.75", "2.0:3.0")
CARRIED = "carried"


@dataclass
class SweepConfig:
    """Options of a sweep; those of sampling hold for every range."""

    samples: SampleConfig
    reference: Path
    """ADM's reference npz; with --judge, real images (folder or npz)."""
    folder: Path = Path("samples/sweep")
    """Folder of the npz files, sweep.json, sweep.md and sweep.png."""
    ranges: tuple[str, ...] = TABLE_9
    """Guidance ranges START:END; equal ends are constant guidance; carried: the range that the checkpoint carries."""
    judge: str = ""
    """File of evaluations/c2i/classifier.py that judges small images; empty: ADM's metrics."""
    inception_weights: Path | None = None
    """torch-fidelity's Inception weights; None downloads them."""


Figures = Mapping[str, float | None]


def parse_range(text: str, carried: tuple[float, ...]) -> tuple[float, ...]:
    """"START:END" -> two numbers, "carried" -> those of the checkpoint; raises UserError for anything else."""
    if text == CARRIED:
        if len(carried) != 2:
            raise UserError(f"--ranges {CARRIED} asks for the range of --gpt-ckpt, which carries the scales {list(carried)}: "
                            "give START:END.")
        return carried
    found = re.fullmatch(r"(\d*\.?\d+):(\d*\.?\d+)", text)
    if found is None:
        raise UserError(f"--ranges {text!r} is no range: give START:END, for example 1.75:3.0.")
    return float(found[1]), float(found[2])


def ends(config: SweepConfig) -> dict[str, tuple[float, ...]]:
    """Start and end of every range by its text."""
    return {text: parse_range(text, config.samples.sampling.cfg_scale) for text in config.ranges}


def adm_figures(config: SweepConfig, device: torch.device) -> Callable[[Path], Figures]:
    """A function that gives ADM's metrics of an npz against --reference; the network is loaded once."""
    check_exists(config.reference, "--reference", "ADM's reference npz")
    source = FeatureSource("inception", config.inception_weights, device)
    reference = EvaluationFile(config.reference, "--reference")
    return lambda path: compare(reference, EvaluationFile(path, "sample"), source)


def judge_figures(config: SweepConfig, size: int, device: torch.device) -> Callable[[Path], Figures]:
    """A function that gives a small classifier's figures of an npz against --reference, cropped to `size` pixels."""
    classifier = load_classifier(config.judge, option="--judge").to(device)
    images, _ = load_all(open_images(config.reference, "--reference"), size)
    reference, _ = features_and_votes(classifier, images, device)

    def evaluate(path: Path) -> Figures:
        with np.load(path) as data:
            return judge(classifier, data["arr_0"], data["arr_1"], reference, device)

    return evaluate


def sweep(config: SweepConfig, processes: Processes) -> dict[str, Figures]:
    """Sample and evaluate every range that is missing; returns the figures by range."""
    base, results_file = config.samples, config.folder / "sweep.json"
    options = {text: replace(base.sampling, cfg_scale=scale) for text, scale in ends(config).items()}
    pipeline = Pipeline(base.models, options[config.ranges[0]], base.fine, processes.device)
    for sampling in options.values():  # all ranges are checked before the first is drawn
        check_sampling(sampling, pipeline.gpt)
    evaluate: Callable[[Path], Figures] | None = None
    results: dict[str, Any] = {}
    if processes.is_main:
        evaluate = (judge_figures(config, pipeline.image_size, processes.device) if config.judge
                    else adm_figures(config, processes.device))
        results = read_json(results_file, "--folder", "sweep.json") if results_file.exists() else {}
    for text, sampling in options.items():
        pipeline.sampling = sampling
        out = config.folder / f"{text.replace(':', '-')}.npz"
        write_samples(replace(base, sampling=sampling, out=out), pipeline, None, processes)
        if evaluate is not None:
            with np.load(out) as data:  # other samples, or another reference, are evaluated again
                about = {"samples": str(data["options"]), "reference": str(config.reference), "judge": config.judge}
            if results.get(text, {}).get("of") != about:
                results[text] = {"figures": evaluate(out), "of": about}
                write_json(results_file, results)
                log.info("%s: %s", text, figures_text(results[text]["figures"]))
        processes.barrier()
    return {text: results[text]["figures"] for text in config.ranges} if processes.is_main else {}


def table(results: dict[str, Figures], scales: dict[str, tuple[float, ...]]) -> str:
    """Markdown table, a row for each range."""
    names = list(next(iter(results.values())))
    rows = [[*(f"{scale:g}" for scale in scales[text]),
             *("n/a" if figures[name] is None else f"{figures[name]:.4g}" for name in names)]
            for text, figures in results.items()]
    return markdown_table(["start", "end", *names], rows)


def panels(results: dict[str, Figures], scales: dict[str, tuple[float, ...]]) -> list[Panel]:
    """Figures over the end of the range, with a curve for each start and one for constant guidance."""
    curves: dict[str, list[tuple[float, Figures]]] = {}
    points = [(scales[text][0], scales[text][1], figures) for text, figures in results.items()]
    for start, end, figures in sorted(points, key=lambda point: (point[0] == point[1], *point[:2])):  # constant guidance last
        curves.setdefault("constant" if start == end else f"from {start:g}", []).append((end, figures))
    found = []
    for name in next(iter(results.values())):
        drawn = []
        for look, (label, curve) in enumerate(curves.items()):
            known = [(end, value) for end, figures in curve if (value := figures[name]) is not None]
            if known:
                drawn.append(Curve(label, [end for end, _ in known], [value for _, value in known], look))
        if drawn and name != "images":
            found.append(Panel("", "end of the guidance range", name, drawn))
    return found


def main() -> None:
    """Parse options, sweep, write table and plot."""
    config = parse(SweepConfig, lambda options: carried_options(options.samples))
    processes = setup(config.samples.models.device)
    set_up_logging(processes)
    if config.samples.rejection.rejection_ratio > 1:
        raise UserError("--rejection-ratio is not for sweeps: sample the chosen range with sample_c2i_ddp.py.")
    carried = carried_options(config.samples).get("cfg_scale", ())
    if config.samples.sampling.cfg_scale != carried:
        raise UserError(f"--cfg-scale {config.samples.sampling.cfg_scale} is what a sweep varies: give --ranges instead.")
    check_writable(config.folder, "--folder")
    results = sweep(config, processes)
    if processes.is_main:
        text = table(results, ends(config))
        write_text(config.folder / "sweep.md", text)
        save_picture(draw(panels(results, ends(config)), size=(4.2, 3.4), columns=5), config.folder / "sweep.png", dpi=110)
        print(text)
    processes.close()


if __name__ == "__main__":
    run_main(main)
