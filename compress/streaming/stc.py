"""The settings of STC, Streaming Token Compression."""

from dataclasses import dataclass

from ..reducer import fraction_or_count


@dataclass(frozen=True, kw_only=True)
class STC:
    """Reuse the tower's features between neighbouring frames, and keep the most novel tokens of each.

    Accelerating Streaming Video Large Language Models via Hierarchical Token Compression (Wang et al., 2025,
    arXiv 2512.00891), whose streams have a frame every two seconds. For `Stream(model, STC())`. Frames come
    in chunks of `chunk`; every `interval`-th chunk goes through the tower as it is, and in the frames between
    each layer computes anew the share `update_ratio` of the tokens that changed most (`interval=1`:
    everything, the published strategy "none"). Of each frame `keep` tokens stay: a count, or a fraction of
    the frame's tokens, rounded. `fixed_channels` scores all chunks by the channels of the first one; the
    published code chooses them anew in each, and then averages different channels.

    Raises:
        TypeError, ValueError: a setting that is not in its range.
    """

    keep: float | int = 60
    update_ratio: float = 0.25
    interval: int = 2
    chunk: int = 1
    fixed_channels: bool = False

    def __post_init__(self) -> None:
        fraction_or_count(self.keep)
        for name in ("interval", "chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it takes a whole number from 1")
        ratio = self.update_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"update_ratio is {ratio!r}; it takes a share of a frame's tokens in (0, 1]")
        if not isinstance(self.fixed_channels, bool):
            raise TypeError(f"fixed_channels is {self.fixed_channels!r}; it takes True or False")

    def count(self, tokens: int) -> int:
        """How many of a frame's `tokens` stay. Raises ValueError for more than there are, and for a fraction
        below one token."""
        if isinstance(self.keep, float):
            count = round(self.keep * tokens)
            if count < 1:
                raise ValueError(
                    f"keep is {self.keep} of the {tokens} tokens of a frame, which is less than one token "
                    f"per frame; give at least {1 / tokens:.3g}, or a count"
                )
            return count
        if self.keep > tokens:
            raise ValueError(
                f"keep is {self.keep} tokens per frame, and a frame of this model has {tokens}; lower it, or "
                "give a fraction in (0, 1]"
            )
        return self.keep
