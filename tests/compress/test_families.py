"""Model families beyond the six of the matrix, videos, and new images in a running chat."""

from typing import Any

import pytest
import reducer_matrix as matrix
import torch
from answers import continued
from layer_cut import Cut
from oracles import BEFORE_5_18, going_on, the_cache
from reducer_matrix import placeholders
from tiny_vlms import MORE, WINDOWED, tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, KeyNorm, Random, UniformGrid

pytestmark = pytest.mark.slow

CROSSING = ("blip2", "instructblip", "mllama")
REFUSED = ("llama4", "llama4_wide")
DECODERS = [name for name in MORE if name not in CROSSING + REFUSED and name not in WINDOWED]
ONE_IMAGE = ("paligemma",)


def prompt(name: str, inputs: Any) -> Any:
    return inputs(images=(1, 1) if name in ONE_IMAGE else (2, 1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_features_of_other_families_equal_the_shortened_prompt(name, attention):
    model, _, inputs = tiny_vlm(name, attention)
    matrix.whole(model, prompt(name, inputs), Random(), num_beams=2)


@pytest.mark.parametrize("reducer", [Cut(k=1), Cut(k=2), KeyNorm()], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_cuts_in_other_families_equal_masking(name, reducer):
    if name == "gemma3" and isinstance(reducer, Cut):
        pytest.skip("a window counts the tokens that are left, which masking cannot show")
    model, _, inputs = tiny_vlm(name)
    matrix.cutting_equals_masking(
        model, prompt(name, inputs), reducer, 0.5, 3e-5, isinstance(reducer, KeyNorm)
    )


@pytest.mark.parametrize("name", CROSSING)
def test_models_with_cut_points_of_their_own_keep_everything_bit_exactly(name):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1, 1))
    before = matrix.outputs(model, inputs, num_beams=2)
    with compress.attach(model, DivPrune(), keep=1.0):
        during = matrix.outputs(model, inputs, num_beams=2)
    with compress.attach(model, DivPrune(), keep=0.3) as session:
        other = matrix.outputs(model, inputs, num_beams=2)
        assert session.report().images[0].layers[0] < session.report().images[0].tokens
        with pytest.raises(NotImplementedError, match="not traced"):
            session.explain()
    after = matrix.outputs(model, inputs, num_beams=2)
    for expected, same, again, changed in zip(before, during, after, other, strict=True):
        assert torch.equal(same, expected)
        assert torch.equal(again, expected)
        assert changed.shape == expected.shape
    assert not torch.equal(other[0], before[0])


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_a_q_former_that_reads_less_equals_one_that_is_masked(name):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1, 1))
    kept = [1, 3, 4, 9]

    class Some(UniformGrid):
        def select(self, features, grid, count, scores=None):
            return torch.isin(torch.arange(len(features)), torch.tensor(kept))

    def mask(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = torch.ones_like(kwargs["encoder_attention_mask"])
        hidden[:, 1:] = 0
        hidden[:, [place + 1 for place in kept]] = 1
        return args, kwargs | {"encoder_attention_mask": hidden}

    with torch.no_grad(), compress.attach(model, Some(), keep=4):
        ours, tokens = matrix.outputs(model, inputs)
    handle = model.qformer.register_forward_pre_hook(mask, with_kwargs=True)
    expected, expected_tokens = matrix.outputs(model, inputs)
    handle.remove()
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("beams", [1, 3])
def test_cross_attention_to_less_equals_masking(beams):
    model, _, inputs = tiny_vlm("mllama")
    inputs = inputs(images=(2, 1))
    masks: list[Any] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        masks.append(kwargs["cross_attention_mask"])

    language_model = model.model.language_model
    with torch.no_grad(), compress.attach(model, UniformGrid(), keep=0.5):
        handle = language_model.register_forward_pre_hook(remember, with_kwargs=True)
        ours, tokens = matrix.outputs(model, inputs, num_beams=beams)
        index, valid = the_cache(model(**inputs, use_cache=True)).vistok_cross_index
        handle.remove()

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["cross_attention_mask"]
        seen = torch.zeros(len(index), mask.shape[-1], dtype=torch.bool)
        seen.scatter_(1, index, valid)
        seen = seen.repeat_interleave(len(mask) // len(seen), 0)
        return args, kwargs | {
            "cross_attention_mask": mask.masked_fill(~seen[:, None, None], torch.finfo(mask.dtype).min)
        }

    handle = language_model.register_forward_pre_hook(hide, with_kwargs=True)
    expected, expected_tokens = matrix.outputs(model, inputs, num_beams=beams)
    handle.remove()
    assert max(mask.shape[-1] for mask in masks) < 4 * 17 * 2
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "llava_next_video"]
)
def test_videos_are_reduced_like_images(name):
    if BEFORE_5_18 and name in ("llava_onevision", "llava_next_video"):
        pytest.skip("features of a video come frame by frame")
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(videos=(1, 1), images=(1, 0))
    matrix.dropping_equals_the_oracle(model, inputs, Random(), 0.5)
    matrix.cutting_equals_masking(model, inputs, Cut(k=1), 0.5, 3e-5)
    before = matrix.outputs(model, inputs)
    with compress.attach(model, [Random(), Cut(k=1)], keep=1.0):
        assert torch.equal(matrix.outputs(model, inputs)[0], before[0])


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("reducers", [[Random()], [Cut(k=1)], [Random(), Cut(k=2)]], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3"])
def test_a_new_image_in_a_running_chat_equals_one_go(name, reducers, positions):
    model, _, inputs = tiny_vlm(name)
    inputs, more = inputs(1), inputs(images=(1, 1), rows=(1,))
    settings = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": placeholders(model),
    }
    with torch.no_grad(), compress.attach(model, reducers, keep=0.5, positions=positions):
        first = model.generate(**inputs, **settings)
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        longer = continued(inputs, ids)
        media = {k: v for k, v in more.items() if k.startswith(("pixel", "image_sizes"))}
        second = model.generate(
            input_ids=ids,
            attention_mask=longer["attention_mask"],
            **going_on(model, the_cache(first)),
            **media,
            **settings,
        )
        both = {k: _joined(longer[k], media[k]) for k in media}
        expected = model.generate(**(longer | both), **settings)
    assert torch.equal(second.sequences, expected.sequences)
    for step, reference in zip(second.logits, expected.logits, strict=True):
        assert torch.allclose(step, reference, atol=3e-5, rtol=0)


def _joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.ndim == 5 and a.shape[1] != b.shape[1]:  # tiles of one image a row, padded with empty ones
        most = max(a.shape[1], b.shape[1])
        a, b = (torch.nn.functional.pad(x, (0, 0) * 3 + (0, most - x.shape[1])) for x in (a, b))
    return torch.cat([a, b], 0)
