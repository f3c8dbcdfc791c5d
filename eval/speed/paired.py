"""Time several implementations in turn, so that their ratios come from one run of the program."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch


class Took(NamedTuple):
    """The time of one run: seconds by the clock, and seconds of computation in this process (all its
    threads), which other programs do not lengthen."""

    seconds: float
    cpu_seconds: float

    def per(self, count: int) -> "Took":
        """The time per item of a run over `count` items."""
        return Took(self.seconds / count, self.cpu_seconds / count)


def timed(work: Callable[[], Any], device: torch.device | None = None) -> tuple[Any, Took]:
    """The result of `work` and its time, after everything that was queued on the device (of all CUDA and
    MPS devices unless one is given)."""
    synchronise(device)
    start, computed = time.perf_counter(), time.process_time()
    result = work()
    synchronise(device)
    return result, Took(time.perf_counter() - start, time.process_time() - computed)


def in_turn(
    works: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warm_ups: int = 1,
    check: Callable[[dict[str, Any]], None] | None = None,
    device: torch.device | None = None,
) -> dict[str, list[Took]]:
    """Run all of `works` one after another, `repeats` times after `warm_ups` rounds that are not counted.

    `check` gets the results of every round by name, and raises an error where they must be equal and differ.
    """
    took: dict[str, list[Took]] = {name: [] for name in works}
    for number in range(-warm_ups, repeats):
        results = {}
        for name, work in works.items():
            results[name], run = timed(work, device)
            if number >= 0:
                took[name].append(run)
        if check is not None:
            check(results)
    return took


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times as fast `fast` was, pair by pair."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def seconds(runs: Sequence[Took]) -> list[float]:
    """The seconds by the clock of several runs."""
    return [run.seconds for run in runs]


def spread(values: Sequence[float], style: str = ".2f") -> str:
    """The median and the range of values: "1.50 (1.42–1.61)"."""
    return f"{median(values):{style}} ({min(values):{style}}–{max(values):{style}})"


def synchronise(device: torch.device | None) -> None:
    """Wait for everything that was queued on the device (on all CUDA and MPS devices for None)."""
    kinds = {"cuda", "mps"} if device is None else {device.type}
    if "cuda" in kinds and torch.cuda.is_available():
        torch.cuda.synchronize(device)
    if "mps" in kinds and torch.backends.mps.is_available():
        torch.mps.synchronize()
