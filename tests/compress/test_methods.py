"""Methods that act on features: what all of them must satisfy on every model, and what each one claims."""

from functools import cache, partial

import pytest
import reducer_matrix as matrix
import torch
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import (
    DivPrune,
    FasterVLM,
    GlobalCom2,
    HiRED,
    PruMerge,
    TokenCorr,
    VisionZip,
    VisPruner,
)
from vistok.compress.algorithms.anyres import globalcom2_ratios
from vistok.compress.algorithms.grid import Grid
from vistok.compress.reducer import Image, Stage
from vistok.compress.registry import reducers

pytestmark = pytest.mark.slow

NAMES = [name for name, kind in reducers().items() if kind.stage is Stage.FEATURES]
NAMES.remove("m3")  # averages square blocks, which not every model here has: test_trained_m3.py
SETTINGS = {
    **{name: reducers()[name] for name in NAMES},
    "hired-lossy": partial(HiRED, redistribute=False, salient="mass"),
    "globalcom2-nonempty": partial(GlobalCom2, newline="nonempty"),
    "prumerge-plus": partial(PruMerge, plus=True),
    "vispruner-important": partial(VisPruner, important_ratio=1.0),
    "tokencorr-deterministic": partial(TokenCorr, deterministic=True),
}
ATTENTIVE = (FasterVLM, HiRED, GlobalCom2, VisionZip, PruMerge, VisPruner, TokenCorr)
MERGING = (VisionZip, PruMerge)

fixture = cache(tiny_vlm)
EVERY_MODEL = pytest.mark.parametrize("vlm", FIXTURES)
EVERY_METHOD = pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)


@torch.no_grad()
def images(name, reducer, keep=0.5, **which):
    """What a reducer is given of each image of a prompt, and what it answered."""
    model, _, inputs = fixture(name)
    seen, reduce = [], reducer.reduce

    def watched(image, budget):
        seen.append((image, reduce(image, budget)))
        return seen[-1][1]

    reducer.reduce = watched
    with compress.attach(model, reducer, keep=keep):
        model(**inputs(**which or {"images": (2, 1)}))
    del reducer.reduce
    return seen


# All methods ------------------------------------------------------------------------------------------------


@EVERY_METHOD
@EVERY_MODEL
def test_select_returns_exactly_the_count(vlm, make):
    reducer = make()
    for image, _ in images(vlm, reducer):
        scores, n = reducer.scores(image), image.num_tokens
        for count in (1, 2, n // 3, n // 2, n - 1, n):
            mask = reducer.select(image.features, image.grid, count, scores)
            assert mask.shape == (n,) and mask.dtype == torch.bool
            assert int(mask.sum()) == count


@EVERY_METHOD
@EVERY_MODEL
def test_the_number_of_tokens_follows_from_layout_and_budget(vlm, make):
    reducer = make()
    for keep in (0.3, 0.6, 3):
        for image, selection in images(vlm, reducer, keep):
            expected = reducer.retained_count(image.grid or image.num_tokens, keep)
            kept = selection.kept
            assert len(kept) == expected or (isinstance(reducer, HiRED) and not reducer.redistribute)
            assert len(kept) <= expected <= image.num_tokens
            assert torch.equal(kept, kept.unique())
            assert selection.values is None or len(selection.values) == len(kept)


@EVERY_METHOD
@EVERY_MODEL
def test_keeping_everything_counts_separators_too(vlm, make):
    reducer = make()
    for image, _ in images(vlm, reducer):
        assert reducer.retained_count(image.grid or image.num_tokens, 1.0) == image.num_tokens


@EVERY_METHOD
@EVERY_MODEL
def test_rows_of_a_batch_keep_what_they_keep_alone(vlm, make):
    model, _, inputs = fixture(vlm)
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": matrix.placeholders(model)}
    with compress.attach(model, make(), keep=0.5) as session:
        together = model.generate(**inputs(images=(2, 1)), **settings, num_beams=2)
        kept = matrix.kept_rows(session, 2, beams=2)
        assert together.shape[1] == inputs(images=(2, 1))["input_ids"].shape[1] + 3
        for row in range(2):
            alone = inputs(images=(2, 1), rows=(row,))
            output = model.generate(**alone, **settings)
            assert output.shape == (1, alone["input_ids"].shape[1] + 3)
            assert torch.equal(matrix.kept_rows(session, 1)[0], kept[row])


@EVERY_METHOD
@EVERY_MODEL
def test_keeping_everything_changes_nothing(vlm, make):
    model, _, inputs = fixture(vlm)
    inputs = inputs(images=(2, 1))
    with torch.no_grad():
        expected = model(**inputs).logits
        with compress.attach(model, make(), keep=1.0):
            assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", ATTENTIVE)
def test_features_without_attention_are_refused_with_advice(method):
    model, _, inputs = fixture("llava")
    inputs = inputs(batch=1)
    with torch.no_grad():
        given = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        with compress.attach(model, method(), keep=0.5), pytest.raises(ValueError, match="from pixel_values"):
            model(**inputs, mm_encoder_outputs={"image": given})
    with pytest.raises(ValueError, match=r"what scores\(image\) returns"):
        method().select(torch.randn(4, 8), None, 2)


@pytest.mark.parametrize("method", (*MERGING, TokenCorr))
@EVERY_MODEL
def test_methods_with_their_own_number_need_no_budget(vlm, method):
    for image, selection in images(vlm, method(), None):
        assert 1 <= len(selection.kept) <= image.num_tokens


# FasterVLM --------------------------------------------------------------------------------------------------


def test_fastervlm_keeps_the_highest_attention_of_every_tile():
    reducer = FasterVLM()
    for image, selection in images("llava_next", reducer, 15):
        scores, tile = reducer.scores(image), image.grid.tile
        kept = torch.zeros(image.num_tokens, dtype=torch.bool)
        kept[selection.kept] = True
        assert not kept[image.grid.separators].any()
        for number in range(image.grid.num_tiles):
            own = tile == number
            assert int((kept & own).sum()) in (15 // image.grid.num_tiles, -(-15 // image.grid.num_tiles))
            assert scores[own & kept].min() >= scores[own & ~kept].max()


def test_the_attention_is_that_of_the_layer_that_made_the_features():
    model, _, inputs = tiny_vlm("llava", "eager")
    inputs = inputs(batch=1)
    with torch.no_grad():
        attentions = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    (image, _), *_ = images("llava", FasterVLM(), batch=1)
    expected = attentions[-2][0, :, 0, 1:]  # of vision_feature_layer -2
    assert torch.allclose(image.attention("features")[0], expected, atol=1e-6)


# HiRED ------------------------------------------------------------------------------------------------------


def wide(size=(100, 290), tiles=3, side=6, seed=0):
    """A picture of 1 × 3 tiles, and attention [2, 1 + 3, H, N] where the thumbnail looks at its right end."""
    grid = Grid.anyres(size, [(100, 100 * tiles)], side, tile_pixels=100)
    rows = torch.rand(2, 1 + tiles, 2, side * side, generator=torch.Generator().manual_seed(seed)) * 0.01
    right = torch.arange(side * side) % side >= side * 2 // 3
    rows[0, 0] += right.float()
    return grid, rows


def image_of(grid, rows, **more):
    layers = {0: rows[0], "features": rows[1]}
    return Image(torch.randn(grid.num_tokens, 8), torch.zeros(0, 8), grid, rows=layers, **more)


def per_tile(selection, grid):
    return torch.bincount(grid.tile[selection.kept], minlength=grid.num_tiles).tolist()


def test_hired_gives_tokens_to_the_tile_the_thumbnail_looks_at():
    grid, rows = wide()
    image = image_of(grid, rows)
    selection = HiRED(salient=12).reduce(image, 40)
    assert per_tile(selection, grid) == [20, 0, 0, 20]


def test_hired_reference_takes_strips_for_tiles_and_drops_newlines():
    grid, rows = wide(size=(100, 60))  # whose padding the reference takes for picture
    linear = torch.nn.Linear(4, 8)
    states = torch.randn(grid.num_tiles, 1 + 36, 4)
    image = image_of(grid, rows, states=states, project=linear)
    published = HiRED(geometry="reference", salient=12)
    chosen = published.tiles(image, 40).kept // 36
    assert chosen.bincount().tolist() == [20, 6, 6, 6]  # each strip holds a third of the right end
    selection = published.reduce(image, 40)
    assert not (selection.source[:, None] == grid.separators.nonzero()[:, 0]).any()
    names = published.tiles(image, 40).packed
    padding = selection.source < 0
    assert padding.any()
    assert torch.equal(selection.values[~padding], image.features[selection.source[~padding]])
    assert torch.allclose(selection.values[padding], linear(states[:, 1:].flatten(0, 1)[names[padding]]))
    assert not torch.equal(selection.kept, HiRED(salient=12).reduce(image, 40).kept)


def test_hired_needs_states_for_padding_it_keeps():
    image = image_of(*wide(size=(100, 60)))
    with pytest.raises(ValueError, match="keeps tokens of the padding"):
        HiRED(geometry="reference").reduce(image, 40)


def test_hired_without_redistribution_keeps_fewer():
    counts = {True: [], False: []}
    for spend, found in counts.items():
        for _, selection in images("llava_next", HiRED(redistribute=spend), 0.4):
            found.append(len(selection.kept))
    assert all(a <= b for a, b in zip(counts[False], counts[True], strict=True))
    assert sum(counts[False]) < sum(counts[True])


def test_hired_on_one_tile_keeps_the_best_of_the_late_layer():
    ((image, selection),) = images("llava", HiRED(alpha=0.1), 5, batch=1)
    best = image.attention("features")[0].sum(0).topk(5).indices.sort().values
    assert torch.equal(selection.kept, best)


# GlobalCom² -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 290), (60, 300), (300, 60)])
def test_globalcom2_keeps_newlines_of_the_pictures_rows_alone(size):
    grid = Grid.anyres(size, [(100, 300), (300, 100)], 6, tile_pixels=100)
    scores = torch.randn(grid.num_tiles, 36, generator=torch.Generator().manual_seed(1))
    count = grid.num_tokens // 2
    rows = GlobalCom2().select(torch.randn(grid.num_tokens, 8), grid, count, scores)
    assert bool(rows[grid.separators].all())
    nonempty = GlobalCom2(newline="nonempty").select(
        torch.randn(grid.num_tokens, 8), grid, count // 2, scores
    )
    ends = grid.separator_row[nonempty[grid.separators]]
    patches = nonempty & ~grid.separators & (grid.tile != grid.thumbnail)
    row = (grid.tile - 1) // grid.cols * grid.height + grid.index // grid.width
    assert set(ends.tolist()) <= set(row[patches].tolist())


def test_globalcom2_newlines_take_at_most_half_of_the_budget():
    grid = Grid.anyres((300, 60), [(300, 100)], 6, tile_pixels=100)
    scores = torch.randn(grid.num_tiles, 36)
    mask = GlobalCom2().select(torch.randn(grid.num_tokens, 8), grid, 8, scores)
    assert int(mask[grid.separators].sum()) == 4


def test_globalcom2_reference_orders_the_thumbnail_and_adds_newlines_of_padding():
    reducer = GlobalCom2(geometry="reference")
    for image, selection in images("llava_next", reducer, 0.5):
        grid, scores, whole = image.grid, reducer.scores(image)[0], int(image.grid.tokens_per_tile * 0.5)
        assert torch.equal(selection.source[:whole], scores.topk(whole).indices)
        newline = (selection.values == image.newline.half().float()).all(1)
        assert int(newline.sum()) == grid.rows * grid.height
        assert not newline[:whole].any()
        after = selection.values[whole:]
        assert torch.equal(after, after.half().float())
    with pytest.raises(ValueError, match="models have no such newlines"):
        GlobalCom2(newline="reference")


def test_globalcom2_temperature_evens_out_the_shares():
    (image, _), *_ = images("llava_next", GlobalCom2())
    shares = [
        globalcom2_ratios(GlobalCom2(temperature=t).scores(image), image.grid, 0.5) for t in (0.1, 10.0)
    ]
    assert float(shares[0].std()) > float(shares[1].std())
    exact = globalcom2_ratios(GlobalCom2().scores(image), image.grid, 0.5, temperature=0.1)
    assert torch.allclose(shares[0], exact)


# VisionZip --------------------------------------------------------------------------------------------------


def test_visionzip_adds_the_mean_of_the_tokens_most_like_a_target():
    generator = torch.Generator().manual_seed(0)
    states, keys = torch.randn(1, 10, 4, generator=generator), torch.randn(1, 10, 2, 3, generator=generator)
    rows = torch.rand(1, 2, 9, generator=generator)
    image = Image(
        torch.zeros(9, 4),
        torch.zeros(0, 4),
        Grid.single(3, 3),
        rows={"features": rows},
        states=states,
        keys=keys,
        renumbered=True,
    )
    image.project = lambda x: 2 * x
    values = VisionZip(dominant=4, contextual=2).reduce(image, None).values
    best = (rows[0].sum(0).topk(3).indices + 1).sort().values
    assert torch.equal(values[:4], 2 * states[0, torch.cat([torch.tensor([0]), best])])
    # Six are left: targets are the first and the fourth.
    rest = torch.tensor([i for i in range(1, 10) if i not in best])
    targets, others = rest[[0, 3]], rest[[1, 2, 4, 5]]
    mean = torch.nn.functional.normalize(keys[0].mean(1), dim=1)
    nearest = (mean[others] @ mean[targets].T).argmax(1)
    for number, target in enumerate(targets):
        own = others[nearest == number]
        added = states[0, own].mean(0) if len(own) else 0
        assert torch.allclose(values[4 + number], 2 * (states[0, target] + added))


def test_visionzip_enters_in_the_papers_order():
    reducer = VisionZip(dominant=5, contextual=2)
    for image, in_place in images("llava_next", reducer, None):
        image.renumbered = True
        grid, source = image.grid, reducer.reduce(image, None).source
        assert (in_place.kept.diff() > 0).all() and sorted(in_place.source) == sorted(source)
        own = in_place.source >= 0
        assert torch.equal(in_place.kept[own], in_place.source[own])
        tiles = grid.num_tiles
        assert len(source) == 7 * tiles
        first = source[:7]
        assert (first[[0, 5, 6]] == -1).all() and (grid.tile[first[1:5]] == grid.thumbnail).all()
        patches = source[7 : 7 + 4 * (tiles - 1)]
        shown = patches[patches >= 0]  # the others are padding, which this method keeps
        assert (shown.diff() > 0).all() and (grid.tile[shown] != grid.thumbnail).all()
        assert (source[7 + 4 * (tiles - 1) :] == -1).all()


def test_visionzip_keeps_the_papers_proportion_for_any_budget():
    grid = Grid.single(24, 24)
    assert VisionZip().retained_count(grid, None) == 64
    for count, contextual in ((192, 30), (128, 20), (64, 10), (32, 5)):
        assert VisionZip().retained_count(grid, count) == count
        assert VisionZip()._merged(count) == contextual
    assert VisionZip().retained_count(Grid.tiled(2, 2, 24, 24, thumbnail="first"), 320) == 320


# PruMerge ---------------------------------------------------------------------------------------------------


def picture(attention, side=6, width=5):
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 1 + side * side, width, generator=generator)
    keys = torch.randn(1, 1 + side * side, 2, 3, generator=generator)
    return Image(
        torch.zeros(side * side, width),
        torch.zeros(0, width),
        Grid.single(side, side),
        rows={-1: attention[None, None]},
        states=states,
        keys=keys,
        project=lambda x: x,
        renumbered=True,
    )


def test_prumerge_keeps_as_many_as_stand_out():
    for outliers in (1, 4):
        attention = 0.01 + 1e-4 * torch.arange(36.0)
        attention[5 : 5 + outliers] = 0.5 + 0.1 * torch.arange(outliers)
        image = picture(attention)
        selection = PruMerge(neighbours=3).reduce(image, None)
        assert selection.source.tolist() == [*range(5 + outliers - 1, 4, -1), -1]
        left = torch.ones(36, dtype=torch.bool)
        left[5 : 5 + outliers] = False
        total = attention[left] @ image.states[0, 1:][left]
        assert torch.allclose(selection.values[-1], total, atol=1e-6)
        plus = PruMerge(plus=True, neighbours=3).reduce(image, None).source
        assert set(selection.source.tolist()) < set(plus.tolist())


def test_prumerge_with_a_budget_folds_as_it_does_without():
    attention = 0.01 + 1e-4 * torch.arange(36.0)
    attention[[3, 20, 30]] = torch.tensor([0.9, 0.8, 0.7])
    image = picture(attention)
    free, fixed = PruMerge(neighbours=4).reduce(image, None), PruMerge(neighbours=4).reduce(image, 4)
    assert torch.equal(free.source, fixed.source) and torch.equal(free.kept, fixed.kept)
    assert torch.allclose(free.values, fixed.values)
    with pytest.raises(ValueError, match="chooses its number"):
        PruMerge().retained_count(36, None)


# Order and places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("vlm", ["qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"])
def test_merged_features_stand_at_their_places(vlm, method):
    for _, selection in images(vlm, method()):
        own = selection.source >= 0
        assert torch.equal(selection.kept[own], selection.source[own])


def test_attention_of_merged_tokens_is_refused():
    model, _, inputs = fixture("llava")
    with pytest.raises(ValueError, match="FasterVLM reads the tower's attention"):
        compress.attach(model, [compress.ToMe(keep=8), FasterVLM()], keep=0.5)
    with torch.no_grad(), compress.attach(model, [compress.ToMe(keep=8), DivPrune(keep=0.5)]):
        model(**inputs(batch=1))
