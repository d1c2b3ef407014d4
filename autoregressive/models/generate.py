"""Decoding: sampling options, logit filtering, reproducible draws and the sampling loop (paper section 4.5, table 12).

Randomness is drawn ahead, one uniform number a code, from (seed, sample index) alone, and turned into codes by the
inverse of the cumulative distribution: sample i does not depend on batch size or process count.  (Matrix kernels
may differ in the last bits between batch sizes; in bfloat16 that can change a draw, so keep the batch size to reproduce.)

Errors are ValueErrors that begin with the field they are about; whoever reads a command line names the flag.
"""

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.attention import KVCache
from autoregressive.models.conditions import Given, count, each
from autoregressive.models.decode_modes import find_mode
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance import GUIDANCE, Scale, default_scale, guide
from autoregressive.models.packing import PackedLinears
from autoregressive.models.paradigms import DecodeState, Pick
from utils.config import AboveZero, Count, NonNegative, Seed, choices, interval

V = TypeVar("V")

# Codes beyond which running sums are made in two stages.  Inductor splits one longer scan of few rows between blocks that wait
# for each other, and torch 2.11 fails to write that kernel: `--decode compiled` could not draw from LlamaGen's 16,384 codes.
_LONGEST_SCAN, _GROUP = 8192, 1024


@dataclass
class SamplingOptions:
    """How codes are drawn from logits."""

    guidance: Annotated[str, choices(GUIDANCE)] = "attention"
    """Schedule of the guidance scale."""
    cfg_scale: tuple[NonNegative, ...] = ()
    """Guidance scale: one value, START END, or START END of the semantic then of the detail stream; 1: no guidance.
    Empty: what the checkpoint carries, by table 12 or LlamaGen's scales, or for shapes outside of them the nearest
    (`guidance.guidance_range`)."""
    cfg_attention_weight: NonNegative = 0.05
    """w of the attention schedules (paper 0.05, released sampler 0.1)."""
    cfg_power: AboveZero = 2.75
    """p of the power_cosine schedule (RAR: B 2.75, L 2.5, XL 1.5, XXL 1.2, with scales from 1 to 16, 15.5, 6.9 and 8)."""
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
    config, streams = gpt.config, len(gpt.config.codebook_sizes)
    values = options.cfg_scale or default_scale(gpt.provenance.gpt_model, streams, config.grid_size, config.condition)
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


def check_read(options: SamplingOptions, gpt: GPT) -> None:
    """Raise ValueError for a power or a weight that the schedule does not read; what the checkpoint carries may stay."""
    schedule, carried = GUIDANCE[options.guidance], vars(carried_sampling(gpt))
    for name, read, of in (("cfg_power", schedule.reads_power, "power_cosine"),
                           ("cfg_attention_weight", schedule.reads_weight, "attention")):
        value = getattr(options, name)
        if not read and value not in (getattr(SamplingOptions, name), carried[name]):
            raise ValueError(f"{name} {value} is of {of} guidance, not of {options.guidance}: leave it out.")


def in_groups(values: Tensor) -> Tensor:
    """Rows [B, K], with zeros behind where they do not fill the last one, in groups [B, G, _GROUP]."""
    missing = -values.shape[-1] % _GROUP
    return (F.pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, _GROUP))


def running_sums(values: Tensor) -> Tensor:
    """The sum up to and with each entry of the last dimension: [B, K] -> [B, K]."""
    if values.shape[-1] <= _LONGEST_SCAN:
        return values.cumsum(-1)
    within = in_groups(values).cumsum(-1)                                          # [B, G, _GROUP]
    before = F.pad(within[..., -1].cumsum(-1)[..., :-1], (1, 0))                   # [B, G]
    return (within + before[..., None]).flatten(-2)[..., : values.shape[-1]]


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
        before = running_sums(probabilities) - probabilities
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before > top_p), -torch.inf)
    return logits


def draw_uniforms(seed: int, samples: np.ndarray, streams: int, cells: int) -> Tensor:
    """Uniform numbers in [0, 1) of the given sample indices [B] -> float32 [B, C, N]; sample i depends on (seed, i)."""
    keys = np.stack([np.full(len(samples), seed), samples], axis=1).astype(np.uint64)
    draws = [np.random.Generator(np.random.Philox(key=key)).random((streams, cells), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(draws))


def invert(masses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find shares [B] of the sum of masses [B, K] -> running sums [B, K], targets among them [B, 1], entries [B, 1]."""
    cumulative = masses.cumsum(-1)                                                 # [B, K]
    # Scaled by the last entry, which rounding may leave beside 1, so that no draw falls behind it.
    target = shares[:, None] * cumulative[:, -1:]
    return cumulative, target, torch.searchsorted(cumulative, target, right=True).clamp_max(masses.shape[-1] - 1)


def draw_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: logits [B, K] and uniforms [B] -> codes [B]; of many codes a group, then one of it."""
    probabilities = logits.softmax(-1)                                             # [B, K]
    if probabilities.shape[-1] <= _LONGEST_SCAN:
        return invert(probabilities, uniforms)[-1][:, 0]
    groups = in_groups(probabilities)                                              # [B, G, _GROUP]
    totals = groups.sum(-1)
    cumulative, target, group = invert(totals, uniforms)
    total = totals.gather(1, group)
    share = ((target - (cumulative.gather(1, group) - total)) / total).clamp(0, 1 - 2**-24)      # [B, 1] of the group's total
    chosen = groups.gather(1, group[..., None].expand(-1, -1, _GROUP))[:, 0]       # [B, _GROUP]
    # A code that is there, whatever the logits: not a number draws the last entry of a group, which may be beyond the codes.
    return (group * _GROUP + invert(chosen, share[:, 0])[-1])[:, 0].clamp_max(logits.shape[-1] - 1)


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
        self.options, self.uniforms, self.guidance = options, uniforms, GUIDANCE[options.guidance]
        # On the device, so that a step is one function for all steps and scales; in double precision, as numbers are.
        steps = gpt.paradigm.num_steps
        progress = [self.guidance.progress(step, steps, options.cfg_power) for step in range(steps)]
        self.start, self.end, self.weight, self.progress = (                       # [C], [C], [], [M]
            torch.tensor(numbers, dtype=torch.float64).to(uniforms.device)
            for numbers in (*zip(*self.ranges), options.cfg_attention_weight, progress))
        self.guided = not self.guidance.one_is_off or any(pair != (1.0, 1.0) for pair in self.ranges)
        self.needs_attention = self.guided and self.guidance.reads_attention
        self.history = torch.zeros(len(uniforms), steps, device=uniforms.device)   # attention so far, where a schedule looks back

    def pick(self, logits: Tensor, stream: int, cell: Tensor, step: Tensor, attention: Tensor | None) -> Tensor:
        """Choose the codes of a cell [1] at a trunk step [1].

        logits: [B, K], or with guidance conditional rows before unconditional ones [2B, K]; attention: to the condition, of
        the same rows, where the schedule reads it.  Returns codes of the same rows.
        """
        logits = logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = self.guide(conditional, unconditional, stream, step, attention)
        uniforms = self.uniforms[:, stream].index_select(1, cell)[:, 0]            # [B]
        codes = pick_codes(logits, uniforms, self.temperature[stream], self.top_k[stream], self.top_p[stream])
        return torch.cat([codes, codes]) if self.guided else codes

    def guide(self, conditional: Tensor, unconditional: Tensor, stream: int, step: Tensor, attention: Tensor | None) -> Tensor:
        """Mix the two branches [B, K] with the scale of this step [1] and stream; attention: [2B] or None."""
        a = 0.0 if attention is None else attention[: len(conditional), None]      # [B, 1]
        guided = guide(conditional, unconditional, self.scale(stream, step, a))
        if self.options.cfg_interval == -1:
            return guided
        return torch.where(step <= self.options.cfg_interval + 1, guided, conditional)  # LlamaGen counts from the second token

    def scale(self, stream: int, step: Tensor, attention: Scale) -> Scale:
        """The guidance scale of a trunk step [1], a number [] or of the shape of `attention`, that of the conditional rows."""
        progress = self.progress.index_select(0, step)[0]
        if self.guidance.recall is not None and isinstance(attention, Tensor):
            self.history.index_copy_(1, step, attention.reshape(-1, 1))            # every stream writes the same
            # The low half of a number's 24 bits hardly bears on the code that it draws.
            uniform = (self.uniforms.flatten(1).index_select(1, step) * 4096).frac()   # [B, 1]
            attention = self.guidance.recall(self.history, step, uniform).view_as(attention)
        return self.guidance.scale(self.start[stream], self.end[stream], progress, attention, self.weight)


def whole_rows(gpt: GPT) -> list[int]:
    """How many rows of the grid, from the top, have all their codes after each trunk step."""
    side = gpt.config.grid_size
    missing, found = np.full(side, side * len(gpt.config.codebook_sizes)), []
    for cell, streams in zip(gpt.paradigm.cell_of.tolist(), gpt.paradigm.streams_of, strict=True):
        missing[cell // side] -= len(streams)
        found.append(int((np.append(missing, 1) > 0).argmax()))
    return found


@dataclass
class Decoding:
    """The state of one decoding, in buffers that every step overwrites in place."""

    sampler: Sampler
    cache: KVCache
    state: DecodeState
    x: Tensor     # the next trunk input [B, D], or conditional rows before unconditional ones [2B, D]
    step: Tensor  # the next trunk step [1]
    kept: Tensor | None = None  # codes that are given instead of drawn, of the rows of x [B or 2B, C, N], -1 where one is drawn


def new_decoding(gpt: GPT, options: SamplingOptions, batch: int, record_attention: bool = False, multiple: int = 1,
                 keeps: bool = False) -> Decoding:
    """Buffers for `batch` grids, which `restart` fills.

    record_attention: keep the attention to the condition also where the schedule does not read it; multiple: what the
    length of the cache is rounded up to; keeps: whether some codes will be given.
    """
    device, config = gpt.rotary.device, gpt.config
    sampler = Sampler(gpt, options, torch.zeros(batch, len(config.codebook_sizes), config.cells, device=device))
    rows = 2 * batch if sampler.guided else batch
    cache = gpt.new_cache(rows, sampler.needs_attention or record_attention, multiple)
    x = gpt.paradigm.norm.weight.new_zeros(rows, config.dim)
    state, step = gpt.paradigm.new_state(rows), torch.zeros(1, dtype=torch.long, device=device)
    return Decoding(sampler, cache, state, x, step, torch.full_like(state.codes, -1) if keeps else None)


def with_unconditional(gpt: GPT, given: Given) -> Given:
    """The rows of guidance: those of a condition of B samples, then the unconditional ones of the same samples."""
    return each(lambda *parts: torch.cat(parts), given, gpt.condition.unconditional(given))


def restart(gpt: GPT, decoding: Decoding, given: Given, uniforms: Tensor, kept: Tensor | None = None) -> None:
    """Begin grids of another condition: labels [B] or captions, on any device; uniforms [B, C, N] from `draw_uniforms`; kept:
    codes that are given [B, C, N], for a decoding that keeps some.

    What stands in front of the last position of a caption is written to the cache here, once, in a pass that no mode compiles.
    """
    given = each(lambda part: part.to(decoding.x.device), given)
    decoding.x.copy_(gpt.begin(with_unconditional(gpt, given) if decoding.sampler.guided else given, decoding.cache))
    decoding.sampler.uniforms.copy_(uniforms[:, : len(gpt.config.codebook_sizes)])
    decoding.step.zero_()
    if decoding.kept is not None and kept is not None:
        decoding.kept.copy_(kept.repeat(len(decoding.kept) // len(kept), 1, 1))


def keeping(pick: Pick, kept: Tensor) -> Pick:
    """`pick`, but for cells whose code is given: kept [B, C, N], -1 where one is drawn."""
    def chosen(logits: Tensor, stream: int, cell: Tensor) -> Tensor:
        codes, given = pick(logits, stream, cell), kept[:, stream].index_select(1, cell)[:, 0]   # [B]
        return torch.where(given >= 0, given, codes)

    return chosen


def decode_step(gpt: GPT, decoding: Decoding, keys: Tensor, streams: tuple[int, ...]) -> None:
    """Advance the trunk by one position and choose the codes it predicts: a function of tensors with static shapes.

    keys: the first positions of the cache [S], which attention reads; streams: those that this step predicts.
    """
    step, paradigm = decoding.step, gpt.paradigm
    hidden = gpt.step(decoding.x, decoding.cache, step, keys)
    pick: Pick = partial(decoding.sampler.pick, step=step, attention=decoding.cache.condition_weight)
    if decoding.kept is not None:
        pick = keeping(pick, decoding.kept)
    decoding.x.copy_(paradigm.decode(hidden, paradigm.cell_of.index_select(0, step), streams, decoding.state, pick))
    step.add_(1)


class Decoder:
    """Draws batch after batch; what was allocated, compiled and captured for one serves the next of its size and options.

    mode: a row of MODES, or "auto"; record_attention: as in `new_decoding`.
    """

    def __init__(self, gpt: GPT, mode: str = "eager", record_attention: bool = False) -> None:
        self.gpt, self.device, self.record_attention = gpt, gpt.rotary.device, record_attention
        self.mode = find_mode(mode, self.device)
        self.multiple = self.mode.multiple(self.device)
        self._kind: tuple[SamplingOptions, int, bool] | None = None

    def _prepare(self, options: SamplingOptions, batch: int, keeps: bool) -> None:
        """Buffers and a step for this kind of batch, unless the last one was of the same kind."""
        if self._kind != (options, batch, keeps):
            self.decoding = new_decoding(self.gpt, options, batch, self.record_attention, self.multiple, keeps)
            self.packing = PackedLinears(self.gpt, len(self.decoding.x)).in_use if self.mode.packs else nullcontext
            self.step, self._kind = self.mode.prepare(decode_step, self.device), (replace(options), batch, keeps)

    @torch.inference_mode()
    def steps(self, given: Given, options: SamplingOptions, uniforms: Tensor,
              kept: Tensor | None = None) -> Generator[Decoding, None, None]:
        """The same decoding after every trunk step, for those who look at it on the way; see `draw`."""
        condition = self.gpt.condition
        condition.check(given)
        self._prepare(options, count(given), kept is not None)
        restart(self.gpt, self.decoding, given, uniforms, kept)
        with self.packing():
            for step, streams in enumerate(self.gpt.paradigm.streams_of):
                length = -(-(step + condition.positions) // self.multiple) * self.multiple
                self.step(self.gpt, self.decoding, self.decoding.cache.positions[:length], streams)
                yield self.decoding

    @torch.inference_mode()
    def draw(self, given: Given, options: SamplingOptions, uniforms: Tensor, kept: Tensor | None = None) -> Tensor:
        """Draw one grid of codes for each label or caption.

        given: labels [B] in [0, num_classes), or captions, features [B, P', E] and mask [B, P'], by the GPT's condition;
        uniforms: [B, C, N] from `draw_uniforms`; kept: [B, C, N] codes that are given, -1 where one is drawn; all on any
        device.  Returns codes [B, C, N] int64.  Raises ValueError for a condition or options that do not fit the GPT.
        """
        *_, last = self.steps(given, options, uniforms, kept)
        return last.state.codes[: count(given)].clone()  # the next batch overwrites them


def generate(gpt: GPT, given: Given, options: SamplingOptions, uniforms: Tensor) -> Tensor:
    """`Decoder.draw` of a single batch, eagerly."""
    return Decoder(gpt).draw(given, options, uniforms)
