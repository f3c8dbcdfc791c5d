"""The two small vision-language models: standard files, the promised sizes, and what they are trained on."""

import copy
import json
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vistok.train import recipe
from vistok.train.config import OptimizerConfig, check_schedule
from vistok.train.loop import train
from vistok.train.object_scenes import (
    CATEGORIES,
    COLOURS,
    LETTERS,
    MATERIALS,
    SHAPES,
    SIZES,
    VOCABULARY,
    object_scene,
    patch_labels,
    plural,
    questions,
    render,
)
from vistok.train.objectives.scenes_vlm import ScenesVlmConfig
from vistok.train.scene_batches import SceneBatches
from vistok.train.scene_learner import SceneLearner
from vistok.train.scenes_vlm import prompt, scenes_qwen, scenes_vlm

_BUILDERS = {"llava_next": scenes_vlm, "qwen2_5_vl": scenes_qwen}
_LIMITS = {
    "llava_next": (15e6, 30e6, 192),
    "qwen2_5_vl": (10e6, 20e6, 144),
}  # parameters, bytes, visual tokens


@pytest.fixture(scope="module", params=_BUILDERS)
def built(request):
    torch.manual_seed(0)
    model, processor = _BUILDERS[request.param]()
    return request.param, model.eval(), processor


def _inputs(processor, *asked):
    scenes = [object_scene("train", 0, index) for index in range(len(asked))]
    images = [Image.fromarray(render(scene)) for scene in scenes]
    texts = [prompt(processor, question) for question in asked]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def test_plain_auto_classes_load_what_was_saved(built, tmp_path):
    family, model, processor = built
    parameters, size, _ = _LIMITS[family]
    assert model.num_parameters() < parameters
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < size
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    reader = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(reader) is type(processor)
    question = "what colour is the small ball?"
    inputs, again = _inputs(processor, question), _inputs(reader, question)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # not the buffers: frequencies stay float32
        parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, rounded(**inputs).logits)
    settings = loaded.generation_config
    assert (settings.eos_token_id, settings.do_sample) == (reader.tokenizer.eos_token_id, False)


def test_a_picture_becomes_the_stated_number_of_visual_tokens(built):
    family, model, processor = built
    ids = _inputs(processor, "what colour is the small ball?")["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == _LIMITS[family][2]


def test_words_are_single_tokens_and_codes_are_spelled(built):
    _, _, processor = built
    tokenizer = processor.tokenizer
    assert all(len(tokenizer.tokenize(word)) == 1 for word in VOCABULARY)
    assert tokenizer.tokenize("K7XQ") == ["K", "##7", "##X", "##Q"]
    for text in ("what does the red sign read?", "K7XQ", "in which cell is it, D5 or F6?"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_keeps_earlier_turns(built):
    _, _, processor = built
    turns = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "how many balls are there?"}],
        },
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "how many cubes are there?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.endswith(
        "how many balls are there? assistant: 2</s> user: how many cubes are there? assistant:"
    )


def test_pictures_of_any_shape_are_answered(built):
    _, model, processor = built
    for size in ((200, 120), (90, 150), (64, 64)):
        inputs = processor(
            text=[prompt(processor, "how many balls are there?")],
            images=[Image.new("RGB", size)],
            return_tensors="pt",
        )
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_packed_questions_give_the_logits_of_single_prompts(built):
    _, model, processor = built
    batch = SceneBatches(processor, batch_size=2)[3]
    learner = SceneLearner(model, processor).eval()
    with torch.no_grad():
        features, _ = learner._features(batch)
        states = learner._states(features, batch).last_hidden_state
        packed = model.lm_head(states[:, len(learner.prefix) :])
        for row in range(2):
            scene = object_scene("train", 0, 6 + row)
            for number in (1, int(batch["segment"][row].max())):
                is_part = batch["segment"][row] == number
                text = processor.tokenizer.decode(batch["text"][row][is_part])
                question = text[: text.index("?") + 1].replace(" ?", "?").replace(" ,", ",")
                inputs = processor(
                    text=[prompt(processor, question)], images=[render(scene)], return_tensors="pt"
                )
                alone = model(**inputs).logits[0, -1]
                first = int((batch["target"][row][is_part] != -100).nonzero()[0])
                torch.testing.assert_close(packed[row][is_part][first], alone, rtol=1e-4, atol=1e-4)


def test_targets_are_the_answers_and_nothing_else(built):
    _, _, processor = built
    tokenizer = processor.tokenizer
    batch = SceneBatches(processor, batch_size=1)[5]
    scene = object_scene("train", 0, 5)
    rng = np.random.default_rng((*scene.seed, 2, 5))
    asked = questions(scene, rng, (*CATEGORIES, "attribute", "relation", "grounding"))
    answers = {question.question: question.answer for question in asked}
    for number in range(1, int(batch["segment"].max()) + 1):
        is_part = batch["segment"][0] == number
        text, target = batch["text"][0][is_part], batch["target"][0][is_part]
        question = tokenizer.decode(text).split(" assistant")[0]
        learned = target[target != -100]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[:-1]) == answers[question]
        assert torch.equal(learned[:-1], text[len(text) - len(learned) + 1 :])


def test_phrases_carry_the_attributes_that_their_words_name(built):
    _, _, processor = built
    batch = SceneBatches(processor, batch_size=4)[2]
    names = [("any", *COLOURS), ("thing", *SHAPES, "sign"), ("any", *MATERIALS), ("any", *SIZES)]
    phrases = (batch["phrase"][..., 0] >= 0).nonzero().tolist()
    assert len(phrases) > 20
    for row, place in phrases:
        numbers = batch["phrase"][row, place].tolist()
        colour, shape, material, size = (
            values[number] for values, number in zip(names, numbers, strict=True)
        )
        expected = [word for word in (size, colour, material) if word != "any"]
        ids = batch["text"][row, place - len(expected) : place + 1]
        words = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
        assert words[:-1] == expected
        assert words[-1] in (shape, plural(shape))


def test_facts_agree_with_the_answers_to_the_questions(built):
    """The answers to "how many", "in which cell" and "what does … read" follow from facts of the phrase."""
    _, _, processor = built
    decode, kinds = processor.tokenizer.decode, Counter()
    for number in range(3):
        batch = SceneBatches(processor, batch_size=4)[number]
        for row, place in (batch["phrase"][..., 0] >= 0).nonzero().tolist():
            is_part = batch["segment"][row] == batch["segment"][row, place]
            text = decode(batch["text"][row][is_part])
            target = batch["target"][row][is_part]
            answer = decode(target[target >= 0][:-1])
            count, *_, column, line, a, b, c, d = batch["facts"][row, place].tolist()
            if text.startswith("how many"):
                assert str(count) == answer
            elif text.startswith("in which"):
                assert (count, "ABCDEF"[column] + "123456"[line]) == (1, answer)
            elif text.startswith("what does"):
                assert "".join(LETTERS[letter - 1] for letter in (a, b, c, d) if letter) == answer
            else:
                continue
            kinds[text[:8]] += 1
    assert len(kinds) == 3 and min(kinds.values()) >= 8


def test_patch_targets_follow_the_order_of_visual_tokens(built):
    """The feature of a visual token depends most on the pixels that its label describes."""
    family, model, processor = built
    scene = object_scene("train", 0, 0)
    batch = SceneBatches(processor, batch_size=1)[0]
    fine = patch_labels(scene, 10)
    patches = batch["patches"][0]
    assert len(patches) == _LIMITS[family][2]
    learner = SceneLearner(model, processor).eval()
    for row, column in ((0, 0), (3, 8), (7, 2), (11, 11)):
        place = row * 12 + column if family == "qwen2_5_vl" else 36 + row * 13 + column
        assert torch.equal(patches[place], torch.from_numpy(fine[row, column]))
        picture = render(scene)
        changed = picture.copy()
        changed[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10] ^= 255
        batches = [
            dict(processor.image_processor(images=[p], return_tensors="pt")) for p in (picture, changed)
        ]
        with torch.no_grad():
            before, after = (learner._features(each)[0][0] for each in batches)
        change = (after - before).norm(dim=-1)
        if family == "llava_next":
            change[:36] = 0
        assert int(change.argmax()) == place


def test_batches_are_a_function_of_their_number(built):
    _, _, processor = built
    data, again = (SceneBatches(processor, batch_size=2) for _ in range(2))
    first, second = data[0], data[1]
    repeated = again[1]
    assert all(torch.equal(second[name], repeated[name]) for name in second)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_losses_reach_every_part_of_the_model_and_fall(built):
    _, model, processor = built
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    learner = SceneLearner(model, processor).train()
    batch = SceneBatches(processor, batch_size=2)[0]
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    totals = []
    for _ in range(5):
        losses = learner(batch)
        assert set(losses) == {"answer", "phrases", "facts", "patches"} | (
            {"class_token"} if learner.class_head else set()
        )
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.8 * totals[0]
    assert all(parameter.grad is not None for parameter in learner.parameters() if parameter.requires_grad)
    visual = learner(batch, only_visual=True)
    assert set(visual) == set(losses) - {"answer", "phrases", "facts"}
    model.load_state_dict(kept)
    model.eval()


RUN = {
    "vlm": "scenes_vlm",
    "steps": 4,
    "batch_size": 2,
    "visual_steps": 2,
    "validation_questions": 14,
    "workers": 0,
    "precision": "no",
    "log_every": 1,
    "validate_every": 100,
    "checkpoint_every": 100,
    "optimizer": OptimizerConfig(warmup=0, schedule="constant"),
}


def test_the_loop_trains_a_model_that_plain_classes_load(tmp_path):
    """A run in two parts ends where an uninterrupted one does; its model answers as validation counted."""
    whole = train(ScenesVlmConfig(**RUN), tmp_path / "whole", progress=False)
    train(ScenesVlmConfig(**RUN), tmp_path / "parts", steps=3, progress=False)
    parts = train(ScenesVlmConfig(**RUN), tmp_path / "parts", progress=False)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert "answer" not in rows[1] and "answer" in rows[2]
    assert sum(name.startswith("accuracy_") for name in rows[-1]) == len(CATEGORIES)
    assert transformers.AutoModelForImageTextToText.from_pretrained(whole).num_parameters() > 1e6
    assert transformers.AutoProcessor.from_pretrained(whole).tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weights": {"answer": 1.0}}, "give a weight to each of answer, phrases"),
        ({"visual_steps": -1}, "visual_steps is -1"),
        ({"validation_questions": 0}, "validation_questions is 0"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ScenesVlmConfig(**RUN | changes)


@pytest.mark.parametrize("name", ["scenes-vlm", "scenes-qwen"])
def test_a_shipped_recipe_is_valid(name):
    config = recipe.read(str(files("vistok.assets") / f"{name}.yaml"))
    assert config.vlm == name.replace("-", "_")
    check_schedule("optimizer", config.optimizer, config.steps)
