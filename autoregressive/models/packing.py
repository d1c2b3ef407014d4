"""Packed weights for decoding on a CPU.

A decoded cell multiplies a handful of rows with every weight once: time goes into reading weights.  oneDNN reads its own
blocked layout at about twice the rate at which the general matrix product reads a row-major matrix (17 against 9 GB/s
for 8 rows on two cores).  The operators are those that torch's compiler uses for frozen CPU graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from utils.optim import native_bf16


def can_pack(linear: nn.Linear) -> bool:
    """True on a CPU for which torch has oneDNN, for weights in float32, or in bfloat16 where it computes in that."""
    weight = linear.weight
    native = weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and native_bf16(weight.device)
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and native


def packed_forward(linear: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    """A function that computes what `linear` does [..., in] -> [..., out] from packed weights."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
    bias = linear.bias

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    return forward


class PackedLinears:
    """Packed copies of the weights of all linear layers of a model (made in 0.2 s for GPT-B, and its memory again).

    rows: of the products to come, for which the layout is chosen.  Gradients do not flow through them.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.forwards = {module: packed_forward(module, rows) for module in model.modules()
                         if isinstance(module, nn.Linear) and can_pack(module)}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block, the layers multiply with their copies."""
        try:
            for linear, forward in self.forwards.items():
                linear.forward = forward  # type: ignore
            yield
        finally:
            for linear in self.forwards:
                linear.__dict__.pop("forward", None)
