"""Guidance, filtering, draws and the decoding loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import (
    Sampler,
    SamplingOptions,
    cfg_ranges,
    draw_codes,
    draw_uniforms,
    filter_logits,
    generate,
    pick_codes,
)
from autoregressive.models.guidance import GUIDANCE
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.pipeline import check_sampling
from autoregressive.sample.rejection import RejectionOptions
from autoregressive.sample.sample_c2i_ddp import SampleConfig, make_labels
from tests.conftest import TINY_GPT, random_codes
from tests.test_gpt import released_gpt
from utils.config import UserError

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = SamplingOptions(guidance="attention", cfg_scale=(1.5, 3.0), cfg_attention_weight=0.1)


def draw(gpt, options: SamplingOptions, count: int = 6) -> torch.Tensor:
    """Codes of samples 0 to count - 1 with labels 0, 1, 2, 0 ..."""
    uniforms = draw_uniforms(0, np.arange(count), 2, gpt.config.cells)
    return generate(gpt, torch.arange(count) % 3, options, uniforms)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_sample_does_not_depend_on_its_batch(gpt, batch):
    """Sample i is (seed, i): more machines or a smaller batch must give the same 50,000 images."""
    uniforms, labels = draw_uniforms(0, np.arange(8), 2, 16), torch.arange(8) % 3
    together = generate(gpt, labels, OPTIONS, uniforms)
    parts = [generate(gpt, labels[i : i + batch], OPTIONS, uniforms[i : i + batch]) for i in range(0, 8, batch)]
    assert torch.equal(together, torch.cat(parts))


def test_samples_differ_between_indices_and_seeds():
    """A constant generator would pass the test above."""
    a, b = draw_uniforms(0, np.arange(4), 2, 16), draw_uniforms(1, np.arange(4), 2, 16)
    assert not torch.equal(a[0], a[1]) and not torch.equal(a, b) and torch.equal(a, draw_uniforms(0, np.arange(4), 2, 16))


@pytest.mark.parametrize("guidance", [name for name, row in GUIDANCE.items() if row.one_is_off])
def test_scale_one_is_the_conditional_model(gpt, guidance):
    """At scale 1 the unconditional branch cancels, whatever the schedule."""
    plain = draw(gpt, replace(OPTIONS, guidance=guidance, cfg_scale=(1.0,)))
    sampler = Sampler(gpt, replace(OPTIONS, guidance=guidance, cfg_scale=(1.0,)), torch.rand(2, 2, 16))
    conditional, unconditional = torch.randn(2, 2, 8)
    torch.testing.assert_close(sampler.guide(conditional, unconditional, 0, torch.tensor([3]), torch.rand(4)), conditional)
    assert torch.equal(plain, draw(gpt, replace(OPTIONS, guidance="progressive", cfg_scale=(1.0, 1.0))))


def test_constant_equals_progressive_with_equal_ends(gpt):
    """The schedules of table 8 are one family."""
    constant = draw(gpt, replace(OPTIONS, guidance="constant", cfg_scale=(2.5,)))
    assert torch.equal(constant, draw(gpt, replace(OPTIONS, guidance="progressive", cfg_scale=(2.5, 2.5))))
    assert not torch.equal(constant, draw(gpt, replace(OPTIONS, guidance="constant", cfg_scale=(1.0,))))


def test_attention_weight_zero_equals_progressive(gpt):
    """The attention term is an addition to the progressive schedule (released formula)."""
    progressive = draw(gpt, replace(OPTIONS, guidance="progressive"))
    assert torch.equal(progressive, draw(gpt, replace(OPTIONS, cfg_attention_weight=0.0)))
    assert not torch.equal(progressive, draw(gpt, replace(OPTIONS, cfg_attention_weight=3.0)))


def test_equation_18_as_printed(gpt):
    """s_i = (start + (end - start) i / M) a_i, equations 16 to 18."""
    sampler = Sampler(gpt, SamplingOptions(guidance="equation18", cfg_scale=(2.0, 4.0)), torch.rand(2, 2, 16))
    attention = torch.tensor([0.25, 0.5, 0.9, 0.9])
    conditional, unconditional = torch.randn(2, 2, 8)
    scale = (2.0 + 2.0 * 4 / 16) * attention[:2, None]
    torch.testing.assert_close(sampler.guide(conditional, unconditional, 1, torch.tensor([4]), attention),
                               unconditional + scale * (conditional - unconditional))


def test_cfg_interval_stops_guidance(gpt):
    """LlamaGen's --cfg-interval counts from the second token: the first is always guided, then interval + 1 more."""
    sampler = Sampler(gpt, replace(OPTIONS, cfg_interval=2), torch.rand(2, 2, 16))
    conditional, unconditional = torch.randn(2, 2, 8)
    for step, guided in [(0, True), (3, True), (4, False)]:
        mixed = sampler.guide(conditional, unconditional, 0, torch.tensor([step]), torch.rand(4))
        assert torch.equal(mixed, conditional) != guided


def test_attention_and_guided_logits_equal_the_released_decoder():
    """PAG-CFG step by step against the released sampling code, on its weights, teacher-forced."""
    gpt, io = released_gpt()
    golden = np.load(GOLDEN / "iar2_gpt_4x4_incremental.npz")
    codes = torch.from_numpy(np.stack([io["semantic"], io["detail"]], axis=1))
    labels = torch.from_numpy(io["cond_idx"])
    options = SamplingOptions(cfg_scale=(1.75, 3.0), cfg_attention_weight=float(golden["w_attn"]))
    sampler = Sampler(gpt, options, torch.rand(3, 2, 16))
    rows = torch.cat([labels, torch.full_like(labels, 10)])
    cache, state = gpt.new_cache(6, record_condition=True), gpt.paradigm.new_state(6)

    def pick(logits, stream, cell):
        guided = sampler.guide(*logits.chunk(2), stream, cell, cache.condition_weight)
        np.testing.assert_allclose(guided, golden[f"guided_logits_{stream + 1}"][:, step], atol=2e-4)
        return codes[:, stream, step].repeat(2)

    with torch.no_grad():
        x = gpt.begin(rows, cache)
        for step in range(16):
            cell = torch.tensor([step])
            hidden = gpt.step(x, cache, cell, cache.positions[: step + 1])
            np.testing.assert_allclose(hidden, golden["hidden"][:, step], atol=1e-4)
            np.testing.assert_allclose(cache.condition_weight[:3], golden["attn_record"][step], atol=1e-5)
            x = gpt.paradigm.decode(hidden, cell, (0, 1), state, pick)


def test_filtering_equals_the_released_filter():
    """top-k and top-p decide which codes can be drawn at all."""
    golden = np.load(GOLDEN / "topk_topp_filter.npz")
    for key in golden.files[1:]:
        top_k, top_p = key.removeprefix("filtered_k").split("_p")
        assert np.array_equal(filter_logits(torch.from_numpy(golden["logits"]), int(top_k), float(top_p)), golden[key])


def test_draws_follow_the_probabilities():
    """Inverting the cumulative distribution must reproduce softmax(logits / temperature)."""
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0])
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    for temperature in (1.0, 0.5):
        codes = pick_codes(logits.expand(100_000, -1), uniforms, temperature, 0, 1.0)
        share = torch.bincount(codes, minlength=4) / 100_000
        torch.testing.assert_close(share, (logits / temperature).softmax(-1), atol=1e-4, rtol=0)
    ends = draw_codes(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, 3]
    assert pick_codes(logits[None], torch.tensor([0.0]), 0.0, 0, 1.0).tolist() == [3]


def test_many_codes_are_drawn_by_their_probabilities():
    """Beyond the length of one scan a group is drawn first: each code by its share, and none that a filter took out."""
    size = 20_000                                                                  # the last group is not full
    probabilities = torch.full((size,), 0.5 / (size - 2), dtype=torch.float64)
    probabilities[[0, size - 1]] = 0.25
    probabilities[1024:9000] = 0                                                   # whole groups and parts of them
    logits = (probabilities / probabilities.sum()).log().float()
    uniforms = (torch.arange(4000) + 0.5) / 4000
    codes = draw_codes(logits.expand(len(uniforms), -1), uniforms)
    expected = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), uniforms.double(), right=True)
    assert (codes - expected).abs().max() <= 1 and (codes == expected).float().mean() > 0.99
    assert torch.isfinite(logits[codes]).all() and codes.unique().numel() > 1000
    ends = draw_codes(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, size - 1]


@pytest.mark.parametrize("size", [8193, 20_000])
def test_many_codes_need_no_long_scan(monkeypatch, size):
    """What a compiler would split; and a code that is there even where logits are no numbers."""
    lengths, cumsum = [], torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda values, dim: (lengths.append(values.shape[dim]), cumsum(values, dim))[1])
    logits = -1e-7 * torch.arange(size).repeat(3, 1)                               # in order, and nearly even
    logits[1], logits[2] = torch.nan, -torch.inf
    codes = pick_codes(logits, torch.tensor([0.5, 0.5, 0.5]), 1.0, 0, 0.9)
    assert lengths and max(lengths) <= 1024
    assert abs(codes[0] - 0.45 * size) <= 20 and ((codes >= 0) & (codes < size)).all()


def test_many_codes_are_filtered_as_few_are():
    """top-p by running sums in two stages keeps what sums in double precision keep."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 20_000))).float() * 3
    kept = filter_logits(logits, 0, 0.9).isfinite()
    ordered, order = logits.double().softmax(-1).sort(descending=True)
    expected = torch.zeros_like(kept).scatter(1, order, ordered.cumsum(-1) - ordered <= 0.9)
    assert (kept != expected).sum() <= 6 and 100 < kept.sum() < kept.numel() // 2


def test_a_uniform_model_draws_every_grid_equally(gpt):
    """End to end over the loop: with zero output layers every code has the same chance in every cell."""
    for output in gpt.paradigm.output_layers():
        output.weight.data.zero_()
    codes = draw(gpt, replace(OPTIONS, cfg_scale=(1.0,)), count=600)
    for stream, size in enumerate(TINY_GPT.codebook_sizes):
        share = torch.bincount(codes[:, stream].flatten(), minlength=size) / codes[:, stream].numel()
        assert (share * size - 1).abs().max() < 0.15


def test_per_stream_options_reach_their_stream(gpt):
    """--top-k 1 0 makes the semantic stream greedy and leaves the detail stream free."""
    options = replace(OPTIONS, top_k=(1, 0))
    first = generate(gpt, torch.tensor([1]), options, draw_uniforms(0, np.array([0]), 2, 16))
    second = generate(gpt, torch.tensor([1]), options, draw_uniforms(0, np.array([5]), 2, 16))
    assert torch.equal(first[:, 0, 0], second[:, 0, 0]) and not torch.equal(first[:, 1], second[:, 1])


@pytest.mark.parametrize("scale, guidance, sentence", [
    ((3.0, 1.5), "attention", "upside down"), ((1.0, 2.0, 3.0), "attention", "has 3 values"),
    ((1.5, 3.0), "constant", "takes one value"), ((), "constant", "takes one value"),
])
def test_impossible_ranges_are_refused(gpt, scale, guidance, sentence):
    """A wrong range must stop before any image is drawn; the command line names the flag, Python the field."""
    options = SamplingOptions(guidance=guidance, cfg_scale=scale)
    with pytest.raises(ValueError, match=f"^cfg_scale .*{sentence}"):
        cfg_ranges(options, gpt)
    with pytest.raises(UserError, match=f"^--cfg-scale .*{sentence}"):
        check_sampling(options, gpt)


def test_labels_the_model_does_not_know_are_refused(gpt):
    """In Python too: an index error from an embedding says nothing."""
    with pytest.raises(ValueError, match="labels go from 0 to 3 .* classes 0 to 2"):
        generate(gpt, torch.tensor([0, 3]), OPTIONS, draw_uniforms(0, np.arange(2), 2, 16))


def test_caches_are_allocated_once(gpt, monkeypatch):
    """Decoding must not re-allocate caches inside the loop, nor compress a neighbour twice."""
    from autoregressive.models import attention, local_head
    from autoregressive.models import gpt as gpt_module

    made, compressed = [], []
    original = attention.KVCache.__init__
    monkeypatch.setattr(attention.KVCache, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1])
    gpt.paradigm.head.context.compress.register_forward_hook(lambda *a: compressed.append(1))
    passes = []
    gpt.paradigm.head.layers[0].register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape[1]))
    draw(gpt, OPTIONS)
    assert gpt_module.KVCache is local_head.KVCache and len(made) == 2
    assert len(compressed) == 16 + 1  # once per cell, once for the border
    assert passes == [2, 1] * 16      # summary with state, then the semantic embedding


def test_random_codes_helper_spans_the_codebooks():
    """The tests above say little if their codes were all alike."""
    codes = random_codes(8, TINY_GPT)
    assert codes[:, 0].max() == 7 and codes[:, 1].max() == 15


def test_labels_are_even_or_drawn():
    """ADM's protocol takes 50 of each class; LlamaGen's and IAR2's samplers draw labels, which is an option."""
    config = SampleConfig(ModelOptions(Path(), Path()), OPTIONS, FineOptions(), RejectionOptions())
    assert np.array_equal(np.bincount(make_labels(config, 7)), [50] * 7)
    drawn = make_labels(replace(config, random_labels=True, num_samples=7000), 7)
    counts = np.bincount(drawn)
    assert len(counts) == 7 and counts.min() > 900 and len(set(counts)) > 1
    assert np.array_equal(drawn, make_labels(replace(config, random_labels=True, num_samples=7000), 7))
