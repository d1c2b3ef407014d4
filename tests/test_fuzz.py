"""Damaged and hostile files: each check by itself, and a small share of `scripts/fuzz.py`."""

import enum
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoregressive.models.gpt import GPT, load_gpt
from tests.conftest import TINY_GPT, command
from utils.checkpoint import read_checkpoint, read_export
from utils.code_map import CodeMap, load_code_map
from utils.config import UserError, to_dict
from utils.files import check_exists, read_json
from utils.images import UnreadableImage, open_images
from utils.npz import NPZ_ERRORS, array_header, array_keys, open_array
from utils.untrusted import check_checkpoint_files, parse_json, printable

KINDS = ("options", "codes", "images", "images_npz", "tokenizer", "gpt", "classifier", "single", "code_map", "mapping", "samples",
         "statistics", "released", "figures", "run", "outputs", "text", "text_gpt", "prompts", "table", "saved", "shards",
         "llamagen")


def test_a_share_of_the_fuzzer_finds_nothing():
    """Any damage is refused in one sentence, harmless, or told: never a traceback, a hang, or another result."""
    done = command("scripts/fuzz.py", "--cases", 42, "--seed", 4, "--kinds", *KINDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "42 cases of seed 4" in done.stdout


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A training checkpoint of a tiny GPT with an optimizer's plain values."""
    gpt = GPT(TINY_GPT)
    folder = tmp_path / "step-00000001"
    dcp.save({"model": gpt.state_dict(), "optimizer": {"lr": 0.1, "betas": (0.9, 0.95)}}, checkpoint_id=folder, no_dist=True)
    description = {"model": to_dict(TINY_GPT)}
    (folder / "config.json").write_text(json.dumps({"kind": "gpt", "model": {}, "options": {}, "export": description}))
    return folder


def change_metadata(folder: Path, change) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


def evil_value(metadata, folder: Path, canary: Path) -> None:
    """Append an object that runs code to a shard, in the place of a plain value."""
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "optimizer.lr")
    held, shard = io.BytesIO(), folder / info.relative_path
    torch.save(Evil(canary), held)
    info.offset, info.length = shard.stat().st_size, len(held.getvalue())
    shard.write_bytes(shard.read_bytes() + held.getvalue())


def test_a_sound_checkpoint_passes(checkpoint):
    """The check must not stand in the way of what training wrote."""
    assert check_checkpoint_files(checkpoint, "--run-dir").state_dict_metadata
    weights = load_gpt(checkpoint).state_dict()
    _, read = read_checkpoint(checkpoint, "gpt", "--gpt-ckpt", tensors=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in read.items())


class EnumsByName(pickle.Pickler):
    """Pickles enumerations as Python before 3.11.4 does, by their members' names; kind: whose attribute is asked for instead."""

    kind: type | None = None

    def reducer_override(self, value):
        """How the next object is taken apart."""
        return (getattr, (self.kind or type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


@pytest.mark.parametrize("kind", [None, torch.Size])
def test_a_checkpoint_of_an_older_python_is_read(checkpoint, kind, monkeypatch):
    """Debian 12's Python pickles enumerations by getattr, which must give their members and nothing else."""
    metadata, written = pickle.loads((checkpoint / ".metadata").read_bytes()), io.BytesIO()
    monkeypatch.setattr(EnumsByName, "kind", kind)
    EnumsByName(written).dump(metadata)
    assert b"getattr" in written.getvalue()
    (checkpoint / ".metadata").write_bytes(written.getvalue())
    if kind is None:
        assert check_checkpoint_files(checkpoint, "--run-dir") == metadata
    else:
        with pytest.raises(UserError, match="an attribute of other than an enumeration"):
            check_checkpoint_files(checkpoint, "--run-dir")


@pytest.mark.parametrize("kind", ["alone", "inside", "value"])
def test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path, kind):
    """torch unpickles the metadata, and the plain values among the shards, without asking."""
    canary = tmp_path / "canary"
    change_metadata(checkpoint, {"alone": lambda metadata: Evil(canary),
                                 "inside": lambda metadata: setattr(metadata, "planner_data", Evil(canary)),
                                 "value": lambda metadata: evil_value(metadata, checkpoint, canary)}[kind])
    for read in (lambda: check_checkpoint_files(checkpoint, "--run-dir"), lambda: load_gpt(checkpoint)):
        with pytest.raises(UserError, match="is no whole training checkpoint and was not opened") as error:
            read()
        assert not canary.exists() and "\n" not in str(error.value)


def first(metadata, kind: str):
    """Some entry of a checkpoint's metadata."""
    entries = metadata.storage_data if kind == "storage" else metadata.state_dict_metadata
    return next(entry for entry in entries.values() if kind == "storage" or hasattr(entry, "size"))


@pytest.mark.parametrize("change", [
    lambda metadata: setattr(first(metadata, "storage"), "relative_path", "../../secret"),
    lambda metadata: setattr(first(metadata, "storage"), "length", 10**12),
    lambda metadata: setattr(first(metadata, "storage"), "offset", -1),
    lambda metadata: setattr(first(metadata, "tensor"), "size", torch.Size([10**9, 10**3])),
    lambda metadata: metadata.storage_data.clear(),
    lambda metadata: {"state_dict_metadata": {}},
])
def test_metadata_that_does_not_fit_its_files(checkpoint, change):
    """Sizes and places come from the file: they must not make torch read elsewhere or take all memory."""
    change_metadata(checkpoint, change)
    with pytest.raises(UserError, match="copy it again, or take an older one"):
        check_checkpoint_files(checkpoint, "--run-dir")


def test_a_flipped_byte_in_a_shard_is_found(checkpoint):
    """A weight with another sign would train on."""
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x80
    shard.write_bytes(data)
    with pytest.raises(UserError, match="checksum|no whole training checkpoint"):
        check_checkpoint_files(checkpoint, "--run-dir")


# --- exported files --------------------------------------------------------------------------------------------------


def rewrite(path: Path, **metadata) -> None:
    """Write a safetensors file again with other metadata; None removes an entry."""
    with safe_open(path, "pt") as file:
        about = file.metadata() | metadata
    save_file(load_file(path), path, metadata={key: value for key, value in about.items() if value is not None})


def described(path: Path, **fields) -> None:
    """Change fields of the model that a file describes, as somebody would who also drops the checksum."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, config=json.dumps(config | {"model": config["model"] | fields}), crc32=None)


@pytest.mark.parametrize("metadata, words", [
    ({"version": "2"}, "written by a newer version of the code"), ({"config": "{"}, "no JSON describes it"),
    ({"config": "[" * 100_000}, "nested too deeply"), ({"config": "[]"}, "no object of objects"),
    ({"config": "{}"}, "does not describe its model"), ({"kind": "\x1b]0;x\x07"}, "holds a \\x1b]0;x\\x07, not a gpt"),
    ({"config": '{"model": {}, "sampling": 5}'}, "no object of objects"), ({"crc32": "00000000"}, "not what its checksum says")])
def test_damaged_descriptions(models, metadata, words):
    """Our own metadata is read as distrustfully as anything else in the file."""
    rewrite(models[0], **metadata)
    with pytest.raises(UserError) as error:
        read_export(models[0], "gpt", "--gpt-ckpt")
    assert words in str(error.value) and str(error.value).startswith(f"--gpt-ckpt {models[0]} ")


@pytest.mark.parametrize("fields, words", [
    ({"dim": "48"}, 'has dim "48" in its GPTConfig, not an integer'), ({"dim": 10**12}, "not an integer from 0"),
    ({"n_layer": 10**9}, "but only"), ({"grid_size": 10**6}, "not an integer from 1 to 512"),
    ({"new_field": 1}, "unknown field new_field"),
    ({"dropout\x1b": 1}, "unknown field dropout\\x1b"), ({"rotary_base": float("nan")}, "not a finite number"),
    ({"codebook_sizes": [8, "x"]}, "has codebook_sizes"), ({"n_head": 0}, "cannot be built"),
    ({"context": "all"}, "one of compressed"),
    ({"dim": 64}, "another size")])
def test_impossible_models(models, fields, words):
    """A description cannot ask for a model that its weights do not fill, nor for more memory than there is."""
    described(models[0], **fields)
    with pytest.raises(UserError) as error:
        load_gpt(models[0])
    assert words in str(error.value) and "--gpt-ckpt" in str(error.value)


def test_a_flipped_weight_is_found(models):
    """safetensors has no checksum of its own: a bad copy would sample on."""
    data = bytearray(models[0].read_bytes())
    data[-1000] ^= 0x40
    models[0].write_bytes(data)
    with pytest.raises(UserError, match="not what its checksum says"):
        load_gpt(models[0])


def test_code_maps_are_checked(tmp_path):
    """A code beyond the codebook is an index error a thousand steps later."""
    for table, sizes in ((np.array([[0], [9]]), (8,)), (np.array([[0], [-1]]), (8,)), (np.zeros((2, 2), np.int64), (8,))):
        CodeMap(table, sizes, "a", "b").save(tmp_path / "map.safetensors")
        with pytest.raises(UserError, match="gives codes from|has no table of"):
            load_code_map(tmp_path / "map.safetensors")


# --- npz and images --------------------------------------------------------------------------------------------------


def member(path: Path, header: str, data: bytes = b"", packing: int = zipfile.ZIP_STORED) -> None:
    """An npz with one array `a` of any header."""
    text = header.encode() + b"\n"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)


@pytest.mark.parametrize("header, data, packing", [
    ("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,)}", b"", zipfile.ZIP_STORED),
    ("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}", b"", zipfile.ZIP_STORED),
    ("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 4)}", b"0000", zipfile.ZIP_STORED),
    ("{'descr': '|u1', 'fortran_order': False, 'shape': (4,)}", b"0000", zipfile.ZIP_LZMA),
    ("(" * 5000, b"", zipfile.ZIP_STORED), ("-" * 9000 + "1", b"", zipfile.ZIP_STORED)])
def test_hostile_arrays(tmp_path, header, data, packing):
    """Nothing is allocated on the word of a header."""
    member(tmp_path / "x.npz", header, data, packing)
    for read in (array_header, open_array):
        with pytest.raises(NPZ_ERRORS):
            read(tmp_path / "x.npz", "a")


def test_zip_bombs(tmp_path):
    """A member that claims more than its packed bytes can hold, and one that would fill the memory."""
    path = tmp_path / "x.npz"
    member(path, "{'descr': '|u1', 'fortran_order': False, 'shape': (1000,)}", bytes(1000), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    place = data.rfind(b"PK\x01\x02")
    data[place + 24:place + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="which no packing gives"):
        open_array(path, "a")


def test_flipped_bytes_in_a_mapped_array(tmp_path):
    """A map reads past the zip's checksum."""
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[300] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match="Bad CRC-32"):
        open_images(tmp_path / "x.npz")


def save_images(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    return folder


def test_a_folder_without_a_readable_image(tmp_path):
    """Found at once, not by replacing images for ever."""
    folder = save_images(tmp_path / "data" / "a", 150)
    for file in folder.iterdir():
        file.write_text("no image")
    with pytest.raises(UserError, match="has no readable image among the 100 that were tried .*check that its images"):
        open_images(tmp_path / "data")
    Image.new("RGB", (8, 8)).save(sorted(folder.iterdir())[0])
    assert len(open_images(tmp_path / "data")) == 150


def test_names_cannot_speak_to_the_terminal(tmp_path):
    """A file name may hold a line end or a terminal sequence: messages show them escaped, and the file is still read."""
    folder = save_images(tmp_path / "data" / "cat\x1b[2J")
    (folder / "1.png").rename(folder / "x\nerror: forged.png")
    source = open_images(tmp_path / "data")
    assert source.class_names == ("cat\\x1b[2J",)
    assert source.name(1).endswith("cat\\x1b[2J/x\\nerror: forged.png") and source.load(1).shape == (8, 8, 3)
    (folder / "x\nerror: forged.png").write_text("")
    with pytest.raises(UnreadableImage) as error:
        source.load(1)
    assert str(error.value).isprintable()
    np.savez(tmp_path / "x.npz", **{"a\x1bb": np.zeros(2)})
    with pytest.raises(UserError, match="only a.x1bb: give") as refused:
        open_images(tmp_path / "x.npz")
    assert str(refused.value).isprintable() and array_keys(tmp_path / "x.npz") == ["a\x1bb"]


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\r" + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("content", [png_of(20_000, 20_000), png_of(2**31 - 1, 2**31 - 1),
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None])
def test_bombs_programs_and_pipes_are_unreadable_images(tmp_path, monkeypatch, content):
    """Also where another library has switched Pillow's own bound off; PostScript would start a program, a pipe wait for ever."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    folder = save_images(tmp_path / "data" / "a")
    source = open_images(tmp_path / "data")
    (folder / "1.png").unlink()
    if content is None:
        os.mkfifo(folder / "1.png")
    else:
        (folder / "1.png").write_bytes(content)
    with pytest.raises(UnreadableImage):
        source.load(1)


@pytest.mark.parametrize("names, words", [(["a"], "has 1 class_names for labels 0 to 1"), ([1, 2], "class_names of type int64"),
                                          ([["a", "b"]], r"shape \(1, 2\), not strings of shape \(2,\)")])
def test_class_names_of_an_npz(tmp_path, names, words):
    """Names for other classes would caption every sample wrongly."""
    arrays = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.array([0, 1])}
    np.savez(tmp_path / "x.npz", **arrays, class_names=np.array(["cat", "owl\x1b"]))
    assert open_images(tmp_path / "x.npz").class_names == ("cat", "owl\\x1b")
    np.savez(tmp_path / "x.npz", **arrays)
    assert open_images(tmp_path / "x.npz").class_names == ()
    np.savez(tmp_path / "x.npz", **arrays, class_names=np.array(names))
    with pytest.raises(UserError, match=words):
        open_images(tmp_path / "x.npz")


# --- names, JSON, paths ----------------------------------------------------------------------------------------------


def test_small_helpers(tmp_path):
    """Escapes, nested JSON, pipes: the parts that every reader shares."""
    assert printable("a\x1b[1m\n\u202eb\udc80é") == "a\\x1b[1m\\n\\u202eb\\udc80é"
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no JSON"):
        read_json(tmp_path / "x.json", "FILE", "figures")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        check_exists(tmp_path / "pipe", "--x", "a file")
