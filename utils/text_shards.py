"""Features of captions on disk: one memory-mapped array per data set, beside its codes (`CODES/text`).

A folder holds `features.npy`, the bits of bf16 as uint16 [tokens, E]: the tokens of all captions follow each other without
padding; `lengths.npy` (int64 [images, crops]), how many tokens each caption has, 0 for an empty one; `state.npy` (uint8 [images]:
0 missing, 1 done, 2 empty caption), and `header.json`.  A crop of a caption is the whole of it, or the short one.  `open_text` is
the one way to read a folder, and trusts none of its files.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.code_shards import CodeDataset, mixed, read_header
from utils.config import Probability, UserError
from utils.distributed import Processes
from utils.row_shares import DONE
from utils.shard_writer import ShardWriter
from utils.shards import ShardHeader, complete_header, load_header, map_array, read_state, require_range
from utils.text_encoders import Caption, EncoderRecord, left_padded

TEXT = "text"  # folder of the features in that of the codes
_OPTION = "--text-path"


@dataclass
class TextHeader(ShardHeader):
    """What made the features; two folders with equal headers hold features of the same meaning."""

    things, title, data_file, command = "caption features", "feature header", "features.npy", "extract_text.py"

    encoder: str               # row of TEXT_ENCODERS, and the other fields of EncoderRecord
    encoder_path: str
    encoder_fingerprint: str
    text_width: int
    text_length: int
    caption_cleaning: str
    crops: int                 # captions of an image: the whole one, and perhaps a short one
    short_captions: str        # where the short ones come from
    images: int
    captions_checksum: str
    images_checksum: str       # `ImageSource.checksum`, which the codes of the same images carry too
    source: str
    complete: bool = False
    version: int = 1

    @property
    def dtype(self) -> np.dtype:
        """Bits of bf16, which numpy does not know."""
        return np.dtype(np.uint16)

    @property
    def record(self) -> EncoderRecord:
        """The encoder, for the model that is trained on the features."""
        return EncoderRecord(**{each.name: getattr(self, each.name) for each in fields(EncoderRecord)})

    def comparable(self, other: "TextHeader", what: str, source: str) -> dict[str, Any]:
        """All fields but the place of the encoder, which may have been moved."""
        return asdict(replace(self, encoder_path=""))


class TextFeatures(NamedTuple):
    """A folder, open: features uint16 [tokens, E] as a read-only memory map, state uint8 [images], and of each caption where it
    begins and how many tokens it has, int64 [images, crops]."""

    header: TextHeader
    features: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    state: np.ndarray


def open_text(folder: str | Path, option: str = _OPTION) -> TextFeatures:
    """Open a complete folder and check its files against each other.

    Raises UserError naming `option` and the file when one is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    header = complete_header(TextHeader, folder, option)
    path, again = folder / "lengths.npy", header.again()
    lengths = np.array(map_array(path, np.dtype(np.int64), (header.images, header.crops), option, again))
    state = read_state(header, folder, option)
    if (wrong := np.argwhere((lengths < (state == DONE)[:, None]) | (lengths > header.text_length))).size:
        image, crop = wrong[0].tolist()
        raise UserError(f"{option} {path} gives image {image} a caption of {lengths[image, crop]} tokens, not of 1 to "
                        f"{header.text_length}: {again}, or copy it again.")
    features = map_array(folder / header.data_file, header.dtype, (int(lengths.sum()), header.text_width), option, again)
    starts = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)
    return TextFeatures(header, features, starts, lengths, state)


def known_lengths(folder: Path, header: TextHeader, option: str = _OPTION) -> np.ndarray | None:
    """The tokens of each caption [images, crops] where an extraction with this header has begun in a folder; None elsewhere."""
    if not (folder / "header.json").exists():
        return None
    found = load_header(TextHeader, folder, option).as_begun()
    if found.comparable(header, "", "") != header.comparable(found, "", ""):
        return None  # the writer will say what differs
    path, again = folder / "lengths.npy", header.again()
    lengths = np.array(map_array(path, np.dtype(np.int64), (header.images, header.crops), option, again))
    require_range(lengths.max(1), header.text_length + 1, "number of tokens", f"{option} {path}", again)
    return lengths


class TextWriter(ShardWriter[TextHeader]):
    """Creates or continues a folder of features; all processes of a group open their writers together."""

    def __init__(self, folder: Path, header: TextHeader, lengths: np.ndarray, processes: Processes) -> None:
        """lengths: tokens of each caption [images, crops].  Raises UserError when the folder holds features made otherwise."""
        self.lengths = lengths.astype(np.int64)
        row_bytes = self.lengths.sum(1) * header.text_width * header.dtype.itemsize  # [images]
        shape = int(self.lengths.sum()), header.text_width
        super().__init__(folder, header, shape, row_bytes, ("lengths", self.lengths), processes, _OPTION)

    def write(self, rows: np.ndarray, features: Tensor) -> None:
        """Store the features of rows [n]: float32 [tokens, E], all tokens of an image's crops and then those of the next image.

        Raises ValueError for another number of tokens, UserError when the disk is full.
        """
        if features.shape != (wanted := (int(self.lengths[rows].sum()), self.header.text_width)):
            raise ValueError(f"features are {tuple(features.shape)}, not {wanted}")
        self._shares.write(rows, features.cpu().bfloat16().view(torch.uint16).numpy())

    def require_sound(self) -> None:
        """Raise UserError where a complete folder is damaged."""
        open_text(self.folder)


@dataclass
class CaptionOptions:
    """Which captions a model is trained on."""

    text_path: Path | None = None
    """Folder that extract_text.py wrote for the images of --code-path; left out: `text` in the folder of the codes."""
    short_captions: Probability = 0.3
    """How often the short caption is drawn (LlamaGen: 0.3); 0 where the features have none."""


def read_text_header(code_path: str | Path, text_path: str | Path | None = None, option: str = "--code-path") -> TextHeader:
    """The header of the features that belong to codes; text_path: where they are if not in `text` of the folder of the codes.

    Raises UserError, naming `option` or --text-path, where there are none.
    """
    return complete_header(TextHeader, *_place(code_path, text_path, option))


def _place(code_path: str | Path, text_path: str | Path | None, option: str) -> tuple[Path, str]:
    """The folder of features, and the option that names it."""
    return (Path(code_path) / TEXT, option) if text_path is None else (Path(text_path), _OPTION)


class CaptionedCodes(Dataset[tuple[Tensor, Caption, Tensor]]):
    """Codes with the features of their captions, like `CodeDataset`: items are addressed as (epoch, index) batches.

    Images without a caption are left out.  Whether image i has its short caption in epoch e comes from (seed, e, i) alone.
    """

    def __init__(self, *folders: str | Path, seed: int = 0, transform: Callable[[np.ndarray], np.ndarray] | None = None,
                 text_path: str | Path | None = None, short_captions: float = 0.3) -> None:
        """folders, seed, transform: as for `CodeDataset`; text_path: of the features, if not `text` in the first folder.

        short_captions: how often the short caption is drawn.  Raises UserError when a folder is damaged, or the features belong
        to captions of other images.
        """
        self.codes, self.short_captions = CodeDataset(*folders, seed=seed, transform=transform), short_captions
        self.folder, option = _place(folders[0], text_path, "--code-path")
        found, of_codes = open_text(self.folder, option), read_header(folders[0])
        self.header, self._features = found.header, found.features
        self._starts, self._lengths = found.starts, found.lengths
        known = bool(of_codes.images_checksum)  # older folders of codes have none
        if self.header.images != of_codes.images or (known and self.header.images_checksum != of_codes.images_checksum):
            raise UserError(f"{option} {self.folder} has features of captions of other images ({self.header.source}) than "
                            f"--code-path {folders[0]} ({of_codes.source}): extract both from the same --data-path.")
        self.codes.rows = self.codes.rows[found.state[self.codes.rows] == DONE]
        if len(self.codes.rows) == 0:
            raise UserError(f"{option} {self.folder} has no caption for any image of --code-path {folders[0]}: extract the "
                            "features again.")

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory map, which would be copied whole into every loader process that is not forked."""
        return {name: value for name, value in vars(self).items() if name != "_features"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._features = np.lib.format.open_memmap(self.folder / self.header.data_file, mode="r")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Caption, Tensor]:
        """A whole batch: codes int64 [B, C, N]; features float32 [B, T, E] and mask bool [B, T]; valid bool [B], all True.

        valid: as LlamaGen's, whose loss leaves out samples without a caption; here they are no part of the data set.
        """
        codes, _ = self.codes.__getitems__(items)
        epochs, indices = np.array(items).T
        rows = self.codes.rows[indices]
        draws = mixed(epochs + self.codes.seed * 1_000_003, ~indices) / 2.0**63  # [B] others than those of the crops of codes
        crops = (draws < self.short_captions) * (self.header.crops - 1)          # [B] 0: the whole caption, 1: the short one
        starts, lengths = self._starts[rows, crops], self._lengths[rows, crops]
        tokens = np.concatenate([self._features[start : start + length] for start, length in zip(starts, lengths)])
        features = torch.from_numpy(tokens).view(torch.bfloat16)                 # [sum of lengths, E]
        return (codes, left_padded(features, torch.from_numpy(lengths), self.header.text_length),
                torch.ones(len(rows), dtype=torch.bool))
