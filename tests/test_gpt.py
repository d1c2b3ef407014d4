"""The GPT: sizes, causality, agreement of decoding with teacher forcing, agreement with the released computation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoregressive.models.attention import causal_attention, short_causal_attention
from autoregressive.models.conditions import Given
from autoregressive.models.gpt import GPT, build_gpt
from autoregressive.models.local_head import window_indices
from autoregressive.models.losses import stream_losses
from autoregressive.models.transformer import rotary_table
from tests.conftest import GOLDEN, TINY_GPT, arrays, imported_gpt, random_codes, randomise


def teacher_forced_decode(gpt: GPT, given: Given, codes: torch.Tensor, extra: int = 0) -> list[torch.Tensor]:
    """Logits of incremental decoding whose choices are the given codes: C tensors [B, N, K_c].

    extra: keys that attention reads beyond those that are written.
    """
    seen: list[list[torch.Tensor]] = [[] for _ in gpt.config.codebook_sizes]

    def pick(logits: torch.Tensor, stream: int, cell: torch.Tensor) -> torch.Tensor:
        seen[stream].append(logits)
        return codes[:, stream, int(cell)]

    cache, state, first = gpt.new_cache(len(codes)), gpt.paradigm.new_state(len(codes)), gpt.condition.positions
    with torch.no_grad():
        x = gpt.begin(given, cache)
        for step, streams in enumerate(gpt.paradigm.streams_of):
            hidden = gpt.step(x, cache, torch.tensor([step]), cache.positions[: step + extra + first])
            x = gpt.paradigm.decode(hidden, gpt.paradigm.cell_of[step : step + 1], streams, state, pick)
    assert torch.equal(state.codes, codes)
    return [torch.stack(stream, dim=1) for stream in seen]


@pytest.mark.parametrize("name, count", [("GPT-B", 143_111_616), ("GPT-L", 408_220_160), ("GPT-XL", 884_267_200),
                                         ("GPT-XXL", 1_570_110_336)])
def test_parameter_counts_are_the_released_ones(name, count):
    """A model of another size is another model: published figures would not apply."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build_gpt(name, grid_size=24).parameters()) == count


@pytest.mark.parametrize("cell", [0, 5, 10, 15])
def test_a_cell_changes_no_earlier_logits(gpt, cell):
    """Trunk, window and head must be causal: a leak makes the loss a lie and the samples noise."""
    codes, labels = random_codes(2, gpt.config), torch.tensor([0, 1])
    changed = codes.clone()
    changed[:, :, cell] = (changed[:, :, cell] + 1) % torch.tensor(gpt.config.codebook_sizes)
    with torch.no_grad():
        before, after = gpt(labels, codes), gpt(labels, changed)
    for a, b in zip(before, after):
        assert torch.equal(a[:, :cell], b[:, :cell])
    assert torch.equal(before[0][:, cell], after[0][:, cell])
    if cell + 1 < gpt.config.cells:
        assert not torch.allclose(before[0][:, cell + 1 :], after[0][:, cell + 1 :])


def test_detail_depends_on_its_own_semantic_code(gpt):
    """Equation 13: the detail is predicted given the semantic code of the same cell, and never the other way round."""
    codes, labels = random_codes(2, gpt.config), torch.tensor([0, 1])
    semantic, detail = codes.clone(), codes.clone()
    semantic[:, 0, 7] = (semantic[:, 0, 7] + 1) % gpt.config.codebook_sizes[0]
    detail[:, 1, 7] = (detail[:, 1, 7] + 1) % gpt.config.codebook_sizes[1]
    with torch.no_grad():
        base, by_semantic, by_detail = (gpt(labels, c) for c in (codes, semantic, detail))
    assert not torch.allclose(base[1][:, 7], by_semantic[1][:, 7])
    assert torch.equal(base[0][:, 7], by_semantic[0][:, 7])
    assert torch.equal(base[1][:, 7], by_detail[1][:, 7])


def test_window_holds_the_causal_neighbours():
    """Equation 15's window, against a direct enumeration: two rows above, then two cells to the left."""
    indices = window_indices(6, 5)
    for cell in range(36):
        row, column = divmod(cell, 6)
        wanted = [(row + dy) * 6 + column + dx if row + dy >= 0 and 0 <= column + dx < 6 else 36
                  for dy, dx in [(-2, d) for d in range(-2, 3)] + [(-1, d) for d in range(-2, 3)] + [(0, -2), (0, -1)]]
        assert indices[cell].tolist() == wanted


def test_window_matches_the_released_indices():
    """The order of the neighbours is part of the weights' meaning."""
    tables = np.load(GOLDEN / "tables_4x4.npz")
    for grid in (4, 24):
        inside = tables[f"window_mask_{grid}x{grid}"][:, :12].astype(bool)
        ours = window_indices(grid, 5).numpy()
        assert np.array_equal(ours < grid**2, inside)
        assert np.array_equal(ours[inside], tables[f"window_indices_{grid}x{grid}"][:, :12][inside])


def test_border_cells_contribute_the_compression_of_zero(gpt):
    """Outside neighbours are zero vectors before compression, not after: the bias must come through."""
    context = gpt.paradigm.head.context
    hidden = torch.randn(1, 16, 48)
    first = context.expand(context.compress(torch.zeros(12, 48)).flatten())
    torch.testing.assert_close(context(hidden)[0, 0], first)


def test_rotary_rows_are_distinct_by_default_and_repeated_on_request():
    """The paper gives every cell a row; the release repeats rows, which imported weights need."""
    ours, released = GPT(TINY_GPT), GPT(replace(TINY_GPT, rotary="repeated"))
    assert len(torch.unique(ours.rotary[1:].flatten(1), dim=0)) == 15
    assert torch.equal(released.rotary[1], released.rotary[2]) and not released.rotary[0].any()
    tables = np.load(GOLDEN / "tables_4x4.npz")
    np.testing.assert_allclose(rotary_table(16, 64, 1e4).repeat_interleave(2, 0), tables["freqs_cis_g16_hd64"][1:], atol=1e-6)


def test_short_attention_equals_the_general_kernel():
    """The head's arithmetic attention is an optimisation, not another function."""
    q, k, v = torch.randn(3, 5, 4, 3, 8)
    torch.testing.assert_close(short_causal_attention(q, k, v), causal_attention(q, k, v))
    torch.testing.assert_close(short_causal_attention(q[:, :, 1:], k, v), causal_attention(q, k, v)[:, :, 1:])


def released_gpt() -> tuple[GPT, dict[str, np.ndarray]]:
    """The golden weights in our model."""
    shape = dict(n_head=4, grid_size=4, token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, class_dropout=0.0)
    gpt = imported_gpt("iar2-gpt", arrays("iar2_gpt_4x4_weights"), **shape)
    return gpt, dict(np.load(GOLDEN / "iar2_gpt_4x4_io.npz"))


def test_logits_loss_and_gradients_equal_the_released_code():
    """The released model is the method's ground truth where the paper's formulas leave room."""
    gpt, io = released_gpt()
    codes = torch.from_numpy(np.stack([io["semantic"], io["detail"]], axis=1))
    logits = gpt(torch.from_numpy(io["cond_idx"]), codes)
    for stream in (0, 1):
        np.testing.assert_allclose(logits[stream].detach(), io[f"logits_{stream + 1}"], atol=1e-4)
    loss, parts = stream_losses(logits, codes, (2.0, 1.0))
    np.testing.assert_allclose([loss.item(), parts["loss_semantic"], parts["loss_detail"]],
                               [io["loss"], io["loss_1"], io["loss_2"]], rtol=1e-5)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in gpt.parameters()])
    np.testing.assert_allclose(norm, io["grad_global_norm"], rtol=1e-5)


def test_activation_checkpointing_and_compile_change_nothing():
    """Both trade time for memory or speed; the gradients must stay."""
    codes, labels = random_codes(2, TINY_GPT), torch.tensor([0, 1])
    gradients = []
    for variant in ("plain", "checkpointing", "compile"):
        gpt = randomise(GPT(TINY_GPT)).train()
        gpt.activation_checkpointing = variant == "checkpointing"
        if variant == "compile":
            for block in gpt.layers:
                block.compile()
        loss, _ = stream_losses(gpt(labels, codes), codes, (1.0, 1.0))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2], atol=1e-5, rtol=1e-4)


def test_class_dropout_uses_the_null_class_only_while_training():
    """Guidance needs the null class trained; sampling must never drop the class."""
    gpt = GPT(replace(TINY_GPT, class_dropout=0.5))
    labels = torch.zeros(1000, dtype=torch.long)
    dropped = gpt.train().condition.drop(labels)
    assert 400 < (dropped == gpt.condition.null_class).sum() < 600 and set(dropped.tolist()) == {0, gpt.condition.null_class}
    assert torch.equal(gpt.eval().condition.drop(labels), labels)
