"""Attention kernels, rotary rotation and the key-value cache, shared by trunk and head.

The cache is an argument owned by the caller; modules keep no generation state.  Scaled-dot-product attention serves
the trunk; the head's three slots are cheaper as plain arithmetic (`short_causal_attention`), because a general kernel
pays its set-up once for each of B · N tiny sequences.

While decoding, all shapes are static and places are tensors, so that one compiled function, or one captured CUDA graph,
serves many positions.  The keys that attention reads go a little further than those that are written; a mask hides the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# (q [B, H, T, E], k [B, H, S, E], v [B, H, S, E]), and where a span has one its mask -> [B, H, T, E].
Attend = Callable[..., Tensor]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate consecutive pairs of x [..., T, E] by rotary [T, E/2, 2] (cosine, sine), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., T, E/2]
    cos, sin = rotary.float().unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of T new positions: causal when they are the whole sequence, or under a mask, which then says all.

    q: [B, H, T, E]; k, v: [B, H, S, E] with S = T, or T = 1 and a mask; mask: bool or added to the scores, [B or 1, 1, T, S].
    Returns [B, H, T, E].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of all positions to all that a mask [B, 1, T, T] leaves: q, k, v [B, H, T, E] -> [B, H, T, E]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_mask(visible: Tensor, length: int, causal: bool) -> Tensor:
    """What each of `length` positions attends to, where some of the first are hidden: bool [B, 1, T, T].

    visible: bool [B, P] of the first P positions.  Every position sees itself, hidden ones too: a softmax needs something.
    """
    seen = F.pad(visible, (0, length - visible.shape[1]), value=True)[:, None, None]  # [B, 1, 1, T]
    square = torch.ones(length, length, dtype=torch.bool, device=visible.device)
    return (seen & square.tril() if causal else seen) | torch.eye(length, dtype=torch.bool, device=visible.device)


def as_scores(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a bool mask hides, else 0: what is added to scores."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def short_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over a handful of slots as elementwise products; the queries are those of the last T slots.

    q: [M, H, T, E]; k, v: [M, H, S, E], S >= T.  Returns [M, H, T, E].
    """
    first, scale = k.shape[2] - q.shape[2], q.shape[-1] ** -0.5
    rows = []
    for row in range(q.shape[2]):
        seen = first + row + 1
        if seen == 1:
            rows.append(v[:, :, 0])  # one key: the softmax is 1
            continue
        scores = (q[:, :, row, None] * k[:, :, :seen]).sum(-1) * scale               # [M, H, seen]
        weights = scores.float().softmax(-1).type_as(v)
        rows.append((weights[..., None] * v[:, :, :seen]).sum(2))                    # [M, H, E]
    return torch.stack(rows, dim=2)


class Span(NamedTuple):
    """The new positions of a cached sequence, and what they attend to."""

    positions: Tensor           # [T] int64, where their keys and values are written
    length: int                 # cached positions that are read, from the first on
    mask: Tensor | None = None  # [B or 1, 1, T, length], added to the scores: -inf for what is hidden; None: nothing is


class LayerCache:
    """Keys and values of one layer, allocated once and written in place."""

    condition_weight: Tensor | None = None  # [B], where it is recorded

    def __init__(self, keys: Tensor, values: Tensor, condition: int) -> None:
        """condition: leading positions whose attention is recorded."""
        self.keys, self.values, self.condition = keys, values, condition

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        """Write k, v [B, H, T, E] where the span says, and attend from q to all that it reads: -> [B, H, T, E]."""
        self.keys.index_copy_(2, span.positions, k)
        self.values.index_copy_(2, span.positions, v)
        k, v = self.keys[:, :, : span.length], self.values[:, :, : span.length]
        if span.mask is None:
            return kernel(q, k, v)
        if self.condition_weight is not None:
            self.condition_weight.copy_(self._weight_of_condition(q, k, span.mask))
        return kernel(q, k, v, span.mask)

    def _weight_of_condition(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """The newest position's attention to all visible positions of the condition, averaged over heads [B]."""
        scores = (q[:, :, -1:] @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5    # [B, H, 1, S]
        return (scores + mask[:, :, -1:]).softmax(-1)[:, :, 0, : self.condition].sum(-1).mean(1)


class KVCache:
    """The caches of all layers, for `batch` rows and at most `length` positions."""

    hidden: Tensor | None = None  # [B, length], positions that later ones do not attend to; None: there are none

    def __init__(self, n_layer: int, batch: int, n_head: int, length: int, head_dim: int,
                 device: torch.device, dtype: torch.dtype, condition: int = 0, hides: bool = False) -> None:
        """condition: leading positions the last layer's attention to which is recorded; hides: whether some may be hidden."""
        storage = torch.zeros(n_layer, 2, batch, n_head, length, head_dim, device=device, dtype=dtype)
        self.layers = [LayerCache(keys, values, condition) for keys, values in storage]
        self.positions = torch.arange(length, device=device)
        if condition:
            self.layers[-1].condition_weight = torch.zeros(batch, device=device)
        if hides:
            self.hidden = torch.zeros(batch, length, dtype=torch.bool, device=device)

    @property
    def condition_weight(self) -> Tensor | None:
        """The last layer's attention to the condition at the newest position [B], if recorded."""
        return self.layers[-1].condition_weight

    def step_mask(self, position: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """What the newest position [1] attends to among the first S keys, added to scores [B or 1, 1, 1, S]."""
        hidden = keys > position                                                   # [S]
        if self.hidden is not None:
            hidden = (hidden | self.hidden[:, : len(keys)]) & (keys != position)   # [B, S]; a position sees itself
        return as_scores(hidden, dtype).view(-1, 1, 1, len(keys))
