"""Means, standard errors and verdicts of figures that were measured with several seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

ERRORS = 2.0  # standard errors that a difference must exceed


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    error: float
    """Standard error of the mean; infinite for a single value, whose spread nobody knows."""
    seeds: int

    def text(self, digits: int) -> str:
        """mean ± standard error."""
        spread = f" ± {self.error:.{digits}f}" if math.isfinite(self.error) else ""
        return f"{self.mean:.{digits}f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its standard error; raises ValueError for none."""
    if not values:
        raise ValueError("no values to average")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(statistics.fmean(values), error, len(values))


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Estimate:
    """The mean difference `values` - `others` over the seeds that both have: what the seeds share cancels."""
    return estimate([values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())])


def differs(difference: Estimate) -> bool:
    """The verdict: whether a difference exceeds two standard errors."""
    return math.isfinite(difference.error) and abs(difference.mean) > ERRORS * difference.error


def verdict(difference: Estimate, lower_is_better: bool = True) -> str:
    """The verdict in a word."""
    if not math.isfinite(difference.error):
        return "one seed"
    if not differs(difference):
        return "no difference"
    return "better" if (difference.mean < 0) == lower_is_better else "worse"


def at(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """A curve's value at x, between its points by log x, as losses fall; raises ValueError where x lies outside of them."""
    if not min(xs) <= x * (1 + 1e-9) or x > max(xs) * (1 + 1e-9):
        raise ValueError(f"{x} lies outside of the curve, which goes from {min(xs)} to {max(xs)}")
    return float(np.interp(math.log(x), np.log(xs), ys))
