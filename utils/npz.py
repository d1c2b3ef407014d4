"""Image arrays in npz files: read without loading them, written by many processes without losing finished rows.

An npz of 50,000 images at 256 px holds 10 GB.  `open_array` maps an uncompressed member instead of reading it;
`ImageStore` collects rows in a `.partial` folder beside the target, so that a crash costs only the batch in flight, and
turns them into one npz at the end.  The finished file carries its identity (the options it was made with) in the zip
comment, which np.load passes over, so that the same command run again knows that its work is done.
"""

import errno
import json
import logging
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.config import UserError
from utils.files import check_writable

log = logging.getLogger("npz")

NPZ_ERRORS = (OSError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError)

_MISSING, _WRITTEN, _SKIPPED = 0, 1, 2  # values of done.bin
_CHUNK_BYTES = 16 << 20
_LOCAL_HEADER_BYTES = 30  # fixed part of a zip member's header; name and extra field follow
_COMMENT_BYTES = 65535  # the zip format's limit


def array_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one array of an npz, read without its data.

    Raises KeyError if the npz has no `key`, one of NPZ_ERRORS if the file is no sound npz.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        shape, _, dtype = _read_header(member)
    return shape, dtype


def array_keys(path: Path) -> list[str]:
    """Names of the arrays in an npz; raises one of NPZ_ERRORS if the file is no sound npz."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_array(path: Path, key: str) -> np.ndarray:
    """Open one array of an npz: a read-only memory map if it is stored uncompressed, otherwise loaded whole.

    Raises KeyError if the npz has no `key`, one of NPZ_ERRORS if the file is no sound npz or holds Python objects.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        with archive.open(info) as member:
            if info.compress_type != zipfile.ZIP_STORED:
                return np.lib.format.read_array(member, allow_pickle=False)
            shape, fortran_order, dtype = _read_header(member)
            header_bytes = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects")
    if 0 in shape:
        return np.empty(shape, dtype)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(_LOCAL_HEADER_BYTES))
    offset = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"npy format {version} holds no plain numbers")


def already_finished(path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any],
                     option: str = "--out") -> bool:
    """Tell whether `path` is the finished npz of exactly these images.

    shape, identity: as given to ImageStore.  Returns False if there is no such file.  Raises UserError if there is a
    file made with other options, which nothing should overwrite unasked.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.comment or b"null")
    except NPZ_ERRORS:
        found = None
    wanted = _full_identity(shape, identity)
    if not isinstance(found, dict):
        raise UserError(f"{option} {path} exists and does not say how it was made, so it cannot be taken for the "
                        f"result of this command: delete it or change {option}.")
    if key := _first_difference(found, wanted):
        raise UserError(f"{option} {path} exists and was made with {key} {found.get(key)!r}, not with "
                        f"{wanted.get(key)!r} as now: delete it or change {option}.")
    shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)  # left by a crash just after the renaming
    return True


def _full_identity(shape: tuple[int, ...], identity: dict[str, Any]) -> dict[str, Any]:
    """The identity as JSON gives it back (tuples as lists, paths as strings), with the shape."""
    return json.loads(json.dumps({**identity, "shape": [int(n) for n in shape]}, default=str))


def _first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    absent = object()
    keys = [*wanted, *(key for key in found if key not in wanted)]
    return next((key for key in keys if found.get(key, absent) != wanted.get(key, absent)), None)


class ImageStore:
    """Rows of uint8 images on their way into one npz, written by any number of processes in any order.

    path: the npz to make; shape: (N, H, W, 3); identity: the options that decide what the rows hold, values that JSON
    can express; option: the flag that named `path`.  Opens what an earlier run with the same identity left in
    `path` with suffix `.partial`, or creates it; processes may open it at the same time.  Rows of different processes
    must differ.  Data is not synchronised to the disk before `finish`: it outlives a crash of the process, not of the
    machine.

    Raises UserError if `path` is no `.npz` name, its folder cannot be written, or the identity differs.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any],
                 option: str = "--out") -> None:
        self.path, self.shape, self.option = Path(path), tuple(int(n) for n in shape), option
        if self.path.suffix != ".npz":
            raise UserError(f"{option} {str(path)!r} is not the name of an npz: give one that ends in .npz.")
        if self.path.is_dir():
            raise UserError(f"{option} {path} is a folder, not a file: give the name of an npz inside it.")
        self.folder = self.path.with_suffix(".partial")
        self.identity = _full_identity(shape, identity)
        if len(self._comment()) > _COMMENT_BYTES:
            raise ValueError(f"identity exceeds {_COMMENT_BYTES} bytes of JSON")
        self._row_bytes = int(np.prod(self.shape[1:]))
        check_writable(self.path.parent, option)
        check_writable(self.folder, option)
        self._claim()
        self._images = self._open("images.bin", self.shape[0] * self._row_bytes)
        self._done = self._open("done.bin", self.shape[0])
        self._warn_if_short_of_space()

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Write images and mark their rows as done.

        rows: int [n], each in [0, N); images: uint8 [n, H, W, 3].  Raises UserError when the disk is full, ValueError
        for other shapes, types or rows.
        """
        rows = self._check_rows(rows)
        if images.dtype != np.uint8 or images.shape != (len(rows), *self.shape[1:]):
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 {(len(rows), *self.shape[1:])}")
        images = np.ascontiguousarray(images)
        for start, stop in _runs(rows):
            self._pwrite(self._images, images[start:stop], int(rows[start]) * self._row_bytes)
            # after the images: a row marked as done must be there whatever happens between the two writes
            self._mark(rows[start:stop], _WRITTEN)

    def mark_skipped(self, rows: np.ndarray) -> None:
        """Give up rows (int [n]): they count as done, and `finish` leaves them out."""
        rows = self._check_rows(rows)
        for start, stop in _runs(rows):
            self._mark(rows[start:stop], _SKIPPED)

    def missing(self) -> np.ndarray:
        """Rows that are neither written nor skipped, ascending: int64 [m]."""
        return np.flatnonzero(self._states() == _MISSING)

    def skipped(self) -> np.ndarray:
        """Rows given up, ascending: int64 [m]."""
        return np.flatnonzero(self._states() == _SKIPPED)

    def finish(self, **arrays: np.ndarray) -> int:
        """Make the npz (`arr_0`: the images), rename it into place, remove the `.partial` folder; in one process.

        arrays: further members, each with N rows, of which those of skipped images are left out, or a scalar.
        Returns the number of images.  Raises UserError if every row was skipped or the disk is full, RuntimeError while
        rows are missing, ValueError for an array of another length.
        """
        if len(missing := self.missing()):
            raise RuntimeError(f"{len(missing)} of {self.shape[0]} rows are missing, the first is {missing[0]}")
        kept = self._states() == _WRITTEN  # [N]
        if not kept.any():
            raise UserError(f"{self.option} {self.path} would hold no image because all {self.shape[0]} were skipped: "
                            f"check the images, then delete {self.folder} and run the command again.")
        members = {}
        for key, value in arrays.items():
            value = np.asarray(value)
            if key == "arr_0" or (value.ndim and len(value) != len(kept)):
                raise ValueError(f"{key} {value.shape} is neither a scalar nor an array of {len(kept)} rows")
            members[key] = value[kept] if value.ndim else value
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self._write_npz(beside, kept, members)
            os.replace(beside, self.path)
        except OSError as error:
            raise self._disk_error(error) from error
        finally:
            beside.unlink(missing_ok=True)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            log.warning("%s is no longer needed but could not be removed", self.folder)
        return int(kept.sum())

    def close(self) -> None:
        """Close the files; what was written stays for the next one to open the store."""
        self._images.close()
        self._done.close()

    def _claim(self) -> None:
        """Leave this identity in the folder, or check it against the one that is there."""
        file = self.folder / "identity.json"
        if not file.exists():
            # written beside and renamed: a process that opens the store at the same time sees all of it or nothing
            beside = self.folder / f"identity.{os.getpid()}.tmp"
            beside.write_text(json.dumps(self.identity, indent=1))
            os.replace(beside, file)
        try:
            found = json.loads(file.read_text())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{file} does not hold the options of an unfinished {self.option} {self.path}: "
                            f"delete {self.folder} or change {self.option}.")
        if key := _first_difference(found, self.identity):
            raise UserError(f"{self.folder} was begun with {key} {found.get(key)!r}, not with "
                            f"{self.identity.get(key)!r} as now: delete it or change {self.option}.")

    def _open(self, name: str, size: int) -> BinaryIO:
        file = os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        os.ftruncate(file.fileno(), size)  # keeps what is there; the rest is a hole that takes no space
        return file

    def _warn_if_short_of_space(self) -> None:
        total = self.shape[0] * self._row_bytes
        needed = 2 * total - min(total, os.fstat(self._images.fileno()).st_blocks * 512)  # the rows and the npz
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            log.warning("%s %s needs %.1f GB while it is made, and %.1f GB are free",
                           self.option, self.path, needed / 1e9, free / 1e9)

    def _states(self) -> np.ndarray:
        return np.frombuffer(os.pread(self._done.fileno(), self.shape[0], 0), np.uint8)

    def _check_rows(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < self.shape[0]):
            raise ValueError(f"rows must be one-dimensional and inside [0, {self.shape[0]})")
        return rows

    def _mark(self, rows: np.ndarray, state: int) -> None:
        self._pwrite(self._done, np.full(len(rows), state, np.uint8), int(rows[0]))

    def _pwrite(self, file: BinaryIO, values: np.ndarray, offset: int) -> None:
        left = memoryview(values).cast("B")
        try:
            while left:  # one call may write less than it is given, and never more than 2 GB
                written = os.pwrite(file.fileno(), left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise self._disk_error(error) from error

    def _disk_error(self, error: OSError) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        return UserError(f"{self.option} {self.path} does not fit on its disk ({error.strerror}): free space and run "
                         "the same command again, which keeps the images that are done.")

    def _write_npz(self, path: Path, kept: np.ndarray, members: dict[str, np.ndarray]) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (int(kept.sum()), *self.shape[1:])}
        with path.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                archive.comment = self._comment()
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    for chunk in self._chunks(kept):
                        member.write(chunk)
                for key, value in members.items():
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, value, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # the rows are removed next: the npz must be on the disk by then

    def _chunks(self, kept: np.ndarray) -> Iterator[bytes]:
        """Bytes of the kept rows, some megabytes at a time."""
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for start in range(0, len(kept), step):
            mask = kept[start:start + step]
            data = os.pread(self._images.fileno(), len(mask) * self._row_bytes, start * self._row_bytes)
            if len(data) != len(mask) * self._row_bytes:
                raise OSError(errno.EIO, f"{self.folder / 'images.bin'} ends early")
            yield data if mask.all() else np.frombuffer(data, np.uint8).reshape(len(mask), -1)[mask].tobytes()

    def _comment(self) -> bytes:
        return json.dumps(self.identity).encode()


def _runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Slices of `rows` over which each row follows the one before, so that one write serves them all."""
    if len(rows):
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        yield from zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True)
