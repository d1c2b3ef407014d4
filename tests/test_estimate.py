"""What a training needs, and what its log says of time."""

import pytest
import torch

from autoregressive.models.gpt import build_gpt
from autoregressive.models.transformer import GPTConfig
from autoregressive.train.estimate import fitted, measure, memory, usable
from autoregressive.train.options import TrainConfig, gpt_config, recipe
from tests.conftest import TINY_GPT, random_codes
from utils.config import parse
from utils.devices import PEAK_TFLOPS, memory_bytes, peak_flops
from utils.optim import initialise_optimizer, step_if_finite
from utils.run import Work

GIB = 2**30


def options(*words: object) -> TrainConfig:
    """A training of GPT-B, unless the words say otherwise."""
    return parse(TrainConfig, recipe, ["--code-path", "nowhere", "--codebook-sizes", "256", "4096", *map(str, words)])


def shape(config: TrainConfig) -> GPTConfig:
    """The model of a training."""
    return gpt_config(config.gpt, (256, 4096))


@pytest.mark.parametrize("paradigm, sizes", [("hierarchical", (256, 4096)), ("single", (4096,)), ("grouped", (256, 4096))])
def test_flops_are_those_of_the_products(paradigm, sizes):
    """Two for each weight of a matrix and each position it is applied to, and attention's; the head within its bounds."""
    gpt = build_gpt("GPT-small", paradigm=paradigm, codebook_sizes=sizes, grid_size=8, num_classes=10)
    trunk = sum(p.numel() for p in gpt.layers.parameters() if p.ndim == 2)
    positions, config = len(gpt.rotary), gpt.config
    attention = 4 * config.n_layer * config.dim * positions**2
    head = sum(p.numel() for name, p in gpt.paradigm.named_parameters() if p.ndim == 2 and "embedding" not in name)
    least = 2 * trunk * positions + attention
    assert least < measure(config, bf16=False).flops < least + 2 * head * positions * 4


def test_what_is_kept_is_what_the_backward_pass_holds():
    """Against real tensors: bytes that autograd keeps grow by the estimate with every grid."""
    gpt = build_gpt("GPT-tiny", codebook_sizes=(8, 16), grid_size=4, num_classes=3).train()
    own = {p.untyped_storage().data_ptr() for p in (*gpt.parameters(), *gpt.buffers())}

    def kept(grids: int) -> int:
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = gpt(torch.zeros(grids, dtype=torch.long), random_codes(grids, gpt.config))
        assert len(logits) == 2
        return sum(storage.nbytes() for storage in seen.values())

    a_grid = (kept(5) - kept(3)) / 2 + 4 * gpt.config.cells * 24  # the probabilities of both streams
    assert measure(gpt.config, bf16=False).kept == pytest.approx(a_grid, rel=0.02)


def test_recomputation_keeps_less():
    """A layer's input instead of all of its activations."""
    found = measure(shape(options()), bf16=True)
    assert found.parameters == 143_111_616
    assert 5 * found.kept_recomputing < found.kept and found.layer < found.kept / 10


@pytest.mark.parametrize("words, world_size, gib, expected", [
    (("--gpt-model", "GPT-XXL"), 8, 80, (32, False)),                        # the whole share
    (("--gpt-model", "GPT-XXL", "--image-size", 384), 8, 80, (16, False)),   # a part of it
    (("--gpt-model", "GPT-XXL"), 1, 80, (32, False)),
    (("--gpt-model", "GPT-XXL", "--image-size", 384), 8, 12.5, (2, True)),   # nothing fits without recomputation
    (("--gpt-model", "GPT-XXL", "--micro-batch-size", 8), 8, 80, (8, False)),  # typed
    (("--gpt-model", "GPT-XXL", "--activation-checkpointing"), 8, 80, (32, True)),
    (("--gpt-model", "GPT-XXL"), 1, 8, (1, True)),                            # nothing fits: the smallest, which may fail
])
def test_the_largest_micro_batch_that_fits(words, world_size, gib, expected):
    """The recipe starts as it stands on eight devices, on one, and on small ones as far as that goes."""
    config = options(*words)
    footprint = measure(shape(config), bf16=True)
    found = fitted(config, footprint, world_size, gib * GIB, True)
    assert (found.batch.micro_batch_size, found.parallel.activation_checkpointing) == expected
    if gib > 8:
        assert memory(footprint, found, world_size, True).total <= usable(gib * GIB)


def test_devices_and_rates():
    """What is typed wins; a CPU says nothing of itself; the log's fractions follow from images a second."""
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None and memory_bytes(cpu) is None
    assert peak_flops(cpu, 500) == 5e14 and memory_bytes(cpu, 80) == 80 * GIB
    assert list(PEAK_TFLOPS).index("H100 PCIe") < list(PEAK_TFLOPS).index("H100")
    assert Work(512, 3e11, 1e15).rates(100) == {"tokens_per_second": 51200, "mfu": pytest.approx(0.03)}
    assert Work(512, 3e11, None).rates(100) == {"tokens_per_second": 51200}


def test_a_step_that_is_not_finite_moves_nothing():
    """Weights, moments and the count of steps stay, without the host having looked at the norm."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    initialise_optimizer(optimizer)
    seen = []
    for factor in (1.0, float("inf"), float("nan"), 1.0):
        (layer(torch.ones(2, 4)).square().sum() * factor).backward()
        step_if_finite(optimizer, torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0))
        optimizer.zero_grad()
        seen.append([layer.weight.detach().clone(), *(optimizer.state[layer.weight][name].clone() for name in (
            "step", "exp_avg", "exp_avg_sq"))])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1])) and all(torch.equal(a, b) for a, b in zip(seen[0], seen[2]))
    assert not torch.equal(seen[2][0], seen[3][0]) and seen[3][1] == 2


def test_hsdp_is_the_default_on_several_nodes(monkeypatch):
    """Shards stay inside a node, whose network is the fast one; a typed mode wins."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert options("--gpt-model", "GPT-XXL").parallel.data_parallel == "hsdp"
    assert options("--gpt-model", "GPT-XXL", "--data-parallel", "fsdp").parallel.data_parallel == "fsdp"
    assert options("--gpt-model", "GPT-XL").parallel.data_parallel == "ddp"


def test_the_tiny_gpt_is_measured_too():
    """Every paradigm passes through fake tensors."""
    for paradigm in ("hierarchical", "independent", "conditional", "alternating", "grouped"):
        assert measure(GPTConfig(**{**vars(TINY_GPT), "paradigm": paradigm}), bf16=False).flops > 0
