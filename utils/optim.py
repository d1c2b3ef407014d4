"""The optimizer step of both trainers: options, learning-rate schedule, precision, gradient clipping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from utils.config import Count, Fraction, NonNegative, Precision, choices
from utils.distributed import full_tensor


@dataclass
class OptimOptions:
    """How weights move."""

    lr: NonNegative = 1e-4
    """Learning rate, reached after --warmup-steps."""
    lr_end: NonNegative = 0.0
    """Learning rate at the last step of the cosine schedule; given above 0, it selects that schedule."""
    lr_schedule: Annotated[str, choices(("constant", "cosine"))] = "constant"
    """Schedule after warm-up."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    beta1: Fraction = 0.9
    """Adam's decay of the mean gradient."""
    beta2: Fraction = 0.95
    """Adam's decay of the mean squared gradient."""
    weight_decay: NonNegative = 0.0
    """Weight decay; in a GPT of matrices and embeddings alone."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient norm to this; 0: do not clip."""
    ema_decay: Fraction = 0.0
    """Average the weights with this decay, and evaluate and export the averages; 0: off."""
    mixed_precision: Precision = "auto"
    """bf16; auto: on GPUs, and on CPUs that have instructions for it."""


def typed_schedule(options: OptimOptions) -> dict[str, Any]:
    """Part of a trainer's recipe: a typed --lr-end means cosine decay to it."""
    return {"lr_schedule": "cosine"} if options.lr_end else {}


def learning_rate(options: OptimOptions, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, or cosine decay from --lr to --lr-end."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(total_steps - options.warmup_steps, 1)
    return options.lr_end + (options.lr - options.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(lr: float, *optimizers: torch.optim.Optimizer) -> None:
    """Use `lr` for every parameter from now on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16; precision: bf16, auto (on GPUs only), or anything else for float32."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def trains_in_bf16(precision: str, device: torch.device) -> bool:
    """Whether a training computes in bf16, where its weights and the loss stay float32; auto: where that is faster."""
    return precision == "bf16" or (precision == "auto" and native_bf16(device))


def native_bf16(device: torch.device) -> bool:
    """Whether products are faster in bf16 than in float32: on GPUs, and on CPUs with instructions for them."""
    return device.type == "cuda" or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients to a total norm of at most `max_norm` (0: leave them); returns the norm before."""
    return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Move the weights unless the norm of the gradients is not finite.

    The device decides by itself, so that the host does not wait for it.  Weights and moments stay as they are in a step that is
    left out.
    """
    for group in optimizer.param_groups:  # only a fused step can be left out; a checkpoint from before may say otherwise
        if "fused" in group:              # Muon's, which is left out too, has but one kind
            group |= {"fused": True, "foreach": False}
    fused: Any = optimizer  # the fields by which torch's own gradient scaler does the same
    fused.grad_scale, fused.found_inf = None, (~torch.isfinite(norm)).float()
    optimizer.step()


def initialise_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Create Adam's zero moments now instead of at the first step, so that a checkpoint can be loaded into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),  # where fused optimizers keep it
                "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
