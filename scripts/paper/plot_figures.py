"""Figures 1, 4 and 7 of the paper: measured points, gathered by reproduce.py, beside those that are published.

    python scripts/paper/plot_figures.py 7c --folders F... --out runs/paper/figure7c.png

A row's name says where its point lies: llamagen-B and iar2-XXL (figures 1 and 7b; the parameters are those in the row, or the
published ones of that name), single-4096 (figure 4), GPT-B-1.75 (figure 7a), iar2-0050 (figure 7c).  A row without a place on
the x axis (dual-256-4096, GPT-B-pag) is a horizontal line.  The drawn points are written as JSON beside the picture.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import tyro

from scripts.paper.plots import Curve, Kind, Panel, check_picture, draw, write_picture
from scripts.paper.table import COLUMNS, read_published
from utils.config import UserError, choices, parse, run_main
from utils.files import read_json


@dataclass(frozen=True)
class Figure:
    """What a figure of the paper shows."""

    x: str
    """Label of the x axis."""
    metrics: tuple[str, ...]
    """A panel for each."""
    toy_metrics: tuple[str, ...]
    """Measured at toy scale instead."""
    log_x: bool = False
    log_y: bool = False
    table: str = ""
    """Key of published.json whose rows are all drawn."""
    rows: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """More published points: the name of the row here, and table and row of published.json."""
    alone: bool = False
    """Whether the published points make a picture without any measured one."""
    named: bool = False
    """Whether names stand beside the published points of systems that are not a curve."""
    line: str = ""
    level: str = ""
    """What a system's curve and its level are, in the legend."""


GENERATION, TOY_GENERATION = ("fid", "inception_score"), ("frechet", "class_accuracy")
FIGURES = {
    "1": Figure("parameters (millions)", ("fid",), ("frechet",), log_x=True, log_y=True, table="2", alone=True, named=True),
    "4": Figure("codes in the codebook", ("rfid", "fid"), ("psnr", "perceptual_classifier", "frechet"), log_x=True,
                table="figure4", level=", dual codebook"),
    "7a": Figure("guidance scale", GENERATION, TOY_GENERATION, line=", constant", level=", PAG-CFG",
                 rows={"GPT-B-pag": ("3-24-300", "iar2-B"), "GPT-L-pag": ("3-24-300", "iar2-L")}),
    "7b": Figure("parameters (millions)", GENERATION, TOY_GENERATION, log_x=True, table="3-24-300", alone=True),
    # The text states figure 7c's end alone, a difference of 0.96 in FID: that of the two rows at 300 epochs.
    "7c": Figure("training epochs", GENERATION, TOY_GENERATION,
                 rows={"iar2-0100": ("8-100", "constant"), "iar2-0300": ("8-300", "constant"),
                       "llamagen-0300": ("3-24-300", "llamagen-B")}),
}
METRICS = {"fid": "FID", "inception_score": "inception score", "rfid": "rFID", "psnr": "PSNR (dB)",
           "perceptual_classifier": "distance by a classifier's features",
           "frechet": "Fréchet distance (judge's features)", "class_accuracy": "class accuracy (judge)"}
PUBLISHED_COLUMNS = {"FID": "fid", "IS": "inception_score", "rFID": "rfid"}
# By the first part of a row's name; the order is that of colours and markers, other systems follow.
SYSTEMS = {"iar2": "IAR2", "llamagen": "LlamaGen", "iar": "IAR", "ctf": "CTF"}


@dataclass
class FigureConfig:
    """Options of a figure."""

    figure: tyro.conf.Positional[Annotated[str, choices(FIGURES)]]
    """Figure of the paper."""
    out: Path
    """Picture to write (png, pdf or svg); its points go beside it as JSON."""
    folders: tuple[Path, ...] = ()
    """Folders of gathered figures (reproduce.py)."""
    toy: str = ""
    """What was measured at toy scale, a note under the picture; measured points then have axes of their own.
    Empty: full scale."""


@dataclass
class Point:
    """The figures of one row; without x they are levels."""

    system: str
    name: str
    x: float | None
    figures: dict[str, float]


def number(text: str, row: str) -> float:
    """The last part of a row's name as a number; raises UserError where it is none."""
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"row {row!r} in --folders has no number at its end: give the folders of this figure.") from error


def place(figure: str, row: str, about: dict[str, Any]) -> tuple[str, float | None] | None:
    """System and x of a row, x None for a level; None for a row that the figure does not show.

    about: family and parameters of the row, where they are known.
    """
    first, _, _ = row.partition("-")
    if figure in ("1", "7b"):
        system, parameters = about.get("family") or SYSTEMS.get(first), about.get("parameters")
        return (system, float(parameters)) if system and parameters else None
    if figure == "4":
        return ("single codebook", number(row.removeprefix("single-"), row)) if first == "single" else ("IAR2", None)
    system, _, last = row.rpartition("-")
    if figure == "7a":
        return system, None if last == "pag" else number(last, row)
    return (SYSTEMS[system], number(last, row)) if system in SYSTEMS else None


def published_points(figure: str) -> list[Point]:
    """The published points of a figure."""
    spec, found = FIGURES[figure], []
    rows = {row: (spec.table, row) for row in read_published(spec.table)["rows"]} | dict(spec.rows)
    for name, (table, row) in rows.items():
        source = read_published(table)
        about = source["rows"][row]
        values = zip(source["columns"], about["values"])
        figures = {PUBLISHED_COLUMNS[column]: value for column, value in values
                   if column in PUBLISHED_COLUMNS and value != ""}
        if (where := place(figure, name, about)) and figures:
            found.append(Point(where[0], about["label"], where[1], figures))
    return found


def measured_points(figure: str, folders: tuple[Path, ...]) -> list[Point]:
    """The points of all rows in the folders; raises UserError for a folder without rows."""
    known, found = read_published(FIGURES[figure].table)["rows"], []
    for folder in folders:
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise UserError(f"--folders {folder} holds no gathered figures: run reproduce.py with the name of the figure first.")
        for path in paths:
            row = read_json(path, "--folders", "the row")
            figures = {name: value for name, value in row.items() if name in COLUMNS and math.isfinite(value)}
            about = known.get(path.stem, {}) | ({"parameters": row["parameters"]} if "parameters" in row else {})
            if where := place(figure, path.stem, about):
                found.append(Point(where[0], about.get("label", path.stem), where[1], figures))
    return found


def curves(spec: Figure, points: list[Point], metric: str, kind: Kind, looks: dict[str, int]) -> list[Curve]:
    """A curve, or a level, for each system that has the metric."""
    found = []
    for system, look in looks.items():
        own = [point for point in points if point.system == system and metric in point.figures]
        placed = sorted((point.x, point.figures[metric], point.name) for point in own if point.x is not None)
        if placed:
            xs, ys, names = zip(*placed)
            joined = not spec.named or system in SYSTEMS.values()
            found.append(Curve(f"{system}{spec.line}, {kind}", list(xs), list(ys), look, kind, joined,
                               [] if joined or kind == "measured" else list(names)))
        found += [Curve(f"{system}{spec.level}, {kind}", [], [point.figures[metric]], look, kind)
                  for point in own if point.x is None]
    return found


def panels(config: FigureConfig, published: list[Point], measured: list[Point]) -> list[Panel]:
    """The axes of a figure; toy figures have axes of their own, since they are of other images and another network."""
    spec = FIGURES[config.figure]
    present = dict.fromkeys(point.system for point in published + measured)
    order = dict.fromkeys([name for name in SYSTEMS.values() if name in present] + list(present))
    looks = {system: look for look, system in enumerate(order)}
    theirs = [("Published: ImageNet", metric, curves(spec, published, metric, "published", looks)) for metric in spec.metrics]
    if config.toy:
        drawn = theirs + [("Measured: toy scale", metric, curves(spec, measured, metric, "measured", looks))
                          for metric in spec.toy_metrics]
    else:
        drawn = [("", metric, known + curves(spec, measured, metric, "measured", looks)) for _, metric, known in theirs]
    return [Panel(title, spec.x, METRICS[metric], each, spec.log_x, spec.log_y) for title, metric, each in drawn if each]


def print_figure(config: FigureConfig) -> None:
    """Gather the points, draw them, write picture and points, print how many there are."""
    spec = FIGURES[config.figure]
    published, measured = published_points(config.figure), measured_points(config.figure, config.folders)
    wanted = spec.toy_metrics if config.toy else spec.metrics
    if (config.toy or not spec.alone) and not any(metric in point.figures for point in measured for metric in wanted):
        raise UserError(f"--folders hold none of {', '.join(wanted)} for figure {config.figure}: "
                        f"run reproduce.py figure{config.figure}, which measures them.")
    check_picture(config.out)
    found = panels(config, published, measured)
    points = {"figure": config.figure, "note": config.toy, "panels": [asdict(panel) for panel in found]}
    size = (7.5, 6.0) if spec.named else (6.4, 4.5)  # names need room
    write_picture(draw(found, config.toy, size), config.out, points)
    for panel in found:
        print(f"{panel.y}: " + "; ".join(f"{curve.label} {len(curve.y)}" for curve in panel.curves) + " points")


def main() -> None:
    """Parse options, draw the figure."""
    print_figure(parse(FigureConfig))


if __name__ == "__main__":
    run_main(main)
