"""How fast a tokenizer encodes and decodes, as a ratio against a straightforward implementation in the same
run."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..models.titok import TiTok
from ..registry import create
from .plain import PlainTiTok

HEADER = [
    "variant",
    "encode s",
    "decode s",
    "images/s (min–max)",
    "× baseline (min–max)",
    "peak MB",
    "codes equal",
]


@dataclass
class Variant:
    """One way to run the tokenizer, and what was measured of it."""

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    images: Tensor
    encode_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    codes: Tensor | None = None
    peak_bytes: int | None = None

    @property
    def seconds(self) -> list[float]:
        """Encode and decode together, a run."""
        return [a + b for a, b in zip(self.encode_seconds, self.decode_seconds, strict=True)]

    def run(self) -> None:
        """One measured pass."""
        self.codes, encode = _timed(self.encode, self.images)
        _, decode = _timed(self.decode, self.codes)
        self.encode_seconds.append(encode)
        self.decode_seconds.append(decode)

    def warm_up(self) -> None:
        """One unmeasured pass, which takes the peak memory above what was held before it."""
        before = _start_peak(self.images.device)
        self.decode(self.encode(self.images))
        self.peak_bytes = _peak(self.images.device, before)


@dataclass
class Speed:
    """All variants of one tokenizer; the first is the baseline."""

    tokenizer: str
    batch_size: int
    device: torch.device
    variants: list[Variant]

    @property
    def title(self) -> str:
        """What was measured, on what."""
        where = (
            f"{torch.get_num_threads()} threads"
            if self.device.type == "cpu"
            else torch.cuda.get_device_name(self.device)
        )
        size = self.variants[0].images.shape[-1]
        setting = f"batch {self.batch_size} at {size}², {self.device.type} ({where}), fresh weights"
        return f"{self.tokenizer}, {setting}"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokenizer": self.tokenizer,
            "batch_size": self.batch_size,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "variants": [
                {"name": v.name, "encode_seconds": v.encode_seconds, "decode_seconds": v.decode_seconds}
                | {"ratio": self._ratios(v), "peak_bytes": v.peak_bytes, "codes_equal": self._agreement(v)}
                for v in self.variants
            ],
        }

    def table(self) -> list[list[str]]:
        """Rows under HEADER: medians, with the range over the paired runs."""
        rows = []
        for v in self.variants:
            rates, ratios = [self.batch_size / s for s in v.seconds], self._ratios(v)
            rows.append(
                [
                    v.name,
                    f"{median(v.encode_seconds):.3f}",
                    f"{median(v.decode_seconds):.3f}",
                    f"{median(rates):.2f} ({min(rates):.2f}–{max(rates):.2f})",
                    f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                    "" if v.peak_bytes is None else f"{v.peak_bytes / 2**20:,.0f}",
                    f"{self._agreement(v):.2%}",
                ]
            )
        return rows

    def _ratios(self, variant: Variant) -> list[float]:
        return [base / own for base, own in zip(self.variants[0].seconds, variant.seconds, strict=True)]

    def _agreement(self, variant: Variant) -> float:
        ours, base = variant.codes, self.variants[0].codes
        equal = (
            ours == base
            if not base.is_floating_point()
            else torch.isclose(ours.to(base), base, rtol=1e-3, atol=1e-3)
        )
        return float(equal.float().mean())


@torch.no_grad()
def measure(
    name: str, batch_size: int, repeats: int, device: torch.device | str = "cpu", *, compiled: bool = False
) -> Speed:
    """Time encode + decode of one batch, every variant in turn, `repeats` times after a warm-up.

    TiTok is compared with `vistok.eval.plain`, other families with their own float32. Weights are fresh:
    speed does not depend on them. `compiled` adds torch.compile (its compilation is not timed).
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = create(name).to(device).eval()
    images = torch.rand(batch_size, 3, model.image_size, model.image_size, device=device)
    half = create(name).to(device).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    variants = []
    if isinstance(model, TiTok) and not model.text_aware:
        plain = PlainTiTok(model)
        variants.append(Variant("straightforward float32", plain.encode, plain.decode, images))
    variants += [
        _variant(label, m, images) for label, m in (("vistok float32", model), ("vistok bfloat16", half))
    ]
    if compiled:
        for label, m in (("compiled float32", model), ("compiled bfloat16", half)):
            variants.append(_variant(label, m, images, torch.compile))
    for variant in variants:
        variant.warm_up()
    for _ in range(repeats):
        for variant in variants:
            variant.run()
    return Speed(name, batch_size, device, variants)


def _variant(label: str, model: Any, images: Tensor, wrap: Callable[[Any], Any] = lambda f: f) -> Variant:
    kind = model.quantizer.kind
    encode, decode = wrap(lambda x: getattr(model.encode(x), kind)), wrap(lambda codes: model.decode(codes))
    return Variant(label, encode, decode, images)


def _timed(work: Callable[[Tensor], Tensor], value: Tensor) -> tuple[Tensor, float]:
    _synchronise(value.device)
    start = time.perf_counter()
    result = work(value)
    _synchronise(value.device)
    return result, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _start_peak(device: torch.device) -> int:
    """Forget earlier peaks; bytes in use now (of the device's allocator, or resident on Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        return _status("VmRSS")
    except (OSError, AttributeError):
        return -1


def _peak(device: torch.device, before: int) -> int | None:
    """Most bytes in use since `_start_peak`, above what was in use then; None where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return None if before < 0 else _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")
