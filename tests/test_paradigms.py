"""Prediction paradigms, head variants, and CTF's two stages: the same contract for every row of the tables."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from autoregressive.models.ctf import FineOptions, refine
from autoregressive.models.generate import SamplingOptions, draw_uniforms, generate
from autoregressive.models.gpt import GPT, build_gpt
from autoregressive.models.losses import ObjectiveOptions, cluster_loss, objective, stream_losses
from autoregressive.models.paradigms import Alternating
from autoregressive.models.transformer import GPTConfig
from tests.conftest import TINY_GPT, random_codes, randomise
from tests.test_gpt import teacher_forced_decode

VARIANTS: dict[str, dict[str, Any]] = {
    "single": dict(paradigm="single", codebook_sizes=(16,)),
    "alternating": dict(paradigm="alternating"),
    "grouped": dict(paradigm="grouped"),
    "independent": dict(paradigm="independent"),
    "conditional": dict(paradigm="conditional"),
    "conditional, no context": dict(paradigm="conditional", context="none"),
    "no context": dict(context="none"),
    "concatenated": dict(context="concatenated"),
    "compressed": dict(),
    "window 3": dict(window_size=3),
    "window 7": dict(window_size=7),
    "one head layer": dict(head_layers=1, grid_size=5),
    "narrow head": dict(head_width=24),
    "normalised queries and keys": dict(qk_norm=True),
    "published rotary": dict(rotary="repeated", head_rotary="zero_summary"),
}
FINE = replace(TINY_GPT, paradigm="fine", codebook_sizes=(4, 16))


def variant(name: str, **shape) -> GPTConfig:
    """A tiny configuration of a row of VARIANTS."""
    return replace(TINY_GPT, **VARIANTS[name] | shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_teacher_forcing(name):
    """Training and sampling must be the same function, or the model samples from what it never learned."""
    gpt = randomise(GPT(variant(name)))
    codes, labels = random_codes(3, gpt.config), torch.tensor([0, 2, 3])
    with torch.no_grad():
        for forced, decoded in zip(gpt(labels, codes), teacher_forced_decode(gpt, labels, codes), strict=True):
            assert forced.std() > 0.05
            torch.testing.assert_close(forced, decoded, atol=1e-4, rtol=0)


def order_of_prediction(gpt: GPT) -> list[tuple[int, int]]:
    """(stream, cell) in the order in which the chain rule takes them."""
    if isinstance(gpt.paradigm, Alternating):
        return gpt.paradigm.steps
    return [(stream, cell) for cell in range(gpt.config.cells) for stream in range(len(gpt.config.codebook_sizes))]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_code_changes_no_earlier_logits_and_some_later_ones(name):
    """Causality in each paradigm's own order: a leak makes the loss a lie."""
    gpt = randomise(GPT(variant(name)))
    codes, labels, order = random_codes(2, gpt.config), torch.tensor([0, 1]), order_of_prediction(gpt)
    with torch.no_grad():
        before = gpt(labels, codes)
        for place in (0, 5, len(order) - 2):
            stream, cell = order[place]
            changed = codes.clone()
            changed[:, stream, cell] = (changed[:, stream, cell] + 1) % gpt.config.codebook_sizes[stream]
            after = gpt(labels, changed)
            for s, c in order[: place + 1]:
                assert torch.equal(before[s][:, c], after[s][:, c])
            assert any(not torch.equal(before[s][:, c], after[s][:, c]) for s, c in order[place + 1 :]) or \
                name == "independent" and place == len(order) - 2


@pytest.mark.parametrize("name", VARIANTS)
def test_the_chain_of_streams_is_a_proper_distribution(name):
    """The probabilities of all grids of two by two cells sum to one: no code is counted twice, none left out."""
    sizes = (3,) if name == "single" else (2, 2)
    gpt = randomise(GPT(variant(name, grid_size=2, codebook_sizes=sizes)))
    grids = torch.tensor(list(itertools.product(*[range(size) for size in sizes for _ in range(4)])))
    codes = grids.unflatten(1, (len(sizes), 4))                                    # [every grid, C, 4]
    with torch.no_grad():
        logits = gpt(torch.ones(len(codes), dtype=torch.long), codes)
    total = sum(stream.double().log_softmax(-1).gather(-1, codes[:, index, :, None]).sum((1, 2))
                for index, stream in enumerate(logits))
    assert total.exp().std() > 0
    np.testing.assert_allclose(total.exp().sum(), 1, atol=1e-4)


@pytest.mark.parametrize("name", [*VARIANTS, "fine"])
def test_one_batch_can_be_overfitted(name):
    """The quickest proof that inputs, targets and gradients meet."""
    torch.manual_seed(0)
    gpt = GPT(FINE if name == "fine" else variant(name)).train()
    codes, labels = random_codes(4, gpt.config), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for _ in range(200):
        loss, _ = objective(gpt(labels, codes), gpt.paradigm.targets(codes), ObjectiveOptions())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_every_paradigm_samples_with_guidance(name):
    """The sampling loop knows no paradigm: guided codes lie in their codebooks and depend on the class."""
    gpt = randomise(GPT(variant(name)))
    options, uniforms = SamplingOptions(cfg_scale=(1.5, 3.0)), draw_uniforms(0, np.arange(4), 2, gpt.config.cells)
    codes = generate(gpt, torch.zeros(4, dtype=torch.long), options, uniforms)
    other = generate(gpt, torch.ones(4, dtype=torch.long), options, uniforms)
    for stream, size in enumerate(gpt.config.codebook_sizes):
        assert codes[:, stream].min() >= 0 and codes[:, stream].max() < size
    assert not torch.equal(codes, other)


@pytest.mark.parametrize("name, count", [("GPT-B", 110_888_448), ("GPT-L", 342_910_976), ("GPT-XL", 774_699_520),
                                         ("GPT-XXL", 1_410_972_672)])
def test_llamagen_parameter_counts_are_the_published_ones(name, count):
    """The baseline must have the size its published figures belong to."""
    with torch.device("meta"):
        gpt = build_gpt(name, grid_size=24, paradigm="single", codebook_sizes=(16384,))
        assert sum(p.numel() for p in gpt.parameters()) == count


def test_context_variants_keep_more_or_less(gpt):
    """Table 6: without context no window is read; concatenated neighbours enter at full width."""
    concatenated, without = GPT(variant("concatenated")), GPT(variant("no context"))
    assert concatenated.paradigm.head.context.width == 48 and gpt.paradigm.head.context.width == 4
    assert without.paradigm.head.context is None and without.paradigm.head.slots == 2


def test_cluster_loss_equals_the_sum_over_members():
    """IAR: the probability of a cluster is the sum of its members', by brute force; λ adds it to the token loss."""
    logits, codes = torch.randn(2, 5, 12), torch.randint(12, (2, 5))
    probability = logits.softmax(-1)
    expected = 0.0
    for image, cell in itertools.product(range(2), range(5)):
        first = codes[image, cell] // 4 * 4
        expected -= probability[image, cell, first : first + 4].sum().log() / 10
    loss, parts = cluster_loss(logits, codes, 4)
    torch.testing.assert_close(loss, expected)
    chosen = probability.unflatten(-1, (3, 4)).sum(-1).argmax(-1)
    assert parts["cluster_accuracy"].item() == pytest.approx((chosen == codes // 4).float().mean().item())
    token, _ = stream_losses([logits], codes[:, None], (1.0,))
    total, parts = objective([logits], codes[:, None], ObjectiveOptions(cluster_weight=0.5, cluster_size=4))
    torch.testing.assert_close(total, token + 0.5 * loss)
    assert {"loss_token", "loss_cluster", "cluster_accuracy"} <= set(parts) and parts["loss"] == total


COARSE_OF = torch.arange(16) // 4


def fine_grid(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(fine codes [B, 1, 16], their coarse labels)."""
    codes = torch.randint(16, (batch, 1, 16), generator=torch.Generator().manual_seed(1))
    return codes, COARSE_OF[codes]


class Perfect:
    """A fine model that knows the answer."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes

    def __call__(self, labels, coarse):
        """Logits that leave no doubt."""
        return [torch.nn.functional.one_hot(self.codes[:, 0], 16) * 100.0]


def test_a_perfect_fine_model_gives_back_the_codes():
    """CTF loses nothing by itself: coarse labels and a perfect second stage are the original codes."""
    codes, coarse = fine_grid()
    refined = refine(Perfect(codes), torch.zeros(3, dtype=torch.long), coarse, FineOptions(), torch.rand(3, 16), COARSE_OF)
    assert torch.equal(refined, codes)


def test_fine_labels_are_drawn_as_the_options_say():
    """Guidance mixes this class with the null class; temperature 0 and top-k 1 both take the likeliest label."""
    gpt, (_, coarse), labels = randomise(GPT(FINE)), fine_grid(), torch.tensor([0, 1, 2])
    with torch.no_grad():
        conditional, unconditional = gpt(labels, coarse)[0], gpt(torch.full_like(labels, gpt.condition.null_class), coarse)[0]
    for scale in (1.0, 4.0):
        likeliest = (unconditional + scale * (conditional - unconditional)).argmax(-1)[:, None]  # [B, 1, N]
        for options in (FineOptions(fine_temperature=0, fine_cfg_scale=scale), FineOptions(fine_top_k=1, fine_cfg_scale=scale)):
            assert torch.equal(refine(gpt, labels, coarse, options, torch.rand(3, 16), COARSE_OF), likeliest)
    guided = (unconditional + 4 * (conditional - unconditional)).argmax(-1)
    assert not torch.equal(guided, conditional.argmax(-1))
    low, high = (refine(gpt, labels, coarse, FineOptions(), torch.full((3, 16), value), COARSE_OF) for value in (0.01, 0.99))
    assert not torch.equal(low, high)


def test_masked_fine_labels_stay_in_their_cluster():
    """--fine-candidates cluster: whatever the model says, a cell keeps its coarse label; all: it need not."""
    gpt, (_, coarse), labels = randomise(GPT(FINE)), fine_grid(), torch.tensor([0, 1, 2])
    for scale in (1.0, 3.0):
        options = FineOptions(fine_candidates="cluster", fine_cfg_scale=scale)
        masked = refine(gpt, labels, coarse, options, torch.rand(3, 16), COARSE_OF)
        assert torch.equal(COARSE_OF[masked], coarse)
    free = refine(gpt, labels, coarse, FineOptions(), torch.rand(3, 16), COARSE_OF)
    assert not torch.equal(COARSE_OF[free], coarse)


def test_as_many_clusters_as_codes_is_llamagen():
    """k = number of codes: the first stage is the single-codebook GPT and the second has nothing left to decide."""
    shape = replace(TINY_GPT, codebook_sizes=(16,), paradigm="single")
    coarse_gpt, fine_gpt = randomise(GPT(shape)), randomise(GPT(replace(FINE, codebook_sizes=(16, 16))))
    labels, uniforms = torch.tensor([0, 1, 2]), draw_uniforms(0, np.arange(3), 2, 16)
    coarse = generate(coarse_gpt, labels, SamplingOptions(cfg_scale=(2.0,), guidance="constant"), uniforms[:, :1])
    codes = refine(fine_gpt, labels, coarse, FineOptions(fine_candidates="cluster"), uniforms[:, 1], torch.arange(16))
    assert torch.equal(codes, coarse)


def test_every_fine_label_sees_all_coarse_labels():
    """The second stage is bidirectional, and predicts all cells of a grid in one step."""
    gpt = randomise(GPT(FINE))
    codes, labels = random_codes(1, FINE), torch.tensor([1])
    changed = codes.clone()
    changed[:, 0, 15] = (changed[:, 0, 15] + 1) % 4
    with torch.no_grad():
        before, after, without_fine = gpt(labels, codes)[0], gpt(labels, changed)[0], gpt(labels, codes[:, :1])[0]
    assert (before - after).abs().amax((0, 2)).min() > 0
    assert torch.equal(before, without_fine)
    assert torch.equal(gpt.paradigm.targets(codes), codes[:, 1:])


def test_two_stages_are_a_proper_distribution():
    """The probabilities of all code grids under coarse, then fine, sum to one."""
    coarse_of, shape = torch.tensor([0, 0, 1, 1]), dict(grid_size=2, num_classes=3)
    first = randomise(GPT(replace(TINY_GPT, paradigm="single", codebook_sizes=(2,), **shape)))
    second = randomise(GPT(replace(FINE, codebook_sizes=(2, 4), **shape)))
    codes = torch.tensor(list(itertools.product(range(4), repeat=4)))              # [256, 4]
    coarse, labels = coarse_of[codes][:, None], torch.zeros(256, dtype=torch.long)
    with torch.no_grad():
        logp = first(labels, coarse)[0].double().log_softmax(-1).gather(-1, coarse[:, 0, :, None]).sum((1, 2))
        fine = second(labels, coarse)[0].double()
        fine = fine.masked_fill(coarse_of != coarse[:, 0, :, None], -torch.inf)
        logp = logp + fine.log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2))
    np.testing.assert_allclose(logp.exp().sum(), 1, atol=1e-4)
