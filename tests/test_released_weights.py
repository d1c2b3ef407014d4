"""Published weights: import, export, and the numbers the published code gives (tests/golden)."""

import argparse
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import GPT, build_gpt, load_gpt
from autoregressive.models.losses import stream_losses
from autoregressive.models.transformer import GPTConfig
from autoregressive.sample import sample_c2i_ddp
from scripts import published_structure, released_weights
from scripts.released_weights import KINDS
from tests.conftest import (
    GOLDEN,
    TINY_GPT,
    arrays,
    call,
    command,
    export_models,
    imported_gpt,
    imported_tokenizer,
    random_codes,
)
from tests.test_bad_input import refused
from tests.test_gpt import teacher_forced_decode
from tokenizer.tokenizer_image.vq_loss import adaptive_weight
from tokenizer.tokenizer_image.vq_model import build_tokenizer, load_tokenizer
from utils.checkpoint import export, read_export
from utils.config import to_dict
from utils.released import to_ours, to_released

SHAPE = {"n_head": 4, "grid_size": 4}
MODEL_ARGS = ("--model-args", json.dumps(SHAPE))
LARGE = ["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B", "GPT-XXXL"]


def llamagen_gpt_arrays() -> dict[str, torch.Tensor]:
    """The golden LlamaGen GPT's weights under their published keys."""
    return {key[2:]: value for key, value in arrays("llamagen_gpt").items() if key.startswith("w/")}


def llamagen_vq_arrays() -> dict[str, torch.Tensor]:
    """The golden single-codebook tokenizer's weights: the dual one's network with a codebook of its own."""
    weights = arrays("iar2_vq_weights_encoder", "iar2_vq_weights_rest")
    del weights["quantize.embedding_second"]
    return weights | {"quantize.embedding.weight": arrays("llamagen_vq")["quantize.embedding.weight"]}


def test_llamagen_logits_loss_and_gradients_equal_the_published_code():
    """LlamaGen is the baseline of every table: a slip in it would flatter IAR2."""
    io = np.load(GOLDEN / "llamagen_gpt.npz")
    gpt = imported_gpt("llamagen-gpt", llamagen_gpt_arrays(), **SHAPE)
    codes, labels = torch.from_numpy(io["tokens"])[:, None], torch.from_numpy(io["cond_idx"])
    logits = gpt(labels, codes)
    np.testing.assert_allclose(logits[0].detach(), io["logits"], atol=1e-4)
    loss, _ = stream_losses(logits, codes, (1.0,))
    loss.backward()
    np.testing.assert_allclose(loss.item(), io["loss"], rtol=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in gpt.parameters()])
    np.testing.assert_allclose(norm, io["grad_global_norm"], rtol=1e-5)
    with torch.no_grad():
        null = torch.full_like(labels, gpt.condition.null_class)
        np.testing.assert_allclose(gpt(null, codes)[0], io["uncond_logits"], atol=1e-4)
        for rows, name in ((labels, "incremental_cond_logits"), (null, "incremental_uncond_logits")):
            np.testing.assert_allclose(teacher_forced_decode(gpt, rows, codes)[0], io[name], atol=1e-4)


def test_llamagen_tokenizer_equals_the_published_code():
    """Codes exactly: a flipped argmin is another image."""
    io, model = np.load(GOLDEN / "llamagen_vq.npz"), imported_tokenizer("llamagen-vq", llamagen_vq_arrays())
    with torch.no_grad():
        decoded, quantized = model(torch.from_numpy(io["input"]))
        assert np.array_equal(quantized.codes[:, 0], io["indices"])
        np.testing.assert_allclose(quantized.latents, io["quant"], atol=1e-5)
        np.testing.assert_allclose(decoded, io["decode"], atol=1e-4)
        np.testing.assert_allclose(model.decode_codes(quantized.codes), io["decode_code"], atol=1e-4)
    np.testing.assert_allclose([quantized.codebook_loss, quantized.commitment_loss],
                               [io["vq_loss"], io["commit_loss"]], rtol=1e-5)


def test_adaptive_weight_equals_the_published_code():
    """VQGAN's balance of the adversarial term, by the gradients at the last layer."""
    io = arrays("losses")
    last_layer = io["aw_last_layer"].requires_grad_(True)
    output = torch.nn.functional.conv2d(io["aw_hidden"], last_layer, padding=1)
    base = torch.nn.functional.mse_loss(output, io["aw_target"])
    np.testing.assert_allclose(adaptive_weight(base, output.pow(3).mean(), last_layer), io["aw_weight"], rtol=1e-5)


def test_the_benchmark_compares_like_with_like(gpt):
    """A ratio of two speeds says something only where both compute the same."""
    codes, labels = random_codes(2, gpt.config), torch.tensor([0, 2])
    with torch.no_grad():
        for ours, published in zip(gpt(labels, codes), published_structure.forward(gpt, labels, codes), strict=True):
            torch.testing.assert_close(ours, published, atol=1e-5, rtol=1e-5)
        decoder, x, drawn = published_structure.Decoder(gpt, 2), gpt.condition.tokens(labels)[:, 0], []
        for cell in range(gpt.config.cells):
            def pick(logits, stream, cell):
                drawn.append(logits)
                return codes[:, stream, int(cell)]
            x = decoder.step(x, cell, pick)
        for stream, forced in enumerate(gpt(labels, codes)):
            torch.testing.assert_close(torch.stack(drawn[stream::2], dim=1), forced, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind, size", [(kind, size) for kind in ("llamagen-gpt", "iar2-gpt") for size in LARGE])
def test_gpt_keys_survive_the_round_trip(kind, size):
    """Our names -> published names -> our names, for every size, without memory for the weights."""
    rules = KINDS[kind]
    sizes = (16384,) if kind == "llamagen-gpt" else (256, 4096)
    with torch.device("meta"):
        gpt = build_gpt(size, codebook_sizes=sizes, **rules.fixed)
    released = to_released(rules, gpt.state_dict(), "file")
    assert set(released).isdisjoint(key for key in gpt.state_dict() if "paradigm" in key)
    back = to_ours(rules, released, gpt, "file")
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in gpt.state_dict().items()}


@pytest.mark.parametrize("kind", ["llamagen-vq", "iar-vq", "iar2-vq"])
@pytest.mark.parametrize("preset", ["VQ-16", "VQ-8"])
def test_tokenizer_keys_survive_the_round_trip(kind, preset):
    """The same for tokenizers; published files also hold usage buffers, which are no weights."""
    rules = KINDS[kind]
    sizes = (256, 4096) if rules.fixed["quantizer"] == "dual" else (16384,)
    with torch.device("meta"):
        model = build_tokenizer(preset, codebook_sizes=sizes, **rules.fixed)
    released = to_released(rules, model.state_dict(), "file")
    assert set(rules.usage_buffers) <= set(released)
    assert {k: t.shape for k, t in to_ours(rules, released, model, "file").items()} == {
        k: t.shape for k, t in model.state_dict().items()}


def wrapped(weights: dict, container: str) -> object:
    """Published weights as the releases wrap them."""
    beside = {"args": argparse.Namespace(gpt_model="GPT-B", lr=1e-4), "steps": 3, "optimizer": {"state": {}}}
    return {"bare": weights, "compiled": {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
            "ema": {"model": {k: v * 0 for k, v in weights.items()}, "ema": weights} | beside,
            }.get(container, {container: weights} | beside)


@pytest.mark.parametrize("container", ["bare", "model", "module", "state_dict", "ema", "compiled"])
def test_every_container_is_read(tmp_path, container):
    """LlamaGen, DeepSpeed, FSDP and EMA files all wrap the same weights; a namespace beside them must not stop it."""
    weights = arrays("iar2_gpt_4x4_weights")
    torch.save(wrapped(weights, container), tmp_path / "in.pt")
    call(released_weights.main, "iar2-gpt", tmp_path / "in.pt", tmp_path / "out", *MODEL_ARGS)
    gpt, io = load_gpt(tmp_path / "out", device="cpu", dtype=torch.float32), arrays("iar2_gpt_4x4_io")
    with torch.no_grad():
        logits = gpt(io["cond_idx"], torch.stack([io["semantic"], io["detail"]], dim=1))
    np.testing.assert_allclose(logits[1], io["logits_2"], atol=1e-4)
    assert gpt.config.rotary == "repeated" and gpt.config.head_rotary == "zero_summary"
    assert gpt.provenance.sampling == {"guidance": "attention", "cfg_scale": [1.75, 2.5], "cfg_attention_weight": 0.1}


def test_export_gives_back_the_published_file(tmp_path):
    """--export is the way back to the published code: the same keys, the same numbers."""
    for kind, weights, name in (("iar2-gpt", arrays("iar2_gpt_4x4_weights"), "gpt"), ("iar-vq", llamagen_vq_arrays(), "vq")):
        torch.save({"model": weights}, tmp_path / f"{name}.pt")
        extra = MODEL_ARGS if name == "gpt" else ()
        call(released_weights.main, kind, tmp_path / f"{name}.pt", tmp_path / "ours", *extra)
        call(released_weights.main, kind, tmp_path / "ours", tmp_path / f"{name}-again.pt", "--export")
        again = torch.load(tmp_path / f"{name}-again.pt", weights_only=True)["model"]
        assert set(again) - set(weights) <= {"quantize.codebook_used"} and set(weights) <= set(again)
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_variants_the_published_code_lacks_are_not_exported(capsys, tmp_path):
    """A file without its context MLP would load nowhere: said now, not by the published code."""
    gpt = GPT(replace(TINY_GPT, context="none", ffn_multiple_of=256))
    export(tmp_path / "gpt.safetensors", "gpt", gpt.state_dict(), {"model": to_dict(gpt.config), "tokenizer": ""})
    assert "mlp1" in refused(capsys, released_weights.main, "iar2-gpt", tmp_path, tmp_path / "out.pt", "--export")
    assert not (tmp_path / "out.pt").exists()


def test_imported_files_are_sampled_without_more_flags(tmp_path):
    """Two commands from a published pair of files to an npz; the guidance comes with the checkpoint."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(dim=64, n_layer=1, n_head=4, num_classes=2, grid_size=4, codebook_sizes=(32,), paradigm="single"))
    torch.save({"model": to_released(KINDS["llamagen-gpt"], gpt.state_dict(), "file")}, tmp_path / "gpt.pt")
    torch.save({"model": llamagen_vq_arrays()}, tmp_path / "vq.pt")
    args = json.dumps({"n_head": 4, "grid_size": 4})
    command("scripts/released_weights.py", "llamagen-gpt", tmp_path / "gpt.pt", tmp_path / "ours", "--model-args", args)
    command("scripts/released_weights.py", "llamagen-vq", tmp_path / "vq.pt", tmp_path / "ours")
    call(sample_c2i_ddp.main, "--gpt-ckpt", tmp_path / "ours", "--vq-ckpt", tmp_path / "ours", "--per-class", 2,
         "--out", tmp_path / "s.npz", "--device", "cpu")
    with np.load(tmp_path / "s.npz") as samples:
        assert samples["arr_0"].shape == (4, 16, 16, 3)
        assert '"cfg_scale": [2.0]' in str(samples["options"]) and '"guidance": "constant"' in str(samples["options"])


class Foreign:
    """An object that would run code when unpickled."""

    def __reduce__(self):
        return (open, ("was-executed", "w"))


def test_bad_files_are_refused_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    """A file from the internet may be of another model, cut off, or hostile: one sentence each, nothing executed."""
    monkeypatch.chdir(tmp_path)
    good = arrays("iar2_gpt_4x4_weights")
    fewer = {key: value for key, value in good.items() if key != "mlp2.2.weight"}
    other_shape = good | {"output2.2.weight": torch.zeros(31, 192)}
    torch.save(good, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.pt").write_bytes(pickle.dumps({"model": Foreign()}))
    torch.save({"model": good, "args": Foreign()}, tmp_path / "hostile.pt")
    torch.save({"steps": 3}, tmp_path / "empty.pt")
    for name, weights in (("fewer", fewer), ("more", good | {"extra.weight": torch.zeros(1)}), ("shape", other_shape),
                          ("other", llamagen_gpt_arrays())):
        torch.save(weights, tmp_path / f"{name}.pt")
    wanted = {"missing": ("does not exist",), "cut": ("damaged",), "foreign": ("was not opened",),
              "hostile": ("was not opened",), "empty": ("holds no weights",), "fewer": ("mlp2.2.weight",),
              "more": ("extra.weight",), "shape": ("output2.2.weight", "(31, 192)"), "other": ("tok_embeddings.weight",)}
    for name, parts in wanted.items():
        sentence = refused(capsys, released_weights.main, "iar2-gpt", f"{name}.pt", "out", *MODEL_ARGS)
        assert all(part in sentence for part in parts), sentence
    sentence = refused(capsys, released_weights.main, "iar2-gpt", "good.pt", "out", "--gpt-model", "GPT-B")
    assert "--gpt-model GPT-B" in sentence and "96" in sentence
    assert "--model-args" in refused(capsys, released_weights.main, "iar2-gpt", "good.pt", "out")
    for args, part in (("{", "JSON"), ('{"n_head": 5, "grid_size": 4}', "n_head 5"), ('{"n_head": 4, "paradigm": "x"}', "'x'"),
                       ('{"n_head": 4, "codebook_sizes": 16}', "shape"), ('{"n_head": 4, "colour": 1}', "colour")):
        assert part in refused(capsys, released_weights.main, "iar2-gpt", "good.pt", "out", "--model-args", args)
    torch.save(good | {"cls_embedding.embedding_table.weight": torch.zeros(3)}, tmp_path / "flat.pt")
    assert "2 dimensions" in refused(capsys, released_weights.main, "iar2-gpt", "flat.pt", "out", *MODEL_ARGS)
    assert not (tmp_path / "out").exists() and not (tmp_path / "was-executed").exists()


def test_a_training_checkpoint_can_be_loaded(tmp_path):
    """A long run is looked at before it ends: any step-* folder loads as the exported file does."""
    from autoregressive.train import train_c2i
    from tests.test_codes import write_codes
    from tests.test_train import gpt_options

    call(train_c2i.main, *gpt_options(write_codes(tmp_path / "codes"), tmp_path / "run"))
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    exported, stored = load_gpt(tmp_path / "run"), load_gpt(newest)
    assert stored.provenance.tokenizer == "test"
    for ours, theirs in zip(exported.parameters(), stored.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_codebooks_of_another_size_are_refused(capsys, tmp_path):
    """A published GPT does not say which tokenizer made its codes; the sizes at least must agree."""
    gpt, _ = export_models(tmp_path / "models")
    description, tensors = read_export(gpt, "gpt", "--gpt-ckpt")
    export(gpt, "gpt", tensors, description | {"tokenizer": ""})  # as imported
    torch.save({"model": llamagen_vq_arrays()}, tmp_path / "vq.pt")
    call(released_weights.main, "llamagen-vq", tmp_path / "vq.pt", tmp_path / "other")
    capsys.readouterr()
    sentence = refused(capsys, sample_c2i_ddp.main, "--gpt-ckpt", gpt, "--vq-ckpt", tmp_path / "other", "--cfg-scale", 1,
                       "--out", tmp_path / "s.npz", "--device", "cpu")
    assert "codebooks (32,)" in sentence and "(8, 16)" in sentence
    assert load_tokenizer(tmp_path / "other").config.codebook_sizes == (32,) and TINY_GPT.codebook_sizes == (8, 16)
