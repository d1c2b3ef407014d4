"""Samples of a GPT while it trains (--sample-every): a labelled grid in TensorBoard, and samples.png in the run's folder.

They are drawn by a copy of the GPT, which the main process fills with the averaged weights; all processes take part in gathering
those of a sharded model.  Nothing of the training changes: neither its layers, which may be compiled or sharded, nor its random
numbers, which come from (seed, step).  The draws are those of (seed, image): the pictures of a run differ by its weights alone.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from autoregressive.models.conditions import Given, each
from autoregressive.models.generate import SamplingOptions, carried_fields, draw_uniforms, generate
from autoregressive.models.gpt import GPT, GPTProvenance
from autoregressive.models.transformer import GPTConfig
from autoregressive.sample.image_decoder import ImageDecoder
from autoregressive.sample.model_options import shown_classes
from autoregressive.sample.pipeline import COARSE, load_in, require_tokenizer
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils.config import Count, UserError
from utils.distributed import Processes, full_tensor
from utils.pictures import image_grid
from utils.run import Run
from utils.train_state import TrainState

_ROWS, _EACH = 8, 4  # captions of the picture, and samples of each class or caption


@dataclass
class PreviewOptions:
    """Pictures of samples while a GPT trains."""

    sample_every: Count = 0
    """Steps between pictures of samples, of at most eight classes or captions of the data, and one at the end; 0: none."""
    vq_ckpt: str = ""
    """The tokenizer that made the codes, which decodes these samples."""


class Asked(NamedTuple):
    """What a picture shows: a name for each row, the condition of every sample, and codes [rows, C, N] to show before them."""

    rows: list[str]
    given: Given
    codes: Tensor | None


class Preview:
    """Draws the picture again and again; made before the training starts, by all processes together."""

    def __init__(self, options: PreviewOptions, model: GPTConfig, about: GPTProvenance, dataset: Any, seed: int,
                 processes: Processes) -> None:
        """about: names of classes, sampling options; dataset: of `sources.py`.  Raises UserError where --vq-ckpt cannot decode
        the codes."""
        self.processes, self.asked = processes, asked(model, about, dataset)
        tokenizer = load_tokenizer(options.vq_ckpt)
        require_tokenizer(tokenizer, options.vq_ckpt, about.tokenizer, model, "this run")
        self.sampling = SamplingOptions(**carried_fields(about.sampling))
        count = len(self.asked.rows) * _EACH
        self.uniforms = draw_uniforms(seed, np.arange(count), len(model.codebook_sizes), model.cells)
        self.gpt: GPT | None = None
        if processes.is_main:
            self.gpt = load_in("auto", GPT(model), processes.device)
            dtype = next(self.gpt.parameters()).dtype if processes.device.type == "cuda" else torch.float32
            self.decoder = ImageDecoder(tokenizer.to(processes.device), model.grid_size, 0, dtype)

    def draw(self, training: TrainState, run: Run, step: int) -> None:
        """Draw the picture with the weights after `step`, averaged where averaging is on; all processes call this together."""
        with run.timed("evaluation"):
            self._take(training)
            if self.gpt is not None:
                run.picture(step + 1, "samples", self._picture(self.gpt))
            self.processes.barrier()  # a collective of the next step would not wait for a long drawing

    @torch.no_grad()
    def _take(self, training: TrainState) -> None:
        """Copy the weights, gathered where they are sharded."""
        own = self.gpt.state_dict() if self.gpt is not None else {}
        with training.averaged():
            weights: dict[str, Any] = get_model_state_dict(training.model)
            for name, tensor in weights.items():
                whole = full_tensor(tensor.detach())
                if own:
                    own[name].copy_(whole)

    def _picture(self, gpt: GPT) -> Any:
        """The labelled grid, a row for each class or caption."""
        rows, given, shown = self.asked
        images = self.decoder.start(generate(gpt, given, self.sampling, self.uniforms))()   # [rows x each, S, S, 3]
        scale, columns, titles = max(1, 64 // images.shape[1]), _EACH, []
        if shown is not None:
            whose = self.decoder.start(shown.to(self.processes.device))()
            images = np.concatenate([np.concatenate([own[None], images[first : first + _EACH]])
                                     for own, first in zip(whose, range(0, len(images), _EACH))])
            columns, titles = _EACH + 1, ["image of the data", "samples", *[""] * (_EACH - 1)]
        return image_grid(images, columns, scale, rows, titles)


def asked(model: GPTConfig, about: GPTProvenance, dataset: Any) -> Asked:
    """The first classes, or the captions of the first images of the data, whose own codes show what was asked for: no words are
    kept beside the features of a caption."""
    if model.condition == "class":
        classes = shown_classes(model.num_classes)
        names = [about.class_names[label] if about.class_names else f"class {label}" for label in classes]
        return Asked(names, torch.tensor(classes).repeat_interleave(_EACH), None)
    codes, given, *_ = dataset.__getitems__([(0, row) for row in range(min(_ROWS, len(dataset)))])
    repeated: Given = each(lambda part: part.repeat_interleave(_EACH, 0), given)
    return Asked([f"caption {row}" for row in range(len(codes))], repeated, codes)


def open_preview(options: PreviewOptions, model: GPTConfig, about: GPTProvenance, dataset: Any, seed: int,
                 processes: Processes) -> Preview | None:
    """The pictures that --sample-every asks for, or None; arguments and errors as for `Preview`."""
    every, path = options.sample_every, options.vq_ckpt
    if not every and not path:
        return None
    if not every:
        raise UserError(f"--vq-ckpt {path} is for pictures while training but --sample-every is 0: give --sample-every STEPS "
                        "too, or leave it out.")
    if not path:
        raise UserError(f"--sample-every {every} draws pictures but no tokenizer is given to decode them: give the one that made "
                        "the codes as --vq-ckpt.")
    if model.paradigm == "fine" or about.tokenizer.startswith(COARSE):
        raise UserError(f"--sample-every {every} needs codes that a tokenizer decodes but this run is one stage of CTF's two: "
                        "leave it out, and sample from both with --fine-ckpt.")
    return Preview(options, model, about, dataset, seed, processes)
