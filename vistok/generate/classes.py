"""Generators whose condition is a class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import configuration
from .base import Generator


class ClassGenerator(Generator):
    """A generator whose condition is a class in 0..num_classes-1, int64 [B].

    `logits` and `write` also take `num_classes` itself, which stands for no class, as in the unconditional
    pass of guidance.
    """

    conditions = ("class",)
    num_classes: int

    def check_condition(self, condition: int | Sequence[int] | Tensor) -> Tensor:
        """Classes int64 [B] on this model's device, or a ValueError that names what is accepted."""
        accepted = f"{self.label} takes classes in 0..{self.num_classes - 1}, as int64 [B] or a list"
        try:
            # Without its dtype an empty list would be one of floats.
            dtype = torch.int64 if isinstance(condition, list | tuple) and not condition else None
            values = torch.as_tensor(condition, dtype=dtype)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"the classes are {configuration.shorten(condition)}; {accepted}") from error
        if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
            raise ValueError(
                f"the classes are {configuration.shorten(condition)} ({values.dtype}); {accepted}"
            )
        if values.ndim > 1:
            raise ValueError(f"the classes have shape {list(values.shape)}; {accepted}")
        values = values.reshape(-1).to(self.device, torch.int64)
        if values.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in values.aminmax())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"class {low if low < 0 else high} does not exist; {accepted}")
        return values

    # Training -----------------------------------------------------------------------------------------------

    def drop_classes(self, classes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Replace a random `class_label_dropout` of classes int64 [B] by no class, for training with
        guidance.

        The generator is on the classes' device.
        """
        uniform = torch.rand(len(classes), generator=generator, device=classes.device)
        return classes.masked_fill(uniform < self.config.class_label_dropout, self.num_classes)
