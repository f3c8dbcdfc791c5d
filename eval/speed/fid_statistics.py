"""How fast FID's statistics are: `python -m vistok.eval.speed.fid_statistics`.

Two ratios, each taken in one run: accumulation against adding the outer product of every image to a sum, as
TiTok's evaluator does it, and the Fréchet distance of two sets against torch-fidelity's.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics.inception import FEATURES
from ..metrics.statistics import FeatureStatistics, Gaussian, frechet_distance


@dataclass(frozen=True)
class Seconds:
    """What one run took: on the clock, and of the processor, which other programs do not lengthen."""

    clock: float
    processor: float


def accumulation(dim: int, batch_size: int, repeats: int) -> None:
    """Print images/s of `FeatureStatistics` and of the loop over images, and their ratios."""
    features = torch.randn(8 * batch_size, dim)
    few = features[:16]
    loop, ours = [], []
    for _ in range(repeats):
        loop.append(_timed(_outer_products, few, count=len(few))[0])
        ours.append(_timed(_streamed, features.split(batch_size), count=len(features))[0])
    print(f"accumulation, {dim} features, batches of {batch_size}, median of {repeats}")
    print(f"  outer product of every image  {1 / median(s.clock for s in loop):10.1f} images/s")
    print(f"  FeatureStatistics             {1 / median(s.clock for s in ours):10.1f} images/s")
    _print_ratios(loop, ours)


def distance(dim: int, decay: float, repeats: int) -> None:
    """Print seconds of torch-fidelity's distance and of ours, their ratios, and how far they agree.

    The k-th largest variance of the features is k^-decay.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = [_set_of_features(dim, decay, seed) for seed in (0, 1)]
    arrays = [{"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in pair]
    theirs, ours = [], []
    for _ in range(repeats):
        seconds, reference = _timed(fid_statistics_to_metric, *arrays, verbose=False)
        theirs.append(seconds)
        seconds, value = _timed(frechet_distance, *pair)
        ours.append(seconds)
    difference = abs(value / reference[KEY_METRIC_FID] - 1)
    print(f"distance, {dim} features with variances k^-{decay:g}, median of {repeats}")
    print(f"  relative difference           {difference:10.1e}")
    print(f"  torch-fidelity                {median(s.clock for s in theirs):10.2f} s")
    print(f"  frechet_distance              {median(s.clock for s in ours):10.2f} s")
    _print_ratios(theirs, ours)


def _outer_products(features: Tensor) -> Tensor:
    total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for feature in features.double():
        total += torch.outer(feature, feature)
    return total


def _streamed(batches: tuple[Tensor, ...]) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def _set_of_features(dim: int, decay: float, seed: int) -> Gaussian:
    """Statistics of correlated features, of three images for each."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    deviations = torch.arange(1, dim + 1) ** (-decay / 2)
    features = (torch.randn(3 * dim, dim, generator=generator) * deviations) @ rotation
    return _streamed(features.split(512)).gaussian()


def _timed(work: Callable[..., Any], *arguments: Any, count: int = 1, **options: Any) -> tuple[Seconds, Any]:
    """Seconds for each of `count` images, and the result."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work(*arguments, **options)
    return Seconds((time.perf_counter() - clock) / count, (time.process_time() - processor) / count), result


def _print_ratios(slow: list[Seconds], fast: list[Seconds]) -> None:
    for name in ("clock", "processor"):
        ratios = [getattr(a, name) / getattr(b, name) for a, b in zip(slow, fast, strict=True)]
        print(
            f"  ratio of {name} time {median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})", flush=True
        )


def main(arguments: list[str] | None = None) -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(prog="vistok.eval.speed.fid_statistics", description=__doc__)
    parser.add_argument("--dim", type=int, default=FEATURES, help="features of an image")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="of the accumulation")
    parser.add_argument(
        "--distances", type=int, default=1, help="repeats of the distance, half a minute each"
    )
    options = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads (torch), torch {torch.__version__}, numpy {np.__version__}")
    accumulation(options.dim, options.batch_size, options.repeats)
    for decay in (0, 2):  # the time of torch-fidelity's eigenvalues depends on how far they spread
        distance(options.dim, decay, options.distances)


if __name__ == "__main__":
    main()
