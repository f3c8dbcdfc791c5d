"""The share of a code space that the tokens of images use: streamed, mergeable, in exact integers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...tokens import Tokens
from .metric import Metric

# A table of counts per codebook: 2^24 entries are 128 MiB.
LARGEST_CODEBOOK = 2**24


@dataclass(frozen=True)
class CodeUsage:
    """Cost and code usage of the tokens of `images` images; None where a kind of token has no such figure.

    Of indices, one number per codebook: `usage`, the share of entries that occur, and `perplexity` exp(H),
    from 1 to the codebook's size. Of bits: `bit_entropy`, the mean over token positions and channels of the
    entropy of that bit over the images (0..1), `lowest_bit_entropy`, the least of them, and
    `bit_correlation`, the mean absolute correlation between two different channels over all tokens (0..1;
    channels that never change are left out).
    """

    images: int
    tokens_per_image: float
    bits_per_image: float
    bits_per_pixel: float
    usage: tuple[float, ...] | None = None
    perplexity: tuple[float, ...] | None = None
    bit_entropy: float | None = None
    lowest_bit_entropy: float | None = None
    bit_correlation: float | None = None


class CodeStatistics:
    """Streaming statistics of `Tokens` of one tokenizer: `update`, `merge`, `result`.

    Memory is one count per codebook entry, or per pair of channels and per bit of an image. Everything is a
    sum of integers, so any split of the images over parts merges to the same result to the bit.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {
            name: torch.tensor(0) for name in ("images", "tokens", "bits", "pixels")
        }

    def update(self, tokens: Tokens, pixels_per_image: int) -> None:
        """Add a batch of images of `pixels_per_image` = H * W pixels each.

        ValueError for indices without codebook_sizes, outside them, or of codebooks above 2^24 entries, and
        for tokens of another kind than before.
        """
        tokens = tokens.to("cpu")
        tokens.validate()
        lengths = tokens.lengths
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.num_tokens)
        sums = {
            "images": torch.tensor(len(tokens)),
            "tokens": lengths.sum(),
            "bits": tokens.bits_per_image.sum(),
            "pixels": torch.tensor(len(tokens) * pixels_per_image),
        }
        valid = torch.arange(tokens.num_tokens) < lengths[:, None]  # [B, K]
        if tokens.indices is not None:
            sums |= _count_indices(tokens, valid)
        elif tokens.bits is not None:
            sums |= _count_bits(tokens.bits, valid)
        self._add(sums)

    def merge(self, other: "CodeStatistics") -> None:
        """Add the images of `other`. ValueError when its tokens are of another kind."""
        self._add(other._sums)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts as integer tensors; only the totals before the first image."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state returned by `state_dict`."""
        self._sums = {name: value.clone() for name, value in state.items()}

    def result(self) -> CodeUsage:
        """The figures over all images so far. ValueError before the first."""
        images, tokens, bits, pixels = (
            int(self._sums[name]) for name in ("images", "tokens", "bits", "pixels")
        )
        if not images:
            raise ValueError("no tokens were counted: look at which images were read")
        figures = {}
        codebooks = [self._sums[name].double() for name in sorted(self._sums) if name.startswith("codebook")]
        if codebooks:
            figures["usage"] = tuple(float((counts > 0).double().mean()) for counts in codebooks)
            figures["perplexity"] = tuple(
                float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp())
                for counts in codebooks
            )
        if "ones" in self._sums:
            figures |= self._of_bits()
        return CodeUsage(images, tokens / images, bits / images, bits / pixels, **figures)

    def _of_bits(self) -> dict[str, float]:
        """Entropies [K, D] over images, correlations [D, D] over tokens."""
        occurrences = self._sums["seen"].double()
        share = (self._sums["ones"] / occurrences.clamp(min=1)[:, None])[occurrences > 0]  # [K, D]
        entropy = (torch.special.entr(share) + torch.special.entr(1 - share)) / torch.log(share.new_tensor(2))
        tokens = occurrences.sum().clamp(min=1)
        means = self._sums["ones"].sum(0) / tokens  # [D]
        covariance = self._sums["pairs"] / tokens - means * means[:, None]
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        varying = deviation > 0
        correlation = (covariance / (deviation * deviation[:, None]))[varying][:, varying].abs()
        others = ~torch.eye(len(correlation), dtype=torch.bool)
        figures = {}
        if entropy.numel():
            figures |= {"bit_entropy": float(entropy.mean()), "lowest_bit_entropy": float(entropy.min())}
        if others.any():
            figures["bit_correlation"] = float(correlation[others].mean())
        return figures

    def _add(self, sums: dict[str, Tensor]) -> None:
        if not int(sums["images"]):
            return
        if int(self._sums["images"]):
            _check_kind(self._sums, sums)
        self._sums = {name: _grown_sum(self._sums.get(name), value) for name, value in sums.items()}


def _count_indices(tokens: Tokens, valid: Tensor) -> dict[str, Tensor]:
    """How often every entry of every codebook occurs."""
    if max(tokens.codebook_sizes) > LARGEST_CODEBOOK:
        raise ValueError(
            f"codebooks of {tokens.codebook_sizes} entries; usage is counted up to {LARGEST_CODEBOOK} entries"
        )
    columns = tokens.indices[valid].reshape(-1, len(tokens.codebook_sizes)).unbind(-1)
    return {
        f"codebook{position:03d}": torch.bincount(column, minlength=size)
        for position, (column, size) in enumerate(zip(columns, tokens.codebook_sizes, strict=True))
    }


def _count_bits(bits: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """How often each bit is set by position [K, D], two channels together [D, D], and how often each position
    occurs [K]."""
    flat = bits[valid].double()  # padding is not counted; sums of 0 and 1 are exact in double
    return {
        "ones": (bits & valid[..., None]).sum(0),
        "pairs": (flat.T @ flat).long(),
        "seen": valid.sum(0),
    }


def _check_kind(before: dict[str, Tensor], now: dict[str, Tensor]) -> None:
    shapes = [
        {name: list(value.shape) for name, value in sums.items() if name.startswith(("codebook", "pairs"))}
        for sums in (before, now)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(f"tokens of two kinds cannot be counted together: {shapes[0]} and {shapes[1]}")


def _grown_sum(total: Tensor | None, value: Tensor) -> Tensor:
    """Sum of two tables of which one may have fewer token positions (the first axis)."""
    if total is None or total.shape == value.shape:
        return value.clone() if total is None else total + value
    longer, shorter = sorted((total, value), key=len, reverse=True)
    result = longer.clone()
    result[: len(shorter)] += shorter
    return result


METRICS = (
    Metric("tokens-per-image", "tokens per image", style=".4g", better="lower", option="codes", rank=21),
    Metric(
        "bits-per-image", "bits per image", style=",.1f", better="lower", option="codes", card=True, rank=22
    ),
    Metric("bits-per-pixel", "bits per pixel", style=".4g", better="lower", option="codes", rank=23),
    Metric(
        "codebook-usage", "codebook used", style=".2%", better="higher", option="codes", card=True, rank=24
    ),
    Metric("perplexity", "perplexity", style=",.1f", better="higher", option="codes", rank=25),
    Metric("bit-entropy", "entropy per bit", better="higher", option="codes", rank=26),
    Metric("lowest-bit-entropy", "lowest entropy of a bit", better="higher", option="codes", rank=27),
    Metric("bit-correlation", "correlation of bits", better="lower", option="codes", rank=28),
)
