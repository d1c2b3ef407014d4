"""The parts that trunk and local-context head share: the configuration, the rotary table, and the transformer layer.

LlamaGen's layer: RMSNorm before attention and SwiGLU, two-dimensional rotary embedding (paper section 4.3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.attention import Attend, LayerCache, Span, causal_attention, rotate
from utils.config import interval

# (layer, arguments of its forward ...) -> its output, with activation checkpointing where wanted.
RunBlock = Callable[..., Tensor]


@dataclass
class GPTConfig:
    """Everything that fixes the shape and the function of a GPT; saved with every checkpoint."""

    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    head_layers: int = 5
    num_classes: int = 1000
    grid_size: Annotated[int, interval(int, 1, 512)] = 16
    codebook_sizes: tuple[int, ...] = (256, 4096)
    paradigm: str = "hierarchical"
    context: Literal["compressed", "concatenated", "none"] = "compressed"
    window_size: int = 5
    token_dropout: float = 0.1
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1
    class_dropout: float = 0.1
    rotary: Literal["grid", "repeated"] = "grid"
    head_rotary: Literal["none", "zero_summary"] = "none"
    order: Literal["raster", "random"] = "raster"
    rotary_base: float = 10_000.0
    ffn_multiple_of: int = 256
    norm_eps: float = 1e-5
    qk_norm: bool = False
    head_width: int = 0
    condition: Literal["class", "text"] = "class"
    caption_length: Annotated[int, interval(int, 2, 4096)] = 120
    caption_dim: Annotated[int, interval(int, 1, 65_536)] = 2048
    caption_rotary: Literal["identity", "zero"] = "identity"

    @property
    def cells(self) -> int:
        """Number of grid cells N."""
        return self.grid_size**2


def rotary_table(grid_size: int, head_dim: int, base: float) -> Tensor:
    """Two-dimensional rotary table: half of the pairs turn with the row, half with the column.

    Returns [grid_size², head_dim / 2, 2] (cosine, sine) in raster order; head_dim must be a multiple of 4.
    """
    frequencies = base ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))  # [head_dim / 4]
    angles = torch.arange(grid_size).float()[:, None] * frequencies                       # [g, head_dim / 4]
    rows = angles[:, None].expand(-1, grid_size, -1)
    columns = angles[None].expand(grid_size, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)                             # [g², head_dim / 2]
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


class FeedForward(nn.Module):
    """SwiGLU, hidden width 2/3 · 4 · dim rounded up to `ffn_multiple_of`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        multiple = config.ffn_multiple_of
        hidden = (8 * config.dim // 3 + multiple - 1) // multiple * multiple
        self.w1 = nn.Linear(config.dim, hidden, bias=False)
        self.w3 = nn.Linear(config.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Norm(nn.RMSNorm):
    """RMSNorm in the precision of what it is given: queries and keys keep the values' type, and one kernel does it, which torch
    has for input and weights of one type alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps).type_as(x)


class Attention(nn.Module):
    """Multi-head projections; the attention kernel itself is handed in.

    With `qk_norm`, queries and keys are normalised before they are rotated, each with weights of its own, as in ViT-22B
    (arXiv 2302.05442, there by LayerNorm): scores stay bounded however large the projections grow.  Not of the paper.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.resid_dropout)
        head_dim = config.dim // config.n_head
        self.qk_norms = nn.ModuleList(Norm(head_dim, config.norm_eps) for _ in range(2)) if config.qk_norm else None

    def project(self, x: Tensor, rotary: Tensor | None, skip: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> keys and values [B, H, T, D/H] and the queries of all but the first `skip` positions."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, D/H]
        qk = qkv[:2] if self.qk_norms is None else torch.stack([norm(x) for norm, x in zip(self.qk_norms, qkv)])
        q, k = qk if rotary is None else rotate(qk, rotary)
        return q[:, :, skip:], k, qkv[2]

    def combine(self, heads: Tensor) -> Tensor:
        """[B, H, T, D/H] -> [B, T, D]."""
        return self.dropout(self.wo(heads.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm transformer layer; trunk and head layers are the same, with different attention kernels."""

    def __init__(self, config: GPTConfig, attend: Attend = causal_attention) -> None:
        super().__init__()
        self.attention_norm = Norm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = Norm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.attend = attend

    def forward(self, x: Tensor, rotary: Tensor | None, cache: LayerCache | None = None, span: Span | None = None,
                skip: int = 0, mask: Tensor | None = None) -> Tensor:
        """One layer over T new positions.

        x: [B, T, D]; rotary: rows of these positions [T, D/H/2, 2], those of each sample [B, 1, T, D/H/2, 2], or None; cache,
        span: this layer's LayerCache and where the positions stand in it; skip: leading positions that only serve as keys; mask:
        what each position attends to [B, 1, T, T], where a whole sequence is not simply causal.  Returns [B, T - skip, D].
        """
        q, k, v = self.attention.project(self.attention_norm(x), rotary, skip)
        if cache is not None and span is not None:
            heads = cache.attend(self.attend, q, k, v, span)
        else:
            heads = self.attend(q, k, v) if mask is None else self.attend(q, k, v, mask)
        x = x[:, skip:] + self.attention.combine(heads)
        return x + self.feed_forward(self.ffn_norm(x))
