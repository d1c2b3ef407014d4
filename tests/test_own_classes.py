"""One's own classes: what --init-from takes and what it says, the shape from the codes, guidance for any shape."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoregressive.models.generate import SamplingOptions, carried_sampling, cfg_ranges
from autoregressive.models.gpt import GPT, GPT_models, GPTProvenance, build_gpt, load_gpt
from autoregressive.models.guidance import CFG_RANGES, UNPUBLISHED, guidance_range, sampling_preset
from autoregressive.models.transformer import GPTConfig
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.sample.model_options import SHOWN, shown_classes
from autoregressive.train import train_c2i, train_t2i
from autoregressive.train.initial import start_from
from autoregressive.train.options import TrainConfig, recipe
from tests.conftest import TINY_GPT, call, command, losses, randomise
from tests.test_bad_input import refused
from tests.test_npz import ALONE
from tests.test_text_training import own_text, text_options
from tests.test_train import TRAIN, vq_options
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils.checkpoint import export, read_export
from utils.code_shards import CodeHeader
from utils.code_writer import CodeWriter
from utils.config import UserError, parse, to_dict
from utils.initial import Initial, plan_start
from utils.text_shards import TEXT

TABLE = "cls_embedding.weight"


def named_codes(folder: Path, names: tuple[str, ...], classes: int = 0, sizes: tuple[int, ...] = (8, 16), grid: int = 4,
                tokenizer: str = "test", images: int = 48) -> Path:
    """A folder of random codes of named classes, of 8-pixel cells; classes: where there are no names."""
    rng, count = np.random.default_rng(len(names)), classes or len(names)
    header = CodeHeader(tokenizer, list(sizes), grid, 8 * grid, 1, "none", count, images, "random", class_names=list(names))
    folder.mkdir(parents=True, exist_ok=True)
    writer = CodeWriter(folder, header, np.arange(images) % count, ALONE)
    codes = np.stack([rng.integers(0, size, (images, 1, grid**2)) for size in sizes], axis=2)
    writer.write(np.arange(images), codes.astype(np.uint16))
    writer.finish()
    return folder


def options(codes: Path, run_dir: Path, *extra, steps: int = 1) -> list:
    """A training that names no shape, and whose learning rate of zero leaves the weights as they begin."""
    return ["--code-path", codes, "--run-dir", run_dir, "--gpt-model", "GPT-tiny", "--steps", steps, "--lr", 0, "--device", "cpu",
            "--num-workers", 0, "--data-parallel", "none", "--mixed-precision", "none", "--log-every", 1, "--dropout", 0,
            "--class-dropout", 0, *extra]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """GPT-tiny of the classes cat, dog and owl with random weights everywhere, which no training draws."""
    gpt = build_gpt("GPT-tiny", num_classes=3, grid_size=4, codebook_sizes=(8, 16))
    generator, folder = torch.Generator().manual_seed(1), tmp_path_factory.mktemp("base")
    export(folder / "gpt.safetensors", "gpt",
           {name: torch.randn(tensor.shape, generator=generator) for name, tensor in gpt.state_dict().items()},
           {"model": to_dict(gpt.config), "class_names": ["cat", "dog", "owl"], "tokenizer": "test"})
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The exported tensors of a run."""
    return load_gpt(folder).state_dict()


def said(run: Path) -> str:
    """The one line of a run's log about its initial weights."""
    line, = [line for line in (run / "log.txt").read_text().splitlines() if "--init-from" in line]
    return line


def begun(path: Path, names: tuple[str, ...], classes: int = 0, tokenizer: str = "test", **fields) -> tuple[dict, str]:
    """What a GPT begins with, as the trainer makes it, and what is said of it; classes: where there are no names."""
    shape: dict[str, Any] = dict(num_classes=classes or len(names), grid_size=4, codebook_sizes=(8, 16))
    config = GPTConfig(**GPT_models["GPT-tiny"] | shape | fields)
    start = start_from(str(path), False, config, GPTProvenance(class_names=names, tokenizer=tokenizer))
    gpt = GPT(config)
    start.load(gpt)
    return gpt.state_dict(), start.text


# --- which weights are taken ---------------------------------------------------------------------------------------------


def test_rows_of_the_class_table_go_by_name(base, tmp_path):
    """Two of three known classes in another order beside new ones: ids alone would give each the other's row."""
    codes = named_codes(tmp_path / "codes", ("owl", "cat", "fox", "yak"))
    call(train_c2i.main, *options(codes, tmp_path / "run", "--init-from", base, "--ema-decay", 0.9))
    before, after = weights(base), weights(tmp_path / "run")
    for row, old in ((0, 2), (1, 0), (4, 3)):  # the last rows are the null class's
        assert torch.equal(after[TABLE][row], before[TABLE][old])
    assert after[TABLE][2:4].abs().max() < 0.2 < before[TABLE].abs().max()  # drawn with a deviation of 0.02, not taken
    assert all(torch.equal(after[name], before[name]) for name in before if name != TABLE)
    line = said(tmp_path / "run")
    assert "of cls_embedding.weight 3 of 5 rows" in line and f"took {len(before) - 1} of {len(before)} tensors" in line
    assert "classes: took owl, cat and the null class; drew anew fox, yak" in line and "drew anew paradigm" not in line


@pytest.mark.parametrize("names, classes, rows", [
    (("cat", "dog", "owl"), 0, {0: 0, 1: 1, 2: 2, 3: 3}), (("ant", "bee", "fly"), 0, {3: 3}), ((), 3, {0: 0, 1: 1, 2: 2, 3: 3}),
    ((), 2, {2: 3}), (("ant", "cat"), 0, {1: 0, 2: 3})])
def test_every_class_table_keeps_the_null_class(base, names, classes, rows):
    """Guidance needs it from the first step on; without names as many classes are taken for the same ones, others for none."""
    before, (after, _) = weights(base)[TABLE], begun(base, names, classes)
    equal = {row: old for row in range(len(after[TABLE])) for old in range(4) if torch.equal(after[TABLE][row], before[old])}
    assert equal == rows and len(after[TABLE]) == (classes or len(names)) + 1


@pytest.mark.parametrize("fields, anew, kept", [
    (dict(grid_size=6), "", ""), (dict(codebook_sizes=(8, 24)), "paradigm.embeddings.1.weight (24, 128)", "embeddings.0"),
    (dict(paradigm="independent"), "", "layers.0."),
    (dict(qk_norm=True), "layers.*.attention.qk_norms.*.weight (32,) 8 times", ""),
    (dict(paradigm="single", codebook_sizes=(8,)), "paradigm.outputs.0.weight (8, 128)", "layers.3."),
    (dict(head_layers=3), "paradigm.head.layers.2.attention.wqkv.weight (384, 128)", "head.layers.1."),
    (dict(order="random"), "order.target.weight (16, 128)", ""),
    (dict(condition="text"), "cls_embedding.projection", "layers.3.")])
def test_what_does_not_fit_is_drawn_anew_and_said(base, fields, anew, kept):
    """Another grid, other codebooks, another paradigm: the trunk is kept, and the log names the rest."""
    before, (after, line) = weights(base), begun(base, ("cat", "dog", "owl"), **fields)
    taken = {name for name in after if name in before and torch.equal(after[name], before[name])}
    assert f"took {len(taken)} of {len(after)} tensors" in line and anew in line, line
    assert {name for name in (after if kept else before) if kept in name} <= taken
    assert ("drew anew" in line) == (len(taken) < len(after))


def test_a_file_that_shares_nothing_is_refused(capsys, base, tmp_path):
    """Training from scratch in silence, for a week, is the worst of all answers; refused before anything is made."""
    codes = named_codes(tmp_path / "codes", ("cat", "dog", "owl"))
    sentence = refused(capsys, train_c2i.main, *options(codes, tmp_path / "run", "--gpt-model", "GPT-small", "--init-from", base))
    assert f"--init-from {base} shares no weights with this model" in sentence and "give a file of the same width" in sentence
    for name in ("nowhere", "codes"):
        words = options(codes, tmp_path / "run", "--init-from", tmp_path / name)
        assert "does not exist" in refused(capsys, train_c2i.main, *words)
    assert not (tmp_path / "run").exists()


def test_strict_refuses_every_difference(capsys, base, tmp_path):
    """The rule of before: other classes, other names, other shapes; what fits is taken, and a resumed run cannot change it."""
    def strict(names: tuple[str, ...], *extra) -> list:
        codes = named_codes(tmp_path / "-".join(names), names)
        return options(codes, tmp_path / "run", "--init-from", base, "--init-strict", *extra)

    assert "names 3 classes but --code-path names 2" in refused(capsys, train_c2i.main, *strict(("cat", "dog")))
    assert "calls class 1 'dog'" in refused(capsys, train_c2i.main, *strict(("cat", "fox", "owl")))
    assert "order.target.weight" in refused(capsys, train_c2i.main, *strict(("cat", "dog", "owl"), "--order", "random"))
    assert not (tmp_path / "run").exists()
    call(train_c2i.main, *strict(("cat", "dog", "owl")))
    assert "took all" in said(tmp_path / "run")
    again = [word for word in strict(("cat", "dog", "owl"), "--steps", 2) if word != "--init-strict"]
    assert "init_strict True, not with False as now" in refused(capsys, train_c2i.main, *again)


def test_a_damaged_weight_is_refused_only_where_it_is_taken(base, tmp_path):
    """Not a number among the weights would be in every loss; among those that are left it does no harm."""
    description, tensors = read_export(base, "gpt", "--init-from")
    for name, path in ((TABLE, "table"), ("layers.0.attention.wo.weight", "layer"), ("paradigm.outputs.1.0.weight", "head")):
        export(tmp_path / f"{path}.safetensors", "gpt", tensors | {name: torch.full_like(tensors[name], torch.nan)}, description)
    for path in ("table", "layer"):
        with pytest.raises(UserError, match="with infinite or missing values"):
            begun(tmp_path / f"{path}.safetensors", ("cat", "fox"))
    after, _ = begun(tmp_path / "head.safetensors", ("cat", "fox"), paradigm="single", codebook_sizes=(8,))
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_codes_of_another_tokenizer_are_said(base):
    """Tables of equal shape fit, though the same number may be another picture."""
    _, line = begun(base, ("cat", "dog", "owl"), tokenizer="other")
    assert "was trained on codes of tokenizer test, and those of this run are of other" in line
    assert "tokenizer" not in begun(base, ("cat", "dog", "owl"))[1]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_every_process_takes_the_same_weights(base, tmp_path, mode):
    """Processes that began from different rows would train different models; a resumed run does not begin again."""
    codes = named_codes(tmp_path / "codes", ("owl", "fox"))
    run = options(codes, tmp_path / "one", "--init-from", base, "--lr", 1e-3, "--ema-decay", 0.9, "--global-batch-size", 8,
                  steps=3)
    call(train_c2i.main, *run)
    two = [*run, "--run-dir", tmp_path / "two", "--data-parallel", mode]
    command(TRAIN, *two, "--steps", 2 if mode == "fsdp" else 3, processes=2)
    if mode == "fsdp":
        resumed = command(TRAIN, *two, processes=2)
        assert "resumed from" in resumed.stderr and "drew anew" not in resumed.stderr
    assert "fox" in said(tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_another_text_encoder_is_no_more_taken_in_silence(capsys, tmp_path):
    """Features of equal shape mean something else: what reads them is drawn anew and said, or refused with --init-strict."""
    own, other = (named_codes(tmp_path / name, (), 1) for name in ("own", "other"))
    own_text(own / TEXT)
    own_text(other / TEXT, encoder_fingerprint="0" * 16)
    start = dict(steps=1, data_parallel="none", lr=0)
    call(train_t2i.main, *text_options(own, tmp_path / "base", **start))
    call(train_t2i.main, *text_options(own, tmp_path / "same", init_from=tmp_path / "base", **start))
    assert "drew anew" not in said(tmp_path / "same")
    call(train_t2i.main, *text_options(other, tmp_path / "run", init_from=tmp_path / "base", seed=1, **start))
    line, before, after = said(tmp_path / "run"), weights(tmp_path / "base"), weights(tmp_path / "run")
    assert f"captions are of encoder_fingerprint {'f' * 16} and those of this run of {'0' * 16}" in line
    assert "drew anew cls_embedding.null_caption" in line and "cls_embedding.projection.0.weight (128, " in line
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("cls_embedding.")}
    words = text_options(other, tmp_path / "x", init_from=tmp_path / "base", **start)
    sentence = refused(capsys, train_t2i.main, *words, "--init-strict")
    assert "reads captions of encoder_fingerprint" in sentence and "leave --init-strict out" in sentence


def test_a_long_list_is_cut():
    """A thousand classes, or a hundred layers, are no line to read."""
    model, file = torch.nn.Sequential(*(torch.nn.Linear(4, 5 + k) for k in range(14))), {"0.weight": torch.zeros(5, 4)}
    text = plan_start(model, Initial("--init-from x", {}, file)).text
    assert text.startswith("--init-from x: took 1 of 28 tensors, 20 of") and text.endswith("and 17 more")


def test_a_tokenizer_of_other_codebooks_keeps_its_autoencoder(capsys, tmp_path):
    """More codes for the same pictures: encoder and decoder go on; stage 2 needs the whole of its stage 1."""
    images = tmp_path / "images.npz"
    np.savez(images, images=np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), labels=np.arange(8) % 2)
    care = ("--codebook-init", "uniform", "--revive-every", 0, "--lr", 0, "--ema-decay", 0)
    call(vq_train.main, *vq_options(images, tmp_path / "base", "semantic", 1, *care))
    more = (*care, "--codebook-sizes", 12, 16, "--init-from", tmp_path / "base", "--seed", 1)
    call(vq_train.main, *vq_options(images, tmp_path / "run", "semantic", 1, *more))
    before, after = (load_tokenizer(tmp_path / name).state_dict() for name in ("base", "run"))
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"quantizer.codebooks.0"}
    assert "drew anew quantizer.codebooks.0 (12, 8)" in said(tmp_path / "run")
    for stage, extra in (("semantic", ("--init-strict",)), ("dual", ())):
        sentence = refused(capsys, vq_train.main, *vq_options(images, tmp_path / "x", stage, 1, *more, *extra))
        assert "quantizer.codebooks.0 of shape (8, 8) but the model needs (12, 8)" in sentence
    other = vq_options(images, tmp_path / "x", "semantic", 1, *care, "--init-from", tmp_path / "base", "--code-dim", 4)
    call(vq_train.main, *other)
    assert "quant_conv.weight (4, 64, 1, 1)" in said(tmp_path / "x")


# --- the shape comes from the codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, sizes, names", [(4, (8, 16), ("a", "b", "c")), (6, (32,), ("a", "b", "c", "d", "e"))])
def test_codes_alone_say_the_shape(tmp_path, grid, sizes, names):
    """Three failed starts of a newcomer: grid, classes and codebooks stand in the codes, and 48 images are no batch of 256."""
    codes = named_codes(tmp_path / "codes", names, grid=grid, sizes=sizes)
    config = parse(TrainConfig, recipe, ["--code-path", str(codes)])
    assert (config.gpt.image_size, config.gpt.downsample_size, config.gpt.num_classes) == (8 * grid, 8, len(names))
    assert config.run.run_dir == Path(f"runs/GPT-B-{8 * grid}") and config.batch.global_batch_size == 16
    words = "--gpt-model", "GPT-tiny", "--run-dir", tmp_path / "run", "--steps", 1, "--num-workers", 0, "--device", "cpu"
    call(train_c2i.main, "--code-path", codes, *words)
    gpt = load_gpt(tmp_path / "run")
    assert (gpt.config.grid_size, gpt.config.codebook_sizes, gpt.config.num_classes) == (grid, sizes, len(names))
    assert gpt.provenance.class_names == names and gpt.provenance.image_size == 8 * grid
    saved = json.loads((tmp_path / "run" / "options.json").read_text())["options"]["gpt"]
    assert (saved["image_size"], saved["downsample_size"], saved["num_classes"]) == (8 * grid, 8, len(names))


def test_a_typed_shape_must_be_that_of_the_codes(capsys, tmp_path):
    """Whoever says a number must be told when it is wrong, in one sentence."""
    codes = named_codes(tmp_path / "codes", ("a", "b", "c"))
    for words, seen in ((("--image-size", 64), "grid_size 4 but --image-size 64 / 8 says 8"),
                        (("--downsample-size", 4), "grid_size 4 but --image-size 32 / 4 says 8"),
                        (("--num-classes", 7), "num_classes 3 but --num-classes says 7"),
                        (("--codebook-sizes", 8, 9), "codebook_sizes [8, 16] but --codebook-sizes says [8, 9]"),
                        (("--image-size", 36), "--image-size 36 is not a multiple of 8")):
        assert seen in refused(capsys, train_c2i.main, *options(codes, tmp_path / "run", *words))
    call(train_c2i.main, *options(codes, tmp_path / "run", "--image-size", 32, "--downsample-size", 8, "--num-classes", 3))


def test_recipes_are_found_by_the_cells_of_the_codes(tmp_path):
    """--gpt-model alone selects table 11's row of the grid that the codes have; without codes, 256 pixels."""
    for grid, batch, epochs in ((16, 256, 50), (24, 512, 300)):
        codes = named_codes(tmp_path / str(grid), (), 1000, (256, 4096), grid, images=1000)
        config = parse(TrainConfig, recipe, ["--code-path", str(codes), "--gpt-model", "GPT-XXL"])
        assert (config.batch.global_batch_size, config.batch.epochs) == (batch, epochs)
    config = parse(TrainConfig, recipe, ["--code-path", "nowhere", "--gpt-model", "GPT-XXL"])
    assert (config.gpt.image_size, config.gpt.num_classes, config.batch.epochs) == (256, 1000, 50)
    config = parse(TrainConfig, recipe, ["--code-path", str(tmp_path / "16"), "--condition", "text"])
    assert config.gpt.num_classes == 0  # of classes, which captions have not


# --- sampling without a flag -------------------------------------------------------------------------------------------


def test_every_shape_has_guidance():
    """Published where published, the nearest grid's for its size, and one choice for all other sizes."""
    assert guidance_range("GPT-XL", 2, 24) == CFG_RANGES[2, "GPT-XL", 24] == (1.35, 3.0)
    assert guidance_range("GPT-XL", 2, 32) == (1.35, 3.0) and guidance_range("GPT-XL", 2, 8) == (1.25, 3.0)
    assert guidance_range("GPT-XXL", 1, 20) == (1.75, 1.75)  # as far from both
    assert guidance_range("GPT-3B", 1, 16) == (1.65, 1.65) and guidance_range("GPT-XXXL", 2, 24) == CFG_RANGES[2, "GPT-XXL", 24]
    assert guidance_range("GPT-small", 2, 8) == guidance_range("", 2, 16) == UNPUBLISHED[2]
    assert sampling_preset("GPT-small", 1, 8) == {"guidance": "constant", "cfg_scale": [UNPUBLISHED[1][0]], "cfg_interval": -1}
    assert sampling_preset("GPT-tiny", 2, 4)["guidance"] == "attention"


def test_python_needs_no_scale_either(gpt):
    """An own GPT that carries nothing, and options that say nothing: the same range that a training would have carried."""
    assert cfg_ranges(SamplingOptions(), gpt) == [UNPUBLISHED[2]] * 2
    gpt.provenance.gpt_model = "GPT-B"
    assert cfg_ranges(SamplingOptions(), gpt) == [CFG_RANGES[2, "GPT-B", 16]] * 2
    text = randomise(GPT(replace(TINY_GPT, condition="text", caption_length=4, caption_dim=8)))
    assert cfg_ranges(SamplingOptions(guidance="constant"), text) == [(7.5, 7.5)] * 2


def test_own_models_are_sampled_without_a_flag(models, tmp_path):
    """What training exports for three classes and 4x4 cells, by both samplers; the picture has a row of each class it knows."""
    _, tokenizer = models
    fingerprint = load_tokenizer(tokenizer).provenance.fingerprint
    codes = named_codes(tmp_path / "codes", ("a cat", "a dog", "an owl"), tokenizer=fingerprint)
    call(train_c2i.main, *options(codes, tmp_path / "run"))
    line = "--gpt-ckpt", tmp_path / "run", "--vq-ckpt", tokenizer, "--device", "cpu"
    call(sample_c2i.main, *line, "--per-class", 1, "--out", tmp_path / "x.png")
    call(sample_c2i_ddp.main, *line, "--per-class", 1, "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as found:
        assert found["arr_0"].shape == (3, 32, 32, 3) and found["class_names"].tolist() == ["a cat", "a dog", "an owl"]
        assert json.loads(str(found["options"]))["cfg_scale"] == list(UNPUBLISHED[2])
    assert carried_sampling(load_gpt(tmp_path / "run")) == SamplingOptions("attention", UNPUBLISHED[2], 0.05)


def test_the_default_classes_are_some_that_the_model_knows(models, tmp_path, monkeypatch):
    """207 and its seven companions are of ImageNet; typed classes win, and a file's nonsense is left to the loader."""
    assert shown_classes(1000) == SHOWN and shown_classes(3) == (0, 1, 2) and shown_classes(50) == tuple(range(8))
    drawn = []
    monkeypatch.setattr(sample_c2i, "image_grid", lambda images, columns, rows, scale: drawn.append(rows))
    monkeypatch.setattr(sample_c2i, "save_picture", lambda picture, path: None)
    many = replace(TINY_GPT, num_classes=GPTConfig.num_classes)
    export(tmp_path / "gpt.safetensors", "gpt", GPT(many).state_dict(), {"model": to_dict(many)})
    for gpt, words in ((models[0], ()), (models[0], ("--classes", 2)), (tmp_path / "gpt.safetensors", ())):
        call(sample_c2i.main, "--gpt-ckpt", gpt, "--vq-ckpt", models[1], "--device", "cpu", "--per-class", 1, "--out",
             tmp_path / "x.png", *words)
    assert drawn == [["class 0", "class 1", "class 2"], ["class 2"], [f"class {label}" for label in SHOWN]]
