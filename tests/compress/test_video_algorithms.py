"""Pure functions for videos, worked out by hand: counts, shares, splits and assembly."""

import math

import pytest
import torch
import torch.nn.functional as F

from vistok.compress.algorithms import langdc, quota, slowfast
from vistok.compress.algorithms.evs import evs_count, evs_scores
from vistok.compress.algorithms.vidcom2 import frame_shares, newline_order, stable_channels, vidcom2_count


def frames(count, tokens, width=4, seed=0):
    return torch.randn(count, tokens, width, generator=torch.Generator().manual_seed(seed))


# EVS and VidCom² --------------------------------------------------------------------------------------------


def test_counts_truncate_the_inexact_share():
    assert evs_count(10, 10, 1 - 0.9) == 10  # a whole frame, not 9
    assert evs_count(100, 1, 1 - 0.9) == 9
    assert vidcom2_count(10, 10, 1 - 0.9) == 10  # one per frame
    assert vidcom2_count(1, 100, 1 - 0.9) == 9


def test_rows_of_zeros_have_a_score():
    features = torch.zeros(2, 3, 4)
    features[1, 0] = 1
    assert evs_scores(features).tolist() == [[255.0] * 3, [1.0, 1.0, 1.0]]


def test_the_half_of_the_channels_that_varies_least_is_taken():
    features = frames(3, 5, 5) * torch.tensor([3.0, 0.1, 2.0, 0.2, 1.0])
    assert stable_channels(features).tolist() == [1, 3]
    assert stable_channels(features[..., :1]).tolist() == [0]


def test_shares_round_halves_to_even():
    shares = frame_shares(torch.ones(2, 5), 0.5)  # equal frames: 2.5 tokens each
    assert shares.scales.tolist() == [0.5, 0.5]
    assert shares.budgets.tolist() == [2, 2]
    assert frame_shares(torch.ones(3, 4), 0.01).budgets.tolist() == [1, 1, 1]


def test_newlines_follow_the_kept_tokens_of_their_frame():
    kept = torch.tensor([[True, False, False, True], [False, True, True, False]])
    assert newline_order(kept, 2).tolist() == [0, 4, 2, 5, 7, 9, 8, 11]
    with pytest.raises(ValueError, match="not rows of 3"):
        newline_order(kept, 3)


# QuoTA ------------------------------------------------------------------------------------------------------


def test_shapes_never_exceed_the_budget():
    for count in range(1, 400):
        height, width = quota.quota_shape(count)
        assert height * width <= count
        assert height - width in (0, 1)
        assert (height + 1) * width > count or height > width
        assert (math.isqrt(count) + 1) * (math.isqrt(count) + 1) > count


@pytest.mark.parametrize("version", quota.VERSIONS)
def test_frames_are_resized_to_their_shares(version):
    features, scores = frames(3, 36), torch.tensor([0.9, 0.05, 0.5])
    resized = quota.quota_frames(features, scores, 40, version)
    tokens = 9 if version == "v4" else 36
    weights = quota.frame_weights(scores, tokens, 40, version != "v1")
    counts = [count for weight in weights.tolist() if (count := int(40 * weight))]
    assert len(resized) == len(counts) == 2  # the second frame gets less than a token
    for frame, count in zip(resized, counts, strict=True):
        if version in ("v3", "v4"):
            assert frame.shape == (count, 4)
        else:
            assert frame.shape == (*quota.quota_shape(count), 4)


def test_a_frame_at_its_own_size_stays():
    frame = frames(1, 16)[0].view(4, 4, 4)
    for resize in (quota.bilinear, quota.adaptive, quota.merged_by_axis):
        assert torch.allclose(resize(frame, 16), frame)
    for resize in (quota.evenly_spaced, quota.merged):
        assert torch.equal(resize(frame, 16), frame.flatten(0, 1))


def test_merging_takes_means_of_the_most_similar_pair():
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]])
    assert quota.merge_down(tokens, 3).tolist() == [[[0.0, 1.0], [2.0, 0.0], [-1.0, 1.0]]]


def test_bad_input_of_quota_is_refused():
    with pytest.raises(ValueError, match="it takes v1"):
        quota.quota_frames(frames(2, 9), torch.ones(2), 9, "v6")
    with pytest.raises(ValueError, match="2 frames take one number each"):
        quota.quota_frames(frames(2, 9), torch.ones(3), 9)
    with pytest.raises(ValueError, match="not a square map"):
        quota.quota_frames(frames(2, 8), torch.ones(2), 9)


# Slow and fast tokens ---------------------------------------------------------------------------------------


def test_windows_of_frames_are_averaged_and_the_rest_left_out():
    features = frames(7, 4)
    fast = slowfast.fast_tokens(features, temporal_stride=3, min_frames=2)
    assert torch.allclose(fast, torch.cat([features[:3].mean(0), features[3:6].mean(0)]))


def test_few_windows_become_adaptive_means():
    features = frames(5, 4)
    fast = slowfast.fast_tokens(features, temporal_stride=4, min_frames=2)
    assert torch.allclose(fast, torch.cat([features[:3].mean(0), features[2:].mean(0)]))
    assert torch.allclose(slowfast.fast_tokens(features, temporal_stride=4), features.flatten(0, 1))


def test_sampling_steps_evenly_and_keeps_the_minimum():
    assert slowfast.sampled_frames(7, 2, 3).tolist() == [0, 2, 4]
    assert slowfast.sampled_frames(7, 2, 5).tolist() == [0, 1, 2, 4, 5]
    assert slowfast.sampled_frames(4, 2, 5).tolist() == [0, 1, 2, 3]


def test_a_picture_is_pooled_in_space_alone():
    features = frames(1, 25)
    fast = slowfast.fast_tokens(features, sampling_stride=2, temporal_stride=4, spatial_stride=2)
    corner = features[0].view(5, 5, 4)[:2, :2].mean((0, 1))
    assert fast.shape == (4, 4)  # the fifth row and column fill no block
    assert torch.allclose(fast[0], corner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal_stride": 0}, "temporal_stride is 0"),
        ({"min_frames": 0}, "min_frames is 0"),
        ({"spatial_stride": 4}, "3 x 3 tokens"),
    ],
)
def test_bad_strides_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        slowfast.fast_tokens(frames(4, 9), **settings)
    with pytest.raises(ValueError, match="not a square map"):
        slowfast.fast_tokens(frames(4, 8), spatial_stride=2)


# LangDC -----------------------------------------------------------------------------------------------------


def test_image_tokens_stand_before_video_tokens():
    image, video = frames(2, 144), frames(2, 64, seed=1)
    base = langdc.base_tokens(image, video)
    first = F.avg_pool2d(image[0].view(12, 12, 4).movedim(-1, 0), 2).flatten(1).T
    last = F.avg_pool2d(video[1].view(8, 8, 4).movedim(-1, 0), 2).flatten(1).T
    assert base.shape == (2 * 36 + 2 * 16, 4)
    assert torch.allclose(base[:36], first)
    assert torch.allclose(base[-16:], last)
    clips = langdc.caption_inputs(image, video, 1)
    assert torch.equal(clips[1], torch.cat([image[1], video[1]]))


def test_captions_end_at_their_mark_and_lose_a_step_without_one():
    states, end = frames(3, 4), langdc.END_OF_CAPTION
    ids = torch.tensor([[5, 6, end, end], [5, 6, 7, 8], [end, 6, end, 8]])
    expected = torch.cat([states[0, :2], states[1, :3]])
    assert torch.equal(langdc.cut_captions(states, ids), expected)
    tokens, is_attended = langdc.padded_captions(states, ids)
    assert torch.equal(tokens, states.flatten(0, 1))
    assert is_attended.tolist() == [True, True, False, False] + [True] * 4 + [False, True, False, True]


def test_the_last_place_of_every_step_stands_for_a_token():
    steps = [[frames(2, 5, seed=1), frames(2, 5, seed=2)], [frames(2, 1, seed=3), frames(2, 1, seed=4)]]
    states = langdc.caption_states(steps, -1)
    assert torch.equal(states, torch.stack([steps[0][1][:, 4], steps[1][1][:, 0]], 1))


def test_one_run_of_placeholders_is_replaced():
    text, visual = frames(1, 5)[0], frames(1, 3, seed=1)[0]
    sequence = langdc.spliced(text, torch.tensor([1, -200, -200, 2, 3]), -200, visual)
    assert torch.equal(sequence, torch.cat([text[:1], visual, text[3:]]))
    for ids in ([1, 2, 3, 4, 5], [-200, 2, -200, 4, 5]):
        with pytest.raises(ValueError, match="give one run"):
            langdc.spliced(text, torch.tensor(ids), -200, visual)
