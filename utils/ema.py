"""Exponential moving average of a model's parameters, sharded as the parameters are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.distributed import local_shard


class EMA:
    """Averages of all parameters; buffers are taken from the model.

    decay: per step; step n uses min(decay, (1 + n) / (10 + n)), so that the initial weights soon lose their influence.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters after `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([local_shard(a) for a in self.averages.values()],
                             [local_shard(p.detach()) for p in self.parameters.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's parameters are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            average, current = local_shard(self.averages[name]), local_shard(parameter.detach())
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return self.averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy loaded averages into these, in place."""
        for name, average in self.averages.items():
            local_shard(average).copy_(local_shard(state[name]))
