"""The compared systems through the same entry points: code maps, two-stage sampling, likelihoods, sweeps, tables."""

import json
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.ctf import FineOptions, refine
from autoregressive.models.generate import SamplingOptions, draw_uniforms, generate
from autoregressive.models.gpt import build_gpt, load_gpt
from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.pipeline import Pipeline
from autoregressive.train import evaluate_c2i, train_c2i
from autoregressive.train.dry_run import print_dry_run
from autoregressive.train.options import TrainConfig, recipe
from evaluations.c2i.judge import features_and_votes, judge
from scripts.paper import sweep_c2i, table
from tests.conftest import TINY_VQ, call, command, losses, randomise
from tests.test_bad_input import refused
from tests.test_codes import ALONE, write_codes
from tests.test_train import TRAIN, gpt_options
from tokenizer.tokenizer_image import rearrange
from tokenizer.tokenizer_image.quantizer import ProductQuantizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.checkpoint import export, fingerprint
from utils.classifier import ClassifierConfig, SmallClassifier, load_classifier
from utils.code_map import load_code_map
from utils.code_shards import CodeDataset, CodeHeader
from utils.code_writer import CodeWriter
from utils.config import UserError, parse
from utils.distributed import setup
from utils.npz import open_array


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A single-codebook tokenizer, codes of 48 images, IAR's and CTF's maps, and a classifier."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = VQModel(replace(TINY_VQ, quantizer="single", codebook_sizes=(16,)))
    source = fingerprint(model.state_dict())
    export(folder / "vq" / "tokenizer.safetensors", "tokenizer", model.state_dict(),
           {"model": asdict(model.config), "stage": "single", "fingerprint": source})
    header = CodeHeader(source, [16], 4, 32, 1, "none", 3, 48, source="random")
    (folder / "codes").mkdir()
    writer = CodeWriter(folder / "codes", header, np.arange(48) % 3, ALONE)
    writer.write(np.arange(48), np.random.default_rng(0).integers(0, 16, (48, 1, 1, 16)).astype(np.uint16))
    writer.finish()
    call(rearrange.main, "--vq-ckpt", folder / "vq", "--out", folder / "iar", "--clusters", 4)
    call(rearrange.main, "--vq-ckpt", folder / "vq", "--out", folder / "ctf", "--method", "coarse", "--clusters", 4)
    classifier = SmallClassifier(ClassifierConfig(num_classes=3, channels=(8, 8)))
    export(folder / "judge.safetensors", "classifier", classifier.state_dict(), {"model": asdict(classifier.config)})
    return folder


def train(world: Path, name: str, *options, steps: int = 3) -> Path:
    """Train a GPT on the world's codes; returns its run folder."""
    flags = gpt_options(world / "codes", world / name, steps=steps)
    call(train_c2i.main, *flags[: flags.index("--codebook-sizes")], *options)
    return world / name


@pytest.fixture(scope="module")
def runs(world) -> dict[str, Path]:
    """LlamaGen, IAR and both stages of CTF."""
    return {"llamagen": train(world, "llamagen"),
            "iar": train(world, "iar-gpt", "--code-map", world / "iar" / "code_map.safetensors", "--cluster-weight", 1,
                         "--cluster-size", 4),
            "coarse": train(world, "coarse", "--code-map", world / "ctf" / "coarse_map.safetensors"),
            "fine": train(world, "fine", "--code-map", world / "ctf" / "fine_map.safetensors")}


@pytest.fixture(scope="module")
def dual_codes(tmp_path_factory) -> Path:
    """Random codes of two codebooks."""
    return write_codes(tmp_path_factory.mktemp("dual") / "codes")


def export_random(run: Path, folder: Path) -> None:
    """A trained GPT's file with weights that make guidance visible, which a few steps do not."""
    gpt = load_gpt(run)
    export(folder / "gpt.safetensors", "gpt", randomise(gpt).state_dict(), asdict(gpt.provenance) | {"model": asdict(gpt.config)})


def sample_options(gpt: Path, tokenizer: Path, out: Path, *extra) -> list:
    """A short sampling command line."""
    return ["--gpt-ckpt", gpt, "--vq-ckpt", tokenizer, "--per-class", 2, "--batch-size", 4, "--guidance", "constant",
            "--cfg-scale", 2, "--out", out, "--device", "cpu", *extra]


def test_maps_are_applied_while_reading(world):
    """IAR and CTF train on existing shards, without extracting again."""
    plain = CodeDataset(world / "codes")
    items = [(0, index) for index in range(48)]
    for name, folder in (("code_map", "iar"), ("coarse_map", "ctf"), ("fine_map", "ctf")):
        code_map = load_code_map(world / folder / f"{name}.safetensors")
        mapped, _ = CodeDataset(world / "codes", transform=code_map.apply).__getitems__(items)
        original, _ = plain.__getitems__(items)
        expected = torch.from_numpy(code_map.table)[original[:, 0]].movedim(-1, 1)
        assert torch.equal(mapped, expected) and mapped.shape[1] == len(code_map.codebook_sizes)


def test_paradigms_follow_from_the_codes_and_losses_are_logged(runs):
    """One codebook means single prediction; IAR logs token loss, cluster loss and cluster accuracy."""
    assert [load_gpt(runs[name]).config.paradigm for name in runs] == ["single", "single", "single", "fine"]
    assert load_gpt(runs["coarse"]).config.codebook_sizes == (4,) and load_gpt(runs["fine"]).config.codebook_sizes == (4, 16)
    for name in ("loss_token", "loss_cluster", "cluster_accuracy"):
        assert len(losses(runs["iar"], name)) == 3
    total, token, cluster = (losses(runs["iar"], name)[2] for name in ("loss", "loss_token", "loss_cluster"))
    assert total == pytest.approx(token + cluster, rel=1e-5)


def test_every_system_samples_with_one_command(world, runs, tmp_path):
    """CTF's two stages are one command, IAR's reordered tokenizer a plain --vq-ckpt."""
    for gpt, tokenizer, extra in (("llamagen", "vq", ()), ("iar", "iar", ()), ("coarse", "vq", ("--fine-ckpt", runs["fine"])),
                                  ("coarse", "vq", ("--fine-ckpt", runs["fine"], "--fine-candidates", "cluster"))):
        out = tmp_path / f"{gpt}{len(extra)}.npz"
        call(sample_c2i_ddp.main, *sample_options(runs[gpt], world / tokenizer, out, *extra))
        with np.load(out) as data:
            assert data["arr_0"].shape == (6, 32, 32, 3) and data["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]


def test_stages_that_do_not_belong_together_are_refused(capsys, world, runs, tmp_path):
    """Coarse labels without their second stage, or a second stage as the first, would decode to noise."""
    def sentence(gpt: str, *extra) -> str:
        return refused(capsys, sample_c2i_ddp.main, *sample_options(runs[gpt], world / "vq", tmp_path / "x.npz", *extra))

    assert "--fine-ckpt" in sentence("coarse") and "--fine-ckpt" in sentence("fine")
    assert "rearrange.py" in sentence("llamagen", "--fine-ckpt", runs["fine"])
    assert "is tokenizer" in sentence("iar")
    wrong = ["--code-path", world / "codes", "--run-dir", tmp_path / "run", "--gpt-model", "GPT-tiny", "--image-size", 32,
             "--downsample-size", 8, "--num-classes", 3, "--device", "cpu"]
    assert "predicts 2 codes" in refused(capsys, train_c2i.main, *wrong, "--paradigm", "grouped")
    assert "--cluster-size 5" in refused(capsys, train_c2i.main, *wrong, "--cluster-weight", 1, "--cluster-size", 5)
    assert "code_map" in refused(capsys, train_c2i.main, *wrong, "--code-map", world / "judge.safetensors")
    assert "--window-size 3" in refused(capsys, train_c2i.main, *wrong, "--window-size", 3)
    fine_map = ["--code-map", world / "ctf" / "fine_map.safetensors"]
    assert "fine labels" in refused(capsys, train_c2i.main, *wrong, *fine_map, "--paradigm", "hierarchical")
    assert "no second stage" in sentence("coarse", "--fine-ckpt", runs["llamagen"]) or "rearrange.py" in sentence(
        "coarse", "--fine-ckpt", runs["llamagen"])


def test_likelihood_of_the_stages_adds_up(world, runs, tmp_path):
    """Bits per image are the code length: an untrained model's is known, and CTF's is the sum of its stages."""
    def bits(name: str, *extra) -> dict:
        call(evaluate_c2i.main, "--gpt-ckpt", runs[name], "--code-path", world / "codes", "--out", tmp_path / "bits.json",
             "--device", "cpu", *extra)
        return json.loads((tmp_path / "bits.json").read_text())

    single = bits("llamagen")
    assert single["images"] == 48 and single["bits_per_image"] == pytest.approx(16 * 4, rel=0.1)  # 16 cells of 4 bits
    assert single["nats_token"] == pytest.approx(single["bits_per_image"] * np.log(2) / 16)
    coarse = bits("coarse", "--code-map", world / "ctf" / "coarse_map.safetensors")
    fine = bits("fine", "--code-map", world / "ctf" / "fine_map.safetensors")
    labels = load_code_map(world / "ctf" / "coarse_map.safetensors").table[:, 0]
    members = np.bincount(labels)[labels][np.load(world / "codes" / "codes.npy")[:, 0, 0]]  # [48, 16]
    assert coarse["bits_per_image"] == pytest.approx(16 * 2, rel=0.1)
    assert fine["bits_per_image"] == pytest.approx(np.log2(members).sum(1).mean(), rel=0.1)


def test_the_pair_of_stages_is_coarse_then_fine(world, runs):
    """The command's pipeline: coarse labels as the first stage alone draws them, each refined, by draws of its own."""
    models = ModelOptions(runs["coarse"], world / "vq", runs["fine"])
    pipeline = Pipeline(models, SamplingOptions(guidance="constant", cfg_scale=(2.0,)), FineOptions(), torch.device("cpu"))
    randomise(pipeline.gpt)
    randomise(pipeline.fine)
    labels, samples = torch.tensor([0, 1, 2, 1]), np.arange(5, 9)
    uniforms = draw_uniforms(0, samples, 2, 16)
    coarse = generate(pipeline.gpt, labels, pipeline.sampling, uniforms[:, :1])
    expected = refine(pipeline.fine, labels, coarse, FineOptions(), uniforms[:, 1], pipeline.coarse_of)
    assert torch.equal(pipeline.sample_codes(labels, samples), expected)
    swapped = refine(pipeline.fine, labels, coarse, FineOptions(), uniforms[:, 0], pipeline.coarse_of)
    assert not torch.equal(expected, swapped) and not torch.equal(expected, coarse)

    def perfect(labels, coarse):
        """A second stage that knows that every cell had the last code of its cluster."""
        members = torch.arange(16) * (pipeline.coarse_of == coarse[:, 0, :, None])
        return [torch.nn.functional.one_hot(members.argmax(-1), 16) * 100.0]

    pipeline.fine = perfect
    codes = pipeline.sample_codes(labels, samples)
    assert torch.equal(pipeline.coarse_of[codes], coarse) and len(codes.unique()) <= 4


@pytest.mark.parametrize("name, mode", [("grouped", "fsdp"), ("concatenated", "ddp"), ("fine", "fsdp")])
def test_every_system_trains_in_two_processes(world, dual_codes, tmp_path, name, mode):
    """Sharding and replication know nothing of paradigms: losses are those of one process."""
    flags = gpt_options(world / "codes" if name == "fine" else dual_codes, tmp_path / "one", steps=3)
    flags = flags[: flags.index("--codebook-sizes")]
    extra = {"grouped": ("--paradigm", "grouped"), "concatenated": ("--context", "concatenated"),
             "fine": ("--code-map", world / "ctf" / "fine_map.safetensors")}[name]
    call(train_c2i.main, *flags, *extra, "--data-parallel", "none")
    command(TRAIN, *flags, *extra, "--data-parallel", mode, "--run-dir", tmp_path / "two", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


@pytest.mark.parametrize("size", ["GPT-B", "GPT-XL", "GPT-XXL"])
def test_both_stages_of_ctf_train_by_one_recipe(world, size, capsys):
    """CTF follows LlamaGen's training; labels in two streams must not select IAR2's row.  A dry run knows the model."""
    def options(which: str, *extra) -> TrainConfig:
        return parse(TrainConfig, recipe, args=[
            "--run-dir", "x", "--code-path", str(world / "codes"), "--gpt-model", size, "--image-size", "384",
            "--num-classes", "3", "--code-map", str(world / "ctf" / f"{which}_map.safetensors"), *extra])

    coarse, fine = options("coarse"), options("fine")
    assert replace(coarse, codes=fine.codes) == fine
    print_dry_run(options("fine", "--device", "cpu", "--code-path", "nowhere"), setup("cpu"))  # not of the tiny codes' grid
    parameters = int(re.search(r"parameters +([\d,]+)", capsys.readouterr().out).group(1).replace(",", ""))
    with torch.device("meta"):
        expected = build_gpt(size, paradigm="fine", codebook_sizes=(4, 16), num_classes=3, grid_size=24)
    assert parameters == sum(p.numel() for p in expected.parameters())


def test_a_sweep_draws_each_range_once(world, runs, tmp_path, capsys, monkeypatch):
    """Figure 7a and table 9: one loaded model, a line per range, and a second call that draws and judges nothing."""
    rng = np.random.default_rng(0)
    export_random(runs["llamagen"], tmp_path / "gpt")
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 255, (30, 32, 32, 3), dtype=np.uint8), labels=np.arange(30) % 3)
    options = ["--gpt-ckpt", tmp_path / "gpt", "--vq-ckpt", world / "vq", "--per-class", 4, "--device", "cpu", "--folder",
               tmp_path / "sweep", "--reference", tmp_path / "real.npz", "--judge", world / "judge.safetensors",
               "--guidance", "progressive"]
    judged = []
    monkeypatch.setattr(sweep_c2i, "judge", lambda *args: judged.append(len(args[1])) or judge(*args))
    call(sweep_c2i.main, *options, "--ranges", "1:2", "2:2")
    figures = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert set(figures) == {"1:2", "2:2"} and all("frechet" in row["figures"] for row in figures.values())
    before = (tmp_path / "sweep" / "1-2.npz").stat().st_mtime_ns
    call(sweep_c2i.main, *options, "--ranges", "1:2", "2:2", "1:3")
    assert (tmp_path / "sweep" / "1-2.npz").stat().st_mtime_ns == before and judged == [12, 12, 12]
    for text in ("1 2", "2 2", "1 3"):  # the samples of a range are those of the sampler at that range
        out = tmp_path / f"{text[0]}{text[2]}.npz"
        call(sample_c2i_ddp.main, *options[: options.index("--folder")], "--guidance", "progressive", "--out", out,
             "--cfg-scale", *text.split())
        with np.load(out) as alone, np.load(tmp_path / "sweep" / f"{text.replace(' ', '-')}.npz") as swept:
            assert np.array_equal(alone["arr_0"], swept["arr_0"])
    rows = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    assert rows[2].startswith("| 1 | 2 |") and len(rows) == 5 and (tmp_path / "sweep" / "sweep.png").stat().st_size > 5000
    capsys.readouterr()
    assert "--ranges '3'" in refused(capsys, sweep_c2i.main, *options, "--ranges", "3")
    assert "--ranges" in refused(capsys, sweep_c2i.main, *options, "--cfg-scale", 2)
    assert "upside down" in refused(capsys, sweep_c2i.main, *options, "--ranges", "3:2")


def test_product_quantizer_has_no_residual():
    """Table 7's unassociated codebooks: a half of the channels decides one stream and cannot move the other."""
    torch.manual_seed(0)
    quantizer = ProductQuantizer((8, 16), 8, 0.25)
    latents = torch.randn(2, 8, 3, 3)
    changed = torch.cat([latents[:, :4], torch.randn(2, 4, 3, 3)], dim=1)
    before, after = quantizer(latents), quantizer(changed)
    assert torch.equal(before.codes[:, 0], after.codes[:, 0]) and not torch.equal(before.codes[:, 1], after.codes[:, 1])
    torch.testing.assert_close(quantizer.lookup(before.codes), before.latents, atol=1e-6, rtol=0)
    assert torch.equal(quantizer.lookup(before.codes[:, :1])[:, 4:], torch.zeros(2, 4, 3, 3))
    e = torch.nn.functional.normalize(latents[:, :4].movedim(1, -1).reshape(-1, 4), dim=-1)
    assert torch.equal(before.codes[:, 0].flatten(), torch.cdist(e, quantizer.table(0)).argmin(1))
    (before.codebook_loss + before.commitment_loss).backward()
    assert all(book.grad.abs().sum() > 0 for book in quantizer.codebooks)


def test_tables_show_measured_beside_published(tmp_path, capsys):
    """A table is read in the paper's own form: labels and published values, then mean and spread over seeds."""
    stages = [tmp_path / f"{stage}.json" for stage in ("coarse", "fine")]
    for stage, bits in zip(stages, (10.0, 20.0)):
        stage.write_text(json.dumps({"bits_per_image": bits, "steps": 7}))
    for seed, value in ((0, 4.0), (1, 6.0)):
        raw = tmp_path / "raw.json"
        raw.write_text(json.dumps({"a": {"b": {"frechet": value, "images": 9}}, "c": {"frechet": 99.0}}))
        files = [(raw, ("a", "b"), ""), *((stage, (), "") for stage in stages if seed == 0)]
        (tmp_path / f"alternating-seed{seed}.json").write_text(json.dumps(table.gather(files)))
    call(table.main, "--folder", tmp_path, "--table", "5", "--rows", "alternating")
    shown = capsys.readouterr().out
    assert "| alternating | 7.22 | 173.17 | 0.85 | 0.37 | 14 | 30.0 | 5.00 ± 1.41 |" in shown
    assert shown.strip() == (tmp_path / "table5.md").read_text().strip()
    (tmp_path / "half.json").write_text('{"frechet": ')
    with pytest.raises(UserError, match="is no JSON"):
        table.gather([(tmp_path / "half.json", (), "")])
    assert "no figures" in refused(capsys, table.main, "--folder", tmp_path, "--table", "5", "--rows", "grouped")


def test_images_in_a_read_only_map_are_judged_without_a_word(world, tmp_path):
    """torch warns of an array that cannot be written to, and the warning would be the first thing of every report."""
    np.savez(tmp_path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))
    mapped, classifier = open_array(tmp_path / "x.npz", "arr_0"), load_classifier(world / "judge.safetensors")
    assert not mapped.flags.writeable
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch says it once in a process otherwise
    try:
        with warnings.catch_warnings(action="error"):
            found = features_and_votes(classifier, mapped, torch.device("cpu"))
    finally:
        torch.set_warn_always(before)
    for one, other in zip(found, features_and_votes(classifier, np.array(mapped), torch.device("cpu")), strict=True):
        np.testing.assert_array_equal(one, other)
