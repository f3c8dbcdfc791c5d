"""Slow-Fast: layers of a language model whose text reads slow tokens, beside what the recorded cases pin."""

import json

import pytest
import torch
import transformers as hf
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

from vistok.compress.hosts import cache_parameter
from vistok.compress.trained.slowfast_layer import SlowFast, SlowFastConfig, packed_rows, token_types
from vistok.eval.parity.verify import verify

WIDTH, HEADS, KEY_HEADS, DEPTH = 48, 4, 2, 3
SLOW = (2, 7, WIDTH)
TYPES = torch.tensor([[1, 1, 3, 3, 3, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2, 2, 4, 4]])
TYPES_BOTH = torch.tensor([[1, 3, 3, 1, 1, 2], [1, 1, 3, 1, 2, 2]])
KINDS = {"qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM), "llama": (hf.LlamaConfig, hf.LlamaForCausalLM)}


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    config_class, model_class = KINDS[request.param]
    config = config_class(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        vocab_size=32,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return model_class(config).eval()


def opened(model, **options):
    """A session on layers 0 and 2 whose warm-up gates are open."""
    kind = options.pop("kind", "text-only-vanilla")
    gate = options.pop("gate", "whole-dynamic-tanh-warmup")
    session = SlowFast(
        model,
        SlowFastConfig(layers=(0, 2), cross_attn_implementation=kind, cross_attn_gating_type=gate),
        **options,
    )
    for layer in session.layers.values():
        if hasattr(layer.self_attn, "cross_attn_warm_up_gate"):
            nn.init.constant_(layer.self_attn.cross_attn_warm_up_gate, 0.7)
    return session


def ids(types=TYPES):
    torch.manual_seed(1)
    return torch.randint(1, 32, types.shape)


@torch.no_grad()
def changed(model, session, slow, types=TYPES, mask=None):
    """Which tokens' logits the slow tokens change, bool [B, L]."""
    before = model(ids(types)).logits
    with session.reading(slow, types, mask):
        during = model(ids(types)).logits
    return ((during - before).abs() > 1e-6).any(-1)


def test_closed_gates_and_detaching_leave_the_model_identical(model):
    tokens, state = ids(), set(model.state_dict())
    with torch.no_grad():
        before = model(tokens).logits
        session = SlowFast(model, SlowFastConfig(layers=(0, 2)))
        with session.reading(torch.randn(SLOW), TYPES):
            assert torch.equal(model(tokens).logits, before)  # the warm-up gate starts at 0
        assert torch.equal(model(tokens).logits, before)
        session.detach()
        session.detach()
        assert torch.equal(model(tokens).logits, before)
    assert set(model.state_dict()) == state
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


@pytest.mark.parametrize(
    ("kind", "first"),
    [("text-only-vanilla", 0), ("vanilla", 0), ("text-only-vanilla-flashattn-masksystem", 5)],
)
def test_who_reads_follows_the_implementation(model, kind, first):
    """In layer 0 alone the tokens before the first reader stay as they are."""
    session = SlowFast(model, SlowFastConfig((0,), kind, "whole-dynamic-tanh"))
    rows = changed(model, session, torch.randn(SLOW))
    assert rows[0].tolist() == [place >= first for place in range(9)]
    assert not rows[1].any()  # a sample without visual tokens


def test_visual_tokens_read_only_in_the_last_layer_where_every_token_does(model):
    reads = {}
    for kind in ("vanilla", "text-only-vanilla"):
        session = SlowFast(model, SlowFastConfig((DEPTH - 1,), kind, "whole-dynamic"))
        reads[kind] = changed(model, session, torch.randn(SLOW))[0]
        session.detach()
    assert reads["vanilla"].all()
    assert torch.equal(reads["text-only-vanilla"], TYPES[0] <= 2)


@pytest.mark.parametrize("gate", ["whole-dynamic", "whole-dynamic-tanh", "whole-dynamic-tanh-warmup"])
@pytest.mark.parametrize("kind", ["vanilla", "text-only-vanilla"])
def test_what_is_read_is_the_papers_formula(model, kind, gate):
    """The state before the last projection of layer 2, head by head and token by token."""
    session = opened(model, kind=kind, gate=gate)
    layer, slow = session.layers[2], torch.randn(SLOW)
    attention, seen = layer.self_attn, {}

    def note(module, args, output):
        seen.setdefault("normed", output)  # the prompt's states, before the slow tokens'

    handles = [
        attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(after=args[0])),
        layer.input_layernorm.register_forward_hook(note),
    ]
    with torch.no_grad(), session.reading(slow, TYPES):
        model(ids())
    for handle in handles:
        handle.remove()
    # The same state without slow tokens, of the same input of the layer.
    plain = {}
    handle = attention.o_proj.register_forward_pre_hook(lambda m, args: plain.update(before=args[0]))
    positions = torch.arange(9)[None]
    rotation = model.model.rotary_emb(slow, positions)
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        attention(hidden_states=seen["normed"], position_embeddings=rotation, attention_mask=causal)
        before = plain["before"]
        width = WIDTH // HEADS
        query = attention.q_proj(seen["normed"]).view(2, 9, HEADS, width)
        cos, sin = rotation
        half = torch.cat([-query[..., width // 2 :], query[..., : width // 2]], -1)
        query = query * cos[:, :, None] + half * sin[:, :, None]
        both = attention.cross_attn_kv_proj(layer.input_layernorm(slow)).view(2, 7, KEY_HEADS, 2, width)
        scale = attention.cross_attn_gate_proj[0](before)
        scale = scale.tanh() if "tanh" in gate else scale
        if "warmup" in gate:
            warm_up = torch.tensor(0.7)
            scale = scale * (warm_up if kind == "vanilla" else warm_up.tanh())
        expected = before.clone()
        for token in range(9):
            if kind == "vanilla" or TYPES[0, token] <= 2:
                for head in range(HEADS):
                    keys, values = both[0, :, head // (HEADS // KEY_HEADS)].unbind(1)
                    weights = (keys @ query[0, token, head] / width**0.5).softmax(0)
                    part = slice(head * width, (head + 1) * width)
                    expected[0, token, part] += scale[0, token] * (weights @ values)
    handle.remove()
    torch.testing.assert_close(seen["after"], expected, rtol=1e-4, atol=1e-5)


def test_masked_slow_tokens_are_not_read(model):
    session, slow = opened(model), torch.randn(SLOW)
    mask = torch.arange(7)[None] < torch.tensor([[4], [0]])
    with torch.no_grad():
        with session.reading(slow, TYPES, mask):
            masked = model(ids()).logits
        with session.reading(slow[:, :4], TYPES):
            shorter = model(ids()).logits
    torch.testing.assert_close(masked, shorter)
    assert torch.isfinite(masked).all()


@pytest.mark.parametrize("decode", [False, True])
def test_generated_tokens_read_only_when_asked_to(model, decode):
    """A prompt and its continuation in one forward, against steps behind a cache."""
    session, slow = opened(model, decode_cross_attention=decode), torch.randn(SLOW)
    prompt = ids(TYPES_BOTH)
    continued = torch.cat([prompt, torch.tensor([[3, 4], [5, 6]])], 1)
    types = torch.cat([TYPES_BOTH, torch.full((2, 2), 2 if decode else 3)], 1)  # visual tokens do not read
    with torch.no_grad():
        with session.reading(slow, types):
            whole = model(continued).logits[:, -2:]
        with session.reading(slow, TYPES_BOTH):
            name = cache_parameter(model.forward)
            cache = hf.DynamicCache()
            model(prompt, **{name: cache})
            steps = [model(continued[:, [token]], **{name: cache}).logits for token in (6, 7)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_generate_reads_the_slow_tokens_of_the_block(model):
    session, prompt = opened(model, decode_cross_attention=True), ids(TYPES_BOTH)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(prompt, **settings)
    tokens = []
    for scale in (1.0, -8.0):
        torch.manual_seed(5)
        with session.reading(scale * torch.randn(SLOW), TYPES_BOTH):
            tokens.append(model.generate(prompt, **settings))
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(model.generate(prompt, **settings), plain)


def test_gradients_reach_the_added_weights_and_the_slow_tokens(model):
    session, slow = opened(model), torch.randn(SLOW, requires_grad=True)
    with session.reading(slow, TYPES):
        model(ids()).logits.square().mean().backward()
    assert slow.grad[0].abs().sum() > 0 and slow.grad[1].abs().sum() == 0
    for layer in session.layers.values():
        own = {name: p for name, p in layer.self_attn.named_parameters() if name.startswith("cross_attn")}
        assert own and all(parameter.grad.abs().sum() > 0 for parameter in own.values())


@pytest.mark.parametrize("init", ["interleaved", "reference"])
def test_keys_and_values_start_as_the_layers_own(model, init):
    session = SlowFast(model, SlowFastConfig(layers=(1,)), init=init)
    attention, width = session.layers[1].self_attn, WIDTH // HEADS
    key, value = attention.k_proj.weight, attention.v_proj.weight
    weight = attention.cross_attn_kv_proj.weight
    if init == "reference":
        assert torch.equal(weight, torch.cat([key, value]))
        return
    read = weight.view(KEY_HEADS, 2, width, WIDTH)  # as forwards read it
    assert torch.equal(read[:, 0].flatten(0, 1), key) and torch.equal(read[:, 1].flatten(0, 1), value)


def test_weights_have_the_published_keys_and_are_read_back(model, tmp_path):
    session = opened(model)
    keys = {
        key
        for i in (0, 2)
        for key in (
            f"model.layers.{i}.self_attn.cross_attn_kv_proj.weight",
            f"model.layers.{i}.self_attn.cross_attn_gate_proj.0.weight",
            f"model.layers.{i}.self_attn.cross_attn_gate_proj.0.bias",
            f"model.layers.{i}.self_attn.cross_attn_warm_up_gate",
        )
    }
    assert {key for key in session.state_dict() if not key.endswith("kv_proj.bias")} == keys
    assert set(session.state_dict()) <= set(model.state_dict())
    slow = torch.randn(SLOW)
    with torch.no_grad(), session.reading(slow, TYPES):
        expected = model(ids()).logits
    session.save(tmp_path)
    session.detach()
    loaded = SlowFast.load(model, tmp_path)
    with torch.no_grad(), loaded.reading(slow, TYPES):
        assert torch.equal(model(ids()).logits, expected)


def test_weights_of_other_layers_or_kinds_are_refused_and_leave_nothing(model, tmp_path):
    session = opened(model)
    session.save(tmp_path)
    session.detach()
    state = set(model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["layers"] = [0, 1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit layers \[0, 1\]"):
        SlowFast.load(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"module": "LDP", "config": {}}))
    with pytest.raises(ValueError, match="holds no layers of SlowFast"):
        SlowFast.load(model, tmp_path)
    assert set(model.state_dict()) == state


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": ()}, "at least one"),
        ({"layers": (1, 1)}, "different layers"),
        ({"layers": (0,), "cross_attn_implementation": "text-only"}, "cross_attn_implementation is"),
        ({"layers": (0,), "cross_attn_gating_type": "channel-wise"}, "cross_attn_gating_type is"),
    ],
)
def test_unknown_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SlowFastConfig(**values)


def test_what_cannot_be_read_is_refused(model):
    session, slow = opened(model), torch.randn(SLOW)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        SlowFast(model, SlowFastConfig(layers=(3,)))
    with pytest.raises(ValueError, match="reads slow tokens already"):
        SlowFast(model, SlowFastConfig(layers=(0,)))
    with pytest.raises(ValueError, match=r"slow is \[7, 48\]"), session.reading(slow[0], TYPES):
        pass
    with pytest.raises(ValueError, match="other numbers than 1 to 4"), session.reading(slow, TYPES - 1):
        pass
    mask = torch.zeros(2, 7)
    with pytest.raises(ValueError, match="prompt 0 has visual tokens"), session.reading(slow, TYPES, mask):
        pass
    with pytest.raises(ValueError, match="types are for a prompt of 9"), session.reading(slow, TYPES):
        model(ids()[:, :5])
    with pytest.raises(ValueError, match="has 1 rows"), session.reading(slow, TYPES):
        model(ids()[:1])


def test_layers_of_other_models_are_refused():
    config = hf.Qwen3Config(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vocab_size=8
    )
    with pytest.raises(TypeError, match="without norms of queries"):
        SlowFast(hf.Qwen3ForCausalLM(config), SlowFastConfig(layers=(0,)))
    with pytest.raises(TypeError, match="has no decoder layers"):
        SlowFast(nn.Linear(2, 2), SlowFastConfig(layers=(0,)))


def test_types_follow_placeholders_padding_and_labels():
    input_ids = torch.tensor([[5, 9, 9, 6, 7], [5, 6, 7, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, 7], [-100, 6, 7, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert token_types(input_ids, 9).tolist() == [[1, 3, 3, 1, 1], [1, 1, 1, 1, 1]]
    types = token_types(input_ids, 9, mask=mask, labels=labels)
    assert types.tolist() == [[1, 3, 3, 1, 2], [1, 2, 2, 4, 4]]


def test_rows_are_packed_in_order():
    readers = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    rows, real = packed_rows(readers)
    assert real.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert rows[0, :2].tolist() == [1, 3] and rows[1].tolist() == [0, 1, 2]


def test_a_recording_in_half_precision_is_compared_beyond_its_own_rounding(tmp_path):
    """`vistok verify` allows for half a step of the recording, and a whole one is a miss."""
    case, stem = tmp_path / "case.json", "compressors_slowfast_layer_all"
    tensors = load_file(GOLDEN / f"{stem}.safetensors")
    case.write_text((GOLDEN / f"{stem}.json").read_text())
    values = tensors["cross_context"].flatten()
    place = int(values.abs().argmax())
    values[place] += 2 * torch.finfo(torch.float16).eps * values[place]
    save_file(tensors, case.with_suffix(".safetensors"))
    assert [row.name for row in verify(case) if not row.passed] == ["cross_context"]
