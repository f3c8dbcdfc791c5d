"""Metrics of two sets of Inception features other than FID: KID, Inception score, precision and recall.

They need every feature vector at once; give memory-mapped arrays where those do not fit. All three call
torch-fidelity's own functions, so their digits are that tool's.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...extras import needs

SEED = 2020  # torch-fidelity's


@dataclass(frozen=True)
class KernelDistance:
    """KID: mean and standard deviation over `subsets` random subsets of `subset_size` images each."""

    mean: float
    std: float
    subsets: int
    subset_size: int


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over `splits` parts of the shuffled images."""

    mean: float
    std: float
    splits: int


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in 0..1, and their harmonic mean."""

    precision: float
    recall: float
    f_score: float


def kernel_distance(
    features_1: Tensor, features_2: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> KernelDistance:
    """KID between features [N, D] and [M, D]: cubic kernel (x·y/D + 1)³, unbiased, in float64.

    Features are read subset by subset. ValueError when a set is smaller than `subset_size`, and for shapes
    and values that are not features. "Demystifying MMD GANs" (2018, arXiv 1801.01401), section 4.
    """
    with needs("torch-fidelity", "eval", "KID"):
        from torch_fidelity.metric_kid import kernel_mmd

    _check(features_1, features_2)
    smaller = min(len(features_1), len(features_2))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"KID takes subsets of 2 to {smaller} images here, where the smaller set has {smaller}; got "
            f"subset_size={subset_size}"
        )
    random = np.random.RandomState(seed)

    def subset(features: Tensor) -> np.ndarray:
        chosen = torch.from_numpy(random.choice(len(features), subset_size, replace=False))
        return features[chosen.to(features.device)].double().cpu().numpy()

    # In float32 a small distance would be lost in the rounding of kernels near 1.
    distances = [kernel_mmd(subset(features_1), subset(features_2)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)), subsets, subset_size)


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = SEED) -> InceptionScore:
    """Inception score exp(E KL(p(y|x) ‖ p(y))) of logits [N, classes], over splits of the shuffled images.

    ValueError for fewer images than splits, and for shapes and values that are not logits.
    "Improved Techniques for Training GANs" (2016, arXiv 1606.03498), section 4.
    """
    with needs("torch-fidelity", "eval", "the Inception score"):
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    _check(logits, logits)
    if len(logits) < splits:
        raise ValueError(
            f"the Inception score of {len(logits)} images cannot be split {splits} ways; give splits"
        )
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits))).to(logits.device)
    bounds = [split * len(logits) // splits for split in range(splits + 1)]
    # One split per call: the package's double copies then do not grow with the whole set.
    scores = [
        isc_features_to_metric(logits[order[first:last]].cpu(), splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        for first, last in pairwise(bounds)
    ]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), splits)


def precision_recall(generated: Tensor, real: Tensor, *, neighborhood: int = 3) -> PrecisionRecall:
    """Share of generated features [N, D] inside the real ones' manifold [M, D], and of real in generated.

    A manifold is the union of balls that reach each point's k-th neighbour. Use Inception's features, as
    ADM's evaluation does, and state so: torch-fidelity itself takes VGG16's by default. ValueError
    for sets of k images or fewer, and for shapes and values that are not features. "Improved Precision and
    Recall Metric for Assessing Generative Models" (2019, arXiv 1904.06991), section 3.
    """
    with needs("torch-fidelity", "eval", "precision and recall"):
        from torch_fidelity.metric_prc import calculate_precision_recall_part

    _check(generated, real)
    if min(len(generated), len(real)) <= neighborhood:
        raise ValueError(
            f"precision and recall take neighbour {neighborhood} of each image, so each set needs more "
            f"than {neighborhood} images; got {len(generated)} and {len(real)}"
        )
    # The package's default holds every pairwise distance; parts of 1000 rows hold 1000 rows of them.
    precision, recall = calculate_precision_recall_part(generated, real, neighborhood, batch_size=1000)
    f_score = 2 * precision * recall / max(1e-5, precision + recall)
    return PrecisionRecall(precision, recall, f_score)


def _check(features_1: Tensor, features_2: Tensor) -> None:
    shapes = [list(features.shape) for features in (features_1, features_2)]
    if features_1.ndim != 2 or features_2.ndim != 2 or features_1.shape[1] != features_2.shape[1]:
        raise ValueError(f"features are {shapes[0]} and {shapes[1]}; both must be [images, D] with one D")
    for features in (features_1, features_2):
        for first in range(0, len(features), 1000):
            if not features[first : first + 1000].isfinite().all():
                raise ValueError(
                    f"features of images {first}..{first + 999} hold values that are not finite: look at "
                    "these images, or run the extractor in float32"
                )
