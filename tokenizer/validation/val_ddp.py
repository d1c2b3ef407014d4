"""Make a reference npz from validation images, for rFID and the other metrics of evaluations/c2i/evaluator.py.

The images are centre-cropped as ADM does and written as `arr_0` (uint8 [N, H, W, 3]) with their labels as `arr_1` and
`kind` = "validation".  Runs as one process or under torchrun.  Each image is written as soon as it is done, and the
same command carries on after a crash.  Unlike LlamaGen's script it keeps the labels, gathers nothing in memory and
makes no folder of PNG files; unreadable images are named and left out instead of ending the run.
"""

import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np

from utils.config import Count, parse, run_main
from utils.crops import center_crop
from utils.distributed import Processes, setup
from utils.image_dataset import ImageOptions, crop_loader
from utils.image_store import ImageStore, already_finished
from utils.images import ImageSource, open_images
from utils.logs import progress, set_up_logging

_BATCH_SIZE = 64  # images a worker hands over at once


@dataclass
class ValidationConfig:
    """Options of val_ddp.py."""

    images: ImageOptions
    out: Path
    """The reference npz to make."""
    limit: Count = 0
    """Use this many images, spread evenly over the classes; 0: all."""


def write_rows(source: ImageSource, store: ImageStore, rows: np.ndarray, options: ImageOptions, processes: Processes) -> None:
    """Crop the images of `rows` (int [n]) and write them to the store; unreadable ones are marked as skipped there."""
    crop = partial(center_crop, size=options.image_size)
    with progress(len(rows), "crop", "images", processes) as bar:
        for good, images, bad in crop_loader(source, rows, crop, _BATCH_SIZE, options.num_workers):
            if images is not None:
                store.write(good, images.numpy())
            store.mark_skipped(bad)
            bar.update(len(good) + len(bad))


def make_reference(config: ValidationConfig, processes: Processes, option: str = "--out") -> str:
    """Make the reference npz, unless these options have made it already; returns what to say of it in the main process.

    option: what named the npz.  Raises UserError where another one is in its place.
    """
    source, size = open_images(config.images.data_path), config.images.image_size
    if config.limit:
        source = source.subset(config.limit)
    shape = (len(source), size, size, 3)
    identity = {"kind": "validation", "data_path": config.images.data_path, "image_size": size, "limit": config.limit,
                "images_checksum": source.checksum, "class_names_crc32": zlib.crc32("\0".join(source.class_names).encode())}
    if already_finished(config.out, shape, identity, option):
        return f"{config.out} is there already, made by these options"
    store = ImageStore(config.out, shape, identity, processes)
    write_rows(source, store, store.share(), config.images, processes)
    count = store.finish(source.class_names, arr_1=source.labels, kind=np.array("validation"))
    left_out = f", {len(source) - count} unreadable left out" if count < len(source) else ""
    return f"{config.out}: {count} images of {source.num_classes} classes, {size}x{size}{left_out}"


def main() -> None:
    """Parse options, make the reference npz."""
    config = parse(ValidationConfig)
    processes = setup("cpu")
    set_up_logging(processes)
    said = make_reference(config, processes)
    if processes.is_main:
        print(said)
    processes.close()


if __name__ == "__main__":
    run_main(main)
