"""Rows of known sizes, written by many processes on any number of nodes and read as one array.

A network file system writes whole pages back: two nodes that write one file lose each other's bytes.  So a process writes its
rows into files of its own, one share for each fixed range of rows it works on: `FIRST-LAST.N.values` holds rows in the order
they came, `FIRST-LAST.N.rows` the number and state of each.  A share is written by the process that created it and never
again: what an interrupted run left counts as done, however many processes carry on.
"""

import errno
import itertools
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from utils.config import NO_SPACE, UserError
from utils.distributed import Processes, broadcast

log = logging.getLogger("rows")

MISSING, DONE, SKIPPED = 0, 1, 2  # states of a row

CHUNK_BYTES = 16 << 20  # of rows in memory at once
_MOST_SHARES = 128      # of one process that writes all rows; another process or run adds two at most
_FEWEST_ROWS = 256      # of a share
_CACHE_SECONDS = 90     # a node's cache of a network file system shows new files later than others' barriers
_RECORD = np.dtype([("row", "<i8"), ("state", "u1")])


@dataclass(frozen=True)
class Share:
    """One share as it lies on the disk.

    rows, states: int64 and uint8 [n], without a torn end; starts, sizes: int64 [n], bytes of a row that is DONE in `values`.
    """

    values: Path
    rows: np.ndarray
    states: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def read(self, some: np.ndarray) -> np.ndarray:
        """Bytes of some rows that are DONE, int [n] among those of the share, one after the other: uint8 [their sizes' sum]."""
        starts, ends = self.starts[some], np.cumsum(self.sizes[some])
        found = np.empty(ends[-1] if len(ends) else 0, np.uint8)
        with self.values.open("rb") as file:
            for first, last in runs(starts - (ends - self.sizes[some]), step=0):  # rows that stand as they will
                place = found[ends[first] - self.sizes[some[first]] : ends[last - 1]]
                file.seek(int(starts[first]))
                if file.readinto(place.data) != len(place):
                    raise OSError(errno.EIO, f"{self.values} ends early")
        return found

    def remove(self) -> None:
        """Delete the files; a process that was killed may have left one of them."""
        self.values.with_suffix(".rows").unlink()
        self.values.unlink(missing_ok=True)


class _OwnShare:
    """A share of this process, to which it appends."""

    def __init__(self, folder: Path, name: str) -> None:
        for number in itertools.count():
            try:
                self.index: BinaryIO = (folder / f"{name}.{number}.rows").open("xb", buffering=0)
                break
            except FileExistsError:  # of another process whose rows meet ours in this range, or of an earlier run
                continue
        # The name is ours now; values of it without rows are what a kill left of a share that was being removed.
        self.values: BinaryIO = (folder / f"{name}.{number}.values").open("wb", buffering=0)
        self.name, self.index_bytes, self.values_bytes = name, 0, 0

    def append(self, rows: np.ndarray, state: int, values: np.ndarray) -> None:
        """Add rows [n] with their state and their values, uint8 [their bytes]."""
        records = np.empty(len(rows), _RECORD)
        records["row"], records["state"] = rows, state
        write_at(self.values, values, self.values_bytes)
        # After the values: a row that is named must be there, also after a kill between the two writes.
        write_at(self.index, records, self.index_bytes)
        # Counted last: what a full disk tore is overwritten by the next rows.
        self.values_bytes, self.index_bytes = self.values_bytes + values.nbytes, self.index_bytes + records.nbytes

    def close(self) -> None:
        """Close both files, after which other nodes see them whole."""
        self.values.close()
        self.index.close()


class RowShares:
    """The shares in one folder, of all processes and runs.

    count: rows in all; row_bytes: size of each, one for all or int64 [count]; target: what is being made, as messages call it
    ("--out x.npz").  Writing raises UserError when the disk is full.
    """

    def __init__(self, folder: Path, count: int, row_bytes: int | np.ndarray, target: str) -> None:
        self.folder, self.count, self.target = folder, count, target
        self.sizes = np.broadcast_to(np.asarray(row_bytes, np.int64), (count,))  # one number in memory where all are alike
        self._range = max(_FEWEST_ROWS, -(-count // _MOST_SHARES))
        self._own: _OwnShare | None = None

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Store the values of rows int [n], one after the other in an array of any shape, and mark them as done."""
        data, sizes = np.ascontiguousarray(values).reshape(-1).view(np.uint8), self.sizes[rows]
        if len(data) != sizes.sum():
            raise ValueError(f"{len(data)} bytes are not the {sizes.sum()} of {len(rows)} rows")
        self._append(rows, DONE, data, sizes)

    def skip(self, rows: np.ndarray) -> None:
        """Mark rows int [n] as given up."""
        self._append(rows, SKIPPED, np.empty(0, np.uint8), np.zeros(len(rows), np.int64))

    def _append(self, rows: np.ndarray, state: int, values: np.ndarray, sizes: np.ndarray) -> None:
        ends = np.cumsum(sizes)
        with full_disk_explained(self.target):
            for start, stop in runs(rows // self._range, step=0):
                part = values[ends[start] - sizes[start] : ends[stop - 1]]
                self._share_of(int(rows[start])).append(rows[start:stop], state, part)

    def _share_of(self, row: int) -> _OwnShare:
        first = row - row % self._range
        name = f"{first:08d}-{min(first + self._range, self.count) - 1:08d}"
        if self._own is None or self._own.name != name:
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = _OwnShare(self.folder, name)
        return self._own

    def close(self) -> None:
        """Close the share being written; the next row begins another."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def read(self) -> list[Share]:
        """All shares, by their ranges."""
        return [self._open(path) for path in sorted(self.folder.glob("*.rows"))]

    def _open(self, path: Path) -> Share:
        values, records = path.with_suffix(".values"), np.fromfile(path, _RECORD)
        sound = (records["row"] >= 0) & (records["row"] < self.count) & np.isin(records["state"], (DONE, SKIPPED))
        done = sound & (records["state"] == DONE)
        sizes = np.where(done, self.sizes[np.where(sound, records["row"], 0)], 0)
        ends = np.cumsum(sizes)
        # After a power failure, the end of either file may be missing or zero.
        sound &= ~done | (ends <= (values.stat().st_size if values.exists() else 0))
        kept = len(records) if sound.all() else int(np.argmin(sound))
        return Share(values, records["row"][:kept], records["state"][:kept], (ends - sizes)[:kept], sizes[:kept])

    def states(self, before: np.ndarray | None = None) -> np.ndarray:
        """State of every row, uint8 [count]; before: the states of rows that shares do not have."""
        states = np.zeros(self.count, np.uint8) if before is None else before.copy()
        for share in self.read():
            states[share.rows] = share.states
        return states

    def whole(self, before: np.ndarray | None, processes: Processes) -> np.ndarray:
        """The states when every process has closed its shares, in the main process; before: as in `states`.

        Raises RuntimeError while rows are missing.
        """
        patience = time.monotonic() + (_CACHE_SECONDS if processes.world_size > 1 else 0)
        while len(missing := np.flatnonzero((states := self.states(before)) == MISSING)):
            if time.monotonic() >= patience:
                raise RuntimeError(f"{len(missing)} of {self.count} rows are missing, the first is {missing[0]}")
            time.sleep(1)
        return states

    def in_order(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Bytes of the given rows, all of them done and of one size, some megabytes at a time: uint8 [n, size]."""
        shares, row_bytes = self.read(), int(self.sizes[0])
        owner, place = np.full(self.count, -1), np.zeros(self.count, np.int64)
        for number, share in enumerate(shares):
            done = share.states == DONE
            owner[share.rows[done]], place[share.rows[done]] = number, np.flatnonzero(done)
        for some in chunks(rows, row_bytes):
            chunk = np.empty((len(some), row_bytes), np.uint8)
            for number in np.unique(owner[some]):
                here = owner[some] == number
                chunk[here] = shares[number].read(place[some[here]]).reshape(-1, row_bytes)
            yield chunk

    @property
    def share_bytes(self) -> int:
        """Bytes of the largest share."""
        return int(np.add.reduceat(self.sizes, np.arange(0, self.count, self._range)).max())

    def stored_bytes(self) -> int:
        """Bytes of all rows in shares."""
        return sum(path.stat().st_size for path in self.folder.glob("*.values"))


def same_everywhere(states: np.ndarray | None, count: int, processes: Processes) -> np.ndarray:
    """Give every process the main process's states, uint8 [count]: on other nodes old caches may show others.

    states: None in the other processes.  All processes call it.
    """
    processes.barrier()  # whose patience is longer than that of a broadcast
    return broadcast(torch.from_numpy(np.zeros(count, np.uint8) if states is None else states), processes).numpy()


def share_of(rows: np.ndarray, processes: Processes) -> np.ndarray:
    """This process's part of rows [n]: neighbours, as many as every other process's up to one."""
    return np.array_split(rows, processes.world_size)[processes.rank]


def chunks(rows: np.ndarray, row_bytes: int) -> Iterator[np.ndarray]:
    """Rows [n] of a size in parts that fit the memory."""
    step = max(1, CHUNK_BYTES // row_bytes)
    return (rows[first : first + step] for first in range(0, len(rows), step))


def runs(rows: np.ndarray, step: int = 1) -> Iterator[tuple[int, int]]:
    """Slices of `rows` in which each is larger than the one before by `step`."""
    if len(rows):
        ends = np.flatnonzero(np.diff(rows) != step) + 1
        yield from zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True)


def write_at(file: BinaryIO, values: np.ndarray, offset: int) -> None:
    """Write contiguous values at `offset` of a file opened without buffer."""
    left = values.reshape(-1).view(np.uint8).data
    while left:  # one call may write less than it is given, and never more than 2 GB
        written = os.pwrite(file.fileno(), left, offset)
        left, offset = left[written:], offset + written


def wait_until_visible(path: Path) -> None:
    """Wait until this node sees a file that another made: it may remember for a minute that there was none."""
    patience = time.monotonic() + _CACHE_SECONDS
    while not path.exists() and time.monotonic() < patience:
        time.sleep(1)


def warn_if_short_of_space(folder: Path, needed: int, target: str) -> None:
    """Log a warning when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        log.warning("%s needs %.1f GB while it is made, and %.1f GB are free", target, needed / 1e9, free / 1e9)


@contextmanager
def full_disk_explained(target: str) -> Iterator[None]:
    """Turn the error of a full disk into a UserError; target: what is being made, with its option."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{target} does not fit on its disk ({error.strerror}): free space and run the same command again, "
                        "which keeps the images that are done.") from error
