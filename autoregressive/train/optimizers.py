"""The optimizers of GPT training, and which weights each of them moves.

Table 11 is AdamW for everything.  Muon is not of the paper: it moves the hidden matrices, and AdamW the rest, as its authors say
(`utils/muon.py`).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import Attention
from utils.muon import Muon, Together
from utils.optim import OptimOptions, initialise_optimizer, trains_in_bf16


def hidden_matrices(gpt: GPT) -> dict[int, list[Tensor]]:
    """The matrices between embeddings and output layers, by the number of matrices that each of them holds: 3 for queries, keys
    and values, 1 for the others."""
    outputs = gpt.paradigm.output_layers()  # their rows are codes: more like embeddings than like maps between states
    fused = [module.wqkv for module in gpt.modules() if isinstance(module, Attention)]
    others = [module for module in gpt.modules() if isinstance(module, nn.Linear) and module not in (*fused, *outputs)]
    return {3: [layer.weight for layer in fused], 1: [layer.weight for layer in others]}


def adamw(parameters: Iterable[Tensor], options: OptimOptions) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings only."""
    every = list(parameters)
    groups = [{"params": [p for p in every if p.ndim >= 2], "weight_decay": options.weight_decay},
              {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True)
    initialise_optimizer(optimizer)
    return optimizer


def muon(gpt: GPT, options: OptimOptions) -> Together:
    """Muon for hidden matrices, AdamW for embeddings, output layers, norms and biases; one learning rate and decay for both."""
    hidden = hidden_matrices(gpt)
    moved = {p for matrices in hidden.values() for p in matrices}
    precision = torch.bfloat16 if trains_in_bf16(options.mixed_precision, gpt.paradigm.norm.weight.device) else torch.float32
    groups = [{"params": matrices, "parts": parts} for parts, matrices in hidden.items()]
    return Together(Muon(groups, options.lr, options.weight_decay, precision),
                    adamw((p for p in gpt.parameters() if p not in moved), options))


class Row(NamedTuple):
    """How an optimizer is made, and what it keeps."""

    build: Callable[[GPT, OptimOptions], torch.optim.Optimizer]
    hidden_moments: int  # for each weight of a hidden matrix; two for each of the others


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(lambda gpt, options: adamw(gpt.parameters(), options), 2),
    "muon": Row(muon, 1),
}


def make_optimizer(gpt: GPT, options: OptimOptions, name: str = "adamw") -> torch.optim.Optimizer:
    """The optimizer of a row of OPTIMIZERS, with its moments at zero; gpt: on its device, and sharded if it will be."""
    return OPTIMIZERS[name].build(gpt, options)
