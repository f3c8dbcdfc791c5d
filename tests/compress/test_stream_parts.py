"""STC's cacher, pruner and bound on tokens against plain loops."""

import math
import random

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from vistok.compress.algorithms import stc
from vistok.compress.streaming.cacher import CacherState, encode_chunk
from vistok.compress.streaming.kept import KeptFrame, KeptTokens
from vistok.compress.streaming.pruner import PrunerState, prune_chunk

WIDTH, HEADS, TOKENS = 24, 3, 10


def tower_layers(kind, count=2):
    config = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}[kind](
        hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=40
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    layer = {"siglip": SiglipEncoderLayer, "clip": CLIPEncoderLayer}[kind]
    layers = torch.nn.ModuleList(layer(config) for _ in range(count)).double().eval()
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layers


def drifting(count, seed=0):
    """Frames of which all tokens change a little from one to the next, and some more."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64).repeat(count, 1, 1)
    steps = torch.randn(frames.shape, generator=generator, dtype=torch.float64)
    moves = torch.rand(count, TOKENS, 1, generator=generator) < 0.3
    return frames + (steps * (0.02 + moves)).cumsum(0)


@torch.no_grad()
def plain(layers, frame, references, count):
    """A frame [T, C] behind the layers, token by token: in full without references, else by STC's rule."""
    made = []
    for number, layer in enumerate(layers):
        a = layer.layer_norm1(frame)
        parts = layer.self_attn
        query, key, value = parts.q_proj(a), parts.k_proj(a), parts.v_proj(a)
        if references is None:
            renewed = range(TOKENS)
        else:
            old_key, old_value, old_attention, old_mlp = references[number]
            cosine = [float(k @ o / (k.norm() * o.norm())) for k, o in zip(key, old_key, strict=True)]
            renewed = sorted(range(TOKENS), key=lambda token: cosine[token])[:count]
            value = torch.stack([value[t] if t in renewed else old_value[t] for t in range(TOKENS)])
        heads, size = (
            [slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS) for h in range(HEADS)],
            WIDTH // HEADS,
        )
        attention, mlp, out = [], [], []
        for token in range(TOKENS):
            if token in renewed:
                rows = [
                    (query[token, h] @ key[:, h].T / math.sqrt(size)).softmax(0) @ value[:, h] for h in heads
                ]
                attention.append(parts.out_proj(torch.cat(rows)))
            else:
                attention.append(old_attention[token])
            middle = frame[token] + attention[-1]
            mlp.append(layer.mlp(layer.layer_norm2(middle)) if token in renewed else old_mlp[token])
            out.append(middle + mlp[-1])
        frame = torch.stack(out)
        made.append((key, value, torch.stack(attention), torch.stack(mlp)))
    return frame, made


@torch.no_grad()
def in_chunks(layers, frames, sizes, **settings):
    state, outputs, results = CacherState(), [], []
    for chunk in frames.split(sizes):
        results.append(encode_chunk(layers, chunk, state, **settings))
        state = results[-1].state
        outputs.append(results[-1].hidden_states[-1])
    return torch.cat(outputs), results


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize(("sizes", "interval"), [([1] * 6, 2), ([2, 3, 1], 2), ([1] * 6, 3), ([2, 2, 2], 1)])
def test_chunks_equal_a_plain_loop_over_tokens(kind, sizes, interval):
    layers, frames = tower_layers(kind), drifting(6)
    result, _ = in_chunks(layers, frames, sizes, interval=interval, update_ratio=0.35)
    expected, references, start = [], None, 0
    for number, size in enumerate(sizes):
        is_full = number % interval == 0
        for frame in frames[start : start + size]:
            out, made = plain(layers, frame, None if is_full else references, 3)
            expected.append(out)
        references = made if is_full else references
        start += size
    torch.testing.assert_close(result, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_full_chunks_equal_the_layers_themselves(kind):
    layers, frames = tower_layers(kind), drifting(4)
    x = frames
    with torch.no_grad():
        for layer in layers:
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out
    result, _ = in_chunks(layers, frames, [1] * 4, interval=1)
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)


def test_renewing_every_token_equals_the_full_computation():
    layers, frames = tower_layers("siglip"), drifting(4)
    partial, results = in_chunks(layers, frames, [1] * 4, interval=4, update_ratio=1.0)
    full, _ = in_chunks(layers, frames, [1] * 4, interval=1)
    torch.testing.assert_close(partial, full, rtol=1e-9, atol=1e-9)
    assert torch.equal(results[1].recomputed[0], torch.arange(TOKENS)[None])


def test_an_unchanged_frame_has_the_features_of_its_reference():
    layers, frames = tower_layers("siglip"), drifting(1).repeat(2, 1, 1)
    result, _ = in_chunks(layers, frames, [1, 1], interval=2, update_ratio=0.1)
    torch.testing.assert_close(result[1], result[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("before", [1, 2])
def test_trailing_frames_run_as_the_chunk_before_them(before):
    layers, frames = tower_layers("siglip"), drifting(4)
    settings = {"interval": 2, "update_ratio": 0.35}
    state = CacherState()
    with torch.no_grad():
        for frame in frames[:before].split(1):
            state = encode_chunk(layers, frame, state, **settings).state
        rest = encode_chunk(layers, frames[before:], state, trailing=True, **settings)
    assert bool(rest.recomputed) == (before == 2)  # chunk 0 is full, chunk 1 is not
    assert rest.state.chunks == before
    first = encode_chunk(layers, frames, CacherState(), trailing=True, **settings)
    assert not first.recomputed  # frames that come before any chunk are computed in full


def test_changed_tokens_are_the_least_similar_and_of_equal_ones_the_first():
    reference = torch.eye(4)
    keys = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0), 3 * torch.eye(4)])
    keys[2, 1] = -keys[2, 1]
    assert stc.changed_tokens(keys, reference, 2).tolist() == [[0, 1], [0, 1], [0, 1]]
    assert stc.changed_tokens(keys, reference, 1).tolist() == [[0], [0], [1]]


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"),
    [(729, 0.25, 182), (49, 0.3, 14), (4, 0.1, 1), (4, 1.0, 4), (577, 0.25, 144)],
)
def test_the_share_of_recomputed_tokens_is_truncated(tokens, ratio, count):
    assert stc.update_count(tokens, ratio) == count


# Pruner -----------------------------------------------------------------------------------------------------


def plain_prune(chunk, entries, count, channels=None):
    """Scores and kept tokens by the definition, in float64, with a list of all entries of the memory."""
    chunk = chunk.astype(np.float64)
    frames, tokens, width = chunk.shape
    if channels is None:
        channels = np.argsort(chunk.reshape(-1, width).var(0), kind="stable")[: width // 2]
    part = chunk[..., channels]
    entries.append(part.mean((0, 1)))
    memory = np.mean(entries, 0)
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    scores = np.zeros((frames, tokens))
    for f in range(frames):
        rows = np.stack([unit(row) for row in part[f]])
        for t in range(tokens):
            for centre in (rows.mean(0), unit(memory)):
                square = ((rows[t] - centre) ** 2).sum()
                scores[f, t] += sum(math.exp(-square / (2 * 2.0**k)) for k in range(-3, 2))
    kept = [sorted(sorted(range(tokens), key=lambda t: row[t])[:count]) for row in scores]
    return channels, memory, scores, kept


def chunks_of_features(count, width=8):
    generator = np.random.RandomState(3)
    shared = generator.standard_normal((6, width))
    for _ in range(count):
        noise = generator.standard_normal((generator.randint(1, 4), 6, width))
        yield ((shared + noise) * np.linspace(0.4, 1.6, width)[generator.permutation(width)]).astype(
            np.float32
        )


@pytest.mark.parametrize("fixed", [False, True])
def test_pruning_equals_the_definition_with_a_list_of_all_chunks(fixed):
    state, entries, first = PrunerState(), [], None
    for chunk in chunks_of_features(40):
        channels, memory, scores, kept = plain_prune(chunk, entries, 2, first if fixed else None)
        first = channels if first is None else first
        pruned = prune_chunk(torch.from_numpy(chunk), state, 2, fixed_channels=fixed)
        state = pruned.state
        assert state.channels.tolist() == channels.tolist()
        np.testing.assert_allclose(state.memory.numpy(), memory, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(pruned.scores.numpy(), scores, rtol=1e-5)
        assert pruned.index.tolist() == kept


def test_channels_change_from_chunk_to_chunk_unless_they_are_fixed():
    chosen = {fixed: set() for fixed in (False, True)}
    for fixed, channels in chosen.items():
        state = PrunerState()
        for chunk in chunks_of_features(10):
            state = prune_chunk(torch.from_numpy(chunk), state, 2, fixed_channels=fixed).state
            channels.add(tuple(state.channels.tolist()))
    assert len(chosen[True]) == 1 < len(chosen[False])


def test_a_token_unlike_all_others_is_kept():
    features = torch.arange(8.0) + 0.01 * torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    features[0, 4] = features[0, 4].flip(0)
    assert prune_chunk(features, PrunerState(), 1).index.tolist() == [[4]]


def test_half_precision_is_scored_in_single():
    (chunk,) = chunks_of_features(1)
    half = torch.from_numpy(chunk).bfloat16()
    expected = prune_chunk(half.float(), PrunerState(), 2)
    pruned = prune_chunk(half, PrunerState(), 2)
    assert pruned.scores.dtype == torch.float32 and torch.equal(pruned.scores, expected.scores)


# The bound on tokens ----------------------------------------------------------------------------------------


def frame(number, count, source):
    index = torch.arange(count)
    scores = torch.tensor([source.random() for _ in range(count)])
    return KeptFrame(number, scores[:, None].clone(), index, scores)


def plain_bound(frames, limit, least):
    """Frames as lists of (score, place), after the stated rule has acted until the limit holds."""
    while sum(map(len, frames.values())) > limit:
        *older, newest = frames
        wide = [number for number in older if len(frames[number]) > least]
        number = wide[0] if wide else (older[0] if older else newest)
        frames[number].remove(max(frames[number]))
        if not frames[number]:
            del frames[number]


@pytest.mark.parametrize(("limit", "least"), [(20, 2), (20, 4), (7, 3), (5, 1), (4, 4)])
def test_the_oldest_frames_are_thinned_and_then_leave(limit, least):
    source, kept, expected = random.Random(0), KeptTokens(limit, least), {}
    for number in range(40):
        new = frame(number, 4, source)
        kept.add(new)
        expected[number] = [(float(score), place) for place, score in enumerate(new.scores)]
        plain_bound(expected, limit, least)
        held = {each.number: each.index.tolist() for each in kept.frames}
        assert held == {n: sorted(place for _, place in tokens) for n, tokens in expected.items()}
        assert kept.total == sum(map(len, held.values())) <= limit
    assert torch.equal(kept.features()[:, 0], torch.cat([each.scores for each in kept.frames]))


def test_memory_of_dropped_tokens_is_released():
    source, kept = random.Random(0), KeptTokens(20, 2)
    for number in range(30):
        kept.add(frame(number, 4, source))
    for each in kept.frames:
        for tensor in (each.features, each.index, each.scores):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
