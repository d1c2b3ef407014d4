"""Random orders of prediction annealed to raster (RAR), for every causal paradigm."""

import itertools
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.generate import SamplingOptions, draw_uniforms, generate
from autoregressive.models.gpt import GPT, build_gpt, load_gpt
from autoregressive.models.local_head import window_indices
from autoregressive.models.order import draw_orders, predicted_before, random_share
from autoregressive.train import train_c2i
from autoregressive.train.estimate import measure
from autoregressive.train.options import GPTOptions, check_order
from tests.conftest import call, command, losses, random_codes, randomise
from tests.test_bad_input import refused
from tests.test_codes import write_codes
from tests.test_gpt import teacher_forced_decode
from tests.test_paradigms import VARIANTS, order_of_prediction, variant
from tests.test_train import TRAIN, gpt_options
from utils.batches import StepPlan
from utils.checkpoint import export
from utils.code_shards import CodeDataset
from utils.config import UserError
from utils.distributed import Processes

NAMES = [name for name in VARIANTS if name != "published rotary"]
LABELS = torch.tensor([0, 2, 3])


def random_gpt(name: str, **shape) -> GPT:
    """A tiny random GPT of a paradigm with embeddings of targets."""
    return randomise(GPT(variant(name, order="random", **shape)))


def permutations(batch: int, cells: int, seed: int = 0) -> torch.Tensor:
    """An order for each sample [B, N]."""
    return torch.rand(batch, cells, generator=torch.Generator().manual_seed(seed)).argsort(1)


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_equals_teacher_forcing(name):
    """What training anneals to must be what sampling computes, embeddings of the next cell included."""
    gpt = random_gpt(name)
    codes = random_codes(3, gpt.config)
    with torch.no_grad():
        forced, decoded = gpt(LABELS, codes), teacher_forced_decode(gpt, LABELS, codes)
        gpt.order.target.weight.zero_()
        without = gpt(LABELS, codes)
    for a, b, c in zip(forced, decoded, without, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        assert not torch.allclose(a, c, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_code_changes_no_logits_predicted_before_it(name):
    """Causality in any order, window and head included: a leak would make the loss of permuted grids a lie."""
    gpt = random_gpt(name)
    codes, cells = random_codes(3, gpt.config), gpt.config.cells
    order = permutations(3, cells)
    chain = order_of_prediction(gpt)                                               # (stream, place)
    with torch.no_grad():
        before = gpt(LABELS, codes, order)
        for step in (0, 5, len(chain) - 2):
            stream, place = chain[step]
            cell = order[:, place, None]                                           # [B, 1]
            changed = codes.clone()
            changed[:, stream] = codes[:, stream].scatter(
                1, cell, (codes[:, stream].gather(1, cell) + 1) % gpt.config.codebook_sizes[stream])
            after = gpt(LABELS, changed, order)
            same = [[torch.equal(before[s][b, order[b, p]], after[s][b, order[b, p]]) for s, p in chain] for b in range(3)]
            assert all(all(sample[: step + 1]) for sample in same)
            assert not all(all(sample[step + 1 :]) for sample in same) or name == "independent" and step == len(chain) - 2


@pytest.mark.parametrize("name", NAMES)
def test_raster_as_an_order_is_the_plain_paradigm_exactly(name):
    """Annealing ends in the plain decoder: without embeddings of targets no bit of its logits may differ."""
    gpt, plain = random_gpt(name), GPT(variant(name)).eval()
    plain.load_state_dict({key: value for key, value in gpt.state_dict().items() if key != "order.target.weight"})
    codes, raster = random_codes(3, gpt.config), torch.arange(gpt.config.cells).expand(3, -1)
    with torch.no_grad():
        for a, b in zip(gpt(LABELS, codes, raster), gpt(LABELS, codes), strict=True):
            assert torch.equal(a, b)
        gpt.order.target.weight.zero_()
        for a, b in zip(gpt(LABELS, codes, raster), plain(LABELS, codes), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_of_all_grids_sum_to_one_in_any_order(name):
    """Each order is a factorization of a distribution over grids: no cell is predicted twice, and none left out."""
    sizes = (3,) if name == "single" else (2, 3)
    gpt = random_gpt(name, grid_size=2, codebook_sizes=sizes).double()
    grids = torch.tensor(list(itertools.product(*[range(size) for size in sizes for _ in range(4)])))
    codes, labels = grids.unflatten(1, (len(sizes), 4)), torch.ones(len(grids), dtype=torch.long)  # [every grid, C, 4]
    seen = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        with torch.no_grad():
            logits = gpt(labels, codes, torch.tensor(order).expand(len(grids), -1))
        total = sum(stream.log_softmax(-1).gather(-1, codes[:, index, :, None]).sum((1, 2))
                    for index, stream in enumerate(logits))
        np.testing.assert_allclose(total.exp().sum(), 1, atol=1e-6)
        seen.append(total)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3) and not torch.allclose(seen[1], seen[2], atol=1e-3)


def test_inputs_are_what_a_loop_over_the_order_says():
    """Rotary rows go with the cell that is read, target embeddings with the cell that is predicted, per sample."""
    for name in ("single", "alternating", "grouped", "compressed"):
        gpt = random_gpt(name)
        order = permutations(3, gpt.config.cells)
        taken, chain = gpt.take_order(order), order_of_prediction(gpt)
        if name == "compressed":
            chain = chain[::2]
        targets, rotary, states = taken.targets(gpt.order.cell_of), taken.rotary(gpt.rotary), taken.states(torch.arange(
            float(len(chain)))[None, :, None].expand(3, -1, 1))
        plain = gpt.order.rotary
        for sample in range(3):
            cells = [int(order[sample, place]) for _, place in chain]
            assert targets[sample].tolist() == cells and not rotary[sample, 0, 0].any()
            assert torch.equal(rotary[sample, 0, 1:], plain[cells[:-1]])
            places = {(stream, cell): step for step, ((stream, _), cell) in enumerate(zip(chain, cells))}
            assert states[sample, :, 0].tolist() == [places[stream, cell] for stream, cell in chain]


def test_the_window_keeps_the_neighbours_predicted_before():
    """IAR2's window against a direct enumeration; a later neighbour counts as the border does."""
    window, order = window_indices(4, 5), permutations(2, 16)
    places = order.argsort(1)
    found = predicted_before(window, places)
    for sample, cell in itertools.product(range(2), range(16)):
        done = order[sample, : places[sample, cell]].tolist()
        assert found[sample, cell].tolist() == [near if near in done else 16 for near in window[cell].tolist()]
    assert torch.equal(predicted_before(window, torch.arange(16)[None])[0], window)


def test_the_share_of_random_orders_anneals():
    """RAR's r on its published schedule (epochs 200 to 300 of 400), and the two ends of what may be asked for."""
    assert [random_share(epoch / 400, (0.5, 0.75)) for epoch in (0, 199, 200, 225, 250, 300, 399)] == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [random_share(progress, (0.0, 0.0)) for progress in (0, 0.5)] == [0, 0]
    assert [random_share(progress, (1.0, 1.0)) for progress in (0, 0.99)] == [1, 1]
    assert [random_share(progress, (0.5, 0.5)) for progress in (0.25, 0.5)] == [1, 0]


def drawn(share: float, step: int = 3, micro: int = 64, rank: int = 0, world: int = 1) -> torch.Tensor:
    """Orders of one process, its micro-batches after each other."""
    plan = StepPlan(64, micro, 64 // world // micro, 10, 100)
    processes = Processes(rank, world, 0, torch.device("cpu"))
    parts = draw_orders(share, 16, plan, 7, step, processes)
    assert len(parts) == plan.accumulation and all(len(part) == micro for part in parts)
    return torch.cat(parts)


def test_orders_depend_on_seed_and_step_alone():
    """A resumed run, another micro-batch or another number of processes must not train on other orders."""
    all_orders = drawn(0.5)
    assert torch.equal(all_orders.sort(1).values, torch.arange(16).expand(64, -1))
    permuted = (all_orders != torch.arange(16)).any(1)
    assert 16 < permuted.sum() < 48 and len(torch.unique(all_orders[permuted], dim=0)) == permuted.sum()
    assert torch.equal(drawn(0.5, micro=8), all_orders)
    for rank in range(2):
        assert torch.equal(drawn(0.5, rank=rank, world=2, micro=16), all_orders[rank::2])
    assert not torch.equal(drawn(0.5, step=4), all_orders)
    assert torch.equal(drawn(0.0), torch.arange(16).expand(64, -1))
    assert (drawn(1.0) != torch.arange(16)).any(1).all()


@pytest.mark.parametrize("name", ["compressed", "grouped"])
def test_recomputed_layers_give_the_same_gradients(name):
    """Rotary rows of each sample's own must survive until the backward pass."""
    codes, gradients = random_codes(3, variant(name)), []
    for recomputing in (False, True):
        gpt = random_gpt(name).train()
        gpt.activation_checkpointing = recomputing
        sum(stream.logsumexp(-1).sum() for stream in gpt(LABELS, codes, permutations(3, 16))).backward()
        assert gpt.order.target.weight.grad.abs().amax(1).min() > 0
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    torch.testing.assert_close(*gradients)


RANDOM = ("--order", "random", "--order-anneal", 0.25, 0.75)


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Random codes shared by the tests of this file."""
    return write_codes(tmp_path_factory.mktemp("data") / "codes")


@pytest.fixture(scope="module")
def reference(codes, tmp_path_factory) -> dict[int, float]:
    """Losses of eight steps, uninterrupted: two in random orders, four that anneal, two in raster."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    call(train_c2i.main, *gpt_options(codes, run_dir, data_parallel="none"), *RANDOM)
    assert load_gpt(run_dir).config.order == "random"
    return losses(run_dir)


def test_a_resumed_run_equals_an_uninterrupted_one(codes, tmp_path, reference):
    """Also with gradient accumulation: orders are those of the step, and losses go on where they were."""
    options = gpt_options(codes, tmp_path / "run", data_parallel="none", micro_batch_size=2, checkpoint_every=3,
                          keep_checkpoints=3)
    call(train_c2i.main, *options, *RANDOM)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("")                                                         # what follows is of the second run
    call(train_c2i.main, *options, *RANDOM)
    assert losses(tmp_path / "run") == pytest.approx({step: reference[step] for step in range(4, 9)}, abs=2e-5)
    call(train_c2i.main, *gpt_options(codes, tmp_path / "raster", steps=3, data_parallel="none"))
    assert losses(tmp_path / "raster")[3] != pytest.approx(reference[3], abs=1e-4)


def test_the_probability_of_a_random_order_is_logged_and_stays(codes, tmp_path, capsys):
    """Curves bend where r falls; a run that goes on with another anneal would be of neither."""
    options = gpt_options(codes, tmp_path / "run", steps=8, data_parallel="none")
    call(train_c2i.main, *options, *RANDOM)
    start, end = (float(word) for word in RANDOM[RANDOM.index("--order-anneal") + 1 :][:2])
    assert losses(tmp_path / "run", "random_order") == pytest.approx(
        {step + 1: random_share(step / 8, (start, end)) for step in range(8)})
    sentence = refused(capsys, train_c2i.main, *options, "--order", "random", "--order-anneal", 0.0, 0.5)
    assert f"order_anneal [{start}, {end}], not with [0.0, 0.5] as now" in sentence and "give --order-anneal as" in sentence
    call(train_c2i.main, *gpt_options(codes, tmp_path / "raster", steps=1, data_parallel="none"))
    assert losses(tmp_path / "raster") and not losses(tmp_path / "raster", "random_order")


def test_two_sharded_processes_train_like_one(codes, tmp_path, reference):
    """The table of targets is sharded with the model, and each process takes the orders of its own images."""
    command(TRAIN, *gpt_options(codes, tmp_path / "run", data_parallel="fsdp"), *RANDOM, processes=2)
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=2e-5)


def test_compiled_layers_train_whole_and_are_evaluated_in_raster(codes, tmp_path, reference, monkeypatch):
    """No graph break with rows of each sample's own; held-out bits are what the raster decoder needs."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(
        self, backend="eager", fullgraph=True, **options))
    held_out, run = write_codes(tmp_path / "held", images=21, seed=1), tmp_path / "run"
    call(train_c2i.main, *gpt_options(codes, run, data_parallel="none", compile="on"), *RANDOM, "--val-code-path", held_out)
    assert losses(run) == pytest.approx(reference, abs=2e-5)
    gpt, dataset = load_gpt(run), CodeDataset(held_out)
    grids, labels = dataset.__getitems__([(0, row) for row in range(21)])
    with torch.no_grad():
        raster = teacher_forced_decode(gpt, labels, grids)
    nats = sum(F.cross_entropy(stream.transpose(1, 2), target, reduction="none").sum(1).mean()
               for stream, target in zip(raster, grids.unbind(1)))
    assert losses(run, "eval/bits_per_image")[8] == pytest.approx(float(nats) / math.log(2), abs=1e-3)


@pytest.mark.parametrize("words, named", [
    (("--order", "raster", "--order-anneal", 0.25, 0.5), "leave it out or give --order random"),
    (("--order", "random", "--order-anneal", 0.75, 0.5), "upside down"),
    (("--order", "random", "--order-anneal", 0.5, 1.5), "--order-anneal 1.5"),
    (("--order", "random", "--rotary", "repeated"), "--rotary repeated")])
def test_options_that_do_not_apply_are_refused(codes, tmp_path, capsys, words, named):
    """An option that is taken and does nothing is believed to have done something."""
    assert named in refused(capsys, train_c2i.main, *gpt_options(codes, tmp_path / "run"), *words)


def test_the_fine_stage_and_a_raster_model_have_no_other_order():
    """CTF's second stage predicts all cells at once; a GPT that was not told the target cannot know it."""
    with pytest.raises(UserError, match="--paradigm fine, which predicts all cells at once"):
        check_order(GPTOptions(order="random"), "fine")
    gpt = randomise(GPT(variant("single")))
    with pytest.raises(ValueError, match="order needs a GPT"):
        gpt(LABELS, random_codes(3, gpt.config), permutations(3, 16))


def test_an_older_file_is_of_raster_order(tmp_path):
    """Files from before the option describe no order, and must load as what they were."""
    config = asdict(variant("single"))
    del config["order"]
    export(tmp_path / "gpt.safetensors", "gpt", randomise(GPT(variant("single"))).state_dict(), {"model": config})
    assert load_gpt(tmp_path).order is None


def test_the_estimate_counts_the_table_and_what_permuted_passes_keep(capsys):
    """A micro-batch that fits by the estimate of raster order might not fit."""
    plain, random = (measure(build_gpt("GPT-tiny", grid_size=4, order=order).config, bf16=False)
                     for order in ("raster", "random"))
    assert random.parameters == plain.parameters + 16 * 128
    assert plain.kept < random.kept < 1.2 * plain.kept and random.flops == plain.flops
    words = ("--gpt-model", "GPT-tiny", "--image-size", 64, "--order", "random", "--dry-run")
    call(train_c2i.main, "--code-path", "nowhere", *words)
    assert re.search("order +random", capsys.readouterr().out)


def test_samples_use_the_embedding_of_the_next_cell():
    """The decoder is a raster decoder that knows targets: guided codes change when the table does."""
    gpt = random_gpt("compressed")
    options, uniforms = SamplingOptions(cfg_scale=(1.5, 3.0)), draw_uniforms(0, np.arange(3), 2, 16)
    first = generate(gpt, torch.tensor([0, 1, 2]), options, uniforms)
    with torch.no_grad():
        gpt.order.target.weight.zero_()
    assert not torch.equal(first, generate(gpt, torch.tensor([0, 1, 2]), options, uniforms))
