"""What only a GPU can show: `pytest -m gpu`, part of scripts/gpu_check.sh; skipped without one."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.generate import Decoder, SamplingOptions, draw_uniforms
from autoregressive.models.gpt import GPT, place
from autoregressive.sample import sample_c2i_ddp
from autoregressive.train import extract_codes_c2i
from evaluations.c2i.inception import Inception
from tests.conftest import TINY_GPT, TINY_VQ, call, command, export_models, losses, randomise
from tests.test_codes import write_codes
from tests.test_conditions import captions
from tests.test_decoding import DECODED, shape_of
from tests.test_train import TRAIN, VQ_TRAIN, gpt_options, vq_options
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import distributed
from utils.code_shards import open_codes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS = SamplingOptions(guidance="attention", cfg_scale=(1.5, 3.0), cfg_attention_weight=0.1)
VISIBLE = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}  # `command` hides them otherwise


@pytest.fixture(autouse=True)
def exact_products(monkeypatch) -> None:
    """Float32 products as on a CPU; `setup` would allow tensor cores for them."""
    monkeypatch.setattr(distributed, "REDUCED_PRODUCTS", False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("paradigm", DECODED)
def test_compiled_and_captured_codes_are_those_of_the_cpu(paradigm):
    """In float32 the same codes from a CPU, from single kernels and from graphs, over several batches."""
    config = replace(TINY_GPT, **shape_of(paradigm))
    there, here = randomise(GPT(config)), place(randomise(GPT(config)), torch.device("cuda"), torch.float32)
    decoders = [Decoder(there), Decoder(here, "eager"), Decoder(here, "compiled")]
    for first in (0, 5, 9):
        samples = np.arange(first, first + 4)
        labels, uniforms = torch.from_numpy(samples % 3), draw_uniforms(0, samples, len(config.codebook_sizes), config.cells)
        cpu, eager, compiled = (decoder.draw(labels, OPTIONS, uniforms).cpu() for decoder in decoders)
        assert torch.equal(eager, compiled)
        assert (cpu == eager).float().mean() > 0.97  # rounding may move a draw, and all that follow it


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_many_codes_compile(top_p):
    """LlamaGen's 16,384 codes, of few rows: inductor would split one scan over them, and failed to."""
    config = replace(TINY_GPT, **shape_of("single") | {"codebook_sizes": (16384,)})
    here = place(randomise(GPT(config)), torch.device("cuda"), torch.float32)
    options = replace(OPTIONS, guidance="constant", cfg_scale=(1.5,), top_p=(top_p,))
    labels, uniforms = torch.arange(4) % 3, draw_uniforms(0, np.arange(4), 1, config.cells)
    eager, compiled = (Decoder(here, mode).draw(labels, options, uniforms).cpu() for mode in ("eager", "compiled"))
    assert (eager == compiled).float().mean() > 0.9  # sums in another order may move a draw


def test_captured_codes_from_captions_are_those_of_the_cpu():
    """The pass over the caption is not captured, what it writes is read by every graph: over captions of several lengths."""
    there = randomise(GPT(replace(TINY_GPT, condition="text", caption_length=6, caption_dim=10)))
    here, config = place(copy.deepcopy(there), torch.device("cuda"), torch.float32), there.config
    decoders = [Decoder(there), Decoder(here, "eager"), Decoder(here, "compiled")]
    for seed, lengths in enumerate(((6, 4, 1, 2), (1, 6, 3, 3), (2, 2, 5, 6))):
        uniforms = draw_uniforms(seed, np.arange(4), 2, config.cells)
        cpu, eager, compiled = (decoder.draw(captions(*lengths, seed=seed), OPTIONS, uniforms).cpu() for decoder in decoders)
        assert torch.equal(eager, compiled)
        assert (cpu == eager).float().mean() > 0.97


def test_a_tokenizer_gives_the_codes_of_the_cpu(images_folder, tmp_path):
    """Extraction in float32 and in bf16, from pinned bytes, one batch behind the device."""
    _, tokenizer = export_models(tmp_path / "models")
    for name, device, precision in (("cpu", "cpu", "float32"), ("float32", "cuda", "float32"), ("bf16", "cuda", "auto")):
        call(extract_codes_c2i.main, "--data-path", images_folder, "--vq-ckpt", tokenizer, "--code-path", tmp_path / name,
             "--image-size", 32, "--augmentation", "ten-crop", "--num-workers", 2, "--device", device, "--precision", precision,
             "--batch-size", 30)
    cpu, exact, low = (open_codes(tmp_path / name).codes for name in ("cpu", "float32", "bf16"))
    assert (cpu == exact).mean() > 0.999 and (cpu == low).mean() > 0.9


@pytest.mark.parametrize("decode", ["eager", "compiled"])
def test_images_do_not_depend_on_what_runs_beside(tmp_path, decode):
    """The decoder's stream, pinned memory and the writing thread: an npz of many batches is that of one."""
    gpt, tokenizer = export_models(tmp_path / "models")
    found = []
    for batch_size in (24, 4):
        out = tmp_path / f"{batch_size}.npz"
        call(sample_c2i_ddp.main, "--gpt-ckpt", gpt, "--vq-ckpt", tokenizer, "--num-samples", 24, "--cfg-scale", 1.5, 3.0,
             "--device", "cuda", "--precision", "float32", "--decode", decode, "--batch-size", batch_size, "--out", out)
        with np.load(out) as arrays:
            found.append(arrays["arr_0"].astype(int))
    same = (np.abs(found[0] - found[1]).max((1, 2, 3)) <= 2).mean()
    assert same > 0.9  # another batch size selects other kernels, whose rounding may move a draw


@pytest.fixture(scope="module")
def curve(tmp_path_factory) -> tuple[Path, dict[int, float]]:
    """(codes, losses of eight steps on the CPU)."""
    codes = write_codes(tmp_path_factory.mktemp("gpu") / "codes")
    run = codes.parent / "cpu"
    command(TRAIN, *gpt_options(codes, run, data_parallel="none", ema_decay=0.9))
    return codes, losses(run)


@pytest.mark.parametrize("extra", [
    {"data_parallel": "none", "compile": "off"}, {"data_parallel": "none"}, {"data_parallel": "ddp"}, {"data_parallel": "fsdp"},
    {"data_parallel": "fsdp", "mixed_precision": "bf16"}, {"data_parallel": "none", "mixed_precision": "bf16"}])
def test_a_gpt_trains_as_on_a_cpu(curve, tmp_path, extra):
    """One device: plain, compiled, under DDP and FSDP2, in bf16; then the checkpoint is carried on by a CPU."""
    codes, expected = curve
    options = {"device": "cuda", "ema_decay": 0.9} | extra
    command(TRAIN, *gpt_options(codes, tmp_path / "run", **options), **VISIBLE)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=0.03 if "mixed_precision" in extra else 2e-3)
    assert losses(tmp_path / "run", "peak_memory_gib")[8] > 0
    command(TRAIN, *gpt_options(codes, tmp_path / "run", steps=9, data_parallel="none", ema_decay=0.9))
    assert len(losses(tmp_path / "run")) == 9


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_a_tokenizer_trains_as_on_a_cpu(tmp_path, precision):
    """Compiled encoder and decoder, discriminator, revivals, averages."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 255, (24, 20, 18, 3), dtype=np.uint8), labels=np.arange(24) % 3)
    for name, device, mixed in (("cpu", "cpu", "none"), ("gpu", "cuda", precision)):
        command(VQ_TRAIN, *vq_options(tmp_path / "a.npz", tmp_path / name, "semantic", 4, "--device", device,
                                      "--mixed-precision", mixed, "--codebook-init", "uniform", "--revive-every", 0), **VISIBLE)
    expected, found = (losses(tmp_path / name, "total") for name in ("cpu", "gpu"))
    assert found[1] == pytest.approx(expected[1], rel=0.03) and all(np.isfinite(value) for value in found.values())


def test_inception_is_the_same_on_both():
    """With cuDNN, without reduced precision: features to 1e-3."""
    torch.manual_seed(0)
    network, images = Inception().eval(), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    here = network(images)
    there = network.to("cuda")(images.to("cuda"))
    for a, b in zip(here, there):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-3)


def test_the_tiny_tokenizer_decodes_in_bf16():
    """Within what eight bits of a mantissa leave of a pixel."""
    torch.manual_seed(0)
    model, codes = VQModel(TINY_VQ).eval(), torch.randint(0, 8, (2, 2, 4, 4))
    with torch.inference_mode():
        exact = model.decode_codes(codes)
        low = model.to("cuda")
        low.decoder.to(torch.bfloat16)
        low.post_quant_conv.to(torch.bfloat16)
        torch.testing.assert_close(low.decode_codes(codes.to("cuda")).float().cpu(), exact, atol=0.05, rtol=0.05)
