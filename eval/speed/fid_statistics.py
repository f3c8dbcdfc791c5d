"""Speed of FID's statistics: `python -m vistok.eval.speed.fid_statistics`.

Ratios, each taken in one run: accumulation against adding the outer product of every image to a sum, as
TiTok's evaluator does it, and the Fréchet distance of two sets against torch-fidelity's, for the first time
and again, when the root of one of them is known.
"""

import argparse
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ...extras import needs
from ..metrics.inception import FEATURES
from ..metrics.statistics import FeatureStatistics, Gaussian, frechet_distance
from .paired import Took, in_turn, ratios, seconds, spread


def accumulation(dim: int, batch_size: int, repeats: int) -> None:
    """Print images/s of `FeatureStatistics` and of the loop over images, and their ratios."""
    features = torch.randn(8 * batch_size, dim)
    few, batches = features[:16], features.split(batch_size)
    took = in_turn(
        {"loop": lambda: _outer_products(few), "streamed": lambda: _streamed(batches)}, repeats, warm_ups=0
    )
    loop = [run.per(len(few)) for run in took["loop"]]
    streamed = [run.per(len(features)) for run in took["streamed"]]
    print(f"accumulation, {dim} features, batches of {batch_size}, median of {repeats}")
    print(f"  outer product of every image  {1 / median(seconds(loop)):10.1f} images/s")
    print(f"  FeatureStatistics             {1 / median(seconds(streamed)):10.1f} images/s")
    _print_ratios(loop, streamed)


def distance(dim: int, decay: float, repeats: int) -> None:
    """Print seconds of torch-fidelity's distance and of vistok's, their ratios, and their relative
    difference.

    The k-th largest variance of the features is k^-decay.
    """
    with needs("torch-fidelity", "eval", "the comparison with it"):
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = [_set_of_features(dim, decay, seed) for seed in (0, 1)]
    arrays = [{"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in pair]
    frechet_distance(*pair)  # makes the root of one of them
    values = {}
    took = in_turn(
        {
            "torch-fidelity": lambda: fid_statistics_to_metric(*arrays, verbose=False)[KEY_METRIC_FID],
            "vistok": lambda: frechet_distance(*map(replace, pair)),  # copies, of which nothing is known
            "known": lambda: frechet_distance(*pair),
        },
        repeats,
        warm_ups=0,
        check=values.update,
    )
    difference = abs(values["vistok"] / values["torch-fidelity"] - 1)
    print(f"distance, {dim} features with variances k^-{decay:g}, median of {repeats}")
    print(f"  relative difference           {difference:10.1e}")
    print(f"  torch-fidelity                {median(seconds(took['torch-fidelity'])):10.2f} s")
    print(f"  frechet_distance              {median(seconds(took['vistok'])):10.2f} s")
    print(f"  frechet_distance, root known  {median(seconds(took['known'])):10.2f} s")
    _print_ratios(took["torch-fidelity"], took["vistok"])
    _print_ratios(took["vistok"], took["known"])


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


def _print_ratios(slow: list[Took], fast: list[Took]) -> None:
    for name, field in (("clock", "seconds"), ("processor", "cpu_seconds")):
        pairs = ratios([getattr(run, field) for run in slow], [getattr(run, field) for run in fast])
        print(f"  ratio of {name} time {spread(pairs, '.1f')}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(prog="vistok.eval.speed.fid_statistics", description=__doc__)
    parser.add_argument("--dim", type=int, default=FEATURES, help="features per image")
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
