"""What folders of one large memory-mapped array have in common: codes (`code_shards.py`), caption features (`text_shards.py`).

Such a folder holds the array, one or two small arrays with a row for each image, and `header.json`, which says what made them.
None of its files is trusted; `shard_writer.py` writes them.
"""

import json
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from utils.config import UserError
from utils.files import read_json
from utils.row_shares import DONE, MISSING

H = TypeVar("H", bound="ShardHeader")

_WORDS: dict[Any, str] = {list[int]: "a list of integers", int: "a positive integer", bool: "true or false", str: "a string",
                          list[str]: "a list of strings"}


class ShardHeader:
    """Base of the dataclasses that headers are: how messages call what the folder holds, and what every header has."""

    images: int      # rows
    complete: bool
    version: int     # of the folder's layout

    things = ""      # "codes"
    title = ""       # "code header"
    data_file = ""   # "codes.npy"
    command = ""     # the script that writes the folder
    newest = 1       # version

    @classmethod
    def again(cls) -> str:
        """The remedy for a damaged folder."""
        return f"extract the {cls.things} again"

    @property
    def dtype(self) -> np.dtype:
        """Of the large array."""
        raise NotImplementedError

    def as_begun(self: H) -> H:
        """Without what only the end of the extraction knows."""
        return replace(self, complete=False)  # type: ignore[type-var]

    def comparable(self: H, other: H, what: str, source: str) -> dict[str, Any]:
        """The fields that must be the same for one extraction to carry on another's; what, source: the two, for messages."""
        raise NotImplementedError

    def check(self, what: str) -> None:
        """Raise UserError where fields do not fit each other; what: the file, with its option."""


def load_header(kind: type[H], folder: Path, option: str) -> H:
    """The header of a folder, complete or not; raises UserError unless it has the known fields and their types."""
    path, again = folder / "header.json", kind.again()
    if not path.is_file():
        raise UserError(f"{option} {folder} holds no {kind.things} (no header.json): give a folder that {kind.command} wrote.")
    read, what = read_json(path, option, f"the {kind.things}"), f"{option} {path}"
    if not isinstance(read, dict):
        raise UserError(f"{what} is no JSON object with the fields of a {kind.title}: {again}.")
    found: dict[str, Any] = {"version": 1} | read
    if type(found["version"]) is int and found["version"] > kind.newest:
        raise UserError(f"{what} was written by a newer version, {found['version']} where {kind.newest} is known: update this "
                        f"repository or {again}.")
    types = get_type_hints(kind)
    if unknown := sorted(set(found) - set(types)):
        raise UserError(f"{what} has the unknown field {unknown[0]!r}, the known ones being {', '.join(types)}: {again}.")
    for each in fields(kind):  # type: ignore[arg-type]
        absent = each.default is NO_DEFAULT and each.default_factory is NO_DEFAULT
        if each.name not in found and absent:
            raise UserError(f"{what} lacks the field {each.name!r}: {again}.")
        if each.name in found and not _is_of(found[each.name], types[each.name]):
            seen, wanted = json.dumps(found[each.name])[:80], _WORDS[types[each.name]]
            raise UserError(f"{what} has {each.name} {seen}, not {wanted}: {again}.")
    header = kind(**found)
    header.check(what)
    return header


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a field's type; numbers count something and are positive, those in lists not negative."""
    if kind == list[int]:
        return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    if kind == list[str]:
        return isinstance(value, list) and all(type(each) is str for each in value)
    return type(value) is kind and (kind is not int or value > 0)


def complete_header(kind: type[H], folder: Path, option: str) -> H:
    """`load_header` of a folder whose extraction has ended; raises UserError for another."""
    header = load_header(kind, folder, option)
    if not header.complete:
        raise UserError(f"{option} {folder} is an unfinished extraction: run the same {kind.command} command again.")
    return header


def read_state(header: ShardHeader, folder: Path, option: str) -> np.ndarray:
    """The state of every row of a complete folder, uint8 [images]; raises UserError while rows are missing, or for none done."""
    path, again = folder / "state.npy", header.again()
    state = np.array(map_array(path, np.dtype(np.uint8), (header.images,), option, again))
    require_range(state, 3, "state", f"{option} {path}", again)
    if missing := int((state == MISSING).sum()):
        raise UserError(f"{option} {path} says that {missing} of {header.images} images have no {header.things}: run the "
                        f"same {header.command} command again.")
    if not (state == DONE).any():
        raise UserError(f"{option} {folder} has {header.things} of no image, all {header.images} were unreadable: {again} from "
                        "images that can be read.")
    return state


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], option: str, again: str) -> np.memmap:
    """Map an npy file read-only; raises UserError naming `option` unless it is sound, with this dtype and shape, and whole.

    again: the remedy, as `ShardHeader.again` says it.
    """
    if not path.is_file():
        raise UserError(f"{option} {path} does not exist: {again}, or copy the whole folder.")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever numpy raises for what is no npy file
        reason = " ".join(str(error).split())[:200].rstrip(".:") or type(error).__name__
        raise UserError(f"{option} {path} is truncated or no npy file ({reason}): {again}, or copy it again.") from error
    if (array.dtype, array.shape) != (dtype, shape) or np.isfortran(array):
        seen = f"{array.dtype.str} {array.shape}{' in Fortran order' if np.isfortran(array) else ''}"
        raise UserError(f"{option} {path} holds {seen} where header.json says {dtype.str} {shape}: {again}, or copy the whole "
                        "folder.")
    if path.stat().st_size != array.offset + array.nbytes:
        raise UserError(f"{option} {path} has {path.stat().st_size} bytes, not {array.offset + array.nbytes}: {again}, or copy "
                        "it again.")
    return array


def require_range(values: np.ndarray, size: int, what: str, file: str, again: str) -> None:
    """Raise UserError unless all values are in [0, size); again: the remedy."""
    if len(wrong := np.flatnonzero((values < 0) | (values >= size))):
        raise UserError(f"{file} gives image {wrong[0]} the {what} {values[wrong[0]]}, not one of 0 to {size - 1}: {again}, "
                        "or copy it again.")


def require_fit(header: ShardHeader, folder: str | Path, expected: dict[str, tuple[Any, str]],
                option: str = "--code-path") -> None:
    """Raise UserError when a field of the header is not what the model expects.

    expected: {header field: (value, which option or file says so)}; option: the flag that named the folder.
    """
    for field, (value, source) in expected.items():
        seen = getattr(header, field)
        if seen != value:
            raise UserError(f"{option} {folder} has {field} {seen} but {source} says {value}: use {header.things} that fit the "
                            "model, or change the option.")
