"""The class-conditional GPT: trunk, rotary table, caches, and the table of sizes.

Paper sections 4.3 and 5.1; the trunk is LlamaGen's (RMSNorm, SwiGLU, two-dimensional rotary embedding, a class token in
front).  What a trunk step reads and predicts belongs to the prediction paradigm (`paradigms.py`), which `GPT` looks up
once.  One implementation trains and decodes: `forward` teacher-forces a whole grid, `step` advances one trunk position
with a cache that the caller owns.

Deviations from the release: every cell has its own rotary row (`rotary="repeated"` restores the released table) and the
head's slots are not rotated (`head_rotary="zero_summary"` restores the released zero row for the summary).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoregressive.models.attention import KVCache, causal_attention, rotate


@dataclass
class GPTConfig:
    """Everything that fixes the shape and the function of a GPT; saved with every checkpoint."""

    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    head_layers: int = 5
    num_classes: int = 1000
    grid_size: int = 16
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
    rotary_base: float = 10_000.0
    ffn_multiple_of: int = 256
    norm_eps: float = 1e-5

    @property
    def cells(self) -> int:
        """Number of grid cells N."""
        return self.grid_size**2


# Shapes of the paper's section 5.1 and LlamaGen's larger models; parameters of IAR2 on a 24x24 grid, 1000 classes.
GPT_models: dict[str, dict[str, int]] = {
    "GPT-tiny": dict(n_layer=4, dim=128, n_head=4, head_layers=2, ffn_multiple_of=64),  # quickstart
    "GPT-small": dict(n_layer=8, dim=384, n_head=6, head_layers=3),                     # 32-pixel images
    "GPT-B": dict(n_layer=12, dim=768, n_head=12, head_layers=5),     # 143M
    "GPT-L": dict(n_layer=24, dim=1024, n_head=16, head_layers=5),    # 408M
    "GPT-XL": dict(n_layer=36, dim=1280, n_head=20, head_layers=5),   # 884M
    "GPT-XXL": dict(n_layer=48, dim=1536, n_head=24, head_layers=5),  # 1.6B
    "GPT-3B": dict(n_layer=24, dim=3200, n_head=32, head_layers=5),
    "GPT-XXXL": dict(n_layer=48, dim=2560, n_head=40, head_layers=5),
}


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


class Attention(nn.Module):
    """Multi-head projections; the attention kernel itself is handed in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.resid_dropout)

    def project(self, x: Tensor, rotary: Tensor | None, skip: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> keys and values [B, H, T, D/H] and the queries of all but the first `skip` positions."""
        qkv = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, D/H]
        q, k = qkv[:2] if rotary is None else rotate(qkv[:2], rotary)
        return q[:, :, skip:], k, qkv[2]

    def combine(self, heads: Tensor) -> Tensor:
        """[B, H, T, D/H] -> [B, T, D]."""
        return self.dropout(self.wo(heads.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm transformer layer; trunk and head layers are the same, with different attention kernels."""

    def __init__(self, config: GPTConfig, attend=causal_attention) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.attend = attend

    def forward(self, x: Tensor, rotary: Tensor | None, cache=None, position: int = 0, skip: int = 0) -> Tensor:
        """One layer over T new positions.

        x: [B, T, D]; rotary: rows of these positions [T, D/H/2, 2], or None; cache: this layer's LayerCache, filled up
        to `position`; skip: leading positions that only serve as keys.  Returns [B, T - skip, D].
        """
        q, k, v = self.attention.project(self.attention_norm(x), rotary, skip)
        if cache is not None:
            k, v = cache.update(k, v, position)
            cache.observe(q, k)
        x = x[:, skip:] + self.attention.combine(self.attend(q, k, v))
        return x + self.feed_forward(self.ffn_norm(x))


class GPT(nn.Module):
    """Trunk plus prediction paradigm.  Keeps no generation state."""

    def __init__(self, config: GPTConfig) -> None:
        from autoregressive.models.paradigms import PARADIGMS

        super().__init__()
        self.config = config
        self.extra: dict = {}
        self.activation_checkpointing = False
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.dim)  # last row: the null class
        self.token_dropout = nn.Dropout(config.token_dropout)
        paradigm, _ = PARADIGMS[config.paradigm]
        self.layers = nn.ModuleList(Block(config, paradigm.attend) for _ in range(config.n_layer))
        self.paradigm = paradigm(config)
        self.register_buffer("rotary", self.build_rotary(), persistent=False)
        self.init_weights()

    def build_rotary(self) -> Tensor:
        """Rotary rows of all trunk positions [T, D/H/2, 2]; the class token's row is zero in cosine and sine."""
        config = self.config
        table = rotary_table(config.grid_size, config.dim // config.n_head, config.rotary_base)
        rows = table.to(self.paradigm.cells.device)[self.paradigm.cells]
        return torch.cat([torch.zeros_like(rows[:1]), rows])

    def init_weights(self) -> None:
        """Normal(0, 0.02) matrices and embeddings, zero biases, zero last output layer (first loss is log K)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for output in self.paradigm.output_layers():
            nn.init.zeros_(output.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer layers, the units of sharding, compilation and activation checkpointing."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @property
    def null_class(self) -> int:
        """The label of the unconditional model."""
        return self.config.num_classes

    def drop_classes(self, labels: Tensor) -> Tensor:
        """Replace labels by the null class with probability `class_dropout` while training."""
        if not self.training or self.config.class_dropout == 0:
            return labels
        dropped = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
        return torch.where(dropped, self.null_class, labels)

    def run_block(self, block: nn.Module, *args, **kwargs) -> Tensor:
        """Call a layer, recomputing its activations in the backward pass when asked to."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(partial(block, **kwargs), *args, use_reentrant=False)
        return block(*args, **kwargs)

    def forward(self, labels: Tensor, codes: Tensor) -> list[Tensor]:
        """Teacher-forced logits.

        labels: [B] in [0, num_classes]; codes: [B, C, N] int64.  Returns C tensors [B, N, K_c].
        """
        condition = self.cls_embedding(self.drop_classes(labels))[:, None]         # [B, 1, D]
        x = torch.cat([condition, self.paradigm.inputs(codes)], dim=1)             # [B, T, D]
        x = self.token_dropout(x)
        for block in self.layers:
            x = self.run_block(block, x, self.rotary)
        return self.paradigm.logits(x, codes, self.run_block)

    def class_token(self, labels: Tensor) -> Tensor:
        """The first trunk input: [B] -> [B, D]."""
        return self.cls_embedding(labels)

    def step(self, x: Tensor, cache: KVCache, position: int) -> Tensor:
        """Advance the trunk by one position.

        x: [B, D], the class token or what `paradigm.decode` returned; cache: filled up to `position`, which is
        written.  Returns hidden states [B, D].
        """
        x = x[:, None]
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = block(x, self.rotary[position : position + 1], layer_cache, position)
        return x[:, 0]

    def new_cache(self, batch: int, record_condition: bool = False) -> KVCache:
        """A trunk cache for `batch` rows, allocated once; record_condition keeps the last layer's attention to the
        class token (PAG-CFG, section 4.5)."""
        config, weight = self.config, self.cls_embedding.weight
        return KVCache(config.n_layer, batch, config.n_head, len(self.rotary), config.dim // config.n_head,
                       weight.device, weight.dtype, record_condition)


def build_gpt(name: str, **options) -> GPT:
    """A GPT of the table's size `name`, with GPTConfig fields overridden by `options`."""
    return GPT(GPTConfig(**GPT_models[name] | options))
