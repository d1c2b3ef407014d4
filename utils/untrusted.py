"""Files from elsewhere: checked before anything acts on them, and named so that they cannot speak to the terminal.

No file may run code, ask for more memory than there is, or print control characters.  What a model file says about its model is
checked against the fields of the configuration; a training checkpoint is checked before torch unpickles it.
"""

import dataclasses
import enum
import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from utils.config import UserError

CHECKED_BYTES = 1 << 30  # data up to this size is compared with its checksum; above it would take longer than the work
LARGEST_INTEGER = 2**31  # that a description may hold: beyond it arithmetic on shapes overflows

_METADATA_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("collections", "OrderedDict")}
# What damaged pickles, archives and shapes raise, here and inside torch.
_DAMAGE = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError, ArithmeticError, RuntimeError,
           AssertionError, pickle.UnpicklingError, zipfile.BadZipFile)


def printable(text: object) -> str:
    """Text with every character escaped that is none to read: line ends, terminal sequences, undecodable bytes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def shortened(text: object, length: int = 200) -> str:
    """A message of another library in one printable line, without its final stop."""
    return printable(" ".join(str(text).split()))[:length].rstrip(".") or type(text).__name__


def available_memory() -> int:
    """Bytes that this process may still fill, by the machine's and the container's count; 2^62 where neither is told."""
    found = [2**62]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, ValueError, KeyError):
        pass
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return min(found)


def read_text(path: Path) -> str:
    """Text of a file; raises ValueError if it is no text, OSError if it is no file: a pipe would be read for ever."""
    if not path.is_file():
        raise OSError("it is missing or no file")
    return path.read_text()


def parse_json(text: str | bytes) -> Any:
    """JSON of a file from elsewhere; raises ValueError for anything else, nested without end too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_fields(config: type, values: Any, where: str) -> dict[str, Any]:
    """The fields of a flat dataclass from what a file holds, lists as tuples; those left out keep their defaults.

    Raises UserError naming the first field that is unknown, lacks a default, or has a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {_shown(values)} where {config.__name__} should be: export or copy it again.")
    hints = get_type_hints(config, include_extras=True)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"{where} has the unknown field {printable(unknown[0])} in its {config.__name__}: it was written by "
                        "another version of this code, use that one.")
    found = {}
    for field in dataclasses.fields(config):
        if field.name in values:
            found[field.name] = value = _as_tuple(values[field.name])
            if not _fits(value, hints[field.name]):
                raise UserError(f"{where} has {field.name} {_shown(values[field.name])} in its {config.__name__}, not "
                                f"{_called(hints[field.name])}: export or copy it again.")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} lacks the field {field.name} of its {config.__name__}: export or copy it again.")
    return found


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = printable(json.dumps(value, default=str))
    return text if len(text) <= 60 else f"{text[:60]}..."


def _called(hint: Any) -> str:
    if declared := next((part.text for part in getattr(hint, "__metadata__", ()) if hasattr(part, "text")), None):
        return str(declared)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return {int: f"an integer from 0 to {LARGEST_INTEGER}", float: "a finite number of 0 or more"}.get(
        hint, str(hint).replace("typing.", "") if get_args(hint) else hint.__name__)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a file has the type of its field; numbers are bounded and none is negative."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return _fits(value, parts[0]) and all(part.allows(value) for part in parts[1:] if hasattr(part, "allows"))
    if kind is Literal:
        return value in parts
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(each, parts[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is int:
        return type(value) is int and 0 <= value <= LARGEST_INTEGER
    if hint is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    return isinstance(value, hint)


def _member(kind: Any, name: Any) -> Any:
    """The member of an enumeration, which Python before 3.11.4 pickles as a getattr; raises UnpicklingError for other objects."""
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError("it asks for an attribute of other than an enumeration")
    return kind.__members__[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's metadata and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or dtype that the pickle asks for, where a checkpoint's metadata has it; raises UnpicklingError otherwise."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _METADATA_CLASSES and not (module == "torch" and isinstance(
                getattr(torch, name, None), torch.dtype)):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


def check_checkpoint_files(path: Path, option: str) -> Metadata:
    """The metadata of a training checkpoint, once it is safe for torch to read it.

    torch unpickles `.metadata` and the plain values among the shards; here both are read first, by unpicklers that build data
    only.  Sizes and places of all tensors must fit the files beside it.  Raises UserError, naming `option`, otherwise.
    """
    try:
        if not (path / ".metadata").is_file():  # a pipe would be read for ever
            raise OSError("it has no .metadata")
        with (path / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        _check_metadata(path, metadata)
    except MemoryError as error:
        raise UserError(f"{option} {printable(path)} asks for more memory than there is: take another checkpoint.") from error
    except _DAMAGE as error:
        raise UserError(f"{option} {printable(path)} is no whole training checkpoint and was not opened "
                        f"({shortened(error)}): copy it again, or take an older one.") from error
    return metadata


def _check_metadata(folder: Path, metadata: Any) -> None:
    """Raise one of _DAMAGE unless every entry lies inside the files of the folder and has the size that is said."""
    if type(metadata) is not Metadata:
        raise ValueError("its metadata is of another kind")
    sizes: dict[str, int] = {}
    stored: set[tuple[str, Any]] = set()
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if not isinstance(name, str) or os.path.basename(name) != name or not (folder / name).is_file():
            raise ValueError(f"its part {name} is missing or lies elsewhere")
        sizes[name] = sizes.get(name) or (folder / name).stat().st_size
        place = info.offset, info.length
        if not all(type(each) is int for each in place) or not 0 <= place[0] < sum(place) <= sizes[name]:
            raise ValueError(f"{index.fqn} lies outside of {name}")
        if info.transform_descriptors:
            raise ValueError(f"{index.fqn} is transformed")
        stored.add((index.fqn, None if index.offset is None else tuple(index.offset)))
    total = sum(sizes.values())
    for name, entry in metadata.state_dict_metadata.items():
        places = [None] if isinstance(entry, BytesStorageMetadata) else [tuple(chunk.offsets) for chunk in entry.chunks]
        if any((name, place) not in stored for place in places):
            raise ValueError(f"{name} is missing")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry, total)
    values = {name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    for index, info in metadata.storage_data.items():
        if index.fqn in values or index.offset is None or total <= CHECKED_BYTES:
            _check_slice(folder, index.fqn, info, plain=index.fqn in values or index.offset is None)


def _check_tensor(name: str, entry: TensorStorageMetadata, total: int) -> None:
    """Raise ValueError for a tensor larger than all files, or whose pieces are not the whole of it."""
    count = math.prod(entry.size)
    pieces = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if min(entry.size, default=1) < 0 or count * entry.properties.dtype.itemsize > total or pieces != count:
        raise ValueError(f"{name} has the size {tuple(entry.size)}, which its parts do not have")


def _check_slice(folder: Path, name: str, info: Any, plain: bool) -> None:
    """Raise one of _DAMAGE unless an entry is an archive of stored, whole members; plain: its value is read too."""
    with (folder / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        data = io.BytesIO(file.read(info.length))
    with zipfile.ZipFile(data) as archive:
        if any(each.compress_type != zipfile.ZIP_STORED or each.file_size > info.length for each in archive.infolist()):
            raise ValueError(f"{name} is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"{name} has other data than its checksum says, in {damaged}")
    if plain:
        data.seek(0)
        torch.load(data, map_location="cpu", weights_only=True)
