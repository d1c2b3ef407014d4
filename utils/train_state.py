"""Everything that changes while training, saved, restored and averaged in one place for both trainers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from utils.distributed import reshard
from utils.ema import EMA


@dataclass
class TrainState:
    """A network with its optimizer and, where averaging is on, the average of its weights."""

    model: nn.Module  # as it is called: wrapped for data parallelism
    optimizer: torch.optim.Optimizer
    ema: EMA | None

    def state_dict(self) -> dict[str, Any]:
        """Nested dict for `utils.checkpoint`; shards stay with their process."""
        state = {"model": get_model_state_dict(self.model), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        return state | ({"ema": self.ema.state_dict()} if self.ema else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a loaded state."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has its averaged weights, where averaging is on."""
        with self.ema.applied() if self.ema else nullcontext():
            reshard(self.model)
            yield
        reshard(self.model)
