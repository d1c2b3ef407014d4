"""Quantizers: from one latent vector a cell to one code a stream (paper section 4.2.1, equations 5 and 6).

All quantizers share one interface and are looked up in `QUANTIZERS` by the tokenizer: `forward` quantizes, `lookup` turns
codes into latents.  Distances are computed in float32 whatever the autocast state, so that codes do not depend on it.
`GRADIENTS` holds the ways in which the decoder's gradient passes a quantizer; they share the forward value.

Deviation from the paper: latents and the semantic codebook are L2-normalised at use and the detail codebook is not, as
in the release.  Not of the paper: the rotation trick, SimVQ, and the two codebooks of equations 5 and 6 in one stage.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Streams = Literal["semantic", "all"]


@dataclass
class Quantized:
    """Result of a training forward: quantized latents [B, d, h, w], codes [B, C, h, w] and both loss terms."""

    latents: Tensor
    codes: Tensor
    codebook_loss: Tensor     # ||sg[e] - ê||², moves the codebook
    commitment_loss: Tensor   # β ||e - sg[ê]||², moves the encoder


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block products of float32 are not rounded to TF32: its ten bits of mantissa would decide near ties."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row for each vector: [M, d], [K, d] -> [M] int64; never in TF32."""
    with full_precision():
        # |v|² is the same for all codes and does not change the order.
        return torch.addmm(codebook.square().sum(1), vectors, codebook.T, alpha=-2).argmin(1)


def straight_through(e: Tensor, quantized: Tensor) -> Tensor:
    """The quantized vectors [M, d]; their gradient passes unchanged to e [M, d]."""
    return e + (quantized - e).detach()


def rotation(e: Tensor, quantized: Tensor) -> Tensor:
    """The rotation trick (arXiv 2410.06424): quantized vectors [M, d] as |q| / |e| R e, whose factor and R are constants.

    R = I - 2 r rᵀ + 2 q̂ êᵀ with r = (ê + q̂) / |ê + q̂| turns ê = e / |e| to q̂ = q / |q| in their plane, so that the gradient
    keeps its angle to the vector, and its length but for the factor.  Vectors that have no such R, because e or q is zero or
    they are opposite, get the straight-through gradient.
    """
    with torch.no_grad():
        e_length, q_length = (v.norm(dim=-1, keepdim=True) for v in (e, quantized))             # [M, 1]
        e_unit, q_unit = F.normalize(e, dim=-1), F.normalize(quantized, dim=-1)                 # [M, d]
        middle = e_unit + q_unit
        factor = q_length / e_length.clamp_min(1e-6)  # finite, also where it is not used: 0 times infinity is no gradient
        # The middle of nearly opposite vectors is their rounding error.
        defined = (e_length > 1e-6) & (q_length > 1e-6) & (middle.norm(dim=-1, keepdim=True) > 1e-3)
        r = F.normalize(middle, dim=-1)
    turned = factor * (e - 2 * (e * r).sum(-1, keepdim=True) * r + 2 * (e * e_unit).sum(-1, keepdim=True) * q_unit)
    moved = torch.where(defined, turned, e)
    return quantized.detach() + (moved - moved.detach())  # the value is q itself, as sampling decodes it


Gradient = Callable[[Tensor, Tensor], Tensor]
GRADIENTS: dict[str, Gradient] = {"straight-through": straight_through, "rotation": rotation}


class VectorQuantizer(nn.Module):
    """LlamaGen's single codebook; IAR2's associated dual one: semantic, then the detail of the residual (equations 5 and 6)."""

    free_codes = True  # each code is a parameter of its own: k-means and revival can place it

    def __init__(self, codebook_sizes: tuple[int, ...], code_dim: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.gradient: Gradient = straight_through  # of training alone: no part of what a checkpoint computes
        # A uniform start on the sphere, of the detail codebook too, as in the release: a start near zero uses a quarter of it.
        self.codebooks = nn.ParameterList(F.normalize(torch.randn(size, code_dim), dim=-1) for size in codebook_sizes)

    def table(self, stream: int) -> Tensor:
        """The codebook of a stream as it is used [K, d]."""
        return F.normalize(self.codebooks[stream].float(), dim=-1) if stream == 0 else self.codebooks[stream].float()

    def trained(self, stream: int) -> nn.Parameter:
        """The parameter that training moves the codebook of a stream by: here all of its codes [K, d]."""
        return self.codebooks[stream]

    def streams(self, streams: Streams) -> int:
        """Number of streams to quantize with."""
        return 1 if streams == "semantic" else len(self.codebooks)

    def residuals(self, latents: Tensor, stream: int) -> Tensor:
        """What the codebook of `stream` quantizes: latents [B, d, h, w] -> vectors [B h w, d]."""
        residual = F.normalize(latents.float().movedim(1, -1).flatten(0, 2), dim=-1)
        for earlier in range(stream):
            table = self.table(earlier)
            residual = residual - table[nearest(residual, table)]
        return residual

    def forward(self, latents: Tensor, streams: Streams = "all", freeze_semantic: bool = False) -> Quantized:
        """Quantize encoder outputs [B, d, h, w].

        streams: "semantic" stops after the first codebook (stage 1); freeze_semantic keeps the joint loss from moving
        the semantic codebook (equation 9 minimises over E, D and C_d).
        """
        grid = latents.shape[0], *latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            e = self.residuals(latents, 0)                                         # [M, d]
            chosen, quantized, residual = [], torch.zeros_like(e), e
            for stream in range(self.streams(streams)):
                table = self.table(stream)
                table = table.detach() if stream == 0 and freeze_semantic else table
                codes = nearest(residual.detach(), table.detach())
                quantized = quantized + F.embedding(codes, table)
                residual = e - quantized
                chosen.append(codes)
            codebook_loss = F.mse_loss(quantized, e.detach())
            commitment_loss = self.beta * F.mse_loss(e, quantized.detach())
            quantized = self.gradient(e, quantized)
        codes = torch.stack(chosen).unflatten(1, grid).movedim(0, 1)               # [B, C, h, w]
        return Quantized(quantized.unflatten(0, grid).movedim(-1, 1), codes, codebook_loss, commitment_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, C', h, w] of the first C' streams -> latents [B, d, h, w]."""
        parts = [F.embedding(stream, self.table(index)) for index, stream in enumerate(codes.unbind(1))]
        return torch.stack(parts).sum(0).movedim(-1, 1)


class ProductQuantizer(VectorQuantizer):
    """Unassociated dual codebook (table 7): each half of the channels has a codebook of its own, and no residual."""

    def __init__(self, codebook_sizes: tuple[int, ...], code_dim: int, beta: float) -> None:
        super().__init__(codebook_sizes, code_dim, beta)
        self.code_dim, part = code_dim, code_dim // len(codebook_sizes)
        self.codebooks = nn.ParameterList(F.normalize(torch.randn(size, part), dim=-1) for size in codebook_sizes)

    def table(self, stream: int) -> Tensor:
        """The codebook of a stream as it is used, L2-normalised [K, d / C]."""
        return F.normalize(self.codebooks[stream].float(), dim=-1)

    def residuals(self, latents: Tensor, stream: int) -> Tensor:
        """What the codebook of `stream` quantizes: its part of latents [B, d, h, w], normalised -> [B h w, d / C]."""
        part = latents.float().chunk(len(self.codebooks), dim=1)[stream]
        return F.normalize(part.movedim(1, -1).flatten(0, 2), dim=-1)

    def forward(self, latents: Tensor, streams: Streams = "all", freeze_semantic: bool = False) -> Quantized:
        """Quantize each part of encoder outputs [B, d, h, w] by itself; freeze_semantic as in `VectorQuantizer`."""
        grid, chosen, losses, parts = (latents.shape[0], *latents.shape[2:]), [], [], []
        with torch.autocast(latents.device.type, enabled=False):
            for stream in range(self.streams(streams)):
                e, table = self.residuals(latents, stream), self.table(stream)
                table = table.detach() if stream == 0 and freeze_semantic else table
                chosen.append(nearest(e.detach(), table.detach()))
                quantized = F.embedding(chosen[-1], table)
                losses.append((F.mse_loss(quantized, e.detach()), self.beta * F.mse_loss(e, quantized.detach())))
                parts.append(self.gradient(e, quantized).unflatten(0, grid).movedim(-1, 1))
        codes = torch.stack(chosen).unflatten(1, grid).movedim(0, 1)               # [B, C', h, w]
        codebook_loss, commitment_loss = (torch.stack(terms).mean() for terms in zip(*losses))
        return Quantized(self._join(parts), codes, codebook_loss, commitment_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, C', h, w] of the first C' streams -> latents [B, d, h, w], zero where a stream is left out."""
        return self._join([F.embedding(stream, self.table(index)).movedim(-1, 1) for index, stream in enumerate(codes.unbind(1))])

    def _join(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts, dim=1)
        return F.pad(joined, (0, 0, 0, 0, 0, self.code_dim - joined.shape[1]))


class SimVQ(VectorQuantizer):
    """SimVQ (arXiv 2411.02038): codes C W of a frozen Gaussian book C [K, d] and a learned matrix W [d, d], for each stream.

    All codes move with every step, however few are chosen.  Deviations: the codes of the first stream are L2-normalised like
    the latents, as everywhere here; W has no bias and starts as the identity, so that the first codes are those of a fresh
    codebook.
    """

    free_codes = False

    def __init__(self, codebook_sizes: tuple[int, ...], code_dim: int, beta: float) -> None:
        super().__init__(codebook_sizes, code_dim, beta)
        books = (torch.randn(size, code_dim) / code_dim**0.5 for size in codebook_sizes)    # of about unit length
        self.codebooks = nn.ParameterList(nn.Parameter(book, requires_grad=False) for book in books)
        self.matrices = nn.ParameterList(torch.eye(code_dim) for _ in codebook_sizes)

    def table(self, stream: int) -> Tensor:
        """The codebook of a stream as it is used, C W [K, d]."""
        book, matrix = self.codebooks[stream].float(), self.matrices[stream].float()
        with full_precision(), torch.autocast(book.device.type, enabled=False):  # the same codes wherever they are looked up
            codes = book @ matrix
        return F.normalize(codes, dim=-1) if stream == 0 else codes

    def trained(self, stream: int) -> nn.Parameter:
        """The parameter that training moves the codebook of a stream by: W [d, d]."""
        return self.matrices[stream]


QUANTIZERS: dict[str, tuple[type[VectorQuantizer], int, tuple[str, ...]]] = {
    # name: (class, number of codebooks, stages of training)
    "single": (VectorQuantizer, 1, ("single",)),
    "dual": (VectorQuantizer, 2, ("semantic", "dual")),
    "product": (ProductQuantizer, 2, ("single",)),
    # not of the paper: the dual codebooks trained together from the start, and SimVQ with one or two
    "residual": (VectorQuantizer, 2, ("single",)),
    "simvq": (SimVQ, 1, ("single",)),
    "dual-simvq": (SimVQ, 2, ("semantic", "dual")),
}
