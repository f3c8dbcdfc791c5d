"""What a cache holds, beside keys and values, so that dropped visual tokens can return."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Entries:
    """The cache entries of the layers between two cuts, [B, S] each.

    `token` is the number of the visual token in its row (-1: text), `place` the place in the conversation,
    `real` whether the entry is a token at all.
    """

    token: Tensor
    place: Tensor
    real: Tensor

    def extended(self, other: "Entries") -> "Entries":
        """These entries, and then the `other` ones."""
        return Entries(
            torch.cat([self.token, other.token], 1),
            torch.cat([self.place, other.place], 1),
            torch.cat([self.real, other.real], 1),
        )

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Entries":
        """The same with changed rows."""
        return Entries(change(self.token), change(self.place), change(self.real))


@dataclass
class Revivable:
    """What a cache must hold so that dropped tokens can return: V visual tokens per row.

    `image` [B, V] is the number of a token's image (-1: padding), `place` [B, V] its place in the
    conversation, `states` [B, V, D] are those with which it enters layer `frontier` [B, V] (the number of
    layers: none are left). `entries[n]` describes the cache before the n-th cut, `counts[image]` how many of
    an image's tokens go on after each cut. `placed[layer]` are the layer's positions and rotations for the
    tokens, whose first dimension is B.
    """

    image: Tensor
    place: Tensor
    states: Tensor
    frontier: Tensor
    entries: list[Entries]
    counts: dict[int, list[int]]
    placed: dict[int, dict[str, Any]]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put the rows of the batch in another order, or repeat or select them."""
        for name in ("image", "place", "states", "frontier"):
            setattr(self, name, change(getattr(self, name)))
        self.entries = [entries.rows(change) for entries in self.entries]
        changed: dict[int, Any] = {}
        for arguments in self.placed.values():
            for name, value in arguments.items():  # many layers share one value
                if id(value) not in changed:
                    changed[id(value)] = value, mapped(value, change)
                arguments[name] = changed[id(value)][1]


@dataclass
class Step:
    """One call on a cache with revivable tokens, while its layers run.

    `new` tokens follow `count` tokens that return, numbered by `token` [B, count] where `real` [B, count].
    `alive` [B, V] go on from the last cut. `entries` describes the cache that the current layers attend to,
    the call's own tokens included, and `added` counts the entries of each layer that are new.
    """

    new: Entries
    alive: Tensor
    entries: Entries
    token: Tensor
    real: Tensor
    mask: Tensor | None = None
    added: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Tokens that return, of the row with the most."""
        return self.token.shape[1]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a tuple of them, changed."""
    if isinstance(value, tuple | list):
        return tuple(mapped(part, change) for part in value)
    return change(value)
