"""The record of an evaluation of a vision-language model: one row per setting."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...data.questions import VisualQuestion
from ...metrics.answers import Scorer
from ...metrics.summary import interval
from .answering import Table
from .model import LETTERS, VisionLanguageModel
from .settings import DOWNSAMPLING, Setting

Mean = dict[str, float]


@dataclass
class Row:
    """One setting. Means over questions are {"value", "low", "high"} with the ends of 95% intervals; scores
    are from 0 to 1 (CIDEr: to 10).

    Args:
        label: the name of the row; `name`, `keep` and `positions` are its parts.
        baseline: whether it is a baseline.
        python: the line that attaches it.
        refused: why it has no figures.
        score: the mean score; `categories` the same by category.
        loss: the full model's score less this one's, over the same questions.
        agreement: the share of answers that are the full model's, letter by letter.
        tokens: visual tokens per question that enter the language model, `tokens_per_layer` their mean over
            its layers.
        flops: operations per prompt at prefill; `flops_language` those in the language model's layers,
            `flops_reducer` those outside them, less the full model's (negative where the tower did less).
        cache_bytes: keys and values per prompt after the prefill.
        native: the settings that the processor's budget became, each with the questions it was used for, the
            tokens it gave and whether they fit the budget.
        loses_to: baselines of the same budget with a higher score, with how much higher.
        speed: see `vistok.eval.speed.answers`.
        answers: every answer; `scores` its score.
    """

    label: str
    name: str
    keep: float
    positions: str
    baseline: bool
    python: str = ""
    refused: str | None = None
    score: Mean = field(default_factory=dict)
    categories: dict[str, Mean] = field(default_factory=dict)
    loss: Mean = field(default_factory=dict)
    agreement: float | None = None
    tokens: float | None = None
    tokens_per_layer: float | None = None
    flops: float | None = None
    flops_language: float | None = None
    flops_reducer: float | None = None
    cache_bytes: float | None = None
    native: list[dict[str, Any]] = field(default_factory=list)
    loses_to: dict[str, Mean] = field(default_factory=dict)
    speed: dict[str, Any] | None = None
    answers: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    @property
    def loses_to_downsampling(self) -> bool:
        """Whether a smaller picture in no more tokens has a higher score."""
        return any(name in DOWNSAMPLING for name in self.loses_to)


@dataclass
class VlmRecord:
    """An evaluation. `rows` begin with the full model; `noise` is what another seed of the data, or another
    half of it, changes in its score."""

    model: str
    parameters: int
    data: str
    n: int
    seed: int
    scorer: str
    protocol: dict[str, Any]
    rows: list[Row]
    noise: dict[str, Any]
    questions: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def texts_of(vlm: VisionLanguageModel, table: Table, scorer: Scorer) -> list[str]:
    """What a setting answered: the texts, or the most likely letters."""
    if scorer.reads == "letter":
        return [LETTERS[number] if number >= 0 else "" for number in table.letters.tolist()]
    return vlm.texts(table.ids)


def row_of(
    setting: Setting,
    table: Table,
    answers: list[str],
    scores: np.ndarray,
    full: "Row | None",
    questions: Sequence[VisualQuestion],
    other_flops: float,
    seed: int,
) -> Row:
    """The row of a setting that answered all questions; `full` is the full model's, None for itself."""
    row = bare_row(setting)
    row.answers, row.scores = answers, scores.tolist()
    row.score = interval(scores, seed)
    categories = np.array([question.category for question in questions])
    row.categories = {
        name: interval(scores[categories == name], seed)
        for name in dict.fromkeys(categories.tolist())
        if name
    }
    reference = row if full is None else full
    row.loss = interval(np.array(reference.scores) - scores, seed)
    same = [one == two for one, two in zip(answers, reference.answers, strict=True)]
    row.agreement = sum(same) / len(same)
    row.tokens, row.tokens_per_layer, row.cache_bytes, row.flops_language = (
        None if np.isnan(column).any() else float(column.mean()) for column in table.figures.T
    )
    row.flops = other_flops + (row.flops_language or 0.0)
    row.flops_reducer = 0.0 if full is None else other_flops - (full.flops - (full.flops_language or 0.0))
    return row


def bare_row(setting: Setting, refused: str | None = None) -> Row:
    """A row without figures."""
    return Row(
        setting.label,
        setting.name,
        setting.keep,
        setting.positions,
        setting.baseline,
        "" if refused else setting.python,
        refused,
    )


def mark_losers(rows: Sequence[Row], seed: int) -> None:
    """Note for every reducer the baselines of its budget that score higher; the processor's own only where it
    takes no more tokens than the budget."""
    for row in rows[1:]:
        if row.refused is not None or row.baseline or row.keep == 1:
            continue
        for other in rows[1:]:
            if not other.baseline or other.refused is not None or other.keep != row.keep:
                continue
            if not all(each["fits"] for each in other.native) or other.positions not in (
                "keep",
                row.positions,
            ):
                continue
            if other.score["value"] > row.score["value"]:
                row.loses_to[other.name] = interval(np.array(other.scores) - np.array(row.scores), seed)


def noise_of(full: Row, again: np.ndarray | None, basis: str, seed: int) -> dict[str, Any]:
    """The full model's score on other questions, and the difference: `again` [m] are its scores on another
    seed, None for a comparison of the even and the odd questions."""
    scores = np.array(full.scores)
    first, second = (scores, again) if again is not None else (scores[::2], scores[1::2])
    if not len(second):
        return {"basis": basis, "difference": None}
    first_mean, second_mean = interval(first, seed), interval(second, seed)
    difference = abs(first_mean["value"] - second_mean["value"])
    return {"basis": basis, "first": first_mean, "second": second_mean, "difference": difference}
