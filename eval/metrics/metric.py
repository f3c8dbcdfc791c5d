"""The declaration of a metric, so that commands, tables and pages need no list of metrics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ...plugins import modules_of, with_plugins
from ...tokenizer import Tokenizer
from ..options import WeightFiles

Compare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """One number of a record.

    Args:
        name: its key in records.
        label: its name in tables.
        unit: such as "dB"; empty without one.
        style: how its numbers are written, a format specification.
        better: whether higher or lower is better; None where neither is.
        needs: what it is computed by beside the images, for `vistok list --metrics`.
        option: the name that `--metrics` takes for it, where that is not its own.
        make: for a metric of an image and its reference, a function of the weight files and the
            device that returns the comparison: two float tensors [B, 3, H, W] in [0, 1] → [B]. It raises
            `WeightsMissing` where a network is not on this machine.
        aligned: whether it compares what is at the same place in both images, which means nothing for the
            pictures of a semantic tokenizer.
        card: whether a report shows it as a large figure.
        rank: its place in tables; metrics of other packages come after all of vistok's.
    """

    name: str
    label: str
    unit: str = ""
    style: str = ".4f"
    better: Literal["higher", "lower"] | None = None
    needs: str = ""
    option: str = ""
    make: Callable[[WeightFiles, torch.device], Compare] | None = None
    aligned: bool = False
    card: bool = False
    rank: int = 1_000


@cache
def metrics() -> dict[str, Metric]:
    """All metrics by name, in the order of tables: those in the `METRICS` of this folder's files, and those
    that other packages add by entry points of the group `vistok.metrics`, each a `Metric` with `make`."""
    own = [each for module in modules_of(__package__) for each in getattr(module, "METRICS", ())]

    def fits(value: Any) -> bool:
        return isinstance(value, Metric) and value.make is not None

    ranked = sorted(own, key=lambda each: each.rank)
    return with_plugins(ranked, "vistok.metrics", fits, "a Metric with make")


def pair_metrics() -> dict[str, Metric]:
    """The metrics of an image and its reference."""
    return {name: metric for name, metric in metrics().items() if metric.make is not None}


def check_comparable(model: Tokenizer, names: Iterable[str], semantic: bool) -> None:
    """Raise ValueError where one of these metrics means nothing for a tokenizer and is not asked for all the
    same (`semantic`), and for a tokenizer of anything but images."""
    model.require_modality("image", "this evaluation takes")
    aligned = [name for name in names if described(name).aligned]
    if model.semantic and aligned and not semantic:
        raise ValueError(
            f"{model.label} is a semantic tokenizer: its pictures show the same content, not the same "
            f"pixels, so that {', '.join(aligned)} would compare what does not belong together; name other "
            "metrics (--metrics clip,fid,codes), or give --semantic to compute these all the same"
        )


def described(name: str) -> Metric:
    """The metric of that name; for unknown metrics of a record, one whose label is the name."""
    return metrics().get(name) or Metric(name, name, style=".4g")
