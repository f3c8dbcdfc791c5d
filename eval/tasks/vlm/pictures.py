"""Examples for a report: a question's picture with the tokens that each reducer kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ....compress import attach
from ....compress.reducer import Stage
from ....compress.registry import reducer_class
from ...data.questions import QuestionSet
from .measure import Measure
from .record import VlmRecord
from .settings import Setting

EXAMPLES = 6
KEEP = 0.25
"""The budget of the pictures, or the nearest one below 1 that was evaluated."""


@dataclass(frozen=True)
class View:
    """What a setting used of a picture and answered: kept tokens bright, dropped ones dimmed, or the whole
    picture in the resolution that fewer tokens have."""

    label: str
    picture: Image.Image
    answer: str
    score: float
    note: str = ""


@dataclass(frozen=True)
class Example:
    """A question with the full model's view first."""

    question: str
    answers: Sequence[str]
    views: list[View]


def examples(
    measure: Measure, data: QuestionSet, record: VlmRecord, settings: Sequence[Setting]
) -> list[Example]:
    """The first question of each category, or the first questions, at one budget; the record has the
    answers."""
    keeps = {setting.keep for setting in settings if setting.keep < 1}
    if not keeps:
        return []
    keep = min(keeps, key=lambda each: (abs(each - KEEP), each))
    first = [
        next(number for number, each in enumerate(data.questions) if each.category == category)
        for category in data.categories
    ]
    numbers = (first or list(range(len(data))))[:EXAMPLES]
    return [_example(measure, data, record, settings, number, keep) for number in numbers]


@torch.no_grad()
def _example(
    measure: Measure,
    data: QuestionSet,
    record: VlmRecord,
    settings: Sequence[Setting],
    number: int,
    keep: float,
) -> Example:
    vlm, question = measure.vlm, data.questions[number]
    batch = vlm.batch([question])
    picture = batch.pictures[0][0]
    full = record.rows[0]
    views = [View("full model", picture, full.answers[number], full.scores[number])]
    for setting, row in zip(settings, record.rows, strict=True):
        if setting.kind == "full" or setting.keep != keep or row.refused is not None:
            continue
        image, note = picture, ""
        if setting.kind == "native":
            budget = measure.native(setting, batch)[0]
            image, note = (
                _shrunk(picture, budget.tokens / full.tokens),
                f"{budget.text}, {budget.tokens} tokens",
            )
        elif setting.name == "downsample":
            image, note = _shrunk(picture, row.tokens / full.tokens), f"{row.tokens:,.0f} tokens"
        else:
            with attach(vlm.model, **setting.arguments()) as session:
                vlm.generate(batch.inputs, max_new_tokens=1)
                in_cache = any(reducer_class(name).stage is Stage.CACHE for name, _ in setting.reducers)
                try:
                    explanation = session.explain(cache=in_cache)[0]
                    image = explanation.overlay(picture)
                    note = f"{len(explanation.tokens)} tokens"
                except (ValueError, NotImplementedError) as error:
                    note = f"not drawn: {error}"
        views.append(View(row.label, image, row.answers[number], row.scores[number], note))
    return Example(question.prompt, question.answers, views)


def _shrunk(picture: Image.Image, share: float) -> Image.Image:
    """The picture with that share of its pixels, in its old size."""
    scale = math.sqrt(min(1.0, share))
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.NEAREST)
