"""Draw images of chosen classes into one labelled PNG grid (LlamaGen's entry point)."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.sample.model_options import SHOWN, ModelOptions, carried_grid_options
from autoregressive.sample.pipeline import Pipeline, check_classes
from utils.config import Count, Positive, UserError, parse, run_main
from utils.distributed import setup
from utils.files import check_writable
from utils.logs import followed, set_up_logging
from utils.pictures import image_grid, save_picture

log = logging.getLogger("sample_c2i")


@dataclass
class GridConfig:
    """Options of a sample grid."""

    models: ModelOptions
    sampling: SamplingOptions
    fine: FineOptions
    classes: tuple[Count, ...] = SHOWN
    """Class ids, a row each; left out: LlamaGen's eight of ImageNet where the GPT knows 1,000 classes, else the first eight."""
    per_class: Positive = 8
    """Images of each class."""
    batch_size: Positive = 64
    """Images drawn at once."""
    class_names: tuple[str, ...] = ()
    """Captions of the rows; empty: the names that the GPT carries, else the class ids."""
    out: Path = Path("samples/grid.png")
    """PNG to write."""


def main() -> None:
    """Parse options, draw, write the picture."""
    config = parse(GridConfig, carried_grid_options)
    processes = setup(config.models.device)
    set_up_logging(processes)
    check_writable(config.out.parent, "--out")
    if config.out.suffix.lower() != ".png":
        raise UserError(f"--out {config.out} must end in .png.")
    pipeline = Pipeline(config.models, config.sampling, config.fine, processes.device)
    names = check_classes(config.classes, config.class_names, pipeline)
    labels = np.repeat(np.array(config.classes), config.per_class)
    images = [pipeline.sample(labels[first : first + config.batch_size],
                              np.arange(first, min(first + config.batch_size, len(labels))))
              for first in followed(range(0, len(labels), config.batch_size), "sample", "batches", processes)]
    grid = image_grid(np.concatenate(images), config.per_class, rows=names, scale=max(1, 64 // pipeline.image_size))
    save_picture(grid, config.out)
    log.info("wrote %s", config.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
