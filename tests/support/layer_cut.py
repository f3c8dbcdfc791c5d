"""A layer reducer that needs no attention rows."""

from dataclasses import dataclass
from typing import ClassVar

from vistok.compress.reducer import LayerReducer


@dataclass(kw_only=True)
class Cut(LayerReducer):
    """Cuts before layer `k` by hidden states, whatever the attention implementation."""

    k: int = 1

    rows: ClassVar = None

    def cuts(self, num_layers):
        return {self.k: 0.5}

    def score(self, tokens):
        return tokens.hidden.sum(-1)
