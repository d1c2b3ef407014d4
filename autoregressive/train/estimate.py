"""What training a GPT needs, counted on tensors without data: flops, memory, and the micro-batch that fits a device.

A forward pass on fake tensors says what it computes and what it keeps for the backward pass; the rest is counted by hand.
Compiled layers keep less than that, so the estimates err on the safe side.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import GPTConfig
from autoregressive.train.optimizers import OPTIMIZERS, hidden_matrices
from autoregressive.train.options import TrainConfig
from utils.batches import split_batch
from utils.distributed import shard_group

_RESERVED = 1.5 * 2**30  # bytes of a device that the CUDA context, kernels and communication take
_USABLE = 0.92           # of the rest: what the allocator does not lose between blocks


@dataclass(frozen=True)
class Footprint:
    """What one GPT computes and keeps for a grid."""

    parameters: int
    hidden: int              # of the parameters, those in hidden matrices
    flops: float             # of the forward pass
    kept: float              # bytes kept for the backward pass
    kept_recomputing: float  # the same under activation checkpointing
    layer: float             # bytes of one layer, which recomputation and the backward pass hold beside
    layers: int              # of the trunk


@dataclass(frozen=True)
class Memory:
    """Bytes of a device."""

    states: float       # weights, gradients, moments, averages
    copies: float       # bf16 weights, and gathered layers of a sharded model
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.states + self.copies + self.activations


def _forward(gpt: GPT, grids: int, bf16: bool) -> tuple[float, float]:
    """(Flops, bytes kept besides the weights) of a teacher-forced pass over `grids` grids, under fake tensors."""
    codes = torch.zeros(grids, len(gpt.config.codebook_sizes), gpt.config.cells, dtype=torch.long)
    own = {tensor.untyped_storage()._cdata for tensor in (*gpt.parameters(), *gpt.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # by identity, alive so that no identity is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), FlopCounterMode(display=False) as counter, \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        order = torch.zeros(grids, gpt.config.cells, dtype=torch.long) if gpt.config.order == "random" else None
        logits = gpt(gpt.condition.blank(grids), codes, order)
        flops = counter.get_total_flops()
    # The loss keeps float32 probabilities of every logit.
    return flops, sum(storage.nbytes() for storage in kept.values()) + 4 * sum(each.numel() for each in logits)


def measure(config: GPTConfig, bf16: bool) -> Footprint:
    """Count a GPT's training; takes a second or two, and no memory."""
    with FakeTensorMode():
        gpt = GPT(config).train()
        flops, kept = {}, {}
        for recomputing in (False, True):
            gpt.activation_checkpointing = recomputing
            (flops[recomputing], one), (_, two) = (_forward(gpt, grids, bf16) for grids in (1, 2))
            kept[recomputing] = two - one  # without what does not grow with the batch: bf16 copies of the weights
        parameters = sum(p.numel() for p in gpt.parameters())
        hidden = sum(p.numel() for matrices in hidden_matrices(gpt).values() for p in matrices)
    layer = (kept[False] - kept[True]) / config.n_layer  # a head's layer is larger: its share counts for the trunk's
    return Footprint(parameters, hidden, flops[False], kept[False], kept[True], layer, config.n_layer)


def kept_states(footprint: Footprint, config: TrainConfig) -> int:
    """Numbers that a training keeps between steps, and in its checkpoints: weights, moments, and the average where kept."""
    saved = (OPTIMIZERS["adamw"].hidden_moments - OPTIMIZERS[config.optimizer].hidden_moments) * footprint.hidden
    return footprint.parameters * (3 + bool(config.optim.ema_decay)) - saved


def memory(footprint: Footprint, config: TrainConfig, world_size: int, bf16: bool) -> Memory:
    """Memory of a device for the micro-batch and the recomputation that the options say."""
    parallel, parameters = config.parallel, footprint.parameters
    micro, accumulation = split_batch(config.batch, world_size)
    shards = {"fsdp": world_size, "hsdp": shard_group(parallel.shard_size)}.get(parallel.data_parallel, 1)
    # All in float32, gradients too; those of accumulated micro-batches stay whole under FSDP.
    states = 4 * (kept_states(footprint, config) + parameters) / shards
    states += parameters * 4 * (shards > 1 and accumulation > 1)
    # Autocast keeps bf16 copies of all weights; FSDP gathers two layers at a time, with gradients of one.
    whole = 2 * parameters * bf16
    copies = whole if shards == 1 else parameters / footprint.layers * (2 * (2 if bf16 else 4) + 4)
    kept = footprint.kept_recomputing if parallel.activation_checkpointing else footprint.kept
    return Memory(states, copies, micro * (kept + footprint.layer))


def usable(device_bytes: float) -> float:
    """What a training can count on of a device's memory."""
    return _USABLE * (device_bytes - _RESERVED)


def fitted(config: TrainConfig, footprint: Footprint, world_size: int, device_bytes: float, bf16: bool) -> TrainConfig:
    """The options with the largest micro-batch that fits the device; layers are recomputed only where nothing else fits.

    What was typed stays: --micro-batch-size above 0, --activation-checkpointing.  Where nothing fits, the smallest is taken.
    """
    if config.batch.micro_batch_size:
        return config
    share, _ = split_batch(config.batch, world_size)
    choice = config
    for recomputing in (False, True) if not config.parallel.activation_checkpointing else (True,):
        for micro in (size for size in range(share, 0, -1) if share % size == 0):
            choice = replace(config, batch=replace(config.batch, micro_batch_size=micro),
                             parallel=replace(config.parallel, activation_checkpointing=recomputing))
            if memory(footprint, choice, world_size, bf16).total <= usable(device_bytes):
                return choice
    return choice
