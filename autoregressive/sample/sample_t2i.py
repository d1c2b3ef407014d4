"""Draw images of prompts into one PNG, with the prompts written under them (LlamaGen's entry point)."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.prompts import PromptConditions, carried_text_options, check_prompts, load_encoder
from utils.config import Positive, UserError, parse, run_main
from utils.distributed import setup
from utils.files import check_writable
from utils.logs import followed, set_up_logging
from utils.pictures import captioned_grid, save_picture
from utils.text_encoders import TextEncoderOptions
from utils.texts import Prompt, read_prompts

log = logging.getLogger("sample_t2i")

EXAMPLES = (
    "a lighthouse on a cliff above a stormy sea, oil painting",
    "a bowl of ripe cherries on a wooden table next to a window",
    "a small robot that waters tulips in a greenhouse",
    "an empty street of an old town after the rain, at night",
)


@dataclass
class PromptGridConfig:
    """Options of a picture of prompts."""

    models: ModelOptions
    sampling: SamplingOptions
    fine: FineOptions
    encoder: TextEncoderOptions
    prompts: Path | None = None
    """File of prompts: lines of text; .jsonl with `prompt` or `text`; .tsv with a column `Prompt`."""
    prompt: tuple[str, ...] = EXAMPLES
    """Prompts typed here, each in quotes, instead of a file."""
    per_prompt: Positive = 4
    """Images of each prompt."""
    batch_size: Positive = 16
    """Images drawn at once."""
    out: Path = Path("samples/prompts.png")
    """PNG to write."""


def chosen_prompts(config: PromptGridConfig) -> list[Prompt]:
    """The prompts that are typed or in the file; raises UserError where both are given, or one is empty."""
    if config.prompts is None:
        return check_prompts([Prompt(text, {}) for text in config.prompt], config.encoder.caption_cleaning, "--prompt")
    if config.prompt != EXAMPLES:
        raise UserError(f"--prompt and --prompts {config.prompts} are both given: type the prompts or give a file of them.")
    return check_prompts(read_prompts(config.prompts), config.encoder.caption_cleaning, f"--prompts {config.prompts}")


def main() -> None:
    """Parse options, draw, write the picture."""
    config = parse(PromptGridConfig, carried_text_options)
    processes = setup(config.models.device)
    set_up_logging(processes)
    prompts = chosen_prompts(config)
    check_writable(config.out.parent, "--out")
    if config.out.suffix.lower() != ".png":
        raise UserError(f"--out {config.out} must end in .png.")
    pipeline = Pipeline(config.models, config.sampling, config.fine, processes.device, condition="text")
    given = PromptConditions(load_encoder(config.encoder, config.models, pipeline), prompts, config.per_prompt, processes.is_main)
    batches = [np.arange(first, min(first + config.batch_size, len(given))) for first in range(0, len(given), config.batch_size)]
    images = [pipeline.sample(given(rows), rows) for rows in followed(batches, "sample", "batches", processes)]
    grid = captioned_grid(np.concatenate(images), [prompt.text for prompt in prompts], max(1, 128 // pipeline.image_size))
    save_picture(grid, config.out)
    log.info("wrote %s", config.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
