"""Classifier-free guidance: schedules of the scale, and the published ranges (paper section 4.5, tables 8, 9 and 12).

Guided logits are l_u + s (l_c - l_u).  `GUIDANCE` has a row for each schedule of the scale s over the trunk steps i of M:

    constant      s = start
    progressive   s = start + (end - start) i/(M-1)
    attention     s = start + (end - start) (i/(M-1) + w a_i)      the released formula, which gave the published numbers
    equation18    s = (start + (end - start) i/M) a_i              the paper as printed (equations 16 to 18)

a_i is the last trunk layer's attention to the class token, averaged over heads, on the conditional branch.  Where a caption
stands in its place, a_i is the attention's mass on all of its words (its visible positions), which is 1 at step 0 too.

Not of the paper:

    power_cosine          s = start + (end - start) (1 - cos(pi (i/M)^p)) / 2         MDT's, which RAR samples with from start 1
    reversed              s = end - (end - start) i/(M-1)
    equation18_rescaled   equation 18 with a_i over its mean over the sample's steps so far
    attention_shuffled    the released formula with a_j of a random step j of the sample's own past

The last two leave out step 0, which has nothing but the condition to attend to: a_0 is 1 whatever the model.  The rescaled
a_i is 1 on average where attention has no trend, so that the paper's ranges mean the same scales; where a_i falls along the grid
it is below 1.  The shuffled one says whether it matters where attention is high: a sample depends on itself alone, not on its
batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scale = Tensor | float


def guide(conditional: Tensor, unconditional: Tensor, scale: Scale) -> Tensor:
    """Guided logits [..., K] of both branches [..., K]."""
    return unconditional + scale * (conditional - unconditional)


def constant(start: Scale, end: Scale, progress: Scale, attention: Scale, weight: Scale) -> Scale:
    """The same scale at every step (LlamaGen)."""
    return start


def progressive(start: Scale, end: Scale, progress: Scale, attention: Scale, weight: Scale) -> Scale:
    """A scale that grows linearly with the step (equation 16)."""
    return start + (end - start) * progress


def progressive_attention(start: Scale, end: Scale, progress: Scale, attention: Scale, weight: Scale) -> Scale:
    """The released formula: attention to the class adds to the progress."""
    return start + (end - start) * (progress + weight * attention)


def equation18(start: Scale, end: Scale, progress: Scale, attention: Scale, weight: Scale) -> Scale:
    """Equation 18 as printed: attention to the class multiplies the scale."""
    return (start + (end - start) * progress) * attention


def linear(progress: float, power: float) -> float:
    """Progress as it is."""
    return progress


def falling(progress: float, power: float) -> float:
    """From 1 to 0 instead of 0 to 1."""
    return 1 - progress


def power_cosine(progress: float, power: float) -> float:
    """Half a cosine wave over progress^power: flat at both ends, and late for a power above 1."""
    return (1 - math.cos(math.pi * progress**power)) / 2


def past_steps(history: Tensor, step: Tensor) -> Tensor:
    """Which steps of a history [B, M] are behind, `step` [1] among them, and say something: bool [M], 1 to step, or 0 alone."""
    steps = torch.arange(history.shape[1], device=history.device)
    return (steps >= step.clamp_max(1)) & (steps <= step)


def relative_attention(history: Tensor, step: Tensor, uniform: Tensor) -> Tensor:
    """a_i over its mean so far: history [B, M] up to `step` [1] -> [B, 1]."""
    past = past_steps(history, step)
    mean = torch.where(past, history, 0).sum(1, keepdim=True) / past.sum()         # [B, 1]; later entries are an old batch's
    return history.index_select(1, step) / mean.clamp_min(1e-12)                   # 0 / 0 would spoil every logit


def shuffled_attention(history: Tensor, step: Tensor, uniform: Tensor) -> Tensor:
    """a_j of a random step j from 1 to `step` [1]: history [B, M], uniform [B, 1] in [0, 1) -> [B, 1]."""
    first = step.clamp_max(1)
    return history.gather(1, first + (uniform * (step + 1 - first)).long())


class Guidance(NamedTuple):
    """A schedule of the guidance scale."""

    scale: Callable[[Scale, Scale, Scale, Scale, Scale], Scale]
    """(start, end, progress, attention a [B, 1], attention weight w), numbers or [] but for a -> scale, [] or [B, 1]."""
    reads_attention: bool = False
    """Whether a is needed; it is 0 otherwise."""
    reaches_end: bool = True
    """Whether progress is i/(M-1), which is 1 at the last step, or i/M."""
    one_is_off: bool = True
    """Whether start = end = 1 is the conditional model, so that the unconditional rows need not be computed."""

    shape: Callable[[float, float], float] = linear
    """(progress, power p) -> the progress that `scale` is given, from 0 to 1."""
    reads_power: bool = False
    """Whether p is needed."""
    recall: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(attention of all steps [B, M], known up to the step [1]; a uniform number of the step [B, 1]) -> the a [B, 1] that `scale`
    is given; None: the step's own."""
    reads_weight: bool = False
    """Whether w is needed."""

    def progress(self, step: int, steps: int, power: float) -> float:
        """How far `step` is, counted from 0, of `steps`, in the schedule's shape."""
        return self.shape(step / max(steps - 1, 1) if self.reaches_end else step / steps, power)


GUIDANCE: dict[str, Guidance] = {
    "constant": Guidance(constant),
    "progressive": Guidance(progressive),
    "attention": Guidance(progressive_attention, reads_attention=True, reads_weight=True),
    "equation18": Guidance(equation18, reads_attention=True, reaches_end=False, one_is_off=False),
    # Not of the paper.
    "power_cosine": Guidance(progressive, reaches_end=False, shape=power_cosine, reads_power=True),
    "reversed": Guidance(progressive, shape=falling),
    "equation18_rescaled": Guidance(equation18, reads_attention=True, reaches_end=False, one_is_off=False,
                                    recall=relative_attention),
    "attention_shuffled": Guidance(progressive_attention, reads_attention=True, recall=shuffled_attention, reads_weight=True),
}

# Guidance (start, end) by number of codebooks, size and side of the grid.
CFG_RANGES: dict[tuple[int, str, int], tuple[float, float]] = {
    # IAR2: table 12, with the FID of table 3 (24x24: 300 epochs; 16x16: B and L 300, XL and XXL 50).
    (2, "GPT-B", 16): (1.75, 2.5),     # FID 4.06
    (2, "GPT-L", 16): (1.4, 2.5),      # FID 2.57
    (2, "GPT-XL", 16): (1.25, 3.0),    # FID 2.64
    (2, "GPT-XXL", 16): (1.25, 3.0),   # FID 2.30
    (2, "GPT-B", 24): (1.75, 3.0),     # FID 4.80
    (2, "GPT-L", 24): (1.4, 2.5),      # FID 2.76
    (2, "GPT-XL", 24): (1.35, 3.0),    # FID 2.10
    (2, "GPT-XXL", 24): (1.4, 3.15),   # FID 1.76
    # LlamaGen: constant scales.
    (1, "GPT-B", 16): (2.0, 2.0),
    (1, "GPT-L", 16): (2.0, 2.0),
    (1, "GPT-XL", 16): (1.75, 1.75),
    (1, "GPT-XXL", 16): (1.75, 1.75),
    (1, "GPT-3B", 16): (1.65, 1.65),
    (1, "GPT-B", 24): (2.0, 2.0),
    (1, "GPT-L", 24): (2.0, 2.0),
    (1, "GPT-XL", 24): (1.75, 1.75),
    (1, "GPT-XXL", 24): (1.75, 1.75),
    (1, "GPT-3B", 24): (1.65, 1.65),
}

# Sizes that take XXL's rows where they have none of their own, here and among the recipes.
LARGER = ("GPT-3B", "GPT-XXXL")
# By number of codebooks, for the sizes below B.  Measured on GPT-tiny (README): more samples are of their class than with B's
# scales, at Fréchet distances that two seeds do not tell apart.
UNPUBLISHED: dict[int, tuple[float, float]] = {1: (3.0, 3.0), 2: (2.0, 4.0)}

# LlamaGen's sampling from captions.  Nothing is published for two codebooks, which start from the same.
TEXT_SAMPLING: dict[str, Any] = {"guidance": "constant", "cfg_scale": [7.5], "cfg_interval": -1, "top_k": [1000]}

# w of the attention schedule: the paper's text, and the released sampler.
ATTENTION_WEIGHT = {"paper": 0.05, "released": 0.1, "beyond": 0.05}


def guidance_range(gpt_model: str, streams: int, grid_size: int) -> tuple[float, float]:
    """Guidance (start, end) of a GPT of any shape: the published one; for another grid that of the same size on the nearest
    grid, the smaller of two; for sizes beyond XXL that of XXL; for other sizes that of UNPUBLISHED."""
    for name in (gpt_model, *(("GPT-XXL",) if gpt_model in LARGER else ())):
        rows = [(abs(grid - grid_size), grid, found) for (codebooks, size, grid), found in CFG_RANGES.items()
                if (codebooks, size) == (streams, name)]
        if rows:
            return min(rows)[-1]
    return UNPUBLISHED[min(streams, 2)]


def default_scale(gpt_model: str, streams: int, grid_size: int, condition: str) -> tuple[float, ...]:
    """`cfg_scale` of a GPT where neither the caller nor a checkpoint says it; arguments as for `sampling_preset`."""
    return guidance_range(gpt_model, streams, grid_size) if condition == "class" else tuple(TEXT_SAMPLING["cfg_scale"])


def sampling_preset(gpt_model: str, streams: int, grid_size: int, recipe: str = "paper",
                    condition: str = "class") -> dict[str, Any]:
    """Fields of SamplingOptions that a checkpoint carries, so that sampling from it needs no flags.

    gpt_model: size of the table; streams: number of codebooks; recipe: of ATTENTION_WEIGHT; condition: of CONDITIONS.
    """
    if condition == "text":
        return TEXT_SAMPLING
    start, end = guidance_range(gpt_model, streams, grid_size)
    if start == end:
        return {"guidance": "constant", "cfg_scale": [start], "cfg_interval": -1}
    return {"guidance": "attention", "cfg_scale": [start, end], "cfg_attention_weight": ATTENTION_WEIGHT[recipe]}
