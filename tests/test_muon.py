"""Muon: which weights it moves, and that it keeps what AdamW's step promises: left-out steps, resuming, sharding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoregressive.models.gpt import GPT
from autoregressive.train import train_c2i
from autoregressive.train.estimate import kept_states, measure, memory
from autoregressive.train.optimizers import OPTIMIZERS, hidden_matrices, make_optimizer
from autoregressive.train.options import TrainConfig, recipe
from tests.conftest import TINY_GPT, call, command, losses, random_codes, randomise
from tests.fake_cuda import Watch, fake_cuda, to_cuda
from tests.test_bad_input import refused
from tests.test_codes import write_codes
from tests.test_fake_gpu import a_run, backward_of, batches
from tests.test_train import TRAIN, gpt_options
from utils.batches import plan_steps
from utils.config import parse
from utils.ema import EMA
from utils.muon import Muon, Together, orthogonalise
from utils.optim import OptimOptions, set_learning_rate, step_if_finite
from utils.train_state import TrainState

OPTIONS = OptimOptions(lr=0.01, weight_decay=0.05, mixed_precision="none")
BLOCK = {"attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
HIDDEN = {  # beside those of the trunk's blocks
    "single": set(), "fine": set(),
    "alternating": {"paradigm.outputs.0.0", "paradigm.outputs.1.0"},
    "grouped": {"paradigm.outputs.0.0", "paradigm.outputs.1.0"},
    "independent": {"paradigm.outputs.0.0", "paradigm.outputs.1.0", "paradigm.fusion.0", "paradigm.fusion.2"},
    "hierarchical": {"paradigm.outputs.0.0", "paradigm.outputs.1.0", "paradigm.fusion.0", "paradigm.fusion.2",
                     *(f"paradigm.head.context.{name}" for name in ("compress.0", "compress.2", "expand.0", "expand.2")),
                     *(f"paradigm.head.layers.{layer}.{name}" for layer in range(2) for name in BLOCK)},
}


def built(paradigm: str = "hierarchical", optimizer: str = "muon") -> tuple[GPT, torch.optim.Optimizer]:
    """A tiny GPT and its optimizer."""
    sizes = (8,) if paradigm == "single" else (8, 16)
    gpt = randomise(GPT(replace(TINY_GPT, paradigm=paradigm, codebook_sizes=sizes))).train()
    return gpt, make_optimizer(gpt, OPTIONS, optimizer)


def backward(gpt: GPT, factor: float = 1.0) -> None:
    """Leave the gradients of a batch on all weights, times a factor."""
    logits = gpt(torch.tensor([0, 1]), random_codes(2, gpt.config))
    (sum(stream.square().mean() for stream in logits) * factor).backward()


@pytest.mark.parametrize("paradigm", sorted(HIDDEN))
def test_muon_moves_hidden_matrices_and_adamw_the_rest(paradigm):
    """An embedding or an output layer under Muon would move every code alike, whether it occurs or not."""
    gpt, optimizer = built(paradigm)
    names = {p: name for name, p in gpt.named_parameters()}
    kept = {names[p]: set(state) for p, state in optimizer.state.items()}
    moved = {name for name, state in kept.items() if state == {"momentum_buffer"}}
    trunk = {f"layers.{layer}.{name}" for layer in range(2) for name in BLOCK}
    assert moved == {f"{name}.weight" for name in HIDDEN[paradigm] | trunk}
    assert set(kept) == set(names.values())
    assert all(state == {"step", "exp_avg", "exp_avg_sq"} for name, state in kept.items() if name not in moved)
    assert {name for name in moved if "wqkv" in name} == {names[p] for p in hidden_matrices(gpt)[3]}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0} == {name for p, name in names.items() if p.ndim == 1}


def stepped_by_torch(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """A matrix after the steps of torch's own Muon."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_the_step_is_torchs():
    """Batching equal matrices must not change the rule; queries, keys and values are three matrices, not one."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((12, 8), (12, 8), (5, 9), (24, 8))]
    gradients = [[torch.randn_like(start) for _ in range(3)] for start in starts]
    weights = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon([{"params": weights[:3], "parts": 1}, {"params": weights[3:], "parts": 3}], 0.01, 0.1, torch.bfloat16)
    for step in range(3):
        for weight, steps in zip(weights, gradients):
            weight.grad = steps[step]
        optimizer.step()
    for weight, start, steps in zip(weights[:3], starts, gradients):
        assert torch.allclose(weight, stepped_by_torch(start, steps), atol=1e-6)
    apart = [stepped_by_torch(start, [g.chunk(3)[part] for g in gradients[3]]) for part, start in enumerate(starts[3].chunk(3))]
    assert torch.allclose(weights[3], torch.cat(apart), atol=1e-6)
    assert not torch.allclose(weights[3], stepped_by_torch(starts[3], gradients[3]), atol=1e-3)


def test_singular_values_become_one():
    """That is what Muon is: every direction of a matrix moves about as far."""
    torch.manual_seed(0)
    for shape in ((3, 16, 8), (3, 8, 16)):
        found = torch.linalg.svdvals(orthogonalise(torch.randn(shape) * 1e-4, (3.4445, -4.775, 2.0315), 5, 1e-7))
        assert found.min() > 0.6 and found.max() < 1.3


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_moves_nothing(factor):
    """One bad batch must ruin neither the weights nor the moments of either part; the next good one counts again."""
    gpt, optimizer = built()
    seen = []
    for each in (1.0, factor, 1.0):
        backward(gpt, each)
        step_if_finite(optimizer, torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0))
        optimizer.zero_grad()
        seen.append([*(p.detach().clone() for p in gpt.parameters()),
                     *(value.clone() for p in gpt.parameters() for value in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))


def test_one_learning_rate_for_both_parts():
    """A schedule that missed one of them would train it at the initial rate; at zero nothing moves, not by decay either."""
    gpt, optimizer = built()
    optimizer.load_state_dict(optimizer.state_dict())  # after which the parts must still see it
    before = [p.detach().clone() for p in gpt.parameters()]
    for lr, still in ((0.0, True), (0.01, False)):
        set_learning_rate(lr, optimizer)
        backward(gpt)
        step_if_finite(optimizer, torch.tensor(1.0))
        assert all(torch.equal(a, b) == still for a, b in zip(before, gpt.parameters()))


def test_the_device_is_not_waited_for():
    """Left-out steps and all, the host reads nothing back: two copies of a micro-batch to the device, and no more."""
    words = "--code-path none --global-batch-size 4 --ema-decay 0.9 --data-parallel none --optimizer muon"
    config, run = parse(TrainConfig, recipe, words.split()), a_run()
    with fake_cuda():
        gpt = to_cuda(GPT(TINY_GPT), torch.float32).train()
        gpt.rotary = gpt.build_rotary().to("cuda")
        training = TrainState(gpt, make_optimizer(gpt, config.optim, config.optimizer), EMA(gpt, 0.9))
        loader = batches(torch.zeros(4, 2, 16, dtype=torch.long), torch.zeros(4, dtype=torch.long))
        with backward_of(gpt), Watch() as watch:
            train_c2i.train_step(gpt, training, loader, plan_steps(config.batch, 8, 1), config, run, 0)
    assert sum(watch.copies.values()) == 2


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Random codes shared by the tests below."""
    return write_codes(tmp_path_factory.mktemp("data") / "codes")


def muon_options(codes: Path, run_dir: Path, **extra) -> list:
    """A small training with Muon, whose learning rate changes at every step and whose batch divides by 2 and by 3."""
    options: dict = dict(optimizer="muon", warmup_steps=6, global_batch_size=12, ema_decay=0.9) | extra
    return gpt_options(codes, run_dir, **options)


@pytest.fixture(scope="module")
def reference(codes, tmp_path_factory) -> Path:
    """Eight steps in one process, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    call(train_c2i.main, *muon_options(codes, run_dir, data_parallel="none"))
    return run_dir


def test_resuming_changes_nothing(codes, tmp_path, reference):
    """Both kinds of moments come back: the exported weights are the same to the bit."""
    for steps in (4, 8):
        call(train_c2i.main, *muon_options(codes, tmp_path / "run", steps=steps, data_parallel="none"))
    whole, resumed = (load_file(folder / "gpt.safetensors") for folder in (reference, tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and len(whole) == len(resumed)


@pytest.mark.parametrize("mode, processes, extra", [("ddp", 2, {}), ("fsdp", 3, {}), ("hsdp", 2, {"shard_size": 1})])
def test_several_processes_train_like_one(codes, tmp_path, reference, mode, processes, extra):
    """A matrix is orthogonalised whole, wherever its rows are; three processes do not divide the rows, nor the matrices."""
    command(TRAIN, *muon_options(codes, tmp_path / "run", data_parallel=mode, **extra), processes=processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=2e-5)


def test_a_sharded_run_resumes_on_another_world_size(codes, tmp_path, reference):
    """Shards of the momentum, carried on by one process: the losses go on where they were."""
    command(TRAIN, *muon_options(codes, tmp_path / "run", steps=4, data_parallel="fsdp"), processes=2)
    call(train_c2i.main, *muon_options(codes, tmp_path / "run", data_parallel="none"))
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=2e-5)


@pytest.mark.parametrize("begun, now", [("adamw", "muon"), ("muon", "adamw")])
def test_the_optimizer_is_fixed(codes, tmp_path, capsys, begun, now):
    """Moments of one are no start for the other; a checkpoint from before the option is refused too, for what it lacks."""
    options = dict(steps=2, data_parallel="none")
    call(train_c2i.main, *muon_options(codes, tmp_path / "run", optimizer=begun, **options))
    again = muon_options(codes, tmp_path / "run", optimizer=now, **options)
    sentence = refused(capsys, train_c2i.main, *again)
    assert "optimizer" in sentence and begun in sentence and now in sentence and "--run-dir" in sentence
    record = next((tmp_path / "run" / "checkpoints").glob("step-*")) / "config.json"
    old = json.loads(record.read_text())
    del old["options"]["optimizer"]
    record.write_text(json.dumps(old))
    assert "does not fit this run" in refused(capsys, train_c2i.main, *again)


def test_one_moment_of_hidden_matrices_is_counted():
    """The estimate chooses the micro-batch: against what the optimizers really keep, but for Adam's counts of steps."""
    found = {}
    for name in OPTIMIZERS:
        gpt, optimizer = built(optimizer=name)
        config = parse(TrainConfig, recipe, ["--code-path", "none", "--optimizer", name, "--data-parallel", "none"])
        footprint, weights = measure(gpt.config, bf16=False), sum(p.numel() for p in gpt.parameters())
        moments = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
        assert kept_states(footprint, config) == weights + moments
        found[name] = memory(footprint, config, 1, False).states
        assert found[name] == 4 * (2 * weights + moments)
    assert found["muon"] < found["adamw"]


def test_together_refuses_what_two_parts_share():
    """A weight that two optimizers move would move twice."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Together(torch.optim.AdamW([weight]), torch.optim.AdamW([weight]))
