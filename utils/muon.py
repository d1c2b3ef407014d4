"""Muon, and several optimizers as one.

Muon (K. Jordan 2024; arXiv 2502.16982, "Muon is Scalable for LLM Training") moves a hidden matrix by its momentum with all
singular values made about 1.  Update rule, coefficients and state are those of `torch.optim.Muon`.  The step is written anew,
because torch's does not know steps that are left out, matrices that hold several, nor how to share the work of sharded ones.
IAR2's paper trains with AdamW.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from utils.distributed import local_shard

_TOGETHER = 2**24  # weights of a process that are moved at once: enough to fill a device, little beside activations
_ADAMW_RMS = 0.2   # root mean square of AdamW's update, as a rule (arXiv 2502.16982, section 2.2)


def orthogonalise(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices.

    matrices: [n, A, B]; coefficients: (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X; eps: the least norm.  Returns
    [n, A, B], whose singular values are between about 0.7 and 1.2, but for those that were nearly zero.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix is the cheaper
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)                        # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT                                                            # [n, min(A, B), min(A, B)]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """Muon for matrices, whole or sharded, whose update is as large as AdamW's with the same learning rate.

    Equal matrices are moved together.  Updates of sharded ones are exchanged once in each direction, and every process
    orthogonalises its share of the matrices.  Where `found_inf` is above 0, as for torch's fused optimizers, weights and momentum
    stay as they are.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float, precision: torch.dtype) -> None:
        """groups: "params", all [A, B], and "parts", the number of equal blocks of rows that are matrices of their own;
        precision: of the iteration, bfloat16 in torch's."""
        super().__init__(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.precision = precision
        for group in self.param_groups:
            for parameter in group["params"]:  # now, so that a checkpoint can be loaded into them
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all matrices that have a gradient."""
        for group in self.param_groups:
            for matrices in _equal(group["params"]):
                self._move(matrices, group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        weights = [local_shard(matrix) for matrix in matrices]                     # n x [a, B], of A rows those held here
        buffers = [local_shard(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        gradients = torch.stack([local_shard(matrix.grad) for matrix in matrices if matrix.grad is not None])  # [n, a, B]
        before, lr = torch.stack(buffers), group["lr"]
        left_out = before.new_zeros((), dtype=torch.bool) if self.found_inf is None else self.found_inf > 0
        momentum = before.lerp(gradients, 1 - group["momentum"])
        update = gradients.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = self._orthogonal(update.to(self.precision), matrices[0], group).to(before.dtype)
        rows, columns = matrices[0].shape[0] // group["parts"], matrices[0].shape[1]
        lr_of_shape = lr * _ADAMW_RMS * math.sqrt(max(rows, columns))  # an orthogonal matrix has an RMS of 1 / this root
        torch._foreach_copy_(buffers, torch.where(left_out, before, momentum).unbind())
        torch._foreach_mul_(weights, torch.where(left_out, 1.0, 1 - lr * group["weight_decay"]))
        torch._foreach_add_(weights, torch.where(left_out, 0.0, update).unbind(), alpha=-lr_of_shape)

    def _orthogonal(self, update: Tensor, like: Tensor, group: dict[str, Any]) -> Tensor:
        """The rows held here [n, a, B] of n updates of `like`'s shape [A, B] -> those of the orthogonalised updates."""
        def whole(x: Tensor) -> Tensor:
            parts = x.reshape(len(x) * group["parts"], like.shape[0] // group["parts"], like.shape[1])
            return orthogonalise(parts, group["ns_coefficients"], group["ns_steps"], group["eps"]).reshape(x.shape)

        if not isinstance(like, DTensor):
            return whole(update)
        shape = torch.Size((len(update), *like.shape))
        about: dict[str, Any] = dict(device_mesh=like.device_mesh, shape=shape, stride=torch.empty(shape, device="meta").stride())
        by_rows = [Shard(1) if placement.is_shard() else placement for placement in like.placements]
        by_matrix = [Shard(0) if placement.is_shard() else placement for placement in like.placements]
        update = DTensor.from_local(update, placements=by_rows, **about).redistribute(placements=by_matrix).to_local()
        return DTensor.from_local(whole(update), placements=by_matrix, **about).redistribute(placements=by_rows).to_local()


def _shards(tensor: Tensor) -> int:
    """Into how many parts a tensor is cut."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(tensor.device_mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard())


def _equal(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that have a gradient, in lists of one shape; the same lists in every process."""
    found: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(parameter.shape, []).append(parameter)
    for equal in found.values():
        count = max(_TOGETHER * _shards(equal[0]) // equal[0].numel(), 1)
        yield from (equal[start : start + count] for start in range(0, len(equal), count))


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters as one, with all their groups and states: what holds for one holds for it."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            self.state.update(part.state)
        self._share()

    def _share(self) -> None:
        """Let the parts see these groups and states, which loading replaces."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups, part.state = list(islice(groups, len(part.param_groups))), self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all parts; `found_inf` is theirs too."""
        for part in self.parts:
            scaled: Any = part
            scaled.grad_scale, scaled.found_inf = self.grad_scale, self.found_inf
            part.step()
