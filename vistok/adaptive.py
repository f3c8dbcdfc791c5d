"""Tokens by quality: the shortest prefix of an ordered tokenizer that reaches a target PSNR."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .tokens import Tokens


class PrefixTokenizer(Protocol):
    """The part of a tokenizer that the search for lengths uses."""

    ordered: bool
    adaptive: bool
    label: str

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Numbers of tokens of which prefixes decode, rising."""

    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tokens:
        """Images [B, 3, H, W] in [0, 1] → tokens."""

    def decode(self, tokens: Tokens, **options: Any) -> Tensor:
        """Tokens → images [B, 3, H, W] in [0, 1]."""


@dataclass(frozen=True)
class AdaptiveTokens:
    """Tokens with `lengths`, the PSNR their images decode to (dB, float64 [B]), and whether it `reached` the
    target (bool [B])."""

    tokens: Tokens
    psnr: Tensor
    reached: Tensor


@torch.no_grad()
def encode_to_quality(
    tokenizer: PrefixTokenizer,
    images: Tensor,
    target_psnr: float,
    *,
    num_tokens: int | None = None,
    **options: Any,
) -> AdaptiveTokens:
    """Images [B, 3, H, W] in [0, 1] → per image the shortest prefix found that decodes to `target_psnr` dB.

    Lengths are those of the tokenizer's `prefix_lengths` up to `num_tokens` (every token by default); most
    tokenizers have all of 1, 2, 3, …, K. For each image the first, second, fourth, … and at last the longest
    of these K lengths are tried until one reaches the target; then follows a bisection between it and the one
    before, which did not. Each step decodes one batch, and there are at most 2·log2(K) + 1 steps. Quality
    need not grow with length: the returned prefix was decoded and reaches the target, and the next shorter
    one was decoded and does not (nor did any tried before), but a shorter prefix that was not tried might.
    Where none of those tried reaches the target, the best of them is returned with `reached` False and a
    UserWarning.

    `options` go to `decode`; a `generator` starts every decoding from the same state, so that lengths are
    compared under the same noise. PSNR is over all pixels and channels of an image with a peak of 1. Raises
    ValueError for tokenizers whose prefixes do not decode, and for targets that are not positive numbers.
    """
    if not tokenizer.ordered:
        instead = "use an ordered tokenizer such as vistok-mini"
        if tokenizer.adaptive:
            instead = "give it a target, the mean absolute error that it chooses lengths for, or " + instead
        raise ValueError(
            f"{tokenizer.label} does not decode from a prefix of its tokens, so target_psnr cannot choose "
            f"their number; {instead}"
        )
    number = isinstance(target_psnr, numbers.Real) and not isinstance(target_psnr, bool)
    if not number or not 0 < target_psnr < math.inf:
        raise ValueError(f"target_psnr is {target_psnr!r}; it is a positive number of dB, such as 30")
    full = tokenizer.encode(images, num_tokens)
    allowed = [length for length in tokenizer.prefix_lengths if length <= full.num_tokens]
    lengths = torch.tensor(allowed, device=full.device)
    search = _Search(len(full), len(lengths), full.device)
    references = images.to(full.device)
    while bool((pending := search.pending()).any()):
        trial = search.trial()  # numbers of lengths, from 1
        # Noise may go to images by their place in the batch, so with a generator the batch stays whole.
        rows = (pending | ("generator" in options)).nonzero()[:, 0]
        tokens = _cut(full[rows], lengths[trial[rows] - 1])
        psnr = torch.full_like(search.psnr, -math.inf)
        psnr[rows] = _psnr(_decode(tokenizer, tokens, options), references[rows])
        search.record(pending, trial, psnr, target_psnr)
    if not bool(search.reached.all()):
        short = ~search.reached
        warnings.warn(
            f"{int(short.sum())} of {len(full)} images do not reach {target_psnr:g} dB with up to "
            f"{full.num_tokens} tokens (the worst has {float(search.psnr[short].min()):.2f} dB); they keep "
            "the best prefix tried: lower target_psnr, or look at `reached`",
            stacklevel=3,
        )
    return AdaptiveTokens(_cut(full, lengths[search.length - 1]), search.psnr, search.reached)


class _Search:
    """The state of B searches over the numbers 1..longest of lengths."""

    def __init__(self, batch: int, longest: int, device: torch.device) -> None:
        self.longest = longest
        self.low = torch.zeros(batch, dtype=torch.int64, device=device)  # longest tried that fell short
        self.length = torch.ones_like(
            self.low
        )  # shortest that reached the target, or the best until one does
        self.psnr = torch.full((batch,), -math.inf, dtype=_precision(device), device=device)
        self.reached = torch.zeros(batch, dtype=torch.bool, device=device)

    def pending(self) -> Tensor:
        """Mask of the images that have a length to try, bool [B]."""
        return torch.where(self.reached, self.length - self.low > 1, self.low < self.longest)

    def trial(self) -> Tensor:
        """The length each image tries next, int64 [B]."""
        grown = (2 * self.low).clamp(1, self.longest)
        return torch.where(self.reached, (self.low + self.length) // 2, grown).clamp(1, self.longest)

    def record(self, pending: Tensor, trial: Tensor, psnr: Tensor, target: float) -> None:
        """Store the PSNR that the pending images reached at their trial lengths."""
        enough = pending & (psnr >= target)
        short = pending & ~enough
        better = enough | (short & ~self.reached & (psnr > self.psnr))
        self.length = torch.where(better, trial, self.length)
        self.psnr = torch.where(better, psnr, self.psnr)
        self.low = torch.where(short, trial, self.low)
        self.reached = self.reached | enough


def _cut(tokens: Tokens, lengths: Tensor) -> Tokens:
    """The first `lengths` [B] tokens of every image, without padding that no image needs."""
    longest = int(lengths.max()) if len(lengths) else tokens.num_tokens
    return dataclasses.replace(tokens.prefix(longest), lengths=lengths)


def _decode(tokenizer: PrefixTokenizer, tokens: Tokens, options: dict[str, Any]) -> Tensor:
    generator = options.get("generator")
    state = None if generator is None else generator.get_state()
    images = tokenizer.decode(tokens, **options)
    if generator is not None:
        generator.set_state(state)
    return images


def _psnr(images: Tensor, references: Tensor) -> Tensor:
    """dB of each image [B, 3, H, W] (or video) in [0, 1] against its reference, inf where they are equal."""
    difference = images.to(_precision(images.device)) - references.to(_precision(images.device)).clamp(0, 1)
    return -10 * difference.square().flatten(1).mean(1).log10()


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
