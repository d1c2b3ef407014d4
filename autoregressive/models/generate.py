"""Decoding: guidance schedules, logit filtering, reproducible draws and the sampling loop (paper section 4.5, table 12).

Guided logits are l_u + s (l_c - l_u). The scale s of trunk step i of M comes from one row of `GUIDANCE`:

    constant      s = start
    progressive   s = start + (end - start) i/(M-1)
    attention     s = start + (end - start) (i/(M-1) + w a_i)      the released formula, which gave the published numbers
    equation18    s = (start + (end - start) i/M) a_i              the paper as printed (equations 16 to 18)

a_i is the last trunk layer's attention to the class token, averaged over heads, on the conditional branch.

Randomness is drawn ahead, one uniform number a code, from (seed, sample index) alone, and turned into codes by the
inverse of the cumulative distribution: sample i does not depend on batch size or process count. (Matrix kernels
may differ in the last bits between batch sizes; in bfloat16 that can tip a draw, so keep the batch size to reproduce.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.attention import KVCache
from autoregressive.models.gpt import GPT
from autoregressive.models.packing import packed_linears
from autoregressive.models.paradigms import DecodeState
from utils.config import UserError

Scale = Tensor | float

class Guidance(NamedTuple):
    """A schedule of the guidance scale."""

    scale: Callable[[float, float, int, int, Tensor | None, float], Scale]
    """(start, end, step i, steps M, attention a [B, 1], attention weight w) -> scale, a number or [B, 1]."""
    reads_attention: bool = False
    """Whether a is needed; it is None otherwise."""
    one_is_off: bool = True
    """Whether start = end = 1 is the conditional model, so that the unconditional rows need not be computed."""


GUIDANCE: dict[str, Guidance] = {
    "constant": Guidance(lambda start, end, i, steps, a, w: start),
    "progressive": Guidance(lambda start, end, i, steps, a, w: start + (end - start) * (i / max(steps - 1, 1))),
    "attention": Guidance(lambda start, end, i, steps, a, w: start + (end - start) * (i / max(steps - 1, 1) + w * a),
                          reads_attention=True),
    "equation18": Guidance(lambda start, end, i, steps, a, w: (start + (end - start) * (i / steps)) * a,
                           reads_attention=True, one_is_off=False),
}

# Guidance (start, end) by number of codebooks, size and grid.  Two codebooks: table 12, with the FID published in table 3
# (24x24: 300 epochs; 16x16: B, L 300, XL, XXL 50).  One codebook: LlamaGen's constant scales, the same for both grids.
CFG_RANGES: dict[tuple[int, str, int], tuple[float, float]] = {
    (2, "GPT-B", 16): (1.75, 2.5),     # FID 4.06
    (2, "GPT-L", 16): (1.4, 2.5),      # FID 2.57
    (2, "GPT-XL", 16): (1.25, 3.0),    # FID 2.64
    (2, "GPT-XXL", 16): (1.25, 3.0),   # FID 2.30
    (2, "GPT-B", 24): (1.75, 3.0),     # FID 4.80
    (2, "GPT-L", 24): (1.4, 2.5),      # FID 2.76
    (2, "GPT-XL", 24): (1.35, 3.0),    # FID 2.10
    (2, "GPT-XXL", 24): (1.4, 3.15),   # FID 1.76
    (2, "GPT-tiny", 4): (2.0, 4.0),    # quickstart
} | {(1, name, grid): (scale, scale) for grid in (16, 24) for name, scale in
     (("GPT-B", 2.0), ("GPT-L", 2.0), ("GPT-XL", 1.75), ("GPT-XXL", 1.75), ("GPT-3B", 1.65))}


def sampling_preset(gpt_model: str, streams: int, grid_size: int) -> dict[str, Any]:
    """Fields of SamplingOptions that a checkpoint carries, so that sampling from it needs no flags.

    gpt_model: size of the table; streams: number of codebooks.  Empty for a size without a published range.
    """
    if (streams, gpt_model, grid_size) not in CFG_RANGES:
        return {}
    start, end = CFG_RANGES[streams, gpt_model, grid_size]
    if start == end:
        return {"guidance": "constant", "cfg_scale": [start], "cfg_interval": -1}
    return {"guidance": "attention", "cfg_scale": [start, end], "cfg_attention_weight": 0.05}


@dataclass
class SamplingOptions:
    """How codes are drawn from logits."""

    guidance: Literal["constant", "progressive", "attention", "equation18"] = "attention"
    """Schedule of the guidance scale."""
    cfg_scale: tuple[float, ...] = ()
    """Guidance scale: one value, START END, or START END of the semantic then of the detail stream; 1: no guidance.
    Empty: what the checkpoint carries, by table 12 or LlamaGen's scales."""
    cfg_attention_weight: float = 0.05
    """w of the attention schedule (released range 0.05 to 0.1)."""
    cfg_interval: int = -1
    """Guide trunk steps 0 to this plus one only, as LlamaGen counts; -1 guides all."""
    temperature: tuple[float, ...] = (1.0,)
    """Softmax temperature, one value or one per stream; 0 takes the likeliest code."""
    top_k: tuple[int, ...] = (0,)
    """Keep the k likeliest codes, one value or one per stream; 0 keeps all."""
    top_p: tuple[float, ...] = (1.0,)
    """Keep the likeliest codes of total probability p, one value or one per stream."""
    seed: int = 0
    """Sample i is a function of (seed, i) alone."""


def carried_fields(sampling: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingOptions from what a checkpoint carries as JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in sampling.items()}


def carried_sampling(gpt: GPT) -> SamplingOptions:
    """The sampling options that a loaded checkpoint carries; defaults where it says nothing."""
    return SamplingOptions(**carried_fields(gpt.provenance.sampling))


def per_stream(values: tuple, streams: int, option: str) -> tuple:
    """Repeat one value for all streams; raises UserError when the count fits neither one nor `streams`."""
    if len(values) not in (1, streams):
        raise UserError(f"{option} has {len(values)} values: give one, or one for each of the {streams} code streams.")
    return values * streams if len(values) == 1 else values


def cfg_ranges(options: SamplingOptions, gpt: GPT) -> list[tuple[float, float]]:
    """The guidance (start, end) of every stream; raises UserError for a range that is upside down or incomplete."""
    streams, values = len(gpt.config.codebook_sizes), options.cfg_scale
    if not values:
        key = streams, gpt.provenance.gpt_model, gpt.config.grid_size
        if key not in CFG_RANGES:
            raise UserError(f"--cfg-scale is empty and no range is published for {key[1]} on a {key[2]}x{key[2]} grid: "
                            "give --cfg-scale START END.")
        values = CFG_RANGES[key]
    if len(values) not in (1, 2, 2 * streams):
        raise UserError(f"--cfg-scale has {len(values)} values: give one, START END, or START END for each stream.")
    values = values * 2 if len(values) == 1 else values
    values = values * streams if len(values) == 2 else values
    ranges = [(values[2 * stream], values[2 * stream + 1]) for stream in range(streams)]
    for start, end in ranges:
        if start > end or start < 0:
            raise UserError(f"--cfg-scale {start} {end} is upside down: give START END with 0 <= START <= END.")
        if options.guidance == "constant" and start != end:
            raise UserError(f"--cfg-scale {start} {end} is a range but --guidance constant takes one value: "
                            "give one value or use --guidance progressive.")
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
    """The `pick` of one decoding: guidance, filtering and the draw, all on the device."""

    def __init__(self, gpt: GPT, options: SamplingOptions, uniforms: Tensor) -> None:
        streams = len(gpt.config.codebook_sizes)
        self.ranges = cfg_ranges(options, gpt)
        self.temperature = per_stream(options.temperature, streams, "--temperature")
        self.top_k = per_stream(options.top_k, streams, "--top-k")
        self.top_p = per_stream(options.top_p, streams, "--top-p")
        self.options, self.uniforms, self.steps = options, uniforms, gpt.paradigm.num_steps
        self.guidance = GUIDANCE[options.guidance]
        self.guided = not self.guidance.one_is_off or any(pair != (1.0, 1.0) for pair in self.ranges)
        self.needs_attention = self.guided and self.guidance.reads_attention
        self.step, self.attention, self.drawn = 0, None, [0] * streams

    def begin(self, step: int, attention: Tensor | None) -> None:
        """Take note of the trunk step and, where the schedule asks, its attention to the class token [2B]."""
        self.step = step
        if attention is not None:
            self.attention = attention[: len(self.uniforms), None]                 # [B, 1]

    def __call__(self, logits: Tensor, stream: int) -> Tensor:
        """Logits [B, K], or conditional rows before unconditional ones [2B, K] -> codes for the same rows."""
        logits = logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = self.guide(conditional, unconditional, stream)
        uniforms = self.uniforms[:, stream, self.drawn[stream]]
        self.drawn[stream] += 1
        codes = pick_codes(logits, uniforms, self.temperature[stream], self.top_k[stream], self.top_p[stream])
        return torch.cat([codes, codes]) if self.guided else codes

    def guide(self, conditional: Tensor, unconditional: Tensor, stream: int) -> Tensor:
        """Mix the two branches [B, K] with the scale of this step and stream."""
        if -1 < self.options.cfg_interval < self.step - 1:  # LlamaGen counts from the second token on
            return conditional
        start, end = self.ranges[stream]
        scale = self.guidance.scale(start, end, self.step, self.steps, self.attention, self.options.cfg_attention_weight)
        return unconditional + scale * (conditional - unconditional)


@dataclass
class Decoding:
    """One decoding under way: all of its state, owned by the caller of `decode_step`."""

    sampler: Sampler
    cache: KVCache
    state: DecodeState
    x: Tensor  # the next trunk input [B, D], or conditional rows before unconditional ones [2B, D]


def start_decoding(gpt: GPT, labels: Tensor, options: SamplingOptions, uniforms: Tensor) -> Decoding:
    """Caches and the class token: labels [B]; uniforms [B, C, N] from `draw_uniforms`."""
    sampler = Sampler(gpt, options, uniforms.to(labels.device))
    rows = torch.cat([labels, torch.full_like(labels, gpt.null_class)]) if sampler.guided else labels
    cache = gpt.new_cache(len(rows), record_condition=sampler.needs_attention)
    return Decoding(sampler, cache, gpt.paradigm.new_state(len(rows)), gpt.class_token(rows))


def decode_step(gpt: GPT, decoding: Decoding, step: int) -> None:
    """Advance the trunk by one position and choose the codes it predicts."""
    hidden = gpt.step(decoding.x, decoding.cache, step)
    decoding.sampler.begin(step, decoding.cache.condition_weight)
    decoding.x = gpt.paradigm.decode(hidden, decoding.state, decoding.sampler)


@torch.inference_mode()
def generate(gpt: GPT, labels: Tensor, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """Draw one grid of codes for each label.

    labels: [B] in [0, num_classes); uniforms: [B, C, N] from `draw_uniforms`.  Returns codes [B, C, N] int64.
    """
    decoding = start_decoding(gpt, labels, options, uniforms)
    with packed_linears(gpt, len(decoding.x)):
        for step in range(decoding.sampler.steps):
            decode_step(gpt, decoding, step)
    return decoding.state.codes[: len(labels)]
