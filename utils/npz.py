"""Arrays of npz files, read without loading what is not needed: `open_array` maps an uncompressed array.

A file from elsewhere can neither run code nor ask for more memory than there is: what its headers say is compared with the size
of the data before anything is allocated.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.untrusted import CHECKED_BYTES, available_memory

# RuntimeError: an encrypted member.
NPZ_ERRORS = (OSError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)

_LOCAL_HEADER_BYTES = 30  # fixed part of a zip member's header; name and extra field follow
_DEFLATE_RATIO = 1032     # no deflated data unpacks to more than this times its size
_HEADER_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError, MemoryError,
                  tokenize.TokenError)


def array_header(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one array, read without its data; raises KeyError if it is missing, NPZ_ERRORS if damaged."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        _check_sizes(archive, info)
        with archive.open(info) as member:
            shape, _, dtype = read_header(member, info.file_size)
    return shape, dtype


def array_checksum(path: Path, key: str) -> int:
    """CRC-32 of one array as the npz states it; raises KeyError if it is missing, NPZ_ERRORS if the file is damaged."""
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{key}.npy").CRC


def array_keys(path: Path) -> list[str]:
    """Names of the arrays in an npz; raises one of NPZ_ERRORS if the file is no sound npz.

    They may hold any character: `printable` makes them fit for a message.
    """
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def open_array(path: Path, key: str) -> np.ndarray:
    """Open one array of an npz: a read-only memory map if it is stored uncompressed, otherwise loaded whole.

    Data up to 1 GiB is compared with its checksum; beyond that a map is taken as it is.  Raises KeyError if the npz has no `key`,
    one of NPZ_ERRORS if the file is no sound npz, holds Python objects, or unpacks to more than the memory holds.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
        _check_sizes(archive, info)
        with archive.open(info) as member:
            shape, fortran_order, dtype = read_header(member, info.file_size)
            if dtype.hasobject:
                raise ValueError(f"{key} holds Python objects")
            header_bytes = member.tell()
            order: Literal["C", "F"] = "F" if fortran_order else "C"
            if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
                if info.file_size > available_memory() // 2:
                    raise ValueError(f"{key} unpacks to {info.file_size / 2**30:.1f} GiB, more than half of the free memory")
                data = np.frombuffer(bytearray(member.read()), dtype)  # reads to the end, which checks the checksum
                return data.reshape(shape, order=order)
            if info.file_size <= CHECKED_BYTES:
                while member.read(1 << 24):
                    pass
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(_LOCAL_HEADER_BYTES))
    offset = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, "r", offset, shape, order)


def read_small(path: Path, key: str, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    """An array of a known shape in memory; kinds: numpy's letters of the types that fit, such as "f".

    Raises as `open_array` does, and ValueError for another shape or type.
    """
    found, dtype = array_header(path, key)
    if found != shape or dtype.kind not in kinds:
        raise ValueError(f"{key} is of type {dtype} and shape {found}, not {shape}")
    return np.array(open_array(path, key))


def _check_sizes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raise ValueError for a member that is larger than its packed data can be, or packed otherwise than numpy does."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"its arrays are packed by method {info.compress_type}, not as np.savez or np.savez_compressed do")
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        raise ValueError(f"an array stored in {info.compress_size} bytes claims {info.file_size}")
    if info.file_size > _DEFLATE_RATIO * info.compress_size + 1024:
        raise ValueError(f"an array packed in {info.compress_size} bytes claims to hold {info.file_size}, which no packing gives")


def read_header(member: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an npy file, open at its beginning and of `size` bytes, whose data is as long as they say.

    Python objects are of no known length.  Raises ValueError for anything else.
    """
    try:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(member)
        else:
            raise ValueError(f"npy format {version} holds no plain numbers")
    except _HEADER_ERRORS as error:
        raise ValueError(f"an array's header is damaged: {' '.join(str(error).split())[:120]}") from error
    if dtype.hasobject:  # of no known size: the caller refuses it
        return shape, fortran_order, dtype
    wanted, there = math.prod(shape) * dtype.itemsize, size - member.tell()
    if any(isinstance(side, bool) or side < 0 for side in shape) or wanted != there:
        raise ValueError(f"an array of shape {shape} and type {dtype} would be {wanted} bytes, but {there} are there")
    return shape, fortran_order, dtype
