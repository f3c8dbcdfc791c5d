"""The networks and functions that an evaluation measures with, and which requested ones are missing."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..metrics.inception import Inception, load_inception
from ..metrics.metric import pair_metrics
from ..metrics.weights import WeightsMissing
from ..options import WeightFiles

SETS = ("fid", "is", "kid", "pr")
"""Metrics of sets of images, from their Inception features."""


def choose(requested: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The requested metrics in their usual order, all if None; ValueError for none or unknown ones."""
    if requested is not None and not requested:
        raise ValueError(f"no metric was named; there are {', '.join(known)}")
    if unknown := sorted(set(requested or ()) - set(known)):
        raise ValueError(f"there is no metric {', '.join(unknown)} here; there are {', '.join(known)}")
    return [name for name in known if requested is None or name in requested]


class Instruments:
    """The requested metrics that could be loaded.

    `pairs` by name compare images with references, both float [B, 3, H, W] in [0, 1], to [B]; `inception` is
    None unless one of `sets` needs it. `skipped` has one line for each metric whose weights are absent;
    FileNotFoundError for an explicit path that does not exist.
    """

    def __init__(self, requested: Sequence[str], files: WeightFiles, device: torch.device) -> None:
        self.device = device
        self.skipped: dict[str, str] = {}
        for option, path in (("--inception-weights", files.inception), ("--lpips-weights", files.lpips)):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{option} {path}: there is no such file or folder")
        self.pairs = {}
        for name, metric in pair_metrics().items():
            if name in requested and (instrument := self._load([name], partial(metric.make, files, device))):
                self.pairs[name] = instrument
        self.sets = [name for name in SETS if name in requested]
        self.inception: Inception | None = None
        if self.sets:
            self.inception = self._load(self.sets, lambda: load_inception(files.inception, device))
        if self.inception is None:
            self.sets = []

    def _load(self, names: Sequence[str], make: Callable[[], Any]) -> Any:
        try:
            return make()
        except WeightsMissing as error:
            self.skipped |= dict.fromkeys(names, str(error))
            return None

    def fingerprint(self) -> str:
        """A digest of all networks, so that a run is not continued with others."""
        networks = [
            getattr(each, "network", None) or getattr(each, "model", None) for each in self.pairs.values()
        ]
        networks.append(self.inception and self.inception.network)
        return fingerprint(*(network for network in networks if network is not None))


def fingerprint(*modules: nn.Module) -> str:
    """A digest of all weights and buffers: other values give another one."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {list(values.shape)} {values.dtype}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
