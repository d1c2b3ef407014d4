"""Prediction paradigms: what a trunk step reads, and how codes are predicted from its state (paper section 4.3, table 5).

A paradigm differs from another in four things, its methods: which cell each trunk input belongs to (`cells`), how
codes become trunk inputs (`inputs`, and `decode`'s return value), how states become logits (`logits`), and which codes
one decoded trunk step chooses (`decode`).  `GPT` looks its paradigm up in `PARADIGMS` once.  `pick` chooses codes from
logits: paradigms know nothing of guidance or sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import GPTConfig
from autoregressive.models.local_head import HeadState, LocalContextHead, mlp

Pick = Callable[[Tensor, int], Tensor]
"""(logits [B, K_c], stream) -> codes [B]."""


@dataclass
class DecodeState:
    """What one decoding owns: the codes chosen so far [B, C, N], the next trunk step, and the head's buffers."""

    codes: Tensor
    head: HeadState | None
    step: int = 0


class Paradigm(Protocol):
    """The interface every paradigm implements; T is the number of trunk steps."""

    cells: Tensor  # [T - 1] grid cell of each trunk input after the class token

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] -> trunk inputs after the class token [B, T - 1, D]."""

    def logits(self, hidden: Tensor, codes: Tensor, run_block: Callable) -> list[Tensor]:
        """Trunk states [B, T, D] and codes -> C teacher-forced logits [B, N, K_c]."""

    def new_state(self, batch: int) -> DecodeState:
        """Buffers for decoding `batch` grids."""

    def decode(self, hidden: Tensor, state: DecodeState, pick: Pick) -> Tensor:
        """One trunk step: state [B, D] -> codes chosen into `state`; returns the next trunk input [B, D]."""

    def output_layers(self) -> list[nn.Linear]:
        """The last layers before the logits, which start at zero."""


class Hierarchical(nn.Module):
    """IAR2: fused tokens, one trunk step a cell, semantic then detail by the local-context head (equations 12, 13)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        streams, dim = len(config.codebook_sizes), config.dim
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in config.codebook_sizes)
        self.fusion = mlp(streams * dim, 4 * dim, dim, out_bias=True)
        self.head = LocalContextHead(config)
        self.norm = nn.RMSNorm(dim, config.norm_eps)
        self.outputs = nn.ModuleList(mlp(dim, 2 * dim, size) for size in config.codebook_sizes)
        position = torch.arange(config.cells - 1)
        self.register_buffer("cells", position // 2 if config.rotary == "repeated" else position, persistent=False)

    def fuse(self, codes: Tensor) -> Tensor:
        """Equation 12: codes [B, C, n] -> fused tokens [B, n, D]."""
        embedded = [table(stream) for table, stream in zip(self.embeddings, codes.unbind(1), strict=True)]
        return self.fusion(torch.cat(embedded, dim=-1))

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] -> fused tokens of all cells but the last [B, N - 1, D]."""
        return self.fuse(codes[..., :-1])

    def logits(self, hidden: Tensor, codes: Tensor, run_block: Callable) -> list[Tensor]:
        """Trunk states [B, N, D] and codes [B, C, N] -> C teacher-forced logits [B, N, K_c]."""
        embedded = [table(stream) for table, stream in zip(self.embeddings[:-1], codes.unbind(1)[:-1], strict=True)]
        states = self.norm(self.head(hidden, embedded, run_block))                 # [B, N, C, D]
        return [output(states[:, :, stream]) for stream, output in enumerate(self.outputs)]

    def new_state(self, batch: int) -> DecodeState:
        """Buffers for decoding `batch` grids, allocated once."""
        shape = batch, len(self.outputs), self.config.cells
        return DecodeState(torch.zeros(shape, dtype=torch.long, device=self.norm.weight.device),
                           self.head.new_state(batch))

    def decode(self, hidden: Tensor, state: DecodeState, pick: Pick) -> Tensor:
        """One cell: head passes and choices in stream order; returns its fused token [B, D]."""
        cell = state.step
        x = self.head.begin_cell(hidden, cell, state.head)
        for stream, output in enumerate(self.outputs):
            codes = pick(output(self.norm(x)), stream)
            state.codes[:, stream, cell] = codes
            if stream + 1 < len(self.outputs):
                x = self.head.continue_cell(self.embeddings[stream](codes), stream + 1, state.head)
        state.step += 1
        return self.fuse(state.codes[..., cell : cell + 1])[:, 0]

    def output_layers(self) -> list[nn.Linear]:
        """The last layer of each stream's output MLP."""
        return [output[-1] for output in self.outputs]


PARADIGMS: dict[str, type] = {"hierarchical": Hierarchical}
