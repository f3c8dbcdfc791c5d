"""A release that renames, appends twice or hides must raise; none may answer."""

import ast
import inspect
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from layer_cut import Cut
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, KeyNorm, hosts
from vistok.compress.hosts import at_tokens, cache_in, cache_parameter

REDUCERS = {"features": DivPrune(), "layer": Cut(k=1), "attention": FastV(k=1), "cache": KeyNorm()}
stages = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
NAME = "cache" if "cache" in inspect.signature(hf.LlamaModel.forward).parameters else "past_key_values"


@pytest.fixture
def llava():
    model, _, inputs = tiny_vlm("llava")
    return model, inputs(images=(2, 1, 0))


def both(model, inputs):
    """A forward and a generation must fail in the same way."""
    for run in (
        lambda: model(**inputs, use_cache=True),
        lambda: model.generate(**inputs, max_new_tokens=3, do_sample=False),
    ):
        with torch.no_grad():
            yield run


# Drills -----------------------------------------------------------------------------------------------------


@stages
@pytest.mark.parametrize("part", ["language model", "decoder layer", "attention"])
def test_a_keyword_that_nobody_knows_is_refused_when_attaching(llava, monkeypatch, reducer, part):
    model, _ = llava
    lm = model.model.language_model
    module = {"language model": lm, "decoder layer": lm.layers[0], "attention": lm.layers[0].self_attn}[part]
    stock = type(module).forward

    def forward(self, hidden_states=None, inputs_embeds=None, attention_mask=None, store=None, **kwargs):
        raise AssertionError("must not run")

    forward.__qualname__ = stock.__qualname__
    monkeypatch.setattr(type(module), "forward", forward)
    with pytest.raises(TypeError, match=rf"{part} \w+ of transformers {hf.__version__}"):
        compress.attach(model, reducer, keep=0.5)


@stages
def test_a_keyword_that_changes_while_attached_is_refused(llava, reducer):
    model, inputs = llava
    lm = model.model.language_model

    def rename(module, args, kwargs):
        return args, {"store" if name == NAME else name: value for name, value in kwargs.items()}

    with compress.attach(model, reducer, keep=0.5):
        handle = lm.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad(), pytest.raises(TypeError, match=r"given its cache as 'store'"):
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
        finally:
            handle.remove()


@stages
def test_keys_that_are_appended_twice_are_noticed(llava, monkeypatch, reducer):
    model, inputs = llava
    update = hf.DynamicCache.update

    def twice(self, keys, values, layer, *args, **kwargs):
        if layer == 2:
            update(self, keys, values, layer, *args, **kwargs)
        return update(self, keys, values, layer, *args, **kwargs)

    with compress.attach(model, reducer, keep=0.5):
        monkeypatch.setattr(hf.DynamicCache, "update", twice)
        # What attention does with twice as many keys is an error of its own for some masks.
        for run in both(model, inputs):
            with pytest.raises(RuntimeError):
                run()
    monkeypatch.undo()
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(images=(1,))
    with compress.attach(model, reducer, keep=0.5):
        monkeypatch.setattr(hf.DynamicCache, "update", twice)
        message = rf"LlavaForConditionalGeneration holds \d+ tokens in layer 2 where .*{hf.__version__}"
        for run in both(model, inputs):
            with pytest.raises(RuntimeError, match=message):
                run()


@stages
def test_a_cache_that_is_hidden_is_noticed(llava, monkeypatch, reducer):
    model, inputs = llava
    lm = model.model.language_model
    stock = type(lm).forward

    def hiding(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        out[NAME] = SimpleNamespace(hidden=out[NAME])
        return out

    hiding.__signature__ = inspect.signature(stock)
    monkeypatch.setattr(type(lm), "forward", hiding)
    with compress.attach(model, reducer, keep=0.5):
        for run in both(model, inputs):
            with pytest.raises(RuntimeError, match=r"returned no cache .*transformers"):
                run()


@stages
def test_one_layer_that_keeps_nothing_is_noticed(llava, monkeypatch, reducer):
    model, inputs = llava
    update = hf.DynamicCache.update

    def forgetful(self, keys, values, layer, *args, **kwargs):
        return (keys, values) if layer == 3 else update(self, keys, values, layer, *args, **kwargs)

    with compress.attach(model, reducer, keep=0.5):
        monkeypatch.setattr(hf.DynamicCache, "update", forgetful)
        for run in both(model, inputs):
            with pytest.raises(RuntimeError, match="layer 3"):
                run()


@stages
@pytest.mark.parametrize("kind", ["static", "quantized-like"])
def test_other_caches_are_refused_and_stay_what_they_are(llava, reducer, kind):
    model, _ = llava
    inputs = tiny_vlm("llava")[2](images=(1,))

    class Other(hf.DynamicCache):
        pass

    config = model.config.text_config
    cache = hf.StaticCache(config=config, max_cache_len=64) if kind == "static" else Other(config=config)
    before = type(cache)
    refused = pytest.raises(NotImplementedError, match=rf"brings a {before.__name__}.*session\.prepare")
    with torch.no_grad(), compress.attach(model, reducer, keep=0.5), refused:
        model(**inputs, **{NAME: cache})
    assert type(cache) is before


# Signatures and shapes --------------------------------------------------------------------------------------


def test_the_cache_is_found_by_type_or_refused():
    cache = hf.DynamicCache()
    assert cache_in({"a": 1, "whatever": cache}) is cache
    assert cache_in({"a": cache, "b": cache}) is cache
    assert cache_in({"a": None}) is None
    with pytest.raises(TypeError, match="2 came as a, b"):
        cache_in({"a": cache, "b": hf.DynamicCache()})

    def two(cache: hf.Cache | None, encoder: hf.Cache | None):
        pass

    def later(hidden, memory: "hf.DynamicCache | None" = None):
        pass

    with pytest.raises(TypeError, match="takes 2 key-value caches"):
        cache_parameter(two)
    assert cache_parameter(later) == "memory"
    assert cache_parameter(hf.LlamaModel.forward) == NAME


@pytest.mark.parametrize("shape", [(2, 7), (1, 7), (2, 7, 3), (1, 7, 3), (3, 2, 7), (3, 1, 7), (4, 2, 7, 5)])
def test_arguments_per_token_are_gathered_by_shape(shape):
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    index = torch.tensor([[0, 3, 6], [1, 2, 5]])
    cut = at_tokens("x", value, index, 7)
    planes = value[None] if value.shape[0] in (1, 2) and value.shape[1] == 7 else value
    result = cut[None] if planes.ndim > value.ndim else cut
    for plane in range(len(planes)):
        for row in range(2):
            for new, old in enumerate(index[row]):
                source = planes[plane, row if planes.shape[1] == 2 else 0, old]
                assert torch.equal(result[plane, row, new], source)
    assert at_tokens("position_embeddings", torch.ones(2, 2, 7, 4), index, 7).shape == (2, 2, 3, 4)
    rotations = torch.arange(3 * 2 * 7 * 7).view(3, 2, 7, 7)  # heads as wide as there are tokens
    expected = torch.stack([rotations[:, row, index[row]] for row in range(2)], 1)
    assert torch.equal(at_tokens("position_embeddings[0]", rotations, index, 7), expected)
    nested = at_tokens("x", (value, {"y": value}), index, 7)
    assert torch.equal(nested[0], cut)
    assert torch.equal(nested[1]["y"], cut)


def test_what_is_not_per_token_stays_or_is_refused_by_name():
    index = torch.tensor([[0, 3], [1, 2]])
    for value in (None, 3, "x", torch.ones(4, 5)):
        assert at_tokens("x", value, index, 7) is value
    for shape in ((7,), (7, 4), (2, 3, 7), (2, 1, 7, 7), (5, 3, 7), (2, 1, 7, 4), (2, 2, 7, 4)):
        with pytest.raises(TypeError, match=r"argument router has the shape .* on 7 tokens"):
            at_tokens("router", torch.ones(shape), index, 7)
    with pytest.raises(TypeError, match="argument places is a SimpleNamespace"):
        at_tokens("places", SimpleNamespace(x=torch.ones(2, 7)), index, 7)
    pair = namedtuple("Pair", "cos sin")(torch.ones(1, 7, 3), torch.ones(1, 7, 3))
    assert at_tokens("rotary", pair, index, 7).sin.shape == (2, 2, 3)


def test_hooks_read_only_arguments_that_are_checked():
    """Every `kwargs.get("name")` in compress reads a name that `check_parts` finds, or an optional one."""
    optional = {  # None where a model has no such thing
        "use_cache",
        "labels",
        "shift_labels",
        "logits_to_keep",
        "mm_encoder_outputs",
        "visual_pos_masks",
        "deepstack_visual_embeds",
        "inputs",
        "is_causal",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "cross_attention_states",
        "cross_attention_mask",
        "vision_feature_layer",
        "image_sizes",
        "image_grid_thw",
        "spatial_shapes",
        "position_embeddings",
        "rope",
        "shared_rel_pos_bias",
    }
    checked = {name for names in hosts.READ.values() for name in names}
    unchecked = {}
    for path in sorted((Path(compress.__file__).parent).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            owner, key = node.func.value, node.args[0]
            owner = getattr(owner, "id", getattr(owner, "attr", ""))
            read = node.func.attr == "get" and owner in ("kwargs", "arguments")
            if read and isinstance(key, ast.Constant) and key.value not in checked | optional:
                unchecked[f"{path.name}:{node.lineno}"] = key.value
    assert not unchecked
