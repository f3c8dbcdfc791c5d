"""Ways of calling a model with reducers that once gave another answer without a word."""

import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from answers import ANSWERS, RANKED, with_answer
from oracles import BEFORE_5_18, checkpoint_layers, going_on, the_cache, visual_tokens
from reducer_matrix import kept_rows, placeholders
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, KeyNorm, VisionZip

ALL = RANKED | {"DivPrune": DivPrune(), "KeyNorm": KeyNorm()}
everyone = pytest.mark.parametrize("reducer", ALL.values(), ids=ALL)
ranked = pytest.mark.parametrize("reducer", RANKED.values(), ids=RANKED)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def llava():
    model, _, inputs = tiny_vlm("llava", seed=3)
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": placeholders(model)}
    return model, inputs(images=(1,)), settings


@everyone
@pytest.mark.parametrize("images", [(1,), (2, 1)])
def test_a_mask_longer_than_the_prompt_changes_nothing(reducer, images):
    model, _, inputs = tiny_vlm("llava", seed=3)
    inputs = inputs(images=images)
    longer = inputs | {"attention_mask": F.pad(inputs["attention_mask"], (0, 30))}
    with compress.attach(model, reducer, keep=0.4) as session:
        expected = model(**inputs).logits
        kept = kept_rows(session, len(images), layer=-1)
        logits = model(**longer).logits
        assert all(map(torch.equal, kept_rows(session, len(images), layer=-1), kept))
    torch.testing.assert_close(logits[:, -1], expected[:, -1], atol=1e-5, rtol=0)


@everyone
def test_a_mask_that_does_not_cover_the_tokens_is_refused(llava, reducer):
    model, inputs, _ = llava
    length = inputs["input_ids"].shape[1]
    with compress.attach(model, reducer, keep=0.4):
        with pytest.raises(ValueError, match=rf"attention_mask has {length - 3} columns; it must cover"):
            model(**inputs | {"attention_mask": inputs["attention_mask"][:, 3:]})
        cache = the_cache(model(**inputs, use_cache=True))
        new = torch.tensor([[9, 10, 11]])
        with pytest.raises(ValueError, match=rf"must cover the {length} tokens in the cache and the 3"):
            model(input_ids=new, attention_mask=torch.ones_like(new), **going_on(model, cache))


@everyone
def test_a_cache_may_be_continued_with_the_new_tokens_alone(llava, reducer):
    model, inputs, settings = llava
    first = torch.tensor([[1, 9, 10, 11]])
    ids = torch.cat([first, inputs["input_ids"]], 1)
    rest = {"attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    rest |= {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "pixel_values")}
    tokens = []
    with compress.attach(model, reducer, keep=0.4):
        for given in (ids, inputs["input_ids"]):
            cache = the_cache(model(input_ids=first, use_cache=True))
            out = model.generate(input_ids=given, **rest, **going_on(model, cache), **settings)
            tokens.append(out[:, given.shape[1] :])
    assert torch.equal(*tokens)


@ranked
@pytest.mark.parametrize("how", ["taken before", "through the class"])
def test_generate_by_another_way_knows_its_prompt(llava, reducer, how):
    model, inputs, settings = llava
    stock = model.generate
    with compress.attach(model, reducer, keep=0.3):
        expected = model.generate(**inputs, **settings)
        generate = stock if how == "taken before" else lambda **kw: type(model).generate(model, **kw)
        assert torch.equal(generate(**inputs, **settings), expected)
        assert torch.equal(generate(**inputs, **settings, use_cache=False), expected)


def test_ranked_reducers_need_the_whole_model(llava):
    model, *_ = llava
    for reducer in (*RANKED.values(), KeyNorm()):
        with pytest.raises(TypeError, match=r"must know where the prompt ends.*attach to the whole model"):
            compress.attach(model.model, reducer, keep=0.3)


def test_eviction_without_a_known_prompt_says_that_it_has_no_effect(llava):
    model, inputs, _ = llava
    labels = inputs["input_ids"].masked_fill(visual_tokens(model, inputs), -100)
    with (
        compress.attach(model, KeyNorm(), keep=0.1),
        pytest.warns(UserWarning, match="has no effect"),
    ):
        model(**inputs, labels=labels)


@pytest.mark.skipif(BEFORE_5_18, reason="refused in checkpointed layers anyway")
def test_eviction_before_answers_is_refused_where_layers_are_computed_again(llava):
    model, inputs, _ = llava
    longer, labels = with_answer(inputs, ANSWERS[0])
    model.train()
    checkpoint_layers(model, True)
    refused = pytest.raises(NotImplementedError, match="turn gradient checkpointing off")
    with torch.enable_grad(), compress.attach(model, KeyNorm(), keep=0.4), refused:
        model(**longer, labels=labels)


@pytest.mark.parametrize("text", ["mistral", "phi3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_eviction_under_narrow_windows_is_the_same_in_every_way_of_running(text, attention):
    model, _, inputs = tiny_vlm(f"llava_{text}_narrow", attention, seed=1)
    inputs = inputs(images=(1,))
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": placeholders(model)}
    with compress.attach(model, KeyNorm(), keep=2):
        expected = model.generate(**inputs, **settings)
        ways = [{"use_cache": False}]
        if not BEFORE_5_18:  # there a rolled back window is noticed, and raises
            ways.append({"prompt_lookup_num_tokens": 3})
        ways.append(going_on(model, hf.DynamicCache()))  # without a configuration: no windows of its own
        for way in ways:
            assert torch.equal(model.generate(**inputs, **settings, **way), expected), way


def test_rows_of_a_shortened_cache_may_change_places():
    model, _, inputs = tiny_vlm("llava_next", seed=3)
    inputs = inputs(images=(2, 1))
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    tokens = torch.tensor([[30], [41]])
    for reducer in (DivPrune(), FastV(k=1), KeyNorm()):
        with compress.attach(model, reducer, keep=0.4):
            cache = the_cache(model(**inputs, use_cache=True))
            expected = model(input_ids=tokens, attention_mask=mask, **going_on(model, cache)).logits
            cache = the_cache(model(**inputs, use_cache=True))
            cache.reorder_cache(torch.tensor([1, 0]))
            swapped = model(input_ids=tokens.flip(0), attention_mask=mask.flip(0), **going_on(model, cache))
        torch.testing.assert_close(swapped.logits.flip(0), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(BEFORE_5_18, reason="stock dynamic caches keep their length when they are reset")
@everyone
def test_a_cache_that_was_reset_starts_anew(llava, reducer):
    model, inputs, _ = llava
    with compress.attach(model, reducer, keep=0.4):
        out = model(**inputs, use_cache=True)
        cache = the_cache(out)
        cache.reset()
        assert type(cache) is hf.DynamicCache
        assert torch.equal(model(**inputs, **going_on(model, cache)).logits, out.logits)


def test_the_language_model_alone_refuses_a_shortened_cache(llava):
    model, inputs, _ = llava
    embeds = model.get_input_embeddings()(torch.tensor([[30]]))
    lm = model.model.language_model
    with compress.attach(model, DivPrune(), keep=0.4, positions="compact"):
        cache = the_cache(model(**inputs, use_cache=True))
        with pytest.raises(RuntimeError, match="called on its own with a cache that a reducer has shortened"):
            lm(inputs_embeds=embeds, **going_on(lm, cache))
        lm(inputs_embeds=embeds)


@pytest.mark.skipif(BEFORE_5_18, reason="no features can be given")
def test_whole_features_are_not_taken_for_prepared_ones(llava):
    model, inputs, _ = llava
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with compress.attach(model, DivPrune(), keep=0.25) as session:
        prepared = session.prepare(inputs)
        cache = the_cache(model(**text, mm_encoder_outputs={"image": features}, use_cache=True))
        assert cache.layers[0].keys.shape[2] == prepared.inputs["input_ids"].shape[1]


def test_prompt_tokens_behind_an_eviction_cannot_be_taken_back(llava):
    model, inputs, _ = llava
    with compress.attach(model, KeyNorm(), keep=0.4):
        cache = the_cache(model(**inputs, use_cache=True))
        with pytest.raises(NotImplementedError, match="cannot be taken back"):
            cache.crop(-2)
        model(input_ids=torch.tensor([[30, 31]]), **going_on(model, cache))
        cache.crop(-2)


def test_new_pictures_behind_a_cache_are_refused_where_attention_goes_both_ways():
    model, _, inputs = tiny_vlm("gemma3_wide")
    inputs = inputs(images=(1,))
    with compress.attach(model, DivPrune(), keep=0.5):
        cache = the_cache(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True))
        mask = F.pad(inputs["attention_mask"], (3, 0), value=1)
        with pytest.raises(NotImplementedError, match="attends in both directions within a picture"):
            model(**inputs | {"attention_mask": mask}, **going_on(model, cache))


@ranked
def test_shifted_labels_tell_the_prompt_too(llava, reducer):
    model, inputs, _ = llava
    kept = []
    with compress.attach(model, reducer, keep=0.3) as session:
        for answer in ANSWERS:
            longer, labels = with_answer(inputs, answer)
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            model(**longer, labels=labels)
            kept.append(kept_rows(session, 1, layer=-1)[0])
            model(**longer, shift_labels=shifted)
            kept.append(kept_rows(session, 1, layer=-1)[0])
    assert all(torch.equal(other, kept[0]) for other in kept)


def test_layers_that_do_not_run_and_layers_asked_for_in_vain(llava):
    model, inputs, _ = llava
    with compress.attach(model, FastV(k=1), keep=0.4) as session:
        model(**inputs)
        for layer in (7, -9, "x", True):
            with pytest.raises(ValueError, match=r"layer is .*; the model has layers 0 to 3"):
                session.explain(layer)
        model.model.language_model.config.num_hidden_layers = 2
        with pytest.raises(RuntimeError, match="2 of the 4 layers of LlavaForConditionalGeneration ran"):
            model(**inputs)
        for wrong in ("abc", [[1, 2], [3]]):
            with pytest.raises(ValueError, match="prompt_length is"):
                session.prompt_length = wrong
        session.keep = lambda image: None
        with pytest.raises(TypeError, match="keep is None"):
            model(**inputs)


def test_a_budget_below_one_token_per_tile_is_said():
    model, _, inputs = tiny_vlm("llava_next")
    with (
        compress.attach(model, VisionZip(), keep=1),
        pytest.warns(UserWarning, match="at least one token"),
    ):
        model(**inputs(images=(1,)))


def test_a_layer_whose_rotations_have_another_name_cannot_be_renumbered(llava, monkeypatch):
    model, inputs, _ = llava
    layer = type(model.model.language_model.layers[0])
    stock, lm = layer.forward, model.model.language_model
    name = "cache" if "cache" in inspect.signature(stock).parameters else "past_key_values"

    def forward(self, hidden_states, attention_mask=None, cache: hf.Cache | None = None, rope=None, **kwargs):
        return stock(self, hidden_states, attention_mask, position_embeddings=rope, **{name: cache})

    def rename(module, args, kwargs):
        return args, {
            "cache": kwargs[name],
            "attention_mask": kwargs["attention_mask"],
            "rope": kwargs["position_embeddings"],
        }

    monkeypatch.setattr(layer, "forward", forward)
    handles = [module.register_forward_pre_hook(rename, with_kwargs=True) for module in lm.layers]
    refused = pytest.raises(TypeError, match="takes neither position_embeddings nor position_ids by name")
    with compress.attach(model, FastV(k=1), keep=0.4, positions="compact"), refused:
        model(**inputs, use_cache=True)
    for handle in handles:
        handle.remove()
