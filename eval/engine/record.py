"""The record of a measurement: the numbers, and all that is needed to read and repeat them."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from ...files import atomic_write

PACKAGES = (
    "vistok",
    "torch",
    "torchvision",
    "torch_fidelity",
    "lpips",
    "stlpips_pytorch",
    "open_clip_torch",
    "accelerate",
    "numpy",
    "pillow",
)


@dataclass
class Record:
    """One evaluation. A metric is {"value": …}, with "low" and "high" for a mean, or {"skipped": reason}.

    `left_out` has the files of the data that are not images, by reason, with how many and the first names;
    `n` is the number of images the metrics are of (None where only their statistics are known), `seconds` the
    time of each stage summed over processes, `rate` images per second of the whole pass.
    """

    protocol: dict[str, Any]
    n: int | None
    seed: int
    tokenizer: str | None
    data: Any
    metrics: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    bad_images: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    rate: float | None = None

    @property
    def skipped(self) -> dict[str, str]:
        """Metrics that were not computed, and why."""
        return {name: each["skipped"] for name, each in self.metrics.items() if "skipped" in each}


def environment() -> dict[str, Any]:
    """The command line and the versions of what it ran on."""
    versions = {"python": python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"command": ["vistok", *sys.argv[1:]], "versions": versions, "threads": torch.get_num_threads()}


def write(path: Path, record: Any) -> None:
    """Write a record (a dataclass or a mapping) as JSON, after `environment`; infinities become text."""
    with atomic_write(path) as aside:
        aside.write_text(as_json({**environment(), **_plain(record)}), encoding="utf-8")


def as_json(record: Any) -> str:
    """The JSON text of a record (a dataclass or a mapping); infinities become "inf", and NaN is refused."""
    return json.dumps(_plain(record), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return str(value) if isinstance(value, Path) else value


class Clock:
    """Adds up the seconds of each stage in `seconds`, waiting for the device at the end of one."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds, self.device = seconds, device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
