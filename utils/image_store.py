"""Images on their way into one npz, written by many processes without losing finished rows.

An npz of 50,000 images at 256 px holds 10 GB.  `ImageStore` collects rows in a `.partial` folder beside the target and turns
them into one npz at the end: a crash costs only the batch in flight.  The finished file carries its identity (the options it
was made with) in the zip comment, which np.load ignores: the same command knows that its work is done.
"""

import errno
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.config import UserError
from utils.distributed import Processes
from utils.files import check_writable, replacing, require_same, write_json
from utils.npz import NPZ_ERRORS

log = logging.getLogger("npz")

_MISSING, _WRITTEN, _SKIPPED = 0, 1, 2  # values of done.bin
_CHUNK_BYTES = 16 << 20
_COMMENT_BYTES = 65535  # the zip format's limit


def already_finished(path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any]) -> bool:
    """Tell whether `path` is the finished npz of exactly these images; False if there is no such file.

    shape, identity: as given to ImageStore.  Raises UserError for a file made with other options: nothing may overwrite it.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
    except NPZ_ERRORS:
        comment = b""
    _require_identity(comment, _full_identity(shape, identity), f"--out {path} exists and", "was made")
    shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)  # left by a crash just after the renaming
    return True


def _full_identity(shape: tuple[int, ...], identity: dict[str, Any]) -> dict[str, Any]:
    """The identity as JSON gives it back (tuples as lists, paths as strings), with the shape."""
    return json.loads(json.dumps({**identity, "shape": [int(n) for n in shape]}, default=str))


def _require_identity(text: bytes, wanted: dict[str, Any], what: str, made: str) -> None:
    """Raise UserError unless `text` is the JSON of the wanted identity."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{what} does not say with which options it {made}: delete it or change --out.")
    require_same(found, wanted, f"{what} {made} with", "delete it or change --out")


class _RowFiles:
    """The files of a store: `images.bin` with the pixels of all rows, `done.bin` with the state of each."""

    def __init__(self, folder: Path, count: int, row_bytes: int) -> None:
        self.folder, self.count, self.row_bytes = folder, count, row_bytes
        self.images = self._open("images.bin", count * row_bytes)
        self.done = self._open("done.bin", count)

    def _open(self, name: str, size: int) -> BinaryIO:
        file = os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        os.ftruncate(file.fileno(), size)  # keeps what is there; the rest is a hole that takes no space
        return file

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Write the images [n, ...] of rows [n] and mark them as written."""
        for start, stop in _runs(rows):
            _pwrite(self.images, images[start:stop], int(rows[start]) * self.row_bytes)
            # After the images: a row that is marked must be there, also after a crash between the two writes.
            self.mark(rows[start:stop], _WRITTEN)

    def mark(self, rows: np.ndarray, state: int) -> None:
        """Set the state of rows [n]."""
        for start, stop in _runs(rows):
            _pwrite(self.done, np.full(stop - start, state, np.uint8), int(rows[start]))

    def states(self) -> np.ndarray:
        """State of every row, uint8 [N]."""
        return np.frombuffer(os.pread(self.done.fileno(), self.count, 0), np.uint8)

    def chunks(self, kept: np.ndarray) -> Iterator[bytes]:
        """Pixels of the rows that `kept` [N] selects, some megabytes at a time."""
        step = max(1, _CHUNK_BYTES // self.row_bytes)
        for start in range(0, len(kept), step):
            mask = kept[start:start + step]
            data = os.pread(self.images.fileno(), len(mask) * self.row_bytes, start * self.row_bytes)
            if len(data) != len(mask) * self.row_bytes:
                raise OSError(errno.EIO, f"{self.folder / 'images.bin'} ends early")
            yield data if mask.all() else np.frombuffer(data, np.uint8).reshape(len(mask), -1)[mask].tobytes()

    def close(self) -> None:
        """Close both files."""
        self.images.close()
        self.done.close()


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Slices of `rows` in which each row follows the one before, so that one write is enough for a slice."""
    if len(rows):
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        yield from zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True)


def _pwrite(file: BinaryIO, values: np.ndarray, offset: int) -> None:
    left = values.data.cast("B")
    while left:  # one call may write less than it is given, and never more than 2 GB
        written = os.pwrite(file.fileno(), left, offset)
        left, offset = left[written:], offset + written


class ImageStore:
    """Rows of uint8 images on their way into one npz, written by any number of processes in any order.

    path: the npz to make, which --out named; shape: (N, H, W, 3); identity: the options that decide what the rows hold, values
    that JSON can express.  Opens the `.partial` folder that an earlier run with the same identity left, or creates it.
    Processes may open it at the same time; their rows must differ.  Data is not synchronised to the disk before `finish`: it
    outlives a crash of the process, not of the machine.

    Raises UserError if `path` is no `.npz` name, its folder cannot be written, or the identity differs.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any]) -> None:
        self.path, self.shape = Path(path), tuple(int(n) for n in shape)
        if self.path.suffix != ".npz":
            raise UserError(f"--out {str(path)!r} is not the name of an npz: give one that ends in .npz.")
        if self.path.is_dir():
            raise UserError(f"--out {path} is a folder, not a file: give the name of an npz inside it.")
        self.folder = self.path.with_suffix(".partial")
        self.identity = _full_identity(shape, identity)
        self._comment = json.dumps(self.identity).encode()
        if len(self._comment) > _COMMENT_BYTES:
            raise ValueError(f"identity exceeds {_COMMENT_BYTES} bytes of JSON")
        check_writable(self.path.parent, "--out")
        check_writable(self.folder, "--out")
        identity_file = self.folder / "identity.json"
        if not identity_file.exists():
            write_json(identity_file, self.identity)
        _require_identity(identity_file.read_bytes(), self.identity, str(self.folder), "was begun")
        self._files = _RowFiles(self.folder, self.shape[0], int(np.prod(self.shape[1:])))
        self._warn_if_short_of_space()

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Write images and mark their rows as done.

        rows: int [n], each in [0, N); images: uint8 [n, H, W, 3].  Raises UserError when the disk is full, ValueError
        for other shapes, types or rows.
        """
        rows = self._check_rows(rows)
        if images.dtype != np.uint8 or images.shape != (len(rows), *self.shape[1:]):
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 {(len(rows), *self.shape[1:])}")
        with self._full_disk_explained():
            self._files.write(rows, np.ascontiguousarray(images))

    def mark_skipped(self, rows: np.ndarray) -> None:
        """Give up rows (int [n]): they count as done, and `finish` leaves them out."""
        with self._full_disk_explained():
            self._files.mark(self._check_rows(rows), _SKIPPED)

    def missing(self) -> np.ndarray:
        """Rows that are neither written nor skipped, ascending: int64 [m]."""
        return np.flatnonzero(self._files.states() == _MISSING)

    def finish(self, processes: Processes, **arrays: np.ndarray) -> int:
        """Close the store in every process; the main process then makes the npz and removes the `.partial` folder.

        Every process calls this once its own rows are done, and returns when the npz is there.  arrays: members besides
        `arr_0` (the images), scalars or N rows each; rows of skipped images are left out.  Returns the number of images in
        the main process, 0 in the others.  Raises UserError if every row was skipped or the disk is full, RuntimeError
        while rows are missing, ValueError for an array of another length.
        """
        if not processes.is_main:
            self.close()  # before the main process removes the files
        processes.barrier()
        count = self._make_npz(arrays) if processes.is_main else 0
        processes.barrier()
        return count

    def close(self) -> None:
        """Close the files; what was written stays for the next one to open the store."""
        self._files.close()

    def _make_npz(self, arrays: dict[str, np.ndarray]) -> int:
        if len(missing := self.missing()):
            raise RuntimeError(f"{len(missing)} of {self.shape[0]} rows are missing, the first is {missing[0]}")
        kept = self._files.states() == _WRITTEN  # [N]
        if not kept.any():
            raise UserError(f"--out {self.path} would hold no image because all {self.shape[0]} were skipped: "
                            f"check the images, then delete {self.folder} and run the command again.")
        members = {key: _kept_part(key, np.asarray(value), kept) for key, value in arrays.items()}
        shape = (int(kept.sum()), *self.shape[1:])
        with self._full_disk_explained(), replacing(self.path) as aside:
            _write_npz(aside, shape, self._files.chunks(kept), members, self._comment)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            log.warning("%s is no longer needed but could not be removed", self.folder)
        return shape[0]

    def _warn_if_short_of_space(self) -> None:
        total, stored = int(np.prod(self.shape)), os.fstat(self._files.images.fileno()).st_blocks * 512
        needed = 2 * total - min(total, stored)  # the rows and the npz
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            log.warning("--out %s needs %.1f GB while it is made, and %.1f GB are free", self.path, needed / 1e9, free / 1e9)

    def _check_rows(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < self.shape[0]):
            raise ValueError(f"rows must be one-dimensional and inside [0, {self.shape[0]})")
        return rows

    @contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        """Turn the error of a full disk into a UserError."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"--out {self.path} does not fit on its disk ({error.strerror}): free space and run the same "
                            "command again, which keeps the images that are done.") from error


def _kept_part(key: str, value: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The rows of a member that `kept` [N] selects; a scalar as it is."""
    if key == "arr_0" or (value.ndim and len(value) != len(kept)):
        raise ValueError(f"{key} {value.shape} is neither a scalar nor an array of {len(kept)} rows")
    return value[kept] if value.ndim else value


def _write_npz(path: Path, shape: tuple[int, ...], chunks: Iterable[bytes], members: dict[str, np.ndarray],
               comment: bytes) -> None:
    """Write an uncompressed npz with `arr_0`, uint8 of the given shape, from its bytes in order."""
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.comment = comment
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for chunk in chunks:
                    member.write(chunk)
            for key, value in members.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())  # the rows are removed next: the npz must be on the disk by then
