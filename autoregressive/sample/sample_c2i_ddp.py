"""Draw many samples into one npz for evaluation, on any number of processes (LlamaGen's entry point).

Sample i has label and randomness of its own, whatever the batch size and the number of processes.  Finished batches
are on disk at once: after a crash the same command draws only what is missing.  The npz holds `arr_0` uint8 NHWC,
`arr_1` labels and `kind`; it is written without ever holding all images in memory.  With --rejection-ratio the samples
are those of many candidates that a classifier likes best (`rejection.py`).
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.sample.drawing import draw_npz, identity
from autoregressive.sample.model_options import ModelOptions, carried_options
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.rejection import (
    RejectionOptions,
    Selector,
    candidates_path,
    check_rejection,
    keep_best,
    load_selector,
)
from utils.config import Count, Positive, parse, run_main
from utils.distributed import Processes, setup
from utils.image_store import already_finished, check_begun
from utils.logs import set_up_logging
from utils.npz import open_array
from utils.pictures import captioned_grid, save_picture

log = logging.getLogger("sample_c2i_ddp")

_SHOWN, _TILES = 100, 24  # most samples, and most classes, of the picture beside the npz


@dataclass
class SampleConfig:
    """Options of sampling to an npz."""

    models: ModelOptions
    sampling: SamplingOptions
    fine: FineOptions
    rejection: RejectionOptions
    out: Path = Path("samples/samples.npz")
    """npz to write."""
    per_class: Positive = 50
    """Samples of each class."""
    num_samples: Count = 0
    """Samples in all, classes in turn; 0: --per-class of every class."""
    random_labels: bool = False
    """Draw labels at random instead of evenly; ADM's protocol is even."""
    batch_size: Positive = 64
    """Samples a process draws at once."""


def make_labels(config: SampleConfig, num_classes: int) -> np.ndarray:
    """Class ids of all samples [M]: in turn, or drawn from (seed, sample) where --random-labels asks."""
    count = config.num_samples or config.per_class * num_classes
    if config.random_labels:
        # A key that no sample index reaches: labels do not disturb the draws of codes.
        key = np.array([config.sampling.seed, 2**63], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).integers(num_classes, size=count)
    return np.arange(count) % num_classes


def about_samples(config: SampleConfig, pipeline: Pipeline) -> dict[str, Any]:
    """The identity of the samples."""
    return identity(pipeline, random_labels=config.random_labels)


def draw(pipeline: Pipeline, path: Path, labels: np.ndarray, about: dict[str, Any], config: SampleConfig,
         processes: Processes) -> None:
    """Draw an image of each label into the npz `path`; about: its identity, with `kind`."""
    draw_npz(pipeline, path, lambda rows: labels[rows], about, config.batch_size, processes, arr_1=labels)


def draw_and_select(pipeline: Pipeline, selector: Selector, labels: np.ndarray, about: dict[str, Any], config: SampleConfig,
                    processes: Processes) -> None:
    """Draw candidates, or take those that are there, and write the best of them; about: identity of the result."""
    ratio, out, size = config.rejection.rejection_ratio, config.out, pipeline.image_size
    check_begun(out, (len(labels), size, size, 3), about)  # by another command: refused now rather than after the drawing
    candidates, count = candidates_path(out), ratio * len(labels)
    drawn = about_samples(config, pipeline) | {"kind": "candidates", "rejection_ratio": ratio}
    if not already_finished(candidates, (count, size, size, 3), drawn):
        draw(pipeline, candidates, np.tile(labels, ratio), drawn, config, processes)
    log.info("%s: %d candidates; move %s away to select by another --classifier without drawing again",
             candidates, count, out.name)
    keep_best(selector, candidates, out, labels, about, config.rejection.classifier_batch_size, processes, pipeline.class_names)


def overview(images: np.ndarray, labels: np.ndarray, pipeline: Pipeline) -> Any:
    """A picture of samples of some classes, spread over all, as many of each and the class's name under them.

    images: uint8 [N, S, S, 3]; labels: [N].
    """
    classes, counts = np.unique(labels, return_counts=True)
    own = min(10, int(counts.min()))
    shown = classes[np.linspace(0, len(classes) - 1, min(len(classes), _TILES, _SHOWN // own)).astype(int)]
    rows = np.concatenate([np.flatnonzero(labels == each)[:own] for each in shown])
    names = [pipeline.class_names[each] if pipeline.class_names else f"class {each}" for each in shown]
    return captioned_grid(images[rows], names, max(1, 64 // pipeline.image_size))


def write_samples(config: SampleConfig, pipeline: Pipeline, selector: Selector | None, processes: Processes) -> None:
    """Draw all samples and write the npz; a finished one is left as it is."""
    labels, ratio = make_labels(config, pipeline.num_classes), config.rejection.rejection_ratio
    shape = len(labels), pipeline.image_size, pipeline.image_size, 3
    about = about_samples(config, pipeline) | ({"rejection": selector.note(ratio)} if selector else {})
    picture = config.out.with_suffix(".png")
    if already_finished(config.out, shape, about):
        log.info("%s is there already, made by these options", config.out)
        if picture.exists():  # the disk may have been full when the npz was whole
            return
    elif selector is None:
        draw(pipeline, config.out, labels, about, config, processes)
    else:
        draw_and_select(pipeline, selector, labels, about, config, processes)
    if processes.is_main:
        save_picture(overview(open_array(config.out, "arr_0"), labels, pipeline), picture)
        log.info("%s: %d samples of %d classes, %dx%d", config.out, len(labels), pipeline.num_classes, *shape[1:3])


def main() -> None:
    """Parse options, load the models, draw all samples and write the npz."""
    config = parse(SampleConfig, carried_options)
    processes = setup(config.models.device)
    set_up_logging(processes)
    check_rejection(config.rejection)
    pipeline = Pipeline(config.models, config.sampling, config.fine, processes.device)
    selector = None
    if config.rejection.rejection_ratio > 1:
        selector = load_selector(config.rejection, pipeline.num_classes, pipeline.class_names)
    write_samples(config, pipeline, selector, processes)
    processes.barrier()
    processes.close()


if __name__ == "__main__":
    run_main(main)
