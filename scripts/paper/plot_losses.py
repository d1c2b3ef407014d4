"""Loss curves of several runs in one picture, from their metrics.jsonl (the paper's figure 8).

A faint line shows the logged values, a strong one their bias-corrected exponential moving average over logged lines.
The drawn points are written as JSON beside the picture.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import tyro

from scripts.paper.plots import Curve, Panel, check_picture, draw, write_picture
from utils.config import Fraction, UserError, parse, run_main
from utils.run import read_metrics


@dataclass
class PlotConfig:
    """Options of the plot."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, each with a metrics.jsonl."""
    out: Path
    """Picture to write (png, pdf or svg); its points go beside it as JSON."""
    metric: str = "loss"
    """Logged value to draw."""
    names: tuple[str, ...] = ()
    """Names in the legend, one per run; empty: the folders' names."""
    smooth: Fraction | None = None
    """Weight of the past in the moving average; 0: no average; None: about a tenth of the curve is averaged."""
    log_x: bool = False
    """Steps on a logarithmic axis."""


def smoothed(values: list[float], weight: float | None) -> list[float]:
    """Exponential moving average, divided by the sum of the weights so far, so that it does not start near 0.

    weight: of the past, in [0, 1); None: 1 - 10/n for n values, so that short curves are not flattened.
    """
    weight = max(1 - 10 / len(values), 0.0) if weight is None else weight
    average, result = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result


def read_curve(run_dir: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; lines without it, or where it is not finite, are left out.

    Raises UserError when there is no log or no line has the metric.
    """
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"run folder {run_dir} has no metrics.jsonl: give the --run-dir of a training.")
    lines = read_metrics(file)  # a run that is still going on may have its last line half written
    values = ((line["step"], line.get(metric)) for line in lines)
    points = [(step, value) for step, value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if not points:
        present = sorted({name for line in lines for name in line} - {"step"})
        raise UserError(f"--metric {metric} has no finite value in {file}, which logs "
                        f"{', '.join(present) or 'nothing'}: choose one that it logs.")
    return [step for step, _ in points], [value for _, value in points]


def legend_names(config: PlotConfig) -> list[str]:
    """A name for every run; folders that share their name go by their paths."""
    if config.names:
        return list(config.names)
    names = [run_dir.resolve().name for run_dir in config.runs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in config.runs]


def check(config: PlotConfig) -> None:
    """Raise UserError for options that do not fit each other."""
    if not config.runs:
        raise UserError("no run folder was given: name at least one before the options.")
    if config.names and len(config.names) != len(config.runs):
        raise UserError(f"--names has {len(config.names)} names for {len(config.runs)} runs: give one per run, or none.")
    check_picture(config.out)


def panel(curves: list[dict[str, Any]], config: PlotConfig) -> Panel:
    """The axes of all curves: logged values faint, averages strong."""
    drawn = []
    for look, curve in enumerate(curves):
        drawn.append(Curve(curve["name"], curve["steps"], curve["values"], look, "faint"))
        drawn.append(Curve(curve["name"], curve["steps"], curve["smoothed"], look))
    return Panel("", "step", config.metric, drawn, log_x=config.log_x)


def main() -> None:
    """Draw the curves, write picture and points."""
    config = parse(PlotConfig)
    check(config)
    curves = []
    for name, run_dir in zip(legend_names(config), config.runs):
        steps, values = read_curve(run_dir, config.metric)
        curves.append({"name": name, "steps": steps, "values": values, "smoothed": smoothed(values, config.smooth)})
    points = {"metric": config.metric, "smooth": config.smooth, "runs": curves}
    write_picture(draw([panel(curves, config)]), config.out, points)
    for curve in curves:
        print(f"{curve['name']:30} {curve['smoothed'][-1]:.4f} at step {curve['steps'][-1]}")


if __name__ == "__main__":
    run_main(main)
