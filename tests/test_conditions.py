"""Captions in the place of classes: the published numbers, decoding, padding, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from autoregressive.models import decode_modes
from autoregressive.models.conditions import each
from autoregressive.models.ctf import FineOptions, refine
from autoregressive.models.generate import (
    Decoder,
    SamplingOptions,
    decode_step,
    draw_uniforms,
    generate,
    new_decoding,
    restart,
)
from autoregressive.models.gpt import GPT, build_gpt, place
from autoregressive.models.losses import ObjectiveOptions, objective, stream_losses
from autoregressive.models.released import GPT_KINDS
from tests.conftest import GOLDEN, imported_gpt, random_codes, randomise
from tests.fake_cuda import Watch, fake_cuda
from tests.test_decoding import on_cuda
from tests.test_gpt import teacher_forced_decode
from tests.test_paradigms import COARSE_OF, FINE, VARIANTS, fine_grid, variant
from utils.optim import native_bf16
from utils.released import reverse, translator

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
    called = translator(reverse(GPT_KINDS["llamagen-t2i-gpt"].table))
    found = {called(name): p.grad.norm().item() for name, p in gpt.named_parameters()}
    assert found == pytest.approx(names, rel=1e-4)


def test_decoded_logits_equal_the_published_code():
    """Both branches of guidance, cell by cell from the cache; the null caption stands under the caption's own mask."""
    gpt, io, given = published()
    codes = io["codes"][:, None]
    for rows, name in ((given, "conditional"), (gpt.condition.unconditional(given), "unconditional")):
        np.testing.assert_allclose(teacher_forced_decode(gpt, rows, codes)[0], io[f"decoded_{name}"], atol=1e-4)


# --- every paradigm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rotary", [*((name, "identity") for name in VARIANTS), ("single", "zero"), ("compressed", "zero")])
def test_cached_decoding_equals_teacher_forcing(name, rotary):
    """Captions of all lengths in one batch, written in one pass: sampling must be the function that was trained."""
    gpt, (features, mask) = text_gpt(name, caption_rotary=rotary), captions(*LENGTHS, 0)
    given = torch.where(mask[..., None], features, 0.5), mask  # without a word, positions still see themselves
    codes = random_codes(4, gpt.config)
    with torch.no_grad():
        forced, decoded = gpt(given, codes), teacher_forced_decode(gpt, given, codes, extra=5)
        other = gpt(captions(*LENGTHS, 0, seed=1), codes)
    for a, b, c in zip(forced, decoded, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        assert not torch.allclose(a[:3], c[:3], atol=1e-2)


@pytest.mark.parametrize("name", ["single", "alternating", "grouped", "independent", "compressed"])
def test_a_random_order_reads_captions_too(name):
    """RAR's order moves the codes and leaves the caption where it is: raster as an order is raster, another is causal too."""
    gpt, given = text_gpt(name, order="random"), captions(*LENGTHS)
    codes, cells = random_codes(3, gpt.config), gpt.config.cells
    order = torch.rand(3, cells, generator=torch.Generator().manual_seed(0)).argsort(1)
    changed = codes.clone()
    changed.scatter_(2, order[:, None, 8:].expand(-1, codes.shape[1], -1), 0)
    with torch.no_grad():
        for forced, raster, decoded in zip(gpt(given, codes), gpt(given, codes, torch.arange(cells).expand(3, -1)),
                                           teacher_forced_decode(gpt, given, codes), strict=True):
            assert torch.equal(forced, raster)
            torch.testing.assert_close(forced, decoded, atol=1e-4, rtol=0)
        before, after = gpt(given, codes, order)[0], gpt(given, changed, order)[0]
    first, last = order[:, :8, None], order[:, 9:, None]
    assert torch.equal(torch.take_along_dim(before, first, 1), torch.take_along_dim(after, first, 1))
    assert not torch.allclose(torch.take_along_dim(before, last, 1), torch.take_along_dim(after, last, 1), atol=1e-3)


def test_padding_changes_nothing():
    """The same words in a longer frame, cut to their own length, or with rubbish in the padding: the same logits and samples."""
    gpt, (features, mask) = text_gpt(), captions(4, 4, 2)
    longer = randomise(GPT(replace(gpt.config, caption_length=9)))
    longer.load_state_dict(gpt.state_dict() | {
        "cls_embedding.null_caption": torch.cat([torch.randn(3, 10), gpt.condition.null_caption])})
    codes, uniforms = random_codes(3, gpt.config), draw_uniforms(0, np.arange(3), 2, gpt.config.cells)
    rubbish = torch.where(mask[..., None], features, 7.0), mask
    cut = features[:, 2:], mask[:, 2:]
    with torch.no_grad():
        expected = [part for given in ((features, mask), gpt.condition.unconditional((features, mask)))
                    for part in gpt(given, codes)]
        for model, given in ((gpt, rubbish), (gpt, cut), (longer, cut), (longer, longer.condition.fit(cut))):
            found = [part for rows in (given, model.condition.unconditional(given)) for part in model(rows, codes)]
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert torch.equal(generate(model, given, OPTIONS, uniforms), generate(gpt, (features, mask), OPTIONS, uniforms))
        assert not torch.allclose(expected[0], gpt((features, mask | True), codes)[0], atol=1e-3)  # a word more is not padding


@pytest.mark.parametrize("name", ["single", "grouped", "compressed"])
def test_a_sample_depends_on_its_own_caption_alone(name):
    """Sample i is (seed, i) and its caption: neither batch size nor the other captions may change it."""
    gpt, given = text_gpt(name), captions(6, 4, 1, 3, 5, 2)
    uniforms = draw_uniforms(0, np.arange(6), 2, gpt.config.cells)
    together = generate(gpt, given, OPTIONS, uniforms)
    for size in (1, 4):
        for first in range(0, 6, size):
            rows = slice(first, first + size)
            some = given[0][rows], given[1][rows]
            assert torch.equal(generate(gpt, some, OPTIONS, uniforms[rows]), together[rows])
    others = each(lambda mine, foreign: torch.cat([mine[:1], foreign[1:]]), given, captions(1, 1, 6, 6, 2, 3, seed=5))
    found = generate(gpt, others, OPTIONS, uniforms)
    assert torch.equal(found[0], together[0]) and not torch.equal(found[1:], together[1:])


def test_a_decoder_serves_other_captions_and_compiles_once(monkeypatch):
    """Buffers are written anew, hidden columns among them; a compiled step is one function for all captions and lengths."""
    monkeypatch.setattr(decode_modes, "_MULTIPLE", 8)
    torch._dynamo.reset()
    counters.clear()
    gpt = text_gpt("grouped", n_layer=1)
    eager, compiled = Decoder(gpt), Decoder(gpt, "compiled")
    for seed, lengths in enumerate([(6, 4, 1), (1, 6, 2), (3, 3, 3)]):
        given, uniforms = captions(*lengths, seed=seed), draw_uniforms(seed, np.arange(3), 2, gpt.config.cells)
        alone = generate(gpt, given, OPTIONS, uniforms)
        assert torch.equal(eager.draw(given, OPTIONS, uniforms), alone)
        assert torch.equal(compiled.draw(given, OPTIONS, uniforms), alone)
    assert counters["stats"]["unique_graphs"] == len(set(gpt.paradigm.streams_of))


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_cell_stays_on_the_device():
    """Hidden columns are looked up on the device, in a handful of kernels: a step can be captured as it can for classes."""
    with fake_cuda():
        kernels = []
        for condition in ("class", "text"):
            gpt = on_cuda(build_gpt("GPT-B", condition=condition))
            decoding = new_decoding(gpt, OPTIONS, 4, multiple=64)
            restart(gpt, decoding, gpt.condition.blank(4), torch.rand(4, 2, 256))
            with Watch() as watch:
                decode_step(gpt, decoding, decoding.cache.positions[:128], (0, 1))
            assert not watch.copies
            kernels.append(watch.kernels.total())
    assert kernels[1] - kernels[0] <= 4


@pytest.mark.skipif(not native_bf16(torch.device("cpu")), reason="this CPU does not compute in bfloat16")
def test_captions_in_bf16_and_with_packed_weights():
    """Features stay as the encoder gave them; what is computed from them is in the GPT's precision, of both branches."""
    gpt, given = place(text_gpt(), "cpu", torch.bfloat16), captions(*LENGTHS)
    exact, codes = text_gpt(), random_codes(3, gpt.config)
    for rows in (given, gpt.condition.unconditional(given)):
        for low, high in zip(teacher_forced_decode(gpt, rows, codes), exact(rows, codes), strict=True):
            assert (low - high).abs().mean() < 0.1 * high.std()
    assert generate(gpt, given, OPTIONS, torch.rand(3, 2, 16)).shape == (3, 2, 16)


def test_attention_is_the_mass_on_the_words_that_are_visible():
    """PAG's α: 1 before there is any code, else what the last layer's softmax gives the caption, in both conventions."""
    for rotary in ("identity", "zero"):
        gpt, given = text_gpt("single", caption_rotary=rotary, n_layer=1), captions(*LENGTHS)
        codes, block = random_codes(3, gpt.config), gpt.layers[0]
        seen = []
        options = replace(OPTIONS, cfg_scale=(1.0,))
        for decoding in Decoder(gpt, record_attention=True).steps(given, options, torch.rand(3, 1, 16)):
            seen.append(decoding.cache.condition_weight.clone())
            codes = decoding.state.codes
        with torch.no_grad():
            x = torch.cat([gpt.condition.tokens(given), gpt.paradigm.inputs(codes)], 1)
            q, k, _ = block.attention.project(block.attention_norm(x), gpt.rotary, 0)
            for step in (0, 1, 9):
                scores = (q[:, :, 5 + step, None] @ k[:, :, : 6 + step].mT * 12**-0.5)[:, :, 0]      # [B, H, S]
                hidden = torch.nn.functional.pad(~given[1], (0, step))[:, None]
                mass = scores.masked_fill(hidden, -torch.inf).softmax(-1)[..., :6].sum(-1).mean(1)
                torch.testing.assert_close(seen[step], mass, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen[0], torch.ones(3))


def test_zero_rows_give_every_word_the_same_attention():
    """The published convention takes all scores of a caption away: a word twice as strong gets no more of the first layer."""
    for rotary, same in (("zero", True), ("identity", False)):
        gpt, (features, mask) = text_gpt("single", caption_rotary=rotary, n_layer=1), captions(6)
        attention, x = gpt.layers[0].attention, gpt.condition.tokens((features, mask))
        q, k, _ = attention.project(gpt.layers[0].attention_norm(x), gpt.rotary[:6], 0)
        weights = (q @ k.mT).softmax(-1)[0, :, -1]                                  # [H, P]
        assert torch.allclose(weights, torch.full_like(weights, 1 / 6), atol=1e-6) == same


def test_fine_labels_are_drawn_from_captions():
    """CTF's second stage sees all visible words from every cell, guided against the null caption."""
    gpt, given, (_, coarse) = randomise(GPT(replace(FINE, **TEXT))), captions(*LENGTHS), fine_grid()
    with torch.no_grad():
        conditional, unconditional = gpt(given, coarse)[0], gpt(gpt.condition.unconditional(given), coarse)[0]
        padded = gpt((torch.where(given[1][..., None], given[0], 7.0), given[1]), coarse)[0]
        changed = coarse.clone()
        changed[:, 0, 15] = (changed[:, 0, 15] + 1) % 4
        assert (gpt(given, changed)[0] - conditional).abs().amax(2).min() > 0
    torch.testing.assert_close(padded, conditional)
    likeliest = (unconditional + 3 * (conditional - unconditional)).argmax(-1)[:, None]
    options = FineOptions(fine_temperature=0, fine_cfg_scale=3.0)
    assert torch.equal(refine(gpt, given, coarse, options, torch.rand(3, 16), COARSE_OF), likeliest)


# --- training ----------------------------------------------------------------------------------------------------------


def test_dropped_captions_become_the_null_caption_while_training_only():
    """Guidance needs the unconditional model trained; the null caption itself is a constant, saved and never moved."""
    gpt, (features, mask) = text_gpt(class_dropout=0.5), captions(*[4] * 400)
    dropped, kept = gpt.train().condition.drop((features, mask))
    null = (dropped == gpt.condition.null_caption).all(2).all(1)
    assert 150 < null.sum() < 250 and torch.equal(dropped[~null], features[~null]) and torch.equal(kept, mask)
    assert torch.equal(gpt.eval().condition.drop((features, mask))[0], features)
    assert "cls_embedding.null_caption" in gpt.state_dict() and "cls_embedding.null_caption" not in dict(gpt.named_parameters())


def test_samples_that_are_not_valid_do_not_count():
    """The loss and its gradient are those of the valid samples alone, IAR's term too; none valid is no loss, not 0/0."""
    logits, codes, options = torch.randn(3, 4, 8, requires_grad=True), torch.randint(8, (3, 1, 4)), ObjectiveOptions(
        cluster_weight=0.5, cluster_size=4)
    loss, parts = objective([logits], codes, options, torch.tensor([True, False, True]))
    alone, _ = objective([logits[[0, 2]]], codes[[0, 2]], options)
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert not logits.grad[1].any() and logits.grad[[0, 2]].any() and parts["loss"] == loss
    assert objective([logits], codes, options, torch.zeros(3, dtype=torch.bool))[0] == 0


@pytest.mark.parametrize("change, part", [
    (lambda f, m: torch.tensor([0, 1, 2]), "conditioned on text"),
    (lambda f, m: (f[..., :7], m), "(3, 6, 7)"),
    (lambda f, m: (torch.cat([f, f], 1), torch.cat([m, m], 1)), "at most 6 tokens"),
    (lambda f, m: (f, m[:, 1:]), "(3, 5)"),
    (lambda f, m: (f, m.float()), "float32"),
    (lambda f, m: (f.flip(1), m.flip(1)), "on the left"),
])
def test_what_is_no_caption_is_refused(change, part):
    """Features of another encoder, or padded on the other side, would give images of nothing in particular."""
    gpt, given = text_gpt(), change(*captions(*LENGTHS))
    with pytest.raises(ValueError, match=r"^(features|mask) ") as error:
        generate(gpt, given, OPTIONS, torch.rand(3, 2, 16))
    assert part in str(error.value)


def test_captions_are_no_class(gpt):
    """The other way round is said too."""
    with pytest.raises(ValueError, match="captions"):
        generate(gpt, captions(*LENGTHS), OPTIONS, torch.rand(3, 2, 16))
