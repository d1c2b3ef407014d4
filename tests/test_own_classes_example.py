"""The worked example of own classes: its pictures are new, its commands name no shape, and it says what it needs."""

import json
import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from autoregressive.models.gpt import build_gpt
from scripts import own_classes_data, own_classes_report
from scripts.own_classes_data import CLASSES, DATA, halved, make_pictures, middle_rows
from tests.conftest import REPOSITORY, call
from tests.test_bad_input import refused
from tokenizer.tokenizer_image.vq_model import build_tokenizer
from utils.checkpoint import export, fingerprint
from utils.config import to_dict
from utils.images import open_images


def bundled() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The test images, their labels and the names of the classes."""
    with np.load(DATA / "fashion_mnist_test.npz") as arrays:
        return arrays["images"], arrays["labels"], arrays["class_names"].tolist()


def test_pictures_are_those_of_a_folder_of_ones_own(tmp_path, capsys):
    """Class folders of PNGs, 20 of each class and others held out, which the extraction opens as they are."""
    call(own_classes_data.main, "--out", tmp_path, "--held-out", 5)
    for part, count in (("train", 20), ("val", 5)):
        source = open_images(tmp_path / part)
        assert source.class_names == tuple(sorted(CLASSES)) and np.bincount(source.labels).tolist() == [count] * 3
        assert source.load(0).shape == (32, 32, 3)
    files = [path.read_bytes() for path in tmp_path.rglob("*.png")]
    assert len(files) == 75 == len(set(files))
    call(own_classes_data.main, "--out", tmp_path / "again", "--held-out", 5)
    assert [path.read_bytes() for path in sorted((tmp_path / "again").rglob("*.png"))] == [
        path.read_bytes() for part in ("train", "val") for path in sorted((tmp_path / part).rglob("*.png"))]


def test_no_picture_is_a_bundled_image_and_none_shares_one():
    """New classes, and held-out pictures of shoes that no training picture shows."""
    images, labels, names = bundled()
    found = make_pictures(images, labels, names, 60, seed=0)
    known = {image.tobytes() for image in images} | {image[:, ::-1].tobytes() for image in images}
    assert not known & {picture.tobytes() for pictures in found.values() for picture in pictures}
    halves = [half.tobytes() for picture in found["pair"] for half in (picture[:16], picture[16:, ::-1])]
    assert len(set(halves)) == len(halves) == 120


def test_parts_keep_what_they_show():
    """A shoe is not cut, wherever it lies, and a half-sized shirt stands in the middle."""
    shoe = np.zeros((32, 32), np.uint8)
    shoe[20:31, 2:30] = 200
    assert (middle_rows(shoe) > 0).sum() == (shoe > 0).sum() and middle_rows(shoe).shape == (16, 32)
    assert middle_rows(np.zeros((32, 32), np.uint8)).shape == (16, 32)
    small = halved(np.full((32, 32), 100, np.uint8))
    assert small.shape == (16, 32) and (small[:, 8:24] == 100).all() and small[:, :8].max() == small[:, 24:].max() == 0


def test_more_pictures_than_images_are_refused(capsys, tmp_path):
    """2,000 bundled test images are about 200 of each class, and a pair takes two."""
    sentence = refused(capsys, own_classes_data.main, "--out", tmp_path, "--images", 90, "--held-out", 90)
    assert "180 pictures of pair" in sentence and "sneaker" in sentence and not list(tmp_path.rglob("*.png"))


def example(quickstart, out) -> subprocess.CompletedProcess:
    """Run the example's command at a fiftieth of its length."""
    environment = os.environ | {"OUT": str(out), "SCALE": "0.02", "PYTHON": sys.executable, "QUICKSTART": str(quickstart)}
    return subprocess.run(["bash", "scripts/own_classes.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_the_example_says_what_it_needs(tmp_path):
    """Without the quickstart's models there is nothing to fine-tune, and one sentence says how to make them."""
    done = example(tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert f"QUICKSTART {tmp_path}/nowhere has no vq/dual" in done.stderr and "bash scripts/quickstart.sh" in done.stderr


def test_the_example_runs_to_its_report(tmp_path, capsys):
    """Random models in the place of the quickstart's: all commands hand over, and the log says what was drawn anew."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ-8-small", codebook_sizes=(128, 512))
    known = fingerprint(tokenizer.state_dict())
    export(tmp_path / "q" / "vq" / "dual" / "tokenizer.safetensors", "tokenizer", tokenizer.state_dict(),
           {"model": to_dict(tokenizer.config), "stage": "dual", "fingerprint": known})
    gpt = build_gpt("GPT-tiny", num_classes=10, grid_size=4, codebook_sizes=(128, 512))
    export(tmp_path / "q" / "gpt" / "gpt.safetensors", "gpt", gpt.state_dict(),
           {"model": to_dict(gpt.config), "gpt_model": "GPT-tiny", "tokenizer": known, "class_names": bundled()[2]})
    done = example(tmp_path / "q", out := tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("pictures", "tuned", "scratch"):
        assert np.asarray(Image.open(out / f"{name}.png")).std() > 5 and f"{name}.png" in (out / "report.md").read_text()
    assert (out / "tuned" / "samples.png").exists()
    log = (out / "tuned" / "log.txt").read_text()
    assert "classes: took none of its classes and the null class; drew anew outfit, pair, upturned boot" in log
    assert "--init-from" not in (out / "scratch" / "log.txt").read_text()
    figures = json.loads((out / "figures.json").read_text())["runs"]
    assert {name: found["steps"] for name, found in figures.items()} == {"tuned": 5, "scratch": 5}
    (out / "tuned" / "metrics.jsonl").write_text("")
    assert "has no evaluation of tuned" in refused(capsys, own_classes_report.main, "--folder", out)
