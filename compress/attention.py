"""Rows and column sums of attention maps, computed beside the model's own kernel.

A map of N tokens has N² entries per head; the scores of token reducers read a few of its rows (the last
prompt token, the instruction, the class token) or its column sums. Both need O(N · rows) memory.

To see the queries and keys of a Hugging Face attention module, rotated and normalised as the model uses
them, its attention function is wrapped through the public `AttentionInterface` (`watched`): the stock
function still computes the output.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

Probe = Callable[[nn.Module, Tensor, Tensor, Tensor | None, float | None], None]
# From query, key, value, mask and scaling to the key, value and mask that are used.
AttentionChange = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, float | None], tuple[Tensor, Tensor, Tensor | None]
]

_PROBES: ContextVar[dict[nn.Module, Probe] | None] = ContextVar("vistok_probes", default=None)
_CHANGES: ContextVar[dict[nn.Module, AttentionChange] | None] = ContextVar("vistok_changes", default=None)
_ROWS: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("vistok_rows", default=None)
_PREFIX = "vistok_"


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    softmax: bool = True,
) -> Tensor:
    """Rows of attention maps: queries [B, H, R, D] and keys [B, H_k, N, D] → [B, H, R, N] in float32.

    H is a multiple of H_k (grouped queries). `scaling` defaults to D^-1/2. `mask` broadcasts to [B, H, R, N]:
    bool (True: may attend) or additive. Probabilities, or with `softmax=False` the scaled logits.
    """
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    grouped = query.float().reshape(batch, key.shape[1], groups * rows, width)
    with torch.autocast(query.device.type, enabled=False):  # half precision would change what is kept
        logits = (grouped * scaling) @ key.float().transpose(2, 3)
    logits = logits.reshape(batch, heads, rows, key.shape[2])
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            logits = logits + mask.float()
    return logits.softmax(-1) if softmax else logits


def column_sums(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    block: int = 64,
) -> Tensor:
    """Attention that each key receives from all queries: [B, H, L, D] and [B, H_k, N, D] → [B, H, N] in
    float32.

    Computed in blocks of `block` query rows, so memory is O(N · block) per head; `mask` [.., L, N] as in
    `attention_rows`.
    """
    total = query.new_zeros(*query.shape[:2], key.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], block):
        part = None
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., start : start + block, :]
        rows = attention_rows(query[:, :, start : start + block], key, scaling=scaling, mask=part)
        total += rows.sum(2)
    return total


def mask_rows(mask: Tensor | None, index: Tensor, length: int, past: int) -> Tensor:
    """Which keys the queries at `index` [B, R] may attend to, broadcastable to [B, H, R, past + length].

    `mask` is the attention module's argument: None (plain causal), [B, past + length] (True: real), or a
    4-D bool or additive mask whose rows are the `length` queries.
    """
    if mask is not None and mask.ndim == 4:
        rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        return mask.expand(index.shape[0], -1, -1, -1).gather(2, rows)
    columns = torch.arange(past + length, device=index.device)
    allowed = columns <= (index + past)[:, None, :, None]
    return allowed if mask is None else allowed & mask.bool()[:, None, None, :]


class Seen(Exception):
    """Raised by a probe to skip the attention itself."""


@contextmanager
def probing(probes: dict[nn.Module, Probe]) -> Iterator[None]:
    """While inside, the attention modules that are keys of `probes` report queries, keys, mask and
    scaling."""
    outer = _PROBES.get()
    token = _PROBES.set({**(outer or {}), **probes})
    try:
        yield
    finally:
        _PROBES.reset(token)


def watch(probes: dict[nn.Module, Probe] | None) -> dict[nn.Module, Probe] | None:
    """Set the probes of this thread of execution for later calls; returns those that were set
    before."""
    before = _PROBES.get()
    _PROBES.set(probes)
    return before


def change_attention(
    changes: dict[nn.Module, AttentionChange] | None,
) -> dict[nn.Module, AttentionChange] | None:
    """Make watched attention modules use the keys, values and masks that `changes` return for theirs, in this
    thread of execution and until the next call of this function; returns those that were set before."""
    before = _CHANGES.get()
    _CHANGES.set(changes)
    return before


@contextmanager
def on_rows(module: nn.Module, index: Tensor) -> Iterator[None]:
    """While inside, the watched attention `module` attends from its queries at `index` [B, R] only, whose
    places differ; the outputs of the others are zeros. For causal "sdpa" and "eager" attention."""
    token = _ROWS.set((module, index))
    try:
        yield
    finally:
        _ROWS.reset(token)


def _some_rows(function: Callable[..., Any], index: Tensor) -> Callable[..., Any]:
    def attention(module, query, key, value, mask, *args, **kwargs):
        length = query.shape[2]
        rows = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        mask = mask_rows(mask, index, length, key.shape[2] - length)
        output, weights = function(module, rows, key, value, mask, *args, **kwargs)
        whole = output.new_zeros(len(output), length, *output.shape[2:])
        whole = whole.scatter(1, index[:, :, None, None].expand_as(output), output)
        if weights is not None:
            full = weights.new_zeros(*weights.shape[:2], length, weights.shape[3])
            weights = full.scatter(2, index[:, None, :, None].expand_as(weights), weights)
        return whole, weights

    return attention


def watched(implementation: str) -> str:
    """The name of an attention implementation that computes as `implementation` and reports to probes.

    Registers it (and the same mask function under the same name: without it no mask would be built).
    """
    from .hosts import attention_function, register_attention

    if implementation.startswith(_PREFIX):
        return implementation
    # transformers would look for names with a slash on the hub.
    name = _PREFIX + re.sub(r"[/:|@]", "_", implementation)
    register_attention(name, _reporting(attention_function(implementation)), like=implementation)
    return name


def _reporting(stock: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        probes = _PROBES.get()
        if probes and (probe := probes.get(module)) is not None:
            probe(module, query, key, attention_mask, scaling)
        changes = _CHANGES.get()
        if changes and (change := changes.get(module)) is not None:
            key, value, attention_mask = change(query, key, value, attention_mask, scaling)
        # Each model file has an eager function of its own.
        function = stock or sys.modules[type(module).__module__].eager_attention_forward
        rows = _ROWS.get()
        if rows is not None and rows[0] is module:
            function = _some_rows(function, rows[1])
        return function(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)

    return attention
