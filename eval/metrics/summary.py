"""A mean over images with the interval that resampling the images gives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of `n` values, and the ends of its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def interval(values: Tensor | np.ndarray, seed: int = 0) -> dict[str, float]:
    """The result of `summarise` as an entry of a record: "value", "low" and "high".

    Infinite values, the PSNR of exact reconstructions, are left out of the mean and counted as
    "exact"; where there is no other, "value" is infinite and there is no interval.
    """
    values = np.asarray(values, np.float64)
    infinite = np.isposinf(values)
    if not infinite.any():
        mean = summarise(values, seed)
        return {"value": mean.value, "low": mean.low, "high": mean.high}
    exact = int(infinite.sum())
    if exact == len(values):
        return {"value": math.inf, "exact": exact}
    return {**interval(values[~infinite], seed), "exact": exact}


def psnr_text(metric: Mapping[str, float]) -> str:
    """A mean PSNR of `interval` in dB as tables show it: "31.20", "31.20, 2 exact", or "all exact"."""
    if math.isinf(metric["value"]):
        return "all exact"
    return f"{metric['value']:.2f}" + (f", {metric['exact']} exact" if "exact" in metric else "")


def summarise(values: Tensor | np.ndarray, seed: int = 0) -> Mean:
    """Mean of values [n], one per image, with its percentile bootstrap interval over images.

    The sum is exact, so the mean is the same to the bit in whatever order the images came; the interval
    depends on order and seed. Infinite values (the PSNR of equal images) are carried through. ValueError for
    no values, NaN and other shapes. Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"a mean is taken over values [n], one per image, n at least 1; got {list(values.shape)}"
        )
    if np.isnan(values).any():
        missing = np.flatnonzero(np.isnan(values))[:10].tolist()
        raise ValueError(f"values of images {missing} are NaN: leave those images out or compute them")
    random, n = np.random.default_rng(seed), len(values)
    means = [values[random.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    tail = (1 - LEVEL) / 2
    # A quantile that is one of the means: between a finite and an infinite one nothing can be interpolated.
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return Mean(math.fsum(values) / n, float(low), float(high), n)
