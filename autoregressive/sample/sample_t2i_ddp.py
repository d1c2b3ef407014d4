"""Draw samples of a file of prompts into one npz for evaluation, on any number of processes (LlamaGen's entry point).

Sample i is image i % n of prompt i // n, for n images a prompt, with randomness of its own (`drawing.py`).  The npz holds `arr_0`
uint8 NHWC, `captions`, `kind` and `options`.  With --layout the same images are then written as the folder that another
evaluation reads (`layouts.py`).
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.sample.drawing import draw_npz, identity
from autoregressive.sample.layouts import LAYOUTS, check_folder, write_folder
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.prompts import PromptConditions, carried_text_options, check_prompts, load_encoder
from utils.config import Positive, choices, parse, run_main
from utils.distributed import Processes, setup
from utils.image_store import already_finished, check_name
from utils.logs import set_up_logging
from utils.npz import open_array
from utils.pictures import captioned_grid, save_picture
from utils.text_encoders import TextEncoderOptions
from utils.texts import Prompt, Texts, read_prompts

log = logging.getLogger("sample_t2i_ddp")

_SHOWN = 12, 4  # prompts of the picture beside the npz, and images of each


@dataclass
class PromptSampleConfig:
    """Options of sampling prompts to an npz."""

    models: ModelOptions
    sampling: SamplingOptions
    fine: FineOptions
    encoder: TextEncoderOptions
    prompts: Path
    """File of prompts: lines of text; .jsonl with `prompt` (GenEval's) or `text`; .tsv with a column `Prompt` (PartiPrompts')."""
    out: Path = Path("samples/prompts.npz")
    """npz to write."""
    per_prompt: Positive = 1
    """Samples of each prompt (GenEval: 4)."""
    layout: Annotated[str, choices(LAYOUTS)] = "npz"
    """npz: nothing else; geneval or partiprompts: the images as the folder that these evaluations read too, in --out without
    its .npz."""
    batch_size: Positive = 64
    """Samples a process draws at once."""


def about_samples(config: PromptSampleConfig, pipeline: Pipeline, given: PromptConditions) -> dict[str, Any]:
    """The identity of the samples."""
    record = given.encoder.record
    return identity(pipeline, prompts=Texts(prompt.text for prompt in given.prompts).checksum, per_prompt=config.per_prompt,
                    text_encoder=record.encoder_fingerprint, text_length=record.text_length,
                    caption_cleaning=record.caption_cleaning)


def write_samples(config: PromptSampleConfig, pipeline: Pipeline, given: PromptConditions, processes: Processes) -> None:
    """Draw all samples, write the npz, a picture of some and the folder; what is finished is left as it is."""
    shape = len(given), pipeline.image_size, pipeline.image_size, 3
    about, picture = about_samples(config, pipeline, given), config.out.with_suffix(".png")
    if processes.is_main:  # refused now rather than after the drawing
        check_folder(config.layout, config.out, about)
    if finished := already_finished(config.out, shape, about):
        log.info("%s is there already, made by these options", config.out)
    else:
        draw_npz(pipeline, config.out, given, about, config.batch_size, processes, captions=given.captions)
    if processes.is_main and not (finished and picture.exists()):
        save_picture(_overview(config, given.prompts, pipeline.image_size), picture)
        log.info("%s: %d samples of %d prompts, %dx%d", config.out, len(given), len(given.prompts), *shape[1:3])
    write_folder(config.layout, config.out, given.prompts, config.per_prompt, about, processes)


def _overview(config: PromptSampleConfig, prompts: list[Prompt], size: int) -> Any:
    """The picture of the first samples of the first prompts."""
    shown, each = min(_SHOWN[0], len(prompts)), min(_SHOWN[1], config.per_prompt)
    rows = np.arange(shown)[:, None] * config.per_prompt + np.arange(each)
    images = open_array(config.out, "arr_0")[rows.ravel()]
    return captioned_grid(images, [prompt.text for prompt in prompts[:shown]], max(1, 128 // size))


def main() -> None:
    """Parse options, load the models, draw all samples and write them."""
    config = parse(PromptSampleConfig, carried_text_options)
    processes = setup(config.models.device)
    set_up_logging(processes)
    check_name(config.out)
    prompts = check_prompts(read_prompts(config.prompts), config.encoder.caption_cleaning, f"--prompts {config.prompts}")
    pipeline = Pipeline(config.models, config.sampling, config.fine, processes.device, condition="text")
    encoder = load_encoder(config.encoder, config.models, pipeline)
    write_samples(config, pipeline, PromptConditions(encoder, prompts, config.per_prompt, processes.is_main), processes)
    processes.barrier()
    processes.close()


if __name__ == "__main__":
    run_main(main)
