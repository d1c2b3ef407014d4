"""Training from captions: the same trainer, on one process and on two; what is exported, counted, evaluated and refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.generate import SamplingOptions, carried_sampling, generate
from autoregressive.models.gpt import GPT, load_gpt
from autoregressive.sample import sample_c2i
from autoregressive.train import evaluate_c2i, train_c2i, train_t2i
from autoregressive.train.estimate import measure
from autoregressive.train.options import TrainConfig, gpt_config, recipe, told
from autoregressive.train.sources import SOURCES
from scripts import released_weights
from tests.conftest import GOLDEN, TINY_GPT, call, command, export_models, losses
from tests.synthetic_captions import ENCODER, LENGTH, TEXT, WIDTH, SomeValid
from tests.test_bad_input import refused
from tests.test_codes import write_codes
from tests.test_conditions import captions, published
from tests.test_npz import ALONE
from tests.test_text_features import header
from tests.test_train import gpt_options
from utils.checkpoint import export, read_export
from utils.config import parse, to_dict
from utils.text_encoders import encoder_facts
from utils.text_shards import TEXT as TEXT_FOLDER
from utils.text_shards import CaptionedCodes, TextWriter


def text_options(codes: Path, run_dir: Path, steps: int = 4, **extra) -> list:
    """Command line of a small deterministic training from captions."""
    options = gpt_options(codes, run_dir, steps, condition="text", ema_decay=0.9, checkpoint_every=3, **extra)
    at = options.index("--num-classes")
    return options[:at] + options[at + 2 :]


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Random codes of three classes."""
    return write_codes(tmp_path_factory.mktemp("data") / "codes")


@pytest.fixture(scope="module")
def reference(codes, tmp_path_factory) -> Path:
    """The run folder of four steps in one process, with held-out codes."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "text", TEXT._replace(dataset=SomeValid))
        call(train_c2i.main, *text_options(codes, run_dir, data_parallel="none", val_code_path=codes, eval_every=0))
    return run_dir


def test_a_run_from_captions_is_exported_whole(reference):
    """The file says which captions it reads and how it is sampled; the null caption comes with it, from checkpoints too."""
    gpt, stored = load_gpt(reference), load_gpt(sorted((reference / "checkpoints").glob("step-*"))[-1])
    config = gpt.config
    assert (config.condition, config.caption_length, config.caption_dim, config.caption_rotary) == ("text", LENGTH, WIDTH,
                                                                                                 "identity")
    assert gpt.provenance.encoder == ENCODER and carried_sampling(gpt) == SamplingOptions("constant", (7.5,), top_k=(1000,))
    for loaded in (gpt, stored):
        torch.manual_seed(0)
        assert torch.equal(loaded.condition.null_caption, GPT(config).condition.null_caption)  # never trained
    assert generate(gpt, captions(3, 1, width=WIDTH, positions=LENGTH), carried_sampling(gpt), torch.rand(2, 2, 16)).shape == (
        2, 2, 16)


def test_held_out_likelihoods_are_of_valid_samples(codes, reference, tmp_path, monkeypatch):
    """evaluate_c2i.py on the exported file says what training logged; seven of 48 samples are not counted."""
    monkeypatch.setitem(SOURCES, "text", TEXT._replace(dataset=SomeValid))
    call(evaluate_c2i.main, "--gpt-ckpt", reference, "--code-path", codes, "--out", tmp_path / "bits.json", "--device", "cpu")
    alone, valid = json.loads((tmp_path / "bits.json").read_text()), 48 - 7
    assert losses(reference, "eval/bits_per_image")[4] == pytest.approx(alone["bits_per_image"], abs=1e-3)
    assert losses(reference, "eval/images") == {4: valid} and alone["images"] == valid


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_like_one(codes, tmp_path, monkeypatch, mode):
    """Data parallelism is an implementation detail from captions too, the constant null caption included."""
    monkeypatch.setitem(SOURCES, "text", TEXT)
    call(train_c2i.main, *text_options(codes, tmp_path / "one", data_parallel="none"))
    command("tests/synthetic_captions.py", *text_options(codes, tmp_path / "two", data_parallel=mode), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    for a, b in zip(load_gpt(tmp_path / "two").buffers(), load_gpt(tmp_path / "one").buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_plan_counts_the_positions_of_captions():
    """Flops and memory of a dry run: 119 positions more than a class takes, in the trunk alone."""
    config = parse(TrainConfig, recipe, ["--code-path", "nowhere", "--condition", "text", "--gpt-model", "GPT-tiny",
                                         "--codebook-sizes", "256", "4096"])
    model = gpt_config(config.gpt, (256, 4096), caption=told(config).fields)
    assert (model.condition, model.caption_length, model.caption_dim) == ("text", 120, 2048)
    text, plain = measure(model, bf16=False), measure(replace(model, condition="class"), bf16=False)
    trunk, projection = sum(p.numel() for p in GPT(model).layers.parameters() if p.ndim == 2), 128 * (2048 + 128)
    products = 2 * trunk * 119 + 2 * projection * 120
    attention = 4 * model.n_layer * model.dim * ((119 + 256) ** 2 - 256**2)        # which torch counts on a GPU alone
    assert products <= text.flops - plain.flops <= products + attention
    assert text.parameters - plain.parameters == projection - 1001 * 128
    assert 1.1 < text.kept / plain.kept < 1.6 and config.run.run_dir == Path("runs/GPT-tiny-256-text")


def test_what_does_not_apply_is_refused(capsys, codes, models, tmp_path, monkeypatch):
    """Options of the other condition, no captions, other captions, and the other sampler: one sentence each."""
    options = text_options(codes, tmp_path / "run")
    assert "holds no caption features" in refused(capsys, train_c2i.main, *options)
    monkeypatch.setitem(SOURCES, "text", TEXT)
    assert "--num-classes 3" in refused(capsys, train_c2i.main, *options, "--num-classes", 3)
    sentence = refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "run"), "--caption-rotary", "zero")
    assert "--caption-rotary zero" in sentence and "--condition is class" in sentence
    assert not (tmp_path / "run").exists()
    gpt = GPT(replace(TINY_GPT, condition="text", caption_length=LENGTH, caption_dim=WIDTH + 1))
    export(tmp_path / "gpt.safetensors", "gpt", gpt.state_dict(), {"model": to_dict(gpt.config), "tokenizer": ""})
    sentence = refused(capsys, sample_c2i.main, "--gpt-ckpt", tmp_path, "--vq-ckpt", models[1], "--cfg-scale", 2, "--guidance",
                       "constant", "--device", "cpu", "--out", tmp_path / "grid.png")
    assert "conditioned on text" in sentence and "sample_t2i.py" in sentence
    sentence = refused(capsys, evaluate_c2i.main, "--gpt-ckpt", tmp_path, "--code-path", codes, "--device", "cpu")
    assert f"caption_dim {WIDTH}" in sentence and f"{WIDTH + 1}" in sentence


# --- which captions --------------------------------------------------------------------------------------------------


def own_text(folder: Path, crops: int = 2, **changed) -> Path:
    """Features [48 images, crops] whose numbers are random, so that each crop is another condition; no image is left out."""
    about = header(crops=crops, short_captions="first-sentence" if crops > 1 else "none", **changed)
    lengths = np.full((about.images, crops), 3)
    folder.mkdir(parents=True)
    writer = TextWriter(folder, about, lengths, ALONE)
    noise = torch.randn(int(lengths.sum()), about.text_width, generator=torch.Generator().manual_seed(0))
    writer.write(np.arange(about.images), 3 * noise)
    writer.finish()
    return folder


def test_features_may_lie_elsewhere(capsys, codes, tmp_path):
    """--text-path wins over what is beside the codes, and is the option that a sentence names."""
    both = write_codes(tmp_path / "codes")
    own_text(both / TEXT_FOLDER)
    elsewhere = own_text(tmp_path / "elsewhere", text_length=7)
    call(train_t2i.main, *text_options(both, tmp_path / "run", 1, data_parallel="none", text_path=elsewhere))
    assert load_gpt(tmp_path / "run").config.caption_length == 7
    for folder, words in ((tmp_path / "nowhere", "holds no caption features"),
                          (own_text(tmp_path / "fewer", images=40), "has features of captions of other images")):
        sentence = refused(capsys, train_t2i.main, *text_options(codes, tmp_path / "other", text_path=folder))
        assert f"--text-path {folder} {words}" in sentence and not (tmp_path / "other").exists()


def test_options_of_captions_that_nothing_reads_are_refused(capsys, codes, tmp_path):
    """A share of short captions where there are none, and captions where images are asked for by class."""
    alone = own_text(tmp_path / "alone", crops=1)
    for share in (0.5, 0.3):  # the default, typed, is a wish like any other
        sentence = refused(capsys, train_t2i.main, *text_options(codes, tmp_path / "run", text_path=alone, short_captions=share))
        assert f"--short-captions {share} asks for short captions but the features (48 images of x) have none" in sentence
    for option, value in (("--text-path", alone), ("--short-captions", 0.5)):
        sentence = refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "run"), option, value)
        assert f"{option} {value} is of captions but --condition is class: leave it out" in sentence
    assert not (tmp_path / "run").exists()


def test_short_captions_are_drawn_where_there_are_any(codes, tmp_path):
    """Nothing is typed: 0.3, LlamaGen's, where the features have short ones, and 0 is recorded where they have none."""
    for crops, share in ((1, 0.0), (2, 0.3)):
        text = own_text(tmp_path / f"text{crops}", crops=crops)
        words = map(str, text_options(codes, tmp_path / f"run{crops}", 1, data_parallel="none", text_path=text))
        config = parse(TrainConfig, recipe, list(words))
        assert config.captions.short_captions == share and told(config).fields["caption_dim"] > 0
    words = ["--code-path", "nowhere", "--condition", "text", "--short-captions", "0.3"]
    assert parse(TrainConfig, recipe, words).captions.short_captions == 0.3


def test_held_out_likelihoods_are_of_whole_captions(tmp_path):
    """They must compare between runs that draw short captions and those that do not."""
    own_text((codes := write_codes(tmp_path / "codes")) / TEXT_FOLDER)
    call(train_t2i.main, *text_options(codes, tmp_path / "run", 2, data_parallel="none", short_captions=1, val_code_path=codes,
                                       eval_every=0, lr=0.01))
    whole, short = (evaluate_c2i.evaluate(load_gpt(tmp_path / "run").eval(), CaptionedCodes(codes, short_captions=share), 48,
                                          ALONE)["bits_per_image"] for share in (0, 1))
    assert losses(tmp_path / "run", "eval/bits_per_image")[2] == pytest.approx(whole, abs=1e-3)
    assert abs(short - whole) > 0.01


def test_another_encoder_is_no_more_of_the_same(capsys, tmp_path):
    """Features of equal shape fit in silence: neither a resumed run nor an evaluation takes them; a moved encoder is the same."""
    own, other, moved = (write_codes(tmp_path / name) for name in ("own", "other", "moved"))
    for codes, changed in ((own, {}), (other, {"encoder_fingerprint": "0" * 16}), (moved, {"encoder_path": "/elsewhere"})):
        own_text(codes / TEXT_FOLDER, **changed)
    call(train_t2i.main, *text_options(own, tmp_path / "run", 1, data_parallel="none"))
    line = "--gpt-ckpt", tmp_path / "run", "--device", "cpu", "--code-path"
    assert f"captions of encoder_fingerprint {'0' * 16} but" in refused(capsys, evaluate_c2i.main, *line, other)
    call(evaluate_c2i.main, *line, moved)
    sentence = refused(capsys, train_t2i.main, *text_options(other, tmp_path / "run", 2, data_parallel="none"))
    assert f"was made with encoder_fingerprint {'f' * 16}, not with {'0' * 16} as now" in sentence
    call(train_t2i.main, *text_options(moved, tmp_path / "run", 2, data_parallel="none"))
    assert sorted(losses(tmp_path / "run")) == [1, 2]


# --- published files ---------------------------------------------------------------------------------------------------


def test_published_files_come_in_and_go_out(capsys, tmp_path):
    """LlamaGen's text-conditional file: its conventions and sampling are carried, and --export gives the same numbers back."""
    weights = {key[2:]: torch.from_numpy(value) for key, value in np.load(GOLDEN / "llamagen_t2i_gpt.npz").items()
               if key.startswith("w/")}
    torch.save({"model": weights}, tmp_path / "t2i.pt")
    shape = "--model-args", json.dumps({"n_head": 4, "grid_size": 4})
    call(released_weights.main, "llamagen-t2i-gpt", tmp_path / "t2i.pt", tmp_path / "ours", *shape)
    gpt, (_, io, given) = load_gpt(tmp_path / "ours"), published()
    with torch.no_grad():
        np.testing.assert_allclose(gpt(given, io["codes"][:, None])[0], io["logits"], atol=1e-4)
    assert (gpt.config.caption_rotary, gpt.config.caption_length, gpt.config.caption_dim) == ("zero", 6, 24)
    assert gpt.provenance.encoder == "google/flan-t5-xl" and not encoder_facts(gpt.provenance.encoder)  # features of any T5 fit
    assert gpt.provenance.sampling == {"guidance": "constant", "cfg_scale": [7.5], "cfg_interval": -1, "top_k": [1000]}
    call(released_weights.main, "llamagen-t2i-gpt", tmp_path / "ours", tmp_path / "again.pt", "--export")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    assert set(again) == set(weights) and all(torch.equal(again[key], weights[key]) for key in weights)
    capsys.readouterr()
    other = released_weights.main, "llamagen-gpt"
    assert "condition text" in refused(capsys, *other, tmp_path / "ours", tmp_path / "x", "--export")
    assert "embedding_table" in refused(capsys, *other, tmp_path / "t2i.pt", tmp_path / "x", *shape)


def test_a_file_from_before_captions_is_of_classes(tmp_path):
    """Files exported earlier lack the new fields: they load as they did, and go out as they did."""
    path, _ = export_models(tmp_path / "models")
    description, tensors = read_export(path, "gpt", "--gpt-ckpt")
    old = {name: value for name, value in description["model"].items() if "caption" not in name and name != "condition"}
    export(path, "gpt", tensors, description | {"model": old})
    gpt = load_gpt(path)
    assert gpt.config.condition == "class" and "cls_embedding.weight" in gpt.state_dict()
