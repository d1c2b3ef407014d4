"""Writing a folder of one large array (`shards.py`) from any number of processes on any number of nodes.

Each process keeps its rows in `shares` (`row_shares.py`).  At the end the main process moves them into the array's file, one
share after the other: on the way they need the space of one share more than when they are complete.  `state.npy` says which rows
have been moved; an interrupted extraction or merge carries on with the others.
"""

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, Generic

import numpy as np

from utils.config import UserError
from utils.distributed import Processes
from utils.files import replacing, require_same, write_json
from utils.row_shares import (
    DONE,
    MISSING,
    SKIPPED,
    RowShares,
    Share,
    chunks,
    full_disk_explained,
    runs,
    same_everywhere,
    share_of,
    warn_if_short_of_space,
    write_at,
)
from utils.shards import H, load_header, map_array, require_range


class ShardWriter(Generic[H]):
    """Creates or continues a folder; all processes of a group open their writers together.

    header: what the folder will say; shape: of the large array; row_bytes: bytes of an image's part of it, one for all images or
    int64 [images]; facts: (name, array with a row for each image), kept as NAME.npy; option: the flag that named the folder;
    source: the flag that named the images.  Raises UserError when the folder holds what was made with other options or of other
    images.
    """

    def __init__(self, folder: Path, header: H, shape: tuple[int, ...], row_bytes: int | np.ndarray,
                 facts: tuple[str, np.ndarray], processes: Processes, option: str, source: str = "--data-path") -> None:
        self.folder, self.header, self.processes, self.option, self.source = folder, header.as_begun(), processes, option, source
        self._shape, self._facts, self._target = shape, facts, f"{option} {folder}"
        self._file = folder / header.data_file
        self._shares = RowShares(folder / "shares", header.images, row_bytes, self._target)
        self._largest_row = int(self._shares.sizes.max())
        self._require_own()  # in every process: none then waits for one that was refused
        state = self._begin() if processes.is_main else None
        self._state = same_everywhere(state, header.images, processes)
        self._share = share_of(np.flatnonzero(self._state == MISSING), processes)

    def _load_header(self) -> H:
        return load_header(type(self.header), self.folder, self.option)

    def _map(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        return map_array(self.folder / name, np.dtype(dtype), shape, self.option, self.header.again())

    def _require_own(self) -> None:
        if not (self.folder / "header.json").exists():
            return
        found, things = self._load_header().as_begun(), self.header.things
        require_same(found.comparable(self.header, self._target, self.source),
                     self.header.comparable(found, self.source, self._target),
                     f"{self._target} holds {things} made with", "choose another folder or delete this one")
        name, wanted = self._facts
        if not np.array_equal(self._map(f"{name}.npy", wanted.dtype, wanted.shape), wanted):
            raise UserError(f"{self._target} holds {things} of images with other {name}: choose another folder or delete this "
                            "one.")

    def _begin(self) -> np.ndarray:
        """Make what is not there; returns the state of every row."""
        with full_disk_explained(self._target):
            if not (self.folder / "header.json").exists():
                name, values = self._facts
                save_array(self.folder / f"{name}.npy", values)
                write_json(self.folder / "header.json", asdict(self.header))  # type: ignore[call-overload]
            state = self._shares.states(self._moved())
            if self._load_header().complete:
                if (state == MISSING).any():
                    write_json(self.folder / "header.json", asdict(self.header))  # type: ignore[call-overload]
                else:
                    self.require_sound()
        if (state == MISSING).any():
            needed = int(self._shares.sizes[state != SKIPPED].sum()) - self._stored_bytes() + self._shares.share_bytes
            warn_if_short_of_space(self.folder, needed, self._target)
        return state

    def require_sound(self) -> None:
        """Raise UserError where a complete folder is damaged."""
        raise NotImplementedError

    def completed(self) -> H:
        """The header of the folder once the array is whole; raises UserError when what it holds makes no sense."""
        return replace(self.header, complete=True)  # type: ignore[type-var]

    def _stored_bytes(self) -> int:
        return self._shares.stored_bytes() + (self._file.stat().st_blocks * 512 if self._file.exists() else 0)

    def _moved(self) -> np.ndarray:
        """States of the rows that are in the large array already: uint8 [images]."""
        if not (self.folder / "state.npy").exists():
            return np.zeros(self.header.images, np.uint8)
        state = np.array(self._map("state.npy", np.uint8, (self.header.images,)))
        require_range(state, 3, "state", f"{self.option} {self.folder / 'state.npy'}", self.header.again())
        self.mapped()
        return state

    def mapped(self) -> np.ndarray:
        """The large array, as far as it has been moved."""
        return self._map(self._file.name, self.header.dtype, self._shape)

    def share(self) -> np.ndarray:
        """Rows that this process should do, neighbours among those missing when the writer was made: int64 [n]."""
        return self._share

    def skip(self, rows: np.ndarray) -> None:
        """Give up rows [n]: their images or captions cannot be used, and training leaves them out."""
        self._shares.skip(rows)

    def finish(self) -> int:
        """Complete the folder when every process has done its rows; all call it, and return when that is done.

        Returns the number of skipped rows in the main process, 0 in the others.  Raises UserError when all were skipped or the
        disk is full, RuntimeError while rows are missing.
        """
        self._shares.close()
        self.processes.barrier()
        skipped = self._complete() if self.processes.is_main else 0
        self.processes.barrier()
        return skipped

    def _complete(self) -> int:
        state = self._shares.whole(self._moved(), self.processes)
        if not (state == DONE).any():
            raise UserError(f"{self._target} would hold no {self.header.things} because none of the {len(state)} images could be "
                            f"read: check the images of {self.source}, then delete {self.folder} and run the command again.")
        if not self._load_header().complete:
            with full_disk_explained(self._target):
                self._merge()
                write_json(self.folder / "header.json", asdict(self.completed()))  # type: ignore[call-overload]
        shutil.rmtree(self.folder / "shares", ignore_errors=True)
        return int((state == SKIPPED).sum())

    def _merge(self) -> None:
        """Move all shares into the large array and `state.npy`."""
        state = self._moved()
        if not self._file.exists():
            with replacing(self._file) as aside, aside.open("wb") as new:
                np.lib.format.write_array_header_1_0(new, {"descr": np.lib.format.dtype_to_descr(self.header.dtype),
                                                           "fortran_order": False, "shape": self._shape})
                new.truncate(new.tell() + int(self._shares.sizes.sum()))  # rows are written, never mapped for writing
        offset = map_array(self._file, self.header.dtype, self._shape, self.option, self.header.again()).offset
        starts = offset + np.cumsum(self._shares.sizes) - self._shares.sizes  # [images] bytes
        with self._file.open("r+b", buffering=0) as file:
            for share in self._shares.read():
                self._move(share, file, starts)
                state[share.rows] = share.states
                save_array(self.folder / "state.npy", state)
                share.remove()

    def _move(self, share: Share, file: BinaryIO, starts: np.ndarray) -> None:
        """Copy the rows of a share to their places in the large array's file."""
        for some in chunks(np.flatnonzero(share.states == DONE), self._largest_row):
            rows, values, ends = share.rows[some], share.read(some), np.cumsum(share.sizes[some])
            for first, last in runs(rows):
                write_at(file, values[ends[first] - share.sizes[some[first]] : ends[last - 1]], int(starts[rows[first]]))
        os.fsync(file.fileno())  # the share is removed next

    def largest(self, axes: tuple[int, ...]) -> np.ndarray:
        """The largest values of the large array over `axes`, the first among them, without reading it whole."""
        array = self.mapped()
        return np.max([array[rows[0] : rows[-1] + 1].max(axes) for rows in chunks(np.arange(len(array)), self._largest_row)], 0)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an npy file whole, onto the disk."""
    with replacing(path) as aside, aside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # np.save writes through a C buffer: it names no cause for a full disk, and does not see what fails when it is emptied.
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
