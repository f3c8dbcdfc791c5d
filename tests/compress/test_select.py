"""Token selection against oracles that go token by token, and layouts against transformers' own packing."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next import modeling_llava_next as llava_next

from vistok.compress.algorithms import select
from vistok.compress.algorithms.anyres import globalcom2, hired, split_budget
from vistok.compress.algorithms.fold import prumerge, visionzip, visionzip_order
from vistok.compress.algorithms.grid import Grid
from vistok.compress.algorithms.select import (
    class_top_k,
    cosine_distances,
    farthest_first,
    farthest_order,
    top_k,
    top_k_mask,
)
from vistok.eval.speed import selection as speed

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIDE = 24

seeds = st.integers(0, 2**31 - 1)
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
quick = settings(deadline=None, max_examples=40)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anyres(size: tuple[int, int], **options) -> Grid:
    return Grid.anyres(size, PINPOINTS, SIDE, tile_pixels=336, **options)


# Layout -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(sizes, st.booleans())
def test_anyres_grids_are_what_transformers_packs(size, newline):
    grid = anyres(size, newline=newline)
    tiles = llava_next.image_size_to_num_patches(list(size), PINPOINTS, 336)
    assert grid.num_tiles == tiles
    names = torch.arange(tiles * SIDE * SIDE, dtype=torch.float64).view(tiles, SIDE * SIDE, 1)
    config = SimpleNamespace(
        image_grid_pinpoints=PINPOINTS, vision_config=SimpleNamespace(image_size=336, patch_size=14)
    )
    packed, _ = llava_next.LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [names],
        torch.tensor([size]),
        "full",
        torch.full((1,), -1.0) if newline else None,
    )
    assert torch.equal(grid.flat, packed[0].squeeze(1).long())
    assert grid.num_tokens == len(packed[0])
    assert torch.equal(grid.separators, packed[0].squeeze(1) == -1)


@settings(deadline=None, max_examples=100)
@given(sizes)
def test_unpadding_without_rounding_is_off_by_at_most_one_row_or_column_a_side(size):
    grid = anyres(size)
    old = Grid.tiled(grid.rows, grid.cols, SIDE, SIDE, thumbnail="first", image_size=size, decimals=None)
    if bool(grid.shown.any()) and bool(old.shown.any()):
        assert all(abs(a - b) <= 1 for a, b in zip(grid.rectangle, old.rectangle, strict=True))


def test_positions_of_the_thumbnail_cover_the_picture_that_the_tiles_show():
    grid = anyres((300, 700))  # one row of three tiles, 31 of 72 columns high: 30 rows remain of 24
    top, bottom, left, right = grid.rectangle
    cut = grid.global_position[(grid.tile > 0)]
    whole = grid.global_position[grid.tile == 0]
    assert cut[0].tolist() == [top, left] and cut[-1].tolist() == [bottom - 1, right - 1]
    torch.testing.assert_close(whole.mean(0), cut.mean(0))
    assert grid.global_position[grid.separators].isnan().all()


def test_every_newline_ends_its_row():
    grid = anyres((460, 600))
    assert (grid.rows, grid.cols, grid.num_tokens) == (2, 2, 576 + 36 * 49)
    assert grid.separator_row.tolist() == list(range(6, 42))
    assert (grid.row_end >= 0).sum() == 36 and bool(grid.separators[grid.row_end[6:42]].all())


def test_tiles_before_their_thumbnail_keep_their_numbers():
    grid = Grid.tiled(2, 3, 4, 5, thumbnail="last")
    assert (grid.num_tiles, grid.thumbnail, grid.first, grid.num_tokens) == (7, 6, 0, 140)
    assert grid.tile[-1] == 6 and torch.equal(grid.place.flatten()[grid.flat], torch.arange(140))
    assert torch.equal(grid.block.bincount(), torch.tensor([2, 2, 6, 2, 2, 6]))
    single = Grid.single(3, 2)
    assert single.num_tiles == 1 and single.global_position.tolist()[-1] == [2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(torch.tensor([1]), torch.tensor([0]), 2, 2), "outside the grid"),
        (lambda: Grid(torch.tensor([0]), torch.tensor([4]), 2, 2), "below 4"),
        (lambda: Grid(torch.tensor([0.0]), torch.tensor([0]), 2, 2), "int64"),
        (lambda: Grid(torch.zeros(2, dtype=torch.long), torch.tensor([0]), 2, 2), r"\[N\]"),
        (lambda: Grid.tiled(0, 1, 2, 2), "at least one"),
        (lambda: Grid.anyres((0, 5), PINPOINTS, SIDE, tile_pixels=336), "0×5 pixels"),
        (lambda: Grid.anyres((5, 5), PINPOINTS, SIDE, tile_pixels=224), "tiles of 224²"),
    ],
)
def test_impossible_grids_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Highest scores, even and random places ---------------------------------------------------------------------


@quick
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(0, 7)
)
def test_of_equal_scores_the_lowest_place_is_taken(scores, k):
    expected = [sorted(range(7), key=lambda i: (-row[i], i))[:k] for row in scores]
    tensor = torch.tensor(scores, dtype=torch.float32)
    assert top_k(tensor, k).tolist() == expected
    counts = torch.arange(len(scores))
    mask = top_k_mask(tensor, counts)
    assert [set(row.nonzero().flatten().tolist()) for row in mask] == [
        set(sorted(range(7), key=lambda i: (-row[i], i))[:count]) for count, row in enumerate(scores)
    ]
    assert class_top_k(tensor.unsqueeze(1).expand(-1, 3, -1), k).tolist() == [sorted(row) for row in expected]


@quick
@given(st.integers(1, 500), st.data(), seeds)
def test_even_and_random_places_are_distinct_and_ascending(n, data, seed):
    k = data.draw(st.integers(0, n))
    even, drawn = select.uniform(n, k), select.random(n, k, generator(seed))
    for places in (even, drawn):
        assert len(places) == k and torch.equal(places, places.unique())
        assert not k or 0 <= places.min() <= places.max() < n
    if k > 1:
        assert even[0] == 0 and even[-1] == n - 1
    fewer = select.random(n, k // 2, generator(seed))
    assert bool(torch.isin(fewer, drawn).all())


# Farthest first ---------------------------------------------------------------------------------------------


def exact_features(n: int, seed: int, copies: int = 0, zeros: int = 0) -> torch.Tensor:
    """Rows of length 4 with cosines that are multiples of 1/16, which every precision computes exactly."""
    random, rows = generator(seed), torch.zeros(n, 24)
    for row in rows:
        places = torch.randperm(24, generator=random)[:16]
        row[places] = torch.randint(0, 2, (16,), generator=random).float() * 2 - 1
    for _ in range(copies):
        source, target = torch.randint(0, n, (2,), generator=random)
        rows[target] = rows[source]
    rows[torch.randint(0, n, (zeros,), generator=random)] = 0
    return rows


def oracle_order(features: torch.Tensor, count: int) -> list[int]:
    """Max-min greedy, one comparison at a time; copies of a row count as nearer than anything."""
    rows = features.double()

    def distance(i: int, j: int) -> float:
        if rows[i].any() and torch.equal(rows[i], rows[j]):
            return -1.0
        return 1 - float(rows[i] @ rows[j]) / 16

    places, picked = range(len(rows)), []
    while len(picked) < count:
        against = (lambda i: picked) if picked else (lambda i: [j for j in places if j != i])
        score = {i: min((distance(i, j) for j in against(i)), default=0) for i in places if i not in picked}
        picked.append(max(score, key=lambda i: (score[i], -i)))
    return picked


@quick
@given(st.integers(1, 24), st.integers(0, 8), st.integers(0, 3), seeds)
def test_farthest_first_is_the_greedy_oracle(n, copies, zeros, seed):
    features = exact_features(n, seed, copies, zeros)
    expected = oracle_order(features, n)
    assert farthest_first(features, n).tolist() == expected
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert farthest_first(features.to(dtype), n, compute_dtype="input").tolist() == expected
    # What other devices run.
    batched = select._pick_batch(features.expand(2, -1, -1), n, torch.float32, None)
    assert batched.tolist() == [expected, expected]


@quick
@given(st.integers(1, 400), st.integers(1, 40), seeds, st.data())
def test_orders_are_nested_and_never_repeat(n, width, seed, data):
    count = data.draw(st.integers(0, n))
    features = torch.randn(n, width, generator=generator(seed))
    features[: n // 3] = features[n - n // 3 :]
    everything = farthest_first(features, n)
    assert everything.sort().values.tolist() == list(range(n))
    assert torch.equal(farthest_first(features, count), everything[:count])


@quick
@given(st.integers(2, 200), st.integers(1, 700), seeds)
def test_copies_come_last_and_the_first_of_equals_is_picked(n, width, seed):
    rows = torch.randn(n, width, generator=generator(seed))
    sources = torch.randint(0, n, (n,), generator=generator(seed))
    order = farthest_first(torch.cat([rows, rows[sources]]), 2 * n)
    if width > 1:  # in one dimension there are but two directions
        assert sorted(order[:n].tolist()) == list(range(n))
        assert order[n:].tolist() == list(range(n, 2 * n))
    assert len(set(order.tolist())) == 2 * n


@quick
@given(st.integers(1, 4), st.integers(2, 60), seeds)
def test_an_image_is_treated_alike_alone_in_a_batch_and_with_padding(batch, n, seed):
    random = generator(seed)
    images = torch.randn(batch, n, 16, generator=random)
    mask = torch.rand(batch, n, generator=random) < 0.7
    mask[:, 0] = True
    count = int(mask.sum(1).min())
    together = farthest_first(images, n)
    images_with_junk = images.masked_fill(~mask.unsqueeze(-1), torch.nan)
    masked = farthest_first(images_with_junk, count, mask=mask)
    other = select._pick_batch(images_with_junk, count, torch.float64, mask)
    for b in range(batch):
        assert torch.equal(together[b], farthest_first(images[b], n))
        places = mask[b].nonzero().flatten()
        assert torch.equal(masked[b], places[farthest_first(images[b][places], count)])
    exact = torch.stack([farthest_first(images[b].double(), n, compute_dtype="input") for b in range(batch)])
    assert torch.equal(select._pick_batch(images, n, torch.float64, None), exact)
    assert bool(mask.gather(1, other).all()) and all(len(set(row)) == count for row in other.tolist())


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_lengths_at_the_ends_of_float32_do_not_matter(scale):
    features = exact_features(50, 3, copies=5, zeros=1)
    expected = farthest_first(features, 50)
    features[::2] *= scale
    assert torch.equal(farthest_first(features, 30), expected[:30])


def test_autocast_and_fast_float32_products_do_not_change_picks():
    features = torch.randn(300, 64, generator=generator(0))
    expected = farthest_first(features, 100)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(farthest_first(features, 100), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_fast_and_plain_paths_pick_the_same():
    features = torch.randn(700, 64, generator=generator(1), requires_grad=True)
    distances = cosine_distances(features)
    torch.testing.assert_close(distances, speed.plain_distances(features.detach()), rtol=0, atol=2e-6)
    before = distances.clone()
    expected = speed.plain_farthest_order(distances, 90)
    assert torch.equal(farthest_order(distances, 90), expected)
    assert torch.equal(distances, before)
    assert torch.equal(farthest_first(features, 90), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.full((4, 3), torch.nan), 2), {}, "4 tokens hold NaN.*mask.*bfloat16"),
        ((torch.tensor([[1.0, torch.inf], [1, 2]]), 1), {}, "1 tokens hold NaN or infinity"),
        ((torch.tensor([[1e300], [1.0]], dtype=torch.float64), 1), {}, "as torch.float32"),
        ((torch.ones(4, 3), 5), {}, "5 tokens were requested; there are 4"),
        ((torch.ones(4, 3), -1), {}, "-1 tokens"),
        ((torch.ones(4, 3), 3), {"mask": torch.tensor([True, False, True, False])}, "there are 2"),
        ((torch.ones(4, 3), 3), {"mask": torch.ones(4)}, "bool"),
        ((torch.ones(4, 3, dtype=torch.long), 3), {}, "floats"),
        ((torch.ones(4), 3), {}, r"\[N, D\]"),
    ],
)
def test_features_that_cannot_be_ranked_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        farthest_first(*arguments, **options)


# Budgets and AnyRes packing ---------------------------------------------------------------------------------


@quick
@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 30)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_a_split_budget_is_spent_to_the_last_token(places, share):
    weights = torch.tensor([weight for weight, _ in places])
    capacity = torch.tensor([most for _, most in places])
    total = int(share * int(capacity.sum()))
    counts = split_budget(weights, total, capacity)
    assert counts.sum() == total and bool((counts >= 0).all()) and bool((counts <= capacity).all())
    if float(weights.sum()) > 0:
        even = weights.double() / weights.double().sum() * total
        if bool((even < capacity).all()):
            assert bool(((counts - even).abs() < 1 + 1e-6).all())


def class_rows(grid: Grid, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (2, grid.num_tiles, 4, grid.tokens_per_tile + 1)
    early, late = (2 * torch.randn(shape, generator=generator(seed))).softmax(-1)[..., 1:]
    return early, late


@quick
@given(sizes, st.floats(0, 1), st.floats(0, 1), st.sampled_from([None, 100, "mass"]), seeds)
def test_hired_with_redistribution_keeps_exactly_its_budget(size, rate, alpha, salient, seed):
    grid = anyres(size)
    early, late = class_rows(grid, seed)
    budget = min(int(grid.num_tiles * 576 * rate), int((grid.place >= 0).sum()))
    settings_ = {"rate": rate, "alpha": alpha, "salient": salient}
    chosen = hired(early, late, grid, redistribute=True, **settings_)
    mask = chosen.mask(grid)
    assert len(chosen.kept) == len(chosen.packed) == int(mask.sum()) == budget
    assert not mask[grid.separators].any()
    assert torch.equal(grid.flat[chosen.places], chosen.packed)
    assert torch.equal(chosen.places, mask.nonzero().flatten())
    loose = hired(early, late, grid, **settings_)
    assert len(loose.kept) <= int(grid.num_tiles * 576 * rate)
    assert torch.equal(loose.packed, grid.flat[loose.mask(grid)])


@quick
@given(st.sampled_from([(2, 2), (1, 3), (3, 1), (2, 1)]), st.floats(0.05, 0.95), st.floats(0, 0.9), seeds)
def test_hired_ranks_each_tile_by_itself(shape, rate, alpha, seed):
    grid = Grid.tiled(*shape, 6, 6, thumbnail="last")
    early, late = class_rows(grid, seed)
    chosen = hired(early, late, grid, rate=rate, alpha=alpha)
    score, total = late.sum(1), int(grid.num_tiles * 36 * rate)
    salient = sorted(range(36), key=lambda i: -float(early[-1].sum(0)[i]))[: int(36 * (1 - alpha))]
    weight = [0.0] * (grid.num_tiles - 1)
    for token in salient:
        weight[(token // 6 // (6 // shape[0])) * shape[1] + token % 6 // (6 // shape[1])] += 1
    whole = min(int(total * alpha), 36)
    spare = min(total - whole, len(weight) * 36)
    expected = []
    for tile, share in enumerate(weight):
        count = min(int(torch.tensor(share) / sum(weight) * spare), 36)
        expected += [tile * 36 + int(i) for i in score[tile].argsort(descending=True)[:count]]
    expected += [len(weight) * 36 + int(i) for i in score[-1].argsort(descending=True)[:whole]]
    assert chosen.kept.tolist() == sorted(expected)


def test_hired_of_one_tile_is_the_highest_of_the_late_layer():
    grid = Grid.single(24, 24)
    early, late = class_rows(grid, 0)
    chosen = hired(early, late, grid, rate=0.2)
    assert chosen.kept.tolist() == sorted(top_k(late[0].sum(0), 115).tolist())
    assert len(hired(early, late, grid, total=7).kept) == 7


@settings(deadline=None, max_examples=15)
@given(sizes, st.floats(0, 1), seeds)
def test_globalcom2_is_the_plain_loops(size, ratio, seed):
    grid = anyres(size)
    scores = torch.randn(grid.num_tiles, 576, generator=generator(seed))
    if not bool(grid.shown.any()):
        return
    packed = globalcom2(scores, grid, ratio=ratio)
    assert packed.packed.tolist() == speed.plain_globalcom2(scores, grid, ratio).tolist()
    assert torch.equal(grid.flat[packed.places], packed.packed)


@quick
@given(sizes, st.floats(0, 1), seeds)
def test_globalcom2_spends_an_exact_total_and_keeps_newlines_by_choice(size, share, seed):
    grid = anyres(size)
    scores = torch.randn(grid.num_tiles, 576, generator=generator(seed))
    total = int(share * int((grid.place >= 0).sum()))
    for newline in ("rows", "nonempty", "reference"):
        chosen = globalcom2(scores, grid, total=total, newline=newline)
        assert len(chosen.kept) == int((chosen.packed >= 0).sum()) == total
        mask = chosen.mask(grid)
        assert int(mask[~grid.separators].sum()) == total
        rows = grid.map_row.flatten()[chosen.kept[chosen.kept >= 576] - 576].unique()
        ends = {"rows": (grid.row_end >= 0).sum(), "nonempty": len(rows), "reference": grid.rows * 24}[
            newline
        ]
        assert int((chosen.packed == -1).sum()) == ends
    again = globalcom2(scores, grid, total=total)
    assert torch.equal(again.packed[again.packed >= 0].sort().values, again.kept)


def test_scores_that_do_not_fit_and_what_the_references_cannot_do_are_refused():
    grid, single = anyres((600, 600)), Grid.single(24, 24)
    early, late = class_rows(grid, 0)
    with pytest.raises(ValueError, match="P = 5 tiles"):
        hired(early[:4], late[:4], grid)
    with pytest.raises(ValueError, match="no token of the thumbnail is salient"):
        hired(early, late, grid, rate=0.9, alpha=1.0, geometry="reference")
    with pytest.raises(ValueError, match=r"Grid\.anyres"):
        hired(*class_rows(single, 0), single, geometry="reference")
    with pytest.raises(ValueError, match="total is 9999"):
        hired(early, late, grid, total=9999, redistribute=True)
    with pytest.raises(ValueError, match="thumbnail"):
        globalcom2(torch.randn(1, 576), single)
    with pytest.raises(ValueError, match="newline is 'all'"):
        globalcom2(late.sum(1), grid, newline="all")


# Folding ----------------------------------------------------------------------------------------------------


@quick
@given(st.integers(2, 30), st.data(), seeds)
def test_visionzip_is_the_oracle(tokens, data, seed):
    dominant = data.draw(st.integers(1, tokens))
    contextual = data.draw(st.integers(0, tokens - dominant))
    random = generator(seed)
    hidden, metric = torch.randn(2, 2, tokens, 5, generator=random, dtype=torch.float64)
    attention = torch.rand(2, 3, tokens, generator=random)
    folded = visionzip(hidden, attention, metric, dominant, contextual)
    for image in range(2):
        score = attention[image].sum(0)
        kept = sorted([0, *sorted(range(1, tokens), key=lambda i: -float(score[i]))[: dominant - 1]])
        assert folded.kept[image].tolist() == kept
        rest = [i for i in range(tokens) if i not in kept]
        targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
        unit = metric[image] / metric[image].norm(dim=1, keepdim=True)
        groups = {target: [] for target in targets}
        for i in (i for i in rest if i not in targets and targets):
            groups[max(targets, key=lambda t: float(unit[i] @ unit[t]))].append(hidden[image, i])
        made = [hidden[image, t] + (torch.stack(g).mean(0) if g else 0) for t, g in groups.items()]
        expected = torch.stack([*hidden[image, kept], *made])
        torch.testing.assert_close(folded.tokens[image], expected)


@quick
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), seeds)
def test_visionzip_tokens_of_all_tiles_enter_once(rows, cols, contextual, seed):
    grid = Grid.tiled(rows, cols, 3, 4, thumbnail="first")
    random = generator(seed)
    kept = torch.stack(
        [torch.randperm(12, generator=random)[:6].sort().values + 1 for _ in range(grid.num_tiles)]
    )
    kept[:, 0] = 0
    order = visionzip_order(kept, contextual, grid)
    assert order.sort().values.tolist() == list(range(grid.num_tiles * (6 + contextual)))
    patches = order[6 + contextual :][: 5 * rows * cols]
    tile, slot = patches // (6 + contextual), patches % (6 + contextual)
    index = kept[tile, slot] - 1
    raster = ((tile - 1) // cols * 3 + index // 4) * 4 * cols + (tile - 1) % cols * 4 + index % 4
    assert torch.equal(raster, raster.sort().values)


@quick
@given(st.integers(2, 50), st.booleans(), st.integers(1, 40), seeds)
def test_prumerge_is_the_oracle(tokens, plus, neighbours, seed):
    random = generator(seed)
    features, keys = torch.randn(2, tokens, 6, generator=random)
    attention = (3 * torch.randn(tokens, generator=random)).softmax(0)
    folded = prumerge(features, attention, keys, plus=plus, neighbours=neighbours)
    low, high = torch.quantile(attention, 0.25), torch.quantile(attention, 0.75)
    kept = [
        i for i in attention.argsort(descending=True).tolist() if attention[i] > high + 1.5 * (high - low)
    ]
    if plus:
        step = max(1, int(tokens / max(1, len(kept))) // 3)
        kept += [i for i in range(0, tokens - 1, step) if i not in kept]
    assert folded.kept.tolist() == kept
    unit = keys / keys.norm(dim=1, keepdim=True)
    rest = [i for i in range(tokens) if i not in kept]
    expected = []
    for i in kept:
        near = sorted((j for j in range(tokens) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[
            :neighbours
        ]
        expected.append(features[i] + (attention[near, None] * features[near]).sum(0))
    expected.append((attention[rest, None] * features[rest]).sum(0))
    torch.testing.assert_close(folded.tokens, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_folding_refuses_counts_and_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit into 9"):
        visionzip(torch.randn(1, 9, 4), torch.rand(1, 2, 9), torch.randn(1, 9, 4), 6, 4)
    with pytest.raises(ValueError, match="attention is for 8 tokens"):
        visionzip(torch.randn(1, 9, 4), torch.rand(1, 2, 8), torch.randn(1, 9, 4), 6, 2)
    with pytest.raises(ValueError, match="one image"):
        prumerge(torch.randn(1, 9, 4), torch.rand(1, 9), torch.randn(1, 9, 4))
    with pytest.raises(ValueError, match="this grid has 5 tiles"):
        visionzip_order(torch.zeros(4, 3, dtype=torch.long), 2, anyres((600, 600)))


# The benchmark ----------------------------------------------------------------------------------------------


def test_a_comparison_with_other_picks_does_not_pass():
    comparison = speed.Comparison("never", lambda: torch.tensor([1]), lambda: torch.tensor([2]))
    comparison.run(2)
    assert not comparison.equal and not comparison.passed
    assert speed.SelectionSpeed([comparison], 1).table()[0][-1] == "NO"
