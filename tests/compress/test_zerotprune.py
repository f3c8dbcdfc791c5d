"""Zero-TPrune: its graph of attention, its stages, and dropping patches in the towers of whole models."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress.algorithms.page_rank import (
    filtered_heads,
    head_mean,
    page_rank,
    prune_similar,
    pruned_matching,
    subgraph,
    without,
)
from vistok.compress.methods.divprune import DivPrune
from vistok.compress.methods.zerotprune import ZeroTPrune
from vistok.compress.reducer import TowerAttention
from vistok.compress.report.accounting import vit_block_macs
from vistok.compress.vision import tower as tower_host

seeds = st.integers(0, 2**31 - 1)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=48,
    patch_size=8,
)


def graphs(seed, batch=2, heads=3, tokens=12):
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, heads, tokens, tokens, generator=random)).softmax(-1)


# Algorithms -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seeds, st.booleans())
def test_many_iterations_end_at_the_stationary_distribution(seed, class_token):
    attention = graphs(seed).double()
    attention = attention + 0.3 / 12  # or some graphs would take very long
    attention = attention / attention.sum(-1, keepdim=True)
    scores = page_rank(attention, 400, class_token=class_token)
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]))
    values, vectors = torch.linalg.eig(attention.transpose(-1, -2))
    first = (values - 1).abs().argmin(-1)
    stationary = vectors.gather(-1, first[..., None, None].expand(*first.shape, 12, 1))[..., 0].real
    torch.testing.assert_close(scores, stationary / stationary.sum(-1, keepdim=True), rtol=1e-6, atol=1e-9)


def test_iterations_end_early_once_scores_stand_still():
    attention = graphs(0)
    assert torch.equal(page_rank(attention, 50, epsilon=1.0), page_rank(attention, 1))
    torch.testing.assert_close(page_rank(attention, 500, epsilon=1e-9), page_rank(attention, 500))


def test_the_class_token_starts_as_high_as_the_root_of_all():
    everyone_to_themselves = torch.eye(16).expand(1, 1, -1, -1)
    scores = page_rank(everyone_to_themselves, 3, class_token=True)[0, 0]
    torch.testing.assert_close(scores / scores[1], torch.tensor([4.0] + [1.0] * 15))


def test_heads_that_vary_too_little_or_too_much_do_not_count_unless_all_do():
    flat, medium, sharp = (
        torch.ones(8) / 8,
        torch.tensor([2.0] + [1.0] * 7),
        torch.tensor([100.0] + [1.0] * 7),
    )
    scores = torch.stack([flat, medium / medium.sum(), sharp / sharp.sum()])[None]
    assert filtered_heads(scores, 0.01, 0.7).tolist() == [[False, True, False]]
    assert filtered_heads(scores[:, ::2], 0.01, 0.7).tolist() == [[True, True]]
    torch.testing.assert_close(head_mean(scores, filtered_heads(scores, 0.01, 0.7)), scores[:, 1])


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 15), st.integers(0, 9), st.integers(0, 2))
def test_similar_tokens_of_the_less_important_half_go(seed, tokens, r, protected):
    random = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, protected + tokens, generator=random)
    metric = torch.randn(2, protected + tokens, 5, generator=random)
    stage = prune_similar(importance, metric, r, protected)
    assert stage.pruned.shape == (2, min(r, tokens // 2))
    for image in range(2):
        more, less = stage.more[image].tolist(), stage.less[image].tolist()
        assert sorted(more + less) == list(range(protected, protected + tokens)) and len(less) == tokens // 2
        assert not less or importance[image, more].min() >= importance[image, less].max()
        unit = metric[image] / metric[image].norm(dim=-1, keepdim=True)
        best = {a: max(float(unit[a] @ unit[b]) for b in more) for a in less}
        gone = stage.pruned[image].tolist()
        assert set(gone) <= set(less)
        rest = [best[a] for a in less if a not in gone]
        assert not gone or not rest or min(best[a] for a in gone) >= max(rest) - 1e-6


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(2, 10), st.integers(0, 2))
def test_dropped_tokens_point_at_the_most_similar_one_left(seed, tokens, protected):
    random = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, protected + tokens, 5, generator=random)
    order = torch.rand(2, tokens, generator=random).argsort(-1) + protected
    dropped = order[:, : tokens // 2]
    kept = without(protected + tokens, dropped)
    matching = pruned_matching(metric, kept, protected)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    for image in range(2):
        assert sorted(kept[image].tolist() + dropped[image].tolist()) == list(range(protected + tokens))
        for place, new in zip(matching.source[image], matching.destination[image], strict=True):
            products = unit[image, place] @ unit[image, kept[image, protected:]].T
            assert int(new) == protected + int(products.argmax())
    x = torch.randn(2, protected + tokens, 3, generator=random)
    assert torch.equal(matching.merge(x, "prune"), x.gather(1, kept[..., None].expand(-1, -1, 3)))


def test_rows_of_a_part_of_the_graph_sum_to_one():
    attention = graphs(1)
    kept = torch.tensor([[0, 3, 7], [1, 2, 11]])
    part = subgraph(attention, kept)
    expected = attention[1, :, [1, 2, 11]][:, :, [1, 2, 11]]
    torch.testing.assert_close(part[1], expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close(part.sum(-1), torch.ones(2, 3, 3))


# The method -------------------------------------------------------------------------------------------------


def test_the_defaults_spare_about_a_third_of_deit_small():
    plan = ZeroTPrune().plan(12, 196, 1, None)
    left, macs = 197, []
    for r in plan:
        macs.append(vit_block_macs(left, 384))
        left -= r
    assert 0.32 < 1 - sum(macs) / (12 * vit_block_macs(197, 384)) < 0.38
    assert [block for block, r in enumerate(plan) if r] == [1, 3, 6, 9] and plan[1] == 10 + 28


@pytest.mark.parametrize("keep", [1, 5, 36, 100, 196])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 12, 23, 24])
def test_every_budget_is_met_in_towers_of_every_depth(num_blocks, keep):
    plan = ZeroTPrune().plan(num_blocks, 196, 1, keep)
    assert sum(plan) == 196 - keep and min(plan) >= 0 and len(plan) == num_blocks
    assert keep == 196 or sum(map(bool, plan)) == min(4, num_blocks)


def test_rates_belong_to_their_layers():
    reducer = ZeroTPrune(layers=(0, 6), retention=(0.5, 1.0), r=0)
    assert reducer.plan(12, 100, 1, None) == [50] + [0] * 11
    assert ZeroTPrune(layers=(0, 6), retention=(1.0, 0.5), r=4).plan(4, 100, 1, None) == [4, 0, 50, 0]


def test_more_iterations_decide_in_the_first_blocks():
    attention = TowerAttention(graphs(3, batch=1, tokens=30), class_token=True)
    metric = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(0))
    same = ZeroTPrune(r=2, iterations=(30, 30, 30))
    reducer = ZeroTPrune(r=2, iterations=(30, 5, 1))
    kept = [reducer.match(block, 12, metric, 15, 1, attention=attention).kept for block in (0, 5, 11)]
    assert torch.equal(kept[0], same.match(7, 12, metric, 15, 1, attention=attention).kept)
    assert not torch.equal(kept[0], kept[2])
    uniform = ZeroTPrune(r=2, iterations=(1, 1, 1), uniform=True)
    assert not torch.equal(kept[2], uniform.match(0, 12, metric, 15, 1, attention=attention).kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layers=()), "ascending"),
        (dict(layers=(3, 1)), "ascending"),
        (dict(layers=(12,)), "blocks from 0 to 11"),
        (dict(retention=0.0), r"share in \(0, 1\]"),
        (dict(retention=(0.5, 0.5)), "2 rates and layers 4 blocks"),
        (dict(r=-1), "0 or more"),
        (dict(iterations=(1, 1)), "three numbers"),
        (dict(iterations=(0, 1, 1)), "three numbers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroTPrune(**settings)


def test_matching_needs_the_attention():
    with pytest.raises(ValueError, match="give match that attention"):
        ZeroTPrune().match(0, 12, torch.randn(1, 9, 4), 3, 1)


@pytest.mark.parametrize("count", [1, 7, 20, 33])
def test_selecting_without_a_tower_keeps_exactly_the_count(count):
    features = torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
    mask = ZeroTPrune().select(features, None, count)
    assert mask.shape == (33,) and int(mask.sum()) == count
    attention = graphs(2, batch=1, tokens=33)[0]
    assert int(ZeroTPrune().select(features, None, count, attention).sum()) == count
    if count == 20:
        assert not torch.equal(mask, ZeroTPrune().select(features, None, count, attention))


# Towers and models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_a_tower_keeps_length_and_shows_the_most_similar_patch_in_dropped_places(kernel):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**VISION, initializer_factor=10.0)
    model = transformers.CLIPVisionModel(config).eval()
    model.set_attn_implementation(kernel)
    images = torch.randn(2, 3, 48, 48)
    before = model(images, output_hidden_states=True)
    merging = tower_host.install(model, ZeroTPrune(r=2), keep=9)
    after = model(images, output_hidden_states=True)
    trace = merging.trace
    assert after.last_hidden_state.shape == before.last_hidden_state.shape
    groups, left = trace.patch_groups(), trace.patches_left()
    assert left.sum(1).tolist() == [9, 9] and int(groups.max()) == 8
    for image in range(2):
        own = left[image].nonzero().flatten()
        assert torch.equal(groups[image, own], torch.arange(9))
        patches = after.last_hidden_state[image, 1:]
        assert torch.equal(patches, patches[own][groups[image]])
    first = next(block for block, r in enumerate(trace.plan) if r)
    for layer in range(first + 1):  # states before the first drop
        assert torch.equal(after.hidden_states[layer], before.hidden_states[layer])
    merging.remove()
    assert model.config._attn_implementation == kernel
    assert torch.equal(model(images).last_hidden_state, before.last_hidden_state)


@torch.no_grad()
def test_a_pooling_head_pools_over_the_patches_that_are_left():
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
    images = torch.randn(2, 3, 48, 48)
    merging = tower_host.install(model, ZeroTPrune(r=2), keep=9, unmerge=False)
    output = model(images)
    assert output.last_hidden_state.shape[1] == 9 and not merging.class_token
    assert torch.equal(output.pooler_output, model.head(output.last_hidden_state))


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@torch.no_grad()
def test_kept_tokens_are_the_patches_left_at_their_own_positions(name):
    model, _, inputs = tiny_vlm(name)
    batch = inputs(images=(2, 1, 0))
    positions = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    with compress.attach(model, ZeroTPrune(r=2), keep=0.5) as session:
        model(**batch)
        left, explanations = session.merging.trace.patches_left(), session.explain()
        spans = session._hooks.last.prompt.spans
    handle.remove()
    assert len(explanations) == len(spans) == 3
    tile, kept_places = 0, [[], [], []]
    for span, each in zip(spans, explanations, strict=True):
        tiles = left[tile : tile + span.grid.num_tiles]
        tile += span.grid.num_tiles
        separators = span.grid.tile < 0
        expected = tiles[span.grid.tile.clamp_min(0), span.grid.index.clamp_min(0)] | separators
        assert each.tokens.tolist() == expected.nonzero().flatten().tolist()
        assert 0 < len(each.tokens) < each.num_tokens
        kept_places[span.row] += span.places[expected].tolist()
    # The positions of the prompt without the dropped tokens, each where it was.
    images = batch["input_ids"] == model.config.image_token_id
    numbered = torch.arange(images.shape[1]).expand_as(images)
    for row, places in enumerate(kept_places):
        stays = batch["attention_mask"][row].bool() & ~images[row]
        stays[places] = True
        expected = numbered[row][stays]
        assert torch.equal(positions[0].expand(3, -1)[row, -len(expected) :], expected)


@torch.no_grad()
def test_a_reducer_of_features_may_follow():
    model, _, inputs = tiny_vlm("llava")
    batch = inputs()
    with compress.attach(model, [ZeroTPrune(keep=0.5, r=2), DivPrune(keep=3)]) as session:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        left = session.merging.trace.patches_left()
        for image, each in zip(left, session.explain(), strict=True):
            assert len(each.tokens) == 3 and bool(image[each.tokens].all())


@torch.no_grad()
def test_packed_towers_rank_each_segment_by_the_attention_within_it():
    model, _, inputs = tiny_vlm("qwen2_5_vl")
    batch = inputs(images=(2, 1, 0))
    before = model(**batch).logits
    with compress.attach(model, ZeroTPrune(r=1), keep=0.5) as session:
        together = model(**batch).logits
        trace = session.merging.trace
        left, tower = trace.patches_left(), trace.images
        alone = model(**inputs(images=(2, 1, 0), rows=(1,))).logits
        assert torch.equal(session.merging.trace.patches_left()[0], left[0, -sum(tower[2]) :])
    assert together.shape == before.shape and alone.shape[0] == 1
    assert int(left.sum()) == sum(round(sum(image) / 2) for image in tower)
    assert torch.equal(model(**batch).logits, before)
