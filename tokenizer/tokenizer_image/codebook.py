"""Care of codebooks: k-means initialisation, usage over a whole set, revival of dead codes.

Not in the paper; options of the trainer, for small data, where a uniformly initialised detail codebook leaves most codes
unused.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.kmeans import minibatch_kmeans
from tokenizer.tokenizer_image.quantizer import QUANTIZERS, VectorQuantizer, nearest
from tokenizer.tokenizer_image.vq_model import VQConfig
from utils.code_shards import STREAMS
from utils.config import UserError
from utils.distributed import Processes, all_reduce_sum, broadcast

log = logging.getLogger("codebook")


class CodeUsage:
    """Counts of every code over a set of images, of no or several codebooks."""

    def __init__(self, codebook_sizes: tuple[int, ...], device: torch.device) -> None:
        self.counts = [torch.zeros(size, dtype=torch.long, device=device) for size in codebook_sizes]

    def add(self, codes: Tensor) -> None:
        """Count codes [B, C, ...]."""
        for counts, stream in zip(self.counts, codes.unbind(1)):
            chosen = stream.flatten()
            counts.index_add_(0, chosen, torch.ones_like(chosen))  # a bincount would wait for the device

    def reset(self) -> None:
        """Forget all counts."""
        for counts in self.counts:
            counts.zero_()

    def total(self, processes: Processes) -> list[Tensor]:
        """The counts of all processes together, in new tensors; the own counts stay."""
        return [all_reduce_sum(counts.clone(), processes) for counts in self.counts]

    def figures(self, streams: int, processes: Processes) -> dict[str, float]:
        """usage_NAME, the fraction of codes that any process used, and perplexity_NAME, exp of the code entropy, by stream."""
        result = {}
        for name, counts in zip(STREAMS.get(len(self.counts), ())[:streams], self.total(processes)):
            probability = counts / counts.sum().clamp_min(1)
            result[f"usage_{name}"] = (counts > 0).float().mean().item()
            result[f"perplexity_{name}"] = torch.special.entr(probability).sum().exp().item()
        return result


def remedies(config: VQConfig, init: str = "uniform", revive_every: int = 0) -> str:
    """What helps against collapse and was not done yet; init, revive_every: --codebook-init and --revive-every as they were."""
    if QUANTIZERS[config.quantizer][0].free_codes:
        care = ["--codebook-init kmeans"] * (init != "kmeans") + ["--revive-every 100"] * (not revive_every)
        return " and ".join(care) or "a lower --lr or smaller --codebook-sizes"
    return " or ".join(["--codebook-init whitened"] * (init == "uniform") + ["a lower --lr"])


def warn_of_collapse(figures: dict[str, float], config: VQConfig, image_size: int, care: str = "") -> float:
    """Log a loud warning for every codebook of which less than half is used, where the set was large enough to tell.

    care: what to try; empty: `remedies` of a training that nothing is known of.  Returns the lowest usage that it could tell,
    1 where none.
    """
    lowest, care = 1.0, care or f"training it with {remedies(config)}"
    codes = figures["images"] * (image_size // config.downsampling) ** 2
    for name, size in zip(STREAMS[len(config.codebook_sizes)], config.codebook_sizes):
        usage = figures.get(f"usage_{name}", 1.0)  # a stage that leaves a codebook out has no figure of it
        lowest = min(lowest, usage) if codes >= 4 * size else lowest
        if usage < 0.5 and codes >= 4 * size:
            log.warning("CODEBOOK COLLAPSE: only %.1f%% of the %d codes of the %s codebook are used over %d images; "
                        "try %s", 100 * usage, size, name, figures["images"], care)
    return lowest


@torch.no_grad()
def whiten_projection(projection: nn.Conv2d, encoded: Tensor, processes: Processes) -> None:
    """Set a 1x1 projection to give the whitened principal components of encoder outputs [B, C, h, w].

    The outputs of a fresh encoder have almost the same direction.  On the unit sphere they would all be nearest to a few
    codes, and the commitment term would keep them there.
    """
    vectors = encoded.double().movedim(1, -1).flatten(0, 2)                        # [M, C]
    mean = vectors.mean(0)
    variance, directions = torch.linalg.eigh(torch.cov(vectors.T))                 # ascending
    kept = projection.out_channels
    rows = (directions[:, -kept:] / variance[-kept:].clamp_min(1e-12).sqrt()).T    # [d, C]
    for parameter, value in zip(projection.parameters(), (rows[..., None, None], -rows @ mean), strict=True):
        broadcast(parameter.data.copy_(value), processes)


@torch.no_grad()
def initialise_codebook(quantizer: VectorQuantizer, stream: int, vectors: Tensor, seed: int, processes: Processes) -> None:
    """Set one codebook, on all processes, to the k-means centres of the main process's vectors [M, d]."""
    book = quantizer.codebooks[stream]
    if processes.is_main:
        data = vectors.float().cpu().numpy()
        if len(data) < len(book):
            raise UserError(f"--kmeans-vectors gave {len(data)} vectors for {len(book)} codes: raise it, or use more images.")
        centres = torch.from_numpy(minibatch_kmeans(data, len(book), seed)).to(book)
        book.copy_(F.normalize(centres, dim=-1) if stream == 0 else centres)
    broadcast(book.data, processes)


@torch.no_grad()
def revive_dead_codes(quantizer: VectorQuantizer, stream: int, counts: Tensor, vectors: Tensor,
                      optimizer: torch.optim.Optimizer, processes: Processes) -> int:
    """Move the codes that were never chosen onto random vectors [M, d] of this batch; returns how many.

    counts: [K] since the last revival, summed over processes.  The optimizer's moments of moved codes start anew; a codebook
    that is not trained has none.
    """
    book = quantizer.codebooks[stream]
    dead = (counts == 0).nonzero()[:, 0]
    if len(dead) == 0:
        return 0
    # Vectors far from every code are likelier (as in k-means++); a small displacement separates equal ones.
    table = quantizer.table(stream)
    distance = (vectors - table[nearest(vectors, table)]).square().sum(1)
    chosen = vectors[torch.multinomial(distance + 1e-9, len(dead), replacement=True)]
    chosen = chosen + 0.01 * vectors.std() * torch.randn_like(chosen)
    book[dead] = broadcast(chosen.to(book), processes)
    for moment in optimizer.state.get(book, {}).values():
        if moment.shape == book.shape:
            moment[dead] = 0
    return len(dead)
