"""The local-context autoregressive head (paper section 4.4, equations 13 and 15, figure 5c).

Each cell sees the trunk states of its causal neighbours in a K x K window, compressed and joined into one summary; a
small transformer runs over the slots [summary, trunk state, embeddings of the streams already chosen].  Compression
acts on single vectors, so it runs once per cell and the small results are gathered: while decoding, only they are kept.
Table 6's variants are `context`: "compressed", "concatenated" (joined at full width), "none" (no summary).

Not of the paper: with `head_width` W the layers, and the norm and the outputs behind them, have the width W and heads of the
trunk's dimension.  A matrix D -> W takes the trunk states in, another the embeddings; the summary is expanded to W at once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoregressive.models.attention import KVCache, Span, short_causal_attention
from autoregressive.models.order import predicted_before, take_rows
from autoregressive.models.transformer import Block, GPTConfig, RunBlock


def mlp(dim: int, hidden: int, out: int, out_bias: bool = False) -> nn.Sequential:
    """Linear, exact GELU, Linear; the first layer has a bias."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out, bias=out_bias))


def window_indices(grid_size: int, window_size: int) -> Tensor:
    """The causal neighbours of every cell: the rows above, then the cells to the left, in raster order.

    Returns [N, (window_size² - 1) / 2] int64 cell numbers; N stands for a cell outside the grid.
    """
    reach = window_size // 2
    offsets = [(dy, dx) for dy in range(-reach, 1) for dx in range(-reach, reach + 1) if (dy, dx) < (0, 0)]
    row, column = torch.arange(grid_size**2).div(grid_size, rounding_mode="floor"), torch.arange(grid_size**2) % grid_size
    rows = row[:, None] + torch.tensor([dy for dy, _ in offsets])
    columns = column[:, None] + torch.tensor([dx for _, dx in offsets])
    inside = (rows >= 0) & (columns >= 0) & (columns < grid_size)
    return torch.where(inside, rows * grid_size + columns, grid_size**2)


def at_head_width(config: GPTConfig) -> GPTConfig:
    """The configuration of the head's layers: `head_width` W for dim, where it is not 0, and heads of the trunk's dimension.

    Raises ValueError where W is no multiple of that dimension.
    """
    if not config.head_width:
        return config
    if config.head_width % (config.dim // config.n_head):
        raise ValueError(f"head_width {config.head_width} is not a multiple of {config.dim // config.n_head}, the dimension of "
                         "a head")
    return replace(config, dim=config.head_width, n_head=config.head_width * config.n_head // config.dim, head_width=0)


class LocalContext(nn.Module):
    """Summary of the window: join what the n neighbours contribute, expand -> 2W -> W (equation 15; W = D unless said).

    A neighbour contributes its state compressed D -> D/4 -> D/n, or the whole of it (table 6, row 2).
    """

    window: Tensor  # [N, n] neighbours of each cell; N: outside the grid

    def __init__(self, config: GPTConfig, width: int) -> None:
        """width: W of the summaries."""
        super().__init__()
        window = window_indices(config.grid_size, config.window_size)
        neighbours = window.shape[1]
        self.dim, self.compressing = config.dim, config.context == "compressed"
        self.width = config.dim // neighbours if self.compressing else config.dim
        self.compress = mlp(config.dim, config.dim // 4, self.width) if self.compressing else nn.Identity()
        self.expand = mlp(neighbours * self.width, 2 * width, width)
        self.register_buffer("window", window, persistent=False)

    def border(self) -> Tensor:
        """Contribution of a cell outside the grid: compress(0) [c]."""
        weight = next(self.expand.parameters())
        return self.compress(torch.zeros(self.dim, device=weight.device, dtype=weight.dtype))

    def forward(self, hidden: Tensor, places: Tensor | None = None) -> Tensor:
        """Trunk states of all cells [B, N, D] -> summaries [B, N, W].

        places: [B, N] place of each cell in the order of prediction; a neighbour predicted later counts as outside the grid.
        None: raster.
        """
        small = self.compress(hidden)                                              # [B, N, c]
        small = torch.cat([small, self.border().expand(len(small), 1, -1).type_as(small)], dim=1)
        near = small[:, self.window] if places is None else take_rows(small, predicted_before(self.window, places))
        return self.expand(near.flatten(2))                                        # [B, N, n c] -> [B, N, W]

    def new_state(self, batch: int) -> Tensor:
        """Room for what each cell contributes, the border's in the last row [B, N + 1, c]."""
        return self.border().repeat(batch, len(self.window) + 1, 1)

    def step(self, hidden: Tensor, cell: Tensor, contributions: Tensor) -> Tensor:
        """Decode: summary of the window of `cell` [1]: [B, W]; keeps what its state [B, D] will contribute to later cells."""
        window = self.window.index_select(0, cell)[0]                              # [n]
        summary = self.expand(contributions.index_select(1, window).flatten(1))
        contributions.index_copy_(1, cell, self.compress(hidden)[:, None])
        return summary


@dataclass
class HeadState:
    """What the head keeps while decoding: contributions of decoded cells to their neighbours, and the slots' cache."""

    contributions: Tensor  # [B, N + 1, c]; empty without local context
    cache: KVCache


class LocalContextHead(nn.Module):
    """Transformer layers over the slots of one cell (equation 13).

    Without local context (table 6, row 1) there is no summary, and the cell's trunk state is the first slot.
    """

    rotary: Tensor | None  # [slots, W/H/2, 2], or None where slots are not rotated

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim, self.config = config.dim, at_head_width(config)
        self.context = None if config.context == "none" else LocalContext(config, self.config.dim)
        self.leading = 0 if self.context is None else 1  # slots that predict nothing
        self.slots = self.leading + len(config.codebook_sizes)
        self.narrow_state, self.narrow_embedding = (
            nn.Linear(dim, self.config.dim, bias=False) if config.head_width else nn.Identity() for _ in range(2))
        self.layers = nn.ModuleList(Block(self.config, short_causal_attention) for _ in range(config.head_layers))
        rotary = torch.ones(self.slots, config.dim // config.n_head // 2, 2)
        rotary[..., 1] = 0                                                         # identity
        rotary[: self.leading] = 0                                                 # the release's first row
        self.register_buffer("rotary", rotary if config.head_rotary == "zero_summary" else None, persistent=False)

    def forward(self, hidden: Tensor, embedded: list[Tensor], run_block: RunBlock, places: Tensor | None = None) -> Tensor:
        """Teacher-forced head states.

        hidden: trunk states [B, N, D]; embedded: the embeddings of all streams but the last, each [B, N, D];
        run_block: calls a layer (with activation checkpointing where wanted); places: as in `LocalContext`.  Returns
        [B, N, C, W].
        """
        leading = [] if self.context is None else [self.context(hidden, places)]
        slots = [*leading, self.narrow_state(hidden), *map(self.narrow_embedding, embedded)]
        x = torch.stack(slots, dim=2).flatten(0, 1)                                # [B N, slots, W]
        for index, block in enumerate(self.layers):
            # The summary predicts nothing: the last layer needs it only as a key.
            x = run_block(block, x, self.rotary, skip=self.leading * (index == len(self.layers) - 1))
        return x.unflatten(0, hidden.shape[:2])

    def new_state(self, batch: int) -> HeadState:
        """Buffers for decoding `batch` grids, allocated once."""
        weight, heads = next(self.layers.parameters()), self.config.n_head
        cache = KVCache(len(self.layers), batch, heads, self.slots, self.config.dim // heads, weight.device, weight.dtype)
        return HeadState(torch.empty(0) if self.context is None else self.context.new_state(batch), cache)

    def begin_cell(self, hidden: Tensor, cell: Tensor, state: HeadState) -> Tensor:
        """First pass of a cell [1], summary and state together: [B, D] -> head state of the first stream [B, W]."""
        leading = [] if self.context is None else [self.context.step(hidden, cell, state.contributions)]
        return self._pass(torch.stack([*leading, self.narrow_state(hidden)], dim=1), state, slot=0)

    def continue_cell(self, embedded: Tensor, stream: int, state: HeadState) -> Tensor:
        """Pass of the next stream: embedding of stream - 1's choice [B, D] -> head state of `stream` [B, W]."""
        return self._pass(self.narrow_embedding(embedded)[:, None], state, slot=self.leading + stream)

    def _pass(self, x: Tensor, state: HeadState, slot: int) -> Tensor:
        end = slot + x.shape[1]
        rotary, span = None if self.rotary is None else self.rotary[slot:end], Span(state.cache.positions[slot:end], end)
        for index, (block, cache) in enumerate(zip(self.layers, state.cache.layers, strict=True)):
            last = index == len(self.layers) - 1
            x = block(x, rotary, cache, span, skip=self.leading * (slot == 0 and last))
        return x[:, -1]
