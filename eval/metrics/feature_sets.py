"""Inception features of sets of images, and distances between two sets."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..engine.instruments import Instruments
from ..engine.record import Clock
from ..engine.state import State
from .distribution import inception_score, kernel_distance, precision_recall
from .inception import CLASSES, FEATURES
from .metric import Metric
from .statistics import FeatureStatistics, Gaussian, frechet_distance

FEW = 10_000
"""With fewer images than this, FID depends more on their number than on their content."""
PARTS = {"pr": ("precision", "recall")}
"""Metrics that are selected by one name and recorded under several."""


class FeatureSet:
    """The features of one set of images: running statistics, and the rows that some metrics need.

    `sets` are the metrics that this set is for: KID and precision/recall take all features at once, the
    Inception score at all logits of the judged set. Those rows are kept on disk, in tables of `state`.
    """

    def __init__(
        self, name: str, instruments: Instruments, state: State, sets: Sequence[str], *, judged: bool = True
    ) -> None:
        self.name, self.state, self.network = name, state, instruments.inception
        on_gpu = instruments.device.type == "cuda"
        statistics = FeatureStatistics(FEATURES, instruments.device if on_gpu else "cpu")
        self.statistics = state.add(name, statistics)
        self.kept = {"features": FEATURES} if {"kid", "pr"} & set(sets) else {}
        if judged and "is" in sets:
            self.kept["logits"] = CLASSES
        for kept, width in self.kept.items():
            state.add_table(f"{name}-{kept}", "float32", width)

    def update(self, images: Tensor, numbers: Tensor, clock: Clock) -> None:
        """Add images uint8 [B, 3, H, W], which have these numbers in their data set."""
        with clock("inception"):
            features, logits = self.network(images)
        with clock("statistics"):
            self.statistics.update(features)
            values = {"features": features, "logits": logits}
            for kept in self.kept:
                self.state.write(f"{self.name}-{kept}", numbers, values[kept])

    def rows(self, kept: str) -> Tensor:
        """All features [n, 2048] or logits [n, 1008], on disk."""
        return self.state.rows(f"{self.name}-{kept}")


def compare(
    metric: str,
    judged: FeatureSet | Gaussian,
    real: FeatureSet | Gaussian,
    *,
    seed: int,
    kid_subset_size: int = 1000,
) -> dict[str, dict[str, Any]]:
    """One metric of `SETS`: FID, Inception score (of the judged set), KID, or precision and recall.

    A metric that needs more than statistics, or more images, is {"skipped": why}.
    """
    makers: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
        "fid": lambda: {"fid": {"value": frechet_distance(_gaussian(judged), _gaussian(real))}},
        "is": lambda: _score(judged, seed),
        "kid": lambda: _kernel(judged, real, seed, kid_subset_size),
        "pr": lambda: _manifold(judged, real),
    }
    try:
        return makers[metric]()
    except ValueError as error:
        return skipped(metric, str(error))


def warn_of_few(metrics: dict[str, dict[str, Any]], n: int) -> list[str]:
    """Warning for a Fréchet distance between few images."""
    if n >= FEW or "value" not in metrics.get("fid", {}):
        return []
    few = f"FID of {n:,} images is biased: compare it with FID of the same number only ({FEW:,} or more)"
    if n < FEATURES:
        few += f"; these are fewer than its {FEATURES:,} features, so their covariance is not of full rank"
    return [few]


def skipped(name: str, reason: str) -> dict[str, dict[str, Any]]:
    """The entry of a record for a metric that was not computed."""
    return {part: {"skipped": reason} for part in PARTS.get(name, (name,))}


def _gaussian(side: FeatureSet | Gaussian) -> Gaussian:
    return side if isinstance(side, Gaussian) else side.statistics.gaussian()


def _rows(side: FeatureSet | Gaussian, kept: str) -> Tensor:
    if isinstance(side, Gaussian):
        raise ValueError("this metric needs single images, and a .npz of statistics has none")
    return side.rows(kept)


def _score(judged: FeatureSet | Gaussian, seed: int) -> dict[str, dict[str, Any]]:
    score = inception_score(_rows(judged, "logits"), seed=seed)
    return {"is": {"value": score.mean, "std": score.std, "splits": score.splits}}


def _kernel(
    judged: FeatureSet | Gaussian, real: FeatureSet | Gaussian, seed: int, size: int
) -> dict[str, dict[str, Any]]:
    rows = _rows(judged, "features"), _rows(real, "features")
    if (smaller := min(map(len, rows))) < size:
        raise ValueError(
            f"KID takes subsets of {size} images and there are {smaller}: give --kid-subset-size"
        )
    distance = kernel_distance(*rows, subset_size=size, seed=seed)
    settings = {"subsets": distance.subsets, "subset_size": distance.subset_size}
    return {"kid": {"value": distance.mean, "std": distance.std, **settings}}


def _manifold(judged: FeatureSet | Gaussian, real: FeatureSet | Gaussian) -> dict[str, dict[str, Any]]:
    shares = precision_recall(_rows(judged, "features"), _rows(real, "features"))
    return {"precision": {"value": shares.precision}, "recall": {"value": shares.recall}}


_NETWORK = "torch-fidelity's InceptionV3"
METRICS = (
    Metric("fid", "FID", style=".3f", better="lower", needs=_NETWORK, card=True, rank=11),
    Metric("is", "Inception score", style=".2f", better="higher", needs=_NETWORK, card=True, rank=13),
    Metric("kid", "KID", style=".3e", better="lower", needs=_NETWORK, rank=14),
    Metric("precision", "precision", better="higher", needs=_NETWORK, option="pr", rank=15),
    Metric("recall", "recall", better="higher", needs=_NETWORK, option="pr", rank=16),
)
