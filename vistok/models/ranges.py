"""Checks of the values of a configuration, each with an error in one line that names the field."""

from collections.abc import Iterable
from typing import Any

LARGEST_SIZE = 2**24
"""Largest width, side, number of tokens or of codes; far beyond every published model."""
LARGEST_DEPTH = 1024
"""Largest number of layers, blocks or levels."""


def require_between(config: Any, names: Iterable[str], low: float, high: float) -> None:
    """Raise ValueError unless each named field, or each item of it, lies in low..high; empty lists do not."""
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, tuple | list) else (value,)
        if not items or not all(low <= item <= high for item in items):
            what = "one or more numbers" if items is value else "a number"
            raise ValueError(f"{name} is {value}; it takes {what} from {low:,} to {high:,}")


def require_sizes(config: Any, *names: str) -> None:
    """Raise ValueError unless each named field is a size: 1 to LARGEST_SIZE."""
    require_between(config, names, 1, LARGEST_SIZE)


def require_depths(config: Any, *names: str) -> None:
    """Raise ValueError unless each named field is a number of layers: 1 to LARGEST_DEPTH."""
    require_between(config, names, 1, LARGEST_DEPTH)


def require_multiple(config: Any, name: str, *factors: str) -> None:
    """Raise ValueError unless a field, or each item of it, is a multiple of each of the other fields."""
    value = getattr(config, name)
    for factor in factors:
        divisor = getattr(config, factor)
        items = value if isinstance(value, tuple | list) else (value,)
        if any(item % divisor for item in items):
            raise ValueError(f"{name} is {value}; it must be a multiple of {factor}, {divisor}")


def require_color(config: Any, name: str) -> None:
    """Raise ValueError unless a field is 3, the channels of the images that every tokenizer takes."""
    if getattr(config, name) != 3:
        raise ValueError(f"{name} is {getattr(config, name)}; images have 3 channels, red, green and blue")
