"""Images on their way into one npz, written by many processes on any number of nodes without losing finished rows.

An npz of 50,000 images at 256 px holds 10 GB.  `ImageStore` collects rows in a `.partial` folder beside the target
(`row_shares.py`) and turns them into one npz at the end: a crash costs only the batch in flight.  The finished file carries
its identity (the options it was made with) in the zip comment, which np.load ignores: the same command knows that its work is
done.
"""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils.class_names import ClassNames
from utils.config import UserError
from utils.distributed import Processes
from utils.files import check_writable, replacing, require_same, write_json
from utils.npz import NPZ_ERRORS
from utils.row_shares import (
    DONE,
    MISSING,
    SKIPPED,
    RowShares,
    full_disk_explained,
    same_everywhere,
    share_of,
    wait_until_visible,
    warn_if_short_of_space,
)

log = logging.getLogger("npz")

_COMMENT_BYTES = 65535  # the zip format's limit


def already_finished(path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any], option: str = "--out") -> bool:
    """Tell whether `path` is the finished npz of exactly these images; False if there is no such file.

    shape, identity: as given to ImageStore; option: what named `path`.  Raises UserError for a file made with other options:
    nothing may overwrite it.
    """
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
    except NPZ_ERRORS:
        comment = b""
    _require_identity(comment, _full_identity(shape, identity), f"{option} {path} exists and", "was made", option)
    shutil.rmtree(path.with_suffix(".partial"), ignore_errors=True)  # left by a crash just after the renaming
    return True


def _full_identity(shape: tuple[int, ...], identity: dict[str, Any]) -> dict[str, Any]:
    """The identity as JSON gives it back (tuples as lists, paths as strings), with the shape."""
    return json.loads(json.dumps({**identity, "shape": [int(n) for n in shape]}, default=str))


def _require_identity(text: bytes, wanted: dict[str, Any], what: str, made: str, option: str = "--out") -> None:
    """Raise UserError unless `text` is the JSON of the wanted identity."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{what} does not say with which options it {made}: delete it or change {option}.")
    require_same(found, wanted, f"{what} {made} with", f"delete it or change {option}")


def check_name(path: Path) -> None:
    """Raise UserError unless --out is the name of an npz."""
    if path.suffix != ".npz":
        raise UserError(f"--out {str(path)!r} is not the name of an npz: give one that ends in .npz.")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder, not a file: give the name of an npz inside it.")


def check_begun(path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any]) -> None:
    """Raise UserError when an interrupted run with other options left a `.partial` folder for `path`.

    shape, identity: as given to ImageStore.
    """
    folder = Path(path).with_suffix(".partial")
    if (folder / "identity.json").exists():
        _require_identity((folder / "identity.json").read_bytes(), _full_identity(shape, identity), str(folder), "was begun")


class ImageStore:
    """Rows of uint8 images on their way into one npz, written by any number of processes in any order.

    path: the npz to make, which --out named; shape: (N, H, W, 3); identity: the options that decide what the rows hold, values
    that JSON can express; start_over: drop the rows that an earlier run left.  Continues the `.partial` folder of an earlier
    run with the same identity, or creates it.  All processes open the store together, and their rows must differ.  Data is not
    synchronised to the disk before `finish`: it outlives a crash of the process, not of the machine.

    Raises UserError if `path` is no `.npz` name, its folder cannot be written, or the identity differs.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int], identity: dict[str, Any], processes: Processes,
                 start_over: bool = False) -> None:
        self.path, self.shape, self.processes = Path(path), tuple(int(n) for n in shape), processes
        check_name(self.path)
        self.folder = self.path.with_suffix(".partial")
        identity = _full_identity(shape, identity)
        self._comment = json.dumps(identity).encode()
        if len(self._comment) > _COMMENT_BYTES:
            raise ValueError(f"identity exceeds {_COMMENT_BYTES} bytes of JSON")
        check_writable(self.path.parent, "--out")
        check_begun(self.path, shape, identity)
        self._shares = RowShares(self.folder, self.shape[0], int(np.prod(self.shape[1:])), f"--out {path}")
        states = self._begin(identity, start_over) if processes.is_main else None
        self._states = same_everywhere(states, self.shape[0], processes)
        self._share = share_of(self.missing(), processes)

    def _begin(self, identity: dict[str, Any], start_over: bool) -> np.ndarray:
        if start_over:
            shutil.rmtree(self.folder, ignore_errors=True)
        check_writable(self.folder, "--out")
        if not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", identity)
        needed = 2 * int(np.prod(self.shape)) - self._shares.stored_bytes()  # the rows and the npz
        warn_if_short_of_space(self.folder, needed, f"--out {self.path}")
        return self._shares.states()

    def write(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Write images and mark their rows as done.

        rows: int [n], each in [0, N); images: uint8 [n, H, W, 3].  Raises UserError when the disk is full, ValueError
        for other shapes, types or rows.
        """
        rows = self._check_rows(rows)
        if images.dtype != np.uint8 or images.shape != (len(rows), *self.shape[1:]):
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 {(len(rows), *self.shape[1:])}")
        self._shares.write(rows, images)
        self._states[rows] = DONE

    def mark_skipped(self, rows: np.ndarray) -> None:
        """Give up rows (int [n]): they count as done, and `finish` leaves them out."""
        rows = self._check_rows(rows)
        self._shares.skip(rows)
        self._states[rows] = SKIPPED

    def missing(self) -> np.ndarray:
        """Rows that were missing when the store was opened and that this process has not done since: int64 [m], ascending."""
        return np.flatnonzero(self._states == MISSING)

    def share(self) -> np.ndarray:
        """Rows that this process should do, neighbours among those missing when the store was opened: int64 [m]."""
        return self._share

    def finish(self, class_names: ClassNames = (), /, **arrays: np.ndarray) -> int:
        """Close the store in every process; the main process then makes the npz and removes the `.partial` folder.

        Every process calls this once its own rows are done, and returns when the npz is there.  class_names: by label id, kept
        as the member of this name; arrays: members besides `arr_0` (the images), scalars or N rows each; rows of skipped images
        are left out.  Returns the number of images in
        the main process, 0 in the others.  Raises UserError if every row was skipped or the disk is full, RuntimeError
        while rows are missing, ValueError for an array of another length.
        """
        self.close()
        self.processes.barrier()
        count = self._make_npz(class_names, arrays) if self.processes.is_main else 0
        self.processes.barrier()
        wait_until_visible(self.path)
        return count

    def close(self) -> None:
        """Close this process's files; what was written stays for the next one to open the store."""
        self._shares.close()

    def _make_npz(self, class_names: ClassNames, arrays: dict[str, np.ndarray]) -> int:
        kept = self._shares.whole(None, self.processes) == DONE  # [N]
        if not kept.any():
            raise UserError(f"--out {self.path} would hold no image because all {self.shape[0]} were skipped: "
                            f"check the images, then delete {self.folder} and run the command again.")
        members = {key: _kept_part(key, np.asarray(value), kept) for key, value in arrays.items()}
        if class_names:
            members["class_names"] = np.array(class_names)
        shape = (int(kept.sum()), *self.shape[1:])
        with full_disk_explained(f"--out {self.path}"), replacing(self.path) as aside:
            _write_npz(aside, shape, self._shares.in_order(np.flatnonzero(kept)), members, self._comment)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            log.warning("%s is no longer needed but could not be removed", self.folder)
        return shape[0]

    def _check_rows(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < self.shape[0]):
            raise ValueError(f"rows must be one-dimensional and inside [0, {self.shape[0]})")
        return rows


def _kept_part(key: str, value: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The rows of a member that `kept` [N] selects; a scalar as it is."""
    if key == "arr_0" or (value.ndim and len(value) != len(kept)):
        raise ValueError(f"{key} {value.shape} is neither a scalar nor an array of {len(kept)} rows")
    return value[kept] if value.ndim else value


def _write_npz(path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray], members: dict[str, np.ndarray],
               comment: bytes) -> None:
    """Write an uncompressed npz with `arr_0`, uint8 of the given shape, from the bytes of its rows in order."""
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.comment = comment
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for chunk in chunks:
                    member.write(chunk.data)
            for key, value in members.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())  # the rows are removed next: the npz must be on the disk by then
