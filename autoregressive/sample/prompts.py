"""From prompts to what a GPT samples from: the text encoder of its training, and the features of each prompt.

A prompt is encoded alone and once: beside others the last bits of its features could be different, and with them its images.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autoregressive.sample.model_options import ModelOptions, carried_options
from utils.captions import CLEANING
from utils.checkpoint import read_export
from utils.config import UserError, flag
from utils.optim import uses_bf16
from utils.text_encoders import (
    PUBLISHED_T5,
    TEXT_ENCODERS,
    Caption,
    CaptionEncoder,
    EncoderRecord,
    TextEncoderOptions,
    encoder_of,
    make_encoder,
)
from utils.texts import Prompt, well_formed
from utils.untrusted import printable

if TYPE_CHECKING:  # it imports this module
    from autoregressive.sample.pipeline import Pipeline

_KEPT = 64  # prompts whose features are kept: a batch may need one of the batch before again


def carried_text_options(config: Any) -> dict[str, Any]:
    """Defaults of a command line that --gpt-ckpt carries: its sampling options, and those of its text encoder."""
    source = f"--gpt-ckpt {config.models.gpt_ckpt}"
    description, _ = read_export(config.models.gpt_ckpt, "gpt", "--gpt-ckpt", tensors=False)
    model, encoder = description.get("model"), description.get("encoder", "")
    carried = carried_options(config)
    if not isinstance(model, dict) or model.get("condition") != "text" or not isinstance(encoder, str):
        return carried  # the pipeline will say so
    record = record_of(encoder, source)
    length = model.get("caption_length")
    return carried | (recorded_options(record) if record else {"text_length": length} if isinstance(length, int) else {})


def record_of(text: str, source: str) -> EncoderRecord | None:
    """The record of the encoder that a GPT carries; None for published weights, which carry at most the encoder's name.

    Raises UserError naming `source` for a damaged one.
    """
    return None if text in ("", PUBLISHED_T5) else EncoderRecord.of(text, source)


def recorded_options(record: EncoderRecord) -> dict[str, Any]:
    """The options that name a record's encoder: fields of TextEncoderOptions; none for an encoder that is unknown here."""
    if record.encoder not in TEXT_ENCODERS:
        return {}
    own = {"text_encoder_path": record.encoder_path, "text_width": record.text_width}
    blank = TextEncoderOptions()
    return {"text_encoder": record.encoder, "text_length": record.text_length, "caption_cleaning": record.caption_cleaning} | {
        name: value if name in TEXT_ENCODERS[record.encoder].options else getattr(blank, name) for name, value in own.items()}


def recorded_encoder(pipeline: "Pipeline") -> TextEncoderOptions:
    """The options of the encoder that a pipeline's GPT was trained with; LlamaGen's for published weights, which do not say."""
    record = record_of(pipeline.gpt.provenance.encoder, f"--gpt-ckpt {pipeline.models.gpt_ckpt}")
    return TextEncoderOptions(**(recorded_options(record) if record else {"text_length": pipeline.gpt.config.caption_length}))


def load_encoder(options: TextEncoderOptions, models: ModelOptions, pipeline: "Pipeline") -> CaptionEncoder:
    """The encoder that the GPT was trained with, on the pipeline's device; by the options where the GPT carries no record.

    Raises UserError where the options, the second stage's record or what --text-encoder-path holds differ from the record, or
    the features do not fit the GPT.
    """
    config, source = pipeline.gpt.config, f"--gpt-ckpt {models.gpt_ckpt}"
    record, bf16 = record_of(pipeline.gpt.provenance.encoder, source), uses_bf16(models.precision, pipeline.device)
    if pipeline.fine is not None:
        fine = record_of(pipeline.fine.provenance.encoder, f"--fine-ckpt {models.fine_ckpt}")
        if (fine and fine.encoder_fingerprint) != (record and record.encoder_fingerprint):
            raise UserError(f"--fine-ckpt {models.fine_ckpt} was trained with another text encoder than {source}: give two "
                            "stages trained on the same features.")
    if record is None:
        made = make_encoder(options, pipeline.device, bf16)
    else:
        _require_recorded(options, record, source)
        made = encoder_of(record, source, pipeline.device, bf16, options.text_encoder_path)
    if made.record.text_width != config.caption_dim or made.record.text_length > config.caption_length:
        raise UserError(f"--text-encoder {made.record.encoder} gives {made.record.text_length} tokens of width "
                        f"{made.record.text_width} but {source} reads at most {config.caption_length} of width "
                        f"{config.caption_dim}: give the encoder and the --text-length of its training.")
    return made


def _require_recorded(options: TextEncoderOptions, record: EncoderRecord, source: str) -> None:
    """Raise UserError for an option of another encoder than the recorded one; its place may be another."""
    for name, recorded in recorded_options(record).items():
        moved = name == "text_encoder_path" and name in TEXT_ENCODERS[record.encoder].options
        if not moved and (given := getattr(options, name)) != recorded:
            raise UserError(f"{flag(name)} {printable(given)} is not what {source} was trained with, the text encoder "
                            f"{record.encoder} with {flag(name)} {printable(recorded) or 'left out'}: leave the option out.")


def check_prompts(prompts: Sequence[Prompt], cleaning: str, option: str) -> list[Prompt]:
    """The prompts as strings that every encoder and file takes; raises UserError, naming `option`, for an empty one.

    cleaning: row of CLEANING, of which nothing may be left.
    """
    found = [Prompt(well_formed(prompt.text), prompt.about) for prompt in prompts]
    for number, prompt in enumerate(found, 1):
        if not CLEANING[cleaning](prompt.text).strip():
            raise UserError(f"{option}, prompt {number}, {printable(prompt.text)[:60]!r}, is empty after --caption-cleaning "
                            f"{cleaning}: give words, or leave it out.")
    return found


class PromptConditions:
    """The condition of every sample: features and mask of its prompt, `each` samples of one prompt after the other."""

    def __init__(self, encoder: CaptionEncoder, prompts: list[Prompt], each: int, tells: bool = True) -> None:
        """tells: whether this process says which prompts will be cut."""
        self.encoder, self.prompts, self.each = encoder, prompts, each
        cleaned = encoder.clean([prompt.text for prompt in prompts])
        if tells:
            encoder.report_cut(cleaned, encoder.encoder.lengths(cleaned))
        else:
            logging.getLogger("text").setLevel(logging.ERROR)
        self._features = lru_cache(_KEPT)(self._encode)

    def __len__(self) -> int:
        """Samples of all prompts."""
        return len(self.prompts) * self.each

    def __call__(self, rows: np.ndarray) -> Caption:
        """Features float32 [B, T, E] and mask bool [B, T] of samples [B], on the encoder's device."""
        features, masks = zip(*(self._features(int(row) // self.each) for row in rows), strict=True)
        return torch.stack(features), torch.stack(masks)

    def _encode(self, number: int) -> Caption:
        """Features [T, E] and mask [T] of a prompt."""
        features, mask = self.encoder([self.prompts[number].text])
        return features[0], mask[0]

    @property
    def captions(self) -> np.ndarray:
        """The prompt of every sample: strings [N]."""
        return np.repeat(np.array([prompt.text for prompt in self.prompts]), self.each)
