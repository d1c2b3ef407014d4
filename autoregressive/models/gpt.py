"""The GPT: trunk, caches, and the table of sizes.

Paper sections 4.3 and 5.1; the trunk is LlamaGen's (RMSNorm, SwiGLU, two-dimensional rotary embedding, a class token or a
caption in front).  What a trunk step reads and predicts belongs to the prediction paradigm (`paradigms.py`), what stands in front
to the condition (`conditions.py`); `GPT` looks both up once.  One implementation trains and decodes: `forward` teacher-forces a
whole grid, `begin` writes the condition to a cache that the caller owns, and `step` advances one trunk position.

Deviations from the release: every cell has its own rotary row (`rotary="repeated"` restores the released table) and the
head's slots are not rotated (`head_rotary="zero_summary"` restores the released zero row for the summary).
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoregressive.models.attention import KVCache, Span, as_scores, attention_mask, causal_attention
from autoregressive.models.conditions import CONDITIONS, Condition, Given
from autoregressive.models.order import RASTER, Permuted, RandomOrder, Raster
from autoregressive.models.paradigms import PARADIGMS
from autoregressive.models.transformer import Block, GPTConfig, rotary_table
from utils.checkpoint import read_export, restore
from utils.untrusted import read_fields

# Shapes of the paper's section 5.1 and LlamaGen's larger models; parameters of IAR2 on a 24x24 grid, 1000 classes.
GPT_models: dict[str, dict[str, int]] = {
    "GPT-tiny": dict(n_layer=4, dim=128, n_head=4, head_layers=2, ffn_multiple_of=64),  # quickstart
    "GPT-tiny-wide": dict(n_layer=4, dim=128, n_head=4, head_layers=1, ffn_multiple_of=420),  # study: no context, equal weights
    "GPT-small": dict(n_layer=8, dim=384, n_head=6, head_layers=3),                     # 32-pixel images
    "GPT-B": dict(n_layer=12, dim=768, n_head=12, head_layers=5),     # 143M
    "GPT-L": dict(n_layer=24, dim=1024, n_head=16, head_layers=5),    # 408M
    "GPT-XL": dict(n_layer=36, dim=1280, n_head=20, head_layers=5),   # 884M
    "GPT-XXL": dict(n_layer=48, dim=1536, n_head=24, head_layers=5),  # 1.6B
    "GPT-3B": dict(n_layer=24, dim=3200, n_head=32, head_layers=5),
    "GPT-XXXL": dict(n_layer=48, dim=2560, n_head=40, head_layers=5),
}


@dataclass
class GPTProvenance:
    """What made a GPT; saved beside its weights and configuration."""

    gpt_model: str = ""                                        # row of GPT_models; "" for a shape outside the table
    tokenizer: str = ""                                        # fingerprint; "" where an imported file does not say it
    image_size: int = 0                                        # of the images whose codes it was trained on
    class_names: tuple[str, ...] = ()                          # by label id; empty where the images had none
    step: int = 0                                              # of its training; 0 if imported
    ema: float = 0.0                                           # decay of the averaged weights; 0 for plain ones
    sampling: dict[str, Any] = field(default_factory=dict)     # fields of SamplingOptions, the samplers' defaults
    coarse: str = ""                                           # CTF's second stage: whose coarse labels it refines,
    coarse_of: tuple[int, ...] = ()                            # and the coarse label of every code
    encoder: str = ""                                          # of captions: hub name of the text encoder; "" for classes
    imported: dict[str, str] = field(default_factory=dict)     # kind and file name of published weights


class GPT(nn.Module):
    """Trunk plus prediction paradigm.  Keeps no generation state."""

    rotary: Tensor  # [P - 1 + T, D/H/2, 2] rows of all trunk positions: P of the condition, whose last is the first of T steps
    cls_embedding: Condition  # published files call it so

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.provenance = GPTProvenance()
        self.activation_checkpointing = False
        self.cls_embedding = CONDITIONS[config.condition].build(config)
        self.token_dropout = nn.Dropout(config.token_dropout)
        row = PARADIGMS[config.paradigm]
        self.causal = row.attend is causal_attention
        self.layers = nn.ModuleList(Block(config, row.attend) for _ in range(config.n_layer))
        self.paradigm = row.build(config)
        self.register_buffer("rotary", self.build_rotary(), persistent=False)
        random = config.order == "random"
        self.order = RandomOrder(config, self.paradigm.cell_of, self.paradigm.streams_of) if random else None
        self.init_weights()

    def build_rotary(self) -> Tensor:
        """Rotary rows of all trunk positions [P - 1 + T, D/H/2, 2]; the class token's row is zero in cosine and sine."""
        config = self.config
        table = rotary_table(config.grid_size, config.dim // config.n_head, config.rotary_base)
        rows = table.to(self.paradigm.cells.device)[self.paradigm.cells]
        return torch.cat([self.condition.rotary(rows), rows])

    def init_weights(self) -> None:
        """Normal(0, 0.02) matrices and embeddings, zero biases, zero last output layer (first loss is log K)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for output in self.paradigm.output_layers():
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer layers, the units of sharding, compilation and activation checkpointing."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @property
    def condition(self) -> Condition:
        """What stands in front of the codes, a row of CONDITIONS."""
        return self.cls_embedding

    def run_block(self, block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Call a layer, recomputing its activations in the backward pass when asked to."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(partial(block, **kwargs), *args, use_reentrant=False)
        return block(*args, **kwargs)

    def forward(self, given: Given, codes: Tensor, order: Tensor | None = None) -> list[Tensor]:
        """Teacher-forced logits.

        given: labels [B] in [0, num_classes], or captions, features [B, P', E] and their mask [B, P'] with P' <= P; codes:
        [B, C, N] int64; order: [B, N] int64, the cell predicted at each place, for a GPT with `order="random"`, or None for
        raster.  Returns C tensors [B, N, K_c], by cell.
        """
        taken, given = self.take_order(order), self.condition.drop(given)
        front, visible = self.condition.tokens(given), self.condition.visible(given)
        x = torch.cat([front, self.paradigm.inputs(taken.codes(codes))], dim=1)    # [B, P' - 1 + T, D]
        x = self.token_dropout(x)
        leading, length = front.shape[1] - 1, x.shape[1]
        if self.order is not None:
            x = x + F.pad(self.order.target(taken.targets(self.order.cell_of)), (0, 0, leading, 0))
        rotary = taken.rotary(self.rotary[len(self.rotary) - length :])
        mask = None if visible is None else attention_mask(visible, length, self.causal)
        for block in self.layers:
            x = self.run_block(block, x, rotary, mask=mask)
        return self.paradigm.logits(taken.states(x[:, leading:]), codes, self.run_block, taken.places)

    def take_order(self, order: Tensor | None) -> Raster:
        """How a pass goes in the order [B, N], or in raster for None; raises ValueError where the GPT knows raster alone."""
        if order is None:
            return RASTER
        if self.order is None:
            raise ValueError('order needs a GPT with order="random": in raster order nothing says which cell is predicted next.')
        return Permuted(order, self.order)

    def begin(self, given: Given, cache: KVCache) -> Tensor:
        """Write all positions of a condition but the last to the cache, in one pass.

        given: as in `forward`, of as many samples as the cache has rows.  Returns the first input of `step` [B, D].
        """
        given = self.condition.fit(given)
        front, visible = self.condition.tokens(given), self.condition.visible(given)   # [B, P, D], [B, P]
        if visible is not None and cache.hidden is not None:
            cache.hidden[:, : visible.shape[1]] = ~visible
            x, leading = front[:, :-1], visible.shape[1] - 1
            mask = as_scores(~attention_mask(visible[:, :-1], leading, causal=True), x.dtype)
            span = Span(cache.positions[:leading], leading, mask)
            for block, layer_cache in zip(self.layers, cache.layers, strict=True):
                x = block(x, self.rotary[:leading], layer_cache, span)
        return front[:, -1]

    def step(self, x: Tensor, cache: KVCache, step: Tensor, keys: Tensor) -> Tensor:
        """Advance the trunk by one position.

        x: [B, D], what `begin` or `paradigm.decode` returned; cache: filled up to the position of the trunk step `step` [1]
        int64, which is P - 1 positions behind the first and is written; keys: the first positions of the cache [S], that one
        among them.  Returns hidden states [B, D].
        """
        if self.order is not None:
            x = x + self.order.target(self.order.cell_of.index_select(0, step))
        position = step + (self.condition.positions - 1)
        x, rotary = x[:, None], self.rotary.index_select(0, position)
        span = Span(position, len(keys), cache.step_mask(position, keys, x.dtype))
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = block(x, rotary, layer_cache, span)
        return x[:, 0]

    def new_cache(self, batch: int, record_condition: bool = False, multiple: int = 1) -> KVCache:
        """A trunk cache for `batch` rows, allocated once, of which multiples of `multiple` positions are read;
        record_condition keeps the last layer's attention to the class token or to the words of the caption (PAG-CFG, section
        4.5)."""
        config, weight = self.config, self.paradigm.norm.weight
        length = -(-len(self.rotary) // multiple) * multiple
        if multiple > 1:
            length += 1  # so that a part is read always: the whole, which is contiguous, would be compiled once more
        return KVCache(config.n_layer, batch, config.n_head, length, config.dim // config.n_head, weight.device, weight.dtype,
                       self.condition.positions if record_condition else 0, self.condition.hides)


def build_gpt(name: str, **options: Any) -> GPT:
    """A GPT of the table's size `name`, with GPTConfig fields overridden by `options`."""
    return GPT(GPTConfig(**(GPT_models[name] | options)))


def load_gpt(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
             option: str = "--gpt-ckpt") -> GPT:
    """A GPT ready for sampling, from an exported file, a run folder or a training checkpoint step-*.

    Raises UserError, naming `option`, when there is none.
    """
    description, tensors = read_export(path, "gpt", option)
    gpt = restore(GPT, GPTConfig, description.pop("model"), tensors, f"{option} {path}")
    gpt.provenance = GPTProvenance(**read_fields(GPTProvenance, description, f"{option} {path}"))
    return place(gpt, device, dtype)


def place(gpt: GPT, device: str | torch.device, dtype: torch.dtype) -> GPT:
    """Make a GPT ready for sampling on a device, in a precision."""
    gpt.to(device, dtype)
    gpt.rotary = gpt.build_rotary().to(device)  # stays float32
    return gpt.eval().requires_grad_(False)
