"""Damage of `fuzz.py` to data sets in tables and tar shards, beside what any file may suffer (`fuzz_damage.py`)."""

import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scripts import fuzz_damage
from scripts.fuzz_damage import MARKER, Damage, Skip, change_json

FEATURES = b"huggingface"  # key of the schema's metadata under which `datasets` keeps the types of columns


def _table(change: Callable[[pa.Table, random.Random], pa.Table]) -> Damage:
    """A change of a parquet file's table."""
    return lambda path, rng: pq.write_table(change(pq.read_table(path), rng), path)


def _column(name: str, values: Callable[[list[Any], random.Random], list[Any]], plain: bool = False) -> Damage:
    """Other values of a column; plain: of whatever type they have, and without what the file says of types."""
    def change(table: pa.Table, rng: random.Random) -> pa.Table:
        found = pa.array(values(table[name].to_pylist(), rng), None if plain else table.schema.field(name).type)
        place = table.column_names.index(name)
        return table.set_column(place, name, found).replace_schema_metadata(None if plain else table.schema.metadata)
    return _table(change)


def _one(value: Any) -> Callable[[list[Any], random.Random], list[Any]]:
    """One value replaced."""
    def change(values: list[Any], rng: random.Random) -> list[Any]:
        values[rng.randrange(len(values))] = value
        return values
    return change


def _features(table: pa.Table, rng: random.Random) -> pa.Table:
    about = json.loads(table.schema.metadata[FEATURES])
    return table.replace_schema_metadata({FEATURES: json.dumps(change_json(about, rng)).encode()})


def _footer(path: Path, rng: random.Random) -> None:
    """Another length of the metadata at the end."""
    data = bytearray(path.read_bytes())
    data[-8:-4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, len(data))))
    path.write_bytes(data)


PARQUET: dict[str, Damage] = {
    "footer": _footer, "features": _table(_features), "features again": _table(_features), "more features": _table(_features),
    "column missing": _table(lambda table, rng: table.drop_columns(rng.choice(table.column_names))),
    "column renamed": _table(
        lambda table, rng: table.rename_columns([MARKER, *table.column_names[1:]]).replace_schema_metadata()),
    "column twice": _table(lambda table, rng: table.append_column("img", table["image"]).replace_schema_metadata()),
    "no rows": _table(lambda table, rng: table.slice(0, 0)),
    "label negative": _column("label", _one(-7)), "label huge": _column("label", _one(2**62), plain=True),
    "label null": _column("label", _one(None)),
    "labels of floats": _column("label", lambda values, rng: [0.5] * len(values), True),
    "image null": _column("image", _one(None)), "no bytes": _column("image", _one({"bytes": None, "path": None})),
    "image elsewhere": _column("image", _one({"bytes": None, "path": "/dev/zero"})),
    "no image": _column("image", _one({"bytes": b"no image", "path": MARKER})),
    "images of numbers": _column("image", lambda values, rng: list(range(len(values))), True)}


def _tar(change: Callable[[dict[str, bytes], random.Random], dict[str, bytes]], mode: str = "w") -> Damage:
    """A change of the members of a shard."""
    def damage(path: Path, rng: random.Random) -> None:
        with tarfile.open(path) as archive:
            held = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            for name, content in change(held, rng).items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
    return damage


def _member(suffix: str, *contents: bytes) -> Damage:
    """Another content of a member."""
    def change(held: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
        held[rng.choice([name for name in held if name.endswith(suffix)])] = rng.choice(contents)
        return held
    return _tar(change)


def _lost(suffix: str) -> Damage:
    """A member is missing."""
    def change(held: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
        del held[rng.choice([name for name in held if name.endswith(suffix)])]
        return held
    return _tar(change)


TAR: dict[str, Damage] = {
    "label senseless": _member(".cls", b"", b"x", b"-1", b"9" * 30, b"1.5", b"\xff", b"0x1", MARKER.encode()),
    "label missing": _lost(".cls"), "image damaged": _member(".png", b"", b"no image"),
    "compressed": _tar(lambda held, rng: held, "w:gz"),
    "named": _tar(lambda held, rng: {f"{MARKER}/{name}": content for name, content in held.items()}),
    "no images": _tar(lambda held, rng: {name: content for name, content in held.items() if name.endswith(".cls")})}


def _fewer_names(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines()
    if len(lines) < 2:
        raise Skip
    path.write_text("\n".join(lines[:-1]))


NAMES: dict[str, Damage] = {
    "fewer names": _fewer_names,
    "names of control": lambda path, rng: (path.write_text(f"{MARKER}\n" * 9), None)[1]}

BY_SUFFIX = {".parquet": PARQUET, ".tar": TAR, ".txt": NAMES}


def damages_of(path: Path) -> dict[str, Damage]:
    """All damages that a file or folder can have."""
    return fuzz_damage.damages_of(path) | ({} if path.is_dir() else BY_SUFFIX.get(path.suffix, {}))
