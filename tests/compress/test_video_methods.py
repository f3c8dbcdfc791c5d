"""Videos: how their frames lie in each family, the methods that compare frames, and budgets per frame."""

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
import reducer_matrix as matrix
import torch
import torch.nn.functional as F
from oracles import BEFORE_5_18, kept_tokens, shortened_generate, shortened_logits
from tiny_vlms import picture, tiny_vlm

from vistok import compress
from vistok.compress import EVS, DivPrune, FasterVLM, QuoTA, Random, ToMe, VidCom2, VisionZip
from vistok.compress.algorithms.evs import MediumSites, evs_positions
from vistok.compress.algorithms.grid import Grid
from vistok.compress.algorithms.quota import quota_capped, quota_weights
from vistok.compress.families import FAMILIES as FAMILY_TABLE
from vistok.compress.families import Record
from vistok.compress.reducer import Image, Stage
from vistok.compress.registry import reducers

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "internvl"]
MIXED = {"images": (1, 0), "videos": (1, 2)}
ONE_EACH = {"images": (1, 0), "videos": (0, 1)}
FRAMES = 4  # of every video of the fixtures; Qwen's towers join two to one
FEATURES = [name for name, kind in reducers().items() if kind.stage is Stage.FEATURES]
SETTINGS = {"max_new_tokens": 3, "do_sample": False}


@cache
def fixture(name):
    if BEFORE_5_18 and name in ("llava_onevision", "llava_next_video"):
        pytest.skip("features of a video come frame by frame")
    return tiny_vlm(name)


def attach(name, model, reducer, which, **options):
    """A session that takes the frames of InternVL's videos, which enter as pictures, as videos."""
    session = compress.attach(model, reducer, **options)
    if name == "internvl":
        images, videos = which.get("images", ()), which.get("videos", ())
        rows = itertools.zip_longest(images, videos, fillvalue=0)
        session.media_sizes = [size for i, v in rows for size in [1] * i + [FRAMES] * v]
    return session


def watched(reducer):
    """The reducer, and a list that gets each image and selection."""
    calls, reduce = [], reducer.reduce

    def watch(image, budget):
        calls.append((image, reduce(image, budget)))
        return calls[-1][1]

    reducer.reduce = watch
    return reducer, calls


# Layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_of_a_video_divides_it_into_frames(name):
    model, _, inputs = fixture(name)
    frames = FRAMES // 2 if name.startswith("qwen") else FRAMES
    with attach(name, model, Random(), MIXED, keep=0.5) as session, torch.no_grad():
        model(**inputs(**MIXED))
        spans = session._hooks.last.prompt.spans
    grids = [span.grid for span in spans]
    assert [grid is not None and grid.video for grid in grids] == [False, True, True, True]
    for span in spans[1:]:
        assert span.grid.cols == frames
        assert span.grid.num_tokens == len(span.places)
        counts = span.grid.tile.bincount(minlength=frames) if not span.grid.separators.any() else None
        assert counts is None or len(counts.unique()) == 1
        assert int(span.grid.separators.sum()) == (name == "llava_onevision")


@pytest.mark.parametrize(
    ("family", "side", "newlines"), [("llava_onevision", 3, 1), ("llava_next_video", 2, 0)]
)
def test_frames_of_odd_side_are_rounded_as_the_model_does(family, side, newlines):
    vision = SimpleNamespace(image_size=70, patch_size=14)  # 5 x 5 patches
    host = SimpleNamespace(config=SimpleNamespace(vision_config=vision, spatial_pool_stride=2))
    length = 4 * side * side + newlines
    grid, none = FAMILY_TABLE[family].grids(host, Record("video", [length, 1]))
    assert (grid.cols, grid.height, grid.width, grid.num_tokens) == (4, side, side, length)
    assert none is None


def test_a_video_shows_which_part_of_a_frame_each_token_is():
    model, _, inputs = fixture("qwen2_vl")
    with compress.attach(model, EVS(q=0.0)) as session, torch.no_grad():
        model(**inputs(videos=(1,)))
        (explanation,) = session.explain()
    boxes = explanation.boxes.view(2, -1, 4)
    assert torch.equal(boxes[0], boxes[1])
    assert boxes.min() == 0 and boxes.max() == 1
    with pytest.raises(ValueError, match="video of 2 frames"):
        explanation.overlay(picture(0))


# Methods that compare frames --------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", matrix.DECODING)
@pytest.mark.parametrize("method", [EVS, VidCom2])
@pytest.mark.parametrize("name", FAMILIES)
def test_video_methods_keep_positions_and_all_answers(name, method, decoding):
    """Mixed prompts equal the model run by hand on the kept tokens at their own positions, bit by bit."""
    if BEFORE_5_18 and name == "internvl" and decoding == "beams":
        pytest.skip("pictures are mixed up under beams")
    model, _, inputs = fixture(name)
    prompt, ways = inputs(**MIXED), matrix.DECODING[decoding]
    before, state = matrix.outputs(model, prompt, **ways), matrix.fingerprint(model)
    with attach(name, model, method(), MIXED, keep=1.0):
        everything = matrix.outputs(model, prompt, **ways)
    with attach(name, model, method(), MIXED) as session:
        with torch.no_grad():
            logits = model(**prompt).logits
        rows = matrix.kept_rows(session, 2)
        report = session.report()
        _, tokens = matrix.outputs(model, prompt, **ways)
    oracle = shortened_generate(
        model, prompt, rows, max_new_tokens=4, suppress_tokens=matrix.placeholders(model), **ways
    )
    assert torch.equal(tokens, oracle.tokens)
    assert all(map(torch.equal, everything, before))
    kept = kept_tokens(model, prompt, rows)
    expected = shortened_logits(model, prompt, rows)
    assert torch.equal(logits[kept], expected[kept])
    picture, *videos = report.images
    assert picture.layers[0] == picture.tokens
    assert picture.frames is None
    for video in videos:
        assert len(video.frames) == (FRAMES // 2 if name.startswith("qwen") else FRAMES)
        assert video.layers[0] - sum(video.frames) == (name == "llava_onevision")  # its newline
        assert video.layers[0] < video.tokens
    assert all(map(torch.equal, matrix.outputs(model, prompt, **ways), before))
    assert matrix.fingerprint(model) == state


@pytest.mark.parametrize("keep", [None, 0.1, 0.3, 0.5, 0.95, 7, 8])
@pytest.mark.parametrize("method", [EVS, VidCom2])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_count_is_known_before_the_features(name, method, keep):
    model, _, inputs = fixture(name)
    if name == "qwen3_vl" and keep == 8:
        pytest.skip("its first video has 8 tokens")
    reducer, calls = watched(method())
    with attach(name, model, reducer, {"videos": (1, 1)}, keep=keep), torch.no_grad():
        model(**inputs(videos=(1, 1)))
    assert len(calls) == 2
    for image, selection in calls:
        count = reducer.retained_count(image.grid, keep)
        assert len(selection.kept) == count
        assert not isinstance(keep, int) or count == keep
        mask = reducer.select(image.features, image.grid, count)
        assert int(mask.sum()) == count
        separators = image.grid.separators
        assert torch.isin(separators.nonzero().squeeze(1), selection.kept).all()
        tokens = image.grid.cols * image.grid.tokens_per_tile
        if keep is None or isinstance(keep, float):
            share = 0.25 if keep is None else keep
            least = image.grid.tokens_per_tile if method is EVS else image.grid.cols
            assert count == max(least, int(tokens * share)) + int(separators.sum())


def test_evs_keeps_what_moves():
    """Worked out by hand: one token of frame 1 turns round, one of frame 2 a little."""
    grid = Grid(torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3), 2, 2, cols=3, video=True)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]).repeat(3, 1)
    features[4 + 2 :: 4] = torch.tensor([-1.0, -1.0])  # from frame 1 on: one change
    features[8 + 1] = torch.tensor([0.3, 1.0])
    masks = [EVS().select(features, grid, count).nonzero().squeeze(1).tolist() for count in (4, 5, 6)]
    assert masks == [[0, 1, 2, 3], [0, 1, 2, 3, 6], [0, 1, 2, 3, 6, 9]]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_after_pruning_are_the_models_own(name):
    """What serving engines rebuild from the kept places equals the stock positions of the whole prompt."""
    model, _, inputs = fixture(name)
    prompt = inputs(images=(1, 1), videos=(1, 2), rows=(1,))  # frames higher than wide
    names = ("image_grid_thw", "video_grid_thw", "mm_token_type_ids", "second_per_grid_ts")
    grids = {key: prompt[key] for key in names if key in prompt}
    whole, delta = model.model.get_rope_index(prompt["input_ids"], **grids)
    with compress.attach(model, EVS()) as session, torch.no_grad():
        model(**prompt)
        explanations = session.explain()
    seconds = 2.0 if name == "qwen2_5_vl" else 1.0  # two positions per second
    media = [
        MediumSites(e.tokens, e.grid.cols, e.grid.height, e.grid.width, seconds if e.grid.video else 1.0)
        for e in explanations
    ]
    ids, config = prompt["input_ids"][0], model.config
    kept = kept_tokens(model, prompt, matrix.kept_rows(session, 1))[0]
    placeholders = [config.image_token_id, config.video_token_id]
    positions = evs_positions(ids[kept], media, placeholders)
    assert torch.equal(positions, whole[:, 0, kept])
    assert int(positions.max()) + 1 - len(ids) == int(delta)
    engine = evs_positions(ids[kept], media, placeholders, restart="evs")
    assert not torch.equal(engine, positions)  # text starts inside the media
    first = evs_positions(ids[kept][:9], media, placeholders)
    assert torch.equal(evs_positions(ids[kept], media, placeholders, computed=first), positions)
    with pytest.raises(ValueError, match="more than the 2 media"):
        evs_positions(ids[kept], media[:2], placeholders)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [EVS, VidCom2])
def test_other_precisions_keep_as_many_tokens(method, dtype):
    random = torch.Generator().manual_seed(2)
    grid = Grid(torch.arange(4).repeat_interleave(9), torch.arange(9).repeat(4), 3, 3, cols=4, video=True)
    features = torch.randn(36, 16, generator=random).to(dtype)
    features[9:18] = features[:9]  # many equal scores
    kept = method().reduce(Image(features, features[:0], grid), 0.5).kept
    assert len(kept) == 18
    if method is EVS:
        assert kept.tolist() == sorted({*range(9), *kept.tolist()})
        assert not ((kept >= 9) & (kept < 18)).any()


def test_vidcom2_gives_more_to_the_unusual_frame():
    random = torch.Generator().manual_seed(0)
    grid = Grid(torch.arange(6).repeat_interleave(16), torch.arange(16).repeat(6), 4, 4, cols=6, video=True)
    video = 2 + torch.randn(6, 16, 24, generator=random)
    video[3] -= 4
    mask = VidCom2().select(video.flatten(0, 1), grid, 24).view(6, 16)
    assert int(mask.sum()) == 24
    assert mask.sum(1).argmax() == 3
    assert mask.sum(1)[3] > 1.5 * mask.sum(1).float().mean()


def test_vidcom2_in_reference_mode_rounds_by_frame():
    random = torch.Generator().manual_seed(1)
    grid = Grid(torch.arange(5).repeat_interleave(7), torch.arange(7).repeat(5), 1, 7, cols=5, video=True)
    image = Image(torch.randn(7, 8, generator=random).repeat(5, 1), torch.zeros(0, 8), grid)
    kept = VidCom2(mode="reference", q=0.65).reduce(image, None).kept
    assert torch.equal((kept // 7).bincount(), torch.full((5,), 2))  # equal frames, 2.45 tokens each
    assert len(VidCom2(q=0.65).reduce(image, None).kept) == 12  # of 12.25
    with pytest.raises(ValueError, match="depends on the features"):
        VidCom2(mode="reference").retained_count(grid, 0.5)


@pytest.mark.parametrize("method", [EVS, VidCom2])
def test_a_video_of_one_frame(method):
    grid = Grid(torch.zeros(6, dtype=torch.long), torch.arange(6), 2, 3, video=True)
    image = Image(torch.randn(6, 8), torch.zeros(0, 8), grid)
    count = method().retained_count(grid, 0.5)
    assert count == (6 if method is EVS else 3)
    assert len(method().reduce(image, 0.5).kept) == count


@pytest.mark.parametrize(
    ("method", "message"), [(EVS, "keeps the first frame"), (VidCom2, "below one token")]
)
def test_counts_below_the_least_are_refused(method, message):
    grid = Grid(torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3), 2, 2, cols=3, video=True)
    with pytest.raises(ValueError, match=message):
        method().retained_count(grid, 2)
    with pytest.raises(ValueError, match="this image has 12"):
        method().retained_count(grid, 13)
    with pytest.raises(ValueError, match="share of tokens to drop"):
        method(q=1.0)


@pytest.mark.parametrize("method", [EVS, VidCom2])
def test_frames_with_tokens_missing_are_refused(method):
    grid = Grid(torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3), 2, 2, cols=3, video=True)
    image = Image(torch.randn(12, 8), torch.zeros(0, 8), grid).remaining(torch.tensor([0, 1, 4, 5, 8, 9]))
    with pytest.raises(ValueError, match="put the reducer that compares frames first"):
        method().reduce(image, 0.5)


def test_a_picture_selector_may_follow():
    model, _, inputs = fixture("qwen3_vl")
    with compress.attach(model, [EVS(), DivPrune(keep=0.25)]) as session, torch.no_grad():
        model(**inputs(**ONE_EACH))
        picture, video = session.report().images
    assert picture.layers[0] == round(picture.tokens / 4)
    assert video.layers[0] == round(video.tokens / 4)


def test_features_without_grids_are_refused():
    model, _, inputs = fixture("qwen2_vl")
    inputs = inputs(videos=(1,))
    if BEFORE_5_18:
        pytest.skip("older releases take no features")
    with torch.no_grad():
        made = model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
    inputs.pop("pixel_values_videos")
    with compress.attach(model, EVS()), pytest.raises(ValueError, match="EVS compares the frames"):
        model(**inputs, mm_encoder_outputs={"video": made})


@pytest.mark.skipif(BEFORE_5_18, reason="inputs cannot be prepared")
@pytest.mark.parametrize("method", [EVS, VidCom2])
@pytest.mark.parametrize("name", FAMILIES)
def test_prepared_inputs_equal_the_session(name, method):
    model, _, inputs = fixture(name)
    prompt = inputs(**ONE_EACH)
    quiet = {**SETTINGS, "suppress_tokens": matrix.placeholders(model)}
    with attach(name, model, method(), ONE_EACH) as session:
        attached = model.generate(**prompt, **quiet)
        prepared = session.prepare(prompt)
        tokens = prepared.restore(model.generate(**prepared.inputs, **quiet))
    assert torch.equal(tokens, attached)


# Videos that enter as pictures ------------------------------------------------------------------------------


def test_media_sizes_that_do_not_fit_are_refused():
    model, _, inputs = fixture("internvl")
    prompt = inputs(images=(1, 0), videos=(0, 1))
    with compress.attach(model, EVS()) as session, torch.no_grad():
        with pytest.warns(UserWarning, match="media_sizes"):
            model(**prompt)
        for sizes in ([1], [1, 3], [1, 5], [1, FRAMES, 1]):
            session.media_sizes = sizes
            with pytest.raises(ValueError, match="one number per medium"):
                model(**prompt)
        for sizes in ([], [0], [True], [1.0]):
            with pytest.raises(ValueError, match="one whole number per medium"):
                session.media_sizes = sizes
    with compress.attach(model, Random(), keep=0.5) as session, torch.no_grad():
        session.media_sizes = [2]  # a picture of several tiles and another
        with pytest.raises(ValueError, match="one tile each and of one size"):
            model(**inputs(images=(2,)))


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_single_tile_pictures_of_other_families_may_be_frames(name):
    model, _, inputs = fixture(name)
    prompt = inputs(images=(3, 0))
    spans = None
    with compress.attach(model, VidCom2(), keep=0.5) as session, torch.no_grad():
        session.media_sizes = [3]
        if name == "idefics3":  # whose pictures have tiles beside the whole
            with pytest.raises(ValueError, match="one tile each"):
                model(**prompt)
            return
        logits = model(**prompt).logits
        rows = matrix.kept_rows(session, 2)
        spans = session._hooks.last.prompt.spans
    assert len(spans) == 1 and spans[0].grid.cols == 3
    kept = kept_tokens(model, prompt, rows)
    assert torch.equal(logits[kept], shortened_logits(model, prompt, rows)[kept])


# Budgets per frame ------------------------------------------------------------------------------------------


RESAMPLED = ("llava_next_video", "llava_onevision")  # frames are pooled behind the tower
COMPARED = ("evs", "vidcom2")  # their budget is for the clip
SQUARES = ("m3",)  # average square blocks, into which frames of these families do not divide


def hosted(names):
    """Each family with each reducer that it can host, and a prompt for it."""
    for family, name in itertools.product(FAMILIES, names):
        kind = reducers()[name]
        if family in RESAMPLED and kind.wants_pixels:
            continue
        if name in SQUARES and family.startswith(("qwen", "llava_onevision")):
            continue
        # Of OneVision's pictures no layout is known, so what the tower reads of them fits no token.
        alone = family == "llava_onevision" and bool(kind().tower_layers())
        which = {"videos": (1, 2)} if alone else ONE_EACH
        marks = [] if family in ("qwen3_vl", "llava_onevision") else [pytest.mark.slow]
        yield pytest.param(family, kind(), which, id=f"{family}-{name}", marks=marks)


@pytest.mark.parametrize(
    ("name", "reducer", "which"), list(hosted([name for name in FEATURES if name not in COMPARED]))
)
def test_every_method_takes_frames_one_by_one(name, reducer, which):
    """A budget per frame is met in every frame, and the prompt is what the frames alone would give."""
    model, _, inputs = fixture(name)
    prompt = inputs(**which)
    before = matrix.outputs(model, prompt)
    options = {"video_budget": "frame"}
    with attach(name, model, reducer, which, keep=1.0, **options):
        assert all(map(torch.equal, matrix.outputs(model, prompt), before))
    with attach(name, model, reducer, which, keep=0.5, **options) as session, torch.no_grad():
        logits = model(**prompt).logits
        rows = matrix.kept_rows(session, 2)
        video = session._hooks.last.prompt.spans[-1].grid
        explanation = session.explain()[-1]
    if not reducer.merges and not reducer.wants_pixels:
        kept = kept_tokens(model, prompt, rows)
        assert torch.equal(logits[kept], shortened_logits(model, prompt, rows)[kept])
        frame = Grid.single(video.height, video.width)
        share = reducer.retained_count(frame, 0.5)
        tile = explanation.tile[explanation.tile >= 0]
        assert tile.bincount(minlength=video.cols).tolist() == [share] * video.cols
    total = rows[1]
    assert 0 < int(total.sum()) <= math.ceil(0.75 * len(total))


@pytest.mark.parametrize(("name", "reducer", "which"), list(hosted(FEATURES)))
def test_every_method_takes_a_clip(name, reducer, which):
    model, _, inputs = fixture(name)
    prompt = inputs(**which)
    with attach(name, model, reducer, which, keep=0.5) as session, torch.no_grad():
        logits = model(**prompt).logits
        rows = matrix.kept_rows(session, 2)
    if not reducer.merges and not reducer.wants_pixels:
        kept = kept_tokens(model, prompt, rows)
        assert torch.equal(logits[kept], shortened_logits(model, prompt, rows)[kept])
    assert 0 < int(rows[1].sum()) <= math.ceil(0.75 * len(rows[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_are_reduced_as_pictures_of_their_own(name):
    model, _, inputs = fixture(name)
    which = {"videos": (1,)}
    inner, calls = watched(DivPrune())
    with attach(name, model, inner, which, keep=2, video_budget="frame") as session, torch.no_grad():
        model(**inputs(**which))
        (explanation,) = session.explain()
        grid = session._hooks.last.prompt.spans[0].grid
    assert len(calls) == grid.cols
    separators = int(grid.separators.sum())
    for number, (image, selection) in enumerate(calls):
        assert image.grid.num_tiles == 1 and image.num_tokens == grid.tokens_per_tile
        expected = DivPrune().select(image.features, image.grid, 2).nonzero().squeeze(1)
        assert torch.equal(selection.kept, expected)
        assert torch.equal(explanation.index[explanation.tile == number], expected)
    assert len(explanation.tokens) == 2 * grid.cols + separators


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_pooled_frames_have_the_towers_attention_pooled(name):
    model, _, inputs = fixture(name)
    reducer, calls = watched(FasterVLM())
    with compress.attach(model, reducer, keep=0.5), torch.no_grad():
        model(**inputs(videos=(1,)))
    ((image, selection),) = calls
    assert image.attention("features").shape[::2] == (FRAMES, 4)
    kept = torch.zeros(image.num_tokens, dtype=torch.bool)
    kept[selection.kept] = True
    frames = kept[~image.grid.separators].view(FRAMES, 4)
    scores = image.attention("features").float().mean(1)
    assert torch.equal(scores.topk(2).indices.sort().values, frames.nonzero()[:, 1].view(FRAMES, 2))


def test_attention_of_frames_of_odd_side_is_pooled_as_the_features_are():
    from vistok.compress.vision.features import _resampled

    rows = torch.rand(2, 3, 49)
    floor = Grid(torch.arange(2).repeat_interleave(9), torch.arange(9).repeat(2), 3, 3, cols=2, video=True)
    expected = F.avg_pool2d(rows.view(2, 3, 7, 7), 2).flatten(2)  # the last row and column fill no block
    assert torch.allclose(_resampled(rows, floor), expected)
    half = Grid(torch.arange(2).repeat_interleave(16), torch.arange(16).repeat(2), 4, 4, cols=2, video=True)
    assert _resampled(rows, half).shape == (2, 3, 16)
    first = rows.view(2, 3, 7, 7)[:, :, :2, :2].mean((2, 3))
    assert torch.allclose(_resampled(rows, half)[..., 0], first)


@pytest.mark.skipif(BEFORE_5_18, reason="features of a video come frame by frame")
def test_merging_behind_pooled_frames_leaves_the_prompt_whole():
    model, _, inputs = fixture("llava_next_video")
    with compress.attach(model, ToMe(), keep=0.5) as session, torch.no_grad():
        with pytest.warns(UserWarning, match="is not known"):
            model(**inputs(videos=(1,)))
        (video,) = session.report().images
    assert video.layers[0] == video.tokens


@pytest.mark.parametrize("video_budget", ["frames", None, 3])
def test_other_video_budgets_are_refused(video_budget):
    model, _, _ = fixture("qwen2_vl")
    with pytest.raises(ValueError, match=r'"clip", "frame" or QuoTA'):
        compress.attach(model, DivPrune(), video_budget=video_budget)


def test_budgets_that_cannot_be_per_frame_are_refused():
    model, _, inputs = fixture("qwen2_vl")
    with pytest.raises(ValueError, match="EVS compares the frames"):
        compress.attach(model, EVS(), video_budget="frame")
    with pytest.raises(ValueError, match="no reducer acts on features"):
        compress.attach(model, "fastv", video_budget="frame")
    with (
        compress.attach(model, DivPrune(), keep=7, video_budget="frame"),
        pytest.raises(ValueError, match="7 tokens per frame, and a frame has 6"),
    ):
        model(**inputs(videos=(1,)))
    with (
        compress.attach(model, VisionZip(), video_budget=QuoTA()),
        pytest.raises(ValueError, match="give keep"),
    ):
        model(**inputs(videos=(1,)))


# QuoTA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [DivPrune(), Random(), VisionZip()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_relevant_frames_get_more(name, reducer):
    model, _, inputs = fixture(name)
    which = {"videos": (1, 2)} if isinstance(reducer, VisionZip) else ONE_EACH
    prompt = inputs(**which)

    def relevance(video):
        return torch.linspace(0.2, 0.9, video.grid.cols)

    options = {"keep": 0.6, "video_budget": QuoTA(relevance=relevance)}
    with attach(name, model, reducer, which, **options) as session, torch.no_grad():
        logits = model(**prompt).logits
        rows = matrix.kept_rows(session, 2)
        explanation = session.explain()[-1]
        grid = session._hooks.last.prompt.spans[-1].grid
    total = round(0.6 * grid.num_tokens) - int(grid.separators.sum())
    weights = (100 * torch.linspace(0.2, 0.9, grid.cols)).double().square()
    weights = quota_capped(weights / weights.sum(), grid.tokens_per_tile / total)
    expected = [int(total * weight) for weight in weights.tolist()]
    per_frame = explanation.tile[explanation.tile >= 0].bincount(minlength=grid.cols).tolist()
    if not reducer.merges:
        assert per_frame == expected
        kept = kept_tokens(model, prompt, rows)
        assert torch.equal(logits[kept], shortened_logits(model, prompt, rows)[kept])
    assert len(explanation.tokens) <= 0.6 * grid.num_tokens + 0.5


def test_without_a_scorer_frames_near_the_question_get_more():
    text = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    grid = Grid(torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2), 2, 2, cols=2, video=True)
    features = torch.tensor([[1.0, 0.0, 0.0]] * 4 + [[0.1, 1.0, 1.0]] * 4)
    video = Image(features, text, grid, text_before=1)
    far, near = QuoTA().budgets(video, 4)
    assert near > far
    video.text = text[:0]
    with pytest.raises(ValueError, match="no text"):
        QuoTA().budgets(video, 4)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.5, math.nan], "from 0 to 1"),
        ([0.5, -0.1], "from 0 to 1"),
        ([0.5, 1.1], "from 0 to 1"),
        ([0.0, 0.0], "relevance 0"),
        ([0.5], "one number per frame"),
    ],
)
def test_bad_relevance_is_refused(scores, message):
    grid = Grid(torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2), 2, 2, cols=2, video=True)
    video = Image(torch.randn(8, 3), torch.zeros(0, 3), grid)
    with pytest.raises(ValueError, match=message):
        QuoTA(relevance=lambda _: torch.tensor(scores)).budgets(video, 4)


def test_a_budget_below_one_token_per_frame_is_refused():
    grid = Grid(torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4), 2, 2, cols=4, video=True)
    video = Image(torch.randn(16, 3), torch.zeros(0, 3), grid)
    with pytest.raises(ValueError, match="leaves every frame below one token"):
        QuoTA(relevance=lambda _: torch.ones(4)).budgets(video, 3)


def test_the_cap_is_passed_on_once_and_in_order():
    """By hand: frame 0 loses 0.2, of which frames 1 and 2 get parts; frame 1 passes on what is too much."""
    weights = torch.tensor([0.6, 0.38, 0.02], dtype=torch.float64)
    first = 0.38 * (1 + 0.2 / 0.8)
    second = 0.02 * (1 + (0.2 + first - 0.4) / 0.8)
    capped = quota_capped(weights, 0.4)
    assert torch.allclose(capped, torch.tensor([0.4, 0.4, second], dtype=torch.float64), rtol=1e-12)
    assert float(capped.sum()) < 1  # the single pass does not share everything
    backwards = quota_capped(weights.flip(0), 0.4).flip(0)
    assert not torch.allclose(capped, backwards)  # the order of frames matters
    assert torch.equal(quota_capped(weights, 1.0), weights)
    assert float(quota_weights(torch.tensor([0.1, 0.2])).sum()) == 1.0
