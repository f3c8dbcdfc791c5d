"""The processor's own budget as a reducer: what it promises is what the processor makes."""

import json

import pytest
import reducer_matrix as matrix
import torch
from PIL import Image
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, NativeBudget, PixelPrune

PROMPTS = {
    "qwen2_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "qwen2_5_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "qwen3_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "llava_next": "<image>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "idefics3": "<image>",
}
SIZES = ((50, 120), (90, 90), (210, 300), (300, 100))  # height, width
every_family = pytest.mark.parametrize("name", PROMPTS)


def prepared(processor, name, sizes):
    """One prompt per picture."""
    images = [[Image.effect_noise((width, height), 80).convert("RGB")] for height, width in sizes]
    texts = [f"USER : {PROMPTS[name]} describe ASSISTANT :"] * len(sizes)
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def tokens(model, inputs):
    return (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()


@every_family
def test_pictures_have_the_tokens_that_the_setting_promises(name):
    model, processor, _ = tiny_vlm(name)
    state = (repr(processor), json.dumps(model.config.to_dict(), default=str), matrix.fingerprint(model))
    full = {size: sum(tokens(model, prepared(processor, name, [size]))) for size in SIZES}
    fewer = 0
    for keep in (0.5, 0.25, 7, 0.01):
        reducer = NativeBudget(processor=processor)
        with torch.no_grad(), compress.attach(model, reducer, keep=keep) as session:
            for size, before in full.items():
                inputs = prepared(processor, name, [size])
                count = sum(tokens(model, inputs))
                assert count == reducer.setting.tokens
                budget = keep if isinstance(keep, int) else keep * before
                assert reducer.setting.fits == (count <= budget)
                fewer += count < before
                model(**inputs)  # raises where features and placeholders differ in number
                assert [image.tokens for image in session.report().images] == [count]
    assert fewer >= 8
    assert state == (
        repr(processor),
        json.dumps(model.config.to_dict(), default=str),
        matrix.fingerprint(model),
    )
    assert full == {size: sum(tokens(model, prepared(processor, name, [size]))) for size in SIZES}


def test_no_limit_of_pixels_gives_more_tokens_within_the_budget():
    model, processor, _ = tiny_vlm("qwen3_vl")
    images, size = processor.image_processor, (110, 300)
    full, stock = sum(tokens(model, prepared(processor, "qwen3_vl", [size]))), images.size
    counts = []
    for pixels in range(32 * 32, stock["longest_edge"] + 1, 501):
        images.size = type(stock)(shortest_edge=32 * 32, longest_edge=pixels)
        counts.append(sum(tokens(model, prepared(processor, "qwen3_vl", [size]))))
    images.size = stock
    for keep in (0.8, 0.5, 0.3):
        with compress.attach(model, NativeBudget(processor=processor), keep=keep):
            count = sum(tokens(model, prepared(processor, "qwen3_vl", [size])))
        assert count == max(each for each in counts if each <= keep * full)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next"])
def test_the_pictures_of_a_batch_share_the_budget(name):
    model, processor, _ = tiny_vlm(name)
    full = sum(tokens(model, prepared(processor, name, SIZES)))
    reducer = NativeBudget(processor=processor)
    with torch.no_grad(), compress.attach(model, reducer, keep=0.6):
        inputs = prepared(processor, name, SIZES)
        model.generate(**inputs, max_new_tokens=2)
    assert sum(tokens(model, inputs)) == reducer.setting.tokens <= 0.6 * full
    with compress.attach(model, reducer, keep=10):
        count = sum(tokens(model, prepared(processor, name, SIZES)))  # ten per picture
        assert (count, count <= 40) == (reducer.setting.tokens, reducer.setting.fits)


def test_keeping_everything_prepares_the_same_inputs():
    model, processor, _ = tiny_vlm("qwen3_vl")
    image = [Image.new("RGB", (300, 110), "red")]

    def inputs():
        return processor(text=[PROMPTS["qwen3_vl"]], images=image, return_tensors="pt")

    before = inputs()
    with compress.attach(model, NativeBudget(processor=processor), keep=1.0) as session:
        during = inputs()
        session.keep = 0.3  # later calls have another budget
        assert len(inputs()["pixel_values"]) < len(before["pixel_values"])
        session.keep = 1.0
        after = inputs()
    for each in (during, after):
        assert all(torch.equal(before[key], each[key]) for key in before)


def test_it_goes_before_reducers_of_other_stages():
    model, processor, _ = tiny_vlm("qwen3_vl")
    reducers = [NativeBudget(processor=processor), PixelPrune(), DivPrune()]
    full = sum(tokens(model, prepared(processor, "qwen3_vl", [(210, 300)])))
    with torch.no_grad(), compress.attach(model, reducers, keep=0.5) as session:
        inputs = prepared(processor, "qwen3_vl", [(210, 300)])
        model(**inputs)
        image = session.report().images[0]
    assert image.tokens <= 0.5 * full and image.layers[0] == round(0.5 * image.tokens)


def test_a_processor_can_be_shown_and_saved_while_attached(tmp_path):
    model, processor, _ = tiny_vlm("qwen3_vl")
    before = repr(processor.image_processor)
    with compress.attach(model, NativeBudget(processor=processor), keep=1.0):
        assert repr(processor.image_processor) == before
        processor.image_processor.save_pretrained(tmp_path)


def test_what_it_cannot_do_is_refused():
    model, processor, _ = tiny_vlm("qwen3_vl")
    state = matrix.fingerprint(model), sorted(vars(processor.image_processor))
    with pytest.raises(ValueError, match=r"give it: compress.NativeBudget\(processor=processor\)"):
        compress.attach(model, "nativebudget", keep=0.5)
    for keep in (None, lambda image: 0.5):
        with pytest.raises(ValueError, match="NativeBudget takes a share in"):
            compress.attach(model, NativeBudget(processor=processor), keep=keep)
    llava, other, _ = tiny_vlm("llava")
    with pytest.raises(ValueError, match="the processor of llava has no setting for fewer visual tokens"):
        compress.attach(llava, NativeBudget(processor=other), keep=0.5)
    picture = Image.new("RGB", (300, 300))
    with compress.attach(model, NativeBudget(processor=processor), keep=0.5):
        with pytest.raises(ValueError, match="called with max_pixels, which NativeBudget sets by keep"):
            processor(text=[PROMPTS["qwen3_vl"]], images=[picture], max_pixels=9999)
        second, _, _ = tiny_vlm("qwen3_vl", seed=1)
        with pytest.raises(ValueError, match="has a budget already"):
            compress.attach(second, NativeBudget(processor=processor), keep=0.5)
    assert state == (matrix.fingerprint(model), sorted(vars(processor.image_processor)))
