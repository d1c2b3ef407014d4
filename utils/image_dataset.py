"""Images for a DataLoader: augmented for training, or cropped once in the order of their rows.

An image that cannot be read does not end a run: it is logged by name and counted.  An augmentation depends on (seed, epoch,
index) alone, so a resumed run, or one with another number of workers or processes, sees the same pixels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.batches import GlobalBatches
from utils.config import Count, Positive, UserError
from utils.crops import center_crop, random_crop, sample_rng, to_tensor
from utils.devices import loader_processes
from utils.image_source import ImageSource, UnreadableImage
from utils.signals import ignore_in_worker

log = logging.getLogger("images")

_MAX_UNREADABLE = 100  # in a row: more than this is a fault of the folder, not of an image


@dataclass
class ImageOptions:
    """Where images come from and how they are cut."""

    data_path: Path
    """Folder with one sub-folder per class, npz with `images` and `labels`, WebDataset tar shards, or parquet or Arrow tables
    (and behind :: their split or column of labels, DATA::train,label=NAME; all of it: utils/README.md).  Images are taken as they
    are stored: EXIF rotation is not applied and transparency is dropped, as ADM and LlamaGen do."""
    image_size: Positive = 256
    """Side of the square images in pixels."""
    num_workers: Count = 8
    """Processes that load images, for each process of torchrun, at most one a CPU; 0: none."""


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Cropped images with labels, for a DataLoader whose sampler yields (epoch, index), or index alone for epoch 0.

    source: the images; size: pixels; random_crop: a random crop instead of the centre crop; random_flip: mirror half of the
    images.  An unreadable image is logged, counted and replaced by the next readable one, which says its own index; left_out:
    whether the caller leaves such replacements out again, for what is logged.
    """

    def __init__(self, source: ImageSource, size: int, seed: int = 0, random_crop: bool = False,
                 random_flip: bool = False, left_out: bool = False) -> None:
        self.source, self.size, self.seed, self.left_out = source, size, seed, left_out
        self.random_crop, self.random_flip = random_crop, random_flip
        # One byte per image in shared memory: workers agree on which images were counted without a lock.
        self._unreadable = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # [N]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int] | int) -> tuple[Tensor, int, int]:
        """Image float32 [3, size, size] in [-1, 1], its label, its index (another than asked for if replaced).

        Raises UserError if 100 images in a row are unreadable.
        """
        epoch, index = item if isinstance(item, (tuple, list)) else (0, item)
        image, found = self._load(int(index))
        # The index asked for decides the crop: a replacement is cropped differently than in its own place.
        return to_tensor(self._crop(image, int(epoch), int(index))), int(self.source.labels[found]), found

    @property
    def skipped(self) -> int:
        """Number of different images that this process and its workers found unreadable."""
        return int(self._unreadable.sum())

    def report_skipped(self) -> None:
        """Log how many images were unreadable; nothing if all could be read."""
        if skipped := self.skipped:
            log.warning("%s %s: %d of %d images were unreadable and %s", self.source.option, self.source.path, skipped,
                        len(self), "left out" if self.left_out else "replaced by others")

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        """The first readable image at or after `index`, and where it was found."""
        tries = min(_MAX_UNREADABLE, len(self))
        for found in ((index + offset) % len(self) for offset in range(tries)):
            try:
                return self.source.load(found), found
            except UnreadableImage as error:
                if not self._unreadable[found]:
                    self._unreadable[found] = 1
                    log.warning("unreadable image %s: %s", "left out" if self.left_out else "replaced by the next", error)
        raise UserError(f"{self.source.option} {self.source.path} has {tries} unreadable images in a row, the last "
                        f"{self.source.name(found)}: check that its images are whole and can be read.")

    def _crop(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]"""
        rng = sample_rng(self.seed, epoch, index)
        flip = rng.random() < 0.5  # drawn first and always: switching the crop off leaves the flips as they were
        image = random_crop(image, self.size, rng) if self.random_crop else center_crop(image, self.size)
        return image[:, ::-1] if flip and self.random_flip else image


class CropDataset(Dataset[tuple[int, Tensor | None]]):
    """Rows of a source with their crops: (row, uint8 tensor), or (row, None) for an image that cannot be read.

    rows: int [n]; crop: a function of an image, uint8 [H, W, 3], to one or several crops in one array.
    """

    def __init__(self, source: ImageSource, rows: np.ndarray, crop: Callable[[np.ndarray], np.ndarray]) -> None:
        self.source, self.rows, self.crop = source, rows, crop

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[int, Tensor | None]:
        row = int(self.rows[item])
        try:
            image = self.source.load(row)
        except UnreadableImage as error:
            log.warning("unreadable image left out: %s", error)
            return row, None
        return row, torch.from_numpy(np.ascontiguousarray(self.crop(image)))


def collate_crops(items: list[tuple[int, Tensor | None]]) -> tuple[np.ndarray, Tensor | None, np.ndarray]:
    """Items of a CropDataset -> (readable rows [n], their crops [n, ...] or None if n is 0, unreadable rows)."""
    rows = [row for row, crops in items if crops is not None]
    stacked = torch.stack([crops for _, crops in items if crops is not None]) if rows else None
    return np.array(rows, np.int64), stacked, np.array([row for row, crops in items if crops is None], np.int64)


def crop_loader(source: ImageSource, rows: np.ndarray, crop: Callable[[np.ndarray], np.ndarray], batch_size: int,
                num_workers: int) -> DataLoader:
    """Batches over the given rows, in order: (readable rows [n], their crops uint8 [n, ...] or None, unreadable rows)."""
    workers = min(loader_processes(num_workers), -(-len(rows) // batch_size))
    return DataLoader(CropDataset(source, rows, crop), batch_size, num_workers=workers, collate_fn=collate_crops,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_in_worker)


def train_loader(dataset: Dataset, batches: GlobalBatches, num_workers: int) -> DataLoader:
    """Micro-batches of this process in training order."""
    workers = loader_processes(num_workers)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      persistent_workers=workers > 0, worker_init_fn=ignore_in_worker)


def share_loader(dataset: Dataset, rows: np.ndarray, batch_size: int, num_workers: int) -> DataLoader:
    """Batches over the given rows, in order, for work that visits every image once."""
    batches = [[(0, int(row)) for row in rows[first : first + batch_size]] for first in range(0, len(rows), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=loader_processes(num_workers),
                      pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_in_worker)
