"""Make a reference npz from validation images, for rFID and the other metrics of evaluations/c2i/evaluator.py.

The images are centre-cropped as ADM does and written as `arr_0` (uint8 [N, H, W, 3]) with their labels as `arr_1` and
`kind` = "validation".  Runs as one process or under torchrun.  Each image is written as soon as it is done, and the
same command carries on after a crash.  Unlike LlamaGen's script it keeps the labels, gathers nothing in memory and
makes no folder of PNG files; unreadable images are named and left out instead of ending the run.
"""

import logging
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.config import UserError, parse, run_main
from utils.crops import center_crop
from utils.distributed import setup
from utils.images import ImageSource, UnreadableImage, open_images
from utils.npz import ImageStore, already_finished

log = logging.getLogger("val")

_BATCH_SIZE = 64  # images a worker hands over at once


@dataclass(frozen=True)
class ValidationConfig:
    """Options of val_ddp.py."""

    data_path: str
    """Folder with one sub-folder of images per class, or an npz with images and labels."""
    out: Path
    """The reference npz to make."""
    image_size: int = 256
    """Width and height in pixels after the centre crop."""
    limit: int = 0
    """Use this many images, spread evenly over the classes; 0: all."""
    num_workers: int = 8
    """Processes that load images, for each process of torchrun; 0: none."""


class _CroppedRows(Dataset):
    """Rows of a source with their centre crops, None for an unreadable image."""

    def __init__(self, source: ImageSource, rows: np.ndarray, size: int) -> None:
        self.source, self.rows, self.size = source, rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[int, np.ndarray | None]:
        row = int(self.rows[item])
        try:
            return row, center_crop(self.source.load(row), self.size)
        except UnreadableImage as error:
            log.warning("unreadable image left out: %s", error)
            return row, None


def _collate(batch: list[tuple[int, np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Rows [n] and images uint8 [n, H, W, 3] (None if n is 0) of readable images, rows of the others."""
    good = [(row, image) for row, image in batch if image is not None]
    images = np.stack([image for _, image in good]) if good else None
    bad = np.array([row for row, image in batch if image is None], np.int64)
    return np.array([row for row, _ in good], np.int64), images, bad


def check(options: ValidationConfig) -> None:
    """Raise UserError for a number out of range or a name that is no npz."""
    if options.image_size < 1:
        raise UserError(f"--image-size {options.image_size} is not a size in pixels: give a positive number.")
    if options.limit < 0:
        raise UserError(f"--limit {options.limit} is negative: give a number of images, or 0 for all.")
    if options.num_workers < 0:
        raise UserError(f"--num-workers {options.num_workers} is negative: give a number of processes, or 0 for none.")
    if options.out.suffix != ".npz":
        raise UserError(f"--out {str(options.out)!r} is not the name of an npz: give one that ends in .npz.")


def write_rows(source: ImageSource, store: ImageStore, rows: np.ndarray, options: ValidationConfig,
               progress: bool) -> None:
    """Crop the images of `rows` (int [n]) and write them to the store; unreadable ones are marked as skipped there."""
    loader = DataLoader(_CroppedRows(source, rows, options.image_size), batch_size=_BATCH_SIZE,
                        num_workers=min(options.num_workers, -(-len(rows) // _BATCH_SIZE)), collate_fn=_collate)
    with tqdm(total=len(rows), unit="image", disable=not progress) as bar:
        for good, images, bad in loader:
            if images is not None:
                store.write(good, images)
            store.mark_skipped(bad)
            bar.update(len(good) + len(bad))


def main() -> None:
    """Make the reference npz."""
    options = parse(ValidationConfig)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check(options)
    processes = setup("cpu")
    source = open_images(options.data_path)
    if options.limit:
        source = source.subset(options.limit)
    labels = source.labels
    shape = (len(source), options.image_size, options.image_size, 3)
    identity = {"kind": "validation", "data_path": options.data_path, "image_size": options.image_size,
                "limit": options.limit, "labels_crc32": zlib.crc32(labels.tobytes())}
    if already_finished(options.out, shape, identity):
        if processes.is_main:
            print(f"{options.out} is there already, made by these options")
        processes.close()
        return
    store = ImageStore(options.out, shape, identity)
    # Shares are fixed by rank, not cut from what is missing: processes would see different rows missing.
    low, high = (len(source) * part // processes.world_size for part in (processes.rank, processes.rank + 1))
    missing = store.missing()
    write_rows(source, store, missing[(missing >= low) & (missing < high)], options, progress=processes.is_main)
    if not processes.is_main:
        store.close()  # before the main process removes the files
    processes.barrier()
    if processes.is_main:
        skipped = len(store.skipped())
        count = store.finish(arr_1=labels, kind=np.array("validation"))
        left_out = f", {skipped} unreadable left out" if skipped else ""
        print(f"{options.out}: {count} images of {source.num_classes} classes, "
              f"{options.image_size}x{options.image_size}{left_out}")
    processes.close()


if __name__ == "__main__":
    run_main(main)
