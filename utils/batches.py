"""Which example goes to which process in which step: a function of (seed, step) alone.

The order of a run does not depend on the number of processes, and a resumed run continues it at any step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.config import UserError


class GlobalBatches(Sampler):
    """Batch sampler: yields this process's micro-batches of every step from `first_step` on, as (epoch, index) pairs.

    size: number of examples; the last incomplete batch of an epoch is dropped.  Raises UserError when there are fewer
    examples than a global batch holds.
    """

    def __init__(self, size: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int,
                 seed: int, first_step: int, total_steps: int) -> None:
        if size < global_batch_size:
            raise UserError(f"--global-batch-size {global_batch_size} is larger than the {size} training images: "
                            f"choose at most {size}.")
        self.size, self.global_batch, self.micro_batch = size, global_batch_size, micro_batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.first_step, self.total_steps = first_step, total_steps

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        return self.size // self.global_batch

    def __len__(self) -> int:
        per_step = self.global_batch // self.world_size // self.micro_batch
        return (self.total_steps - self.first_step) * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in range(self.first_step, self.total_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.size, generator=generator)
            start = step % self.steps_per_epoch * self.global_batch
            share = order[start + self.rank : start + self.global_batch : self.world_size].tolist()
            for first in range(0, len(share), self.micro_batch):
                yield [(epoch, index) for index in share[first : first + self.micro_batch]]


@dataclass
class ImageOptions:
    """Where images come from and how they are cut."""

    data_path: Path
    """Folder with one sub-folder a class, or npz with `images` and `labels`."""
    image_size: int = 256
    """Side of the square images in pixels."""
    num_workers: int = 8
    """Loader processes for each training process."""


def train_loader(dataset: Dataset, batches: GlobalBatches, num_workers: int) -> DataLoader:
    """Micro-batches of this process in training order."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=num_workers > 0)


def share_loader(dataset: Dataset, rows: np.ndarray, batch_size: int, num_workers: int) -> DataLoader:
    """Batches over the given rows, in order, for work that visits every image once."""
    batches = [[(0, int(row)) for row in rows[first : first + batch_size]] for first in range(0, len(rows), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=torch.cuda.is_available())
