"""rFID in one command: what three commands give, done once, carried on after an interruption."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluations.c2i import evaluator
from evaluations.c2i.extractors import EXTRACTORS
from scripts import rfid
from scripts.fuzz_commands import FEW
from tests.conftest import REPOSITORY, call, command
from tests.test_bad_input import refused
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.validation import val_ddp

SHAPE = ("--image-size", 32, "--num-workers", 0)
RANDOM = ("--perceptual-net", "random", "--device", "cpu")


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """A few cheap features in the place of Inception's."""
    monkeypatch.setitem(EXTRACTORS, "inception", FEW)


def options(images: Path, tokenizer: Path, out: Path, *extra) -> list:
    """A command line of rfid.py at 32 pixels."""
    return ["--data-path", images, "--vq-ckpt", tokenizer, "--out", out, *SHAPE, *RANDOM, *extra]


def result(out: Path) -> dict:
    """The figures that the command has left."""
    found = json.loads((out / "rfid.json").read_text())
    found.pop("command", None)
    return found


def test_one_command_gives_what_three_give(images_folder, models, tmp_path, capsys):
    """A wrapper with numbers of its own would be a fourth protocol."""
    call(rfid.main, *options(images_folder, models[1], tmp_path / "out"))
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    call(val_ddp.main, "--data-path", images_folder, *SHAPE, "--out", tmp_path / "val.npz")
    call(reconstruction_vq_ddp.main, "--data-path", images_folder, "--vq-ckpt", models[1], *SHAPE, *RANDOM, "--out",
         tmp_path / "rec.npz")
    evaluator.main([str(tmp_path / "val.npz"), str(tmp_path / "rec.npz"), "--json", str(tmp_path / "eval.json")])
    assert "--vq-ckpt" in json.loads((tmp_path / "out" / "rfid.json").read_text())["command"]
    found = result(tmp_path / "out")
    figures, metrics = (json.loads((tmp_path / name).read_text()) for name in ("rec.json", "eval.json"))
    assert found["rfid"] == pytest.approx(metrics["fid"]) and found["rsfid"] == pytest.approx(metrics["sfid"])
    figures.pop("perceptual_random")  # of a network drawn anew by each call
    assert found["rfid"] > 0 and {name: found[name] for name in figures} == figures
    assert {"psnr", "ssim", "perceptual_random", "usage_semantic", "usage_detail"} < set(found) and "precision" not in found
    assert printed["rfid"] == f"{found['rfid']:.4f}" and printed["perceptual_net"] == "random"
    for name in ("reconstruction", "reference"):
        own_name = {"reconstruction": "rec.npz", "reference": "val.npz"}[name]
        with np.load(tmp_path / "out" / f"{name}.npz") as data, np.load(tmp_path / own_name) as own:
            np.testing.assert_array_equal(data["arr_0"], own["arr_0"])


def test_what_is_done_is_not_done_again(images_folder, models, tmp_path, monkeypatch):
    """A set of 50,000 images takes minutes; an interruption after the reconstructions must not cost them."""
    out, done = tmp_path / "out", reconstruction_vq_ddp.reconstruct_all
    words = options(images_folder, models[1], out)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rfid, "distances", fail)
    with pytest.raises(SystemExit):
        call(rfid.main, *words)
    assert "psnr" in result(out) and "rfid" not in result(out)
    monkeypatch.undo()
    monkeypatch.setitem(EXTRACTORS, "inception", FEW)
    monkeypatch.setattr(rfid, "reconstruct_all", None)  # calling it fails
    call(rfid.main, *words)
    first = result(out)
    call(rfid.main, *words, "--batch-size", 7)
    assert first["rfid"] > 0 and result(out) == first
    monkeypatch.setattr(rfid, "reconstruct_all", done)
    call(rfid.main, *words, "--streams", "semantic")
    assert result(out)["of"]["streams"] == "semantic" and result(out)["psnr"] != first["psnr"]
    assert "usage_detail" not in result(out)
    monkeypatch.setattr(rfid, "reconstruct_all", fail)
    with pytest.raises(SystemExit):
        call(rfid.main, *words)
    assert not (out / "rfid.json").exists()  # or it would speak of reconstructions that are being replaced


def test_tokenizers_share_a_reference(capsys, images_folder, models, tmp_path):
    """The images of 50,000 reconstructions are 10 GB: once is enough, and those of another set are refused."""
    shared = tmp_path / "val.npz"
    for name in ("a", "b"):
        call(rfid.main, *options(images_folder, models[1], tmp_path / name, "--reference", shared))
        assert not (tmp_path / name / "reference.npz").exists()
    assert result(tmp_path / "a")["rfid"] == result(tmp_path / "b")["rfid"] and len(list(tmp_path.glob("val.features-*"))) == 1
    shutil.rmtree(images_folder / "class2")
    sentence = refused(capsys, rfid.main, *options(images_folder, models[1], tmp_path / "c", "--reference", shared))
    assert f"--reference {shared} exists and was made with" in sentence and "change --reference" in sentence


def test_images_are_compared_at_one_size(images_folder, models, tmp_path):
    """LlamaGen's 384-pixel tokenizer is compared at 256: the reference has that size too."""
    call(rfid.main, *options(images_folder, models[1], tmp_path / "out", "--image-size-eval", 24))
    for name in ("reference", "reconstruction"):
        with np.load(tmp_path / "out" / f"{name}.npz") as data:
            assert data["arr_0"].shape == (24, 24, 24, 3)


def test_another_space_has_a_figure_of_its_own(images_folder, models, tmp_path, monkeypatch):
    """FD-DINOv2 stands beside rFID where it is asked for."""
    output = replace(FEW.outputs[0], distance="fd_dinov2", statistics=("mu_dinov2", "sigma_dinov2"),
                     neighbours=("precision_dinov2", "recall_dinov2"))
    few = replace(FEW, load=lambda path, device: (lambda images: (images.float().flatten(1)[:, :64],), "1" * 64),
                  outputs=(output,))
    monkeypatch.setitem(EXTRACTORS, "dinov2", few)
    call(rfid.main, *options(images_folder, models[1], tmp_path / "out", "--features", "inception", "dinov2"))
    assert result(tmp_path / "out")["rfd_dinov2"] > 0 and result(tmp_path / "out")["rfid"] > 0


def test_missing_weights_are_told_before_the_work(capsys, images_folder, models, tmp_path, monkeypatch):
    """They are needed last, after an hour of reconstructing."""
    monkeypatch.undo()
    sentence = refused(capsys, rfid.main, *options(images_folder, models[1], tmp_path / "out", "--inception-weights",
                                                   tmp_path / "none.pth"))
    assert "--inception-weights" in sentence and not list((tmp_path / "out").glob("*.npz"))
    sentence = refused(capsys, rfid.main, *options(images_folder, models[1], tmp_path / "out", "--dinov2-weights", models[1]))
    assert "add dinov2 to --features" in sentence


def test_two_processes_give_the_numbers_of_one(images_folder, models, tmp_path):
    """The launcher takes all GPUs of a node; one process evaluates what all have reconstructed."""
    (tmp_path / "few.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from evaluations.c2i.extractors import EXTRACTORS
from scripts import rfid
from scripts.fuzz_commands import FEW
from utils.config import run_main

EXTRACTORS["inception"] = FEW
run_main(rfid.main)
""")
    command(tmp_path / "few.py", *options(images_folder, models[1], tmp_path / "two"), processes=2)
    call(rfid.main, *options(images_folder, models[1], tmp_path / "one"))
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    for name in set(one) - {"perceptual_random", "of"}:
        assert two[name] == (one[name] if isinstance(one[name], str) else pytest.approx(one[name], rel=1e-4)), name
    assert one["of"] == two["of"] and one["rfid"] > 0
