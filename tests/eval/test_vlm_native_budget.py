"""The processor's own budgets: the tokens they promise are those of its inputs, and no setting gives more."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from PIL import Image
from tiny_vlms import make_tokenizer
from vlm_questions import PLACEHOLDERS, answering_vlm

from vistok.compress.native_budget import ProcessorSetting, has_native_budget, native_budget

SIZES = ((50, 120), (90, 90), (210, 300))  # height, width


def tokens(vlm, name, size):
    image = Image.new("RGB", (size[1], size[0]))
    inputs = vlm.processor(text=[f"USER : {PLACEHOLDERS[name]}"], images=[[image]], return_tensors="pt")
    return int(vlm.visual_tokens(inputs))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "internvl"])
def test_a_budget_gives_the_tokens_it_promises_and_no_more_than_asked_for(name, size):
    vlm = answering_vlm(name)
    full = tokens(vlm, name, size)
    for keep in (1.0, 0.5, 0.25, 0.05):
        budget = native_budget(vlm.model, vlm.processor, [size], full, keep)
        with budget.applied(vlm.model, vlm.processor):
            assert tokens(vlm, name, size) == budget.tokens, budget
        assert budget.fits == (budget.tokens <= keep * full)
        assert tokens(vlm, name, size) == full  # everything is as before
    assert native_budget(vlm.model, vlm.processor, [size], full, 1.0).tokens == full


def test_no_limit_of_pixels_gives_more_tokens_within_the_budget():
    vlm, size = answering_vlm("qwen2_5_vl"), (110, 300)
    full = tokens(vlm, "qwen2_5_vl", size)
    for keep in (0.7, 0.5, 0.3, 0.1):
        budget = native_budget(vlm.model, vlm.processor, [size], full, keep)
        counts = []
        for pixels in range(28 * 28, 112 * 112 + 1, 97):
            limits = type(vlm.processor.image_processor.size)(shortest_edge=28 * 28, longest_edge=pixels)
            with ProcessorSetting("", {"size": limits}).applied(vlm.model, vlm.processor):
                counts.append(tokens(vlm, "qwen2_5_vl", size))
        assert budget.tokens == max((each for each in counts if each <= keep * full), default=min(counts))


def test_the_fewest_tokens_are_marked_where_nothing_fits():
    vlm = answering_vlm("llava_next")
    full = tokens(vlm, "llava_next", (90, 90))
    budget = native_budget(vlm.model, vlm.processor, [(90, 90)], full, 0.01)
    assert (budget.text, budget.tokens, budget.fits) == ("up to 1 tile", 36, False)


def test_the_model_agrees_with_its_processor_about_tiles():
    vlm = answering_vlm("llava_next")
    image = Image.new("RGB", (90, 90))
    budget = native_budget(vlm.model, vlm.processor, [(90, 90)], 88, 0.5)
    with budget.applied(vlm.model, vlm.processor), torch.no_grad():
        text = ["USER : <image> describe ASSISTANT :"]
        inputs = vlm.processor(text=text, images=[[image]], return_tensors="pt")
        vlm.model(**inputs)  # raises where features and placeholders differ in number


def test_other_families_and_shares_are_refused():
    vlm = answering_vlm("llava")
    assert not has_native_budget(vlm.model)
    with pytest.raises(ValueError, match="the processor of llava has no setting for fewer visual tokens"):
        native_budget(vlm.model, vlm.processor, [(90, 90)], 16, 0.5)
    vlm = answering_vlm("internvl")
    with pytest.raises(ValueError, match=r"keep is 0; it takes a share"):
        native_budget(vlm.model, vlm.processor, [(90, 90)], 16, 0)


@pytest.mark.skipif(not hasattr(hf, "Gemma4Processor"), reason="the family came later")
def test_gemma_4_takes_one_of_five_numbers():
    names = ("image", "video", "audio", "boi", "eoi", "boa", "eoa")
    tokenizer = make_tokenizer((), {f"{name}_token": f"<{name}>" for name in names})
    processor = hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(),
        tokenizer=tokenizer,
        video_processor=hf.Gemma4VideoProcessor(),
    )
    model = SimpleNamespace(config=SimpleNamespace(model_type="gemma4"))
    model.base_model = model
    picture = Image.new("RGB", (300, 200))

    def count():
        ids = processor(text=["USER : <image>"], images=[[picture]], return_tensors="pt")["input_ids"]
        return int((ids == tokenizer.convert_tokens_to_ids("<image>")).sum())

    full = count()
    for keep, text, fits in ((0.5, "max_soft_tokens=140", True), (0.1, "max_soft_tokens=70", False)):
        budget = native_budget(model, processor, [(200, 300)], full, keep)
        assert (budget.text, budget.fits) == (text, fits)
        with budget.applied(model, processor):
            assert count() == budget.tokens
    assert count() == full
