"""The order in which cells are predicted: raster, or in training annealed from random to raster (RAR, arXiv 2411.00776).

With `order="random"` a GPT has a learned embedding of every cell as a target ("target-aware" in RAR).  Each trunk input gets
that of the cell predicted next, the class token that of the first, because in a random order the state alone does not tell
which cell is asked for.  Training permutes a grid with a probability that falls to 0; sampling and evaluation are in raster
order, so that a decoder only adds the embedding of the next cell.

A permutation acts on the trunk alone.  A trunk input keeps the rotary row of its own cell, and states return to the steps of
raster order before the paradigm makes logits of them, so that logits, targets and losses are by cell whatever the order.  What
the paper leaves open:

- The streams of a cell stay together (alternating), or all cells of a stream before the next (grouped); the cells of every
  stream come in the same order.
- The local-context window keeps its raster-causal offsets, those that the head's weights stand for.  A neighbour counts if it
  was predicted before the cell, else it contributes as one outside the grid does.  Those predicted before the cell at other
  offsets reach it through the trunk.
- The embedding of the target is dropped neither with the class nor with tokens: class dropout replaces the class alone, as in
  RAR's code, because the unconditional branch of guidance is asked for a cell too.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.transformer import GPTConfig, rotary_table
from utils.batches import StepPlan
from utils.distributed import Processes


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample: x [B, M, D], index [B, ...] in [0, M) -> [B, ..., D]."""
    first = torch.arange(len(x), device=x.device).view(-1, *[1] * (index.ndim - 1)) * x.shape[1]
    return F.embedding(index + first, x.flatten(0, 1))


def predicted_before(window: Tensor, places: Tensor) -> Tensor:
    """Windows of each sample without the neighbours that are predicted after the cell.

    window: [N, n] neighbours of each cell, N for one outside the grid; places: [B, N] place of each cell in the order.  Returns
    [B, N, n] with N for those too; in raster order the window itself.
    """
    outside = len(window)
    known = F.pad(places, (0, 1), value=outside)[:, window] < places[..., None]    # [B, N, n]
    return torch.where(known, window, outside)


class Raster:
    """A pass in the trunk's own order: nothing moves."""

    places: Tensor | None = None

    def codes(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] as the paradigm makes trunk inputs of them."""
        return codes

    def targets(self, cell_of: Tensor) -> Tensor:
        """The cell that each trunk step predicts: of raster order [T] -> [T]."""
        return cell_of

    def rotary(self, rows: Tensor) -> Tensor:
        """Rotary rows of all trunk inputs, the condition's in front: of raster order [P - 1 + T, E/2, 2] -> the same."""
        return rows

    def states(self, hidden: Tensor) -> Tensor:
        """Trunk states [B, T, D] at the steps of raster order."""
        return hidden


RASTER = Raster()


class Permuted(Raster):
    """A pass in an order of each sample's own; shapes and purposes as in `Raster`."""

    places: Tensor  # [B, N] place of each cell

    def __init__(self, order: Tensor, steps: "RandomOrder") -> None:
        """order: [B, N] int64, the cell predicted at each place."""
        self.order, self.steps = order, steps
        self.places = order.argsort(1)                                             # the inverse of a permutation

    def codes(self, codes: Tensor) -> Tensor:
        """Codes by cell -> by place [B, C, N]."""
        return codes.gather(2, self.order[:, None].expand_as(codes))

    def targets(self, cell_of: Tensor) -> Tensor:
        """The cell that each trunk step predicts [B, T]."""
        return self.order[:, cell_of]

    def rotary(self, rows: Tensor) -> Tensor:
        """Rows of the cells whose codes are read, for all heads alike [B, 1, P - 1 + T, E/2, 2]; the condition keeps its own."""
        read = self.targets(self.steps.cell_of)[:, :-1]                            # [B, T - 1]
        front = rows[: len(rows) - read.shape[1]].expand(len(read), -1, -1, -1)    # [B, P, E/2, 2]
        return torch.cat([front, self.steps.rotary[read].type_as(front)], dim=1)[:, None]

    def states(self, hidden: Tensor) -> Tensor:
        """State of each step of raster order, from wherever its cell was predicted [B, T, D]."""
        steps = self.steps.step_of[self.steps.row_of, self.places[:, self.steps.cell_of]]  # [B, T]
        return take_rows(hidden, steps)


class RandomOrder(nn.Module):
    """What a GPT needs for orders other than raster: embeddings of targets, and where the steps of raster order go."""

    cell_of: Tensor  # [T] cell that each trunk step predicts, in raster order
    row_of: Tensor   # [T] row of step_of that each trunk step stands in
    step_of: Tensor  # [R, N] trunk step that predicts each cell, for every set of streams that a step predicts
    rotary: Tensor   # [N, E/2, 2] rotary rows of all cells

    def __init__(self, config: GPTConfig, cell_of: Tensor, streams_of: list[tuple[int, ...]]) -> None:
        """cell_of, streams_of: what each trunk step predicts in raster order (`paradigms.Paradigm`)."""
        super().__init__()
        self.target = nn.Embedding(config.cells, config.dim)
        rows = sorted(set(streams_of))
        row_of = torch.tensor([rows.index(streams) for streams in streams_of])
        step_of = torch.empty(len(rows), config.cells, dtype=torch.long)
        step_of[row_of, cell_of] = torch.arange(len(cell_of))
        self.register_buffer("cell_of", cell_of, persistent=False)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("step_of", step_of, persistent=False)
        table = rotary_table(config.grid_size, config.dim // config.n_head, config.rotary_base)
        self.register_buffer("rotary", table, persistent=False)


def random_share(progress: float, anneal: tuple[float, float]) -> float:
    """RAR's r, the probability that a grid is permuted: 1 until anneal[0], falling linearly to 0 at anneal[1].

    progress: share of the training that is done, in [0, 1); anneal: shares too (RAR: epochs 200 and 300 of 400, 0.5 and 0.75).
    """
    start, end = anneal
    if progress < start:
        return 1.0
    return max(end - progress, 0.0) / (end - start) if end > start else 0.0


def draw_orders(share: float, cells: int, plan: StepPlan, seed: int, step: int, processes: Processes) -> tuple[Tensor, ...]:
    """Orders of a step's grids: for every micro-batch of this process [B, N] int64, the cell predicted at each place.

    Each grid's order is uniformly random with probability `share`, else raster.  It depends on (seed, step) and the grid's
    place in the global batch alone, neither on micro-batches nor on processes (but CPUs and GPUs draw other numbers).  Orders
    are drawn, and stay, on the device.
    """
    generator = torch.Generator(processes.device)
    generator.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
    permuted = torch.rand(plan.global_batch, generator=generator, device=processes.device) < share
    keys = torch.rand(plan.global_batch, cells, generator=generator, device=processes.device)
    mine = slice(processes.rank, None, processes.world_size)                       # as GlobalBatches shares images
    raster = torch.arange(cells, device=processes.device)
    orders = torch.where(permuted[mine, None], keys[mine].argsort(1), raster)      # [images of this process, N]
    return orders.split(plan.micro_batch)
