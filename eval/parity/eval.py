"""Parity of the evaluation metrics: values that torch-fidelity and torchmetrics gave for stored tensors."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ..metrics.distribution import inception_score, kernel_distance, precision_recall
from ..metrics.image import psnr, ssim
from ..metrics.statistics import FeatureStatistics, frechet_distance
from .case import CannotBuild, Case, Outputs

FAMILIES = ("eval",)

RTOL = 1e-6
# Parity: SSIM was recorded from torchmetrics in float32, where rounding puts it 1e-5 off torchmetrics' own
# value in float64, which vistok's equals to 1e-12.
ATOL = {"ssim_per_image": 1e-5}


def run(case: Case) -> Outputs:
    """vistok's value of every recorded result, each as a tensor, compared to RTOL whatever the case
    allows."""
    results = case.data.get("results")
    if not isinstance(results, dict):
        raise CannotBuild(f"{case.path.name} records no results of metrics; this version verifies only those")
    case.data |= {"rtol": RTOL, "tensor_atol": ATOL}
    # The recorded numbers are in the json; the comparison expects them among the tensors.
    case.tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in results.items()}
    values: dict[str, Tensor] = {}
    for name in results:
        if name not in values:
            values |= _values(case, name)
        yield name, values[name]


def _values(case: Case, name: str) -> dict[str, Tensor]:
    """The metric that `name` belongs to, by the names of all its recorded values."""
    for prefix, metric in METRICS.items():
        if name.startswith(prefix):
            results = {
                key: torch.as_tensor(value, dtype=torch.float64) for key, value in metric(case).items()
            }
            if name in results:
                return results
    raise CannotBuild(f"{case.path.name}: this version computes no metric {name!r}")


def _fid(case: Case) -> dict[str, float]:
    pair = []
    for features in _stored(case, "features_1", "features_2"):
        statistics = FeatureStatistics(features.shape[1])
        for batch in features.split(64):
            statistics.update(batch)
        pair.append(statistics)
    return {"fid_features": frechet_distance(*pair)}


def _kid(case: Case) -> dict[str, float]:
    numbers = _settings(case, "kid", r"subsets (\d+), subset size (\d+).*rng_seed (\d+)")
    distance = kernel_distance(
        *_stored(case, "features_1", "features_2"),
        **dict(zip(("subsets", "subset_size", "seed"), numbers, strict=True)),
    )
    name = "kernel_inception_distance"
    return {f"{name}_mean": distance.mean, f"{name}_std": distance.std}


def _score(case: Case) -> dict[str, float]:
    splits, seed = _settings(case, "isc", r"(\d+) splits, shuffled, rng_seed (\d+)")
    (logits,) = _stored(case, "logits")
    score = inception_score(logits, splits=splits, seed=seed)
    return {"inception_score_mean": score.mean, "inception_score_std": score.std}


def _precision(case: Case) -> dict[str, float]:
    (neighborhood,) = _settings(case, "prc", r"neighbourhood (\d+)")
    return vars(precision_recall(*_stored(case, "features_1", "features_2"), neighborhood=neighborhood))


def _pictures(case: Case) -> dict[str, Tensor]:
    references, images = (
        stored.movedim(-1, 1).double() / 255 for stored in _stored(case, "images_1", "images_2")
    )
    return {
        "psnr_per_image": psnr(images, references),
        "ssim_per_image_gaussian11_sigma1.5": ssim(images, references, border="reflect"),
    }


METRICS: dict[str, Callable[[Case], dict]] = {
    "fid": _fid,
    "kernel_inception_distance": _kid,
    "inception_score": _score,
    "precision": _precision,
    "recall": _precision,
    "f_score": _precision,
    "psnr": _pictures,
    "ssim": _pictures,
}


def _stored(case: Case, *names: str) -> list[Tensor]:
    """Recorded inputs in their own dtype: metrics compute in float64 whatever models compute in."""
    case.read.update(names)
    return [case.tensors[name].to(case.device) for name in names]


def _settings(case: Case, metric: str, pattern: str) -> list[int]:
    text = case.data.get("settings", {}).get(metric, "")
    match = re.search(pattern, text)
    if not match:
        raise CannotBuild(f"{case.path.name}: cannot read the settings {text!r} of {metric}")
    return [int(number) for number in match.groups()]
