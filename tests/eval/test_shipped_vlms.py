"""The vision-language models in `assets`: standard folders, small, and they answer from the picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from paths import ROOT
from PIL import Image

from vistok.eval.data.questions import open_questions
from vistok.eval.metrics.answers import scorer_by_name
from vistok.eval.tasks.vlm import load
from vistok.train.object_scenes import render
from vistok.train.object_scenes import test_questions as questions_of_the_test_set
from vistok.train.scene_batches import question_batches
from vistok.train.scene_learner import SceneLearner
from vistok.train.scenes_vlm import prompt

# Parameters and bytes at most, accuracy on 140 questions at least, and with noise for pictures at most.
LIMITS = {"scenes-vlm": (15e6, 30e6, 0.8, 0.35), "scenes-qwen": (10e6, 20e6, 0.5, 0.35)}


@pytest.fixture(params=LIMITS)
def name(request):
    return request.param


def test_plain_classes_load_the_folder(name):
    folder = ROOT / "assets" / name
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    parameters, size, _, _ = LIMITS[name]
    assert model.num_parameters() < parameters
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < size
    scene, question = next(questions_of_the_test_set(1))
    inputs = processor(
        text=[prompt(processor, question.question)], images=[render(scene)], return_tensors="pt"
    )
    output = model.generate(**inputs.to(model.dtype))[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output, skip_special_tokens=True).strip() == question.answer


def _accuracy(vlm, pictures=None):
    questions = open_questions("scenes", count=140).questions
    right = []
    for start in range(0, len(questions), 35):
        part = questions[start : start + 35]
        own = [each.pictures() for each in part] if pictures is None else [pictures() for _ in part]
        answers = vlm.texts(vlm.answer(vlm.inputs(part, own)).ids)
        right += scorer_by_name("exact", part)(answers, part)
    return sum(right) / len(right)


@pytest.mark.slow
def test_answers_come_from_the_picture(name):
    vlm = load(name, dtype="float32", max_new_tokens=8)
    rng = np.random.default_rng(0)

    def noise():
        return [Image.fromarray(rng.integers(0, 256, (120, 120, 3), dtype=np.uint8))]

    _, _, least, most = LIMITS[name]
    assert _accuracy(vlm) >= least
    assert _accuracy(vlm, noise) <= most


def test_validation_counts_the_answers_that_generate_gives(name):
    """`is_right` compares the most likely tokens under the right answer; greedy decoding must agree."""
    vlm = load(name, dtype="float32", max_new_tokens=8)
    ((_, batch),) = question_batches(vlm.processor, "test", 28)
    with torch.no_grad():
        counted = SceneLearner(vlm.model, vlm.processor).eval().is_right(batch)
    questions = open_questions("scenes", count=28).questions
    answers = vlm.texts(vlm.answer(vlm.batch(questions).inputs).ids)
    generated = [answer in each.answers for answer, each in zip(answers, questions, strict=True)]
    assert counted == generated
    assert any(generated)
