"""Training objectives on logits: the weighted sum over streams of equation 14."""

import torch
import torch.nn.functional as F
from torch import Tensor

STREAMS = {1: ("token",), 2: ("semantic", "detail")}
"""Names of the code streams by their number, for logs and figures."""


def stream_losses(logits: list[Tensor], codes: Tensor, weights: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 14: the weighted sum of the streams' cross-entropies, each the mean over cells, in nats.

    logits: C tensors [B, N, K_c]; codes: [B, C, N]; weights: C factors, (λ_s, 1).  Returns the scalar loss and its
    detached parts by name.
    """
    losses = [F.cross_entropy(stream.flatten(0, 1), target.flatten())
              for stream, target in zip(logits, codes.unbind(1), strict=True)]
    total = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
    names = STREAMS[len(losses)]
    return total, {"loss": total.detach()} | {f"loss_{name}": loss.detach() for name, loss in zip(names, losses)}
