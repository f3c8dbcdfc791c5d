"""STC's cacher: the layers of a CLIP or SigLIP tower, which compute only what changed since a whole frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithms import stc


@dataclass(frozen=True)
class LayerReference:
    """What a layer computed for the last frame of the last full chunk, each [T, C]: keys and values before
    they are divided into heads, the attention's output and the MLP's output."""

    keys: Tensor
    values: Tensor
    attention: Tensor
    mlp: Tensor


@dataclass(frozen=True)
class CacherState:
    """The number of chunks so far, and the reference of each layer (none before the first chunk)."""

    chunks: int = 0
    references: tuple[LayerReference, ...] = ()


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk behind the layers: `hidden_states` [F, T, C] before the first layer and behind each one,
    `recomputed` int64 [F, n] per layer (none for a full chunk), and the state for the next chunk."""

    hidden_states: list[Tensor]
    recomputed: list[Tensor]
    state: CacherState


def encode_chunk(
    layers: Sequence[nn.Module],
    hidden: Tensor,
    state: CacherState,
    *,
    interval: int = 2,
    update_ratio: float = 0.25,
    trailing: bool = False,
) -> EncodedChunk:
    """Run a chunk of frames [F, T, C] through pre-norm layers of transformers (CLIP's and SigLIP's).

    Every `interval`-th chunk, from the first, is computed in full, and its last frame becomes the reference.
    In the frames of others each layer computes keys of all tokens, and queries, values, attention and MLP
    of the share `update_ratio` whose keys are least like those of the reference; the rest is the
    reference's. `trailing` marks frames that fill no chunk: they have the number of the chunk before them,
    so that they are computed as it was. `interval=1` computes everything.

    The state is not changed; the result holds the next one.
    """
    number = max(state.chunks - 1, 0) if trailing else state.chunks
    following = number + 1
    states, recomputed = [hidden], []
    if stc.is_full(number, interval):
        references = []
        for layer in layers:
            hidden, reference = _full(layer, hidden)
            states.append(hidden)
            references.append(reference)
        return EncodedChunk(states, recomputed, CacherState(following, tuple(references)))
    count = stc.update_count(hidden.shape[1], update_ratio)
    for layer, reference in zip(layers, state.references, strict=True):
        hidden, index = _partial(layer, hidden, reference, count)
        states.append(hidden)
        recomputed.append(index)
    return EncodedChunk(states, recomputed, CacherState(following, state.references))


def _full(layer: nn.Module, x: Tensor) -> tuple[Tensor, LayerReference]:
    parts, a = layer.self_attn, layer.layer_norm1(x)
    keys, values = parts.k_proj(a), parts.v_proj(a)
    attention = parts.out_proj(_attend(parts.q_proj(a), keys, values, parts.num_heads))
    x = x + attention
    mlp = layer.mlp(layer.layer_norm2(x))
    # Clones, which do not hold the other frames of the chunk in memory.
    return x + mlp, LayerReference(*(part[-1].clone() for part in (keys, values, attention, mlp)))


def _partial(layer: nn.Module, x: Tensor, reference: LayerReference, count: int) -> tuple[Tensor, Tensor]:
    parts, a = layer.self_attn, layer.layer_norm1(x)
    keys = parts.k_proj(a)
    index = stc.changed_tokens(keys, reference.keys, count)
    changed = _rows(a, index)
    values = stc.with_rows(reference.values, index, parts.v_proj(changed))
    rows = parts.out_proj(_attend(parts.q_proj(changed), keys, values, parts.num_heads))
    x = x + stc.with_rows(reference.attention, index, rows)
    rows = layer.mlp(layer.layer_norm2(_rows(x, index)))
    return x + stc.with_rows(reference.mlp, index, rows), index


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [F, n, C] of x [F, T, C] at index [F, n]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    split = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (queries, keys, values))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def reference_tensors(state: CacherState) -> Tensor:
    """The references of a state as one tensor [layers, 4, T, C]; of shape [0] where there are none."""
    if not state.references:
        return torch.zeros(0)
    layers = [torch.stack([r.keys, r.values, r.attention, r.mlp]) for r in state.references]
    return torch.stack(layers)


def references_of(tensors: Tensor) -> tuple[LayerReference, ...]:
    """The references in a tensor of `reference_tensors`."""
    return tuple(LayerReference(*(part.clone() for part in layer)) for layer in tensors)
