"""Our weights computed in the structure of the published IAR2 code, as the yardstick of `scripts/benchmark.py`.

The arithmetic is that of our models, and the results agree.  The structure is that of the published code: hand-written norms,
rotation of separate heads, the context MLP on each cell's twelve neighbours, general attention kernels for the head's three
slots.  While decoding it attends over the whole block under a mask, makes three head passes per cell, and allocates for every
cell head caches as long as the trunk's.  Only the benchmark and its test import this module.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.generate import Sampler
from autoregressive.models.gpt import GPT
from autoregressive.models.local_head import LocalContext
from autoregressive.models.paradigms import Hierarchical, Pick
from autoregressive.models.transformer import Block


def norm(module: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    """Root-mean-square norm in separate operations: [..., D] -> [..., D]."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + (module.eps or 0.0))).type_as(x) * module.weight


def rotate_heads(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate [B, T, H, E] by rows [T, E/2, 2]."""
    pairs, rows = x.float().unflatten(-1, (-1, 2)), rotary[None, :, None]
    rotated = [pairs[..., 0] * rows[..., 0] - pairs[..., 1] * rows[..., 1],
               pairs[..., 1] * rows[..., 0] + pairs[..., 0] * rows[..., 1]]
    return torch.stack(rotated, dim=-1).flatten(3).type_as(x)


def run_layer(block: nn.Module, x: Tensor, rotary: Tensor, cache: tuple[Tensor, Tensor] | None = None,
              mask: Tensor | None = None, position: int = 0) -> Tensor:
    """One layer: [B, T, D] -> [B, T, D]; with a cache [B, H, S, E] attention runs over all S slots under a mask [T, S]."""
    assert isinstance(block, Block)
    attention = block.attention
    q, k, v = (t.unflatten(-1, (attention.n_head, -1)) for t in attention.wqkv(norm(block.attention_norm, x)).chunk(3, -1))
    q, k = rotate_heads(q, rotary), rotate_heads(k, rotary)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cache is not None:
        slots = torch.arange(position, position + x.shape[1])
        cache[0][:, :, slots], cache[1][:, :, slots] = k, v
        k, v = (t.repeat_interleave(1, dim=1) for t in cache)  # LlamaGen's grouped queries, which copies
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    x = x + attention.dropout(attention.wo(heads.transpose(1, 2).flatten(2)))
    return x + block.feed_forward(norm(block.ffn_norm, x))


def parts(gpt: GPT) -> tuple[Hierarchical, LocalContext]:
    """The paradigm and the local context of a GPT that the published code has too."""
    assert isinstance(gpt.paradigm, Hierarchical) and gpt.paradigm.head.context is not None
    return gpt.paradigm, gpt.paradigm.head.context


def head_rotary(gpt: GPT) -> Tensor:
    """Rows of the head's slots: the published table, or the identity where ours are not rotated."""
    rotary = parts(gpt)[0].head.rotary
    if rotary is not None:
        return rotary
    return torch.stack([torch.ones_like(gpt.rotary[:3, :, 0]), torch.zeros_like(gpt.rotary[:3, :, 0])], dim=-1)


def forward(gpt: GPT, labels: Tensor, codes: Tensor) -> list[Tensor]:
    """Teacher-forced logits, as `GPT.forward`."""
    paradigm, context = parts(gpt)
    x = torch.cat([gpt.condition.tokens(gpt.condition.drop(labels)), paradigm.inputs(codes)], dim=1)
    x = gpt.token_dropout(x)
    for block in gpt.layers:
        x = run_layer(block, x, gpt.rotary)
    inside = context.window < gpt.config.cells
    windows = x[:, context.window.clamp_max(gpt.config.cells - 1)] * inside[..., None]          # [B, N, 12, D]
    summary = context.expand(context.compress(windows).flatten(2))
    slots = torch.stack([summary, x, paradigm.embeddings[0](codes[:, 0])], dim=2).flatten(0, 1)  # [B N, 3, D]
    rotary = head_rotary(gpt)
    for block in paradigm.head.layers:
        slots = run_layer(block, slots, rotary)
    slots = norm(paradigm.norm, slots).unflatten(0, x.shape[:2])
    return [output(slots[:, :, 1 + stream]) for stream, output in enumerate(paradigm.outputs)]


class Decoder:
    """Cell-by-cell decoding."""

    def __init__(self, gpt: GPT, rows: int) -> None:
        config = gpt.config
        length = -(-(config.cells + 2) // 8) * 8  # rounded up to a multiple of 8, for trunk and head alike
        self.gpt, self.rows, self.shape = gpt, rows, (rows, config.n_head, length, config.dim // config.n_head)
        self.make: dict[str, Any] = {"device": gpt.rotary.device, "dtype": gpt.paradigm.norm.weight.dtype}
        self.caches = self.new_caches(len(gpt.layers))
        self.mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=gpt.rotary.device))
        self.states = torch.zeros(rows, config.cells + 1, config.dim, **self.make)

    def new_caches(self, layers: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a stack of layers [B, H, S, E], each."""
        return [(torch.zeros(self.shape, **self.make), torch.zeros(self.shape, **self.make)) for _ in range(layers)]

    def run(self, x: Tensor, cells: int, sampler: Sampler) -> None:
        """Decode the first cells from the class tokens [B, D]."""
        attention = torch.ones(self.rows, device=x.device)
        for cell in range(cells):
            step = torch.tensor([cell], device=x.device)
            x = self.step(x, cell, partial(sampler.pick, step=step, attention=attention))

    def step(self, x: Tensor, cell: int, pick: Pick) -> Tensor:
        """[B, D] -> the next trunk input [B, D]; `pick` chooses codes from logits."""
        gpt, (paradigm, context) = self.gpt, parts(self.gpt)
        x = x[:, None]
        for block, cache in zip(gpt.layers, self.caches):
            x = run_layer(block, x, gpt.rotary[cell : cell + 1], cache, self.mask[cell : cell + 1], cell)
        summary = context.expand(context.compress(self.states[:, context.window[cell]]).flatten(1))
        self.states[:, cell] = x[:, 0]
        rotary, codes, here = head_rotary(gpt), [], torch.tensor([cell], device=x.device)
        caches, inputs = self.new_caches(len(paradigm.head.layers)), [summary, x[:, 0]]
        for slot in range(3):
            h = inputs[slot][:, None]
            for block, cache in zip(paradigm.head.layers, caches):
                h = run_layer(block, h, rotary[slot : slot + 1], cache, self.mask[slot : slot + 1], slot)
            if slot > 0:
                codes.append(pick(paradigm.outputs[slot - 1](norm(paradigm.norm, h[:, 0])), slot - 1, here))
            if slot == 1:
                inputs.append(paradigm.embeddings[0](codes[0]))
        return paradigm.fuse(torch.stack(codes, dim=1)[..., None])[:, 0]
