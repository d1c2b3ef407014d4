"""CTF's second stage: all fine labels of a grid in one step, given its coarse labels and its class or caption (arXiv 2503.16194).

The model is `paradigms.FineLabels` on the trunk of `gpt.py` with full attention.  The paper leaves some choices open.  Here a
fine label is an index into the whole codebook, not into the cluster.  Candidates are all codes, as in the published recipe;
`fine_candidates="cluster"` keeps to the members of the coarse cluster.  The step is guided only if `fine_cfg_scale` is not 1.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from autoregressive.models.conditions import Given
from autoregressive.models.decode_modes import find_mode
from autoregressive.models.generate import pick_codes, with_unconditional
from autoregressive.models.gpt import GPT
from autoregressive.models.guidance import guide
from utils.config import Count, NonNegative, choices


@dataclass
class FineOptions:
    """How the second stage draws fine labels, where there is one."""

    fine_candidates: Annotated[str, choices(("all", "cluster"))] = "all"
    """Codes a cell may take: all, or the members of its coarse cluster."""
    fine_temperature: NonNegative = 1.0
    """Softmax temperature of fine labels; 0 takes the likeliest."""
    fine_top_k: Count = 0
    """Keep the k likeliest fine labels; 0 keeps all."""
    fine_cfg_scale: NonNegative = 1.0
    """Guidance scale of the fine step; 1: none."""


@torch.inference_mode()
def refine(gpt: GPT, given: Given, coarse: Tensor, options: FineOptions, uniforms: Tensor, coarse_of: Tensor,
           mode: str = "eager") -> Tensor:
    """Draw the fine labels of coarse grids.

    given: labels [B] or captions; coarse: [B, 1, N]; uniforms: [B, N] in [0, 1); coarse_of: coarse label of every code [K];
    mode: a row of MODES, or "auto".  Returns codes [B, 1, N] of the tokenizer.
    """
    draw = find_mode(mode, coarse.device).once(draw_fine)
    return draw(gpt, given, coarse, options, uniforms.to(coarse.device), coarse_of)


def draw_fine(gpt: GPT, given: Given, coarse: Tensor, options: FineOptions, uniforms: Tensor, coarse_of: Tensor) -> Tensor:
    """`refine` as a function of tensors on one device."""
    guided = options.fine_cfg_scale != 1
    if guided:
        rows = coarse.repeat(2, 1, 1)
        conditional, unconditional = gpt(with_unconditional(gpt, given), rows)[0].float().chunk(2)  # [B, N, K]
        logits = guide(conditional, unconditional, options.fine_cfg_scale)
    else:
        logits = gpt(given, coarse)[0].float()
    if options.fine_candidates == "cluster":
        logits = logits.masked_fill(coarse_of != coarse[:, 0, :, None], -torch.inf)
    codes = pick_codes(logits.flatten(0, 1), uniforms.flatten(), options.fine_temperature, options.fine_top_k, 1.0)  # [B N]
    return codes.view_as(coarse)
