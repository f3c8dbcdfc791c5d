"""Attention masks of shortened sequences."""

from typing import Any

import torch
from torch import Tensor

from ..families import Host
from ..hosts import causal_mask, release, visible_entries
from ..layout import Layout


def shrunk(mask: Tensor, layout: Layout, valid: Tensor, entries: int) -> Tensor:
    """Rows and columns of a 4-D mask [B, 1, L, entries + L] that remain; columns that are not real are
    masked."""
    batch, index = len(layout.index), layout.index.to(mask.device)
    rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    mask = mask.expand(batch, -1, -1, -1).gather(2, rows)
    past = torch.arange(entries, device=index.device).expand(batch, -1)
    columns = torch.cat([past, index + entries], 1)[:, None, None].expand(
        -1, mask.shape[1], mask.shape[2], -1
    )
    mask = mask.gather(3, columns)
    hidden = ~valid.to(mask.device)[:, None, None]
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def slide(full: Tensor, window: int) -> Tensor:
    """The part of a full mask within a window, counted in tokens that are left."""
    rows = torch.arange(full.shape[2], device=full.device) + full.shape[3] - full.shape[2]
    near = torch.arange(full.shape[3], device=full.device) > rows[:, None] - window
    return full & near if full.dtype == torch.bool else full.masked_fill(~near, torch.finfo(full.dtype).min)


def check(host: Host, i: int, mask: Any, valid: Tensor) -> None:
    """Compare the mask that the host gives to layer i of a prompt, `valid` [B, L], with the kind of attention
    that its masks are taken for: what the last real token may attend to.

    Raises RuntimeError naming host, release and layer when they differ. Kernels other than sdpa and eager
    are not checked.
    """
    if host.kernel not in ("sdpa", "eager") or (mask is not None and getattr(mask, "ndim", 0) != 4):
        return
    kind, length = host.layer_type(i), valid.shape[1]
    places = torch.arange(length, device=valid.device)
    last = (valid * places).amax(1, keepdim=True)  # [B, 1]
    expected = valid & (places <= last)
    if kind == "sliding_attention":
        expected &= places > last - host.window(i)
    elif kind != "full_attention":
        return
    if mask is None:
        allowed = places <= last  # the kernel's own causal mask
    else:
        rows = mask.expand(len(valid), -1, -1, -1)[:, 0]
        rows = rows.gather(1, last[..., None].to(mask.device).expand(-1, 1, rows.shape[-1]))[:, 0]
        allowed = (rows if mask.dtype == torch.bool else rows == 0).to(valid.device)
    if not torch.equal(allowed, expected):
        raise RuntimeError(
            f"the mask that {host.name} gives to layer {i} is not that of {kind.replace('_', ' ')}, for "
            f"which its configuration is read ({release()}); a reducer cannot make masks of its kind"
        )


def windowed(host: Host, i: int, hidden: Tensor, real: Tensor, numbers: Tensor, cache: Any) -> Tensor:
    """The mask of layer i, whose window counts places that its entries had before some were evicted.

    `hidden` [B, q, D] are the new states, `real` [B, entries + q] marks entries that are not padding, and
    `numbers` [B, entries + q] are their places. Raises NotImplementedError for kernels that take no mask of
    several queries.
    """
    new = hidden.shape[1]
    queries = numbers[:, -new:, None]
    allowed = (numbers[:, None] <= queries) & (numbers[:, None] > queries - host.window(i)) & real[:, None]
    allowed = allowed[..., -visible_entries(cache, i, new) :].to(hidden.device)
    if host.kernel == "sdpa":
        return allowed[:, None]
    if host.kernel == "eager":
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        return mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[:, None]
    if new == 1:
        return allowed[:, 0].long()
    raise NotImplementedError(
        f"{host.kernel} takes no mask for {new} new tokens on a cache of windows that a reducer has "
        "shortened; load the model with attn_implementation='sdpa'"
    )


def build(host: Host, i: int, hidden: Tensor, real: Tensor | None, cache: Any) -> Tensor | None:
    """The causal mask of layer i for new states [B, q, D] on top of its own cache entries, in the form
    that the attention implementation takes; `real` [B, entries + q], None where all are."""
    kernel = host.kernel
    if real is not None and hidden.shape[1] == 1 and host.layer_type(i) == "full_attention":
        # One query may attend to everything real. Checking whether anything is masked would wait for a GPU.
        if kernel == "sdpa":
            return real[:, None, None]
        if kernel == "eager":
            mask = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device)
            return mask.masked_fill(~real.to(mask.device), torch.finfo(hidden.dtype).min)[:, None, None]
    return causal_mask(host.layer_type(i), host.lm.config, hidden, real, cache, i)
