"""What a training would need, before anything is reserved: `train_c2i.py --dry-run`."""

import torch

from autoregressive.models.gpt import GPT
from autoregressive.train.options import TrainConfig, gpt_config, known_codes
from utils.batches import split_batch
from utils.config import flatten, to_dict
from utils.distributed import Processes, shard_group
from utils.optim import uses_bf16


def activation_bytes(gpt: GPT, images: int, checkpointing: bool, width: int) -> float:
    """Bytes kept for the backward pass of `images` grids; width: bytes of an activation.

    In multiples of D a token and layer: 2 norms, q, k, v, attention output and residuals take about 10, SwiGLU 4 x 2.7;
    head layers hold C + 1 slots a cell.  Checkpointing keeps the input of a layer alone.
    """
    config, head = gpt.config, getattr(gpt.paradigm, "head", None)
    head_positions = 0 if head is None else config.cells * head.slots * config.head_layers
    positions = len(gpt.rotary) * config.n_layer + head_positions
    multiple = 1 if checkpointing else 21
    logits = config.cells * sum(config.codebook_sizes) * (width + 4)
    return images * (positions * multiple * config.dim * width + logits)


def print_dry_run(config: TrainConfig, processes: Processes) -> None:
    """Resolved options, parameter count and an estimate of memory per device."""
    with torch.device("meta"):
        gpt = GPT(gpt_config(config.gpt, *known_codes(config)))
    parameters = sum(p.numel() for p in gpt.parameters())
    micro, accumulation = split_batch(config.batch, processes.world_size)
    shards = {"fsdp": processes.world_size, "hsdp": shard_group(config.parallel.shard_size)}.get(config.parallel.data_parallel, 1)
    # float32 weights, gradients and two moments, and the average where kept; gradients of accumulated micro-batches
    # stay whole under FSDP.
    states = parameters * 4 * (4 + bool(config.optim.ema_decay)) / shards
    states += parameters * 4 * (shards > 1 and accumulation > 1)
    width = 2 if uses_bf16(config.optim.mixed_precision, processes.device) else 4
    activations = activation_bytes(gpt, micro, config.parallel.activation_checkpointing, width)
    for name, value in flatten(to_dict(config)).items():
        print(f"  {name:26} {value}")
    print(f"parameters                   {parameters:,}")
    print(f"micro-batch x accumulation   {micro} x {accumulation} on {processes.world_size} processes")
    print(f"estimated memory per device  {(states + activations) / 2**30:.1f} GiB "
          f"({states / 2**30:.1f} weights and optimizer, {activations / 2**30:.1f} activations)")
