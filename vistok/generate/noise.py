"""The random draws of a sampler: one stream per image, so that a picture does not depend on its batch."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_SMALLEST = 1e-20  # below which no logarithm is taken


class Noise(Protocol):
    """The random numbers of a sampler; a recorded stream has the method that its family draws with."""

    def gumbel(self, *shape: int) -> Tensor:
        """The next standard Gumbel draws of every image, float32 [B, *shape]."""

    def normal(self, *shape: int) -> Tensor:
        """The next standard normal draws of every image, float32 [B, *shape]."""


class ImageNoise:
    """Draws of `batch` images, each from a random stream of its own.

    One generator seeds the stream of each image in turn: a batch in parts gives the pictures of the whole
    batch. A list has one generator per image. None is torch's default generator. Numbers are drawn on the
    generator's device and moved to `device`.

    Raises:
        ValueError: a list of another length than the batch.
        TypeError: anything else that is not a torch.Generator.
    """

    def __init__(
        self,
        batch: int,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        if generator is None or isinstance(generator, torch.Generator):
            source = torch.device("cpu") if generator is None else generator.device
            seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=source).tolist()
            self.streams = [torch.Generator(source).manual_seed(seed) for seed in seeds]
            return
        self.streams = list(generator) if isinstance(generator, Sequence) else [generator]
        for stream in self.streams:
            if not isinstance(stream, torch.Generator):
                raise TypeError(
                    f"generator is a {type(stream).__name__}; give a torch.Generator, such as "
                    "torch.Generator().manual_seed(0), or a list with one per image"
                )
        if len(self.streams) != batch:
            raise ValueError(
                f"{len(self.streams)} generators were given for {batch} images; give one generator, or one "
                "of them per image"
            )

    def gumbel(self, *shape: int) -> Tensor:
        """The next standard Gumbel draws of every image, float32 [B, *shape]."""
        return gumbel(self._draws(torch.rand, shape))

    def normal(self, *shape: int) -> Tensor:
        """The next standard normal draws of every image, float32 [B, *shape]."""
        return self._draws(torch.randn, shape)

    def _draws(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        if not self.streams:
            return torch.empty(0, *shape, device=self.device)
        draws = [draw(shape, generator=stream, device=stream.device) for stream in self.streams]
        return torch.stack([each.to(self.device) for each in draws])


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel draws from uniform ones in [0, 1): -log(-log(u)), each logarithm of at least 1e-20.

    The largest logit plus such noise is a draw from the softmax of the logits.
    """
    return uniform.clamp(min=_SMALLEST).log().neg_().clamp_(min=_SMALLEST).log_().neg_()
