"""Code folders: what is written is what training reads; extraction, several folders, damaged images and folders."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.train import evaluate_c2i, extract_codes_c2i, train_c2i
from tests.conftest import REPOSITORY, TINY_VQ, call, command, export_models
from tests.test_npz import ALONE
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils import row_shares
from utils.code_shards import CodeDataset, CodeHeader, open_codes, read_header
from utils.code_writer import CodeWriter
from utils.config import UserError
from utils.row_shares import Share


def write_codes(folder: Path, images: int = 48, crops: int = 2, tokenizer: str = "test", seed: int = 0, classes: int = 3) -> Path:
    """A code folder of random codes: 8 semantic, 16 detail, 4x4 grid, three classes, of which `classes` occur."""
    rng = np.random.default_rng(seed)
    header = CodeHeader(tokenizer, [8, 16], 4, 32, crops, "flip", 3, images, source="random")
    folder.mkdir(parents=True, exist_ok=True)
    writer = CodeWriter(folder, header, np.arange(images) % classes, ALONE)
    codes = np.stack([rng.integers(0, size, (images, crops, 16)) for size in (8, 16)], axis=2)
    writer.write(np.arange(images), codes.astype(np.uint16))
    writer.finish()
    return folder


def test_codes_round_trip_through_the_memory_map(tmp_path):
    """What is read in training is what was written, crop by crop, without the unreadable rows."""
    folder = write_codes(tmp_path / "codes", images=10)
    stored = np.load(folder / "codes.npy")
    state = np.lib.format.open_memmap(folder / "state.npy", mode="r+")
    state[3] = 2
    state.flush()
    dataset = CodeDataset(folder)
    assert len(dataset) == 9
    seen_crops = set()
    for epoch in range(8):
        batch, labels = dataset.__getitems__([(epoch, index) for index in range(9)])
        for item, row in enumerate([0, 1, 2, 4, 5, 6, 7, 8, 9]):
            matches = [crop for crop in range(2) if np.array_equal(batch[item], stored[row, crop])]
            assert matches and labels[item] == row % 3
            seen_crops.update(matches)
    assert seen_crops == {0, 1}


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """An exported tiny tokenizer."""
    return export_models(tmp_path / "models")[1]


def extract_options(images: Path, tokenizer: Path, out: Path) -> list:
    """Command line of a flip extraction at 32 pixels."""
    return ["--data-path", images, "--vq-ckpt", tokenizer, "--code-path", out, "--augmentation", "flip", "--image-size", 32,
            "--num-workers", 0, "--batch-size", 4, "--device", "cpu"]


def test_codes_of_huge_codebooks_keep_their_values(tmp_path):
    """Sixteen bits hold 65,536 codes; one more must not come back as code 0."""
    codes = np.array([[[[0, 65_535, 65_536, 69_999]]]])
    for size, dtype in ((2**16, np.uint16), (70_000, np.uint32)):
        folder = tmp_path / str(size)
        folder.mkdir()
        writer = CodeWriter(folder, CodeHeader("t", [size], 2, 32, 1, "none", 1, 1, "x"), np.zeros(1, int), ALONE)
        writer.write(np.array([0]), np.minimum(codes, size - 1))
        writer.finish()
        assert np.load(folder / "codes.npy").dtype == dtype
        seen, _ = CodeDataset(folder).__getitems__([(0, 0)])
        assert seen.flatten().tolist() == np.minimum(codes, size - 1).flatten().tolist()


def test_extraction_in_two_processes_equals_one_and_carries_on(images_folder, tokenizer, tmp_path):
    """The codes of image i do not depend on who encoded it; an interrupted extraction does only what is missing."""
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "one"))
    command("autoregressive/train/extract_codes_c2i.py", *extract_options(images_folder, tokenizer, tmp_path / "two"),
            processes=2)
    one, two = (np.load(tmp_path / name / "codes.npy") for name in ("one", "two"))
    assert np.array_equal(one, two) and one.shape == (24, 2, 2, 16) and one.any()
    model = load_tokenizer(tokenizer)
    assert (one[:, :, 0] < TINY_VQ.codebook_sizes[0]).all()
    assert read_header(tmp_path / "one").tokenizer == model.provenance.fingerprint
    # Undo two rows, spoil a third: only the two come back.
    state = np.lib.format.open_memmap(tmp_path / "two" / "state.npy", mode="r+")
    codes = np.lib.format.open_memmap(tmp_path / "two" / "codes.npy", mode="r+")
    state[[4, 9]], codes[[4, 9, 11]] = 0, 0
    state.flush(), codes.flush()
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "two"))
    again = np.load(tmp_path / "two" / "codes.npy")
    assert np.array_equal(again[[4, 9]], one[[4, 9]]) and not again[11].any()


def test_unreadable_images_are_left_out_of_the_codes(images_folder, tokenizer, tmp_path, caplog):
    """A truncated file is named, skipped and counted, and never becomes a training sample."""
    bad = images_folder / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "codes"))
    assert len(CodeDataset(tmp_path / "codes")) == 23
    assert (np.load(tmp_path / "codes" / "state.npy") == 2).sum() == 1


def test_crops_are_drawn_from_all_folders(tmp_path):
    """LlamaGen mixes ten-crops of range 1.1 and 1.05: both folders' crops of an image are equally likely."""
    folders = [write_codes(tmp_path / "wide", images=10), write_codes(tmp_path / "tight", images=10, crops=3, seed=1)]
    stored = np.concatenate([np.load(folder / "codes.npy") for folder in folders], axis=1)   # [10, 5, C, N]
    state = np.lib.format.open_memmap(folders[1] / "state.npy", mode="r+")
    state[3] = 2  # unreadable in one folder: left out of both
    state.flush()
    dataset, counts = CodeDataset(*folders), np.zeros(5, int)
    rows = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for epoch in range(100):
        batch, labels = dataset.__getitems__([(epoch, index) for index in range(9)])
        assert labels.tolist() == [row % 3 for row in rows]
        for item, row in zip(batch.numpy(), rows, strict=True):
            counts += (stored[row] == item).all((1, 2))
    assert counts.sum() == 900 and counts.min() > 140, counts


@pytest.mark.parametrize("change, words", [
    (dict(images=11), "was extracted with images 11, not with 10"),
    (dict(tokenizer="other"), "was extracted with tokenizer other, not with test"),
    (dict(classes=2), "has other labels than"),
])
def test_folders_of_other_images_or_codes_are_refused(tmp_path, change, words, capsys):
    """Crops of other images under the same labels would train without a word."""
    folders = [write_codes(tmp_path / "a", images=10), write_codes(tmp_path / "b", **{"images": 10, "seed": 1} | change)]
    assert words in refused(capsys, train_c2i.main, *train_options(folders, tmp_path / "run"))


def train_options(folders: list[Path], run_dir: Path) -> list:
    """Command line of one training step on code folders."""
    return ["--code-path", *folders, "--run-dir", run_dir, "--gpt-model", "GPT-tiny", "--image-size", 32, "--downsample-size", 8,
            "--num-classes", 3, "--global-batch-size", 8, "--steps", 1, "--num-workers", 0, "--device", "cpu",
            "--data-parallel", "none"]


def refused(capsys, main, *arguments) -> str:
    """Run an entry point that must refuse and say nothing but one line; returns it."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.endswith(".\n") and error.count("\n") == 1, error
    return error


# --- writing ---------------------------------------------------------------------------------------------------------


def test_codes_beyond_their_codebook_are_never_written(tmp_path):
    """They would end a training with an index error, or a CUDA assertion, hours later."""
    header = CodeHeader("t", [8, 16], 4, 32, 1, "none", 3, 4, "x")
    writer = CodeWriter(write_codes(tmp_path / "codes").parent, header, np.zeros(4, int), ALONE)
    good = np.zeros((1, 1, 2, 16), np.int64)
    for stream, code in ((0, 8), (1, 16), (0, -1), (1, 70_000)):
        bad = good.copy()
        bad[0, 0, stream, 5] = code
        with pytest.raises(ValueError, match="are not of codebooks of"):
            writer.write(np.array([2]), bad)
    with pytest.raises(ValueError, match="codes are"):
        writer.write(np.array([2]), good[:, :, :, :15])
    with pytest.raises(RuntimeError, match="4 of 4 rows are missing"):
        writer.finish()


def test_a_full_disk_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    """The user makes space and runs the same command: what was done stays done, wherever the disk was full."""
    monkeypatch.setattr(row_shares, "_FEWEST_ROWS", 4)
    header, calls, pwrite = CodeHeader("t", [8], 4, 32, 1, "none", 3, 10, "x"), [0, 0], os.pwrite
    codes = np.random.default_rng(0).integers(0, 8, (10, 1, 1, 16))

    def full(file: int, data: memoryview, at: int) -> int:
        calls[0] += 1
        if calls[0] > calls[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[: 1 + len(data) // 2], at)  # a disk takes what still fits

    monkeypatch.setattr(os, "pwrite", full)
    written = []
    for failures in range(1000):
        calls[:] = 0, failures % 30
        try:
            writer = CodeWriter(tmp_path, header, np.arange(10) % 3, ALONE)
            for row in writer.share():
                writer.write(np.array([row]), codes[[row]])
                written.append(row)
            writer.finish()
            break
        except UserError as error:
            assert f"--code-path {tmp_path} does not fit on its disk (No space left on device): free" in str(error)
    assert sorted(written) == list(range(10)) and failures > 10
    assert np.array_equal(open_codes(tmp_path).codes, codes) and open_codes(tmp_path).header.largest_codes == [codes.max()]
    assert sorted(os.listdir(tmp_path)) == ["codes.npy", "header.json", "labels.npy", "state.npy"]


@pytest.mark.parametrize("moment", ["_move", "remove"])
def test_an_interrupted_merge_carries_on(tmp_path, monkeypatch, moment):
    """Shares are removed one by one while codes.npy grows: at no moment may the only copy of a row be lost."""
    monkeypatch.setattr(row_shares, "_FEWEST_ROWS", 4)
    whole = open_codes(write_codes(tmp_path / "whole", images=13))
    owner: type = Share if moment == "remove" else CodeWriter
    step, left = getattr(owner, moment), [2]

    def interrupt(*arguments) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, moment, interrupt)
        write_codes(tmp_path / "codes", images=13)
    with pytest.raises(UserError, match="unfinished"):
        open_codes(tmp_path / "codes")
    writer = CodeWriter(tmp_path / "codes", whole.header, whole.labels, ALONE)
    assert len(writer.share()) == 0 and len(list((tmp_path / "codes" / "shares").glob("*.rows"))) in (3, 4)
    writer.finish()
    for name in ("codes.npy", "labels.npy", "state.npy", "header.json"):
        assert (tmp_path / "codes" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("left", ["00000000-00000012.0.rows", "00000000-00000012.0.values"])
def test_half_a_share_is_no_obstacle(tmp_path, left):
    """A kill between the making, or the removing, of a share's two files leaves one of them."""
    whole = open_codes(write_codes(tmp_path / "whole", images=13))
    (tmp_path / "codes" / "shares").mkdir(parents=True)
    (tmp_path / "codes" / "shares" / left).write_bytes(b"" if left.endswith("rows") else b"torn")
    write_codes(tmp_path / "codes", images=13)
    assert np.array_equal(open_codes(tmp_path / "codes").codes, whole.codes)


def test_other_images_of_the_same_number_are_not_mixed_in(tmp_path):
    """A data set of as many images under the same name would fill the other half of the folder."""
    header = open_codes(write_codes(tmp_path / "codes")).header
    with pytest.raises(UserError, match="holds codes of images with other labels"):
        CodeWriter(tmp_path / "codes", header, np.arange(48) % 2, ALONE)


def test_codes_of_no_image_are_an_error(tmp_path):
    """A data set in which nothing can be read must not pass for an extraction that has succeeded."""
    writer = CodeWriter(tmp_path, CodeHeader("t", [8], 4, 32, 1, "none", 3, 4, "x"), np.zeros(4, int), ALONE)
    writer.skip(writer.share())
    with pytest.raises(UserError, match=f"--code-path {tmp_path} would hold no codes because none of the 4 images could be read"):
        writer.finish()
    with pytest.raises(UserError, match="unfinished"):
        open_codes(tmp_path)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_pickling_a_data_set_takes_no_codes_along(tmp_path):
    """Loader processes that are not forked would each receive, and hold, the whole map."""
    dataset = CodeDataset(write_codes(tmp_path / "codes", images=2000))
    data = pickle.dumps(dataset)
    assert len(data) < (tmp_path / "codes" / "codes.npy").stat().st_size / 3
    items, again = [(3, 7), (1, 1999)], pickle.loads(data)
    assert isinstance(again.codes[0], np.memmap) and not again.codes[0].flags.writeable
    for first, second in zip(dataset.__getitems__(items), again.__getitems__(items), strict=True):
        assert first.equal(second)


def test_a_folder_of_an_older_version_is_read(tmp_path):
    """Codes extracted before headers had a version, or the largest codes, took days too."""
    header = change_header(write_codes(tmp_path / "codes"), version=None, largest_codes=None)
    assert "version" not in header and len(CodeDataset(tmp_path / "codes")) == 48
    assert open_codes(tmp_path / "codes").header.version == 1


def change_header(folder: Path, **changes) -> dict:
    """Change fields of header.json; None removes one."""
    header = json.loads((folder / "header.json").read_text()) | changes
    header = {name: value for name, value in header.items() if value is not None}
    (folder / "header.json").write_text(json.dumps(header))
    return header


def header(**changes) -> Callable[[Path], object]:
    return lambda folder: change_header(folder, **changes)


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "header.json").write_text(content)


def cut(name: str, length: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def junk(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)), allow_pickle=True)


def put(name: str, place: tuple[int, ...], value: int) -> Callable[[Path], object]:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return array(name, change)


ARRAYS = ("codes.npy", "labels.npy", "state.npy")
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "header.json").unlink(), "holds no codes (no header.json)"),
    (text(""), "header.json is no JSON"), (text('{"tokenizer": "te'), "header.json is no JSON"),
    (text("[1, 2]"), "header.json is no JSON object"), (text("7"), "header.json is no JSON object"),
    *[(header(**{name: None}), f"lacks the field '{name}'") for name in (
        "tokenizer", "codebook_sizes", "grid_size", "image_size", "crops", "augmentation", "num_classes", "images", "source")],
    (header(complete=None), "unfinished"), (header(complete=False), "unfinished"),
    (header(colour="red"), "has the unknown field 'colour'"), (header(version=9, colour="red"), "by a newer version, 9 where 2"),
    (header(class_names=["a"]), "names 1 of 3 classes"), (header(class_names=[1, 2, 3]), "not a list of strings"),
    (header(version="1"), 'has version "1", not a positive integer'), (header(images=48.0), "has images 48.0, not a positive"),
    (header(images=True), "has images true, not a positive"), (header(images=0), "has images 0, not a positive integer"),
    (header(crops=-1), "has crops -1, not a positive"), (header(grid_size="4"), 'has grid_size "4", not a positive'),
    (header(tokenizer=3), "has tokenizer 3, not a string"), (header(source=["x"]), 'has source ["x"], not a string'),
    (header(complete="yes"), 'has complete "yes", not true or false'), (header(codebook_sizes=8), "has codebook_sizes 8, not"),
    (header(codebook_sizes=[8, "a"]), 'has codebook_sizes [8, "a"], not a list'),
    (header(codebook_sizes=[]), "has codebook_sizes [], not a size"), (header(codebook_sizes=[0, 16]), "not a size of 1 to"),
    (header(largest_codes=[7]), "has largest_codes [7], which do not fit"),
    (header(largest_codes=[7, 16]), "has largest_codes [7, 16], which do not fit codebooks of [8, 16] codes"),
    (header(images=49), "codes.npy holds <u2 (48, 2, 2, 16) where header.json says <u2 (49, 2, 2, 16)"),
    (header(codebook_sizes=[8, 70_000]), "where header.json says <u4"),
    (header(codebook_sizes=[8], largest_codes=[7]), "where header.json says <u2 (48, 2, 1, 16)"),
    *[(lambda folder, name=name: (folder / name).unlink(), f"{name} does not exist") for name in ARRAYS],
    *[(cut(name, length), f"{name} is truncated or no npy file") for name in ARRAYS for length in (0, 5, 60, 130)],
    (cut("codes.npy", 6000), "codes.npy is truncated"),
    *[(junk(name, content), f"{name} is truncated or no npy file") for name in ARRAYS
      for content in (b"junk" * 999, b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70_000, b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(99))],
    *[(array(name, lambda values: values.astype(object)), f"{name} is truncated or no npy file") for name in ARRAYS],
    *[(array(name, lambda values: values.astype(np.float32)), f"{name} holds <f4") for name in ARRAYS],
    *[(array(name, lambda values: values.astype(values.dtype.newbyteorder(">"))), f"{name} holds >") for name in ARRAYS[:2]],
    *[(array(name, lambda values: values[:-1]), f"{name} holds") for name in ARRAYS],
    *[(array(name, lambda values: np.concatenate([values, values])), f"{name} holds") for name in ARRAYS],
    (array("codes.npy", lambda values: values[..., 0]), "codes.npy holds"),
    (array("codes.npy", np.asfortranarray), "in Fortran order"),
    *[(lambda folder, name=name: junk(name, (folder / name).read_bytes() + b"more")(folder), f"{name} has") for name in ARRAYS],
    (put("labels.npy", (5,), 3), "labels.npy gives image 5 the label 3, not one of 0 to 2"),
    (put("labels.npy", (47,), -1), "labels.npy gives image 47 the label -1"),
    (put("state.npy", (6,), 3), "state.npy gives image 6 the state 3"),
    (put("state.npy", (6,), 0), "state.npy says that 1 of 48 images have no codes"),
    (array("state.npy", lambda values: values * 2), "has codes of no image, all 48 were unreadable"),
    (put("codes.npy", (7, 1, 0, 3), 8), "has code 8 in stream 0 of codes.npy, whose codebook has 8 codes"),
    (put("codes.npy", (47, 0, 1, 15), 65_535), "has code 65535 in stream 1"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Path, Path]:
    """A code folder and the file of a GPT that it fits."""
    folder = tmp_path_factory.mktemp("sound")
    return write_codes(folder / "codes"), export_models(folder / "models")[0]


@pytest.mark.parametrize("damage, words", DAMAGE, ids=[f"{number}-{words[:30]}" for number, (_, words) in enumerate(DAMAGE)])
def test_damaged_folders_are_told_before_anything_starts(sound, tmp_path, capsys, damage, words):
    """A full disk, a broken copy, a wrong folder: one sentence, not a traceback hours later, whoever reads the folder."""
    codes, gpt = shutil.copytree(sound[0], tmp_path / "codes"), sound[1]
    damage(codes)
    said = refused(capsys, train_c2i.main, *train_options([codes], tmp_path / "run"))
    assert f"--code-path {codes}" in said and words in said
    said = refused(capsys, evaluate_c2i.main, "--gpt-ckpt", gpt, "--code-path", codes, "--out", tmp_path / "bits.json")
    assert f"--code-path {codes}" in said and words in said
    assert os.listdir(tmp_path) == ["codes"]


def test_a_bf16_encoder_chooses_codes_in_float32(images_folder, tmp_path):
    """Precision moves latents a little, not the choice among codes: few differ, and the folder is sound."""
    _, tokenizer = export_models(tmp_path / "models")
    for name in ("float32", "bf16"):
        call(extract_codes_c2i.main, "--data-path", images_folder, "--vq-ckpt", tokenizer, "--code-path", tmp_path / name,
             "--image-size", 32, "--augmentation", "flip", "--num-workers", 0, "--device", "cpu", "--precision", name)
    exact, rounded = (open_codes(tmp_path / name).codes for name in ("float32", "bf16"))
    assert 0.9 < (exact == rounded).mean() < 1
    seen = []
    model = load_tokenizer(tokenizer)
    model.quantizer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    model.encode(torch.zeros(1, 3, 32, 32), bf16=True)
    assert seen == [torch.float32]


@pytest.mark.parametrize("count", [4000, 9000])  # np.save: silently cut, and an error without a cause
def test_an_array_that_does_not_fit_is_an_error(tmp_path, count):
    """The share whose rows are marked in it is removed next: a cut `state.npy` would lose them."""
    script = (f"import resource, sys; sys.path.insert(0, {str(REPOSITORY)!r})\nimport numpy as np\nfrom pathlib import Path\n"
              f"from utils.shard_writer import save_array\nresource.setrlimit(resource.RLIMIT_FSIZE, ({count + 100},) * 2)\n"
              f"save_array(Path('x.npy'), np.zeros({count}, np.uint8))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "OSError: [Errno 27] File too large" in done.stderr and not list(tmp_path.iterdir())
