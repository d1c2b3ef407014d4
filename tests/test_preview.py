"""Samples while a GPT trains: the right picture, by the averaged weights, and a training that does not notice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import carried_sampling, draw_uniforms, generate
from autoregressive.models.gpt import load_gpt
from autoregressive.sample.pipeline import ModelOptions, Pipeline
from autoregressive.train import train_c2i, train_t2i
from tests.conftest import TINY_VQ, call, command, export_models, losses
from tests.test_bad_input import refused
from tests.test_own_classes import named_codes
from tests.test_text_training import own_text, text_options
from tests.test_train import TRAIN, gpt_options
from tokenizer.tokenizer_image import rearrange
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.checkpoint import export, fingerprint
from utils.config import to_dict
from utils.text_shards import TEXT, CaptionedCodes

NAMES = ("a cat", "a dog", "an owl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """The file of a tiny tokenizer."""
    return export_models(tmp_path_factory.mktemp("models"))[1]


@pytest.fixture(scope="module")
def codes(tokenizer, tmp_path_factory) -> Path:
    """Random codes of three named classes, as if that tokenizer had made them."""
    made_by = load_tokenizer(tokenizer).provenance.fingerprint
    return named_codes(tmp_path_factory.mktemp("data") / "codes", NAMES, tokenizer=made_by)


def run_options(codes: Path, run_dir: Path, **extra) -> list:
    """Six steps with averaging, dropout and dropped classes: what is random would show."""
    defaults: dict[str, Any] = dict(steps=6, data_parallel="none", ema_decay=0.9, dropout=0.1, class_dropout=0.2)
    return gpt_options(codes, run_dir, **defaults | extra)


def pictures(run_dir: Path) -> list[int]:
    """The steps whose samples TensorBoard shows."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    return [event.step for event in events.Images("samples")]


def drawn(run_dir: Path, each: int = 4) -> np.ndarray:
    """The samples of the picture in a run's folder, uint8 [rows x each, S, S, 3]; 32-pixel images at twice their size."""
    picture = np.asarray(Image.open(run_dir / "samples.png"))
    step, columns, rows = 66, each, picture.shape[0] // 66
    left = picture.shape[1] - columns * step
    return np.stack([picture[2 + row * step : 66 + row * step : 2, left + column * step : left + column * step + 64 : 2]
                     for row in range(rows) for column in range(columns)])


def test_the_training_does_not_notice(codes, tokenizer, tmp_path):
    """Losses and weights bit for bit, with pictures and without; TensorBoard has one at every second step and the last."""
    call(train_c2i.main, *run_options(codes, tmp_path / "without"))
    call(train_c2i.main, *run_options(codes, tmp_path / "with", sample_every=2, vq_ckpt=tokenizer))
    assert losses(tmp_path / "with") == losses(tmp_path / "without") and len(losses(tmp_path / "with")) == 6
    one, other = (load_gpt(tmp_path / name).state_dict() for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert pictures(tmp_path / "with") == [2, 4, 6] and not (tmp_path / "without" / "samples.png").exists()
    call(train_c2i.main, *run_options(codes, tmp_path / "odd", steps=3, sample_every=2, vq_ckpt=tokenizer))
    assert pictures(tmp_path / "odd") == [2, 3]


@pytest.mark.parametrize("mode, processes", [("none", 1), ("ddp", 2), ("fsdp", 2)])
def test_the_picture_is_what_the_exported_model_draws(codes, tokenizer, tmp_path, monkeypatch, mode, processes):
    """Averaged weights, gathered from all processes where they are sharded: the picture of the last step is that of the file."""
    words = run_options(codes, tmp_path / "run", sample_every=3, vq_ckpt=tokenizer, data_parallel=mode, lr=0.05)
    command(TRAIN, *words, processes=processes)
    pipeline = Pipeline(ModelOptions(tmp_path / "run", tokenizer), carried_sampling(load_gpt(tmp_path / "run")), FineOptions(),
                        torch.device("cpu"))
    expected = pipeline.sample(np.repeat(np.arange(3), 4), np.arange(12))
    found = drawn(tmp_path / "run")
    assert found.shape == expected.shape and found.std() > 5
    np.testing.assert_allclose(found.astype(int), expected, atol=1)  # the threads of a CPU may differ in the last bits
    assert pictures(tmp_path / "run") == [3, 6] and sorted(losses(tmp_path / "run")) == list(range(1, 7))


def test_rows_have_the_names_of_their_classes(codes, tokenizer, tmp_path, monkeypatch):
    """A row that nobody can name says nothing; of many classes eight are shown."""
    from autoregressive.train import preview

    made = []
    original = preview.image_grid
    monkeypatch.setattr(preview, "image_grid", lambda *arguments: made.append(arguments) or original(*arguments))
    call(train_c2i.main, *run_options(codes, tmp_path / "a", steps=1, sample_every=1, vq_ckpt=tokenizer))
    many = named_codes(tmp_path / "many", (), 12, tokenizer=load_tokenizer(tokenizer).provenance.fingerprint)
    call(train_c2i.main, *run_options(many, tmp_path / "b", steps=1, sample_every=1, vq_ckpt=tokenizer, num_classes=12))
    (images, columns, scale, rows, titles), (_, _, _, more, _) = made
    assert images.shape == (12, 32, 32, 3) and (columns, scale) == (4, 2) and rows == list(NAMES) and not titles
    assert more == [f"class {label}" for label in range(8)]


def test_captions_are_those_of_the_first_images(tokenizer, tmp_path, monkeypatch):
    """No words are kept beside features: the picture shows the image of each caption, and samples of it."""
    from autoregressive.train import preview

    made = []
    monkeypatch.setattr(preview, "image_grid", lambda *arguments: made.append(arguments) or Image.new("RGB", (9, 9)))
    model = load_tokenizer(tokenizer)
    codes = named_codes(tmp_path / "codes", (), 1, tokenizer=model.provenance.fingerprint)
    own_text(codes / TEXT)
    call(train_t2i.main, *text_options(codes, tmp_path / "run", 2, data_parallel="none", sample_every=2, vq_ckpt=tokenizer))
    (images, columns, _, rows, titles), = made
    assert images.shape == (8 * 5, 32, 32, 3) and columns == len(titles) == 5 and rows == [f"caption {row}" for row in range(8)]
    own, (features, mask), _ = CaptionedCodes(codes).__getitems__([(0, row) for row in range(8)])
    pipeline = Pipeline(ModelOptions(tmp_path / "run", tokenizer), carried_sampling(load_gpt(tmp_path / "run")), FineOptions(),
                        torch.device("cpu"), condition="text")
    assert np.array_equal(images[::5], pipeline.decode(own))
    expected = generate(pipeline.gpt, (features[1:2].repeat(4, 1, 1), mask[1:2].repeat(4, 1)), pipeline.sampling,
                        draw_uniforms(0, np.arange(4, 8), 2, 16))
    np.testing.assert_allclose(images[6:10].astype(int), pipeline.decode(expected), atol=1)


def test_what_cannot_be_drawn_is_refused_before_the_training(capsys, codes, tokenizer, tmp_path):
    """No tokenizer, another one, none at all: one sentence each, and no folder of a run."""
    other = VQModel(TINY_VQ).state_dict()
    export(tmp_path / "other.safetensors", "tokenizer", other, {"model": to_dict(TINY_VQ), "fingerprint": fingerprint(other)})
    for words, sentence in ((("--sample-every", 2), "--sample-every 2 draws pictures but no tokenizer is given"),
                            (("--vq-ckpt", tokenizer), "but --sample-every is 0: give --sample-every STEPS too"),
                            (("--sample-every", 2, "--vq-ckpt", tmp_path / "none"), "none does not exist"),
                            (("--sample-every", 2, "--vq-ckpt", tmp_path / "other.safetensors"), "is tokenizer"),
                            (("--sample-every", -1, "--vq-ckpt", tokenizer), "--sample-every -1 is out of range")):
        assert sentence in refused(capsys, train_c2i.main, *run_options(codes, tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_code_maps_are_drawn_where_a_tokenizer_decodes_them(capsys, tmp_path):
    """IAR's order of codes has a tokenizer of its own, beside the map; CTF's stages have none."""
    torch.manual_seed(0)
    model = VQModel(type(TINY_VQ)(**vars(TINY_VQ) | {"quantizer": "single", "codebook_sizes": (16,)}))
    about = {"model": to_dict(model.config), "stage": "single", "fingerprint": fingerprint(model.state_dict())}
    export(tmp_path / "vq.safetensors", "tokenizer", model.state_dict(), about)
    codes = named_codes(tmp_path / "codes", NAMES, sizes=(16,), tokenizer=about["fingerprint"])
    for method in ("balanced", "coarse"):
        call(rearrange.main, "--vq-ckpt", tmp_path / "vq.safetensors", "--method", method, "--clusters", 4, "--out",
             tmp_path / method)
    line = run_options(codes, tmp_path / "run", steps=1)
    line = line[: line.index("--codebook-sizes")]
    iar = "--code-map", tmp_path / "balanced" / "code_map.safetensors", "--sample-every", 1, "--vq-ckpt"
    assert "is tokenizer" in refused(capsys, train_c2i.main, *line, *iar, tmp_path / "vq.safetensors")
    call(train_c2i.main, *line, *iar, tmp_path / "balanced")
    assert pictures(tmp_path / "run") == [1]
    for name in ("coarse", "fine"):
        sentence = refused(capsys, train_c2i.main, *line, "--run-dir", tmp_path / f"{name}-run", "--code-map",
                           tmp_path / "coarse" / f"{name}_map.safetensors", "--sample-every", 1, "--vq-ckpt",
                           tmp_path / "vq.safetensors")
        assert "this run is one stage of CTF's two" in sentence and not (tmp_path / f"{name}-run").exists()
