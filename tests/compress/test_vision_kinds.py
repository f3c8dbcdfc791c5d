"""Merging and dropping tokens in many kinds of vision transformers, by plain loops: timm's Eva (EVA-02,
DINOv3), Beit, distilled and globally pooled models, and DINOv2 and DINOv3 in transformers."""

import inspect
from functools import partial

import pytest
import timm
import torch
import transformers
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from vision_oracle import merged_groups

from vistok import compress
from vistok.compress.methods.pitome import PiToMe
from vistok.compress.methods.tome import ToMe
from vistok.compress.methods.zerotprune import ZeroTPrune

pytestmark = pytest.mark.slow

TINY = dict(img_size=48, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=7)
ROTARY = dict(use_abs_pos_emb=False, use_rot_pos_emb=True)
VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=48,
    patch_size=8,
)
TIMM = {
    "eva02": partial(Eva, **TINY, use_rot_pos_emb=True, ref_feat_shape=(6, 6), init_values=0.5),
    "eva02_split": partial(
        Eva,
        **TINY,
        **ROTARY,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        global_pool="avg",
    ),
    "eva_post_norm": partial(Eva, **TINY, use_rot_pos_emb=True, use_post_norm=True, global_pool="token"),
    "dinov3": partial(
        Eva,
        **TINY,
        **ROTARY,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        init_values=0.5,
        use_fc_norm=False,
        global_pool="avg",
        qkv_bias=False,
    ),
    "rope_mixed": partial(Eva, **TINY, **ROTARY, rope_type="mixed", attn_type="rope", global_pool="map"),
    "beit": partial(Beit, **TINY, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5),
    "beit_shared": partial(Beit, **TINY, use_shared_rel_pos_bias=True, use_rel_pos_bias=True),
    "beit_only_shared": partial(Beit, **TINY, use_shared_rel_pos_bias=True, global_pool="token"),
    "beit_absolute": partial(Beit, **TINY, qkv_bias=False),
    "distilled": partial(VisionTransformerDistilled, **TINY),
    "mae": partial(VisionTransformer, **TINY, global_pool="avg"),
    "no_class": partial(VisionTransformer, **TINY, global_pool="avg", class_token=False, reg_tokens=2),
}
HF = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION, layerscale_value=0.5)),
    "dinov2_swiglu": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**VISION, use_swiglu_ffn=True)
    ),
    "dinov2_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2, layerscale_value=0.5)
    ),
}
MODELS = {f"timm_{name}": make for name, make in TIMM.items()} | {f"hf_{n}": make for n, make in HF.items()}
REDUCERS = {
    "tome": ToMe(keep=0.4),
    "pitome": PiToMe(keep=0.4, prop_attn=True),
    "pitome_clip": PiToMe.clip(keep=0.4),
    "zerotprune": ZeroTPrune(keep=0.4, r=3),
    "zerotprune_own": ZeroTPrune(r=3, retention=0.8, uniform=True),
}


def filled(module):
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=random)
            weight.copy_(noise * 1.2 / weight[0].numel() ** 0.5 if weight.ndim > 1 else weight + 0.1 * noise)
    return module.eval()


def model_of(name, dtype=torch.float32):
    return filled(MODELS[name]()).to(dtype)


def pictures(batch=2, seed=0, dtype=torch.float32):
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(model, images):
    """Everything that a model returns, as one tuple of tensors."""
    if isinstance(model, transformers.PreTrainedModel):
        result = model(images, output_hidden_states=True)
        return (result.last_hidden_state, result.pooler_output, *result.hidden_states)
    return model.forward_features(images), model(images)


def prefix_of(model):
    if isinstance(model, transformers.PreTrainedModel):
        return 1 + getattr(model.config, "num_register_tokens", 0)
    return model.num_prefix_tokens


def state_of(model):
    """Hooks and instance attributes by module, and the attention implementation."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    state = [
        (
            name,
            [len(vars(module)[kind]) for kind in kinds],
            sorted(k for k, v in vars(module).items() if callable(v)),
        )
        for name, module in model.named_modules()
        if not name.endswith("act_fn")
    ]
    return state, getattr(getattr(model, "config", None), "_attn_implementation", None)


def without_recording(state):
    """The state without hooks that transformers leaves in layers whose states someone has asked for."""
    return [(name, own) for name, _, own in state[0]], state[1]


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_reducer_is_exact_at_full_budget_and_leaves_nothing(name, reducer):
    model, images = model_of(name), pictures()
    before = outputs(model, images)
    state = state_of(model)
    with compress.attach(model, REDUCERS[reducer], keep=1.0):
        assert all(map(torch.equal, outputs(model, images), before))
    with compress.attach(model, REDUCERS[reducer]) as session:
        after = outputs(model, images)
        trace, report = session.merging.trace, session.report()
    prefix = prefix_of(model)
    assert after[0].shape[1] == trace.tokens[-1] == 36 + prefix - sum(trace.plan) < 36 + prefix
    if REDUCERS[reducer].keep:
        assert trace.tokens[-1] == prefix + 14 and report.images[0].layers[-1] == 14
    assert after[1].shape == before[1].shape and torch.isfinite(after[1]).all()
    assert torch.equal(trace.origin[:, :prefix], torch.arange(prefix).expand(2, -1))
    left = torch.zeros(2, 36 + prefix, dtype=torch.bool).scatter_(1, trace.origin, True)
    assert torch.equal(trace.patches_left(), left[:, prefix:])
    assert all(map(torch.equal, outputs(model, images), before))
    assert without_recording(state_of(model)) == without_recording(state)
    if name.startswith("timm_"):
        assert state_of(model) == state


# Oracles ----------------------------------------------------------------------------------------------------


def turned(x, half):
    if half:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def heads_of(x, count):
    return x.unflatten(-1, (count, -1)).transpose(0, 1)  # [N, C] → [H, N, D]


class Eyes:
    """One block's attention on one image: queries, keys and values [H, N, D], what is added to logits, and
    the rest of the block."""

    def __init__(self, model, number, x, places):
        self.model, self.places, self.prefix = model, places, prefix_of(model)
        kind = type(model).__name__
        blocks = model.blocks if hasattr(model, "blocks") else getattr(model, "encoder", None) or model.model
        self.block = blocks[number] if hasattr(model, "blocks") else blocks.layer[number]
        self.bias = 0.0
        post = type(self.block).__name__ == "EvaBlockPostNorm"
        h = x if post else self.block.norm1(x)
        self.hugging = isinstance(model, transformers.PreTrainedModel)
        attention = self.attention = self.block.attention if self.hugging else self.block.attn
        inner = getattr(attention, "attention", attention)
        if self.hugging:
            parts = [getattr(inner, f"{n}_proj", None) or getattr(inner, name) for n, name in NAMES]
            count = model.config.num_attention_heads
            query, key, self.value = (heads_of(part(h), count) for part in parts)
        else:
            if getattr(attention, "qkv", None) is None:
                q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
            else:
                q, k, v = attention.qkv(h).chunk(3, -1)
                if getattr(attention, "q_bias", None) is not None:
                    q, v = q + attention.q_bias, v + attention.v_bias
            query, key, self.value = (heads_of(part, attention.num_heads) for part in (q, k, v))
            query, key = (
                getattr(attention, n, torch.nn.Identity())(part)
                for n, part in (("q_norm", query), ("k_norm", key))
            )
        self.metric = key.mean(0)
        self.query, self.key = self._rotated(query, number), self._rotated(key, number)
        if kind == "Beit":
            self.bias = self._pairs(attention)
        self.post = post

    def _rotated(self, x, number):
        patches = torch.tensor(self.places[self.prefix :]) - self.prefix
        if hasattr(self.model, "rope_embeddings"):
            cos, sin = self.model.rope_embeddings(torch.zeros(1, 3, 48, 48, dtype=x.dtype))
            cos, sin, half = cos[patches].to(x), sin[patches].to(x), True
        elif getattr(self.model, "rope", None) is not None:
            sin, cos = (part[..., patches, :] for part in self._embedding(number).chunk(2, -1))
            half = getattr(self.attention, "rotate_half", False)
        else:
            return x
        back = x[:, self.prefix :]
        return torch.cat([x[:, : self.prefix], back * cos + turned(back, half) * sin], 1)

    def _embedding(self, number):
        rope = self.model.rope
        embedding = rope.get_embed() if hasattr(rope, "feat_shape") else rope.get_embed(shape=(6, 6))
        return embedding[number] if embedding.ndim == 4 else embedding

    def _pairs(self, attention):
        """The biases between places, one by one."""
        tables = [
            attention.relative_position_bias_table,
            getattr(self.model.rel_pos_bias, "relative_position_bias_table", None),
        ]
        count = len(self.places)
        bias = torch.zeros(attention.num_heads, count, count, dtype=self.query.dtype)
        for table in (table for table in tables if table is not None):
            for i, a in enumerate(self.places):
                for j, b in enumerate(self.places):
                    rows, columns = divmod(a - 1, 6), divmod(b - 1, 6)
                    place = (rows[0] - columns[0] + 5) * 11 + rows[1] - columns[1] + 5
                    special = {(True, False): 121, (False, True): 122, (True, True): 123}.get(
                        (a == 0, b == 0)
                    )
                    bias[:, i, j] += table[place if special is None else special]
        return bias

    def weights(self, size):
        scale = self.query.shape[-1] ** -0.5
        weights = torch.exp(self.query @ self.key.transpose(1, 2) * scale + self.bias) * size
        return weights / weights.sum(-1, keepdim=True)

    def attended(self, weights):
        out = (weights @ self.value).transpose(0, 1).flatten(1)
        block, attention = self.block, self.attention
        if self.hugging:
            finish = attention.output.dense if hasattr(attention, "output") else attention.o_proj
            return block.layer_scale1(finish(out))
        out = attention.proj(getattr(attention, "norm", torch.nn.Identity())(out))
        return block.norm1(out) if self.post else scaled(block, 1, out)

    def fed(self, x):
        block = self.block
        if self.hugging:
            return block.layer_scale2(block.mlp(block.norm2(x)))
        return block.norm2(block.mlp(x)) if self.post else scaled(block, 2, block.mlp(block.norm2(x)))


NAMES = (("q", "query"), ("k", "key"), ("v", "value"))


def scaled(block, number, x):
    gamma = getattr(block, f"gamma_{number}", None)
    return getattr(block, f"ls{number}", torch.nn.Identity())(x if gamma is None else gamma * x)


def first_states(model, images):
    """What enters the first block, [B, N, D]."""
    states = []
    hugging = isinstance(model, transformers.PreTrainedModel)
    stack = (getattr(model, "encoder", None) or model.model).layer if hugging else model.blocks
    handle = stack[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model(images)
    handle.remove()
    return states[0]


def tome_by_loops(model, x, plan):
    """ToMe with proportional attention on one image [N, D] → its tokens, their groups and places."""
    prefix = prefix_of(model)
    places = list(range(len(x)))
    groups = [{n} for n in places]
    for number, r in enumerate(plan):
        eyes = Eyes(model, number, x, places)
        size = torch.tensor([len(group) for group in groups], dtype=x.dtype)
        x = x + eyes.attended(eyes.weights(size))
        if r:
            merged = merged_groups(eyes.metric, r, prefix)
            weighed = x * size[:, None]
            x = torch.stack([weighed[sorted(g)].sum(0) / size[sorted(g)].sum() for g in merged])
            # The odd token of a group is the one that the even ones merged into.
            places = [places[max(g, key=lambda n: n % 2)] for g in merged]
            groups = [set().union(*(groups[n] for n in g)) for g in merged]
        x = x + eyes.fed(x)
    return x, groups, places


def final_norm(model, x):
    if isinstance(model, transformers.PreTrainedModel):
        return (getattr(model, "layernorm", None) or model.norm)(x)
    return model.norm(x)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tome_equals_explicit_softmaxes_and_loops(name, fused):
    model, images = model_of(name, torch.float64), pictures(dtype=torch.float64)
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation("sdpa" if fused else "eager")
    for block in getattr(model, "blocks", ()):
        block.attn.fused_attn = fused
    plan, prefix = [9, 0, 6, 4], prefix_of(model)
    expected = [tome_by_loops(model, x, plan) for x in first_states(model, images)]
    # The eager soft-max of DINO, and the rotations that it makes, are taken in float32.
    close = dict(rtol=1e-5, atol=1e-5) if name.startswith("hf_") else dict(rtol=1e-8, atol=1e-8)
    with compress.attach(model, ToMe(r=plan)) as session:
        tokens = outputs(model, images)[0]
        trace = session.merging.trace
        torch.testing.assert_close(tokens, final_norm(model, torch.stack([x for x, *_ in expected])), **close)
        for image, (_, groups, places) in enumerate(expected):
            assert trace.origin[image].tolist() == places
            assert [len(g) for g in groups] == trace.size[image, :, 0].tolist()
        if name.startswith("timm_") and getattr(model, "global_pool", "") == "avg":
            sizes = torch.tensor([[len(g) for g in groups] for _, groups, _ in expected], dtype=tokens.dtype)
            weighed = (tokens * sizes[..., None])[:, prefix:].sum(1) / 36
            logits = model.head(model.fc_norm(weighed))
            torch.testing.assert_close(model(images), logits, **close)


def page_rank_by_loops(weights, iterations, class_token):
    count = weights.shape[-1]
    importance = torch.zeros(count, dtype=torch.float64)
    used = 0
    for filtered in (True, False):
        for head in weights:
            score = [count**0.5 if class_token and n == 0 else 1.0 for n in range(count)]
            score = [s / sum(score) for s in score]
            for _ in range(iterations):
                score = [sum(score[i] * float(head[i, j]) for i in range(count)) for j in range(count)]
            spread = sum((count * s - 1) ** 2 for s in score) / count
            if not filtered or 0.01 <= spread <= 0.7:
                importance += torch.tensor(score, dtype=torch.float64) ** 2
                used += 1
        if used:
            break
    return (importance / used).sqrt()


def zerotprune_by_loops(model, x, plan, r, class_token):
    """Zero-TPrune with one iteration on one image [N, D] → its tokens and places."""
    prefix = prefix_of(model)
    places = list(range(len(x)))
    for number, dropped in enumerate(plan):
        eyes = Eyes(model, number, x, places)
        weights = eyes.weights(1.0)
        x = x + eyes.attended(weights)
        x = x + eyes.fed(x)
        if not dropped:
            continue
        importance = page_rank_by_loops(weights, 1, class_token)
        ranked = sorted(range(prefix, len(x)), key=lambda n: -float(importance[n]))
        half = (len(ranked) + 1) // 2
        unit = eyes.metric / eyes.metric.norm(dim=-1, keepdim=True)
        best = {a: max(float(unit[a] @ unit[b]) for b in ranked[:half]) for a in ranked[half:]}
        gone = sorted(best, key=lambda a: -best[a])[: min(r, dropped)]
        left = [n for n in range(len(x)) if n not in gone]
        part = weights[:, left][:, :, left]
        importance = page_rank_by_loops(part / part.sum(-1, keepdim=True), 1, class_token)
        ranked = sorted(range(prefix, len(left)), key=lambda n: -float(importance[n]))
        stay = sorted([*range(prefix), *ranked[: len(x) - prefix - dropped]])
        kept = [left[n] for n in stay]
        x, places = x[kept], [places[n] for n in kept]
    return x, places


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_zerotprune_equals_explicit_loops(name):
    model, images = model_of(name, torch.float64), pictures(dtype=torch.float64)
    class_token = name != "timm_no_class"
    reducer = ZeroTPrune(keep=0.4, r=3, iterations=(1, 1, 1))
    plan = reducer.plan(4, 36, prefix_of(model), 14)
    assert max(plan) > 3 and sum(plan) == 22
    expected = [zerotprune_by_loops(model, x, plan, 3, class_token) for x in first_states(model, images)]
    close = dict(rtol=1e-5, atol=1e-5) if name.startswith("hf_") else dict(rtol=1e-8, atol=1e-8)
    with compress.attach(model, reducer) as session:
        tokens = outputs(model, images)[0]
        trace = session.merging.trace
        assert trace.origin.tolist() == [places for _, places in expected]
        torch.testing.assert_close(tokens, final_norm(model, torch.stack([x for x, _ in expected])), **close)
        if name.startswith("timm_") and getattr(model, "global_pool", "") == "avg":
            logits = model.head(model.fc_norm(tokens[:, prefix_of(model) :].mean(1)))
            torch.testing.assert_close(model(images), logits, **close)


@torch.no_grad()
def test_grouped_queries_and_norms_of_queries_and_keys():
    if "num_kv_heads" not in inspect.signature(Eva).parameters:
        pytest.skip("this release of timm has no grouped queries")
    grouped = dict(
        num_kv_heads=2, attn_type="rope", qkv_fused=False, qk_norm=True, attn_only_layer_scale=True
    )
    model = filled(Eva(**TINY, **ROTARY, init_values=0.5, **grouped))
    images = pictures()
    before = model(images)
    for reducer in REDUCERS.values():
        with compress.attach(model, reducer) as session:
            model(images)
            assert sum(session.merging.trace.plan)
        with compress.attach(model, reducer, keep=1.0):
            assert torch.equal(model(images), before)


def test_patches_that_drop_out_in_training_keep_their_positions():
    model = filled(Eva(**TINY, **ROTARY, patch_drop_rate=0.5)).train()
    for reducer in (ToMe(r=3), ZeroTPrune(r=2)):
        with compress.attach(model, reducer) as session:
            model(pictures()).square().sum().backward()
            assert session.merging.trace.num_tokens == 1 + 18 > session.merging.trace.tokens[-1]
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer: its blocks attend within shifted windows"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos: its relative positions"),
        ("xcit_nano_12_p16_224", "Xcit: its attention is between channels"),
        ("resnet18", "ResNet: how its blocks keep their tokens is not known"),
    ],
)
def test_other_models_of_timm_are_refused_by_name_with_the_reason(name, reason):
    model = timm.create_model(name)
    with pytest.raises(TypeError, match=reason):
        compress.attach(model, ToMe(r=2))
    assert model.forward.__func__ is type(model).forward
