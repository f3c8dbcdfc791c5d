"""PVC: preprocessing by hand, and the encoder written from the paper."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.compress.algorithms.pvc import pvc_frames, pvc_grid, pvc_tiles, still_video
from vistok.compress.streaming.pvc import PVCConfig, PVCEncoder, time_waves

CONFIG = dict(
    out_width=20, image_size=32, patch_size=4, width=24, depth=4, heads=3, hidden=32, adaptive_width=8
)


def encoder(temporal_blocks=2, **settings):
    """A tiny encoder in float64 whose temporal parts have an effect."""
    torch.manual_seed(0)
    model = PVCEncoder(PVCConfig(temporal_blocks, **(CONFIG | settings))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def clip(batch=2, frames=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 3, 32, 32, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [1, 5, 1], [6, 1]])
@pytest.mark.parametrize("window", [96, 3, 1])
def test_a_stream_in_pieces_equals_the_whole_clip(pieces, window):
    model, video, times = encoder(window=window), clip(), torch.arange(7.0)
    with torch.no_grad():
        whole, _ = model(video, times)
        state, parts = None, []
        for piece, when in zip(video.split(pieces, 1), times.split(pieces), strict=True):
            tokens, state = model(piece, when, state)
            parts.append(tokens)
    assert whole.shape == (2, 7, model.num_tokens, 20)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_frames_depend_on_earlier_frames_and_not_on_later_ones():
    model, video, times = encoder(), clip(1), torch.arange(7.0)
    changed = video.clone()
    changed[:, 3] += 1
    with torch.no_grad():
        before, after = model(video, times)[0], model(changed, times)[0]
    same = (before == after).flatten(2).all(-1)[0].tolist()
    assert same == [True] * 3 + [False] * 4


def test_the_window_bounds_what_a_frame_depends_on_and_the_memory():
    model, video, times = encoder(temporal_blocks=1, window=3), clip(1), torch.arange(7.0)
    changed = video.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        (before, state), (after, _) = model(video, times), model(changed, times)
        sizes = []
        for number in range(7):
            _, state = model(video[:, number : number + 1], times[number : number + 1], state)
            sizes.append(state.bytes())
    same = (before == after).flatten(2).all(-1)[0].tolist()
    assert same == [False] * 3 + [True] * 4
    assert len(set(sizes)) == 1
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in (*state.keys, *state.values))


def test_the_encoder_equals_the_papers_formulas_patch_by_patch():
    model, video, times = encoder(temporal_blocks=1), clip(1, 3), torch.tensor([0.0, 1.5, 4.0])
    with torch.no_grad():
        x = model.embeddings.patch_embedding(video[0]).flatten(2).transpose(1, 2)
        classes = model.embeddings.class_embedding.expand(3, -1, -1)
        x = torch.cat([classes, x], 1) + model.embeddings.position_embedding  # [T, N, C]
        for block in model.encoder.layers:
            x = x + block.ls1 * block.attn(block.norm1(x))
            if block.temporal is not None:
                x = x + plain_temporal(block.temporal, x, times)
            x = x + block.ls2 * block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        grid = x[:, 1:].unflatten(1, (8, 8))
        tokens = []
        for frame, time in zip(grid, times, strict=True):
            for row in range(2):
                for column in range(2):
                    square = frame[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
                    tokens.append(model.mlp(adaptive(model.norm, square, time)))
        expected = torch.stack(tokens).view(1, 3, 4, -1)
        torch.testing.assert_close(model(video, times)[0], expected, rtol=1e-10, atol=1e-10)


def adaptive(norm, x, time):
    """γ(z) ⊙ LN(x) + β(z) of one vector."""
    z = x + norm.time(time_waves(time[None])[0].double())
    centred = x - x.mean()
    return norm.gamma(z) * centred / (centred.square().mean() + 1e-6).sqrt() + norm.beta(z)


def plain_temporal(part, x, times):
    out = torch.zeros_like(x)
    for patch in range(x.shape[1]):
        rows = torch.stack([adaptive(part.norm, x[t, patch], times[t]) for t in range(len(times))])
        query, key, value = part.qkv(rows).chunk(3, -1)
        for t in range(len(times)):
            heads = []
            for h in range(3):
                one = slice(8 * h, 8 * h + 8)
                weights = (query[t, one] @ key[: t + 1, one].T / 8**0.5).softmax(0)
                heads.append(weights @ value[: t + 1, one])
            out[t, patch] = part.alpha * part.proj(torch.cat(heads))
    return out


def test_a_new_encoder_does_not_mix_frames_yet():
    torch.manual_seed(0)
    model = PVCEncoder(PVCConfig(2, **CONFIG)).double().eval()
    video, times = clip(1), torch.arange(7.0)
    with torch.no_grad():
        whole = model(video, times)[0]
        alone = torch.cat([model(video[:, n : n + 1], times[n : n + 1])[0] for n in range(7)], 1)
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-10)


def test_every_parameter_learns():
    model = encoder().float()
    tokens, _ = model(clip(1, 2).float(), torch.arange(2.0))
    tokens.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    tokens, state = encoder().to(dtype)(clip().to(dtype), torch.arange(7.0))
    assert tokens.dtype == dtype and bool(tokens.isfinite().all())
    assert state.keys[0].dtype == dtype


def test_blocks_have_the_keys_of_internvit():
    keys = set(encoder(0).state_dict())
    block = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"encoder.layers.3.{name}.{part}" for name in block for part in ("weight", "bias")}
    expected |= {"encoder.layers.3.ls1", "encoder.layers.3.ls2", "embeddings.class_embedding"}
    expected |= {"embeddings.patch_embedding.weight", "embeddings.position_embedding"}
    assert expected <= keys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal_blocks": 5}, "takes 0 to all 4 blocks"),
        ({"temporal_blocks": 1, "window": 0}, "window is 0"),
        ({"temporal_blocks": 1, "heads": 5}, "not a multiple of 5 heads"),
        ({"temporal_blocks": 1, "image_size": 36}, "not a multiple of 4 patches"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PVCConfig(**(CONFIG | settings))


def test_inputs_and_states_that_do_not_fit_are_refused():
    model, video, times = encoder(), clip(), torch.arange(7.0)
    with pytest.raises(ValueError, match="one number for each of the 7 frames"):
        model(video, times[:6])
    with pytest.raises(ValueError, match=r"takes \[B, T, 3, 32, 32\]"):
        model(video[..., :31], times)
    with pytest.raises(ValueError, match="at least one frame"):
        model(video[:, :0], times[:0])
    _, state = model(video, times)
    with pytest.raises(ValueError, match="start a new stream"):
        model(video[:1], times, state)
    with pytest.raises(ValueError, match="start a new stream"):
        encoder(temporal_blocks=1)(video, times, state)


# Preprocessing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 4, 12])
@pytest.mark.parametrize("size", [(640, 480), (448, 448), (1920, 1080), (50, 800), (897, 449), (1000, 1000)])
def test_the_grid_is_the_nearest_in_shape(size, limit):
    """By fractions: the least difference wins, of equal ones the larger if the picture is large."""
    ratio, best = Fraction(*size), None
    for area in range(1, limit + 1):
        for columns in range(1, area + 1):
            if area % columns == 0:
                rows = area // columns
                difference = abs(ratio - Fraction(columns, rows))
                is_large = size[0] * size[1] > Fraction(1, 2) * 448**2 * area
                if best is None or difference < best[0] or (difference == best[0] and is_large):
                    best = (difference, columns, rows)
    assert pvc_grid(*size, limit) == best[1:]


def test_tiles_are_parts_of_the_resized_picture_with_the_whole_at_the_end():
    noise = np.random.RandomState(0).randint(0, 256, (60, 90, 3)).astype(np.uint8)
    image = Image.fromarray(noise)
    tiles = pvc_tiles(image, max_tiles=6, side=32)
    assert tiles.shape == (7, 3, 32, 32)  # 3 columns, 2 rows
    mean, std = (np.array(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def values(picture):
        return (np.asarray(picture).transpose(2, 0, 1) / 255 - mean) / std

    canvas = image.resize((96, 64), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(tiles[4], values(canvas.crop((32, 32, 64, 64))), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tiles[6], values(image.resize((32, 32), Image.Resampling.BICUBIC)), atol=1e-5)
    assert len(pvc_tiles(image, max_tiles=1, side=32)) == 1
    video = still_video(tiles)
    assert video.shape == (7, 4, 3, 32, 32) and torch.equal(video[:, 3], tiles)


def test_frames_are_spread_evenly_and_short_videos_repeat_some():
    assert pvc_frames(9, 10.0, 3) == [1, 4, 7]
    assert pvc_frames(0, 25.0, 4) == [0, 0, 0, 0]
    bounded = pvc_frames(99, 10.0, 4, (2.0, 4.0))
    assert bounded == [22, 27, 32, 37]
    with pytest.raises(ValueError, match="bounds in seconds within the video"):
        pvc_frames(99, 10.0, 4, (20.0, 30.0))


def test_empty_pictures_are_refused():
    with pytest.raises(ValueError, match="give 1 or more"):
        pvc_grid(0, 4, 12)
