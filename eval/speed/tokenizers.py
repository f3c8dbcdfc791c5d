"""How fast a tokenizer encodes and decodes, as a ratio against a straightforward implementation in the same
run."""

import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ...loading import create
from ...models.flextok.model import GUIDANCE, FlexTok
from ...models.karl.model import Karl
from ...models.titok import TiTok
from ...tokenizer import Tokenizer
from .plain_flextok import PlainFlexTok
from .plain_karl import PlainKarl
from .plain_titok import PlainTiTok

GUIDED_STEPS = 4  # of a flow; the VAE's share of the time falls, and the ratio rises, with more
HEADER = [
    *("", "variant", "encode images/s", "decode images/s", "both (min–max)", "peak MB"),
    *("of row", "× (min–max)", "equal to it"),
]


@dataclass
class Variant:
    """One way to encode, to decode, or to do both in turn, and what was measured of it.

    It starts from `given`, images or codes, and is compared with its `baseline`, or with nothing.
    """

    name: str
    given: Tensor
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
        value = self.given
        if self.encode:
            value, seconds = _timed(self.encode, value)
            self.codes = value
            self.encode_seconds.append(seconds)
        if self.decode:
            self.images, seconds = _timed(self.decode, value)
            self.decode_seconds.append(seconds)

    def warm_up(self) -> None:
        """One unmeasured pass, which takes the peak memory above what was held before it."""
        before = _start_peak(self.given.device)
        value = self.encode(self.given) if self.encode else self.given
        if self.decode:
            self.decode(value)
        self.peak_bytes = _peak(self.given.device, before)

    @property
    def seconds(self) -> list[float]:
        """All that it does, a run."""
        parts = [part for part in (self.encode_seconds, self.decode_seconds) if part]
        return [sum(run) for run in zip(*parts, strict=True)]

    @property
    def encode_rates(self) -> list[float]:
        """Images/s of encoding, a run; none if it does not encode."""
        return [len(self.given) / seconds for seconds in self.encode_seconds]

    @property
    def decode_rates(self) -> list[float]:
        """Images/s of decoding, a run; none if it does not decode."""
        return [len(self.given) / seconds for seconds in self.decode_seconds]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the baseline, a run."""
        base = self.baseline or self
        return [theirs / own for theirs, own in zip(base.seconds, self.seconds, strict=True)]

    @property
    def equal_codes(self) -> float | None:
        """The share of codes that are the baseline's, of the tokens that both have."""
        base = (self.baseline or self).codes
        if self.codes is None or base is None:
            return None
        base, ours = base[:, : self.codes.shape[1]], self.codes
        if not base.is_floating_point():
            return float((ours == base).float().mean())
        close = torch.isclose(ours.to(base), base, rtol=1e-3, atol=1e-3, equal_nan=True)
        return float(close.float().mean())

    @property
    def difference(self) -> float | None:
        """Of images decoded from the baseline's codes: the largest difference of a pixel value."""
        base = (self.baseline or self).images
        if self.encode or self.images is None or base is None:
            return None
        return float((self.images.double() - base.double()).abs().max())

    def record(self) -> dict[str, Any]:
        """For JSON."""
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


@dataclass
class Speed:
    """All variants of one tokenizer."""

    tokenizer: str
    parameters: int
    batch_size: int
    device: torch.device
    image_size: int
    variants: list[Variant]

    @property
    def title(self) -> str:
        """What was measured, on what."""
        size = f"{self.parameters / 1e6:.1f} M parameters, batch {self.batch_size} at {self.image_size}²"
        runs = f"n = {len(self.variants[0].seconds)} paired runs"
        return f"{self.tokenizer}, {size}, {self.place}, fresh weights, {runs}"

    @property
    def place(self) -> str:
        """The device and what there is of it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({torch.get_num_threads()} threads)"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokenizer": self.tokenizer,
            "parameters": self.parameters,
            "batch_size": self.batch_size,
            "image_size": self.image_size,
            "device": self.place,
            "variants": [variant.record() for variant in self.variants],
        }

    def table(self) -> list[list[str]]:
        """Rows under HEADER: medians, with the range over the paired runs."""
        return [self._row(*numbered) for numbered in enumerate(self.variants, start=1)]

    def _row(self, number: int, variant: Variant) -> list[str]:
        parts = (variant.encode_rates, variant.decode_rates)
        medians = [f"{median(part):.2f}" if part else "" for part in parts]
        rates = [len(variant.given) / seconds for seconds in variant.seconds]
        peak = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 2**20:,.0f}"
        row = [str(number), variant.name, *medians, _spread(rates), peak]
        if variant.baseline is None:
            return [*row, "", "", ""]
        base = next(row for row, other in enumerate(self.variants, start=1) if other is variant.baseline)
        codes = variant.equal_codes
        equal = f"{variant.difference:.0e} apart" if codes is None else f"{codes:.2%} of codes"
        return [*row, str(base), _spread(variant.ratios), equal]


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


@torch.no_grad()
def measure(
    name: str,
    batch_size: int,
    repeats: int,
    device: torch.device | str = "cpu",
    *,
    compiled: bool = False,
    **config: Any,
) -> Speed:
    """Time every variant in turn on one batch, `repeats` times after a warm-up, so that runs are paired.

    TiTok, FlexTok and KARL are compared with `plain_titok`, `plain_flextok` and `plain_karl` in this folder,
    other families with their own float32. Weights are fresh: speed does not depend on them. `compiled` adds
    torch.compile (its compilation is not timed); ValueError for FlexTok and KARL. `config` changes the
    tokenizer's configuration.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = create(name, **config).to(device).eval()
    images = torch.rand(batch_size, 3, model.image_size, model.image_size, device=device)
    special = {FlexTok: _flextok, Karl: _karl}.get(type(model))
    if special and compiled:
        raise ValueError(f"{name} is not timed with --compile; leave that out")
    variants = special(model, images) if special else _whole(model, images, compiled)
    gc.collect()  # whatever is freed later would hide peaks
    for variant in variants:
        variant.warm_up()
    for _ in range(repeats):
        for variant in variants:
            variant.run()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Speed(name, parameters, batch_size, device, model.image_size, variants)


# What is compared -------------------------------------------------------------------------------------------


def _whole(model: Tokenizer, images: Tensor, compiled: bool) -> list[Variant]:
    """Encoding and decoding in a row, in two precisions."""
    half = type(model)(model.config).to(images.device).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    variants = []
    if isinstance(model, TiTok) and not model.text_aware:
        plain = PlainTiTok(model)
        variants.append(Variant("straightforward float32", images, plain.encode, plain.decode))

    def add(label: str, tokenizer: Tokenizer, wrap: Callable[[Any], Any] = lambda f: f) -> None:
        kind = tokenizer.quantizer.kind
        encode, decode = wrap(lambda x: getattr(tokenizer.encode(x), kind)), wrap(tokenizer.decode)
        variants.append(Variant(label, images, encode, decode, variants[0] if variants else None))

    add("vistok float32", model)
    add("vistok bfloat16", half)
    if compiled:
        add("compiled float32", model, torch.compile)
        add("compiled bfloat16", half, torch.compile)
    return variants


def _flextok(model: FlexTok, images: Tensor) -> list[Variant]:
    """Encoding and guided decoding of all tokens and of an eighth, and decoding one image at many lengths."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # else all tokens are the same
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    plain, batch, most = PlainFlexTok(model), len(images), model.num_tokens
    few, side = max(1, most // 8), model.config.latent_size
    variants = [
        base := Variant(f"straightforward, {most} tokens", images, plain.encode),
        ours := Variant(f"vistok, {most} tokens", images, lambda x: model.encode(x).indices, baseline=base),
        Variant(f"vistok, {few} tokens", images, lambda x: model.encode(x, few).indices, baseline=ours),
    ]
    codes, options = model.encode(images).indices, {"steps": GUIDED_STEPS, "guidance": GUIDANCE}
    noise = torch.randn(batch, model.config.latent_channels, side, side, device=images.device)
    options["noise"] = noise
    for count in (most, few):
        kept, told = codes[:, :count], f"{count} tokens, {GUIDED_STEPS} guided steps"
        base = Variant(f"straightforward, {told}", kept, decode=partial(plain.decode, **options))
        ours = Variant(f"vistok, {told}", kept, decode=partial(model.decode, **options), baseline=base)
        variants += [base, ours]
    # As many prefixes of the first image as there are images, all from one noise.
    copies, shared = codes[:1].expand(batch, -1), noise[:1].expand(batch, -1, -1, -1)
    lengths = [round(most ** ((row + 1) / batch)) for row in range(batch)]

    def alone(x: Tensor) -> Tensor:
        prefixes = [row[:, :count] for row, count in zip(x.split(1), lengths, strict=True)]
        return torch.cat([model.decode(each, **options | {"noise": shared[:1]}) for each in prefixes])

    def together(x: Tensor) -> Tensor:
        tokens = dataclasses.replace(model.as_tokens(x), lengths=torch.tensor(lengths))
        return model.decode(tokens, **options | {"noise": shared})

    told = f"vistok, prefixes of {', '.join(map(str, lengths))}"
    base = Variant(f"{told}, a call each", copies, decode=alone)
    return [*variants, base, Variant(f"{told}, one batch", copies, decode=together, baseline=base)]


def _karl(model: Karl, images: Tensor) -> list[Variant]:
    """Encoding, and decoding of all, half and an eighth of the tokens, at places drawn at random."""
    plain, most, batch = PlainKarl(model), model.num_tokens, len(images)
    variants = [
        base := Variant("straightforward", images, plain.encode),
        Variant("vistok", images, lambda x: plain.codes(model.encode(x)), baseline=base),
    ]
    latents, kind = model.latents(images), model.quantizer.kind
    for count in (most, most // 2, most // 8):
        places = torch.rand(batch, most, device=images.device).argsort(1)[:, :count].sort(1).values
        tokens = model.as_tokens(
            model.quantizer.encode(latents.gather(1, places[..., None].expand(-1, -1, latents.shape[2])))
        )
        base = Variant(f"straightforward, {count} active tokens", plain.codes(tokens), decode=plain.decode)
        variants += [
            base,
            Variant(
                f"vistok, {count} active tokens", getattr(tokens, kind), decode=model.decode, baseline=base
            ),
        ]
    return variants


# Clocks and memory ------------------------------------------------------------------------------------------


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
