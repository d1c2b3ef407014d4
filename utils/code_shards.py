"""Codes on disk: one memory-mapped array per data set instead of a file per image.

A code folder holds `codes.npy` (uint16 [images, crops, C, N]; uint32 for codebooks of more than 65,536 codes), `labels.npy`
(int64 [images]), `state.npy` (uint8 [images]: 0 missing, 1 done, 2 unreadable image) and `header.json`, which says what made
them.  `open_codes` is the one way to read a folder, and trusts none of its files; `code_writer.py` writes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.class_names import require_same_names
from utils.config import UserError
from utils.files import require_same
from utils.row_shares import DONE
from utils.shards import ShardHeader, complete_header, map_array, read_state, require_range

# Names of the code streams by their number, for logs and figures.
STREAMS = {1: ("token",), 2: ("semantic", "detail")}
VERSION = 2  # of the folder's layout: 2 has class names and the images' checksum

_LOOKED_AT = 256  # rows whose codes are checked when a folder is opened


@dataclass
class CodeHeader(ShardHeader):
    """What made the codes; two folders with equal headers hold codes of the same meaning."""

    things, title, data_file, command, newest = "codes", "code header", "codes.npy", "extract_codes_c2i.py", VERSION

    tokenizer: str
    codebook_sizes: list[int]
    grid_size: int
    image_size: int
    crops: int
    augmentation: str
    num_classes: int
    images: int
    source: str
    complete: bool = False
    largest_codes: list[int] = field(default_factory=list)  # of each stream; empty while unfinished and in older folders
    class_names: list[str] = field(default_factory=list)    # by label id; empty where the images have none
    images_checksum: str = ""   # `ImageSource.checksum`; empty in older folders
    version: int = VERSION

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the codes: images, crops, C, N."""
        return self.images, self.crops, len(self.codebook_sizes), self.grid_size**2

    @property
    def dtype(self) -> np.dtype:
        """Of the codes."""
        return np.dtype(np.uint16 if max(self.codebook_sizes) <= 2**16 else np.uint32)

    def as_begun(self) -> "CodeHeader":
        """Without what only the end of the extraction knows."""
        return replace(self, complete=False, largest_codes=[])

    def comparable(self, other: "CodeHeader", what: str, source: str) -> dict[str, Any]:
        """The fields, with `other`'s where this one, an older folder's, lacks them; UserError where classes have other names.

        what, source: the two, as messages call them.
        """
        require_same_names(tuple(self.class_names), tuple(other.class_names), what, source)
        checksum = self.images_checksum if other.images_checksum else ""
        return asdict(replace(self, class_names=[], images_checksum=checksum, version=VERSION))

    def check(self, what: str) -> None:
        """Raise UserError where streams and classes are not as many as their sizes, largest codes and names."""
        sizes, largest = self.codebook_sizes, self.largest_codes
        if not sizes or min(sizes) < 1 or max(sizes) > 2**32:
            raise UserError(f"{what} has codebook_sizes {sizes}, not a size of 1 to 2**32 for each stream: {self.again()}.")
        if largest and (len(largest) != len(sizes) or any(code >= size for code, size in zip(largest, sizes))):
            raise UserError(f"{what} has largest_codes {largest}, which do not fit codebooks of {sizes} codes: {self.again()}.")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UserError(f"{what} names {len(self.class_names)} of {self.num_classes} classes: {self.again()}.")


class Codes(NamedTuple):
    """A code folder, open: codes [images, crops, C, N] as a read-only memory map, labels int64 [images], state uint8 [images]."""

    header: CodeHeader
    codes: np.ndarray
    labels: np.ndarray
    state: np.ndarray


def open_codes(folder: str | Path, option: str = "--code-path") -> Codes:
    """Open a complete code folder and check its files against each other.

    Raises UserError naming `option` and the file when one is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    header = complete_header(CodeHeader, folder, option)
    codes = map_array(folder / "codes.npy", header.dtype, header.shape, option, header.again())
    labels = np.array(map_array(folder / "labels.npy", np.dtype(np.int64), header.shape[:1], option, header.again()))
    require_range(labels, header.num_classes, "label", f"{option} {folder / 'labels.npy'}", header.again())
    state = read_state(header, folder, option)
    _require_codes_in_range(header, codes, f"{option} {folder}")
    return Codes(header, codes, labels, state)


def _require_codes_in_range(header: CodeHeader, codes: np.ndarray, what: str) -> None:
    """Raise UserError for a code beyond its codebook in the first, the last or some other rows; writing checked all of them."""
    rows = np.unique(np.linspace(0, len(codes) - 1, _LOOKED_AT).astype(np.int64))
    require_largest(header, codes[rows].max((0, 1, 3)), what)


def require_largest(header: CodeHeader, largest: np.ndarray, what: str) -> None:
    """Raise UserError unless the largest code of each stream [C] is in its codebook; what: the folder with its option."""
    for stream, (code, size) in enumerate(zip(largest.tolist(), header.codebook_sizes, strict=True)):
        if code >= size:
            raise UserError(f"{what} has code {code} in stream {stream} of codes.npy, whose codebook has {size} codes: delete "
                            "the folder and extract the codes again.")


def read_header(folder: str | Path, option: str = "--code-path") -> CodeHeader:
    """The header of a complete and sound code folder; raises UserError as `open_codes` does."""
    return open_codes(folder, option).header


def read_joint_header(folders: Sequence[Path], option: str = "--code-path") -> CodeHeader:
    """The header of several folders that hold different crops of the same images; raises UserError where they do not."""
    first, *others = (read_header(folder, option) for folder in folders)
    for folder, other in zip(folders[1:], others):
        as_first = replace(other, crops=first.crops, augmentation=first.augmentation, largest_codes=first.largest_codes)
        what, source = f"{option} {folder}", f"{option} {folders[0]}"
        require_same(as_first.comparable(first, what, source), first.comparable(as_first, source, what),
                     f"{what} was extracted with",
                     f"give folders of the same images and tokenizer as {folders[0]}, which differ in their crops alone")
    return first


class CodeDataset(Dataset[tuple[Tensor, Tensor]]):
    """Codes and labels straight from the memory map; items are addressed as (epoch, index) batches.

    The crop of image i in epoch e comes from (seed, e, i) alone, among the crops of all folders.
    """

    def __init__(self, *folders: str | Path, seed: int = 0, transform: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        """folders: other crops of the same images; transform: codes [B, C, N] -> those the GPT sees [B, C', N], `CodeMap.apply`.

        Raises UserError when a folder is damaged, or the folders have other labels.
        """
        self.seed, self.transform, self.folders = seed, transform, [Path(folder) for folder in folders]
        opened = [open_codes(folder) for folder in folders]
        self.codes = [each.codes for each in opened]
        self.ends = np.cumsum([codes.shape[1] for codes in self.codes])  # of each folder's crops among all
        self.rows = np.flatnonzero(np.all([each.state == DONE for each in opened], axis=0))
        self.labels = opened[0].labels
        for folder, each in zip(folders[1:], opened[1:]):
            if not np.array_equal(each.labels, self.labels):
                raise UserError(f"--code-path {folder} has other labels than {folders[0]}: give codes of the same images.")
        if len(self.rows) == 0:
            raise UserError(f"--code-path {' '.join(map(str, folders))} have no image that all could read: give codes of the "
                            "same images.")

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps, which would be copied whole into every loader process that is not forked."""
        return {name: value for name, value in vars(self).items() if name != "codes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.codes = [np.lib.format.open_memmap(folder / "codes.npy", mode="r") for folder in self.folders]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: codes int64 [B, C, N], labels int64 [B]."""
        epochs, indices = np.array(items).T
        rows = self.rows[indices]
        # A counter-based hash instead of a generator per item: this runs for every image of every step.
        crops = mixed(epochs + self.seed * 1_000_003, indices) % self.ends[-1]
        codes = np.empty((len(rows), *self.codes[0].shape[2:]), np.int64)
        for part, end in zip(self.codes, self.ends):
            here = (crops >= end - part.shape[1]) & (crops < end)
            codes[here] = part[rows[here], crops[here] - (end - part.shape[1])]
        if self.transform is not None:
            codes = self.transform(codes)
        return torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(self.labels[rows])


def mixed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over a pair of integers, vectorised."""
    with np.errstate(over="ignore"):
        x = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + b.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).astype(np.int64) & np.int64(0x7FFFFFFFFFFFFFFF)
