"""From class labels or captions to images: the models a sampler needs, checked against each other and loaded once.

    pipeline = Pipeline.from_pretrained("runs/GPT-XXL-256", vq_ckpt="runs/vq/dual")    # or a name on the hub, "hf:owner/name"
    first, second = pipeline(["golden retriever", 207], seed=0)                          # PIL images
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoregressive.models.conditions import Given, count, each
from autoregressive.models.ctf import FineOptions, refine
from autoregressive.models.generate import (
    Decoder,
    SamplingOptions,
    cfg_ranges,
    check_read,
    draw_uniforms,
    per_stream,
    whole_rows,
)
from autoregressive.models.gpt import GPT, load_gpt, place
from autoregressive.models.transformer import GPTConfig
from autoregressive.sample.image_decoder import ImageDecoder, Images
from autoregressive.sample.model_options import ModelOptions
from autoregressive.sample.prompts import PromptConditions, check_prompts, load_encoder, recorded_encoder
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils import logs
from utils.checkpoint import fingerprint, read_export
from utils.class_names import ClassNames, find_class, require_same_names, words_for
from utils.config import UserError, check_options, flag
from utils.crops import center_crop, to_tensor
from utils.distributed import choose_device
from utils.hub import inside
from utils.optim import native_bf16, uses_bf16
from utils.text_encoders import CaptionEncoder
from utils.texts import Prompt

# Who samples from what.
SAMPLERS = {"class": "sample_c2i.py or sample_c2i_ddp.py", "text": "sample_t2i.py or sample_t2i_ddp.py"}
COARSE = "coarse-"  # how fingerprints of coarse labels begin (rearrange.py)
# Weights that a CPU's cache about holds: for so few, half the bytes gain little.
_CACHED = 2**23

# Told the samples' numbers and their images so far, uint8 [B, S, S, 3], grey where nothing is drawn yet.
OnRow = Callable[[np.ndarray, np.ndarray], None]


class Pipeline:
    """GPT, second stage where there is one, and tokenizer on one device."""

    def __init__(self, models: ModelOptions, sampling: SamplingOptions, fine: FineOptions, device: torch.device,
                 condition: str = "class") -> None:
        """condition: what the caller will give to `sample`, empty for either.  Raises UserError when the GPT reads another, the
        files do not fit each other or the sampling options fit no model."""
        self.models = models
        self.gpt = load_in(models.precision, load_gpt(models.gpt_ckpt), device)
        self.fine = None if models.fine_ckpt is None else load_in(
            models.precision, load_gpt(models.fine_ckpt, option="--fine-ckpt"), device)
        self.tokenizer = load_tokenizer(models.vq_ckpt, device)
        self.sampling, self.fine_options, self.device = sampling, fine, device
        self.image_size_eval, self.decode_mode = models.image_size_eval, models.decode
        if condition not in ("", self.gpt.config.condition):
            raise UserError(f"--gpt-ckpt {models.gpt_ckpt} is conditioned on {self.gpt.config.condition}: sample from it with "
                            f"{SAMPLERS[self.gpt.config.condition]}.")
        self._check_models(models)
        self.decoder = Decoder(self.gpt, models.decode)
        bf16 = device.type == "cuda" and uses_bf16(models.precision, device)
        self.image_decoder = ImageDecoder(self.tokenizer, self.gpt.config.grid_size, models.image_size_eval,
                                          torch.bfloat16 if bf16 else torch.float32)
        check_sampling(sampling, self.gpt)
        self.whole_rows = whole_rows(self.gpt)
        if self.fine is not None:
            self.coarse_of = torch.tensor(self.fine.provenance.coarse_of, device=device)

    @classmethod
    def from_pretrained(cls, gpt_ckpt: str | Path, vq_ckpt: str | Path = "", fine_ckpt: str | Path = "", *, device: str = "auto",
                        precision: str = "auto", decode: str = "auto") -> "Pipeline":
        """Load a GPT and its tokenizer, guided as the GPT's file says.

        gpt_ckpt, vq_ckpt, fine_ckpt: files, run folders, or names on the hub (`hf:owner/name@revision`); the tokenizer is looked
        for beside the GPT unless it is named, and so is CTF's second stage, in a folder `fine`.  device, precision, decode: as in
        ModelOptions.  Raises UserError where there is none, or where they do not fit each other.
        """
        description, _ = read_export(gpt_ckpt, "gpt", "--gpt-ckpt", tensors=False)
        if not fine_ckpt and str(description.get("tokenizer")).startswith(COARSE):
            fine_ckpt = inside(gpt_ckpt, "fine")
        models = ModelOptions(gpt_ckpt=Path(gpt_ckpt), vq_ckpt=Path(vq_ckpt or gpt_ckpt),
                              fine_ckpt=Path(fine_ckpt) if fine_ckpt else None, precision=precision, decode=decode)
        check_options(models)
        sampling = with_options(SamplingOptions(), description.get("sampling", {}))
        return cls(models, sampling, FineOptions(), choose_device(device), condition="")

    def __call__(self, wanted: str | int | Sequence[str | int], seed: int | None = None, *, first: int = 0, batch_size: int = 64,
                 progress: bool = True, on_row: OnRow | None = None, top: tuple[Image.Image, int] | None = None,
                 **options: Any) -> list[Image.Image]:
        """Images of classes, by id or name, or of captions, by the GPT's condition.

        seed: None takes the pipeline's; first: number of the first sample, since sample i is a function of (seed, i): these are
        the images that `sample_c2i_ddp.py` draws of the same classes; batch_size: drawn at once; progress: whether a bar is
        shown; on_row: called when a row of the grid is whole; top: an image and how many rows of its grid to keep, which the
        samples go on from; options: fields of SamplingOptions, as in `cfg_scale=(1.5, 3)`.  Raises UserError for a name of no
        class or several, an empty caption, and options that do not fit the GPT.
        """
        asked = [wanted] if isinstance(wanted, (str, int, np.integer)) else list(wanted)
        sampling = with_options(self.sampling, options | ({} if seed is None else {"seed": seed}))
        check_sampling(sampling, self.gpt)
        given, found = self.conditions(asked), list[np.ndarray]()
        kept = None if top is None else self.top_codes(np.asarray(top[0].convert("RGB")), top[1])
        with logs.progress(len(asked), "sample", "images") if progress else nullcontext() as bar:
            for start in range(0, len(asked), batch_size):
                rows = np.arange(start, min(start + batch_size, len(asked)))
                own = None if kept is None else kept.expand(len(rows), -1, -1)
                for known, codes in self.rows(given(rows), self.uniforms(sampling.seed, first + rows), sampling, own):
                    if on_row is not None:
                        on_row(first + rows, self.decode(codes, known))
                found += list(self.decode(codes))
                if bar is not None:
                    bar.update(len(rows))
        return [Image.fromarray(image) for image in found]

    def conditions(self, wanted: Sequence[str | int]) -> Callable[[np.ndarray], Given]:
        """What the GPT is told of samples [B], given the class, by id or name, or the caption of every sample."""
        if self.gpt.config.condition == "class":
            labels = np.array([find_class(each, self.spoken_names, "class") for each in wanted], dtype=np.int64)
            return lambda rows: torch.from_numpy(labels[rows])
        prompts = [Prompt(str(each), {}) for each in wanted]
        return PromptConditions(self.encoder, check_prompts(prompts, self.encoder.record.caption_cleaning, "caption"), 1)

    @cached_property
    def encoder(self) -> CaptionEncoder:
        """The text encoder of the GPT's training, where that is recorded; raises UserError where it is not at hand."""
        return load_encoder(recorded_encoder(self), self.models, self)

    def _check_models(self, models: ModelOptions) -> None:
        """Raise UserError unless coarse labels meet their second stage and codes their tokenizer."""
        giver, option = self.gpt, f"--gpt-ckpt {models.gpt_ckpt}"
        if giver.config.paradigm == "fine":
            raise UserError(f"{option} is a second stage: give the coarse GPT here and this one as --fine-ckpt.")
        if self.fine is not None:
            seen, expected = self.gpt.provenance.tokenizer, self.fine.provenance.coarse
            giver, option = self.fine, f"--fine-ckpt {models.fine_ckpt}"
            if giver.config.paradigm != "fine":
                raise UserError(f"{option} is no second stage but predicts by the {giver.config.paradigm} paradigm: give the GPT "
                                "that was trained with rearrange.py's fine_map.")
            for name in ("grid_size", "condition", "num_classes", "caption_length", "caption_dim"):
                if getattr(giver.config, name) != getattr(self.gpt.config, name):
                    raise UserError(f"{option} has {name} {getattr(giver.config, name)} but --gpt-ckpt {models.gpt_ckpt} has "
                                    f"{getattr(self.gpt.config, name)}: give two stages of one size.")
            require_same_names(giver.provenance.class_names, self.class_names, option, f"--gpt-ckpt {models.gpt_ckpt}")
            if seen != expected:
                raise UserError(f"--gpt-ckpt {models.gpt_ckpt} predicts {seen} but {option} refines {expected}: give two stages "
                                "trained with the maps of one rearrange.py run.")
        if giver.provenance.tokenizer.startswith(COARSE):
            raise UserError(f"{option} predicts coarse labels, which no tokenizer decodes: give its --fine-ckpt.")
        require_tokenizer(self.tokenizer, models.vq_ckpt, giver.provenance.tokenizer, giver.config, option)

    @property
    def num_classes(self) -> int:
        """Classes the GPT knows."""
        return self.gpt.config.num_classes

    @property
    def class_names(self) -> ClassNames:
        """Their names by id; empty where the GPT does not carry them."""
        return self.gpt.provenance.class_names

    @property
    def spoken_names(self) -> ClassNames:
        """What to call the classes before a person, by id."""
        return words_for(self.class_names, self.num_classes)

    @property
    def image_size(self) -> int:
        """Side of the images `sample` returns."""
        return self.image_size_eval or self.gpt.config.grid_size * self.tokenizer.config.downsampling

    def identity(self) -> dict[str, str]:
        """Fingerprints of the models: a partial file made by other models is not continued."""
        stages = {"gpt": self.gpt} | ({"fine": self.fine} if self.fine is not None else {})
        return {name: fingerprint(gpt.state_dict()) for name, gpt in stages.items()} | {
            "tokenizer": self.tokenizer.provenance.fingerprint}

    def uniforms(self, seed: int, samples: np.ndarray) -> Tensor:
        """The random numbers of samples [B], by their global indices, of both stages: [B, C, N] on the CPU."""
        stages = 1 if self.fine is None else 2
        return draw_uniforms(seed, samples, stages * len(self.gpt.config.codebook_sizes), self.gpt.config.cells)

    @torch.inference_mode()
    def rows(self, given: Given, uniforms: Tensor, sampling: SamplingOptions,
             kept: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Draw codes and yield (whole rows of the grid, codes so far [B, C, N]) for every row; the last are complete.

        given: class ids [B] or captions; uniforms: of `uniforms`; kept: codes of the tokenizer that are given [B, C, N], -1
        where one is drawn; all on any device.  Of two stages, the second knows all rows at once.
        """
        side, streams, shown = self.gpt.config.grid_size, len(self.gpt.config.codebook_sizes), 0
        kept = None if kept is None else kept.to(self.device)
        own = kept
        if kept is not None and self.fine is not None:
            own = torch.where(kept < 0, kept, self.coarse_of[kept.clamp_min(0)])
        for step, decoding in enumerate(self.decoder.steps(given, sampling, uniforms[:, :streams], own)):
            if self.fine is None and shown < self.whole_rows[step] < side:
                shown = self.whole_rows[step]
                yield shown, decoding.state.codes[: count(given)]
        codes = decoding.state.codes[: count(given)].clone()  # the next batch overwrites them
        if self.fine is not None:
            codes = refine(self.fine, each(lambda part: part.to(self.device), given), codes, self.fine_options, uniforms[:, -1],
                           self.coarse_of, self.decode_mode)
            codes = codes if kept is None else torch.where(kept < 0, codes, kept)
        yield side, codes

    def sample_codes(self, given: Given, samples: np.ndarray) -> Tensor:
        """Draw codes [B, C, N] of the tokenizer for class ids [B] or captions, on any device; samples: their global indices."""
        *_, (_, codes) = self.rows(given, self.uniforms(self.sampling.seed, samples), self.sampling)
        return codes

    def encode(self, image: np.ndarray) -> Tensor:
        """An image uint8 [H, W, 3], its centre square, as codes of the tokenizer [1, C, N]."""
        square = center_crop(image, self.gpt.config.grid_size * self.tokenizer.config.downsampling)
        return self.tokenizer.encode(to_tensor(square)[None].to(self.device)).flatten(2)

    def top_codes(self, image: np.ndarray, rows: int) -> Tensor:
        """The codes of an image's first rows of the grid, -1 below, to be kept by `rows`: [1, C, N].

        Raises UserError unless the grid has so many rows.
        """
        side = self.gpt.config.grid_size
        if not 0 <= rows <= side:
            raise UserError(f"{rows} rows cannot be kept of a grid of {side}: give a number from 0 to {side}.")
        codes = self.encode(image)
        codes[..., rows * side :] = -1
        return codes

    def start(self, given: np.ndarray | Given, samples: np.ndarray) -> Images:
        """`sample` without waiting for the images, so that they are decoded beside the next codes."""
        return self.image_decoder.start(self.sample_codes(torch.from_numpy(given) if isinstance(given, np.ndarray) else given,
                                                          samples))

    def sample(self, given: np.ndarray | Given, samples: np.ndarray) -> np.ndarray:
        """Draw images uint8 [B, S, S, 3] of class ids [B] or captions, features [B, P', E] and mask [B, P']; samples: their
        global indices [B], which fix the randomness."""
        return self.start(given, samples)()

    def decode(self, codes: Tensor, rows: int | None = None) -> np.ndarray:
        """Codes of the tokenizer [B, C, N] -> images uint8 [B, S, S, 3]; rows: of the grid to show, from the top; None: all."""
        side = self.gpt.config.grid_size
        return self.image_decoder.start(codes if rows is None else codes[..., : rows * side])()


def require_tokenizer(tokenizer: VQModel, path: str | Path, expected: str, gpt: GPTConfig, option: str) -> None:
    """Raise UserError unless the tokenizer of --vq-ckpt made the codes of a GPT.

    expected: fingerprint of the one that did, empty where a published file does not say it; option: the GPT, as messages call it.
    """
    seen, own = tokenizer.provenance.fingerprint, tuple(tokenizer.config.codebook_sizes)
    if expected and seen != expected:
        raise UserError(f"--vq-ckpt {path} is tokenizer {seen} but {option} was trained on codes of tokenizer {expected}: give "
                        "the tokenizer that made the codes.")
    if tuple(gpt.codebook_sizes[-len(own):]) != own:
        raise UserError(f"--vq-ckpt {path} has codebooks {own} but {option} predicts {tuple(gpt.codebook_sizes)}: give the "
                        "tokenizer that made the codes.")


def load_in(precision: str, gpt: GPT, device: torch.device) -> GPT:
    """Move a GPT to the device in the precision that it is sampled with, by ModelOptions.precision."""
    outgrows = sum(parameter.numel() for parameter in gpt.parameters()) > _CACHED
    bf16 = uses_bf16(precision, device) or precision == "auto" and outgrows and native_bf16(device)
    return place(gpt, device, torch.bfloat16 if bf16 else torch.float32)


def check_classes(classes: tuple[int, ...], names: tuple[str, ...], pipeline: Pipeline) -> list[str]:
    """A caption for every class id; raises UserError for an unknown class, or as many names as there are not classes."""
    if names and len(names) != len(classes):
        raise UserError(f"--class-names has {len(names)} names for the {len(classes)} --classes.")
    if (highest := max(classes)) >= pipeline.num_classes:
        raise UserError(f"--classes {highest} is out of range: the model knows classes 0 to {pipeline.num_classes - 1}.")
    return list(names) or [pipeline.class_names[value] if pipeline.class_names else f"class {value}" for value in classes]


def with_options(sampling: SamplingOptions, options: dict[str, Any]) -> SamplingOptions:
    """Sampling options with some fields replaced, a number standing for one value; raises UserError for an unknown field or a
    value that makes no sense."""
    known = {field.name: getattr(sampling, field.name) for field in fields(SamplingOptions)}
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"{unknown[0]} is no sampling option: choose from {', '.join(known)}.")
    several = {name for name, value in known.items() if isinstance(value, tuple)}
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, (list, tuple)) else (value,) if name in several else value
                             for name, value in options.items()}
    changed = replace(sampling, **given)
    check_options(changed)
    return changed


def check_sampling(sampling: SamplingOptions, gpt: GPT) -> None:
    """Raise UserError, naming the flag, for a guidance range, or a count of temperatures or filters, that fits no model, and for
    what the guidance does not read."""
    streams = len(gpt.config.codebook_sizes)
    try:
        cfg_ranges(sampling, gpt)
        check_read(sampling, gpt)
        for name in ("temperature", "top_k", "top_p"):
            per_stream(getattr(sampling, name), streams, name)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UserError(f"{flag(name)} {rest}") from error
