"""Data order: which example goes to which process in which step, a function of (seed, step) alone.

The order does not depend on the number of processes, and a resumed run continues it at any step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from utils.config import AboveZero, Count, Positive, UserError, require_multiple


@dataclass
class BatchOptions:
    """How long to train, and on how many images at once."""

    epochs: AboveZero
    """Passes over the data, unless --steps is given."""
    global_batch_size: Positive
    """Images per step, over all processes and micro-batches."""
    steps: Count = 0
    """Optimizer steps; 0: from --epochs."""
    micro_batch_size: Count = 0
    """Images a process takes at once; 0: its whole share, or for a GPT on a GPU the largest part of it that fits the memory."""


@dataclass(frozen=True)
class StepPlan:
    """How a training is divided into steps, and a step into micro-batches."""

    global_batch: int      # images of a step
    micro_batch: int       # images a process takes at once
    accumulation: int      # micro-batches of a process and step
    steps_per_epoch: int   # the last incomplete batch of an epoch is dropped
    total_steps: int


def split_batch(options: BatchOptions, world_size: int) -> tuple[int, int]:
    """(Micro-batch size of one process, accumulation steps); raises UserError when the numbers do not divide."""
    require_multiple("--global-batch-size", options.global_batch_size, world_size, "the number of processes")
    share = options.global_batch_size // world_size
    micro = options.micro_batch_size or share
    if share % micro:
        raise UserError(f"--micro-batch-size {micro} does not divide the {share} images a process takes of "
                        f"--global-batch-size {options.global_batch_size}: choose a divisor of {share}.")
    return micro, share // micro


def plan_steps(options: BatchOptions, size: int, world_size: int) -> StepPlan:
    """Steps over `size` examples; raises UserError when a global batch needs more, or cannot be divided."""
    micro, accumulation = split_batch(options, world_size)
    if size < options.global_batch_size:
        raise UserError(f"--global-batch-size {options.global_batch_size} is larger than the {size} training images: "
                        f"choose at most {size}.")
    steps_per_epoch = size // options.global_batch_size
    return StepPlan(options.global_batch_size, micro, accumulation, steps_per_epoch,
                    options.steps or int(options.epochs * steps_per_epoch))


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler: yields this process's micro-batches of every step from `first_step` on, as (epoch, index) pairs."""

    def __init__(self, size: int, plan: StepPlan, rank: int, seed: int, first_step: int = 0) -> None:
        """size: number of examples."""
        self.size, self.plan, self.rank, self.seed, self.first_step = size, plan, rank, seed, first_step

    def __len__(self) -> int:
        return (self.plan.total_steps - self.first_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, epoch, order = self.plan, -1, torch.empty(0)
        world_size = plan.global_batch // (plan.micro_batch * plan.accumulation)
        for step in range(self.first_step, plan.total_steps):
            if step // plan.steps_per_epoch != epoch:
                epoch = step // plan.steps_per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.size, generator=generator)
            start = step % plan.steps_per_epoch * plan.global_batch
            share = order[start + self.rank : start + plan.global_batch : world_size].tolist()
            for first in range(0, len(share), plan.micro_batch):
                yield [(epoch, index) for index in share[first : first + plan.micro_batch]]
