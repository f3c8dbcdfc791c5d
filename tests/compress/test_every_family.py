"""Every family that transformers builds for pictures and text works, or is refused by name."""

import inspect
import re

import pytest
import reducer_matrix as matrix
import torch
import transformers as hf
from bare_vlms import BARE, bare_vlm
from layer_cut import Cut
from oracles import going_on, the_cache
from tiny_vlms import FIXTURES, MORE
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from vistok import compress
from vistok.compress import DivPrune, FastV, HiRED, KeyNorm, Random
from vistok.compress.families import FAMILIES, known_families, refusal, register_family
from vistok.compress.tiny.trial import tried

# Older releases have fewer.
HERE = [name for name in BARE if name in CLASSES and refusal(name) is None]
RUNNING = ("qwen3_5", "qwen3_5_moe", "lfm2_vl")
FEATURES_ALONE = (*RUNNING, "gemma3n", "gemma4")
ATTENDING = [name for name in HERE if name not in FEATURES_ALONE]
BLOCKS = [
    *("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr", "ernie4_5_vl_moe", "video_llama_3"),
    *("qwen3_5", "qwen3_5_moe", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "qwen3_vl_moe"),
    *("cosmos3_edge", "cosmos3_omni", "exaone4_5", "hyperclovax_vision_v2", "minimax_m3_vl"),
]
ROWS = ["paddleocr_vl", "kimi_k25", "lfm2_vl"]
TILES = ["aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "janus", "ovis2", "qianfan_ocr"]
MIXING = re.compile(r"(out_proj|o_proj|attn\.proj|attention\.proj|projection_layer|wo)\.(weight|bias)$")


def of(names):
    return pytest.mark.parametrize("name", [name for name in names if name in HERE])


# The list ---------------------------------------------------------------------------------------------------


def test_every_family_of_the_installed_release_is_known_by_name():
    assert set(CLASSES) <= set(known_families())


def test_every_family_that_is_not_refused_has_a_tiny_model():
    built = {*BARE, *FIXTURES, *MORE, "blip-2", "smolvlm"}
    assert {name for name in known_families() if refusal(name) is None} <= built


def test_a_known_family_is_not_registered_again():
    for name in ("llava", "mllama", "fuyu"):
        with pytest.raises(ValueError, match="known already"):
            register_family(name, FAMILIES["llava"])


@pytest.mark.parametrize("name", ["llava", "janus", "molmo2", "blip-2", "fuyu"])
def test_a_trial_reports_stages_layout_or_the_reason(name):
    if name not in CLASSES:
        pytest.skip("a later release has it")
    trial = tried(name)
    expected = {
        "llava": (["vision", "features", "layer", "cache"], True, ""),
        "janus": (["features", "layer", "cache"], True, ""),
        "molmo2": (["features", "layer", "cache"], False, ""),
        "blip-2": (["features"], False, ""),
        "fuyu": ([], False, refusal("fuyu")),
    }
    assert (trial.stages, trial.layout, trial.reason) == expected[name]


@pytest.mark.parametrize("name", ["blip", "git", "pix2struct", "idefics", "fast_vlm", "t5gemma2"])
def test_models_of_refused_families_are_refused_with_the_reason(name):
    config = CONFIG_MAPPING[name]()
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for field in ("num_hidden_layers", "num_layers"):
            if isinstance(getattr(part, field, None), int):
                setattr(part, field, 1)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:1]
    try:
        with torch.device("meta"):
            model = getattr(hf, CLASSES[name])(config)
    except (ValueError, TypeError, ImportError) as error:
        pytest.skip(f"stock {name} cannot be built from one layer: {error}")
    with pytest.raises(TypeError, match=re.escape(f"{type(model).__name__}: {refusal(name)}")):
        compress.attach(model, DivPrune(), keep=0.5)


# What works -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@of(HERE)
def test_features_equal_the_shortened_prompt(name):
    model, inputs = bare_vlm(name)
    matrix.whole(model, inputs, Random())


@pytest.mark.slow
@pytest.mark.parametrize("reducer", [FastV(k=1), Cut(k=2), KeyNorm()], ids=["FastV", "Cut", "KeyNorm"])
@of(ATTENDING)
def test_layers_and_caches_equal_masking(name, reducer):
    model, inputs = bare_vlm(name)
    matrix.whole(model, inputs, reducer)


@pytest.mark.parametrize("reducer", [FastV(k=1), KeyNorm()], ids=["FastV", "KeyNorm"])
@of(RUNNING)
def test_language_models_with_a_running_state_take_reducers_of_features_alone(name, reducer):
    model, _ = bare_vlm(name)
    message = f"{type(model).__name__} mixes attention with .*so {type(reducer).__name__} cannot drop tokens"
    with pytest.raises(TypeError, match=message):
        compress.attach(model, reducer, keep=0.5)


def padded(name):
    """A prompt with both pictures, and a shorter one with the first alone, padded on the left."""
    model, inputs = bare_vlm(name)
    ids = inputs["input_ids"][0]
    end = int((ids == 103).nonzero()[0]) + 1
    short = torch.cat([torch.zeros(len(ids) - end - 2, dtype=torch.long), ids[:end], ids[-2:]])
    batch = {"input_ids": torch.stack([ids, short])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    if "mm_token_type_ids" in inputs:
        batch["mm_token_type_ids"] = (batch["input_ids"] == 100).long()
    first = 16 if "image_grid_thw" in inputs else 1
    for key, value in inputs.items():
        if key not in batch:
            batch[key] = torch.cat([value, value[: first if key == "pixel_values" else 1]])
    return model, batch


@of(RUNNING)
def test_padding_does_not_enter_a_running_state(name):
    model, batch = padded(name)
    matrix.whole(model, batch, Random())


@torch.no_grad()
@of(["lfm2_vl"])
def test_a_new_picture_after_a_running_state_equals_one_go(name):
    model, inputs = bare_vlm(name)
    cut = int((inputs["input_ids"][0] == 103).nonzero()[0]) + 2

    def part(place, picture):
        media = {key: value[picture] for key, value in inputs.items() if len(value) == 2}
        return {"input_ids": inputs["input_ids"][:, place], **media}

    with compress.attach(model, Random(), keep=0.5):
        expected = model(**inputs).logits
        first = model(**part(slice(cut), slice(1)), use_cache=True)
        cache = the_cache(first)
        more = part(slice(cut, None), slice(1, 2)) | {"attention_mask": inputs["attention_mask"]}
        second = model(**more, **going_on(model, cache), use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, atol=2e-5, rtol=0)


@torch.no_grad()
@of(RUNNING)
def test_a_report_leaves_out_the_cost_of_a_running_state(name):
    model, inputs = bare_vlm(name)
    with compress.attach(model, DivPrune(), keep=0.5) as session:
        model(**inputs)
        report = session.report()
    assert report.flops is None and report.flops_full is None
    assert 0 < report.cache_bytes < report.cache_bytes_full
    assert "GFLOPs" not in str(report)


@torch.no_grad()
@of(["idefics2", "granite_docling", "perception_lm"])
def test_neighbouring_tokens_are_an_image_where_items_are_not(name):
    model, inputs = bare_vlm(name)
    if name == "perception_lm":  # two tiles of one picture, then one of another
        tile = inputs["pixel_values"]
        ids = torch.tensor([[1, 5, 102, *[100] * 8, 103, 7, 102, *[100] * 4, 103, 9]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.cat([tile, tile[:1]]),
        }
    with compress.attach(model, DivPrune(), keep=0.5) as session:
        model(**inputs)
        counts = [(image.tokens, image.layers[0]) for image in session.report().images]
        assert all(explanation.grid is None for explanation in session.explain())
    assert (
        counts
        == {
            "idefics2": [(8, 4), (8, 4)],
            "granite_docling": [(4, 2), (4, 2)],
            "perception_lm": [(8, 4), (4, 2)],
        }[name]
    )


# Layouts ----------------------------------------------------------------------------------------------------


def changed_tokens(name):
    """For each patch of the first picture, in raster order, which tokens change with it where the tower's
    attention adds nothing, and the grid of that picture as the session reports it."""
    model, inputs = bare_vlm(name)
    core = model.base_model
    with torch.no_grad(), compress.attach(model, Random(), keep=0.5) as session:
        model(**inputs)
        grid = session.explain()[0].grid
    encode = core.get_image_features
    names = [key for key in inspect.signature(encode).parameters if key in inputs]
    parameters = dict(core.get_encoder(modality="image").named_parameters())
    stock = {key: value.detach().clone() for key, value in parameters.items() if MIXING.search(key)}
    assert stock

    def features(pixels):
        arguments = {key: inputs[key] for key in names} | {"pixel_values": pixels}
        items = encode(**arguments, return_dict=True).pooler_output
        return torch.cat([item.reshape(-1, item.shape[-1]) for item in items])

    changes = []
    with torch.no_grad():
        try:
            for key in stock:
                parameters[key].zero_()
            pixels = inputs["pixel_values"]
            before = features(pixels)
            for row in range(4):
                for column in range(4):
                    other = pixels.clone()
                    if name in TILES:
                        side = 14
                        other[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 1
                    elif name in ROWS:
                        (other[0] if name == "lfm2_vl" else other)[row * 4 + column] += 1
                    else:  # blocks of 2 × 2 patches
                        other[(row // 2 * 2 + column // 2) * 4 + row % 2 * 2 + column % 2] += 1
                    moved = (features(other) - before).abs().amax(-1) > 1e-6
                    changes.append(moved.nonzero().squeeze(1).tolist())
        finally:
            for key, value in stock.items():
                parameters[key].copy_(value)
    return changes, grid


@of([*TILES, *ROWS, *BLOCKS])
def test_the_grid_says_which_patches_are_behind_a_token(name):
    changes, grid = changed_tokens(name)
    pool = 4 // grid.height
    cells = [(int(index) // grid.width, int(index) % grid.width) for index in grid.index]
    for number, tokens in enumerate(changes):
        row, column = number // 4, number % 4
        assert tokens == [cells.index((row // pool, column // pool))]


@of(["aya_vision", "cohere2_vision", "ovis2", "janus", "qianfan_ocr", "qwen3_vl_moe"])
def test_methods_that_read_the_tower_keep_their_budget(name):
    model, inputs = bare_vlm(name)
    with torch.no_grad(), compress.attach(model, HiRED(), keep=0.5) as session:
        model(**inputs)
        assert all(image.layers[0] * 2 == image.tokens for image in session.report().images)


@of(["got_ocr2", "step3p7", "idefics2", "aria", "molmo2", "kimi_k25", "qwen3_5", "lfm2_vl"])
def test_towers_whose_attention_cannot_be_divided_are_refused_by_name(name):
    model, _ = bare_vlm(name)
    with pytest.raises(TypeError, match=f"{type(model).__name__} .*divided among"):
        compress.attach(model, HiRED(), keep=0.5)
