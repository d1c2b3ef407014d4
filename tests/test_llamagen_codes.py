"""LlamaGen's folders of codes, a file for each image, as one code folder (scripts/llamagen_codes.py)."""

import dataclasses
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from autoregressive.train import train_c2i
from scripts import llamagen_codes
from tests.conftest import TINY_VQ, call, command, losses
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import row_shares
from utils.checkpoint import export, fingerprint
from utils.code_shards import CodeDataset, open_codes, read_joint_header
from utils.code_writer import CodeWriter

COUNT = 12


@pytest.fixture
def tokenizers(tmp_path) -> dict[int, Path]:
    """Random tokenizers by their number of codebooks: 16 codes, and 8 and 16."""
    found = {}
    for streams, config in ((1, dataclasses.replace(TINY_VQ, quantizer="single", codebook_sizes=(16,))), (2, TINY_VQ)):
        torch.manual_seed(streams)
        tensors = VQModel(config).state_dict()
        found[streams] = tmp_path / f"tokenizer{streams}.safetensors"
        about = {"model": asdict(config), "stage": "dual", "fingerprint": fingerprint(tensors)}
        export(found[streams], "tokenizer", tensors, about)
    return found


def write_codes(folder: Path, shape: tuple[int, ...] = (1, 10, 16), count: int = COUNT, dtype: type = np.int64) -> np.ndarray:
    """Codes and labels as LlamaGen's extract_codes_c2i.py saves them; returns the codes [count, *shape]."""
    codes: np.ndarray = np.random.default_rng(0).integers(0, 8, (count, *shape)).astype(dtype)
    for name in ("codes", "labels"):
        (folder / f"imagenet32_{name}").mkdir(parents=True)
    for number in range(count):
        np.save(folder / "imagenet32_codes" / f"{number}.npy", codes[number])
        np.save(folder / "imagenet32_labels" / f"{number}.npy", np.array([number % 3]))
    return codes


def options(folder: Path, tokenizer: Path, out: Path, *more) -> list:
    """Command line of a conversion."""
    return [folder / "imagenet32_codes", folder / "imagenet32_labels", "--vq-ckpt", tokenizer, "--code-path", out, *more]


def refused(capsys, *arguments) -> str:
    """The one sentence of a conversion that must be refused, which may follow a progress bar."""
    with pytest.raises(SystemExit) as stopped:
        call(llamagen_codes.main, *arguments)
    *before, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and error.startswith("error: ") and error.endswith(".") and "Traceback" not in "".join(before)
    return error


@pytest.mark.parametrize("shape, streams, crops, augmentation, dtype", [
    ((1, 10, 16), 1, 10, "ten-crop 1.05", np.int64), ((1, 2, 16), 1, 2, "flip", np.int32), ((2, 16), 1, 2, "flip", np.int64),
    ((1, 16), 1, 1, "none", np.uint16), ((16,), 1, 1, "none", np.int64), ((2, 1, 10, 16), 2, 10, "ten-crop 1.05", np.int64),
    ((1, 1, 2, 16), 1, 2, "flip", np.int64), ((1, 7, 16), 1, 7, "7 crops", np.int64)])
def test_codes_of_every_shape_become_rows(tmp_path, tokenizers, shape, streams, crops, augmentation, dtype):
    """LlamaGen's ten crops and mirrored pairs, and IAR2's two codebooks: image n is row n, crop by crop and stream by stream."""
    written = write_codes(tmp_path / "from", shape, dtype=dtype)
    call(llamagen_codes.main, *options(tmp_path / "from", tokenizers[streams], tmp_path / "codes", "--crop-range", 1.05))
    header, codes, labels, state = open_codes(tmp_path / "codes")
    expected = written.reshape(COUNT, streams, crops, 16).transpose(0, 2, 1, 3)
    assert np.array_equal(codes, expected) and labels.tolist() == [number % 3 for number in range(COUNT)] and (state == 1).all()
    assert (header.grid_size, header.image_size, header.num_classes, header.augmentation) == (4, 32, 3, augmentation)
    assert header.tokenizer == fingerprint(load_file(tokenizers[streams]))
    assert header.codebook_sizes == {1: [16], 2: [8, 16]}[streams]


def test_converted_codes_train_a_gpt(tmp_path, tokenizers):
    """The purpose of it all: two folders of other crops of the same images, as LlamaGen mixes them, train like our own."""
    folders = []
    for seed, name in enumerate(("wide", "tight")):
        write_codes(tmp_path / name, (1, 10, 16))
        folders.append(tmp_path / f"codes-{name}")
        call(llamagen_codes.main, *options(tmp_path / name, tokenizers[1], folders[seed], "--crop-range", 1.1 - 0.05 * seed))
    assert len(CodeDataset(*folders)) == COUNT and read_joint_header(folders).crops == 10
    call(train_c2i.main, "--code-path", *folders, "--run-dir", tmp_path / "run", "--gpt-model", "GPT-tiny", "--codebook-sizes",
         16, "--image-size", 32, "--downsample-size", 8, "--num-classes", 3, "--global-batch-size", 6, "--steps", 2,
         "--log-every", 1, "--num-workers", 0, "--device", "cpu", "--data-parallel", "none")
    assert len(losses(tmp_path / "run")) == 2


def test_an_interrupted_conversion_reads_no_codes_again(tmp_path, tokenizers, monkeypatch):
    """A million small files on a network file system take an hour: what was read before a kill stays read."""
    monkeypatch.setattr(llamagen_codes, "_AT_ONCE", 4)
    monkeypatch.setattr(llamagen_codes, "_PROBES", 1)
    monkeypatch.setattr(row_shares, "_FEWEST_ROWS", 4)
    written, write, calls = write_codes(tmp_path / "from"), CodeWriter.write, list[np.ndarray]()

    def stopping(self, rows: np.ndarray, codes: np.ndarray) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        write(self, rows, codes)

    monkeypatch.setattr(CodeWriter, "write", stopping)
    with pytest.raises(SystemExit):
        call(llamagen_codes.main, *options(tmp_path / "from", tokenizers[1], tmp_path / "codes"))
    calls.clear()
    call(llamagen_codes.main, *options(tmp_path / "from", tokenizers[1], tmp_path / "codes"))
    assert [rows.tolist() for rows in calls] == [[8, 9, 10, 11]]
    assert np.array_equal(open_codes(tmp_path / "codes").codes[:, :, 0], written[:, 0])


def test_processes_share_the_files(tmp_path, tokenizers):
    """A network file system answers many readers sooner than one; the result is the same file."""
    write_codes(tmp_path / "from")
    command("scripts/llamagen_codes.py", *options(tmp_path / "from", tokenizers[1], tmp_path / "two"), processes=2)
    call(llamagen_codes.main, *options(tmp_path / "from", tokenizers[1], tmp_path / "one"))
    for name in ("codes.npy", "labels.npy", "state.npy", "header.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_images_that_several_gpus_repeated_are_left_out(tmp_path, tokenizers, capsys):
    """1,281,167 images on eight GPUs are 1,281,168 files, the last of which is the first image again: it would count twice."""
    written = write_codes(tmp_path / "from")
    for kind in ("codes", "labels"):
        folder = tmp_path / "from" / f"imagenet32_{kind}"
        for number in range(2):
            (folder / f"{COUNT + number}.npy").write_bytes((folder / f"{number}.npy").read_bytes())
    call(llamagen_codes.main, *options(tmp_path / "from", tokenizers[1], tmp_path / "codes"))
    assert "the last 2 of 14 images are the first ones again" in capsys.readouterr().err
    assert np.array_equal(open_codes(tmp_path / "codes").codes[:, :, 0], written[:, 0])


def test_classes_that_do_not_occur_are_counted_when_they_are_named(tmp_path, tokenizers):
    """Codes of a part of ImageNet still belong to a model of 1,000 classes."""
    write_codes(tmp_path / "from")
    call(llamagen_codes.main, *options(tmp_path / "from", tokenizers[1], tmp_path / "codes", "--num-classes", 1000))
    assert open_codes(tmp_path / "codes").header.num_classes == 1000


def replace(kind: str, number: int, array: np.ndarray):
    """Another array in the place of a file."""
    return lambda folder: np.save(folder / f"imagenet32_{kind}" / f"{number}.npy", array)


def rewrite(kind: str, number: int, change):
    """Other bytes in the place of a file."""
    def write(folder: Path) -> None:
        file = folder / f"imagenet32_{kind}" / f"{number}.npy"
        file.write_bytes(change(file.read_bytes()))
    return write


def remove(kind: str, *numbers: int):
    """Some files are not there."""
    return lambda folder: [(folder / f"imagenet32_{kind}" / f"{number}.npy").unlink() for number in numbers]


@pytest.mark.parametrize("damage, words", [
    (remove("codes", 3, 5), "CODES {from}/imagenet32_codes lacks 3.npy, the first of 2 missing ones among 0 to 11: copy"),
    (remove("labels", 0), "LABELS {from}/imagenet32_labels lacks 0.npy, the first of 1 missing ones among 0 to 11"),
    (remove("labels", 11), "imagenet32_labels has 11 files but CODES {from}/imagenet32_codes has 12: give the labels of"),
    (remove("codes", *range(COUNT)), "CODES {from}/imagenet32_codes has no file 0.npy, 1.npy, ..., but nothing: give the folder"),
    (replace("codes", 7, np.zeros((1, 2, 16), int)), "codes/7.npy has codes of shape (1, 2, 16) but 0.npy of (1, 10, 16)"),
    (replace("codes", 7, np.full((1, 10, 16), 16)), "codes/7.npy has codes from 16 to 16, beyond the codebooks of [16] codes of"),
    (replace("codes", 7, np.full((1, 10, 16), -1)), "codes/7.npy has codes from -1 to -1, beyond"),
    (replace("codes", 7, np.full((1, 10, 16), 0.5)), "codes/7.npy holds float64, not integers"),
    (replace("codes", 0, np.zeros((2, 1, 10, 16), int)), "codes/0.npy has codes of shape (2, 1, 10, 16), where --vq-ckpt"),
    (replace("codes", 0, np.zeros((1, 10, 15), int)), "codes/0.npy has 15 codes a crop, which are no square grid"),
    (replace("codes", 0, np.zeros((1, 0, 16), int)), "codes/0.npy has codes of shape (1, 0, 16), where --vq-ckpt"),
    (replace("labels", 7, np.array([1, 2])), "labels/7.npy holds 2 labels of shape (2,), not one"),
    (replace("labels", 7, np.array([-1])), "imagenet32_labels has the negative label -1 in 7.npy"),
    (replace("labels", 7, np.array([10**9])), "imagenet32_labels has the label 1000000000 in 7.npy"),
    (rewrite("codes", 7, lambda whole: whole[:-8]), "codes/7.npy cannot be read (an array of shape (1, 10, 16) and type int64"),
    (rewrite("codes", 7, lambda whole: b""), "codes/7.npy cannot be read"),
    (rewrite("labels", 7, lambda whole: b"x" * (1 << 25)), "labels/7.npy cannot be read (it is larger than 16777216 bytes)"),
    (replace("labels", 7, np.array([{}], object)), "labels/7.npy cannot be read (it holds Python objects)"),
    (lambda folder: os.mkfifo(folder / "imagenet32_codes" / "12.npy"), None),
])
def test_folders_that_cannot_be_converted_are_refused(tmp_path, tokenizers, capsys, damage, words):
    """One sentence that names the file, before an hour of reading; a pipe, which would be read for ever, is no file."""
    write_codes(tmp_path / "from")
    damage(tmp_path / "from")
    arguments = options(tmp_path / "from", tokenizers[1], tmp_path / "codes")
    if words is None:
        call(llamagen_codes.main, *arguments)
        assert len(CodeDataset(tmp_path / "codes")) == COUNT
    else:
        assert words.replace("{from}", str(tmp_path / "from")) in refused(capsys, *arguments)
        assert not (tmp_path / "codes" / "header.json").exists()


def test_options_that_do_not_fit_are_refused(tmp_path, tokenizers, capsys):
    """Another folder's codes, too few classes, the folder above, a tokenizer of two codebooks."""
    write_codes(tmp_path / "from")
    arguments = options(tmp_path / "from", tokenizers[1], tmp_path / "codes")
    assert "--num-classes 2 is less than LABELS" in refused(capsys, *arguments, "--num-classes", 2)
    above = [tmp_path / "from", *arguments[1:]]
    assert "but imagenet32_codes, imagenet32_labels: give the folder of codes" in refused(capsys, *above)
    two = options(tmp_path / "from", tokenizers[2], tmp_path / "codes")
    assert "has 2 codebooks, whose codes are" in refused(capsys, *two)
    call(llamagen_codes.main, *arguments)
    five = [*arguments, "--num-classes", 5]
    assert "holds codes made with num_classes 3, not with 5 as now" in refused(capsys, *five)
