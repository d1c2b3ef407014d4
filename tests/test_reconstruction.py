"""Reconstruction of an image set: the figures are those of the files it writes."""

import json

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from tests.conftest import call
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.validation import val_ddp


def reconstruct(images_folder, models, tmp_path, *extra) -> tuple[np.ndarray, dict]:
    """(reconstructions uint8 [N, H, W, 3], figures) of the test images at 32 pixels."""
    call(reconstruction_vq_ddp.main, "--data-path", images_folder, "--vq-ckpt", models[1], "--out", tmp_path / "rec.npz",
         "--image-size", 32, "--perceptual-net", "random", "--num-workers", 0, "--batch-size", 5, "--device", "cpu", *extra)
    with np.load(tmp_path / "rec.npz") as data:
        return data["arr_0"], json.loads((tmp_path / "rec.json").read_text())


def test_figures_are_those_of_the_written_images(images_folder, models, tmp_path):
    """SSIM as published is scikit-image's on [0, 1] with data_range 2; the stricter one has a name of its own."""
    fake, figures = reconstruct(images_folder, models, tmp_path)
    call(val_ddp.main, "--data-path", images_folder, "--image-size", 32, "--out", tmp_path / "val.npz", "--num-workers", 0)
    with np.load(tmp_path / "val.npz") as data:
        real = data["arr_0"]
    assert fake.shape == real.shape == (24, 32, 32, 3) and figures["images"] == 24
    for name, data_range in (("ssim", 2.0), ("ssim_full_range", 1.0)):
        each = [structural_similarity(a / 255, b / 255, channel_axis=-1, data_range=data_range) for a, b in zip(real, fake)]
        assert figures[name] == pytest.approx(np.mean(each), abs=1e-6)
    error = np.square(real.astype(float) - fake).mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)), abs=1e-4)
    assert figures["ssim"] > figures["ssim_full_range"]


def test_images_can_be_compared_at_another_size(images_folder, models, tmp_path):
    """LlamaGen's rFID of its 384-pixel tokenizer is of images brought back to 256."""
    fake, figures = reconstruct(images_folder, models, tmp_path, "--image-size-eval", 24)
    assert fake.shape == (24, 24, 24, 3) and 0 < figures["psnr"] < 60
