"""Attention masks of shortened sequences."""

from typing import Any

import torch
from torch import Tensor

from .hosts.families import Host
from .hosts.versions import causal_mask
from .layout import Layout


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


def build(host: Host, i: int, hidden: Tensor, real: Tensor | None, cache: Any) -> Tensor | None:
    """The causal mask of layer i for new states [B, q, D] on top of its own cache entries, in the form
    that the attention implementation takes; `real` [B, entries + q], None where all are."""
    kernel = host.lm.config._attn_implementation.removeprefix("vistok_")
    if real is not None and hidden.shape[1] == 1 and host.layer_type(i) == "full_attention":
        # One query may look at everything real. Asking whether anything is masked would wait for a GPU.
        if kernel == "sdpa":
            return real[:, None, None]
        if kernel == "eager":
            mask = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device)
            return mask.masked_fill(~real.to(mask.device), torch.finfo(hidden.dtype).min)[:, None, None]
    return causal_mask(host.layer_type(i), host.lm.config, hidden, real, cache, i)
