"""Where the prompt of a forward ends, when answers or drafts follow it in the same forward.

Reducers that rank by the last row must rank by the last token of the prompt: what follows it is not there
when the same answer is generated token by token.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import cache_in

PromptLength = int | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Generation:
    """A `generate` that is under way: its model, and the length and number of its prompts."""

    model: nn.Module
    length: int
    prompts: int = 1


GENERATION: ContextVar[Generation | None] = ContextVar("vistok_generation", default=None)


@contextmanager
def generating(model: nn.Module, shape: tuple[int, int] | None) -> Iterator[None]:
    """Note that `model` generates from prompts of this shape [B, L] (None: not known) while inside."""
    token = GENERATION.set(None if shape is None else Generation(model, shape[1], shape[0]))
    try:
        yield
    finally:
        GENERATION.reset(token)


def shape_of_prompts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """The shape [B, L] of the prompts that `generate` is called with, what its cache has read included."""
    prompts = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    shape = next((tuple(x.shape[:2]) for x in prompts if isinstance(x, Tensor) and x.ndim > 1), None)
    cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
    read = 0 if cache is None else cache.get_seq_length()
    if shape is None or not read:
        return shape
    if isinstance(mask, Tensor):  # over all that was read, also where only new tokens are given
        return shape[0], max(shape[1], mask.shape[1])
    return shape[0], shape[1] if shape[1] > read else read + shape[1]


def generation_on_stack(model: nn.Module) -> Generation | None:
    """The stock `generate` of `model` that the caller runs in, where it was not called through the session:
    by a method taken before, or through the class."""
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals if frame.f_code.co_name == "generate" else {}
        if names.get("self") is model and "kwargs" in names:
            shape = shape_of_prompts([names.get("inputs")], names["kwargs"])
            return None if shape is None else Generation(model, shape[1], shape[0])
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class Hints:
    """The arguments of a whole model's call that show where its prompt ends: `labels` [B, L] (-100: no
    target), and the `logits_to_keep` (how many at the end, or at which places)."""

    labels: Tensor | None = None
    logits_to_keep: int | Tensor = 0


def last_of_prompt(
    real: Tensor, before: int, prompt_length: PromptLength, generation: Generation | None, hints: Hints
) -> Tensor:
    """The place [B] of the last prompt token among the tokens of a forward; `real` [B, L] is not padding.

    `before` counts the tokens read by earlier calls. The prompt ends where the first of these states:
    `prompt_length` (tokens of the prompt, those read before and padding on the left included), the running
    generation, the first label, the first logits that are kept. Without any, everything is prompt. Raises
    ValueError for a `prompt_length` that does not end in this forward.
    """
    batch, length = real.shape
    places = torch.arange(length, device=real.device)
    if prompt_length is not None:
        ends = torch.as_tensor(prompt_length, device=real.device).reshape(-1)
        if batch % len(ends):
            raise ValueError(f"prompt_length has {len(ends)} entries; this forward has {batch} rows")
        ends = ends.repeat_interleave(batch // len(ends)) - before
        if int(ends.min()) < 1 or int(ends.max()) > length:
            raise ValueError(
                f"prompt_length is {prompt_length}, but this forward holds tokens {before + 1} to "
                f"{before + length}; give the number of prompt tokens up to the answer, padding on the left "
                "included, or None"
            )
    elif generation is not None:
        ends = torch.full((batch,), min(length, max(1, generation.length - before)), device=real.device)
    elif hints.labels is not None and hints.labels.shape == real.shape:
        target = (hints.labels.to(real.device) != -100) & real
        ends = torch.where(target.any(1), target.to(torch.uint8).argmax(1), length)
    else:
        kept = hints.logits_to_keep
        first = int(kept.min()) if isinstance(kept, Tensor) else length - (kept or 1)
        ends = torch.full((batch,), min(length, max(0, first) + 1), device=real.device)
    return ((places < ends[:, None]) & real).mul(places).amax(1)
