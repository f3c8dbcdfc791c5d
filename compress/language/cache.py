"""A key-value cache whose layers hold fewer tokens than the model has read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .revival_state import Revivable

FUNCTIONAL = (
    "use the functional mode, which needs no hooks in the language model: prepared = "
    "session.prepare(inputs); model.generate(**prepared.inputs, ...)"
)


class Lease:
    """Whether the session that shortened a cache is still attached; copies of a cache share it."""

    def __init__(self) -> None:
        self.runs = True

    def __deepcopy__(self, memo: dict[int, object]) -> "Lease":
        return self


@dataclass
class StepState:
    """What a reducer that chooses at each step needs of a cache, layer by layer.

    `images[i]` [B, entries] is the image that each entry of layer i shows (-1: none; those that came since
    show none), `counts[i]` [B, images] how many entries of it a step attends to, `complete[i]` whether these
    are all, `memory[i]` what the reducer keeps from step to step (tensors whose first dimension is B).
    """

    images: list[Tensor | None]
    counts: list[Tensor | None]
    complete: list[bool]
    memory: list[dict[str, Tensor]]


@dataclass
class CacheState:
    """The entries of a reduced cache, and what masks and positions need to know of them.

    Tokens are counted logically (as the model read them: `length`) and physically (entries in a layer).
    `columns[i]` [B, physical] marks the real entries of layer i, as of `length`; None stands for the
    caller's own mask. `ragged[i]`: some entry is not real. `next` [B] is the position id after the last
    token, `planes` how many position planes the model takes (0: one-dimensional); `compact`: positions are
    renumbered, and `removed[i]` [B] is what layer i subtracts on top; `tail` counts the text tokens at the
    end, `lease` records whether the session still corrects masks and positions. `numbers[i]` [B, physical]
    are the places that the entries of a layer with a window had before some were evicted, out of `read[i]`:
    the window continues to count those. `skips`: later calls leave out parts of layers. `steps`
    is for a reducer that chooses what each step attends to, `revivable` for one whose dropped tokens return.
    """

    length: int
    columns: list[Tensor | None]
    ragged: list[bool]
    removed: list[Tensor | None]
    gap: list[int]
    next: Tensor
    planes: int = 0
    compact: bool = False
    tail: int = 0
    lease: Lease = field(default_factory=Lease)
    numbers: dict[int, Tensor] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)
    skips: bool = False
    steps: StepState | None = None
    revivable: Revivable | None = None

    def numbered(self, layer: int, entries: int) -> Tensor | None:
        """The places [B, entries] that a layer's entries count as, those that came since included; None where
        they count as they stand."""
        if layer not in self.numbers:
            return None
        numbers = self.numbers[layer]
        later = torch.arange(entries - numbers.shape[1], device=numbers.device) + self.read[layer]
        return torch.cat([numbers, later.expand(len(numbers), -1)], 1)


class ReducedDynamicCache(DynamicCache):
    """A DynamicCache whose `get_seq_length` counts the tokens read, and whose masks cover the entries
    held."""

    reduction: CacheState

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the layer has read, dropped ones included."""
        gap = self.reduction.gap
        return super().get_seq_length(layer_idx) + (gap[layer_idx] if layer_idx < len(gap) else 0)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of one layer. Raises RuntimeError once the session is detached."""
        if not self.reduction.lease.runs:
            raise RuntimeError(
                "this cache was shortened by a reducer that has been detached since, and the model alone "
                "would go on with wrong masks and positions; start from the prompt, or detach when "
                "generation has ended"
            )
        return super().update(*args, **kwargs)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Entries that the layer holds."""
        return super().get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as decoding with drafts does; a negative number, as in the stock cache.

        Raises NotImplementedError when that would reach back to an image.
        """
        state, count = self.reduction, abs(tokens_to_remove)
        later = self.get_seq_length() - state.length
        if count > later + state.tail:
            raise NotImplementedError(
                f"{count} tokens cannot be taken back from a cache that a reducer has shortened: only "
                f"{later + state.tail} came after the last image; shorten the inputs up front with "
                "session.prepare(inputs)"
            )
        if count and state.steps is not None and any(state.steps.memory):
            raise NotImplementedError(
                f"{count} tokens cannot be taken back: what later tokens attend to depends on them with the "
                "reducer attached; generate without drafts (assistant_model, prompt_lookup_num_tokens)"
            )
        if count and state.revivable is not None:
            raise NotImplementedError(
                f"{count} tokens cannot be taken back: visual tokens returned to the cache beside them; "
                "generate without drafts (assistant_model, prompt_lookup_num_tokens)"
            )
        super().crop(tokens_to_remove)
        if (within := count - later) > 0:
            state.length, state.tail, state.next = (
                state.length - within,
                state.tail - within,
                state.next - within,
            )
            state.columns = [None if c is None else c[:, : c.shape[1] - within] for c in state.columns]
            state.numbers = {i: n[:, : n.shape[1] - within] for i, n in state.numbers.items()}
            state.read = {i: count - within for i, count in state.read.items()}
            if state.steps is not None:
                state.steps.images = [images[:, : images.shape[1] - within] for images in state.steps.images]

    def reset(self) -> None:
        """Empty the cache; it is a stock one again."""
        super().reset()
        del self.reduction
        self.__class__ = DynamicCache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch in another order."""
        super().reorder_cache(beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._rows(lambda x: x[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        state, changed = self.reduction, {}

        def once(x: Tensor | None) -> Tensor | None:  # layers that share a tensor continue to share it
            if x is not None and id(x) not in changed:
                changed[id(x)] = change(x)
            return None if x is None else changed[id(x)]

        for name in ("columns", "removed"):
            setattr(state, name, [once(x) for x in getattr(state, name)])
        state.numbers = {i: change(numbers) for i, numbers in state.numbers.items()}
        state.next = change(state.next)
        if state.steps is not None:
            for name in ("images", "counts"):
                setattr(state.steps, name, [once(x) for x in getattr(state.steps, name)])
            memory = [{name: change(x) for name, x in layer.items()} for layer in state.steps.memory]
            state.steps.memory = memory
        if state.revivable is not None:
            state.revivable.change_rows(change)


def state_of(cache: Cache | None) -> CacheState | None:
    """The state of a reduced cache; None for others."""
    return cache.reduction if isinstance(cache, ReducedDynamicCache) else None


def check_kind(cache: Cache) -> None:
    """Raise NotImplementedError unless reducers can shorten a cache of this class."""
    if type(cache) not in (DynamicCache, ReducedDynamicCache):
        raise NotImplementedError(
            f"reducers shorten a DynamicCache, and this call brings a {type(cache).__name__}; {FUNCTIONAL}"
        )


def adopt(cache: DynamicCache, state: CacheState) -> None:
    """Turn the caller's own cache object into a reduced one. Raises NotImplementedError for other caches."""
    check_kind(cache)
    cache.__class__ = ReducedDynamicCache
    cache.reduction = state


def extended(state: CacheState, layer: int, entries: int, mask: Tensor | None) -> Tensor | None:
    """Which of a layer's `entries` are real by now: those of `columns`, then what came after by the caller's
    mask [B, tokens read]. None when the layer follows the caller's mask alone."""
    columns = state.columns[layer]
    if columns is None:
        return None
    new = entries - columns.shape[1]
    if mask is None:
        later = columns.new_ones(columns.shape[0], new)
    else:
        later = mask[:, state.length : state.length + new].bool()
    return torch.cat([columns, later.to(columns.device)], 1)
