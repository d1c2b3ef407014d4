"""Small models and data shared by the tests; everything runs on the CPU in float32."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT
from autoregressive.models.released import GPT_KINDS
from autoregressive.models.transformer import GPTConfig
from tokenizer.tokenizer_image.released import TOKENIZER_KINDS, tokenizer_shape
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.checkpoint import export, fingerprint
from utils.config import from_dict, run_main
from utils.released import to_ours

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"
TINY_VQ = VQConfig(codebook_sizes=(8, 16), channels=8, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2),
                   latent_channels=8, residual_blocks=1, stem=4, norm_groups=4)
TINY_GPT = GPTConfig(dim=48, n_layer=2, n_head=4, head_layers=2, num_classes=3, grid_size=4, codebook_sizes=(8, 16),
                     token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, class_dropout=0.0, ffn_multiple_of=32)


def randomise(gpt: GPT, seed: int = 0) -> GPT:
    """Give every weight, the zero output layers too, a value that makes mistakes visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.05))
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return gpt.eval()


def random_codes(batch: int, config: GPTConfig, seed: int = 0) -> torch.Tensor:
    """Codes [B, C, N]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (batch, config.cells), generator=generator)
                        for size in config.codebook_sizes], dim=1)


def arrays(*names: str) -> dict[str, torch.Tensor]:
    """All arrays of golden files as tensors."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        with np.load(GOLDEN / f"{name}.npz") as file:
            found |= {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiu"}
    return found


def imported_gpt(kind: str, tensors: dict[str, torch.Tensor], **shape) -> GPT:
    """A GPT with published weights, by its table of keys."""
    rules = GPT_KINDS[kind]
    gpt = GPT(from_dict(GPTConfig, rules.shape(tensors, "file") | rules.fixed | shape))
    gpt.load_state_dict(to_ours(rules, tensors, gpt, "file"))
    return gpt.eval()


def imported_tokenizer(kind: str, tensors: dict[str, torch.Tensor]) -> VQModel:
    """A tokenizer with published weights, by its table of keys."""
    rules = TOKENIZER_KINDS[kind]
    model = VQModel(from_dict(VQConfig, tokenizer_shape(tensors, "file") | rules.fixed))
    model.load_state_dict(to_ours(rules, tensors, model, "file"))
    return model


@pytest.fixture(autouse=True)
def no_compilations_of_others() -> Iterator[None]:
    """Forget what a test compiled: dynamo counts the variants of a function over the whole process, and refuses the ninth."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def gpt() -> GPT:
    """A random two-layer GPT on a 4x4 grid."""
    return randomise(GPT(TINY_GPT))


@pytest.fixture
def images_folder(tmp_path) -> Path:
    """An image folder of three classes with eight 40x36 images each."""
    rng = np.random.default_rng(0)
    for label in range(3):
        for index in range(8):
            path = tmp_path / "images" / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            base = np.linspace(0, 255, 40 * 36).reshape(40, 36, 1) * np.array([1, 0.5 * label, 1 - 0.4 * label])
            Image.fromarray((base + rng.integers(0, 30, (40, 36, 3))).clip(0, 255).astype(np.uint8)).save(path)
    return tmp_path / "images"


def export_models(folder: Path) -> tuple[Path, Path]:
    """A tiny GPT and its tokenizer, exported as training does: (gpt file, tokenizer file)."""
    torch.manual_seed(0)
    tokenizer = VQModel(TINY_VQ)
    tensors = tokenizer.state_dict()
    about = {"model": asdict(TINY_VQ), "stage": "dual", "fingerprint": fingerprint(tensors)}
    export(folder / "tokenizer.safetensors", "tokenizer", tensors, about)
    export(folder / "gpt.safetensors", "gpt", randomise(GPT(TINY_GPT)).state_dict(),
           {"model": asdict(TINY_GPT), "gpt_model": "GPT-test", "tokenizer": about["fingerprint"], "image_size": 32})
    return folder / "gpt.safetensors", folder / "tokenizer.safetensors"


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    """Files of a tiny GPT and its tokenizer."""
    return export_models(tmp_path / "models")


def call(main, *arguments) -> None:
    """Run an entry point in this process with a command line; SystemExit passes through."""
    before = sys.argv
    sys.argv = ["program", *map(str, arguments)]
    try:
        run_main(main)
    finally:
        sys.argv = before
        logging.getLogger().handlers.clear()


def command(*arguments, processes: int = 1, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run a script of the repository in processes of its own (torchrun with gloo for more than one)."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run([*launcher, *map(str, arguments)], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{arguments[0]} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    """Logged values of one metric by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}
