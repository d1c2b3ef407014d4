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
from utils.text_shards import CaptionedCodes, read_text_header


class Told(NamedTuple):
    """What a folder tells of the condition of its codes."""

    fields: dict[str, Any] = {}
    """Fields of GPTConfig, the shape of a caption."""
    encoder: str = ""
    """`EncoderRecord.text` of the text encoder; empty for classes."""


class Source(NamedTuple):
    """The data of one condition."""

    dataset: Callable[..., Any]
    tell: Callable[[Sequence[str | Path], str], Told]
    """(folders, the option that names them) -> what they tell; raises UserError where they hold no such condition, or not one."""


def tell_captions(folders: Sequence[str | Path], option: str) -> Told:
    """The shape of the captions beside codes, and the text encoder that read them; raises UserError where there are none."""
    header = read_text_header(folders[0], option=option)
    return Told({"caption_length": header.text_length, "caption_dim": header.text_width}, header.record.text)


SOURCES: dict[str, Source] = {
    "class": Source(CodeDataset, lambda folders, option: Told()),
    "text": Source(CaptionedCodes, tell_captions),
}


def find_source(condition: str) -> Source:
    """A row of SOURCES; raises UserError for a condition that there are no data sets of."""
    if condition not in SOURCES:
        raise UserError(f"--condition {condition} has no data set to read: give one of {', '.join(SOURCES)}.")
    return SOURCES[condition]
