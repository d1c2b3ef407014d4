"""Damage for `fuzz.py`: what a file may have suffered, or what somebody may have put into it.

A damage is a function of the copy of a file or folder and a random generator; it changes the copy in place, and raises Skip where
it does not apply.  A hostile pickle makes the folder CANARY; hostile names carry MARKER, which must not reach a terminal.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MARKER = "evil\x1b]0;fuzz\x07\nforged"
CANARY = Path("/nonexistent")  # set by fuzz.py, a folder of its own
SENSELESS: tuple[Any, ...] = (None, -1, 10**12, 10**30, "x", "", [], [-1], {}, True, float("nan"), float("inf"),
                               MARKER, [[1]], 0.5)

Damage = Callable[[Path, random.Random], None]


class Skip(Exception):
    """The damage does not apply to this file."""


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle stores instead of the object."""
        return os.mkdir, (str(CANARY),)


def torch_bytes(value: Any) -> bytes:
    """What torch.save writes of a value."""
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


def _rewrite(change: Callable[[bytes, random.Random], bytes]) -> Damage:
    return lambda path, rng: (path.write_bytes(change(path.read_bytes(), rng)), None)[1]


def _flip(data: bytes, rng: random.Random, low: float, high: float) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 3, 9))):
        place = min(int(rng.uniform(low, high) * len(found)), len(found) - 1)
        found[place] ^= rng.randrange(1, 256)
    return bytes(found)


def _replaced(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        path.unlink()
        make(path)
    return damage


def swap(path: Path, rng: random.Random) -> None:
    """Put a file of another kind in the place."""
    others = [other for other in (CANARY.parent / "pristine").rglob("*") if other.is_file() and other.suffix != path.suffix]
    shutil.copy(rng.choice(sorted(others)), path)


ANY: dict[str, Damage] = {
    "truncated": _rewrite(lambda data, rng: data[:rng.randrange(len(data))]),
    "empty": _rewrite(lambda data, rng: b""),
    "junk": _rewrite(lambda data, rng: rng.randbytes(rng.choice((7, 300, 5000)))),
    "text": _rewrite(lambda data, rng: b"<html>404</html>\n"),
    "longer": _rewrite(lambda data, rng: data + rng.randbytes(100)),
    "head flipped": _rewrite(lambda data, rng: _flip(data, rng, 0, min(1, 200 / max(len(data), 1)))),
    "body flipped": _rewrite(lambda data, rng: _flip(data, rng, 0.1, 1)),
    "tail flipped": _rewrite(lambda data, rng: _flip(data, rng, max(0, 1 - 200 / max(len(data), 1)), 1)),
    "swapped": swap,
    "deleted": lambda path, rng: path.unlink(),
    "folder": _replaced(lambda path: path.mkdir()),
    "link to itself": _replaced(lambda path: path.symlink_to(path)),
    "link to nowhere": _replaced(lambda path: path.symlink_to("/nowhere/at/all")),
    "link to zeros": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "pipe": _replaced(lambda path: os.mkfifo(path)),
    "pickle": _rewrite(lambda data, rng: pickle.dumps(Evil())),
    "torch pickle": _rewrite(lambda data, rng: torch_bytes({"model": Evil()})),
}


def change_json(value: Any, rng: random.Random) -> Any:
    """JSON with one place changed to what cannot be meant: missing, unknown, of another type, or out of range."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.1:
        return rng.choice(SENSELESS)
    node, key = rng.choice(places)
    kind = rng.choice(("missing", "unknown", "senseless", "senseless"))
    if kind == "missing":
        del node[key]
    elif kind == "unknown" and isinstance(node, dict):
        node[rng.choice(("unknown", MARKER))] = 1
    else:
        node[key] = rng.choice([each for each in SENSELESS if type(each) is not type(node[key]) or each in (-1, 10**12, 10**30)
                                or each != each])
    return value


def json_field(path: Path, rng: random.Random) -> None:
    """Change one value of a JSON file, or of one line."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    row = rng.randrange(len(lines))
    lines[row] = json.dumps(change_json(json.loads(lines[row]), rng))
    path.write_text("\n".join(lines) + "\n")


JSON: dict[str, Damage] = {
    "field": json_field, "field again": json_field, "one more field": json_field,
    "nested": _rewrite(lambda data, rng: b"[" * 100_000), "number": _rewrite(lambda data, rng: b"1" * 10_000),
    "not text": _rewrite(lambda data, rng: b"\xff\xfe" + data)}


def tensors_changed(change: Callable[[dict[str, torch.Tensor], random.Random], object]) -> Damage:
    """A change of the tensors in a safetensors or torch file, without the checksum."""
    def damage(path: Path, rng: random.Random) -> None:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = dict(file.metadata())
            about.pop("crc32", None)
            tensors = load_file(path)
            change(tensors, rng)
            save_file(tensors, path, metadata=about)
        else:
            loaded = torch.load(path, weights_only=True)
            if not isinstance(loaded, dict):
                raise Skip
            change(loaded["model"], rng)
            torch.save(loaded, path)
    return damage


def _put(value: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def change(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
        name = rng.choice(sorted(tensors))
        tensors[name] = value(tensors[name])
    return tensors_changed(change)


TENSORS: dict[str, Damage] = {
    "tensor missing": tensors_changed(lambda tensors, rng: tensors.pop(rng.choice(sorted(tensors)))),
    "tensor added": tensors_changed(lambda tensors, rng: tensors.update({MARKER: torch.zeros(2)})),
    "tensor longer": _put(lambda tensor: torch.cat([tensor.reshape(-1), tensor.reshape(-1)])),
    "tensor empty": _put(lambda tensor: tensor[:0] if tensor.ndim else torch.empty(0)),
    "tensor of other type": _put(lambda tensor: tensor.to(torch.int32) if tensor.is_floating_point() else tensor.double()),
    "tensor not finite": _put(lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor - 999),
    "no tensors": tensors_changed(lambda tensors, rng: tensors.clear())}


def metadata_changed(change: Callable[[dict[str, Any], random.Random], object], checksum: bool = False) -> Damage:
    """A change of what a safetensors file says about itself."""
    def damage(path: Path, rng: random.Random) -> None:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = dict(file.metadata())
        if not checksum:
            about.pop("crc32", None)
        change(about, rng)
        save_file(load_file(path), path, metadata=about)
    return damage


def _config(about: dict[str, Any], rng: random.Random) -> None:
    about["config"] = json.dumps(change_json(json.loads(about["config"]), rng))


SAFETENSORS: dict[str, Damage] = TENSORS | {
    f"description {number}": metadata_changed(_config, checksum=number == 0) for number in range(6)} | {
    "kind missing": metadata_changed(lambda about, rng: about.pop("kind")),
    "kind": metadata_changed(lambda about, rng: about.update(kind=rng.choice(("", "gpt2", MARKER)))),
    "description missing": metadata_changed(lambda about, rng: about.pop("config")),
    "description cut": metadata_changed(lambda about, rng: about.update(config=about["config"][:rng.randrange(40)])),
    "newer version": metadata_changed(lambda about, rng: about.update(version=rng.choice(("2", "99", "x", MARKER)))),
    "huge header": _rewrite(lambda data, rng: struct.pack("<Q", rng.choice((2**63, 2**40, 90_000_000))) + data[8:])}


def npy_bytes(header: str, data: bytes) -> bytes:
    """An npy file with any header."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


HEADERS = ("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,)}",
           "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4)}", "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 1e3)}", "(" * 5000, "-" * 5000 + "1", "{'descr': '|u1'",
           "{'descr': '|V2147483647', 'fortran_order': False, 'shape': (4294967296, 4294967296)}", "[]", "\x1b]0;fuzz\x07")


def npy_changed(change: Callable[[np.ndarray, random.Random], np.ndarray]) -> Damage:
    """A change of an npy file's array."""
    return lambda path, rng: np.save(path, change(np.load(path), rng))


NPY: dict[str, Damage] = {
    "header": _rewrite(lambda data, rng: npy_bytes(rng.choice(HEADERS), data[128:])),
    "objects": npy_changed(lambda array, rng: np.array([Evil()], object)),
    "type": npy_changed(lambda array, rng: array.astype(rng.choice((np.float64, np.int8, np.complex64, "U3")))),
    "shape": npy_changed(lambda array, rng: rng.choice((array[:-1], array[None], array.reshape(-1)[:3]))),
    "largest": npy_changed(lambda array, rng: np.full_like(array, np.iinfo(array.dtype).max)),
    "smallest": npy_changed(lambda array, rng: np.full_like(array, np.iinfo(array.dtype).min))}


def npz_changed(change: Callable[[dict[str, np.ndarray], str, random.Random], object]) -> Damage:
    """A change of the arrays of an npz, of which one is drawn."""
    def damage(path: Path, rng: random.Random) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        change(arrays, rng.choice(sorted(arrays)), rng)
        np.savez(path, **arrays)  # type: ignore[arg-type]
    return damage


def npz_member(path: Path, rng: random.Random) -> None:
    """Replace a member by one with a damaged header, an encrypted one, one of another packing, or a bomb."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name, kind = rng.choice(sorted(members)), rng.choice(("header", "header", "bomb", "packing", "encrypted", "patched"))
    if kind == "header":
        members[name] = npy_bytes(rng.choice(HEADERS), members[name][128:])
    if kind == "bomb":
        members[name] = npy_bytes("{'descr': '|u1', 'fortran_order': False, 'shape': (3000, 100, 100, 3)}", bytes(30_000_000))
    packings = {"packing": zipfile.ZIP_LZMA, "bomb": zipfile.ZIP_DEFLATED, "patched": zipfile.ZIP_DEFLATED}
    packing = packings.get(kind, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "w", packing) as archive:
        for key, data in members.items():
            archive.writestr(key, data)
    packed = bytearray(path.read_bytes())
    place = packed.rfind(b"PK\x01\x02")
    if kind == "encrypted":
        packed[place + 8] |= 1
    if kind == "patched":
        packed[place + 24:place + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(packed)


NPZ: dict[str, Damage] = {
    "member": npz_member, "other member": npz_member, "third member": npz_member,
    "objects": npz_changed(lambda arrays, key, rng: arrays.update({key: np.array([Evil()], object)})),
    "missing": npz_changed(lambda arrays, key, rng: arrays.pop(key)),
    "renamed": npz_changed(lambda arrays, key, rng: arrays.update({MARKER: arrays.pop(key)})),
    "type": npz_changed(lambda arrays, key, rng: arrays.update(
        {key: np.zeros(arrays[key].shape, rng.choice(("M8[s]", "S4", "c8")))})),
    "shape": npz_changed(lambda arrays, key, rng: arrays.update({key: arrays[key][None]})),
    "shorter": npz_changed(lambda arrays, key, rng: arrays.update({key: arrays[key].reshape(-1)[1:]})),
    "not finite": npz_changed(lambda arrays, key, rng: arrays.update({key: np.full(arrays[key].shape, np.nan)})),
    "negative": npz_changed(lambda arrays, key, rng: arrays.update({key: np.full(arrays[key].shape, -7)})),
    "huge": npz_changed(lambda arrays, key, rng: arrays.update({key: np.full(arrays[key].shape, 2**62)})),
    "names": npz_changed(lambda arrays, key, rng: arrays.update(class_names=np.array([MARKER] * rng.choice((1, 3, 9)))))}


def torch_file(value: Callable[[Any], Any]) -> Damage:
    """A torch file that holds something else."""
    return lambda path, rng: torch.save(value(torch.load(path, weights_only=True)), path)


PT: dict[str, Damage] = TENSORS | {
    "number": torch_file(lambda held: 5), "list": torch_file(lambda held: [held]),
    "nested": torch_file(lambda held: {"model": {"model": 1}}),
    "floats": torch_file(lambda held: held.double() if isinstance(held, torch.Tensor) else {"model": 0.5}),
    "not one to one": torch_file(lambda held: held * 0 if isinstance(held, torch.Tensor) else {1: 2})}


def metadata_file(change: Callable[[Any, Path, random.Random], Any]) -> Damage:
    """A change of a checkpoint's unpickled metadata; what `change` returns is pickled instead, None: the same object."""
    def damage(path: Path, rng: random.Random) -> None:
        metadata = pickle.loads(path.read_bytes())
        other = change(metadata, path, rng)
        path.write_bytes(pickle.dumps(metadata if other is None else other))
    return damage


def evil_value(metadata: Any, path: Path, rng: random.Random) -> None:
    """Store an object that runs code as one of the plain values among the shards."""
    index = rng.choice([index for index in metadata.storage_data if index.offset is None])
    info, held = metadata.storage_data[index], torch_bytes(Evil())
    shard = path.parent / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(held)
    with shard.open("ab") as file:
        file.write(held)


def _drop(entries: dict[Any, Any], rng: random.Random) -> None:
    del entries[rng.choice(list(entries))]


def _any_info(metadata: Any, rng: random.Random) -> Any:
    return metadata.storage_data[rng.choice(list(metadata.storage_data))]


def _any_tensor(metadata: Any, rng: random.Random) -> Any:
    return rng.choice([entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "size")])


METADATA: dict[str, Damage] = {
    "evil value": metadata_file(evil_value), "evil value again": metadata_file(evil_value),
    "evil inside": metadata_file(lambda metadata, path, rng: setattr(metadata, "planner_data", Evil())),
    "evil alone": metadata_file(lambda metadata, path, rng: Evil()),
    "other object": metadata_file(lambda metadata, path, rng: {"state_dict_metadata": {}}),
    "outside": metadata_file(lambda metadata, path, rng: setattr(_any_info(metadata, rng), "relative_path", "../../../secret")),
    "beyond": metadata_file(lambda metadata, path, rng: setattr(_any_info(metadata, rng), "length", 10**12)),
    "negative": metadata_file(lambda metadata, path, rng: setattr(_any_info(metadata, rng), "offset", -5)),
    "huge": metadata_file(lambda metadata, path, rng: setattr(_any_tensor(metadata, rng), "size", torch.Size([10**6, 10**6]))),
    "entry missing": metadata_file(lambda metadata, path, rng: _drop(metadata.storage_data, rng)),
    "tensor missing": metadata_file(lambda metadata, path, rng: _drop(metadata.state_dict_metadata, rng))}


def png_claim(data: bytes, rng: random.Random) -> bytes:
    """A PNG that says it has billions of pixels."""
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zipfile.crc32(header)) + data[33:]  # type: ignore[attr-defined]


IMAGE: dict[str, Damage] = {
    "claims": _rewrite(png_claim),
    "program": _rewrite(lambda data, rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n"),
    "name": lambda path, rng: (path.with_name(f"{MARKER}.png").write_bytes(b"no image"), None)[1]}


def _all_images(path: Path, rng: random.Random) -> None:
    for file in path.rglob("*.png"):
        file.write_bytes(b"no image")


def _unprintable_class(path: Path, rng: random.Random) -> None:
    """A class whose name would speak to the terminal, with an image that cannot be read."""
    (path / "class0").rename(path / MARKER)
    (path / MARKER / "x.png").touch()


def _flat(path: Path, rng: random.Random) -> None:
    """Images without class folders."""
    for file in sorted(path.rglob("*.png")):
        file.rename(path / file.name)
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        folder.rmdir()


IMAGE_FOLDER: dict[str, Damage] = {
    "no image readable": _all_images,
    "empty class": lambda path, rng: (path / MARKER).mkdir(),
    "class name": _unprintable_class,
    "class linked to itself": lambda path, rng: (path / "class9").symlink_to(path / "class9"),
    "flat": _flat}

BY_SUFFIX: dict[str, dict[str, Damage]] = {".json": JSON, ".jsonl": JSON, ".safetensors": SAFETENSORS, ".npy": NPY, ".npz": NPZ,
                                           ".pt": PT, ".png": IMAGE, ".metadata": METADATA}


def damages_of(path: Path) -> dict[str, Damage]:
    """All damages that a file or folder can have."""
    if path.is_dir():
        return IMAGE_FOLDER
    return ANY | BY_SUFFIX.get(path.suffix or path.name, {})
