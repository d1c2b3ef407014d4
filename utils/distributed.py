"""Processes and devices: one process group for one CPU process, one GPU, or many, and how a model is spread over them.

Parallelism stays outside the models.  `setup` reads torchrun's environment; without it a group of one process is made,
so that every script runs the same code everywhere.  `parallelize` wraps a GPT for DDP, FSDP2 or HSDP.

The tokenizer's trainer averages gradients itself (`average_gradients`).  An interleaved step runs the network twice before
one backward pass and leaves some parameters without gradient; DDP would search the whole graph for them at every step.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from utils.config import UserError
from utils.signals import handled_by

REDUCED_PRODUCTS = True  # of float32 matrices on GPUs, in TF32: what is not bf16 anyway needs no more
_COLLECTIVE = timedelta(minutes=10)  # a collective of training that takes longer waits for a process that is no more
_PATIENCE = timedelta(hours=24)
_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "Timed out waiting", "NCCL")


@dataclass(frozen=True)
class Processes:
    """This process among its group: rank, group size, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes logs and shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here, for as long as one works alone (an evaluation, a merge of files)."""
        if self.world_size > 1:
            dist.barrier(group=patient_group("barrier"))

    def close(self) -> None:
        """Leave the process group, all processes together."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


@lru_cache
def patient_group(purpose: str) -> dist.ProcessGroup:
    """A group of all processes for one purpose, whose waiting may take long; a peer that dies ends it at once all the same.

    Checkpoints, which are written while training goes on, must not share a group with anything else.
    """
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # every process is a member
    return group


def choose_device(name: str) -> torch.device:
    """auto (CUDA where there is any), cuda or cpu -> device; raises UserError if CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for but this machine shows no CUDA device: use --device cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def setup(device: str = "auto") -> Processes:
    """Join the process group of torchrun, or make one of a single process; device and errors: as in `choose_device`."""
    cuda = choose_device(device).type == "cuda"
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    target = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(target)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = REDUCED_PRODUCTS
    if not dist.is_initialized():
        alone: dict[str, Any] = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        with handled_by(signal.SIG_DFL):  # waiting for the others is in C++, where no handler of Python's would run
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_COLLECTIVE, **alone)
            for purpose in ("barrier", "checkpoint") if world_size > 1 else ():  # all processes make them together, now
                patient_group(purpose)
    return Processes(rank, world_size, local_rank, target)


def nodes() -> int:
    """Nodes that torchrun has started processes on; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def shard_group(shard_size: int) -> int:
    """Processes that share one copy under hsdp: `shard_size`, or for 0 those of this node."""
    return shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def parallelize(model: nn.Module, blocks: list[nn.Module], mode: str, processes: Processes,
                bf16: bool, shard_size: int = 0) -> nn.Module:
    """Wrap `model` for data-parallel training.

    blocks: the repeated layers, each sharded as a unit; mode: "none" (one process), "ddp", "fsdp" (shards over all
    processes) or "hsdp" (shards inside groups of `shard_size`, replicates between them; 0: a node's processes).
    Returns the module to call.  Raises UserError when the mode does not fit the number of processes.
    """
    world_size = processes.world_size
    if mode == "none":
        if world_size > 1:
            raise UserError(f"--data-parallel none with {world_size} processes would train {world_size} different "
                            "models: use ddp, fsdp or hsdp, or start one process.")
        return model
    if mode == "ddp":
        # Buffers are constants that all processes built alike; gradients live in the buckets that are exchanged.
        return DistributedDataParallel(model, device_ids=[processes.device] if processes.device.type == "cuda" else None,
                                       broadcast_buffers=False, gradient_as_bucket_view=True)
    if mode == "fsdp":
        mesh = init_device_mesh(processes.device.type, (world_size,), mesh_dim_names=("shard",))
    else:
        shard_size = shard_group(shard_size)
        if world_size % shard_size:
            raise UserError(f"--shard-size {shard_size} does not divide the {world_size} processes: choose a divisor.")
        mesh = init_device_mesh(processes.device.type, (world_size // shard_size, shard_size),
                                mesh_dim_names=("replicate", "shard"))
    types: dict[str, Any] = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
    for block in blocks:  # inputs are not cast: the rotary table stays float32
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**types, cast_forward_inputs=False))
    # Logits leave in float32: the loss is not computed in bf16.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**types, output_dtype=torch.float32))
    return model


def synchronize_gradients(model: nn.Module, last: bool) -> None:
    """Exchange gradients only after the last micro-batch of a step (gradient accumulation)."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def reshard(model: nn.Module) -> None:
    """Free gathered copies of sharded parameters, which would outlive a change of the parameters themselves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def average_gradients(parameters: Sequence[Tensor], processes: Processes) -> None:
    """Average the gradients of `parameters` over all processes, in one exchange; parameters without one are skipped."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if processes.world_size == 1 or not gradients:
        return
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat.div_(processes.world_size)
    for gradient, averaged in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(averaged)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone, or silent for too long."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(sign in text for sign in _LOST)


def agree(values: list[int], processes: Processes) -> list[int]:
    """The largest of each value over all processes, without waiting for the accelerator."""
    together = torch.tensor(values)
    if processes.world_size > 1:
        dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.tolist()


def all_reduce_sum(value: Tensor, processes: Processes) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if processes.world_size > 1:
        dist.all_reduce(value)
    return value


def broadcast(value: Tensor, processes: Processes) -> Tensor:
    """Give every process the main process's tensor, in place."""
    if processes.world_size > 1:
        dist.broadcast(value, src=0)
    return value


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered; a plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
