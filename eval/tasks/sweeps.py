"""The settings at which a tokenizer or a codec is measured, and the reconstructions at each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ...images import to_pil
from ...tokenizer import Tokenizer
from ...tokens import Tokens
from ..data.dataset import Batch
from ..engine.decoding import decode_images
from . import codecs

TARGETS = (0.03, 0.05, 0.07, 0.1, 0.14)
"""Default targets of adaptive tokenizers, as mean absolute errors."""


@dataclass
class TokenizerSweep:
    """The settings of one tokenizer on images of `size`, which are resized to its own size and back.

    `lengths` are for ordered tokenizers (1, 2, 4, … and all otherwise), `targets` for adaptive ones, `steps`
    and `guidance` for stochastic ones.
    """

    name: str
    model: Tokenizer
    size: int
    lengths: Sequence[int] | None = None
    targets: Sequence[float] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    settings: list[tuple[str, int | float | None]] = field(default_factory=list)
    baseline: bool = False

    def __post_init__(self) -> None:
        try:
            self.model.check_image_size(self.size, self.size, "")
            self.own = self.size
        except ValueError:
            self.own = self.model.image_size
        self.resized = self.own != self.size
        self.too_long: list[int] = []  # requested lengths above the tokenizer's

    def choose(self, images: Tensor) -> list[float]:
        """Decide on lengths with the first images [B, 3, S, S]; bytes per image of each."""
        tokens = self.model.encode(self._own(images))
        full = tokens.num_tokens
        if self.model.adaptive:
            targets = self.targets or TARGETS
            self.settings = [(f"error {target:g}", target) for target in sorted(targets, reverse=True)]
        elif self.model.ordered:
            powers = [length for length in _powers_below(full) if length in self.model.prefix_lengths]
            lengths = self.lengths or [*powers, full]
            kept = sorted({self.model.check_num_tokens(length) for length in lengths if length <= full})
            self.too_long = sorted({length for length in lengths if length > full})
            if not kept:
                requested = ", ".join(map(str, lengths))
                raise ValueError(
                    f"{self.name} has 1 to {full} tokens; --lengths {requested} is beyond them all"
                )
            self.settings = [(_tokens(length), length) for length in kept]
        else:
            self.settings = [(_tokens(full), None)]
        return [float(each.bits_per_image.cpu().double().mean()) / 8 for each in self._encoded(images)]

    def __call__(self, images: Tensor, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Decoded images and bytes of each, for every setting."""
        options = {"steps": self.steps, "guidance": self.guidance} if self.model.stochastic else {}
        for tokens in self._encoded(images):
            decoded = decode_images(
                self.model,
                tokens,
                (self.own, self.own),
                batch.indices.tolist(),
                batch.names,
                seed=self.seed,
                **options,
            )
            if self.resized:
                decoded = _resized(decoded, self.size)
            yield decoded, tokens.bits_per_image.cpu().double() / 8

    def _encoded(self, images: Tensor) -> Iterator[Tokens]:
        images = self._own(images)
        if self.model.adaptive:
            for _, target in self.settings:
                yield self.model.encode(images, target=target)
            return
        tokens = self.model.encode(images)
        for _, length in self.settings:
            yield tokens if length is None else tokens.prefix(length)

    def _own(self, images: Tensor) -> Tensor:
        return _resized(images, self.own) if self.resized else images


class CodecSweep:
    """The settings of one codec."""

    baseline = True

    def __init__(self, name: str, chosen: list[codecs.Setting]) -> None:
        self.name, self.chosen = name, chosen
        self.settings = [(setting.label, None) for setting in chosen]

    def __call__(self, images: Tensor, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Decoded images and bytes of each, for every setting."""
        pictures = to_pil(images.cpu())
        for setting in self.chosen:
            decoded, sizes = codecs.apply(setting, pictures)
            yield decoded.to(images.device), sizes.double()


def _resized(images: Tensor, side: int) -> Tensor:
    size = {"size": (side, side), "mode": "bicubic", "antialias": True}
    return F.interpolate(images, **size).clamp(0, 1)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _powers_below(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power < most]
