"""Decoding: sampling options, logit filtering, reproducible draws and the sampling loop (paper section 4.5, table 12).

Randomness is drawn ahead, one uniform number a code, from (seed, sample index) alone, and turned into codes by the
inverse of the cumulative distribution: sample i does not depend on batch size or process count.  (Matrix kernels
may differ in the last bits between batch sizes; in bfloat16 that can change a draw, so keep the batch size to reproduce.)

Errors are ValueErrors that begin with the field they are about; whoever reads a command line names the flag.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.attention import KVCache
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance import CFG_RANGES, GUIDANCE, Scale, guide
from autoregressive.models.packing import packed_linears
from autoregressive.models.paradigms import DecodeState
from utils.config import Count, NonNegative, Seed, choices, interval

V = TypeVar("V")


@dataclass
class SamplingOptions:
    """How codes are drawn from logits."""

    guidance: Annotated[str, choices(GUIDANCE)] = "attention"
    """Schedule of the guidance scale."""
    cfg_scale: tuple[NonNegative, ...] = ()
    """Guidance scale: one value, START END, or START END of the semantic then of the detail stream; 1: no guidance.
    Empty: what the checkpoint carries, by table 12 or LlamaGen's scales."""
    cfg_attention_weight: NonNegative = 0.05
    """w of the attention schedule (paper 0.05, released sampler 0.1)."""
    cfg_interval: Annotated[int, interval(int, -1)] = -1
    """Guide trunk steps 0 to this plus one only, as LlamaGen counts; -1 guides all."""
    temperature: tuple[NonNegative, ...] = (1.0,)
    """Softmax temperature, one value or one per stream; 0 takes the likeliest code."""
    top_k: tuple[Count, ...] = (0,)
    """Keep the k likeliest codes, one value or one per stream; 0 keeps all."""
    top_p: tuple[Annotated[float, interval(float, 0, 1, open_low=True)], ...] = (1.0,)
    """Keep the likeliest codes of total probability p, one value or one per stream."""
    seed: Seed = 0
    """Sample i is a function of (seed, i) alone."""


def carried_fields(sampling: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingOptions from what a checkpoint carries as JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in sampling.items()}


def carried_sampling(gpt: GPT) -> SamplingOptions:
    """The sampling options that a loaded checkpoint carries; defaults where it says nothing."""
    return SamplingOptions(**carried_fields(gpt.provenance.sampling))


def per_stream(values: tuple[V, ...], streams: int, name: str) -> tuple[V, ...]:
    """Repeat one value for all streams; raises ValueError when the count fits neither one nor `streams`."""
    if len(values) not in (1, streams):
        raise ValueError(f"{name} has {len(values)} values: give one, or one for each of the {streams} code streams.")
    return values * streams if len(values) == 1 else values


def cfg_ranges(options: SamplingOptions, gpt: GPT) -> list[tuple[float, float]]:
    """The guidance (start, end) of every stream; raises ValueError for a range that is upside down or incomplete."""
    streams, values, grid = len(gpt.config.codebook_sizes), options.cfg_scale, gpt.config.grid_size
    if not values:
        size = gpt.provenance.gpt_model
        if (streams, size, grid) not in CFG_RANGES:
            raise ValueError(f"cfg_scale is empty and no range is published for {size or 'this GPT'} on a {grid}x{grid} grid: "
                             "give START END.")
        values = CFG_RANGES[streams, size, grid]
    if len(values) not in (1, 2, 2 * streams):
        raise ValueError(f"cfg_scale has {len(values)} values: give one, START END, or START END for each stream.")
    values = values * 2 if len(values) == 1 else values
    values = values * streams if len(values) == 2 else values
    ranges = [(values[2 * stream], values[2 * stream + 1]) for stream in range(streams)]
    for start, end in ranges:
        if start > end:
            raise ValueError(f"cfg_scale {start} {end} is upside down: give START END with START <= END.")
        if options.guidance == "constant" and start != end:
            raise ValueError(f"cfg_scale {start} {end} is a range but constant guidance takes one value: give one value or use "
                             "progressive guidance.")
    return ranges


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the top-k, then all but the top-p codes to -inf; logits [B, K], ties at the k-th value are kept.

    The likeliest code always stays; a code stays while the probability before it is at most p, as in LlamaGen.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before > top_p), -torch.inf)
    return logits


def draw_uniforms(seed: int, samples: np.ndarray, streams: int, cells: int) -> Tensor:
    """Uniform numbers in [0, 1) of the given sample indices [B] -> float32 [B, C, N]; sample i depends on (seed, i)."""
    keys = np.stack([np.full(len(samples), seed), samples], axis=1).astype(np.uint64)
    draws = [np.random.Generator(np.random.Philox(key=key)).random((streams, cells), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(draws))


def draw_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: logits [B, K] and uniforms [B] -> codes [B]."""
    cumulative = logits.softmax(-1).cumsum(-1)                                     # [B, K]
    # Scaled by the last entry, which rounding may leave beside 1, so that no draw falls behind it.
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def pick_codes(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Temperature, then the filters, then the draw, in LlamaGen's order: logits [B, K], uniforms [B] -> codes [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw_codes(filter_logits(logits / temperature, top_k, top_p), uniforms)


class Sampler:
    """Guidance, filtering and draws of one decoding, all on the device."""

    def __init__(self, gpt: GPT, options: SamplingOptions, uniforms: Tensor) -> None:
        """uniforms: [B, C, N] on the device of the logits.  Raises ValueError for options that do not fit the GPT."""
        streams = len(gpt.config.codebook_sizes)
        self.ranges = cfg_ranges(options, gpt)
        self.temperature = per_stream(options.temperature, streams, "temperature")
        self.top_k = per_stream(options.top_k, streams, "top_k")
        self.top_p = per_stream(options.top_p, streams, "top_p")
        self.options, self.uniforms, self.steps = options, uniforms, gpt.paradigm.num_steps
        self.guidance = GUIDANCE[options.guidance]
        self.guided = not self.guidance.one_is_off or any(pair != (1.0, 1.0) for pair in self.ranges)
        self.needs_attention = self.guided and self.guidance.reads_attention

    def pick(self, logits: Tensor, stream: int, cell: int, step: int, attention: Tensor | None) -> Tensor:
        """Choose the codes of a cell.

        logits: [B, K], or with guidance conditional rows before unconditional ones [2B, K]; step: of the trunk;
        attention: to the class token, of the same rows, where the schedule reads it.  Returns codes of the same rows.
        """
        logits = logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = self.guide(conditional, unconditional, stream, step, attention)
        codes = pick_codes(logits, self.uniforms[:, stream, cell], self.temperature[stream], self.top_k[stream],
                           self.top_p[stream])
        return torch.cat([codes, codes]) if self.guided else codes

    def guide(self, conditional: Tensor, unconditional: Tensor, stream: int, step: int, attention: Tensor | None) -> Tensor:
        """Mix the two branches [B, K] with the scale of this step and stream; attention: [2B] or None."""
        if -1 < self.options.cfg_interval < step - 1:  # LlamaGen counts from the second token on
            return conditional
        a = 0.0 if attention is None else attention[: len(conditional), None]      # [B, 1]
        return guide(conditional, unconditional, self.scale(stream, step, a))

    def scale(self, stream: int, step: int, attention: Scale) -> Scale:
        """The guidance scale of a trunk step, a number or of the shape of `attention`, that of the conditional rows."""
        start, end = self.ranges[stream]
        progress = self.guidance.progress(step, self.steps)
        return self.guidance.scale(start, end, progress, attention, self.options.cfg_attention_weight)


@dataclass
class Decoding:
    """One decoding under way: all of its state, owned by the caller of `decode_step`."""

    sampler: Sampler
    cache: KVCache
    state: DecodeState
    x: Tensor  # the next trunk input [B, D], or conditional rows before unconditional ones [2B, D]


def start_decoding(gpt: GPT, labels: Tensor, options: SamplingOptions, uniforms: Tensor,
                   record_attention: bool = False) -> Decoding:
    """Caches and the class token: labels [B]; uniforms [B, C, N] from `draw_uniforms`.

    record_attention: keep the attention to the class token also where the schedule does not read it.
    """
    sampler = Sampler(gpt, options, uniforms.to(labels.device))
    rows = torch.cat([labels, torch.full_like(labels, gpt.null_class)]) if sampler.guided else labels
    cache = gpt.new_cache(len(rows), record_condition=sampler.needs_attention or record_attention)
    return Decoding(sampler, cache, gpt.paradigm.new_state(len(rows)), gpt.class_token(rows))


def decode_step(gpt: GPT, decoding: Decoding) -> None:
    """Advance the trunk by one position and choose the codes it predicts."""
    step = decoding.state.step
    hidden = gpt.step(decoding.x, decoding.cache, step)
    pick = partial(decoding.sampler.pick, step=step, attention=decoding.cache.condition_weight)
    decoding.x = gpt.paradigm.decode(hidden, decoding.state, pick)


@torch.inference_mode()
def decode_steps(gpt: GPT, labels: Tensor, options: SamplingOptions, uniforms: Tensor,
                 record_attention: bool = False) -> Iterator[Decoding]:
    """`generate` step by step: the same decoding after every trunk step, for those who look at it on the way."""
    classes = gpt.config.num_classes
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels go from {int(labels.min())} to {int(labels.max())} but the GPT knows classes 0 to "
                         f"{classes - 1}.")
    decoding = start_decoding(gpt, labels, options, uniforms, record_attention)
    with packed_linears(gpt, len(decoding.x)):
        while decoding.state.step < gpt.paradigm.num_steps:
            decode_step(gpt, decoding)
            yield decoding


def generate(gpt: GPT, labels: Tensor, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """Draw one grid of codes for each label.

    labels: [B] in [0, num_classes); uniforms: [B, C, N] from `draw_uniforms`.  Returns codes [B, C, N] int64.  Raises
    ValueError for labels or options that do not fit the GPT.
    """
    *_, last = decode_steps(gpt, labels, options, uniforms)
    return last.state.codes[: len(labels)]
