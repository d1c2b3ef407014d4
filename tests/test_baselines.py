"""Baseline tokenizers: diffusers' autoencoders through the reconstruction command give what diffusers gives."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import call, command
from tests.test_bad_input import refused
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.tokenizer_image.baselines import KINDS, load_baseline, locate
from utils.checkpoint import fingerprint
from utils.crops import center_crop, to_tensor, to_uint8
from utils.images import open_images

diffusers = pytest.importorskip("diffusers")

BLOCKS: dict[str, Any] = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
              down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
DC: dict[str, Any] = dict(block_out_channels=(8, 16), layers_per_block=(1, 1), qkv_multiscales=((), ()))
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKL": dict(BLOCKS, latent_channels=4),
    "VQModel": dict(BLOCKS, num_vq_embeddings=16, latent_channels=3),
    "AutoencoderTiny": dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                            num_decoder_blocks=(1, 1)),
    "AutoencoderDC": dict({f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in DC.items()},
                          latent_channels=8),
}


def make(name: str, folder: Path, **other) -> Any:
    """A small random model, saved by save_pretrained; weights large enough that latents and pictures differ."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**TINY[name] | other).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embedding" in key:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def options(images: Path, given: str, out: Path, *extra) -> list:
    """A command line of reconstruction at 32 pixels."""
    return ["--data-path", images, "--vq-ckpt", given, "--out", out, "--image-size", 32, "--perceptual-net", "random",
            "--num-workers", 0, "--batch-size", 5, "--device", "cpu", *extra]


@torch.no_grad()
def directly(model: Any, images: Path) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """(images, reconstructions) uint8 [N, 32, 32, 3] and what diffusers' encoder gives, by diffusers alone."""
    source = open_images(images)
    real = np.stack([center_crop(source.load(index), 32) for index in range(len(source))])
    encoded = model.encode(to_tensor(real))
    latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    return real, to_uint8(model.decode(latents).sample).numpy(), latents


@pytest.mark.parametrize("name", KINDS)
def test_a_baseline_is_reconstructed_as_diffusers_does(name, images_folder, tmp_path):
    """A figure of a baseline is worth nothing if the images, their range or the latents differ from the package's own use."""
    model = make(name, tmp_path / "model")
    call(reconstruction_vq_ddp.main, *options(images_folder, f"diffusers:{tmp_path / 'model'}", tmp_path / "rec.npz"))
    real, fake, latents = directly(model, images_folder)
    with np.load(tmp_path / "rec.npz") as data:
        found = data["arr_0"].astype(int)
    assert found.std() > 0.5 and np.abs(found - fake).max() <= 1 and (found != fake).mean() < 1e-3
    figures = json.loads((tmp_path / "rec.json").read_text())
    error = np.square(real.astype(float) - found).mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), abs=1e-4)
    assert figures["images"] == 24 and {"ssim", "perceptual_random"} < set(figures) and (tmp_path / "rec.png").exists()
    usage = {key: value for key, value in figures.items() if key.startswith(("usage", "perplexity"))}
    if name != "VQModel":
        assert not usage
        return
    with torch.no_grad():
        counts = torch.bincount(model.quantize(latents)[2][2].flatten(), minlength=16)
    share = counts / counts.sum()
    assert counts.count_nonzero() > 1 and usage["usage_token"] == pytest.approx((counts > 0).float().mean().item())
    assert usage["perplexity_token"] == pytest.approx(torch.special.entr(share).sum().exp().item())


def test_codes_of_a_baseline_lie_in_their_cells(tmp_path):
    """Usage alone would not notice codes in another order; decoding them by hand does."""
    model = make("VQModel", tmp_path / "model")
    baseline = load_baseline(f"diffusers:{tmp_path / 'model'}", torch.device("cpu"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstructions, codes = baseline.reconstruct(images)
    assert codes.shape == (2, 1, 16, 16) and (baseline.downsampling, baseline.codebook_sizes) == (2, (16,))
    quantized = model.quantize.embedding(codes[:, 0]).permute(0, 3, 1, 2)
    with torch.no_grad():
        by_hand = model.decoder(model.post_quant_conv(quantized))
    torch.testing.assert_close(by_hand, reconstructions, rtol=1e-4, atol=1e-5)


def test_a_pipelines_folder_stands_for_its_autoencoder(images_folder, tmp_path):
    """Stable Diffusion is downloaded as a whole: its vae/ is meant."""
    make("AutoencoderKL", tmp_path / "whole" / "vae")
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    given = [f"diffusers:{tmp_path / 'whole'}", f"diffusers:{tmp_path / 'whole' / 'vae'}"]
    same = [load_baseline(each, torch.device("cpu")).fingerprint for each in given]
    assert same[0] == same[1]


def test_attention_under_its_older_names_is_read(tmp_path):
    """Stability's own files of the SD-VAE are older than today's names, and must not count as weights that are missing."""
    model, file = make("AutoencoderKL", tmp_path / "model"), tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, tensor in load_file(file).items():
        for now, then in older.items():
            name = name.replace(now, then)
        tensors[name] = tensor
    assert sum(name.endswith((".query.weight", ".proj_attn.bias")) for name in tensors) == 4  # of encoder and decoder
    save_file(tensors, file)
    found = load_baseline(f"diffusers:{tmp_path / 'model'}", torch.device("cpu"))
    assert found.fingerprint == fingerprint(model.state_dict())


@pytest.mark.parametrize("text, expected", [
    ("stabilityai/sd-vae-ft-mse", ("stabilityai/sd-vae-ft-mse", {})),
    ("owner/name/vae", ("owner/name", {"subfolder": "vae"})), ("owner/name@v1.0", ("owner/name", {"revision": "v1.0"})),
    ("owner/name/parts/vae/@main", ("owner/name", {"subfolder": "parts/vae", "revision": "main"}))])
def test_names_on_the_hub(text, expected):
    """OWNER/NAME, a part of it, and the state that is meant."""
    assert locate(text, "--vq-ckpt") == expected


def test_an_offline_cache_of_the_hub_is_read(images_folder, tmp_path):
    """What was fetched once must work on a machine without a connection; what was not is told in one sentence."""
    repository = tmp_path / "hub" / "hub" / "models--owner--name"
    make("VQModel", repository / "snapshots" / ("a" * 40) / "movq")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    script = "tokenizer/tokenizer_image/reconstruction_vq_ddp.py"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command(script, *options(images_folder, "diffusers:owner/name/movq", tmp_path / "rec.npz"), **environment)
    assert "usage_token" in json.loads((tmp_path / "rec.json").read_text())
    done = command(script, *options(images_folder, "diffusers:owner/other", tmp_path / "x.npz"), check=False, **environment)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "--vq-ckpt diffusers:owner/other cannot be loaded" in done.stderr and "where that can be reached." in done.stderr


def test_without_diffusers_its_command_is_named(capsys, images_folder, tmp_path, monkeypatch):
    """The package is optional: who needs it learns how to get it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sentence = refused(capsys, reconstruction_vq_ddp.main, *options(images_folder, "diffusers:a/b", tmp_path / "rec.npz"))
    assert "--vq-ckpt diffusers:a/b needs the package diffusers" in sentence and "`pip install diffusers`" in sentence


def broken(folder: Path, case: str) -> str:
    """A folder with one fault; returns what --vq-ckpt is given."""
    if case in ("empty", "relative", "missing"):
        return {"empty": "diffusers:", "relative": "diffusers:nowhere", "missing": f"diffusers:{folder / 'none'}"}[case]
    make("AutoencoderKL", folder, **({"in_channels": 4} if case == "channels" else {}))
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    about = json.loads(config.read_text())
    if case == "no config":
        config.unlink()
    elif case == "no json":
        config.write_text("{")
    elif case == "list":
        config.write_text("[]")
    elif case == "class":
        config.write_text(json.dumps(about | {"_class_name": "UNet2DModel\n"}))
    elif case == "shape":
        config.write_text(json.dumps(about | {"latent_channels": 5}))
    elif case == "layers":
        config.write_text(json.dumps(about | {"layers_per_block": 2}))
    elif case == "fewer layers":
        config.write_text(json.dumps(about | {"mid_block_add_attention": False}))
    elif case == "nonsense":
        config.write_text(json.dumps(about | {"block_out_channels": "x"}))
    elif case == "no weights":
        weights.unlink()
    elif case == "pickle":
        weights.unlink()
        torch.save({}, folder / "diffusion_pytorch_model.bin")
    elif case == "cut":
        weights.write_bytes(weights.read_bytes()[:2000])
    return f"diffusers:{folder}"


@pytest.mark.parametrize("case, message", {
    "empty": "is no folder and no name on the hub", "relative": "is no folder and no name on the hub",
    "missing": "is no folder and no name on the hub", "no config": "cannot be loaded", "no json": "cannot be loaded",
    "list": "without _class_name", "class": "is of the class UNet2DModel\\n: give a model of AutoencoderKL, VQModel",
    "shape": "cannot be loaded", "layers": "lacks weights", "fewer layers": "has the unknown weights",
    "nonsense": "cannot be loaded", "no weights": "cannot be loaded", "pickle": "cannot be loaded", "cut": "cannot be loaded",
    "channels": "images with 4 channels in and 3 out"}.items())
def test_bad_folders_are_refused_in_a_sentence(case, message, capsys, images_folder, tmp_path):
    """Weights that do not fit would be drawn at random by diffusers with a warning, and their figures published."""
    sentence = refused(capsys, reconstruction_vq_ddp.main,
                       *options(images_folder, broken(tmp_path / "model", case), tmp_path / "rec.npz"))
    assert sentence.startswith("error: --vq-ckpt diffusers:") and message in sentence
    assert not list(tmp_path.glob("rec*"))


def test_options_that_do_not_fit_a_baseline(capsys, images_folder, tmp_path):
    """It has no semantic codes, and its grid must divide the image."""
    make("AutoencoderKL", tmp_path / "model")
    given = f"diffusers:{tmp_path / 'model'}"
    command_line = options(images_folder, given, tmp_path / "rec.npz")
    assert "--streams semantic" in refused(capsys, reconstruction_vq_ddp.main, *command_line, "--streams", "semantic")
    sentence = refused(capsys, reconstruction_vq_ddp.main, *command_line, "--image-size", 33)
    assert "--image-size 33 is not a multiple of 2" in sentence
