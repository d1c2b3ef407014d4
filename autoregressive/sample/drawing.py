"""Many samples into one npz, whatever they are asked for by: what the samplers of classes and of captions share.

Sample i has a condition and randomness of its own, whatever the batch size and the number of processes.  Finished batches are on
disk at once: after a crash the same command draws only what is missing.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.models.conditions import Given
from autoregressive.sample.image_decoder import Images
from autoregressive.sample.pipeline import Pipeline
from utils.beside import Beside
from utils.config import to_dict
from utils.distributed import Processes, all_reduce_sum
from utils.files import write_json
from utils.image_store import ImageStore
from utils.logs import progress

# What samples [B] are asked for by: class ids [B], or captions.
Conditions = Callable[[np.ndarray], np.ndarray | Given]


def identity(pipeline: Pipeline, **own: Any) -> dict[str, Any]:
    """What samples depend on: a partial file with another identity is not continued; own: of the command, as JSON holds it."""
    fine = to_dict(pipeline.fine_options) if pipeline.fine is not None else {}
    return {"kind": "samples", **pipeline.identity(), **own, **to_dict(pipeline.sampling), **fine}


def draw_npz(pipeline: Pipeline, path: Path, given: Conditions, about: dict[str, Any], batch_size: int, processes: Processes,
             **members: np.ndarray) -> None:
    """Draw images into the npz `path`: `arr_0` uint8 [N, S, S, 3], `members` of N rows each, `kind` and `options`.

    about: the identity, with `kind`; batch_size: samples that a process draws at once.  All processes call this together.
    """
    count = len(next(iter(members.values())))
    store = ImageStore(path, (count, pipeline.image_size, pipeline.image_size, 3), about, processes)
    started, missing, rows = time.perf_counter(), len(store.missing()), store.share()
    bar = progress(len(rows), "sample", "images", processes)
    written: list[float] = []  # when each batch was

    def keep(batch: np.ndarray, images: Images) -> None:
        store.write(batch, images()[: len(batch)])
        bar.update(len(batch))
        written.append(time.perf_counter())

    with Beside() as writer:
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            # Every batch has the same shape: another one would select other matrix kernels and change the last bits.
            padded = np.pad(batch, (0, batch_size - len(batch)), mode="edge")
            writer.run(keep, batch, pipeline.start(given(padded), padded))
    bar.close()
    store.finish(pipeline.class_names, **members, kind=np.array(about["kind"]), options=np.array(json.dumps(about)))
    rate = {"images": missing, "images_per_second": missing / (time.perf_counter() - started)}
    rate |= warm_rate(written, batch_size, processes)
    if processes.is_main:
        write_json(path.with_suffix(".rate.json"), rate)


def warm_rate(written: list[float], batch_size: int, processes: Processes) -> dict[str, float]:
    """Images a second that all processes draw after their first batch, in which kernels are compiled and captured.

    written: when each batch of this process was; a last one of fewer images takes as long as a whole one.  Empty where a process
    had a single batch.
    """
    enough = len(written) > 1
    own = (len(written) - 1) * batch_size / (written[-1] - written[0]) if enough else 0.0
    rate, count = all_reduce_sum(torch.tensor([own, float(enough)]), processes).tolist()
    return {"warm_images_per_second": rate} if count == processes.world_size else {}
