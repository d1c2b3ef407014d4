"""The map of guidance: what it shows is what guided the samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.models.gpt import GPT
from autoregressive.sample import guidance_map
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.pipeline import Pipeline
from tests.conftest import TINY_GPT, call, randomise
from utils.checkpoint import export
from utils.config import to_dict

ATTENTION = SamplingOptions(guidance="attention", cfg_scale=(1.5, 3.0, 1.0, 2.0), cfg_attention_weight=0.4)


def pipeline(models, sampling) -> Pipeline:
    """The tiny models under given sampling options."""
    return Pipeline(ModelOptions(*models), sampling, FineOptions(), torch.device("cpu"))


def measured(drawn: Pipeline, *labels: int) -> guidance_map.GuidanceMap:
    """The map of samples 0, 1, ... of these classes."""
    uniforms = drawn.uniforms(drawn.sampling.seed, np.arange(len(labels)))
    return guidance_map.measure(drawn, torch.tensor(labels), uniforms, drawn.sampling)


def test_scale_follows_from_attention_and_progress(models):
    """The released formula, cell by cell; the images are those that sampling gives."""
    drawn = pipeline(models, ATTENTION)
    found = measured(drawn, 0, 1, 2)
    assert np.array_equal(found.images, drawn.sample(np.arange(3), np.arange(3)))
    assert found.attention.shape == (3, 4, 4) and found.scale.shape == (3, 2, 4, 4)
    assert np.allclose(found.attention[:, 0, 0], 1) and ((found.attention > 0) & (found.attention <= 1)).all()
    assert found.attention.std() > 0.01  # otherwise the next lines would show little
    progress = np.arange(16).reshape(4, 4) / 15
    for stream, (start, end) in enumerate(((1.5, 3.0), (1.0, 2.0))):
        expected = start + (end - start) * (progress + 0.4 * found.attention)
        assert np.allclose(found.scale[:, stream], expected, atol=1e-6)


def test_a_constant_scale_is_flat_and_its_attention_is_shown_too(models):
    """Figure 6a: the same scale everywhere, whatever the model attends to."""
    found = measured(pipeline(models, SamplingOptions(guidance="constant", cfg_scale=(2.0,))), 1)
    assert (found.scale == 2).all() and found.attention.std() > 0.01


def test_picture_and_numbers_are_written(models, tmp_path):
    """One command, one picture."""
    call(guidance_map.main, "--gpt-ckpt", models[0], "--vq-ckpt", models[1], "--classes", 0, 2, "--class-names", "cat", "dog",
         "--cfg-scale", 1.5, 3, "--out", tmp_path / "map.png", "--device", "cpu")
    numbers = json.loads((tmp_path / "map.json").read_text())
    assert numbers["classes"] == [0, 2] and np.array(numbers["scale"]).shape == (2, 2, 4, 4)
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width > 600 and len(set(np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(1).round())) > 20


@pytest.mark.parametrize("options, words", [
    (("--classes", 3), "--classes 3 is out of range: the model knows classes 0 to 2"),
    (("--class-names", "a"), "--class-names has 1 names for the 2 --classes"),
    (("--out", "map.txt"), "give one that ends in .png, .pdf or .svg"),
    (("--gpt-ckpt", "alternating.safetensors"), "takes more than one trunk step for a cell"),
])
def test_mistakes_are_one_sentence(models, tmp_path, options, words, capsys, monkeypatch):
    """A paradigm of two steps a cell has no map of cells."""
    monkeypatch.chdir(tmp_path)
    config = replace(TINY_GPT, paradigm="alternating", context="none")
    tokenizer = pipeline(models, ATTENTION).tokenizer.provenance.fingerprint
    export(tmp_path / "alternating.safetensors", "gpt", randomise(GPT(config)).state_dict(),
           {"model": to_dict(config), "tokenizer": tokenizer})
    with pytest.raises(SystemExit) as stopped:
        call(guidance_map.main, "--gpt-ckpt", models[0], "--vq-ckpt", models[1], "--classes", 0, 1, "--cfg-scale", 2,
             "--device", "cpu", *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not list(tmp_path.glob("map.*"))
