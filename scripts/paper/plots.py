"""Pictures of curves: panels side by side, published and measured told apart.

A colour and a marker belong to a curve's `look`, so that one system looks the same in every panel.  Measured points are filled
and joined by a solid line; published ones are hollow, paler and dashed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from utils.config import UserError
from utils.files import check_writable, write_json
from utils.pictures import save_picture

MARKERS = "os^DvPX<>*"
SUFFIXES = (".png", ".pdf", ".svg")
Kind = Literal["measured", "published", "faint"]
COLUMNS = 2  # panels side by side
CROWDED = 6  # curves from which on the legend hides points, and goes under its panel
DENSE = 25   # points from which on markers hide a curve


@dataclass
class Curve:
    """Points of one system, or with a single y and no x a level: a horizontal line."""

    label: str
    x: list[float]
    y: list[float]
    look: int = 0
    kind: Kind = "measured"
    joined: bool = True
    names: list[str] = field(default_factory=list)
    """Names written beside the points; empty: none."""


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    x: str
    y: str
    curves: list[Curve]
    log_x: bool = False
    log_y: bool = False


def check_picture(path: Path) -> None:
    """Raise UserError unless `path` can be written and is the name of a picture."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out {str(path)!r} is not the name of a picture: give one that ends in .png, .pdf or .svg.")
    check_writable(path.parent, "--out")


def draw_curve(axis: Axes, curve: Curve) -> None:
    """One curve or level in the style of its kind."""
    colour, marker = f"C{curve.look % 10}", MARKERS[curve.look % len(MARKERS)]
    published = curve.kind == "published"
    dashes, alpha = "--" if published else "-", {"measured": 1.0, "published": 0.75, "faint": 0.25}[curve.kind]
    if not curve.x:
        axis.axhline(curve.y[0], color=colour, alpha=alpha, linestyle=":" if published else "-.", label=curve.label)
        return
    marked = curve.kind != "faint" and len(curve.x) < DENSE
    axis.plot(curve.x, curve.y, color=colour, alpha=alpha, label=None if curve.kind == "faint" else curve.label,
              marker=marker if marked else "", markerfacecolor="none" if published else colour, markersize=6,
              linestyle=dashes if curve.joined else "", linewidth=1 if published or curve.kind == "faint" else 1.8)


def write_names(axis: Axes, curves: list[Curve]) -> None:
    """Names beside the points of the curves that have any, on the side where there is room."""
    axis.autoscale_view()  # otherwise the limits are those of an empty axis
    named = [(x, y, name, f"C{curve.look % 10}") for curve in curves for x, y, name in zip(curve.x, curve.y, curve.names)]
    for x, y, name, colour in named:
        at_end = axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[0] > 0.8
        axis.annotate(name, (x, y), xytext=(-6 if at_end else 6, 4), textcoords="offset points", fontsize=7, color=colour,
                      horizontalalignment="right" if at_end else "left")


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Numbers instead of powers on a logarithmic axis; within two decades also at 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def draw_panel(axis: Axes, panel: Panel) -> None:
    """All curves of a panel, its scales, grid and legend."""
    for curve in panel.curves:
        draw_curve(axis, curve)
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, xscale="log" if panel.log_x else "linear",
             yscale="log" if panel.log_y else "linear")
    if panel.log_x:
        plain_ticks(axis.xaxis, *axis.get_xlim())
    if panel.log_y:
        plain_ticks(axis.yaxis, *axis.get_ylim())
    if not any(curve.x for curve in panel.curves):  # levels alone are nowhere on the x axis
        axis.set(xticks=[], xlabel="")
    write_names(axis, panel.curves)
    axis.grid(alpha=0.3, which="both")
    if len(panel.curves) < CROWDED:
        axis.legend(fontsize=8)
    else:
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def draw(panels: list[Panel], note: str = "", size: tuple[float, float] = (6.4, 4.5), columns: int = COLUMNS) -> Figure:
    """The picture of all panels, at most `columns` side by side, with a note underneath; size: of a panel, in inches."""
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + (0.3 if note else 0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        draw_panel(axis, panel)
    for axis in axes[len(panels):]:
        axis.remove()
    if note:
        figure.supxlabel(note, fontsize=8)
    return figure


def write_picture(figure: Figure, path: Path, points: Any) -> None:
    """Write the picture, and its points as JSON beside it."""
    save_picture(figure, path)
    write_json(path.with_suffix(".json"), points)
