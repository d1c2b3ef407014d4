"""Code folders: what is written is what training reads; extraction, several folders, damaged images."""

from pathlib import Path

import numpy as np
import pytest

from autoregressive.train import extract_codes_c2i, train_c2i
from tests.conftest import TINY_VQ, call, command, export_models
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils.code_shards import CodeDataset, CodeHeader, CodeWriter, read_header


def write_codes(folder: Path, images: int = 48, crops: int = 2, tokenizer: str = "test", seed: int = 0, classes: int = 3) -> Path:
    """A code folder of random codes: 8 semantic, 16 detail, 4x4 grid, three classes, of which `classes` occur."""
    rng = np.random.default_rng(seed)
    header = CodeHeader(tokenizer, [8, 16], 4, 32, crops, "flip", 3, images, source="random")
    folder.mkdir(parents=True)
    writer = CodeWriter(folder, header, np.arange(images) % classes, create=True)
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
        writer = CodeWriter(folder, CodeHeader("t", [size], 2, 32, 1, "none", 1, 1, "x"), np.zeros(1, int), create=True)
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
    with pytest.raises(SystemExit) as stopped:
        call(train_c2i.main, "--code-path", *folders, "--run-dir", tmp_path / "run", "--gpt-model", "GPT-tiny",
             "--image-size", 32, "--downsample-size", 8, "--num-classes", 3, "--global-batch-size", 8, "--steps", 1,
             "--num-workers", 0, "--device", "cpu", "--data-parallel", "none")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
