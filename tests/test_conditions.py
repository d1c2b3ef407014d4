"""Captions in the place of classes: the published numbers, decoding, padding, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoregressive.models.conditions import Given, each
from autoregressive.models.ctf import FineOptions, refine
from autoregressive.models.decode_modes import find_mode
from autoregressive.models.generate import Decoder, SamplingOptions, draw_uniforms, generate
from autoregressive.models.gpt import GPT
from autoregressive.models.losses import ObjectiveOptions, objective, stream_losses
from autoregressive.models.transformer import GPTConfig
from tests.conftest import GOLDEN, imported_gpt, random_codes, randomise
from tests.test_gpt import teacher_forced_decode
from tests.test_paradigms import COARSE_OF, FINE, VARIANTS, fine_grid, variant

TEXT = dict(condition="text", caption_length=6, caption_dim=10)
LENGTHS = (6, 4, 1)
OPTIONS = SamplingOptions(guidance="attention", cfg_scale=(1.5, 3.0), cfg_attention_weight=0.1)
PUBLISHED = dict(n_head=4, grid_size=4, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, class_dropout=0.0)


def captions(*lengths: int, width: int = 10, positions: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random captions of so many words: features [B, P, E], zero where padded, and mask [B, P]."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(positions) >= positions - torch.tensor(lengths)[:, None]
    words = torch.stack([torch.randn(positions, width, generator=generator) for _ in lengths])
    return words * mask[..., None], mask


def text_gpt(name: str = "compressed", **shape) -> GPT:
    """A tiny random GPT of a paradigm that reads captions."""
    return randomise(GPT(variant(name, **TEXT | shape)))


def published() -> tuple[GPT, dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """LlamaGen's text-conditional golden weights in our model, its arrays, and its captions."""
    with np.load(GOLDEN / "llamagen_t2i_gpt.npz") as file:
        io = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fiu"}
    gpt = imported_gpt("llamagen-t2i-gpt", {key[2:]: value for key, value in io.items() if key.startswith("w/")}, **PUBLISHED)
    return gpt, io, (io["features"], io["mask"].bool())


def test_logits_loss_and_gradients_equal_the_published_code():
    """Captions of three lengths, one sample not valid: projection, mask, rotary rows and loss at once."""
    gpt, io, given = published()
    codes = io["codes"][:, None]
    logits = gpt(given, codes)
    np.testing.assert_allclose(logits[0].detach(), io["logits"], atol=1e-4)
    loss, _ = stream_losses(logits, codes, (1.0,), io["valid"].bool())
    np.testing.assert_allclose(loss.item(), io["loss"], rtol=1e-5)
    loss.backward()
    names = dict(zip(np.load(GOLDEN / "llamagen_t2i_gpt.npz")["grad_names"].tolist(), io["grad_norms"].tolist()))
    from autoregressive.models.released import GPT_KINDS
    from utils.released import reverse, translator
    called = translator(reverse(GPT_KINDS["llamagen-t2i-gpt"].table))
    found = {called(name): p.grad.norm().item() for name, p in gpt.named_parameters()}
    assert found == pytest.approx(names, rel=1e-4)


def test_decoded_logits_equal_the_published_code():
    """Both branches of guidance, cell by cell from the cache; the null caption stands under the caption's own mask."""
    gpt, io, given = published()
    codes = io["codes"][:, None]
    for rows, name in ((given, "conditional"), (gpt.condition.unconditional(given), "unconditional")):
        np.testing.assert_allclose(teacher_forced_decode(gpt, rows, codes)[0], io[f"decoded_{name}"], atol=1e-4)
