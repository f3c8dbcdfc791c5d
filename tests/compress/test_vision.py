"""Merging inside vision transformers: timm models and the towers of vision-language models."""

import copy
import inspect
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from oracles import BEFORE_5_18
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionTransformer
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionTransformer
from vision_oracle import timm_attend, timm_feed, tome_forward

from vistok.compress.algorithms.grid import Grid
from vistok.compress.methods.pitome import PiToMe
from vistok.compress.methods.tome import ToMe
from vistok.compress.vision import timm as timm_host
from vistok.compress.vision import tower as tower_host

pytestmark = pytest.mark.slow

TINY = dict(img_size=48, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=7)
MODELS = {
    "vit": partial(VisionTransformer, **TINY),
    "distilled": partial(VisionTransformerDistilled, **TINY),
    "registers": partial(VisionTransformer, **TINY, reg_tokens=4, init_values=0.5, no_embed_class=True),
    "qk_norm": partial(VisionTransformer, **TINY, qk_norm=True, drop_path_rate=0.1),
    "mae": partial(VisionTransformer, **TINY, global_pool="avg"),
    "no_class": partial(VisionTransformer, **TINY, global_pool="avg", class_token=False, fc_norm=False),
    "siglip": partial(VisionTransformer, **TINY, global_pool="map", class_token=False),
}
REDUCERS = {
    "tome": partial(ToMe, r=5),
    "tome_unweighted": partial(ToMe, r=5, prop_attn=False),
    "tome_decreasing": partial(ToMe, r=(4, -1.0)),
    "tome_half": partial(ToMe, keep=0.5),
    "pitome": partial(PiToMe, ratio=0.9),
    "pitome_hidden": partial(PiToMe, keep=12, margin=0.9, metric="hidden", prop_attn=True),
    "pitome_clip": partial(PiToMe.clip, ratio=0.9, use_bsm=2),
}

VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=48,
    patch_size=8,
)


def _internvl(**settings):
    config = transformers.InternVLVisionConfig(**VISION, use_qk_norm=True, **settings)
    return transformers.InternVLVisionModel(config)


TOWERS = {
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    "idefics3": lambda: Idefics3VisionTransformer(Idefics3VisionConfig(**VISION)),
    "smolvlm": lambda: SmolVLMVisionTransformer(SmolVLMVisionConfig(**VISION)),
    "internvl": _internvl,
}


def filled(module):
    """Every weight drawn, so that no two tokens are alike and no bias or scale is idle."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=random)
            weight.copy_(noise * 1.2 / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight + 0.1 * noise)
    return module.eval()


def vit(name="vit", dtype=torch.float32):
    return filled(MODELS[name]()).to(dtype)


def tower(name="clip", dtype=torch.float32):
    return filled(TOWERS[name]()).to(dtype)


def pictures(batch=2, size=48, seed=0, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leftovers(model):
    """Whatever of an attached reducer is still in the model."""
    names = ("forward", "forward_features", "forward_intermediates", "pool")
    return [
        (path, name)
        for path, module in model.named_modules()
        for name in names
        if callable(vars(module).get(name)) or module._forward_pre_hooks
    ]


# timm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reducer", REDUCERS)
@torch.no_grad()
def test_every_reducer_runs_in_every_model_and_leaves_no_trace(name, reducer):
    model, images = vit(name), pictures()
    before, hooks = model(images), [len(m._forward_hooks) for m in model.modules()]
    merging = timm_host.install(model, REDUCERS[reducer]())
    merged = model(images)
    trace = merging.trace
    prefix = model.num_prefix_tokens
    assert merged.shape == before.shape and not torch.equal(merged, before)
    assert trace.tokens == [36 + prefix - sum(trace.plan[: i + 1]) for i in range(4)]
    assert torch.equal(trace.groups()[:, :prefix], torch.arange(prefix).expand(2, -1))
    counted = torch.stack([row.bincount() for row in trace.groups()])
    assert torch.equal(trace.size[..., 0].long(), counted)
    assert torch.equal(trace.patch_groups(), trace.groups()[:, prefix:] - prefix)
    merging.remove()
    merging.remove()
    assert torch.equal(model(images), before)
    assert not leftovers(model) and hooks == [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "reducer", [ToMe(r=0), ToMe(keep=1.0), ToMe(keep=36), PiToMe(keep=1.0), PiToMe(ratio=1)]
)
@torch.no_grad()
def test_keeping_everything_is_bit_identical(name, reducer):
    model, images = vit(name), pictures()
    before = model(images)
    merging = timm_host.install(model, reducer)
    assert torch.equal(model(images), before)
    assert merging.trace.size is None and merging.trace.tokens == [36 + model.num_prefix_tokens] * 4


@pytest.mark.parametrize("keep", [1.0, 35, 0.5, 17, 0.2, 3])
@pytest.mark.parametrize("method", [ToMe, PiToMe])
@torch.no_grad()
def test_keep_is_the_number_of_patches_at_the_exit(method, keep):
    model = vit("registers")
    merging = timm_host.install(model, method(), keep=keep)
    tokens = model.forward_features(pictures())
    assert tokens.shape[1] == 5 + (round(keep * 36) if isinstance(keep, float) else keep)
    assert merging.trace.tokens[-1] == tokens.shape[1]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tome_equals_explicit_softmaxes_and_loops(name, fused):
    model, images = vit(name, torch.float64), pictures(dtype=torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    plan = [9, 0, 6, 4]
    tokens, size, states = tome_forward(
        x, model.blocks, plan, model.num_prefix_tokens, timm_attend, timm_feed
    )
    merging = timm_host.install(model, ToMe(r=plan))
    torch.testing.assert_close(model.forward_features(images), model.norm(tokens), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merging.trace.size[..., 0], size.to(merging.trace.size.dtype))
    logits = model(images)
    merging.remove()
    # The head sees every patch at its old place, as its group's vector.
    torch.testing.assert_close(logits, model.forward_head(model.norm(states[-1])), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_pooled_features_are_the_mean_weighted_by_size():
    model, images = vit("mae"), pictures()
    merging = timm_host.install(model, ToMe(r=6, prop_attn=False))
    tokens = model.forward_features(images)
    size = merging.trace.size
    pooled = (tokens * size)[:, 1:].sum(1) / 36
    expected = model.head(model.fc_norm(pooled))
    torch.testing.assert_close(model.forward_head(tokens), expected)
    with pytest.raises(ValueError, match="what forward_features returned"):
        model.forward_head(tokens.clone())


@torch.no_grad()
def test_features_of_an_earlier_forward_pool_by_their_own_groups():
    model = vit("mae")
    timm_host.install(model, ToMe(r=6))
    expected = model(pictures(seed=1))
    features = model.forward_features(pictures(seed=1))
    model(pictures(seed=2))
    assert torch.equal(model.forward_head(features), expected)


@torch.no_grad()
def test_two_threads_get_what_one_gets():
    model = vit("registers")
    merging = timm_host.install(model, ToMe(keep=0.4))
    batches = [pictures(batch=1 + seed % 3, seed=seed) for seed in range(24)]
    expected = [(model(images), merging.trace.groups()) for images in batches]
    results = [None] * len(batches)

    def work(first):
        with torch.no_grad():
            for number in range(first, len(batches), 2):
                results[number] = model(batches[number]), merging.trace.groups()

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, alone in zip(results, expected, strict=True):
        assert torch.equal(ours[0], alone[0]) and torch.equal(ours[1], alone[1])


@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind():
    model, images = vit(), pictures()
    before = model(images)
    merging = timm_host.install(model, ToMe(r=5))
    merged = model(images)

    def fail(module, args):
        raise KeyboardInterrupt

    handle = model.blocks[2].norm2.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(images)
    assert merging.trace is None and merging.running is None
    handle.remove()
    assert torch.equal(model(images), merged)
    merging.remove()
    assert torch.equal(model(images), before) and not leftovers(model)


def test_gradients_flow_and_training_works():
    model = vit("qk_norm").train()
    timm_host.install(model, ToMe(r=5))
    model(pictures()).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_stays_close(name):
    model, images = vit(name), pictures()
    merging = timm_host.install(model, ToMe(r=5))
    full, half = model(images), None
    half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16 and merging.trace.size.dtype == torch.float32
    assert F.cosine_similarity(half.float(), full, dim=-1).min() > 0.9


@torch.no_grad()
def test_a_copy_that_could_not_be_detached_is_refused():
    model, images = vit(), pictures()
    expected = model(images)
    merging = timm_host.install(model, ToMe(r=5))
    with pytest.raises(TypeError, match="detach, copy, and attach again"):
        copy.deepcopy(model)
    merging.remove()
    assert torch.equal(copy.deepcopy(model)(images), expected)


@torch.no_grad()
def test_other_image_sizes_get_their_own_plan():
    model = filled(VisionTransformer(**TINY, dynamic_img_size=True))
    merging = timm_host.install(model, ToMe(keep=0.5))
    for size, patches in ((48, 36), (64, 64), (48, 36)):
        model(pictures(size=size))
        assert merging.trace.tokens[-1] == 1 + patches // 2


@torch.no_grad()
def test_what_cannot_work_is_refused_by_name():
    model, images = vit(), pictures()
    with pytest.raises(ValueError, match="cannot be a function"):
        timm_host.install(model, ToMe(keep=lambda image: 3))
    with pytest.raises(ValueError, match="r or keep, not both"):
        ToMe(r=3, keep=0.5)
    with pytest.raises(TypeError, match="ParallelScalingBlock"):
        timm_host.install(VisionTransformer(**TINY, block_fn=ParallelScalingBlock), ToMe(r=2))
    with pytest.raises(TypeError, match="Linear"):
        timm_host.install(torch.nn.Linear(2, 2), ToMe(r=2))
    assert not leftovers(model)
    merging = timm_host.install(model, ToMe(r=2))
    with pytest.raises(ValueError, match="already has a forward"):
        timm_host.install(model, PiToMe())
    with pytest.raises(ValueError, match="forward_intermediates"):
        model.get_intermediate_layers(images)
    with pytest.raises(RuntimeError, match="block 0 was called on its own"):
        model.blocks[0](torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match="attention masks"):
        model(images, attn_mask=torch.zeros(37, 37, dtype=torch.bool))
    if "is_causal" in inspect.signature(model.forward).parameters:  # not in timm's older releases
        with pytest.raises(ValueError, match="attention masks"):
            model(images, is_causal=True)
    with torch.enable_grad(), pytest.raises(ValueError, match="recompute"):
        model.set_grad_checkpointing()
        model(images)
    merging.remove()
    for reducer, message in (
        (ToMe(), "needs r"),
        (ToMe(keep=2), "the fewest are 3"),
        (ToMe(keep=37), "has 36"),
    ):
        merging = timm_host.install(model, reducer)
        with pytest.raises(ValueError, match=message):
            model(images)
        merging.remove()


# Towers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_keeping_everything_in_a_tower_is_bit_identical(name, attention):
    model, images = tower(name), pictures()
    model.set_attn_implementation(attention)
    before = model(images, output_hidden_states=True)
    for reducer in (ToMe(r=0), PiToMe.clip(keep=1.0)):
        merging = tower_host.install(model, reducer)
        after = model(images, output_hidden_states=True)
        merging.remove()
        assert torch.equal(after.last_hidden_state, before.last_hidden_state)
        assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, before.hidden_states, strict=True))


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers_return_full_length_with_one_vector_a_group(name, reducer):
    model, images = tower(name), pictures()
    before = model(images, output_hidden_states=True)
    merging = tower_host.install(model, REDUCERS[reducer](), depth=3)
    output = model(images, output_hidden_states=True)
    trace = merging.trace
    assert trace.tokens[-1] == trace.tokens[-2] and sum(trace.plan)
    for layer, state in enumerate(output.hidden_states):
        assert state.shape == before.hidden_states[layer].shape
        groups = trace.groups(layer)
        for image in range(2):
            for group in groups[image].unique():
                members = state[image, groups[image] == group]
                assert torch.equal(members, members[:1].expand_as(members))
    assert output.last_hidden_state.shape == before.last_hidden_state.shape
    if reducer == "tome_half":
        assert int(trace.patch_groups().max()) + 1 == 18
    as_tuple = model(images, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.last_hidden_state)
    if not BEFORE_5_18:
        only = model(images, output_hidden_states=[-2]).hidden_states
        assert torch.equal(only[-2], output.hidden_states[-2]) and only[0] is None
    merging.remove()
    after = model(images, output_hidden_states=True)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state) and not leftovers(model)


def _tower_attend(names, block, x):
    norm, attention = getattr(block, names[0]), getattr(block, names[1])
    h = norm(x)
    query, key = (
        getattr(attention, part.replace("proj", "norm"), torch.nn.Identity())(getattr(attention, part)(h))
        for part in ("q_proj", "k_proj")
    )
    split = [
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in (query, key, attention.v_proj(h))
    ]
    finish = getattr(attention, "out_proj", None) or attention.projection_layer
    scale = getattr(block, "lambda_1", 1.0)
    return split[0] * attention.scale, split[1], split[2], lambda heads: scale * finish(heads)


def _tower_feed(names, block, x):
    return getattr(block, "lambda_2", 1.0) * block.mlp(getattr(block, names[2])(x))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_tome_in_a_tower_equals_explicit_softmaxes_and_loops(name, attention):
    model, images = tower(name, torch.float64), pictures(dtype=torch.float64)
    model.set_attn_implementation(attention)
    blocks = model.encoder.layer if name == "internvl" else model.encoder.layers
    names = ("layer_norm1", "self_attn", "layer_norm2")
    if name == "internvl":
        names = ("layernorm_before", "attention", "layernorm_after")
    prefix = 1 if name in ("clip", "internvl") else 0
    plan = [8, 5, 0, 6]
    first = model(images, output_hidden_states=True).hidden_states[0]
    tokens, size, states = tome_forward(
        first, blocks, plan, prefix, partial(_tower_attend, names), partial(_tower_feed, names)
    )
    close = 1e-9 if attention == "sdpa" else 1e-5  # eager soft-maxes are taken in float32
    merging = tower_host.install(model, ToMe(r=plan))
    output = model(images, output_hidden_states=True)
    for ours, expected in zip(output.hidden_states[1:], states, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)
    merging.remove()
    merging = tower_host.install(model, ToMe(r=plan), unmerge=False)
    short = model(images, output_hidden_states=True)
    torch.testing.assert_close(short.hidden_states[-1], tokens, rtol=close, atol=close)
    torch.testing.assert_close(merging.trace.size[..., 0].double(), size)


@torch.no_grad()
def test_a_pooling_head_sees_every_patch_merged_or_not():
    model, images = tower("siglip"), pictures()
    merging = tower_host.install(model, ToMe(r=6))
    output = model(images)
    torch.testing.assert_close(output.pooler_output, model.head(output.last_hidden_state))
    merging.remove()
    tower_host.install(model, ToMe(r=6), unmerge=False)
    short = model(images)
    assert short.last_hidden_state.shape[1] == 12
    torch.testing.assert_close(short.pooler_output, output.pooler_output)


@torch.no_grad()
def test_two_threads_share_a_tower():
    model = tower()
    merging = tower_host.install(model, ToMe(keep=10))
    batches = [pictures(batch=1 + seed % 2, seed=seed) for seed in range(16)]
    expected = [model(images).last_hidden_state for images in batches]
    results = [None] * len(batches)

    def work(first):
        with torch.no_grad():
            for number in range(first, len(batches), 2):
                results[number] = model(batches[number]).last_hidden_state
                assert merging.trace.batch == len(batches[number])

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@torch.no_grad()
def test_towers_refuse_what_they_cannot_do():
    other = transformers.ViTModel(transformers.ViTConfig(**VISION))
    with pytest.raises(TypeError, match="cannot merge inside a ViTModel"):
        tower_host.install(other, ToMe(r=2))
    model = tower()
    with pytest.raises(ValueError, match="depth is 9; the tower has 4 blocks"):
        tower_host.install(model, ToMe(r=2), depth=9)
    merging = tower_host.install(model, ToMe(r=2))
    with pytest.raises(ValueError, match="already has a forward"):
        tower_host.install(model, ToMe(r=2))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="prop_attn=False"):
        _after_first_block(model)
    merging.remove()
    assert not leftovers(model)
    padded = tower("idefics3")
    tower_host.install(padded, ToMe(r=2))
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    assert padded(pictures(), patch_attention_mask=mask).last_hidden_state.shape[1] == 36
    mask[0, :, 4:] = False
    with pytest.raises(ValueError, match="without padding"):
        padded(pictures(), patch_attention_mask=mask)


def _after_first_block(model):
    """Run a tower whose first block still has its plain attention."""
    stock = model.encoder.layers[0].self_attn.config
    model.encoder.layers[0].self_attn.config = copy.deepcopy(stock)
    model.encoder.layers[0].self_attn.config._attn_implementation = "sdpa"
    try:
        model(pictures())
    finally:
        model.encoder.layers[0].self_attn.config = stock


@pytest.mark.parametrize("reducer", [ToMe(), PiToMe()], ids=str)
@pytest.mark.parametrize("count", [1, 3, 7, 20, 33])
def test_merging_reducers_select_exactly_the_count_without_a_model(reducer, count):
    features = torch.randn(33, 8, generator=torch.Generator().manual_seed(0))
    mask = reducer.select(features, None, count)
    assert mask.shape == (33,) and int(mask.sum()) == count == reducer.retained_count(33, count)
    assert reducer.retained_count(Grid.single(4, 4), 0.5) == 8
    pairs = features[torch.arange(32) // 2]  # neighbours are equal, so one of each pair is enough
    assert len(torch.unique(pairs[reducer.select(pairs, None, 16)], dim=0)) == 16
