"""What an experiment gives, a table, a figure or both, and the list of all experiments."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from scripts.paper.steps import Made, Step
from scripts.paper.table import gather


@dataclass(frozen=True)
class Figures:
    """Measured figures: a JSON file that a step makes, or a part of it."""

    file: Made
    keys: tuple[str, ...] = ()
    """Keys that lead to the figures in nested objects, outermost first."""
    prefix: str = ""
    """Put before their names."""
    optional: bool = False
    """Whether the step may have made none."""


@dataclass(frozen=True)
class Row:
    """A row of a table, or a point of a figure."""

    name: str
    """Its row of published.json, and its place in a figure (plot_figures.py)."""
    figures: tuple[Figures, ...]
    counted: Made | None = None
    """A GPT whose parameters are a figure too."""

    @property
    def steps(self) -> list[Step]:
        """What must have been done."""
        return [each.file.step for each in self.figures] + ([self.counted.step] if self.counted else [])

    def read(self) -> dict[str, float]:
        """Its figures by name, once all has been done; bits and steps of several stages add up."""
        found = [(each.file.step.path(each.file.part), each) for each in self.figures]
        found = [(path, each) for path, each in found if path.exists() or not each.optional]
        counted = self.counted.step.path(self.counted.part) if self.counted else None
        return gather([(path, each.keys, each.prefix) for path, each in found], counted)


@dataclass(frozen=True)
class Result:
    """What an experiment shows, and by that what is to be done for it."""

    rows: tuple[Row, ...] = ()
    table: str = ""
    """Key of published.json under whose title the rows are printed; empty: no table."""
    all_published: bool = False
    """Whether the table shows published rows that were not measured."""
    plot: str = ""
    """Figure of plot_figures.py that draws the rows; empty: none."""
    plotted: tuple[str, ...] = ()
    """Tables whose rows, as far as they have been measured, are drawn instead."""
    pictures: tuple[Made, ...] = ()
    """Files that are copied to where the figures lie."""
    note: str = ""
    """What a reader must know of the toy rows beside their length."""

    @property
    def steps(self) -> list[Step]:
        """What must be done."""
        return [step for row in self.rows for step in row.steps] + [picture.step for picture in self.pictures]


@dataclass(frozen=True)
class Experiment:
    """A declaration, and what the paper says of its model unless the command line says otherwise."""

    declare: Callable[[Any], Result]
    """The function, of a `Lab`."""
    model: str
    image_size: int
    epochs: float
    options: frozenset[str]
    """Options of the command line that only some experiments read, and this one does."""
    unread: frozenset[str]
    """Options that the others read, and this one does not."""
    gathers: bool
    """Whether at the paper's scale it does nothing but draw what tables have measured, which these options name: `OF_ROWS`."""


OF_ROWS = ("image_size", "epochs", "seed")
# What only a GPT's training reads.
OF_GPTS = ("gpt_model", "image_size", "epochs", "gpt_options", "keep_every", "toy_seconds", "seed")
Declaration = Callable[[Any], Result]
EXPERIMENTS: dict[str, Experiment] = {}


def experiment(model: str = "GPT-B", image_size: int = 384, epochs: float = 100,
               options: Iterable[str] = (),
               unread: Iterable[str] = (), gathers: bool = False) -> Callable[[Declaration], Declaration]:
    """Add a declaration to `EXPERIMENTS` under its function's name; see `Experiment`."""
    def add(declare: Declaration) -> Declaration:
        EXPERIMENTS[declare.__name__] = Experiment(declare, model, image_size, epochs, frozenset(options),
                                                  frozenset(unread), gathers)
        return declare
    return add


def spelled(words: Iterable[Any]) -> str:
    """Words of a command as a part of a folder's name, without the place where a file lies."""
    texts = (word.step.label if isinstance(word, Made) else str(word).lstrip("-") for word in words)
    return re.sub(r"[^\w.+-]+", "_", "-".join(texts))
