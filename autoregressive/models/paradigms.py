"""Prediction paradigms: what a trunk step reads, and how codes are predicted from its state (paper section 4.3, table 5).

    single         one codebook, one code a trunk step (LlamaGen, IAR, CTF's coarse labels)
    alternating    k_1 j_1 k_2 j_2 ..., one code a trunk step
    grouped        k_1 ... k_N j_1 ... j_N, one code a trunk step
    independent    fused tokens, one trunk step a cell, both codes from its state by parallel heads
    hierarchical   fused tokens, one trunk step a cell, the detail given the semantic code (IAR2)
    conditional    the same by an MLP a stream instead of the head's layers (not of the paper)
    fine           all coarse labels at once, all fine labels in one step (CTF's second stage, `ctf.py`)

A paradigm differs from another in four things: which cell each trunk input belongs to (`cells`) and which codes each step
predicts (`cell_of`, `streams_of`), how codes become trunk inputs (`inputs`, and `decode`'s return value), how states become
logits (`logits`), and how one decoded trunk step chooses its codes (`decode`).  `GPT` looks its paradigm up in `PARADIGMS`
once.  `pick` chooses codes from logits: paradigms know nothing of guidance or sampling.

While decoding, the cell is a tensor on the device and the streams are a number of Python's: a step is one function of tensors
for all cells, and another for other streams, whose codebooks differ in size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.attention import Attend, causal_attention, full_attention
from autoregressive.models.local_head import HeadState, LocalContext, LocalContextHead, at_head_width, mlp
from autoregressive.models.transformer import GPTConfig, Norm, RunBlock

# (logits [B, K_c], stream, cell [1]) -> codes [B].
Pick = Callable[[Tensor, int, Tensor], Tensor]


@dataclass
class DecodeState:
    """What one decoding owns: the codes chosen so far [B, C, N], buffers of fusion and head."""

    codes: Tensor
    tables: list[Tensor] = field(default_factory=list)  # fused tokens: output of the first fusion layer by code [K_c, 4D]
    head: HeadState | None = None
    contributions: Tensor | None = None  # of decoded cells to their neighbours' summaries [B, N + 1, c], outside of a head

    def keep(self, codes: Tensor, stream: int, cell: Tensor) -> None:
        """Write the codes [B] chosen for a stream of the cell [1]."""
        self.codes[:, stream].index_copy_(1, cell, codes[:, None])


class Paradigm(nn.Module):
    """The interface, and the parts all paradigms have; T is the number of trunk steps."""

    cells: Tensor    # [T - 1] grid cell of each trunk input after the condition
    cell_of: Tensor  # [T] grid cell that each trunk step predicts
    streams_of: list[tuple[int, ...]]  # the streams of that cell that each trunk step predicts

    def __init__(self, config: GPTConfig, outputs: list[nn.Module], width: int = 0) -> None:
        """outputs: one head a predicted stream, W -> K_c; width: W of the states that are normalised, 0: D."""
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleList(nn.Embedding(size, config.dim) for size in config.codebook_sizes)
        self.norm = Norm(width or config.dim, config.norm_eps)
        self.outputs = nn.ModuleList(outputs)

    @property
    def num_steps(self) -> int:
        """Trunk steps T of one grid: that of the condition's last position and one for each input."""
        return len(self.cells) + 1

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] -> trunk inputs after the condition [B, T - 1, D]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor, codes: Tensor, run_block: RunBlock, places: Tensor | None = None) -> list[Tensor]:
        """Trunk states [B, T, D] and codes [B, C, N] -> teacher-forced logits [B, N, K_c] of each predicted stream.

        run_block: calls a transformer layer (with activation checkpointing where wanted); places: [B, N] place of each cell in
        the order of prediction, None for raster.  States are those of the steps of raster order, whatever the order.
        """
        raise NotImplementedError

    def decode(self, hidden: Tensor, cell: Tensor, streams: tuple[int, ...], state: DecodeState, pick: Pick) -> Tensor:
        """One trunk step, which predicts `streams` of `cell` [1]: hidden [B, D] -> codes chosen into `state`.

        Returns the next trunk input [B, D].
        """
        raise NotImplementedError

    def targets(self, codes: Tensor) -> Tensor:
        """The streams that `logits` predicts: codes [B, C, N] -> [B, C', N]."""
        return codes

    def new_state(self, batch: int) -> DecodeState:
        """Buffers for decoding `batch` grids, allocated once."""
        shape = batch, len(self.embeddings), self.config.cells
        return DecodeState(torch.zeros(shape, dtype=torch.long, device=self.norm.weight.device))

    def output_layers(self) -> list[nn.Module]:
        """The last layers before the logits, which start at zero."""
        return [output[-1] if isinstance(output, nn.Sequential) else output for output in self.outputs]

    def embed_streams(self, codes: Tensor) -> list[Tensor]:
        """Codes [B, C', n] of the first C' streams -> C' embeddings [B, n, D]."""
        return [table(stream) for table, stream in zip(self.embeddings, codes.unbind(1))]


class Alternating(Paradigm):
    """One code a trunk step, the streams of a cell after each other; with one codebook this is LlamaGen's GPT."""

    stream_of: Tensor  # [T] stream of the code that each trunk step predicts
    step_of: Tensor    # [C, N] the step that predicts each code

    def __init__(self, config: GPTConfig) -> None:
        sizes, dim = config.codebook_sizes, config.dim
        # LlamaGen has one linear output; table 5 gives two streams a simple MLP each.
        super().__init__(config, [nn.Linear(dim, size, bias=False) if len(sizes) == 1 else mlp(dim, 2 * dim, size)
                                  for size in sizes])
        self.steps = self.order(len(sizes), config.cells)
        self.streams_of = [(stream,) for stream, _ in self.steps]
        stream, cell = (torch.tensor(column) for column in zip(*self.steps))
        self.register_buffer("cells", cell[:-1], persistent=False)
        self.register_buffer("stream_of", stream, persistent=False)
        self.register_buffer("cell_of", cell, persistent=False)
        steps = [[step for step, (s, _) in enumerate(self.steps) if s == stream] for stream in range(len(sizes))]
        self.register_buffer("step_of", torch.tensor(steps), persistent=False)

    @staticmethod
    def order(streams: int, cells: int) -> list[tuple[int, int]]:
        """(stream, cell) of every trunk step."""
        return [(stream, cell) for cell in range(cells) for stream in range(streams)]

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] -> embeddings in the order of prediction, without the last [B, T - 1, D]."""
        embedded = torch.stack(self.embed_streams(codes), dim=1)                   # [B, C, N, D]
        return embedded[:, self.stream_of[:-1], self.cell_of[:-1]]

    def logits(self, hidden: Tensor, codes: Tensor, run_block: RunBlock, places: Tensor | None = None) -> list[Tensor]:
        """Trunk states [B, T, D] -> C teacher-forced logits [B, N, K_c]."""
        hidden = self.norm(hidden)
        return [output(hidden[:, self.step_of[stream]]) for stream, output in enumerate(self.outputs)]

    def decode(self, hidden: Tensor, cell: Tensor, streams: tuple[int, ...], state: DecodeState, pick: Pick) -> Tensor:
        """One code from [B, D]; returns its embedding [B, D]."""
        stream, = streams
        codes = pick(self.outputs[stream](self.norm(hidden)), stream, cell)
        state.keep(codes, stream, cell)
        return self.embeddings[stream](codes)


class Grouped(Alternating):
    """One code a trunk step, all semantic codes of the grid before all detail codes."""

    @staticmethod
    def order(streams: int, cells: int) -> list[tuple[int, int]]:
        """(stream, cell) of every trunk step."""
        return [(stream, cell) for stream in range(streams) for cell in range(cells)]


class Independent(Paradigm):
    """Fused tokens (equation 12), one trunk step a cell, the streams of a cell independent of each other."""

    def __init__(self, config: GPTConfig, width: int = 0, inputs: tuple[int, ...] = (1, 1)) -> None:
        """width: W of the states that logits come from, 0: D; inputs: vectors of that width that each stream's MLP reads."""
        dim, width = config.dim, width or config.dim
        super().__init__(config, [mlp(count * width, 2 * width, size) for count, size in zip(inputs, config.codebook_sizes)],
                         width)
        self.fusion = mlp(len(config.codebook_sizes) * dim, 4 * dim, dim, out_bias=True)
        position = torch.arange(config.cells - 1)
        self.register_buffer("cells", position // 2 if config.rotary == "repeated" else position, persistent=False)
        self.register_buffer("cell_of", torch.arange(config.cells), persistent=False)
        self.streams_of = [tuple(range(len(config.codebook_sizes)))] * config.cells

    def fuse(self, codes: Tensor) -> Tensor:
        """Equation 12: codes [B, C, n] -> fused tokens [B, n, D]."""
        return self.fusion(torch.cat(self.embed_streams(codes), dim=-1))

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] -> fused tokens of all cells but the last [B, N - 1, D]."""
        return self.fuse(codes[..., :-1])

    def logits(self, hidden: Tensor, codes: Tensor, run_block: RunBlock, places: Tensor | None = None) -> list[Tensor]:
        """Trunk states [B, N, D] -> C teacher-forced logits [B, N, K_c]."""
        hidden = self.norm(hidden)
        return [output(hidden) for output in self.outputs]

    def decode(self, hidden: Tensor, cell: Tensor, streams: tuple[int, ...], state: DecodeState, pick: Pick) -> Tensor:
        """One cell from [B, D]; returns its fused token [B, D]."""
        hidden = self.norm(hidden)
        chosen = [pick(self.outputs[stream](hidden), stream, cell) for stream in streams]
        for stream, codes in zip(streams, chosen):
            state.keep(codes, stream, cell)
        return self.fuse_chosen(chosen, state)

    @property
    def first_fusion_layer(self) -> nn.Linear:
        """The layer [E_s; E_d] -> 4D, whose bias is added once and whose columns divide by stream."""
        layer = self.fusion[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def new_state(self, batch: int) -> DecodeState:
        """Buffers for decoding `batch` grids; the first fusion layer becomes one table a stream."""
        state, tables = super().new_state(batch), list(self.embeddings.parameters())
        columns = self.first_fusion_layer.weight.chunk(len(tables), dim=1)
        state.tables = [F.linear(table, part) for table, part in zip(tables, columns, strict=True)]
        return state

    def fuse_chosen(self, chosen: list[Tensor], state: DecodeState) -> Tensor:
        """The fused token of a cell [B, D], from the codes [B] of each of its streams."""
        rows = [F.embedding(codes, table) for codes, table in zip(chosen, state.tables, strict=True)]
        return self.fusion[1:](sum(rows, start=self.first_fusion_layer.bias))      # equation 12


class Hierarchical(Independent):
    """IAR2: fused tokens, one trunk step a cell, semantic then detail by the local-context head (equations 12, 13)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config, at_head_width(config).dim)
        self.head = LocalContextHead(config)

    def logits(self, hidden: Tensor, codes: Tensor, run_block: RunBlock, places: Tensor | None = None) -> list[Tensor]:
        """Trunk states [B, N, D] and codes [B, C, N] -> C teacher-forced logits [B, N, K_c]."""
        states = self.norm(self.head(hidden, self.embed_streams(codes[:, :-1]), run_block, places))  # [B, N, C, W]
        return [output(states[:, :, stream]) for stream, output in enumerate(self.outputs)]

    def new_state(self, batch: int) -> DecodeState:
        """Buffers for decoding `batch` grids, the head's among them."""
        state = super().new_state(batch)
        state.head = self.head.new_state(batch)
        return state

    def decode(self, hidden: Tensor, cell: Tensor, streams: tuple[int, ...], state: DecodeState, pick: Pick) -> Tensor:
        """One cell: head passes and choices in stream order; returns its fused token [B, D]."""
        assert state.head is not None
        x, chosen = self.head.begin_cell(hidden, cell, state.head), []
        for stream in streams:
            chosen.append(pick(self.outputs[stream](self.norm(x)), stream, cell))
            state.keep(chosen[-1], stream, cell)
            if stream + 1 < len(streams):
                x = self.head.continue_cell(self.embeddings[stream](chosen[-1]), stream + 1, state.head)
        return self.fuse_chosen(chosen, state)


class Conditional(Independent):
    """Fused tokens, one trunk step a cell; a stream's MLP reads the trunk state, the window's summary where there is one, and
    the embeddings of the streams already chosen: the detail given the semantic code without head layers (not of the paper)."""

    def __init__(self, config: GPTConfig) -> None:
        self.leading = 1 if config.context == "none" else 2  # vectors that every stream reads
        super().__init__(config, inputs=tuple(self.leading + stream for stream in range(len(config.codebook_sizes))))
        self.context = None if config.context == "none" else LocalContext(config, config.dim)

    def logits(self, hidden: Tensor, codes: Tensor, run_block: RunBlock, places: Tensor | None = None) -> list[Tensor]:
        """Trunk states [B, N, D] and codes [B, C, N] -> C teacher-forced logits [B, N, K_c]."""
        hidden = self.norm(hidden)
        read = [hidden] if self.context is None else [hidden, self.context(hidden, places)]
        read += self.embed_streams(codes[:, :-1])
        return [output(torch.cat(read[: self.leading + stream], dim=-1)) for stream, output in enumerate(self.outputs)]

    def new_state(self, batch: int) -> DecodeState:
        """Buffers for decoding `batch` grids, the window's among them."""
        state = super().new_state(batch)
        state.contributions = None if self.context is None else self.context.new_state(batch)
        return state

    def decode(self, hidden: Tensor, cell: Tensor, streams: tuple[int, ...], state: DecodeState, pick: Pick) -> Tensor:
        """One cell from [B, D], its streams in order; returns its fused token [B, D]."""
        read, chosen = [self.norm(hidden)], []
        if self.context is not None and state.contributions is not None:
            read.append(self.context.step(read[0], cell, state.contributions))
        for stream in streams:
            chosen.append(pick(self.outputs[stream](torch.cat(read, dim=-1)), stream, cell))
            state.keep(chosen[-1], stream, cell)
            read.append(self.embeddings[stream](chosen[-1]))
        return self.fuse_chosen(chosen, state)


class FineLabels(Paradigm):
    """CTF's second stage: streams (coarse, fine); every cell sees all coarse labels and the condition, and predicts its fine
    label, all in one pass.  `ctf.py` samples from it; there is nothing to decode step by step."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config, [nn.Linear(config.dim, config.codebook_sizes[1], bias=False)])
        del self.embeddings[1]  # fine labels are only predicted
        self.register_buffer("cells", torch.arange(config.cells), persistent=False)

    def inputs(self, codes: Tensor) -> Tensor:
        """Codes [B, 1 or 2, N] -> embeddings of the coarse labels of all cells [B, N, D]."""
        return self.embeddings[0](codes[:, 0])

    def logits(self, hidden: Tensor, codes: Tensor, run_block: RunBlock, places: Tensor | None = None) -> list[Tensor]:
        """States of the condition's last position and all cells [B, 1 + N, D] -> fine logits [B, N, K_fine]."""
        return [self.outputs[0](self.norm(hidden[:, 1:]))]

    def targets(self, codes: Tensor) -> Tensor:
        """The fine stream: codes [B, 2, N] -> [B, 1, N]."""
        return codes[:, 1:]


class Row(NamedTuple):
    """How a paradigm is built, and what it needs of codes and trunk."""

    build: Callable[[GPTConfig], Paradigm]
    codebooks: int
    attend: Attend = causal_attention  # the trunk's attention kernel
    own: tuple[str, ...] = ()          # fields of GPTConfig that this paradigm reads and others do not


WINDOW = ("context", "window_size")
HEAD = ("head_layers", "head_width", "head_rotary")
PARADIGMS: dict[str, Row] = {
    "single": Row(Alternating, 1),
    "alternating": Row(Alternating, 2),
    "grouped": Row(Grouped, 2),
    "independent": Row(Independent, 2),
    "hierarchical": Row(Hierarchical, 2, own=(*WINDOW, *HEAD)),
    "conditional": Row(Conditional, 2, own=WINDOW),
    "fine": Row(FineLabels, 2, full_attention),
}
