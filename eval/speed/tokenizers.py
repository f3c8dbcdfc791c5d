"""Speed of encoding and decoding, as a ratio against a straightforward implementation in the same
run."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...loading import create
from ...tokenizer import Tokenizer
from .paired import spread
from .variants import Variant

HEADER = [
    *("", "variant", "encode images/s", "decode images/s", "both (min–max)", "peak MB"),
    *("of row", "× (min–max)", "equal to it"),
]


@dataclass
class Speed:
    """All variants of one tokenizer."""

    tokenizer: str
    parameters: int
    batch_size: int
    device: torch.device
    image_size: int
    variants: list[Variant]
    has_baseline: bool

    @property
    def title(self) -> str:
        """The title: what was measured, and on which hardware."""
        size = f"{self.parameters / 1e6:.1f} M parameters, batch {self.batch_size} at {self.image_size}²"
        runs = f"n = {len(self.variants[0].seconds)} paired runs"
        missing = "" if self.has_baseline else "; no straightforward implementation of this family"
        return f"{self.tokenizer}, {size}, {self.place}, fresh weights, {runs}{missing}"

    @property
    def place(self) -> str:
        """The device, with its name or its number of threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} ({torch.get_num_threads()} threads)"

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {
            "tokenizer": self.tokenizer,
            "parameters": self.parameters,
            "batch_size": self.batch_size,
            "image_size": self.image_size,
            "device": self.place,
            "straightforward_baseline": self.has_baseline,
            "variants": [variant.record() for variant in self.variants],
        }

    def table(self) -> list[list[str]]:
        """Table rows in the columns of HEADER: medians, with the range over the paired runs."""
        return [self._row(*numbered) for numbered in enumerate(self.variants, start=1)]

    def _row(self, number: int, variant: Variant) -> list[str]:
        parts = (variant.encode_rates, variant.decode_rates)
        medians = [f"{median(part):.2f}" if part else "" for part in parts]
        rates = [len(variant.inputs) / seconds for seconds in variant.seconds]
        peak = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 2**20:,.0f}"
        row = [str(number), variant.name, *medians, spread(rates), peak]
        if variant.baseline is None:
            return [*row, "", "", ""]
        base = next(row for row, other in enumerate(self.variants, start=1) if other is variant.baseline)
        codes = variant.equal_codes
        equal = f"{variant.difference:.0e} apart" if codes is None else f"{codes:.2%} of codes"
        return [*row, str(base), spread(variant.ratios), equal]


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

    The baseline of a family is the file `plain_<family>.py` in this folder; families without one are compared
    with their own float32, and the title states so. Weights are fresh: speed does not depend on them.
    `compiled` adds torch.compile (its compilation is not timed); ValueError for FlexTok and KARL. `config`
    changes the tokenizer's configuration.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = create(name, **config).to(device).eval()
    model.require_modality("image", "this measurement takes")
    images = torch.rand(batch_size, 3, model.image_size, model.image_size, device=device)
    plain = _baseline(model.family)
    special = getattr(plain, "variants", None)
    if special and compiled:
        raise ValueError(f"{name} is not timed with --compile; leave that out")
    variants = special(model, images) if special else _whole(model, images, plain, compiled)
    gc.collect()  # memory that is freed later would hide peaks
    for variant in variants:
        variant.warm_up()
    for _ in range(repeats):
        for variant in variants:
            variant.run()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Speed(name, parameters, batch_size, device, model.image_size, variants, plain is not None)


# Variants ---------------------------------------------------------------------------------------------------


def _baseline(family: str) -> ModuleType | None:
    """The straightforward implementation of a family: a module with `baseline(model)`, which encodes and
    decodes, or with `variants(model, images)`, all that is timed of the family. None where there is none."""
    if find_spec(f".plain_{family}", __package__) is None:
        return None
    return import_module(f".plain_{family}", __package__)


def _whole(model: Tokenizer, images: Tensor, plain: ModuleType | None, compiled: bool) -> list[Variant]:
    """Encoding and decoding in a row, in two precisions."""
    half = type(model)(model.config).to(images.device).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    variants = []
    if plain is not None:
        base = plain.baseline(model)
        variants.append(Variant("straightforward float32", images, base.encode, base.decode))

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
