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


def cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over the cells of the valid samples, in nats; 0 where no sample is valid.

    logits: [B, N, K]; targets: [B, N]; valid: bool [B], None: all are.  As LlamaGen does, the mean is over what is given: a
    micro-batch with fewer valid samples gives each of them more weight.
    """
    if valid is None:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)  # [B, N]
    return losses.mul(valid[:, None]).sum() / (valid.sum() * targets.shape[1]).clamp_min(1)


def stream_losses(logits: list[Tensor], codes: Tensor, weights: tuple[float, ...],
                  valid: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 14: the weighted sum of the streams' cross-entropies, each the mean over cells, in nats.

    logits: C tensors [B, N, K_c]; codes: [B, C, N]; weights: C factors, (λ_s, 1); valid: as in `cross_entropy`.  Returns the
    scalar loss and its detached parts by name.
    """
    losses = [cross_entropy(stream, target, valid)
              for stream, target in zip(logits, codes.unbind(1), strict=True)]
    total = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
    names = STREAMS[len(losses)]
    return total, {"loss": total.detach()} | {f"loss_{name}": loss.detach() for name, loss in zip(names, losses)}


def cluster_loss(logits: Tensor, codes: Tensor, cluster_size: int,
                 valid: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """IAR's cross-entropy of the cluster, whose probability is the sum of its members' (IAR2 paper, section 3.3).

    logits: [B, N, K], clusters are consecutive codes; codes: [B, N]; valid: as in `cross_entropy`.
    Returns the mean over cells in nats, and detached the loss and, over all samples, the accuracy of the likeliest cluster.
    """
    clusters = logits.float().unflatten(-1, (-1, cluster_size)).logsumexp(-1)      # [B, N, K / cluster_size]
    target = codes // cluster_size
    loss = cross_entropy(clusters, target, valid)
    accuracy = (clusters.argmax(-1) == target).float().mean()
    return loss, {"loss_cluster": loss.detach(), "cluster_accuracy": accuracy.detach()}


def objective(logits: list[Tensor], codes: Tensor, options: ObjectiveOptions,
              valid: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that training minimises: logits C x [B, N, K_c], codes [B, C, N] -> scalar, and its detached parts.

    valid: bool [B], samples that count; None: all do.
    """
    weights = (options.semantic_weight if len(logits) > 1 else 1.0,) + (1.0,) * (len(logits) - 1)
    total, parts = stream_losses(logits, codes, weights, valid)
    if options.cluster_weight:
        for stream, target in zip(logits, codes.unbind(1), strict=True):
            extra, terms = cluster_loss(stream, target, options.cluster_size, valid)
            total, parts = total + options.cluster_weight * extra, parts | terms
        parts["loss"] = total.detach()
    return total, parts
