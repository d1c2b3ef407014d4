"""Writing a code folder (`code_shards.py`) from any number of processes on any number of nodes.

Each process keeps its rows in `shares` (`row_shares.py`).  At the end the main process moves them into `codes.npy`, one share
after the other: on the way the codes need the space of one share more than when they are complete.  `state.npy` says which
rows have been moved; an interrupted extraction or merge carries on with the others.
"""

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.code_shards import CodeHeader, load_header, map_array, open_codes, require_largest, require_range
from utils.config import UserError
from utils.distributed import Processes
from utils.files import replacing, require_same, write_json
from utils.row_shares import (
    CHUNK_BYTES,
    DONE,
    MISSING,
    SKIPPED,
    RowShares,
    Share,
    full_disk_explained,
    runs,
    same_everywhere,
    share_of,
    warn_if_short_of_space,
    write_at,
)

_OPTION = "--code-path"


class CodeWriter:
    """Creates or continues a code folder; all processes of a group open their writers together."""

    def __init__(self, folder: Path, header: CodeHeader, labels: np.ndarray, processes: Processes) -> None:
        """labels: [images].  Raises UserError when the folder holds codes made with other options or of other labels."""
        self.folder, self.header, self.processes = folder, header.as_begun(), processes
        self._labels, self._target = labels.astype(np.int64), f"{_OPTION} {folder}"
        self._row_bytes = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        self._shares = RowShares(folder / "shares", header.images, self._row_bytes, self._target)
        self._require_own()  # in every process: none then waits for one that was refused
        state = self._begin() if processes.is_main else None
        self._state = same_everywhere(state, header.images, processes)
        self._share = share_of(np.flatnonzero(self._state == MISSING), processes)

    def _require_own(self) -> None:
        if not (self.folder / "header.json").exists():
            return
        found, images = load_header(self.folder, _OPTION).as_begun(), "--data-path"
        require_same(found.comparable(self.header, self._target, images), self.header.comparable(found, images, self._target),
                     f"{self._target} holds codes made with", "choose another folder or delete this one")
        labels = map_array(self.folder / "labels.npy", np.dtype(np.int64), self._labels.shape, _OPTION)
        if not np.array_equal(labels, self._labels):
            raise UserError(f"{self._target} holds codes of images with other labels: choose another folder or delete this one.")

    def _begin(self) -> np.ndarray:
        """Make what is not there; returns the state of every row."""
        with full_disk_explained(self._target):
            if not (self.folder / "header.json").exists():
                _save(self.folder / "labels.npy", self._labels)
                write_json(self.folder / "header.json", asdict(self.header))
            state = self._shares.states(self._moved())
            if load_header(self.folder, _OPTION).complete:
                if (state == MISSING).any():
                    write_json(self.folder / "header.json", asdict(self.header))
                else:
                    open_codes(self.folder, _OPTION)
        if (state == MISSING).any():
            needed = int((state != SKIPPED).sum()) * self._row_bytes - self._stored_bytes() + self._shares.share_bytes
            warn_if_short_of_space(self.folder, needed, self._target)
        return state

    def _stored_bytes(self) -> int:
        codes = self.folder / "codes.npy"
        return self._shares.stored_bytes() + (codes.stat().st_blocks * 512 if codes.exists() else 0)

    def _moved(self) -> np.ndarray:
        """States of the rows that are in `codes.npy` already: uint8 [images]."""
        if not (self.folder / "state.npy").exists():
            return np.zeros(self.header.images, np.uint8)
        state = np.array(map_array(self.folder / "state.npy", np.dtype(np.uint8), self.header.shape[:1], _OPTION))
        require_range(state, 3, "state", f"{_OPTION} {self.folder / 'state.npy'}")
        map_array(self.folder / "codes.npy", self.header.dtype, self.header.shape, _OPTION)
        return state

    def share(self) -> np.ndarray:
        """Rows that this process should do, neighbours among those missing when the writer was made: int64 [n]."""
        return self._share

    def write(self, rows: np.ndarray, codes: np.ndarray) -> None:
        """Store codes [n, crops, C, N] of the given rows [n].

        Raises ValueError for another shape or codes beyond their codebook, UserError when the disk is full.
        """
        if codes.shape != (len(rows), *self.header.shape[1:]):
            raise ValueError(f"codes are {codes.shape}, not {(len(rows), *self.header.shape[1:])}")
        sizes = self.header.codebook_sizes
        if len(rows) and (codes.min() < 0 or (codes.max((0, 1, 3)) >= sizes).any()):
            raise ValueError(f"codes from {codes.min()} to {codes.max((0, 1, 3))} are not of codebooks of {sizes} codes")
        self._shares.write(rows, codes.astype(self.header.dtype))

    def mark_unreadable(self, rows: np.ndarray) -> None:
        """Mark rows [n] whose images could not be read; `CodeDataset` leaves them out."""
        self._shares.skip(rows)

    def finish(self) -> int:
        """Complete the folder when every process has done its rows; all call it, and return when that is done.

        Returns the number of unreadable images in the main process, 0 in the others.  Raises UserError when no image could be
        read or the disk is full, RuntimeError while rows are missing.
        """
        self._shares.close()
        self.processes.barrier()
        unreadable = self._complete() if self.processes.is_main else 0
        self.processes.barrier()
        return unreadable

    def _complete(self) -> int:
        state = self._shares.whole(self._moved(), self.processes)
        if not (state == DONE).any():
            raise UserError(f"{self._target} would hold no codes because none of the {len(state)} images could be read: check "
                            f"the images of --data-path, then delete {self.folder} and run the command again.")
        if not load_header(self.folder, _OPTION).complete:
            with full_disk_explained(self._target):
                self._merge()
                largest = self._largest_codes()
                require_largest(self.header, largest, self._target)
                complete = replace(self.header, complete=True, largest_codes=largest.tolist())
                write_json(self.folder / "header.json", asdict(complete))
        shutil.rmtree(self.folder / "shares", ignore_errors=True)
        return int((state == SKIPPED).sum())

    def _merge(self) -> None:
        """Move all shares into `codes.npy` and `state.npy`."""
        path, state = self.folder / "codes.npy", self._moved()
        if not path.exists():
            with replacing(path) as aside, aside.open("wb") as new:
                np.lib.format.write_array_header_1_0(new, {"descr": np.lib.format.dtype_to_descr(self.header.dtype),
                                                           "fortran_order": False, "shape": self.header.shape})
                new.truncate(new.tell() + self.header.images * self._row_bytes)  # rows are written, never mapped for writing
        offset = map_array(path, self.header.dtype, self.header.shape, _OPTION).offset
        with path.open("r+b", buffering=0) as file:
            for share in self._shares.read():
                self._move(share, file, offset)
                state[share.rows] = share.states
                _save(self.folder / "state.npy", state)
                share.remove()

    def _move(self, share: Share, file: BinaryIO, offset: int) -> None:
        """Copy the rows of a share to their places behind `offset` of `codes.npy`."""
        done, step = np.flatnonzero(share.states == DONE), max(1, CHUNK_BYTES // self._row_bytes)
        for some in (done[first : first + step] for first in range(0, len(done), step)):
            rows, values = share.rows[some], share.read(share.places[some])
            for start, stop in runs(rows):
                write_at(file, values[start:stop], offset + int(rows[start]) * self._row_bytes)
        os.fsync(file.fileno())  # the share is removed next

    def _largest_codes(self) -> np.ndarray:
        """The largest code of each stream, of all that is in `codes.npy`: [C]."""
        codes = map_array(self.folder / "codes.npy", self.header.dtype, self.header.shape, _OPTION)
        step = max(1, CHUNK_BYTES // self._row_bytes)
        return np.max([codes[first : first + step].max((0, 1, 3)) for first in range(0, len(codes), step)], axis=0)


def _save(path: Path, array: np.ndarray) -> None:
    """Write an npy file whole, onto the disk."""
    with replacing(path) as aside, aside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # np.save writes through a C buffer: it names no cause for a full disk, and does not see what fails when it is emptied.
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
