"""Codes on disk: one memory-mapped array per data set instead of a file per image.

A code folder holds `codes.npy` (uint16 [images, crops, C, N]; uint32 for codebooks of more than 65,536 codes), `labels.npy`
(int64 [images]), `state.npy` (uint8 [images]: 0 missing, 1 done, 2 unreadable image) and `header.json`, which says what made
them.  Any number of processes write rows in place; an interrupted extraction carries on with the missing rows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.config import UserError
from utils.files import require_same, write_json

# Names of the code streams by their number, for logs and figures.
STREAMS = {1: ("token",), 2: ("semantic", "detail")}
MISSING, DONE, UNREADABLE = 0, 1, 2


@dataclass
class CodeHeader:
    """What made the codes; two folders with equal headers hold codes of the same meaning."""

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


class CodeWriter:
    """Creates or continues a code folder; every process of a group opens its own writer on the same folder."""

    def __init__(self, folder: Path, header: CodeHeader, labels: np.ndarray, create: bool) -> None:
        """labels: [images]; create: make missing files, in one process before the others open them.

        Raises UserError when the folder holds codes made with other options.
        """
        self.folder, self.header = folder, header
        shape = header.images, header.crops, len(header.codebook_sizes), header.grid_size**2
        if create:
            self._claim(shape, labels)
        self.codes = np.lib.format.open_memmap(folder / "codes.npy", mode="r+")
        self.state = np.lib.format.open_memmap(folder / "state.npy", mode="r+")

    def _claim(self, shape: tuple[int, ...], labels: np.ndarray) -> None:
        wanted = asdict(self.header)
        if (self.folder / "header.json").exists():
            found = json.loads((self.folder / "header.json").read_text()) | {"complete": self.header.complete}
            require_same(found, wanted, f"--code-path {self.folder} holds codes made with",
                         "choose another folder or delete this one")
            return
        dtype = np.uint16 if max(self.header.codebook_sizes) <= 2**16 else np.uint32
        np.lib.format.open_memmap(self.folder / "codes.npy", "w+", dtype, shape).flush()
        np.lib.format.open_memmap(self.folder / "state.npy", "w+", np.uint8, shape[:1]).flush()
        np.save(self.folder / "labels.npy", labels.astype(np.int64))
        write_json(self.folder / "header.json", wanted)

    def missing(self) -> np.ndarray:
        """Rows not yet extracted."""
        return np.flatnonzero(self.state == MISSING)

    def write(self, rows: np.ndarray, codes: np.ndarray) -> None:
        """Store codes [n, crops, C, N] of the given rows [n]; a row counts as done only after its codes are written."""
        self.codes[rows] = codes
        self.codes.flush()
        self.state[rows] = DONE

    def mark_unreadable(self, rows: np.ndarray) -> None:
        """Mark rows [n] whose images could not be read; `CodeDataset` leaves them out."""
        self.state[rows] = UNREADABLE

    def finish(self) -> int:
        """Mark the folder complete; returns the number of unreadable images.  One process calls this, when no row is missing."""
        self.state.flush()
        write_json(self.folder / "header.json", asdict(self.header) | {"complete": True})
        return int((self.state == UNREADABLE).sum())


def read_header(folder: str | Path, option: str = "--code-path") -> CodeHeader:
    """The header of a complete code folder; raises UserError when it is missing or the extraction is unfinished."""
    path = Path(folder) / "header.json"
    if not path.is_file():
        raise UserError(f"{option} {folder} holds no codes (no header.json): give a folder that extract_codes_c2i.py wrote.")
    header = CodeHeader(**json.loads(path.read_text()))
    if not header.complete:
        raise UserError(f"{option} {folder} is an unfinished extraction: run the same extract_codes_c2i.py command again.")
    return header


def read_joint_header(folders: Sequence[Path], option: str = "--code-path") -> CodeHeader:
    """The header of several folders that hold different crops of the same images; raises UserError where they do not."""
    first, *others = (read_header(folder, option) for folder in folders)
    for folder, other in zip(folders[1:], others):
        as_first = replace(other, crops=first.crops, augmentation=first.augmentation)
        require_same(asdict(as_first), asdict(first), f"{option} {folder} was extracted with",
                     f"give folders of the same images and tokenizer as {folders[0]}, which differ in their crops alone")
    return first


def require_fit(header: CodeHeader, folder: str | Path, expected: dict[str, tuple[Any, str]],
                option: str = "--code-path") -> None:
    """Raise UserError when a field of the header is not what the model expects.

    expected: {header field: (value, which option or file says so)}; option: the flag that named the folder.
    """
    for field, (value, source) in expected.items():
        seen = getattr(header, field)
        if seen != value:
            raise UserError(f"{option} {folder} has {field} {seen} but {source} says {value}: use codes that fit the "
                            "model, or change the option.")


class CodeDataset(Dataset[tuple[Tensor, Tensor]]):
    """Codes and labels straight from the memory map; items are addressed as (epoch, index) batches.

    The crop of image i in epoch e comes from (seed, e, i) alone, among the crops of all folders.
    """

    def __init__(self, *folders: str | Path, seed: int = 0, transform: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        """folders: other crops of the same images; transform: codes [B, C, N] -> those the GPT sees [B, C', N], `CodeMap.apply`.

        Raises UserError when the folders have other labels.
        """
        self.seed, self.transform = seed, transform
        self.codes = [np.load(Path(folder) / "codes.npy", mmap_mode="r") for folder in folders]
        self.ends = np.cumsum([codes.shape[1] for codes in self.codes])  # of each folder's crops among all
        self.rows = np.flatnonzero(np.all([np.load(Path(folder) / "state.npy") == DONE for folder in folders], axis=0))
        self.labels, *others = (np.load(Path(folder) / "labels.npy") for folder in folders)
        for folder, labels in zip(folders[1:], others):
            if not np.array_equal(labels, self.labels):
                raise UserError(f"--code-path {folder} has other labels than {folders[0]}: give codes of the same images.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """A whole batch at once: codes int64 [B, C, N], labels int64 [B]."""
        epochs, indices = np.array(items).T
        rows = self.rows[indices]
        # A counter-based hash instead of a generator per item: this runs for every image of every step.
        crops = _mix(epochs + self.seed * 1_000_003, indices) % self.ends[-1]
        codes = np.empty((len(rows), *self.codes[0].shape[2:]), np.int64)
        for part, end in zip(self.codes, self.ends):
            here = (crops >= end - part.shape[1]) & (crops < end)
            codes[here] = part[rows[here], crops[here] - (end - part.shape[1])]
        if self.transform is not None:
            codes = self.transform(codes)
        return torch.from_numpy(np.ascontiguousarray(codes)), torch.from_numpy(self.labels[rows])


def _mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over a pair of integers, vectorised."""
    with np.errstate(over="ignore"):
        x = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + b.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).astype(np.int64) & np.int64(0x7FFFFFFFFFFFFFFF)
