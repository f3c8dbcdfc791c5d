"""What a stream holds, and a report on it."""

from dataclasses import dataclass, field

from torch import Tensor

from .cacher import CacherState
from .kept import KeptTokens
from .pruner import PrunerState


@dataclass(frozen=True)
class StreamState:
    """A stream behind its last chunk: `processed` frames are part of it, and `pending` pixel values
    [p, 3, S, S] wait for their chunk to be full. It is replaced as a whole, so that an interrupt never
    leaves half of a chunk."""

    kept: KeptTokens
    processed: int = 0
    cacher: CacherState = field(default_factory=CacherState)
    pruner: PrunerState = field(default_factory=PrunerState)
    pending: Tensor | None = None

    @property
    def waiting(self) -> int:
        """How many frames wait for their chunk to be full."""
        return 0 if self.pending is None else len(self.pending)

    def bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [self.pruner.memory, self.pruner.channels, self.pending]
        for reference in self.cacher.references:
            tensors += [reference.keys, reference.values, reference.attention, reference.mlp]
        return self.kept.bytes() + sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class StreamReport:
    """A stream so far: `frames` that came, of which `held` have tokens left, `tokens` held of the
    `tokens_full` that these frames had in all, `bytes` of memory, and the operations of the tower's layers
    (two per multiply-add, counted and not measured), `flops_full` without reuse. Waiting frames are left out
    but for `frames` and `bytes`."""

    frames: int
    held: int
    tokens: int
    tokens_full: int
    bytes: int
    flops: int
    flops_full: int
