"""Training objectives on logits: equation 14's weighted sum over streams, and IAR's cluster-oriented cross-entropy."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.code_shards import STREAMS
from utils.config import NonNegative, Positive


@dataclass
class ObjectiveOptions:
    """What a GPT is trained for."""

    semantic_weight: NonNegative = 1.0
    """λ_s of equation 14."""
    cluster_weight: NonNegative = 0.0
    """λ of IAR's cluster cross-entropy (paper 1.0); 0: off."""
    cluster_size: Positive = 128
    """Consecutive codes that make a cluster (IAR)."""


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


def cluster_loss(logits: Tensor, codes: Tensor, cluster_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """IAR's cross-entropy of the cluster, whose probability is the sum of its members' (IAR2 paper, section 3.3).

    logits: [B, N, K], clusters are consecutive codes; codes: [B, N].  Returns the mean over cells in nats, and
    detached the loss and the accuracy of the likeliest cluster.
    """
    clusters = logits.float().unflatten(-1, (-1, cluster_size)).logsumexp(-1).flatten(0, 1)  # [B N, K / cluster_size]
    target = (codes // cluster_size).flatten()
    loss = F.cross_entropy(clusters, target)
    accuracy = (clusters.argmax(-1) == target).float().mean()
    return loss, {"loss_cluster": loss.detach(), "cluster_accuracy": accuracy.detach()}


def objective(logits: list[Tensor], codes: Tensor, options: ObjectiveOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that training minimises: logits C x [B, N, K_c], codes [B, C, N] -> scalar, and its detached parts."""
    weights = (options.semantic_weight if len(logits) > 1 else 1.0,) + (1.0,) * (len(logits) - 1)
    total, parts = stream_losses(logits, codes, weights)
    if options.cluster_weight:
        for stream, target in zip(logits, codes.unbind(1), strict=True):
            extra, terms = cluster_loss(stream, target, options.cluster_size)
            total, parts = total + options.cluster_weight * extra, parts | terms
        parts["loss"] = total.detach()
    return total, parts
