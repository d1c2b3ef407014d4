"""Fréchet distance, inception score, precision and recall on plain arrays, as ADM's evaluator defines them.

Definitions: Fréchet distance, Heusel et al. 2017 (arXiv 1706.08500); inception score, Salimans et al. 2016 (arXiv
1606.03498); improved precision and recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991); their settings, Dhariwal and
Nichol 2021 (ADM, arXiv 2105.05233).

Deviations from ADM, all below its own last digits: means and covariances are accumulated in float64; the trace of the
matrix root comes from symmetric eigen-decompositions and singular values instead of `scipy.linalg.sqrtm`, which is
exact for singular covariances too and needs no epsilon on the diagonal; a class of probability 0 adds 0 to the
inception score instead of NaN.  Precision and recall keep ADM's half-precision distances: rounding decides ties.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

NEAREST_K = 3  # neighbours that define an image's radius
TILE = 10_000  # rows and columns that share one decision between half and single precision
STRIPE = 1_000  # rows computed at once: bounds the single-precision scratch memory
SPLIT_SIZE = 5_000  # images in one split of the inception score

Array = np.ndarray | Tensor
T = TypeVar("T")


@contextmanager
def _setting(read: Callable[[], T], change: Callable[[T], None], value: T) -> Iterator[None]:
    """Within the block a setting of torch has another value."""
    before = read()
    change(value)
    try:
        yield
    finally:
        change(before)


class Moments:
    """Mean and covariance of feature rows that arrive in batches, in float64.

    Rows are shifted by the first batch's mean, so that the sum of squares does not cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._sum = self._products = torch.empty(0)

    def update(self, features: Array) -> None:
        """Add rows; features: [n, D], any float type, all batches on one device."""
        rows = torch.as_tensor(features).double()  # [n, D]
        if not self.count:
            self._shift = rows.mean(0)
            self._sum = torch.zeros_like(self._shift)
            self._products = self._sum.new_zeros(len(self._sum), len(self._sum))
        rows = rows - self._shift
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products.addmm_(rows.T, rows)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean [D] and covariance [D, D] with N - 1 in the denominator; raises ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        mean = self._sum / self.count
        sigma = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (mean + self._shift).cpu().numpy(), sigma.cpu().numpy()


def feature_statistics(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of features [N, D], float64, N - 1 in the denominator."""
    moments = Moments()
    moments.update(features)
    return moments.finish()


def _root(sigma: Array) -> Tensor:
    """A factor F [D, rank] of a covariance [D, D] with F Fᵀ = sigma.

    Directions without variance are left out: their eigenvalues are rounding noise, and its square root would not be.
    """
    sigma = torch.as_tensor(sigma).double()
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors[:, kept] * values[kept].sqrt()  # [D, rank]


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Fréchet distance of two Gaussians: |mu1 - mu2|² + tr(sigma1) + tr(sigma2) - 2 tr √(sigma1 sigma2).

    mu: [D], sigma: [D, D], any rank.  With sigma1 = F Fᵀ and sigma2 = G Gᵀ, the root's trace is the sum of the
    singular values of Fᵀ G, which stays exact for singular covariances; float64.  Raises ValueError if the shapes
    differ.  Source: arXiv 1706.08500, eq. 6.
    """
    if np.shape(mu1) != np.shape(mu2) or np.shape(sigma1) != np.shape(sigma2):
        raise ValueError(f"statistics of different shapes: {np.shape(mu1)} and {np.shape(mu2)}, "
                         f"{np.shape(sigma1)} and {np.shape(sigma2)}")
    difference = torch.as_tensor(mu1).double() - torch.as_tensor(mu2).double()
    variances = torch.as_tensor(sigma1).double().trace() + torch.as_tensor(sigma2).double().trace()
    # One thread: several that wait for each other on busy cores took 3 to 5 times as long.
    with _setting(torch.get_num_threads, torch.set_num_threads, 1):
        cross = torch.linalg.svdvals(_root(sigma1).T @ _root(sigma2)).sum()
    return max(float(difference @ difference + variances - 2 * cross), 0.0)


def inception_score(probs: Array, split_size: int = SPLIT_SIZE) -> float:
    """Inception score: mean over splits of exp of the mean KL divergence from the split's mean prediction.

    probs: [N, classes], rows sum to 1; splits are taken in order, a partial last one counts as much as a full one, as
    in ADM.  Returns a value from 1 to the number of classes.  Source: arXiv 1606.03498, eq. in section 4.
    """
    scores = []
    for part in torch.as_tensor(probs).split(split_size):
        part = part.double()
        marginal = part.mean(0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def full_float32() -> AbstractContextManager[None]:
    """Keep TensorFloat-32 out of matrix products: its 10 bits would move features and single-precision distances."""
    return _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")


def _half_norms(rows: Tensor) -> Tensor:
    """Squared norms of half-precision rows [n, D], summed in half precision as TensorFlow's CPU kernel does.

    The order of the sum decides the last bit, and the last bits decide ties: 32 interleaved running sums, folded to 8 in half
    precision and to one in single precision; rows longer than 1600 in two halves.  The result is the same on every device.
    """
    squares = torch.nn.functional.pad(rows * rows, (0, -rows.shape[1] % 32))
    middle = squares.shape[1] // 2 // 32 * 32 if squares.shape[1] > 1600 else 0
    norms = []
    for part in (squares[:, :middle], squares[:, middle:]) if middle else (squares,):
        lanes = part.reshape(len(part), -1, 4, 8)  # [n, D / 32, 4, 8]
        sums = lanes[:, 0]  # [n, 4, 8]
        for step in range(1, lanes.shape[1]):
            sums = sums + lanes[:, step]
        folded = sums[:, 0] + sums[:, 1] + sums[:, 2] + sums[:, 3]  # [n, 8]
        norms.append(folded.float().sum(1).half())  # [n]
    return sum(norms[1:], norms[0])


def _half_distances(rows: Tensor, columns: Tensor) -> Tensor | None:
    """Squared distances [n, m] of feature rows in half precision, or None where it overflows anywhere."""
    half_rows, half_columns = rows.half(), columns.half()
    row_norms, column_norms = _half_norms(half_rows)[:, None], _half_norms(half_columns)[None]
    if not (row_norms.isfinite().all() and column_norms.isfinite().all()):
        return None
    distances = torch.empty(len(rows), len(columns), dtype=torch.float16, device=rows.device)
    right = half_columns.float().T
    for start in range(0, len(rows), STRIPE):
        stripe = slice(start, start + STRIPE)
        # Products of half-precision values are exact in single precision: the sum is rounded once, at the end.
        products = (half_rows[stripe].float() @ right).half()
        torch.sub(row_norms[stripe], products.mul_(2), out=products)
        torch.add(products, column_norms, out=distances[stripe])
        if not distances[stripe].isfinite().all():
            return None
    return distances.clamp_(min=0)


def _tile_distances(rows: Tensor, columns: Tensor, half: bool) -> Tensor:
    """Squared distances [n, m] of feature rows, in half precision if asked for, but in single where half overflows anywhere."""
    if half and (distances := _half_distances(rows, columns)) is not None:
        return distances
    row_norms, column_norms = rows.square().sum(1)[:, None], columns.square().sum(1)[None]
    return (row_norms - 2 * (rows @ columns.T) + column_norms).clamp_(min=0)


def _as_features(features: Array, device: torch.device | str | None) -> Tensor:
    return torch.as_tensor(features).to(device=device, dtype=torch.float32)


def nearest_radii(features: Array, device: torch.device | str | None = None, tile: int = TILE, half: bool = True) -> Tensor:
    """Squared distance of every feature row to its third nearest other row (NEAREST_K).

    features: [N, D]; half: compute in half precision, as ADM does; returns float32 [N] on `device`.  The row itself counts as the
    nearest, as in ADM, also when a duplicate exists.  Memory: one tile x tile block, whatever N.  Raises ValueError for
    N <= NEAREST_K.
    """
    features = _as_features(features, device)
    if len(features) <= NEAREST_K:
        raise ValueError(f"{NEAREST_K} nearest neighbours need more than {NEAREST_K} rows, got {len(features)}")
    radii = []
    with full_float32():
        for rows in features.split(tile):
            nearest = []
            for columns in features.split(tile):
                distances = _tile_distances(rows, columns, half)
                kept = [part.float().topk(min(NEAREST_K + 1, len(columns)), dim=1, largest=False).values
                        for part in distances.split(STRIPE)]
                nearest.append(torch.cat(kept))  # [n, NEAREST_K + 1]
            radii.append(torch.cat(nearest, 1).kthvalue(NEAREST_K + 1, dim=1).values)
    return torch.cat(radii)


def precision_recall(reference: Array, sample: Array, device: torch.device | str | None = None,
                     tile: int = TILE, half: bool = True) -> tuple[float, float]:
    """Improved precision and recall of feature rows.

    reference: [N, D], sample: [M, D], both with more than NEAREST_K rows; half: compute distances in half precision, as ADM does.
    Precision: share of samples within the radius of some reference row; recall: share of reference rows within the radius of
    some sample; "within" includes equality.
    Source: arXiv 1904.06991, eq. 1 to 3.
    """
    reference, sample = _as_features(reference, device), _as_features(sample, device)
    reference_radii, sample_radii = (nearest_radii(rows, device, tile, half) for rows in (reference, sample))
    sample_inside = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    with full_float32():
        for row in range(0, len(reference), tile):
            for column in range(0, len(sample), tile):
                c = slice(column, column + tile)
                parts = _tile_distances(reference[row : row + tile], sample[c], half).split(STRIPE)  # each [STRIPE, tile]
                for first, part in zip(range(row, row + tile, STRIPE), parts):
                    part = part.float()
                    r = slice(first, first + len(part))
                    sample_inside[c] |= (part <= reference_radii[r, None]).any(0)
                    reference_inside[r] |= (part <= sample_radii[None, c]).any(1)
    return float(sample_inside.double().mean()), float(reference_inside.double().mean())
