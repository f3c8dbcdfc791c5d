"""One way to encode or decode, timed and compared with a baseline."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .paired import ratios, timed


@dataclass
class Variant:
    """One way to encode, to decode, or to do both in turn, and its measurements.

    It starts from `inputs`, images or codes, and is compared with its `baseline`, or with nothing.
    """

    name: str
    inputs: Tensor
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    baseline: "Variant | None" = None
    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    codes: Tensor | None = None
    images: Tensor | None = None
    peak_bytes: int | None = None

    def run(self) -> None:
        """One measured pass."""
        value = self.inputs
        if self.encode:
            value, took = timed(partial(self.encode, value), value.device)
            self.codes = value
            self.encode_seconds.append(took.seconds)
        if self.decode:
            self.images, took = timed(partial(self.decode, value), value.device)
            self.decode_seconds.append(took.seconds)

    def warm_up(self) -> None:
        """One untimed pass, which records the peak memory above what was in use before it."""
        before = start_peak(self.inputs.device)
        value = self.encode(self.inputs) if self.encode else self.inputs
        if self.decode:
            self.decode(value)
        self.peak_bytes = peak_bytes(self.inputs.device, before)

    @property
    def seconds(self) -> list[float]:
        """Seconds of encoding and decoding, one per run."""
        parts = [part for part in (self.encode_seconds, self.decode_seconds) if part]
        return [sum(run) for run in zip(*parts, strict=True)]

    @property
    def encode_rates(self) -> list[float]:
        """Images/s of encoding, one per run; empty if it does not encode."""
        return [len(self.inputs) / seconds for seconds in self.encode_seconds]

    @property
    def decode_rates(self) -> list[float]:
        """Images/s of decoding, one per run; empty if it does not decode."""
        return [len(self.inputs) / seconds for seconds in self.decode_seconds]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the baseline, one per run."""
        base = self.baseline or self
        return ratios(base.seconds, self.seconds)

    @property
    def equal_codes(self) -> float | None:
        """The share of codes that are the baseline's, of the tokens that both have."""
        base = (self.baseline or self).codes
        if self.codes is None or base is None:
            return None
        base, codes = base[:, : self.codes.shape[1]], self.codes
        if not base.is_floating_point():
            return float((codes == base).float().mean())
        close = torch.isclose(codes.to(base), base, rtol=1e-3, atol=1e-3, equal_nan=True)
        return float(close.float().mean())

    @property
    def difference(self) -> float | None:
        """Of images decoded from the baseline's codes: the largest difference of a pixel value."""
        base = (self.baseline or self).images
        if self.encode or self.images is None or base is None:
            return None
        return float((self.images.double() - base.double()).abs().max())

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {
            "name": self.name,
            "baseline": self.baseline.name if self.baseline else None,
            "encode_seconds": self.encode_seconds,
            "decode_seconds": self.decode_seconds,
            "encode_images_per_second": median(self.encode_rates) if self.encode_rates else None,
            "decode_images_per_second": median(self.decode_rates) if self.decode_rates else None,
            "ratio": self.ratios,
            "peak_bytes": self.peak_bytes,
            "codes_equal": self.equal_codes,
            "largest_difference": self.difference,
        }


def start_peak(device: torch.device) -> int:
    """Reset earlier peaks; return the bytes in use now (of the device's allocator, or resident on Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        return _status("VmRSS")
    except (OSError, AttributeError):
        return -1


def peak_bytes(device: torch.device, before: int) -> int | None:
    """Most bytes in use since `start_peak`, above what was in use then; None where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return None if before < 0 else _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")
