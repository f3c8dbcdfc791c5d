"""Families outside the six fixtures: those that work give what masking gives, the others are refused by
name, and a budget is met or the session says that it is not."""

import pytest
import reducer_matrix as matrix
import torch
import transformers as hf
from bare_vlms import bare_vlm
from layer_cut import Cut
from oracles import the_cache
from reducer_matrix import kept_rows
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, HiRED, KeyNorm, PiToMe, PyramidDrop, Random, ToMe, VisionZip

pytestmark = [
    pytest.mark.skipif(not hasattr(hf, "Gemma4Config"), reason="these models came later"),
    pytest.mark.slow,
]
PACKED = ("glm4v", "glm4v_moe", "ernie4_5_vl_moe", "video_llama_3", "paddleocr_vl", "gemma4")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reducer", [Random(), FastV(k=1), Cut(k=2), KeyNorm()], ids=str)
@pytest.mark.parametrize(
    "name", ["glm4v_moe", "ernie4_5_vl_moe", "glm4v", "paddleocr_vl", "video_llama_3", "deepseek_vl"]
)
def test_layers_with_more_arguments_per_token_are_cut_like_others(name, reducer, attention):
    model, inputs = bare_vlm(name, attention)
    matrix.whole(model, inputs, reducer)


@pytest.mark.parametrize("reducer", [HiRED(), VisionZip()], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_towers_that_pack_pictures_and_are_not_known_are_refused_by_name(name, reducer):
    model, _ = bare_vlm(name)
    with pytest.raises(TypeError, match=f"{type(model).__name__} .*packs pictures"):
        compress.attach(model, reducer, keep=0.5)


@pytest.mark.parametrize("method", [ToMe, PiToMe])
@pytest.mark.parametrize("name", ["ovis2", "deepseek_vl_hybrid", "got_ocr2", "glm4v", "gemma4"])
def test_merging_that_cannot_shorten_the_prompt_is_refused(name, method):
    model, _ = bare_vlm(name)
    with pytest.raises(TypeError, match=f"{type(model).__name__}|cannot merge"):
        compress.attach(model, method(), keep=0.5)


@pytest.mark.parametrize("method", [ToMe, PiToMe])
@pytest.mark.parametrize("name", ["deepseek_vl", "video_llava"])
def test_merging_meets_its_budget_where_a_token_is_a_patch(name, method):
    model, inputs = bare_vlm(name)
    with torch.no_grad(), compress.attach(model, method(), keep=0.5) as session:
        model(**inputs)
        assert [image.layers[0] for image in session.report().images] == [8, 8]


@pytest.mark.parametrize("name", ["lighton_ocr", "aya_vision", "cohere2_vision"])
def test_merging_says_where_a_token_stands_for_several_patches(name):
    model, inputs = bare_vlm(name)
    with pytest.warns(UserWarning, match="makes one visual token of 2 × 2 patches"):
        compress.attach(model, ToMe(), keep=0.5).detach()
    with torch.no_grad(), compress.attach(model, HiRED(), keep=0.5) as session:
        model(**inputs)
        assert [image.layers[0] for image in session.report().images] == [2, 2]


def test_gemma_4_reports_the_bytes_its_cache_holds():
    model, inputs = bare_vlm("gemma4")
    with torch.no_grad(), compress.attach(model, DivPrune(), keep=0.5) as session:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        report = session.report()
        length = inputs["input_ids"].shape[1] - 4
        cache = next(value for value in out.values() if isinstance(value, hf.Cache))
        held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert report.cache_bytes == sum(2 * layer.keys[:, :, :length].nbytes for layer in held)
        logits = model(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    with pytest.raises(TypeError, match="use the keys of others"):
        compress.attach(model, KeyNorm(), keep=0.5)
    text, _ = bare_vlm("gemma4_text")
    for reducer in (HiRED(), ToMe(), DivPrune()):
        with pytest.raises(TypeError, match=r"Gemma4ForConditionalGeneration.* no vision tower"):
            compress.attach(text, reducer, keep=0.5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_of_logits_to_keep_alone_is_restored(attention):
    """Gemma 4 leaves out all but the last tokens in layers that use the keys of others."""
    model, inputs = bare_vlm("gemma4", attention)
    with torch.no_grad(), compress.attach(model, DivPrune(), keep=0.5):
        whole = model(**inputs).logits
        last = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], atol=1e-5, rtol=0)


# Windows ----------------------------------------------------------------------------------------------------

WINDOWED = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "qwen3_moe", "ministral3")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reducer", [FastV(k=1), Cut(k=2), KeyNorm()], ids=["FastV", "Cut", "KeyNorm"])
@pytest.mark.parametrize("text", WINDOWED)
def test_wide_windows_without_layer_types_change_nothing(text, reducer, attention):
    model, _, inputs = tiny_vlm(f"llava_{text}", attention)
    matrix.whole(model, inputs(images=(2, 1, 0)), reducer)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [(1,), (2, 1, 1)])
@pytest.mark.parametrize("text", ["mistral", "phi3", "qwen3_moe"])
def test_windows_shorter_than_the_prompt_count_the_tokens_that_are_left(text, batch, attention):
    model, _, inputs = tiny_vlm(f"llava_{text}_narrow", attention)
    inputs = inputs(images=batch)
    reducer = Cut(k=2)
    with compress.attach(model, reducer, keep=0.5) as session:
        logits = model(**inputs).logits
        kept = kept_rows(session, len(batch), layer=2)
    for row in range(len(batch)):
        expected = _by_hand(model, inputs, row, kept[row], cut=2, window=12)
        assert torch.allclose(logits[row, -1], expected, atol=2e-5)


def _by_hand(model, inputs, row, kept, cut, window):
    """Logits of the last token of one row: each layer on the tokens that are left, with an explicit mask."""
    core, lm = model.model, model.model.language_model
    ids = inputs["input_ids"][row]
    real = inputs["attention_mask"][row].bool()
    pixels = inputs["pixel_values"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = core.get_image_features(pixels, return_dict=True).pooler_output
    visual = inputs["input_ids"] == model.config.image_token_id
    embeds[visual] = torch.cat([item.reshape(-1, item.shape[-1]) for item in features])
    hidden = embeds[row : row + 1, real]
    places = torch.arange(int(real.sum()))
    is_visual = ids[real] == model.config.image_token_id
    rotary = lm.rotary_emb
    for i, layer in enumerate(lm.layers):
        if i == cut:
            stays = ~is_visual
            stays[is_visual.nonzero().squeeze(1)[kept]] = True
            hidden, places = hidden[:, stays], places[stays]
        index = torch.arange(len(places))
        near = (index <= index[:, None]) & (index > index[:, None] - window)
        if model.config.text_config._attn_implementation == "sdpa":
            mask = near[None, None]
        else:
            mask = torch.zeros(near.shape).masked_fill(~near, torch.finfo(torch.float32).min)[None, None]
        positions = places[None]
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotary(hidden, positions),
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(lm.norm(hidden))[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["mistral_narrow", "mistral", "phi3_narrow"])
def test_eviction_reaches_layers_with_windows(text, attention):
    model, _, inputs = tiny_vlm(f"llava_{text}", attention)
    inputs = inputs(images=(1,))
    with compress.attach(model, KeyNorm(), keep=2) as session:
        cache = the_cache(model(**inputs))
        kept = [len(session.explain(i, cache=True)[0].tokens) for i in range(4)]
        report = session.report()
    assert kept == [2] * 4
    assert report.cache_bytes == sum(2 * layer.keys.nbytes for layer in cache.layers)
    matrix.cutting_equals_masking(model, inputs, KeyNorm(), 2, 3e-5, True)


@torch.no_grad()
def test_what_a_window_has_let_go_of_is_not_counted():
    model, _, inputs = tiny_vlm("llava_mistral_narrow")
    inputs = inputs(images=(1,))
    with compress.attach(model, Random(), keep=0.75) as session:
        cache = the_cache(model(**inputs))
        report = session.report()
    assert report.cache_bytes == sum(2 * layer.keys.nbytes for layer in cache.layers)
    assert report.cache_bytes_full == 4 * 2 * 2 * 16 * 4 * 11  # layers, keys and values, heads, width, bytes


def test_a_mask_that_is_not_what_the_configuration_says_is_refused(monkeypatch):
    model, _, inputs = tiny_vlm("llava_mistral_narrow", "eager")
    modeling = hf.models.mistral.modeling_mistral
    monkeypatch.setattr(modeling, "create_sliding_window_causal_mask", modeling.create_causal_mask)
    cut = PyramidDrop(layer_list=(1,), image_token_ratio_list=(0.5,))
    mismatch = pytest.raises(RuntimeError, match=r"LlavaFor.* gives to layer 1 is not that of sliding")
    with torch.no_grad(), compress.attach(model, cut), mismatch:
        model(**inputs(images=(1,)))
