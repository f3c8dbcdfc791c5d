"""Keys and values of the rows that a causal transformer has read, so that no row is computed twice."""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Room for the keys and values of `capacity` rows in every layer, allocated once.

    Every layer appends the same rows in turn; `length` is the number of rows that all layers hold.
    """

    def __init__(
        self, layers: int, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is [B, heads, capacity, head dimension]."""
        self.keys = [torch.empty(*shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new rows [B, heads, R, d] of a layer; return all its keys and values so far."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
