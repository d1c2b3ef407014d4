"""Rows beyond the paper: normalised queries and keys, a narrow head, conditional MLPs, and guidance schedules; off by default."""

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from autoregressive.models.generate import Decoder, Sampler, SamplingOptions, draw_uniforms, generate
from autoregressive.models.gpt import GPT, load_gpt
from autoregressive.models.guidance import GUIDANCE
from autoregressive.sample.pipeline import check_sampling
from autoregressive.train.options import GPTOptions, gpt_config
from tests.conftest import TINY_GPT, random_codes, randomise
from tests.test_decoding import SHALLOW, batch, compilations  # noqa: F401
from utils.checkpoint import export
from utils.config import UserError

LABELS = torch.tensor([0, 1, 2])


def variant(**fields) -> GPT:
    """A random tiny GPT."""
    return randomise(GPT(replace(TINY_GPT, **fields)))


def parameters(**fields) -> int:
    """Their number."""
    return sum(p.numel() for p in GPT(replace(TINY_GPT, **fields)).parameters())


# --- normalised queries and keys ---------------------------------------------------------------------------------------


def test_scores_do_not_grow_with_the_projections():
    """What the norm is for: a hundred times larger queries and keys leave every logit as it is, which they do not without."""
    codes = random_codes(3, TINY_GPT)
    for normalised in (True, False):
        gpt = variant(qk_norm=normalised)
        with torch.no_grad():
            before = gpt(LABELS, codes)
            for block in gpt.blocks:
                block.attention.wqkv.weight[:96] *= 100
            after = gpt(LABELS, codes)
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after)) == normalised


def test_every_layer_has_norms_of_its_own_for_queries_and_keys():
    """Trunk and head layers alike, and each of the weights changes what is predicted."""
    gpt, codes = variant(qk_norm=True), random_codes(3, TINY_GPT)
    with torch.no_grad():
        before = gpt(LABELS, codes)[1]
        for block in gpt.blocks:
            for norm in block.attention.qk_norms:
                kept = norm.weight.clone()
                norm.weight.mul_(torch.linspace(0.2, 3, 12))
                assert not torch.allclose(gpt(LABELS, codes)[1], before, atol=1e-3)
                norm.weight.copy_(kept)
    assert len(gpt.blocks) == 4 and parameters(qk_norm=True) == parameters() + 4 * 2 * 12


def test_normalised_queries_keep_the_precision_of_the_values():
    """Attention kernels want one type; under autocast weights are float32 and values bf16."""
    gpt, codes = variant(qk_norm=True).train(), random_codes(3, TINY_GPT)
    with torch.autocast("cpu", torch.bfloat16):
        low = gpt(LABELS, codes)[1]
    assert low.dtype == torch.bfloat16 and gpt.bfloat16()(LABELS, codes)[1].dtype == torch.bfloat16


# --- the width of the head -----------------------------------------------------------------------------------------------


def test_a_narrow_head_has_fewer_parameters_and_heads_of_the_same_dimension():
    """It is there to save: layers, outputs and the shared norm have its width, the trunk keeps its own."""
    gpt = GPT(replace(TINY_GPT, head_width=24))
    block, output = gpt.paradigm.head.layers[0], gpt.paradigm.outputs[1]
    assert parameters(head_width=24) < parameters()
    assert block.attention.n_head == 2 and block.attention.wqkv.weight.shape == (72, 24)
    assert output[0].weight.shape == (48, 24) and gpt.paradigm.norm.weight.shape == (24,)
    assert gpt.layers[0].attention.wqkv.weight.shape == (144, 48) and gpt.paradigm.fusion[2].weight.shape == (48, 192)
    assert gpt.paradigm.head.new_state(2).cache.layers[0].keys.shape == (2, 2, 3, 12)


def test_without_the_options_weights_and_keys_are_those_of_old_files(tmp_path):
    """A file written before the options were there has no such fields, and must load to the same model."""
    gpt = variant()
    fields = {name: value for name, value in asdict(TINY_GPT).items() if name not in ("qk_norm", "head_width")}
    assert len(fields) == len(asdict(TINY_GPT)) - 2
    assert not [name for name in gpt.state_dict() if "narrow" in name or "qk_norm" in name]
    export(tmp_path / "gpt.safetensors", "gpt", gpt.state_dict(), {"model": fields})
    loaded, codes = load_gpt(tmp_path / "gpt.safetensors"), random_codes(3, TINY_GPT)
    assert all(torch.equal(a, b) for a, b in zip(gpt(LABELS, codes), loaded(LABELS, codes)))


@pytest.mark.parametrize("fields, sentence", [
    (dict(head_width=100), "--head-width 100 is not a multiple of 64, the dimension of the trunk's heads"),
    (dict(head_width=384, paradigm="independent"), "--head-width 384 is of the hierarchical head, which --paradigm independent"),
    (dict(head_layers=2, paradigm="conditional"), "--head-layers 2 is of the hierarchical head, which --paradigm conditional"),
    (dict(window_size=3, paradigm="grouped"), "--window-size 3 is of the local window, which --paradigm grouped"),
    (dict(context="concatenated", paradigm="independent"), "--context concatenated is of the local window"),
])
def test_options_that_do_not_apply_are_refused(fields, sentence):
    """An option that nothing reads would be believed to have worked."""
    with pytest.raises(UserError, match=sentence):
        gpt_config(GPTOptions(**fields), (256, 4096))


def test_options_reach_the_model():
    """From the command line's fields to the configuration that checkpoints carry."""
    config = gpt_config(GPTOptions(head_width=384, qk_norm=True), (256, 4096))
    assert (config.head_width, config.qk_norm) == (384, True)
    config = gpt_config(GPTOptions(paradigm="conditional", window_size=3, context="concatenated"), (256, 4096))
    assert (config.paradigm, config.window_size, config.context) == ("conditional", 3, "concatenated")
    assert gpt_config(GPTOptions(paradigm="independent", context="none"), (256, 4096)).context == "none"


# --- conditional -----------------------------------------------------------------------------------------------------------


def test_probabilities_of_all_grids_sum_to_one():
    """Codebooks of different sizes: a semantic code read from the wrong cell or table would show."""
    for context in ("compressed", "concatenated", "none"):
        gpt = variant(paradigm="conditional", context=context, grid_size=2, codebook_sizes=(2, 3))
        grids = itertools.product(*[range(size) for size in (2, 3) for _ in range(4)])
        codes = torch.tensor(list(grids)).unflatten(1, (2, 4))                     # [1296, 2, 4]
        with torch.no_grad():
            logits = gpt(torch.ones(len(codes), dtype=torch.long), codes)
        total = sum(stream.double().log_softmax(-1).gather(-1, codes[:, index, :, None]).sum((1, 2))
                    for index, stream in enumerate(logits))
        assert total.exp().std() > 0
        np.testing.assert_allclose(total.exp().sum(), 1, atol=1e-4)


def test_the_detail_reads_its_own_semantic_code_and_the_window():
    """What it adds to independent prediction; semantic logits do not read the semantic code of their cell."""
    gpt, codes = variant(paradigm="conditional"), random_codes(2, TINY_GPT)
    changed = codes.clone()
    changed[:, 0, 7] = (changed[:, 0, 7] + 1) % 8
    with torch.no_grad():
        before, after = gpt(LABELS[:2], codes), gpt(LABELS[:2], changed)
        assert torch.equal(before[0][:, 7], after[0][:, 7]) and not torch.allclose(before[1][:, 7], after[1][:, 7])
        gpt.paradigm.context.window[7] = gpt.paradigm.context.window[7].flip(0)
        moved = gpt(LABELS[:2], codes)
    for a, b in zip(before, moved):
        assert not torch.allclose(a[:, 7], b[:, 7], atol=1e-3) and torch.equal(a[:, :7], b[:, :7])


# --- guidance --------------------------------------------------------------------------------------------------------------


def sampler(gpt: GPT, uniforms: torch.Tensor, **options) -> Sampler:
    """A sampler of two images, 16 steps."""
    return Sampler(gpt, SamplingOptions(cfg_scale=(2.0, 4.0), **options), uniforms)


@pytest.mark.parametrize("schedule, power, expected", [
    # (1 - cos(pi (i/16)^p)) / 2 of the way from 2 to 4: (8/16)^2 = 1/4, whose cosine is 0.70711; 12/16: cosine -0.70711.
    ("power_cosine", 2.0, {0: 2.0, 8: 2 + 1 - 0.7071068}), ("power_cosine", 1.0, {8: 3.0, 12: 2 + 1 + 0.7071068}),
    ("reversed", 2.75, {0: 4.0, 3: 3.6, 15: 2.0}), ("progressive", 2.75, {0: 2.0, 3: 2.4, 15: 4.0}),
])
def test_scales_without_attention(gpt, schedule, power, expected):
    """Against numbers worked out by hand."""
    drawn = sampler(gpt, torch.rand(2, 2, 16), guidance=schedule, cfg_power=power)
    for step, scale in expected.items():
        assert float(drawn.scale(1, torch.tensor([step]), 0.0)) == pytest.approx(scale, abs=1e-6)


def test_power_cosine_from_one_is_rars(gpt):
    """RAR: (scale - 1) (1 - cos((i/M)^p pi)) / 2 + 1, here for RAR-B's scale and power at step 12 of 16."""
    drawn = Sampler(gpt, SamplingOptions(guidance="power_cosine", cfg_scale=(1.0, 16.0)), torch.rand(2, 2, 16))
    assert float(drawn.scale(0, torch.tensor([12]), 0.0)) == pytest.approx(15 * (1 - np.cos(np.pi * 0.75**2.75)) / 2 + 1)


def scales(drawn: Sampler, attention: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """The scales of all steps that an attention [B, M] gives, both streams asked as decoding does: [B, M]."""
    steps = range(attention.shape[1])
    both = [[torch.as_tensor(drawn.scale(s, torch.tensor([step]), attention[:, step, None])) for s in (0, 1)] for step in steps]
    return torch.cat([pair[stream] for pair in both], dim=1)                       # [B, M]


def test_rescaled_equation_18_divides_by_the_mean_so_far(gpt):
    """By hand: attention 1, 0.2, 0.4, 0.6 has the means -, 0.2, 0.3, 0.4 from step 1 on, so the factors 1, 1, 4/3, 3/2."""
    drawn = sampler(gpt, torch.rand(1, 2, 16), guidance="equation18_rescaled")
    found = scales(drawn, torch.tensor([[1.0, 0.2, 0.4, 0.6]]))
    expected = torch.tensor([[1.0, 1.0, 4 / 3, 3 / 2]]) * (2 + 2 * torch.arange(4) / 16)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scales(drawn, torch.tensor([[1.0, 0.2, 0.4, 0.6]]) * 0.5)[:, 1:], expected[:, 1:])
    flat = scales(drawn, torch.full((1, 16), 0.03))
    torch.testing.assert_close(flat, 2 + 2 * torch.arange(16)[None] / 16)  # no trend: equation 16's scales


def test_shuffled_attention_is_that_of_a_random_earlier_step(gpt):
    """Every step from 1 on is a source as often as any other, and never a later one, which is not known yet."""
    samples = 4000
    drawn = sampler(gpt, draw_uniforms(0, np.arange(samples), 2, 16), guidance="attention_shuffled", cfg_attention_weight=1.0)
    attention = torch.arange(16.0).expand(samples, -1)                             # says from which step it is
    sources = (scales(drawn, attention) - 2) / 2 - torch.arange(16) / 15           # s = 2 + 2 (i/15 + a_j)
    sources = sources.round().long()
    assert (sources <= torch.arange(16)).all() and (sources[:, 0] == 0).all() and (sources[:, 1:] >= 1).all()
    for step in (2, 15):
        share = torch.bincount(sources[:, step], minlength=step + 1)[1:] / samples
        torch.testing.assert_close(share, torch.full((step,), 1 / step), atol=0.03, rtol=0)


def test_the_source_has_nothing_to_do_with_the_code(gpt):
    """It comes from the low bits of the number that draws the code: correlated, it would guide likely codes otherwise."""
    uniforms = draw_uniforms(0, np.arange(4000), 2, 16)
    drawn = sampler(gpt, uniforms, guidance="attention_shuffled", cfg_attention_weight=1.0)
    sources = scales(drawn, torch.arange(16.0).expand(4000, -1))[:, 15]
    assert abs(np.corrcoef(sources, uniforms[:, 0, 15])[0, 1]) < 0.05 and sources.std() > 1


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_sample_does_not_depend_on_its_batch(gpt, guidance):
    """Sample i is (seed, i) under every schedule, those that look back or draw among them."""
    options = SamplingOptions(guidance=guidance, cfg_scale=(3.0,) if guidance == "constant" else (1.5, 4.0),
                              cfg_attention_weight=2.0)
    uniforms, labels = draw_uniforms(0, np.arange(8), 2, 16), torch.arange(8) % 3
    together = generate(gpt, labels, options, uniforms)
    parts = [generate(gpt, labels[i : i + 3], options, uniforms[i : i + 3]) for i in range(0, 8, 3)]
    assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("guidance, other", [("equation18_rescaled", "equation18"), ("attention_shuffled", "attention"),
                                             ("power_cosine", "progressive"), ("reversed", "progressive")])
def test_schedules_change_samples(gpt, guidance, other):
    """A row that reached no logit would pass the test above."""
    uniforms, labels = draw_uniforms(0, np.arange(8), 2, 16), torch.arange(8) % 3
    options = SamplingOptions(cfg_scale=(1.5, 4.0), cfg_attention_weight=2.0)
    codes = [generate(gpt, labels, replace(options, guidance=name), uniforms) for name in (guidance, other)]
    assert not torch.equal(*codes)


def test_a_power_that_nothing_reads_is_refused(gpt):
    """Each option is read, or it is a mistake."""
    with pytest.raises(UserError, match="^--cfg-power 2.0 is of power_cosine guidance, not of attention: leave it out"):
        check_sampling(SamplingOptions(cfg_scale=(1.0, 2.0), cfg_power=2.0), gpt)
    check_sampling(SamplingOptions(guidance="power_cosine", cfg_scale=(1.0, 2.0), cfg_power=2.0), gpt)


# --- together --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["equation18_rescaled", "attention_shuffled"])
def test_compiled_codes_are_the_eager_ones(compilations, guidance):  # noqa: F811
    """Norms, a narrow head and a history in a compiled step, over several batches: one compilation, the same samples."""
    gpt = variant(qk_norm=True, head_width=24, **SHALLOW)
    options = SamplingOptions(guidance=guidance, cfg_scale=(1.5, 4.0), cfg_attention_weight=2.0)
    eager, compiled = Decoder(gpt), Decoder(gpt, "compiled")
    for first in (0, 5):
        labels, uniforms = batch(gpt, first)
        assert torch.equal(compiled.draw(labels, options, uniforms), eager.draw(labels, options, uniforms))
    assert compilations["unique_graphs"] == 1
