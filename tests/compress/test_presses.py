"""Presses of kvpress on visual tokens: small ones with its interface, since no test needs it installed."""

from dataclasses import dataclass
from functools import cache

import pytest
import reducer_matrix as matrix
import torch
from answers import ANSWERS, with_answer
from oracles import decoder, going_on, the_cache, visual_tokens
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import KeyNorm
from vistok.compress.guests.kvpress import Press


@dataclass
class BasePress:
    """What all presses have."""

    def post_init_from_model(self, model):
        self.model_type = model.config.model_type

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def forward_hook(self, module, input, kwargs, output):
        raise NotImplementedError

    def __call__(self, model):
        raise NotImplementedError


@dataclass
class ScorerPress(BasePress):
    """Presses that score tokens."""

    compression_ratio: float = 0.0

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        raise NotImplementedError


class KnormPress(ScorerPress):
    """Short keys stay."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.float().norm(dim=-1)


class LastRowPress(ScorerPress):
    """The attention of the last query, computed from hidden states and rotations as SnapKV and TOVA do."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None
        cos, sin = kwargs["position_embeddings"]
        query = module.q_proj(hidden_states[:, -1:]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        first, second = query.chunk(2, -1)
        query = query * cos[:, None, -1:] + torch.cat([-second, first], -1) * sin[:, None, -1:]
        groups = query.shape[1] // keys.shape[1]
        logits = query @ keys.repeat_interleave(groups, 1).transpose(2, 3) / module.head_dim**0.5
        return logits.softmax(-1)[:, :, 0].unflatten(1, (-1, groups)).mean(2)


class EndsPress(ScorerPress):
    """All but a stretch behind the first token stays, as in StreamingLLM; it reads the model's rotations."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        length = keys.shape[2]
        assert module.rotary_emb(keys, torch.arange(length)[None])[0].shape[1] == length
        scores = torch.ones(keys.shape[:3])
        scores[:, :, 1 : 1 + round(self.compression_ratio * length)] = 0
        return scores


class LayerBudgetPress(KnormPress):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys, values


class DecodingPress(KnormPress):
    def forward_hook(self, module, input, kwargs, output):
        return output


class ObservedAttentionPress(KnormPress):
    pass


@dataclass
class WrapperPress(BasePress):
    press: object = None


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def fixture(name="llava"):
    model, _, inputs = tiny_vlm(name, seed=3)
    return model, inputs


def kept(model, inputs, reducer, layer=1, **options):
    """The visual tokens of each image that a layer's cache holds, and which head holds which."""
    with compress.attach(model, reducer, **options) as session:
        model(**inputs)
        return [(e.tokens.tolist(), e.heads) for e in session.explain(layer, cache=True)]


@pytest.mark.parametrize("press", [KnormPress(), Press(press=KnormPress(), span_only=True)], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_knorm_equals_keynorm(name, press):
    model, inputs = fixture(name)
    inputs = inputs(images=(2, 1, 0))
    assert kept(model, inputs, press, keep=0.4) == kept(model, inputs, KeyNorm(), keep=0.4)
    tokens = []
    for reducer in (press, KnormPress(), KeyNorm()):
        with compress.attach(model, reducer, keep=0.4):
            tokens.append(matrix.outputs(model, inputs)[1])
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[2])


@pytest.mark.parametrize(
    "press", [LastRowPress(), EndsPress(), KnormPress(), Press(press=KnormPress(), per_head=True)], ids=str
)
def test_a_press_is_a_reducer_like_any_other(press):
    model, inputs = fixture()
    reducer = press if isinstance(press, Press) else Press(press=press)
    matrix.whole(model, inputs(images=(2, 1, 0)), reducer)
    assert not any("rotary_emb" in vars(layer.self_attn) for layer in decoder(model).layers)


def test_scores_from_states_equal_the_last_row_of_the_map():
    """In a padded batch, and with an answer behind the prompt: presses get single prompts without either."""
    model, inputs = fixture()
    inputs = inputs(images=(2, 1))
    model.set_attn_implementation("eager")
    maps = model(**inputs, output_attentions=True).attentions[1]
    model.set_attn_implementation("sdpa")
    longer, labels = with_answer(inputs, ANSWERS[0])
    plain = kept(model, inputs, LastRowPress(), keep=5)
    with compress.attach(model, LastRowPress(), keep=5) as session:
        model(**longer, labels=labels)
        behind = [(e.tokens.tolist(), e.heads) for e in session.explain(1, cache=True)]
    assert plain == behind
    expected = []
    for row, visual in enumerate(visual_tokens(model, inputs)):
        scores = maps[row, :, -1, visual].mean(0)
        expected += [sorted(part.topk(5).indices.tolist()) for part in scores.split(16)]
    assert [tokens for tokens, _ in plain] == expected


def test_with_per_head_every_head_keeps_what_kvpress_would_gather():
    model, inputs = fixture()
    inputs = inputs(images=(1,))
    keys = the_cache(model(**inputs, use_cache=True)).layers[1].keys[0]
    visual = visual_tokens(model, inputs)[0]
    expected = KnormPress().score(None, None, keys[None][:, :, visual], None, None, {})[0].topk(4).indices
    (tokens, heads), *_ = kept(model, inputs, Press(press=KnormPress(), per_head=True), keep=4)
    for head, best in zip(heads, expected, strict=True):
        assert [token for token, held in zip(tokens, head, strict=True) if held] == sorted(best.tolist())


def test_the_press_has_the_share_that_leaves_while_it_scores():
    model, inputs = fixture()
    press = EndsPress(compression_ratio=0.5)
    spans = kept(model, inputs(images=(1,)), Press(press=press, span_only=True), keep=4)
    assert spans[0][0] == [0, 13, 14, 15]
    assert press.compression_ratio == 0.5
    assert len(kept(model, inputs(images=(1,)), Press(press=press))[0][0]) == 8  # its own ratio
    assert press.model_type == "llava"


@pytest.mark.parametrize(
    ("press", "message"),
    [
        (LayerBudgetPress(), r"LayerBudgetPress cannot act .* LayerBudgetPress.compress is its own"),
        (DecodingPress(), "DecodingPress.forward_hook is its own"),
        (ObservedAttentionPress(), "reads whole attention maps.*use the reducer h2o"),
        (WrapperPress(), "WrapperPress cannot act on visual tokens alone: it has no score per token"),
        (WrapperPress(KnormPress()), "it has no score per token; give the KnormPress inside it"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_presses_that_do_more_than_score_are_refused_by_name(press, message):
    model, _ = fixture()
    with pytest.raises(TypeError, match=message):
        compress.attach(model, press, keep=0.5)


def test_other_values_are_refused():
    model, _ = fixture()
    with pytest.raises(TypeError, match=r"3 is not a reducer; give a name .* or a press of kvpress"):
        compress.attach(model, 3)
    with pytest.raises(TypeError, match="press is 3; it takes an instance of a press of kvpress"):
        Press(press=3)


def returning(make):
    """A press that returns what `make` makes of the keys."""

    class SomePress(ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return make(keys)

    return SomePress()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda keys: keys[..., :2, 0],
            r"SomePress returned scores of shape \(1, 2, 2\) in layer 0; .*\(1, 2, ",
        ),
        (lambda keys: None, "SomePress returned scores of shape NoneType"),
        (lambda keys: keys[..., 0] * torch.nan, r"not numbers \(NaN\) in layer 0"),
        (
            lambda keys: keys[..., 99],
            r"SomePress could not score the \d+ tokens .* layer 0: IndexError: index 99",
        ),
    ],
    ids=["shape", "none", "nan", "failure"],
)
def test_what_a_press_returns_is_checked(make, message):
    model, inputs = fixture()
    with compress.attach(model, returning(make), keep=0.5), pytest.raises(ValueError, match=message):
        model(**inputs(images=(1,)))


def test_rotations_in_several_planes_are_refused_to_presses_that_read_them():
    model, inputs = fixture()
    inputs = inputs(images=(1,))

    def with_planes(module, args, kwargs):
        return args, {**kwargs, "position_embeddings": tuple(x[None] for x in kwargs["position_embeddings"])}

    seen = []

    class ReadingPress(ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            for read in (lambda: kwargs["position_embeddings"], lambda: kwargs.get("position_embeddings")):
                with pytest.raises(ValueError, match="several planes"):
                    read()
            with pytest.raises(ValueError, match="several planes"):
                module.rotary_emb(keys, None)
            seen.append(kwargs.get("other", "absent"))
            return keys[..., 0]

    def back(module, args, kwargs):
        return args, {**kwargs, "position_embeddings": tuple(x[0] for x in kwargs["position_embeddings"])}

    attentions = [layer.self_attn for layer in decoder(model).layers]
    before = [m.register_forward_pre_hook(with_planes, with_kwargs=True) for m in attentions]
    with compress.attach(model, ReadingPress(), keep=0.5):
        after = [m.register_forward_pre_hook(back, with_kwargs=True) for m in attentions]
        model(**inputs)
    for handle in [*before, *after]:
        handle.remove()
    assert seen == ["absent"] * len(attentions)


def test_a_press_that_needs_the_whole_conversation_says_so():
    model, inputs = fixture()
    first, second = inputs(images=(1,)), inputs(images=(1,))
    mask = torch.ones(1, 2 * first["input_ids"].shape[1], dtype=torch.long)
    with compress.attach(model, LastRowPress(), keep=0.5):
        cache = the_cache(model(**first, use_cache=True))
        with pytest.raises(NotImplementedError, match="give the whole conversation in one call"):
            model(**{**second, "attention_mask": mask}, **going_on(model, cache))
