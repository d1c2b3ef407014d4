"""Where the batches of each condition come from: the seam between trainers and data sets.

A data set is like `CodeDataset`: made of (*folders, seed, transform) and of what `chosen` names, with a length, and addressed by
batches of (epoch, index).  A batch is (codes [B, C, N], condition) or (codes, condition, valid): labels [B], or captions as
`conditions.py` says, and which of the samples count in the loss, bool [B].
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.code_shards import CodeDataset
from utils.config import UserError
from utils.text_shards import CaptionedCodes, CaptionOptions, read_text_header


class Told(NamedTuple):
    """What a folder tells of the condition of its codes."""

    fields: dict[str, Any] = {}
    """Fields of GPTConfig, the shape of a caption."""
    encoder: str = ""
    """`EncoderRecord.text` of the text encoder; empty for classes."""


class Source(NamedTuple):
    """The data of one condition."""

    dataset: Callable[..., Any]
    tell: Callable[[Sequence[str | Path], str, CaptionOptions], Told]
    """(folders, the option that names them, which captions) -> what they tell; raises UserError where they hold no such
    condition, or not one."""
    chosen: Callable[[CaptionOptions], dict[str, Any]] = lambda captions: {}
    """More arguments of `dataset`."""


def tell_captions(folders: Sequence[str | Path], option: str, captions: CaptionOptions) -> Told:
    """The shape of the captions beside codes, and the text encoder that read them; raises UserError where there are none."""
    header = read_text_header(folders[0], captions.text_path, option)
    if header.crops == 1 and captions.short_captions:  # where nothing is typed the recipe says 0
        raise UserError(f"--short-captions {captions.short_captions} asks for short captions but the features ({header.source}) "
                        "have none: leave it out, or extract them with --short-captions.")
    return Told({"caption_length": header.text_length, "caption_dim": header.text_width}, header.record.text)


SOURCES: dict[str, Source] = {
    "class": Source(CodeDataset, lambda folders, option, captions: Told()),
    "text": Source(CaptionedCodes, tell_captions, lambda captions: dict(vars(captions))),
}


def find_source(condition: str) -> Source:
    """A row of SOURCES; raises UserError for a condition that there are no data sets of."""
    if condition not in SOURCES:
        raise UserError(f"--condition {condition} has no data set to read: give one of {', '.join(SOURCES)}.")
    return SOURCES[condition]
