"""Merging inside towers that pack images into one sequence: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Pixtral."""

import copy
import threading
from fractions import Fraction
from functools import cache, partial

import numpy as np
import pytest
import reducer_matrix as matrix
import torch
from oracles import BEFORE_5_18, checkpoint_layers, decoder
from reducer_matrix import DECODING
from tiny_vlms import FIXTURES, tiny_vlm
from vision_oracle import merged_groups

from vistok import compress
from vistok.compress import ToMe
from vistok.compress.methods.pitome import PiToMe
from vistok.compress.vision import tower as tower_host
from vistok.compress.vision.packed import spread

pytestmark = pytest.mark.slow

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3")
REDUCERS = {
    "tome": partial(ToMe, r=3),
    "tome_unweighted": partial(ToMe, r=3, prop_attn=False),
    "tome_half": partial(ToMe, keep=0.5),
    "tome_most": partial(ToMe, keep=0.15),
    "pitome": partial(PiToMe, ratio=0.8),
    "pitome_hidden": partial(PiToMe, keep=0.4, margin=0.9, metric="hidden", prop_attn=True),
    "pitome_clip": partial(PiToMe.clip, ratio=0.8, use_bsm=2),
}


@cache
def fixture(name, attention="sdpa"):
    return tiny_vlm(name, attention)


def fresh(name, attention="sdpa", dtype=torch.float32):
    """A model of the test's own, and a function that makes inputs."""
    model, _, inputs = tiny_vlm(name, attention)
    return model.to(dtype), inputs


def tower_of(model):
    return model.base_model.get_encoder(modality="image")


def encode(model, inputs, modality="image"):
    """What the model's core makes of the images or videos of its inputs."""
    names = {"image": ("pixel_values", "image_grid_thw", "image_sizes")}
    names["video"] = ("pixel_values_videos", "video_grid_thw")
    given = {name: inputs[name] for name in names[modality] if name in inputs}
    return getattr(model.base_model, f"get_{modality}_features")(**given, return_dict=True)


def features(output):
    """All that the language model gets of each image: tokens, and what deepstack adds to them."""
    items = output.pooler_output
    deepstack = getattr(output, "deepstack_features", None) or []
    if BEFORE_5_18:  # one tensor per layer
        deepstack = [layer.split([len(item) for item in items]) for layer in deepstack]
    return [torch.cat(parts, -1) for parts in zip(items, *deepstack, strict=True)]


def joined(features):
    """Features of all images [N, D], given as one tensor or as one per image."""
    return features if isinstance(features, torch.Tensor) else torch.cat(features)


# Nothing merged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*FIXTURES, "qwen2_vl", "mistral3"])
def test_merging_nothing_is_bit_identical(name, attention, decoding):
    model, _, inputs = fixture(name, attention)
    inputs, decoding = inputs(images=(2, 1, 0)), DECODING[decoding]
    logits, tokens = matrix.outputs(model, inputs, **decoding)
    for reducer in (ToMe(r=0), ToMe(keep=1.0), PiToMe(keep=1.0)):
        with compress.attach(model, reducer):
            during = matrix.outputs(model, inputs, **decoding)
        assert torch.equal(during[0], logits)
        assert torch.equal(during[1], tokens)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", PACKED)
def test_detaching_restores_the_model(name, reducer):
    model, _, inputs = fixture(name)
    inputs = inputs(images=(2, 1, 0))
    before = matrix.outputs(model, inputs)
    state = matrix.fingerprint(model)
    with compress.attach(model, REDUCERS[reducer]()):
        during = matrix.outputs(model, inputs)
    after = matrix.outputs(model, inputs)
    assert during[0].shape == before[0].shape and not torch.equal(during[0], before[0])
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert matrix.fingerprint(model) == state


# Something merged -------------------------------------------------------------------------------------------


class Stock:
    """What the blocks of a tower are called with, without anything attached."""

    def __init__(self, tower, blocks, run):
        self.calls = []
        handles = [
            block.register_forward_pre_hook(
                lambda block, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
            )
            for block in blocks
        ]
        run()
        for handle in handles:
            handle.remove()

    @property
    def x(self):
        return self.calls[0][0][0].flatten(0, -2)

    def rotary(self, block):
        return self.calls[block][1]["position_embeddings"]

    def sequences(self, block, images):
        """Which sequence each place attends to."""
        borders = self.calls[block][1].get("cu_seqlens")
        lengths = images if borders is None else borders.diff().tolist()
        return torch.repeat_interleave(torch.tensor(lengths))


def rotate(x, cos, sin):
    """Rotary embedding of [M, H, d], channel j paired with channel j + d / 2."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half].to(x.dtype), sin[:, None, :half].to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def parts_of(block):
    """norm1, attention, norm2, MLP, and queries, keys and values [M, H, d] of normed tokens."""
    if hasattr(block, "attn"):

        def project(h):
            return block.attn.qkv(h).view(len(h), 3, block.attn.num_heads, -1).unbind(1)

        return block.norm1, block.attn.proj, block.norm2, block.mlp, project
    attention = block.attention

    def project(h):
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [m(h).view(len(h), attention.num_heads, -1) for m in maps]

    return block.attention_norm, attention.o_proj, block.ffn_norm, block.feed_forward, project


def shares_of(r, lengths):
    """r by length, largest remainders first (of equal ones the first segment's)."""
    exact = [Fraction(r * length, sum(lengths)) for length in lengths]
    whole = [int(share) for share in exact]
    order = sorted(range(len(lengths)), key=lambda s: whole[s] - exact[s])
    for segment in order[: r - sum(whole)]:
        whole[segment] += 1
    return whole


def merged_states(blocks, stock, images, plan, prop_attn):
    """Full-length tokens [N, D] after each block, by loops over groups and explicit soft-maxes.

    `images` holds the lengths of each image's segments; each block merges r tokens of each image.
    """
    x, states, start = stock.x, [], 0
    segments = []  # per segment: groups as (places, the place whose position counts)
    for lengths in images:
        for length in lengths:
            segments.append([({n}, n) for n in range(start, start + length)])
            start += length
    for number, (block, r) in enumerate(zip(blocks, plan, strict=True)):
        norm1, proj, norm2, mlp, project = parts_of(block)
        groups = [group for segment in segments for group in segment]
        places = torch.tensor([place for _, place in groups])
        size = torch.tensor([float(len(members)) for members, _ in groups], dtype=x.dtype)
        query, key, value = project(norm1(x))
        cos, sin = (part[places] for part in stock.rotary(number))
        logits = torch.einsum("nhd,mhd->hnm", rotate(query, cos, sin), rotate(key, cos, sin))
        weights = torch.exp(logits * query.shape[-1] ** -0.5) * (size if prop_attn else 1)
        sequence = stock.sequences(number, [sum(lengths) for lengths in images])[places]
        weights = weights * (sequence[:, None] == sequence)
        weights = weights / weights.sum(-1, keepdim=True)
        x = x + proj(torch.einsum("hnm,mhd->nhd", weights, value).flatten(1))
        metric, vectors, merged, first, segment = key.mean(1), [], [], 0, 0
        for lengths in images:
            own = segments[segment : segment + len(lengths)]
            segment += len(lengths)
            for groups, share in zip(own, shares_of(r, [len(groups) for groups in own]), strict=True):
                rows = range(first, first + len(groups))
                together = []
                for chosen in merged_groups(metric[list(rows)], share):
                    sizes = size[[first + g for g in sorted(chosen)]]
                    vectors.append(sizes @ x[[first + g for g in sorted(chosen)]] / sizes.sum())
                    odd = [g for g in chosen if g % 2] or list(chosen)
                    members = set().union(*(groups[g][0] for g in chosen))
                    together.append((members, groups[odd[0]][1]))
                merged.append(together)
                first += len(groups)
        x, segments = torch.stack(vectors), merged
        x = x + mlp(norm2(x))
        full = x.new_empty(start, x.shape[1])
        for vector, (members, _) in zip(x, (g for s in segments for g in s), strict=True):
            full[sorted(members)] = vector
        states.append(full)
    return states


CASES = [*PACKED, "qwen2_5_vl_whole_first"]


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tome_equals_explicit_softmaxes_and_loops(name, attention, prop_attn):
    model, inputs = fresh(name.removesuffix("_whole_first"), attention, torch.float64)
    inputs = inputs(images=(2, 1))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    tower = tower_of(model)
    if name.endswith("first"):
        tower.fullatt_block_indexes = [0, 2]
    blocks = tower.transformer.layers if name == "mistral3" else tower.blocks
    stock = Stock(tower, blocks, lambda: encode(model, inputs))
    if name == "mistral3":
        images = [[h // 14 * (w // 14)] for h, w in inputs["image_sizes"].tolist()]
    elif "qwen2_5" in name:  # windows of 4 × 4 patches
        images = [
            [(min(4, h - y)) * min(4, w - x) for y in range(0, h, 4) for x in range(0, w, 4)]
            for _, h, w in inputs["image_grid_thw"].tolist()
        ]
    else:
        images = [[h * w] for _, h, w in inputs["image_grid_thw"].tolist()]
    plan = [5, 3, 4]
    states = merged_states(blocks, stock, images, plan, prop_attn)
    merging = tower_host.install(tower, ToMe(r=plan, prop_attn=prop_attn))
    output = encode(model, inputs)
    assert merging.trace.tokens == [sum(map(sum, images)) - 3 * n for n in (5, 8, 12)]
    assert merging.trace.images == images
    merging.remove()
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(output.last_hidden_state.view_as(states[-1]), states[-1])
    if name == "mistral3":
        pooled = model.base_model.multi_modal_projector(states[-1], inputs["image_sizes"])
    else:
        pooled = tower.merger(states[-1])
        if "qwen2_5" in name:
            windows = window_order(tower, inputs["image_grid_thw"])
            pooled = pooled[windows.argsort()]
    close(torch.cat(output.pooler_output), pooled)
    for level, block in enumerate(getattr(tower, "deepstack_visual_indexes", [])):
        expected = tower.deepstack_merger_list[level](states[block])
        close(joined(output.deepstack_features[level]), expected)


def window_order(tower, grids):
    """The original unit at each place of a windowed sequence, by loops: 2 × 2 units a window."""
    order, first = [], 0
    for _, height, width in (grids // torch.tensor([1, 2, 2])).tolist():
        order += [
            first + y * width + x
            for top in range(0, height, 2)
            for left in range(0, width, 2)
            for y in range(top, min(top + 2, height))
            for x in range(left, min(left + 2, width))
        ]
        first += height * width
    return torch.tensor(order)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_features_leave_at_full_length_with_one_vector_a_group(name, reducer):
    model, inputs = fresh(name)
    inputs = inputs(images=(2, 1))
    before = encode(model, inputs)
    merging = tower_host.install(tower_of(model), REDUCERS[reducer]())
    output = encode(model, inputs)
    trace = merging.trace
    assert [len(item) for item in output.pooler_output] == [len(item) for item in before.pooler_output]
    assert output.last_hidden_state.shape == before.last_hidden_state.shape
    hidden, groups = output.last_hidden_state.flatten(0, -2), trace.groups()[0]
    assert len(hidden.unique(dim=0)) == trace.tokens[-1] == len(groups.unique()) < trace.num_tokens
    for group in groups.unique():
        members = hidden[groups == group]
        assert torch.equal(members, members[:1].expand_as(members))
    assert torch.equal(trace.size[0, :, 0].long(), groups.bincount())
    segment = torch.repeat_interleave(torch.tensor([n for image in trace.images for n in image]))
    assert all(len(segment[groups == group].unique()) == 1 for group in groups.unique())


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.5, 0.3, 0.15, 5, 20])
@pytest.mark.parametrize("method", [ToMe, PiToMe])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "mistral3"])
@torch.no_grad()
def test_keep_is_the_number_of_patches_of_each_image_at_the_exit(name, method, keep):
    model, inputs = fresh(name)
    if keep == 20 and name == "qwen3_vl":
        keep = 16
    merging = tower_host.install(tower_of(model), method(), keep=keep)
    inputs = inputs(images=(2, 1))
    fewest = [sum(-(-n // 8) for n in image) for image in shapes_of(name, inputs)]
    if isinstance(keep, int) and keep < max(fewest):
        with pytest.raises(ValueError, match=f"{method.__name__}.* cannot leave {keep} of .* at most half"):
            encode(model, inputs)
        return
    encode(model, inputs)
    groups = merging.trace.groups()[0].split([sum(image) for image in merging.trace.images])
    for own in groups:
        assert len(own.unique()) == (keep if isinstance(keep, int) else round(keep * len(own)))


def shapes_of(name, inputs):
    if name == "mistral3":
        return [[h // 14 * (w // 14)] for h, w in inputs["image_sizes"].tolist()]
    grids = inputs["image_grid_thw"].tolist()
    side = 4 if name == "qwen2_5_vl" else 1000
    return [
        [(min(side, h - y)) * min(side, w - x) for y in range(0, h, side) for x in range(0, w, side)]
        for _, h, w in grids
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(name, reducer, attention):
    model, _, inputs = fixture(name, attention)
    with compress.attach(model, REDUCERS[reducer]()):
        together = features(encode(model, inputs(images=(1, 1, 1))))
        for row in range(3):
            alone = features(encode(model, inputs(images=(1, 1, 1), rows=(row,))))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_frames_of_a_video_merge_apart(name):
    model, _, inputs = fixture(name)
    inputs = inputs(videos=(1, 0))
    with compress.attach(model, ToMe(keep=0.4)) as session:
        made = encode(model, inputs, "video")
        trace = session.merging.trace
        total = sum(map(sum, trace.images))
        assert trace.tokens[-1] == sum(round(0.4 * sum(image)) for image in trace.images) < total
        assert len(trace.images) == len(inputs["video_grid_thw"])
        assert model(**inputs).logits.isfinite().all()
    assert len(torch.cat(made.pooler_output)) * 4 == total


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_fewer_tokens_are_computed(name):
    model, inputs = fresh(name)
    tower, seen = tower_of(model), []
    blocks = tower.transformer.layers if name == "mistral3" else tower.blocks
    merging = tower_host.install(tower, ToMe(r=4))
    for block in blocks:
        for part in ("attn", "attention", "mlp", "feed_forward"):
            if hasattr(block, part):
                getattr(block, part).register_forward_pre_hook(
                    lambda module, args, kwargs: seen.append(
                        (args or (kwargs["hidden_states"],))[0].shape[-2]
                    ),
                    with_kwargs=True,
                )
    encode(model, inputs(images=(1, 1)))
    n = merging.trace.num_tokens
    assert seen == [n, n - 8, n - 8, n - 16, n - 16, n - 24]


# In a session -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_groups_are_told_in_the_order_in_which_patches_enter(name):
    model, inputs = fresh(name)
    inputs = inputs(images=(2, 2))
    merging = tower_host.install(tower_of(model), ToMe(r=3))
    hidden = encode(model, inputs).last_hidden_state.flatten(0, -2)
    if name == "qwen2_5_vl":
        order = window_order(tower_of(model), inputs["image_grid_thw"])[:, None] * 4 + torch.arange(4)
        hidden = hidden[order.flatten().argsort()]
        assert not torch.equal(merging.trace.patch_groups(), merging.trace.groups())
    groups = merging.trace.patch_groups()[0]
    assert torch.equal(groups[:, None] == groups, (hidden[:, None] == hidden).all(-1))


@torch.no_grad()
def test_groups_of_qwen3_hold_for_its_deepstack_features():
    model, inputs = fresh("qwen3_vl")
    inputs, tower = inputs(images=(2, 1)), tower_of(model)
    merging = tower_host.install(tower, ToMe(r=3))
    output = tower(inputs["pixel_values"], inputs["image_grid_thw"], output_hidden_states=True)
    first, last = (output.hidden_states[layer] for layer in (1, 3))
    groups = merging.trace.exit_groups()[0]
    assert torch.equal(groups[:, None] == groups, (first[:, None] == first).all(-1))
    assert not torch.equal(groups[:, None] == groups, (last[:, None] == last).all(-1))


@pytest.mark.parametrize("name", PACKED)
def test_the_patches_behind_a_token_are_those_it_is_made_of(name):
    model, inputs = fresh(name)
    inputs, seen = inputs(images=(2, 1)), []
    head = model.base_model.multi_modal_projector if name == "mistral3" else tower_of(model).merger

    def keep(module, args):
        seen.append(args[0].detach().requires_grad_())
        return seen[0], *args[1:]

    with compress.attach(model, ToMe(r=2)) as session:
        with torch.no_grad():
            model(**inputs)
        handle = head.register_forward_pre_hook(keep)
        output = encode(model, inputs)
        pooled = output.pooler_output
        handle.remove()
        for span in session._hooks.last.prompt.spans:
            span.record = output.vistok_record
            span.record.groups = torch.arange(len(seen[0]))[None]  # every patch on its own
            for number, patches in enumerate(session._hooks._features.token_groups(span).tolist()):
                token = pooled[span.item][number].square().sum()
                (support,) = torch.autograd.grad(token, seen[0], retain_graph=True)
                found = support.abs().sum(-1).nonzero().flatten()
                if name == "qwen2_5_vl":
                    units = window_order(tower_of(model), inputs["image_grid_thw"])
                    found = units[found // 4] * 4 + found % 4
                assert sorted(patches) == sorted(found.tolist())


@pytest.mark.parametrize("batch", [(1,), (2, 1, 0), (3, 3, 3)])
@pytest.mark.parametrize("keep", [0.5, 0.3, 0.15, 0.13])
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_the_language_model_gets_one_token_for_those_that_became_equal(name, keep, batch):
    model, _, inputs = fixture(name)
    inputs = inputs(images=batch)
    with compress.attach(model, ToMe(keep=keep)) as session:
        made = features(encode(model, inputs))
        logits = model(**inputs).logits
        explained = session.explain(0)
    assert logits.isfinite().all()
    for tokens, explanation in zip(made, explained, strict=True):
        near = torch.cdist(tokens.double(), tokens.double()) < 1e-4
        first = [n for n in range(len(tokens)) if not near[n, :n].any()]
        assert explanation.tokens.tolist() == first
    if keep == 0.15 and name in ("qwen2_5_vl", "qwen2_vl") and len(batch) > 1:
        assert sum(len(e.tokens) for e in explained) < sum(map(len, made))


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_tokens_of_a_plain_picture_that_became_equal_are_merged(name):
    model, _, inputs = fixture(name)
    inputs = inputs(images=(1, 1))
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"])
    with compress.attach(model, ToMe(keep=0.15)) as session:
        made = features(encode(model, inputs))
        model(**inputs)
        for tokens, explanation in zip(made, session.explain(0), strict=True):
            kept = tokens[explanation.tokens]
            assert torch.cdist(tokens, kept).amin(1).max() < 1e-3  # nothing is lost
            assert len(kept) <= len(tokens)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_language_model_runs_on_fewer_tokens(name):
    model, _, inputs = fixture(name)
    inputs, lengths = inputs(images=(1,)), []
    handle = None
    with compress.attach(model, ToMe(keep=0.25 if name == "llava" else 0.15)) as session:
        handle = decoder(model).register_forward_pre_hook(
            lambda lm, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        kept = session.explain(0)[0]
    handle.remove()
    full = inputs["input_ids"].shape[1]
    assert lengths == [full - kept.num_tokens + len(kept.tokens), 1, 1]
    assert len(kept.tokens) < kept.num_tokens and tokens.shape[1] == full + 3
    if name == "llava":
        assert len(kept.tokens) == 4


# What else must hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_borders_computed_by_the_caller_are_used(name):
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

    model, inputs = fresh(name)
    inputs, tower = inputs(images=(2,)), tower_of(model)
    grids = inputs["image_grid_thw"]
    merging = tower_host.install(tower, ToMe(keep=0.5))
    expected = tower(inputs["pixel_values"], grids).pooler_output
    given = {"cu_seqlens": get_vision_cu_seqlens(grids)}
    if name == "qwen2_5_vl":
        windows = get_vision_window_index(grids, 2, tower.window_size, tower.patch_size)
        given |= dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True))
    assert torch.equal(tower(inputs["pixel_values"], grid_thw=grids, **given).pooler_output, expected)
    as_tuple = tower(inputs["pixel_values"], grids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], expected)
    merging.remove()


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_hidden_states_leave_at_full_length(name):
    model, inputs = fresh(name)
    inputs, tower = inputs(images=(2,)), tower_of(model)
    arguments = (inputs["pixel_values"], inputs.get("image_grid_thw", inputs.get("image_sizes")))
    merging = tower_host.install(tower, ToMe(r=3))
    output = tower(*arguments, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for layer, state in enumerate(output.hidden_states):
        assert state.shape == output.last_hidden_state.shape
        distinct = merging.trace.tokens[layer - 1] if layer else merging.trace.num_tokens
        assert len(state.flatten(0, -2).unique(dim=0)) == distinct
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("place", ["norm", "attention", "output"])
@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind(name, place):
    model, inputs = fresh(name)
    inputs = inputs(images=(2, 1))
    before = features(encode(model, inputs))
    merging = tower_host.install(tower_of(model), ToMe(r=3))
    merged = features(encode(model, inputs))

    def fail(module, args):
        raise KeyboardInterrupt

    tower = tower_of(model)
    block = (tower.transformer.layers if name == "mistral3" else tower.blocks)[2]
    parts = {"norm": ("norm2", "ffn_norm"), "attention": ("attn.qkv", "attention.k_proj")}
    parts["output"] = ("attn.proj", "attention.o_proj")
    module = block.get_submodule(parts[place][name == "mistral3"])
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        encode(model, inputs)
    assert merging.trace is None and merging.running is None
    handle.remove()
    assert all(map(torch.equal, features(encode(model, inputs)), merged))
    merging.remove()
    assert all(map(torch.equal, features(encode(model, inputs)), before))


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_two_threads_get_what_one_gets(name):
    model, inputs = fresh(name)
    batches = [inputs(images=(1, 1, 1, 1), rows=rows) for rows in ((0,), (1, 2), (3,), (2, 0), (1,), (3, 1))]
    merging = tower_host.install(tower_of(model), ToMe(keep=0.4))
    expected = [(features(encode(model, batch)), merging.trace.patch_groups()) for batch in batches]
    results = {}

    def work(first):
        with torch.no_grad():
            for turn in range(4):
                for number in range(first, len(batches), 2):
                    made = features(encode(model, batches[number]))
                    results[turn, number] = made, merging.trace.patch_groups()

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    for (_, number), (made, groups) in results.items():
        assert all(map(torch.equal, made, expected[number][0])) and torch.equal(groups, expected[number][1])


@pytest.mark.parametrize("name", PACKED)
def test_gradients_flow(name):
    model, inputs = fresh(name)
    model.train()
    tower_host.install(tower_of(model), ToMe(r=3))
    sum(tokens.square().sum() for tokens in features(encode(model, inputs(images=(1, 1))))).backward()
    used = [p for n, p in tower_of(model).named_parameters()]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in used)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_bfloat16_stays_close(name):
    model, inputs = fresh(name)
    inputs = inputs(images=(1,))
    merging = tower_host.install(tower_of(model), ToMe(r=2))
    full = features(encode(model, inputs))[0]
    model.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    half = features(encode(model, inputs))[0]
    assert half.dtype == torch.bfloat16 and merging.trace.size.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half.float(), full, dim=-1).mean() > 0.9


@torch.no_grad()
def test_what_cannot_work_is_refused_by_name():
    model, inputs = fresh("qwen2_5_vl")
    inputs, tower = inputs(images=(2,)), tower_of(model)
    with pytest.raises(ValueError, match="cannot be a function"):
        tower_host.install(tower, ToMe(keep=lambda image: 3))
    merging = tower_host.install(tower, ToMe(r=2))
    with pytest.raises(ValueError, match="already has a forward"):
        tower_host.install(tower, PiToMe())
    with pytest.raises(RuntimeError, match="block 0 was called on its own"):
        tower.blocks[0](torch.zeros(4, 48))
    model.train()
    checkpoint_layers(model, True)
    with torch.enable_grad(), pytest.raises(ValueError, match="recompute"):
        encode(model, inputs)
    checkpoint_layers(model, False)
    model.eval()
    merging.remove()
    pixtral, inputs = fresh("mistral3")
    tower, inputs = tower_of(pixtral), inputs(images=(1,))
    tower_host.install(tower, ToMe(r=2))
    with pytest.raises(ValueError, match="patches entered the tower, but the grids describe"):
        tower(inputs["pixel_values"], inputs["image_sizes"] + 140)
    second = tower.transformer.layers[1].attention
    second.config = copy.deepcopy(second.config)
    second.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="prop_attn=False"):
        encode(pixtral, inputs)


# Plans ------------------------------------------------------------------------------------------------------


def test_what_a_block_merges_is_spread_by_length():
    assert spread([6, 3], [32, 16, 16]).tolist() == [[3, 2, 1], [1, 1, 1]]
    assert spread([4, 4], [16, 16, 16, 16]).tolist() == [[1] * 4, [1] * 4]
    assert spread([2, 2], [16, 16, 16, 16]).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]  # no segment twice
    assert spread([9, 9], [3, 3, 3, 12]).tolist() == [[1, 1, 1, 6], [1, 1, 1, 3]]
    assert spread([5, 0, 2], [20]).tolist() == [[5], [0], [2]]


def test_every_budget_that_segments_allow_is_met():
    random = np.random.RandomState(0)
    for _ in range(300):
        lengths = random.randint(1, 40, random.randint(1, 12)).tolist()
        depth, total = int(random.randint(1, 7)), sum(lengths)
        fewest = sum(-(-n // 2**depth) for n in lengths)
        keep = int(random.randint(fewest, total + 1))
        for method in (ToMe(), PiToMe()):
            plan = [*method.plan(depth, total, 0, keep), 0]
            merged = spread(plan, lengths, depth)
            left = np.array(lengths)
            for row in merged:
                assert (row >= 0).all() and (row <= left // 2).all()
                left = left - row
            assert left.sum() == keep and merged.shape == (depth + 1, len(lengths))
            if len(lengths) == 1:
                assert merged[:, 0].tolist() == plan
        for row, r in zip(spread(plan, lengths), plan, strict=True):
            assert row.sum() <= r
