"""The contract every generator keeps: a condition → tokens that a tokenizer decodes."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from .. import configuration
from ..pretrained_model import PretrainedModel, evaluating
from ..tokens import Tokens
from .noise import ImageNoise, Noise
from .registry import GENERATORS


class Generator(PretrainedModel):
    """A model that writes tokens: `sample`, `logits`, `from_pretrained`, `save_pretrained`.

    A family subclasses this with a `config` dataclass, `check_condition`, `logits` and `write`.
    `config.tokenizer` names the tokenizer that decodes the tokens; it is never loaded here.
    """

    catalog = GENERATORS
    conditions: ClassVar[tuple[str, ...]] = ()
    """The conditions that `sample` takes, such as ("class",); see `check_condition`."""
    settings: ClassVar[Mapping[str, str]] = {}
    """Arguments of `sample` → the fields of the configuration with their published values. An argument that
    is not among them does not apply to the family."""
    codebook_size: int
    """Codes that a token may have, in families that write codes."""
    num_tokens: int
    """Tokens per image."""
    grid: tuple[int, ...] | None = None
    """Sides of the grid that the tokens fill, row by row; None: one-dimensional tokens."""

    # What a family provides ---------------------------------------------------------------------------------

    def check_condition(self, condition: Any) -> Any:
        """Convert the condition of `sample` to the input of `write`, one per image, on this model's device.

        Raises ValueError, with what is accepted, for anything else.
        """
        raise NotImplementedError

    def logits(self, indices: Tensor, condition: Any) -> Tensor:
        """Logits over the codebook for tokens int64 [B, …] of images with this condition, for training and
        parity; each family documents the rows. Families of continuous tokens have `velocity` in its place."""
        raise NotImplementedError

    def write(self, condition: Any, settings: Any, noise: Noise) -> Tensor:
        """Write token indices int64 [B, K, …], or latents [B, K, C], for what `check_condition` returned.

        `settings` is the configuration with the arguments of `sample` in place of its published values.
        """
        raise NotImplementedError

    def unguided(self, settings: Any) -> float:
        """The guidance with which only the conditional pass counts."""
        raise NotImplementedError

    @classmethod
    def create(cls, **config: Any) -> Self:
        """Build with fresh weights from the fields of the family's configuration, or from the original's
        nested form, whose other keys are ignored."""
        return cls(cls.parse(config))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Any:
        """The configuration from its fields or from the original's nested form."""
        return configuration.build(cls.config_class, values, cls.family)

    # What a user calls --------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: Any,
        *,
        temperature: float | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Noise | None = None,
        **options: Any,
    ) -> Tokens:
        """Write the tokens of one image per condition, on this model's device.

        Args:
            condition: what `conditions` names; classes are a list of whole numbers, int64 [B], or one class.
            temperature: 0 takes the likeliest token every time. None is the published value, here and below.
            guidance: strength of the condition; `unguided` is the value without guidance.
            steps: forward passes; families that write one token per pass do not take it.
            generator: one that seeds every image in turn, or a list with one per image, whose pictures then
                depend neither on the batch nor on the place in it. None is torch's default generator.
            noise: a recorded stream of draws in place of a generator.
            options: further settings of the family, by the names in `settings`.

        Raises:
            ValueError: conditions, settings and generators that do not fit, and logits with NaN or infinity.
        """
        condition = self.check_condition(condition)
        values = {"temperature": temperature, "guidance": guidance, "steps": steps, **options}
        settings = self.check_settings({name: value for name, value in values.items() if value is not None})
        if noise is not None and generator is not None:
            raise ValueError("noise and a generator were given; give one of them")
        if noise is None:
            noise = ImageNoise(len(condition), generator, self.device)
        with evaluating(self):
            return self.as_tokens(self.write(condition, settings, noise))

    def as_tokens(self, indices: Tensor) -> Tokens:
        """Wrap what `write` returned, here indices int64 [B, K], with the tokenizer's name, the codebook's
        size and the grid."""
        return Tokens(
            indices=indices,
            tokenizer=self.config.tokenizer,
            codebook_sizes=(self.codebook_size,),
            grid=self.grid,
        )

    # Checks -------------------------------------------------------------------------------------------------

    def check_settings(self, values: Mapping[str, Any]) -> Any:
        """The configuration with these arguments of `sample` in it.

        Raises:
            ValueError: arguments that do not apply or are out of range, and a setting that neither the
                arguments nor the configuration state.
        """
        if unknown := [name for name in values if name not in self.settings]:
            raise ValueError(
                f"{unknown[0]} does not apply to {self.label}; it takes {', '.join(self.settings)}"
            )
        for name in ("temperature", "guidance"):
            if name in values:
                _require_number(name, values[name])
        if "steps" in values:
            _require_steps(values["steps"])
        fields = {self.settings[name]: value for name, value in values.items()}
        settings = self.parse({**dataclasses.asdict(self.config), **fields})
        for name, field in self.settings.items():
            if getattr(settings, field) is None:
                raise ValueError(f"the configuration of {self.label} does not state {field}; give {name}=")
        return settings

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError unless a tokenizer decodes what this generator writes: by name, codes, and the
        grid or number of tokens per image."""
        name, own = getattr(tokenizer, "name", None), self.config.tokenizer
        if name and own and name != own:
            raise ValueError(f"{self.label} writes tokens of {own!r}; {name!r} cannot decode them")
        self.check_codes(tokenizer)
        if self.grid is not None and tokenizer.size_multiple is None:
            raise ValueError(
                f"{self.label} writes a grid of {self.grid} tokens; {tokenizer.label} does not decode grids"
            )
        if self.grid is None and tokenizer.num_tokens != self.num_tokens:
            raise ValueError(
                f"{self.label} writes {self.num_tokens} tokens per image; {tokenizer.label} decodes "
                f"{tokenizer.num_tokens}"
            )

    def check_codes(self, tokenizer: Any) -> None:
        """Raise ValueError unless a tokenizer's codes are those that this generator writes."""
        sizes = tokenizer.quantizer.codebook_sizes
        if sizes != (self.codebook_size,):
            raise ValueError(
                f"{self.label} writes codes of one codebook of {self.codebook_size}; {tokenizer.label} has "
                f"codebook sizes {sizes}"
            )

    def check_finite(self, finite: Tensor) -> None:
        """Raise ValueError where `finite`, bool [], reports that logits held NaN or infinity."""
        if not torch.compiler.is_compiling() and not bool(finite):
            raise ValueError(
                f"the logits of {self.label} hold NaN or infinity, so no token can be chosen; values may "
                f"overflow in {self.dtype}: load with dtype='float32', or check the weights"
            )


def _require_number(name: str, value: Any) -> None:
    """Raise ValueError unless a setting is a finite number of 0 or more."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {configuration.shorten(value)}; it takes a finite number of 0 or more")


def _require_steps(value: Any) -> None:
    """Raise ValueError unless a number of steps is a whole number of 1 or more."""
    if not isinstance(value, numbers.Integral) or isinstance(value, (bool, np.bool_)) or value < 1:
        raise ValueError(
            f"steps is {configuration.shorten(value)}; it takes a whole number of 1 or more, such as 8"
        )
