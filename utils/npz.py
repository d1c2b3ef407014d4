"""Arrays of npz files, read without loading what is not needed: `open_array` maps an uncompressed array."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

NPZ_ERRORS = (OSError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError)

_LOCAL_HEADER_BYTES = 30  # fixed part of a zip member's header; name and extra field follow


def array_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one array, read without its data; raises KeyError if it is missing, NPZ_ERRORS if damaged."""
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
