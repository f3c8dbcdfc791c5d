"""Batches of the size that suits a CPU's cache."""

from collections.abc import Callable

import torch
from torch import Tensor

PIXELS = 2**16


def in_chunks(run: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
    """`run(x)` for x [B, …] whose rows are or become images of that many `pixels`.

    On a CPU without gradients it takes as many rows at a time as have 2^16 pixels: they fit the cache better
    than a large batch does, and only their activations are held.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return run(x)
    rows = max(1, PIXELS // pixels)
    return torch.cat([run(part) for part in x.split(rows)]) if len(x) > rows else run(x)
