"""Models that write tokens: from a class to the tokens of a new picture.

import vistok, vistok.generate
generator = vistok.generate.load("maskgit-l32")
tokens = generator.sample([207, 360])  # golden retriever, otter
images = vistok.load(generator.config.tokenizer).decode(tokens)
"""

from pathlib import Path
from typing import Any

from .base import Generator
from .registry import GENERATORS

__all__ = ["Generator", "create", "list_generators", "load"]


def list_generators() -> list[str]:
    """Names that `load` and `create` accept."""
    return list(GENERATORS.entries())


def create(name_or_family: str, **config: Any) -> Generator:
    """Build a generator with fresh weights.

    A published name gives the published configuration, changed by `config`; a family name takes the whole
    configuration, either as the family's own fields or in the original's nested form. The state dict has the
    published checkpoint's keys. Raises ValueError for names, fields and values that do not exist.
    """
    return GENERATORS.create(name_or_family, **config)


def load(
    source: str | Path,
    *,
    device: Any = None,
    dtype: Any = None,
    weights: str | Path | None = None,
    **options: Any,
) -> Generator:
    """Load a generator with its weights, in eval mode; arguments and errors are those of `vistok.load`.

    Its tokenizer is not loaded: `generator.config.tokenizer` is the name to give to `vistok.load`.
    """
    return GENERATORS.load(Generator, source, device=device, dtype=dtype, weights=weights, **options)
