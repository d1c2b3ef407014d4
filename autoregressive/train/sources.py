"""Where the batches of each condition come from: the seam between trainers and data sets.

A data set is like `CodeDataset`: made of (*folders, seed, transform), with a length, and addressed by batches of (epoch, index).
A batch is (codes [B, C, N], condition) or (codes, condition, valid): labels [B], or captions as `conditions.py` says, and which
of the samples count in the loss, bool [B].
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.code_shards import CodeDataset
from utils.config import UserError


class Told(NamedTuple):
    """What a folder tells of the condition of its codes."""

    fields: dict[str, Any] = {}
    """Fields of GPTConfig, the shape of a caption."""
    encoder: str = ""
    """Hub name of the text encoder; empty for classes."""


class Source(NamedTuple):
    """The data of one condition."""

    dataset: Callable[..., Any]
    tell: Callable[[Sequence[str | Path], str], Told]
    """(folders, the option that names them) -> what they tell; raises UserError where they hold no such condition, or not one."""


SOURCES: dict[str, Source] = {
    "class": Source(CodeDataset, lambda folders, option: Told()),
}


def find_source(condition: str) -> Source:
    """A row of SOURCES; raises UserError for a condition that there are no data sets of."""
    if condition not in SOURCES:
        raise UserError(f"--condition {condition} has no data set to read: give one of {', '.join(SOURCES)}.")
    return SOURCES[condition]
