"""Times and memory of one prompt's answer with a setting, in turn with the full model."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria

from .paired import ratios, synchronise
from .variants import peak_bytes, start_peak

TOKENS = 8
"""Tokens of a timed answer."""


class TokenTimes(StoppingCriteria):
    """Records when each token of an answer was there; it stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note the time; bool [B] of False."""
        synchronise(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class AnswerTimes:
    """Seconds of paired runs: to the first token and per further token, of the setting and of the full model
    in turn, and in the reducers themselves. `peak_bytes` is the most memory above what was in use before
    (None where it cannot be read)."""

    first_token: list[float] = field(default_factory=list)
    next_token: list[float] = field(default_factory=list)
    full_first_token: list[float] = field(default_factory=list)
    full_next_token: list[float] = field(default_factory=list)
    reducer: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def record(self) -> dict[str, Any]:
        """The measurements and their medians as plain values, for JSON."""
        return vars(self) | {
            "first_token_seconds": median(self.first_token),
            "tokens_per_second": 1 / median(self.next_token),
            "reducer_seconds": median(self.reducer) if self.reducer else 0.0,
            "first_token_speedup": median(ratios(self.full_first_token, self.first_token)),
            "decode_speedup": median(ratios(self.full_next_token, self.next_token)),
        }


Way = Callable[[], AbstractContextManager[tuple[Callable[[StoppingCriteria], Any], Any]]]
"""Opens a context with a function that generates TOKENS tokens under a criterion, and the session whose
`report` has the reducer's seconds (None without one). Opening it is not timed."""


def measure(way: Way, full: Way, device: torch.device, repeats: int) -> AnswerTimes:
    """Time `way` and `full` in turn, `repeats` times after a warm-up, and then read the peak memory of
    `way`."""
    result = AnswerTimes()
    for number in range(-1, repeats):
        whole_first, whole_next, _ = _timed(full, device)
        first, following, reducer = _timed(way, device)
        if number >= 0:
            result.full_first_token.append(whole_first)
            result.full_next_token.append(whole_next)
            result.first_token.append(first)
            result.next_token.append(following)
            if reducer is not None:
                result.reducer.append(reducer)
    with way() as (generate, _):
        before = start_peak(device)
        generate(TokenTimes(device))
        result.peak_bytes = peak_bytes(device, before)
    return result


def _timed(way: Way, device: torch.device) -> tuple[float, float, float | None]:
    """Seconds to the first token, per further token, and in the reducer."""
    with way() as (generate, session):
        clock = TokenTimes(device)
        synchronise(device)
        start = time.perf_counter()
        generate(clock)
        reducer = None if session is None else session.report().seconds
    first, *_, last = clock.times
    return first - start, (last - first) / (len(clock.times) - 1), reducer
