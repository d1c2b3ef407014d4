"""Code run on CUDA tensors without a GPU: they have shapes and a device but no values, and every operation is seen.

Needs a torch built for CUDA, no driver.  A mixture of devices raises, as on a GPU; so does whatever must know a value and would
make the host wait.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that launch nothing: views and allocations.
_FREE = {
    "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "chunk", "unbind", "detach", "alias", "as_strided", "_reshape_alias", "unfold", "lift_fresh", "empty",
    "empty_like", "new_empty", "empty_strided", "new_empty_strided", "narrow", "movedim", "device",
}


class Watch(TorchDispatchMode):
    """Counts the kernels that operations on CUDA tensors launch, and their copies between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        on_device = [each.device.type == "cuda" for each in tensors]
        if any(on_device) and name not in _FREE:
            self.kernels[name] += 1
            # Numbers on the host, which have no dimension, travel with the launch.
            if any(not there and each.ndim for there, each in zip(on_device, tensors)):
                self.copies[name] += 1
        return result


def to_cuda(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What `module.to("cuda", dtype)` does, for parameters without values, which that cannot exchange."""
    def move(tensor: Tensor) -> Tensor:
        return tensor.to("cuda", dtype if tensor.is_floating_point() else None)

    for part in module.modules():
        part._parameters.update({name: None if p is None else nn.Parameter(move(p.detach()), False)
                                 for name, p in part._parameters.items()})
        part._buffers.update({name: None if b is None else move(b) for name, b in part._buffers.items()})
    return module


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The kernels that a GPU would choose; torch, which finds none, would take many small ones."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False)[0]
    mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, 0.0, is_causal)[0]


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Within the block, tensors are made without values, also those on CUDA, and nothing has gradients."""
    # Inference mode would pass by what makes tensors fake.
    inference = mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad())
    with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention), inference, torch.no_grad(), FakeTensorMode():
        yield
