"""STC's pruner: the tokens of each frame that differ most from their frame and from the stream so far."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algorithms import stc


@dataclass(frozen=True)
class PrunerState:
    """The mean [C] of the chunks' mean tokens, the number of these chunks, and the channels int64 [C] that
    the mean is of."""

    chunks: int = 0
    memory: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class PrunedChunk:
    """What stays of a chunk: `index` int64 [F, n] ascending within each frame, the `scores` [F, T] of all
    tokens (low: novel), and the state for the next chunk."""

    index: Tensor
    scores: Tensor
    state: PrunerState


def prune_chunk(
    features: Tensor, state: PrunerState, count: int, *, fixed_channels: bool = False
) -> PrunedChunk:
    """Choose the `count` most novel tokens of each frame of features [F, T, D].

    The memory is the mean over chunks of the mean token, this chunk included; a running mean has the values
    of a list in constant space. The published code takes the half of the channels that varies least anew in
    each chunk, so that its memory averages channels that differ from chunk to chunk (the default, for
    parity). `fixed_channels` keeps those of the first chunk. Half precision is computed in float32. The
    state is not changed; the result holds the next one.
    """
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    channels = state.channels
    if channels is None or not fixed_channels:
        channels = stc.stable_half(exact)
    exact = exact[..., channels]
    mean, chunks = exact.mean((0, 1)), state.chunks + 1
    memory = mean if state.memory is None else state.memory + (mean - state.memory) / chunks
    scores = stc.novelty_scores(exact, memory)
    following = replace(state, chunks=chunks, memory=memory, channels=channels)
    return PrunedChunk(stc.most_novel(scores, count), scores, following)
