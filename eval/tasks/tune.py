"""The cheapest reducer of a model that loses at most a given accuracy, by successive halving.

Every candidate (reducers at budgets, pairs of reducers of two stages, the processor's own budget) answers a
few questions. The best third in cost and loss answers more, twice over; the last ones are compared on
questions that none of them was chosen by.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...compress.native_budget import has_native_budget
from ...compress.reducer import Stage
from ...compress.registry import reducer_class
from ..data.questions import open_questions
from ..engine import passes
from ..engine.state import State
from ..metrics.answers import Scorer, scorer_by_name
from ..metrics.summary import interval
from ..options import TuneConfig
from .vlm.answering import COUNTED, AnswerPass, Table
from .vlm.evaluation import COST_NOTE, model_of, open_answers, time_settings
from .vlm.model import VisionLanguageModel
from .vlm.record import Row, row_of, texts_of
from .vlm.settings import FULL, Setting, checked_names, plan

DIVISOR = 3
"""Of the candidates of a round, one in so many goes on."""
ROUNDS = 3
FINALISTS = 5
FEWEST = 8
"""Questions of the first round, at least."""


@dataclass
class Candidate:
    """A setting in the search: `questions` it answered there, its `loss` against the full model as {"value",
    "low", "high"} over them, and its prefill `flops` per prompt. `refused` is why it has none."""

    label: str
    python: str
    refused: str | None = None
    questions: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    flops: float | None = None


@dataclass
class TuneRecord:
    """A search. `finalists` are rows (the full model first) over the `confirmed` questions that no choice was
    made by. `chosen` is the label of the cheapest one within `max_loss`, None if none is, and
    `cheaper_native` that of a setting of the processor that qualifies and costs less."""

    model: str
    data: str
    max_loss: float
    searched: int
    confirmed: int
    scorer: str
    seed: int
    protocol: dict[str, Any]
    candidates: list[Candidate]
    finalists: list[Row]
    chosen: str | None
    cheaper_native: str | None
    seconds: dict[str, float]

    def row(self, label: str) -> Row:
        """The finalist of that label."""
        return next(row for row in self.finalists if row.label == label)


@dataclass(frozen=True)
class TuneResult:
    """The record; delete the `state` when it is written."""

    record: TuneRecord
    state: State


def candidates(
    names: Sequence[str] | None,
    keeps: Sequence[float],
    *,
    native: bool,
    combinations: bool,
    layers: int | None = None,
) -> list[Setting]:
    """The full model and all settings of a search: each reducer at each budget below 1, and pairs of a
    reducer of features at one budget, of at most half of the tokens, with one of layers at the next smaller
    one. Raises ValueError for unknown reducers and no budget below 1."""
    keeps = sorted({keep for keep in keeps if keep < 1}, reverse=True)
    if not keeps:
        raise ValueError("keep has no share below 1, so there is nothing to search; give --keep 0.5,0.25")
    own_names = set(checked_names(names))
    settings = [
        setting
        for setting in plan(names, keeps, ("keep",), native=native, layers=layers)
        if setting.kind != "reducers" or setting.reducers[0][0] in own_names
    ]
    if combinations:
        by_stage = {
            stage: [name for name in checked_names(names) if reducer_class(name).stage is stage]
            for stage in (Stage.FEATURES, Stage.LAYER)
        }
        for first, second in pairwise(keep for keep in keeps if keep <= 0.5):
            for feature, layer in product(by_stage[Stage.FEATURES], by_stage[Stage.LAYER]):
                pair = ((feature, first), (layer, second))
                settings.append(Setting("reducers", second, pair, layers=layers))
    return settings


def rounds(count: int) -> list[int]:
    """How many questions are new in each round of the search and, last, in the confirmation, which gets half.

    Raises ValueError for too few questions.
    """
    search = count // 2
    first = search // DIVISOR ** (ROUNDS - 1)
    if first < FEWEST:
        raise ValueError(
            f"{count} questions are too few to search and confirm: give at least "
            f"{2 * FEWEST * DIVISOR ** (ROUNDS - 1)}"
        )
    ends = [first * DIVISOR**number for number in range(ROUNDS - 1)] + [search]
    return [ends[0], *(end - start for start, end in pairwise(ends)), count - search]


def survivors(costs: Sequence[float], losses: Sequence[float], count: int) -> list[int]:
    """Numbers of the `count` best candidates: those that no other one beats in cost and loss, then those that
    only these beat, and so on; within such a front the smaller losses first."""
    left, kept = list(range(len(costs))), []
    while left and len(kept) < count:
        front = [one for one in left if not any(_beats(other, one, costs, losses) for other in left)]
        kept += sorted(front, key=lambda one: (losses[one], costs[one]))[: count - len(kept)]
        left = [one for one in left if one not in front]
    return sorted(kept)


def _beats(one: int, other: int, costs: Sequence[float], losses: Sequence[float]) -> bool:
    no_worse = costs[one] <= costs[other] and losses[one] <= losses[other]
    return no_worse and (costs[one] < costs[other] or losses[one] < losses[other])


def run(
    config: TuneConfig, out: Path, device: torch.device, *, vlm: VisionLanguageModel | None = None
) -> TuneResult:
    """Search, keeping the state in `out`/state.

    `vlm` takes the place of loading `config.model`. Raises ValueError or OSError, before any long work, for
    data or a model that is not there, too few questions, more than one process, and the unfinished state of
    another run.
    """
    process, device = passes.join(device)
    if process.num_processes > 1:
        raise ValueError(
            f"tune runs in one process, and this is one of {process.num_processes}: start it without "
            "accelerate launch"
        )
    data = open_questions(config.data, count=config.count, seed=config.seed, split=config.split)
    scorer = scorer_by_name(config.scorer, data.questions)
    sizes = rounds(len(data))
    candidates(config.reducers, config.keep, native=True, combinations=config.combinations)  # checks them
    vlm = vlm or model_of(config, device)
    settings = candidates(
        config.reducers,
        config.keep,
        native=has_native_budget(vlm.model),
        combinations=config.combinations,
        layers=vlm.num_layers,
    )
    ends = np.cumsum(sizes).tolist()
    parts = [data.questions[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    answers = open_answers(config, vlm, data, parts, settings, scorer, out, process)
    search = _Search(answers, scorer, ends, config)
    answers.run(search.active, f"tune {config.model}")
    return TuneResult(search.record(data.source), answers.state)


class _Search:
    """The choice of candidates between rounds; a function of the answers alone, so that a killed run repeats
    it."""

    def __init__(self, answers: AnswerPass, scorer: Scorer, ends: Sequence[int], config: TuneConfig) -> None:
        self.answers, self.scorer, self.ends, self.config = answers, scorer, ends, config
        self.alive: list[list[int]] = [list(range(1, len(answers.settings)))]
        """Numbers of the candidates of each round so far, and of the confirmation."""

    def active(self, batch: int) -> list[int]:
        """The settings that answer a batch: the full model and the round's candidates."""
        start = self.answers.batches[batch].start
        number = sum(start >= end for end in self.ends)
        while len(self.alive) <= number:
            self.alive.append(self._next())
        return [0, *self.alive[number]]

    def _next(self) -> list[int]:
        """The candidates of the next round, from the answers of all rounds before it."""
        done, ratings = len(self.alive), self._ratings()
        alive = [number for number in self.alive[-1] if number in ratings]
        costs = [ratings[number][1] for number in alive]
        losses = [ratings[number][0].mean() for number in alive]
        if done < ROUNDS:
            count = max(2 * FINALISTS, -(-len(alive) // DIVISOR))
            return [alive[i] for i in survivors(costs, losses, count)]
        within = [i for i in range(len(alive)) if losses[i] <= self.config.max_loss]
        chosen = sorted(within, key=lambda i: costs[i])[:FINALISTS]
        others = [i for i in range(len(alive)) if i not in chosen]
        chosen += sorted(others, key=lambda i: (losses[i], costs[i]))[: FINALISTS - len(chosen)]
        return sorted(alive[i] for i in chosen)

    def _ratings(self) -> dict[int, tuple[np.ndarray, float]]:
        """The losses [n] of every candidate over the questions of the search that it answered, and its
        prefill operations."""
        answers, end = self.answers, self.ends[ROUNDS - 1]
        tables = answers.tables()
        full = self._scores(tables[0])
        ratings = {}
        for number, setting in enumerate(answers.settings[1:], start=1):
            table = tables[number]
            if (
                setting.label in answers.refused
                or setting.label in answers.failures
                or not len(table.numbers)
            ):
                continue
            scores = self._scores(table)
            searched = [question for question in scores if question < end]
            losses = np.array([full[question] - scores[question] for question in searched])
            language = np.nan_to_num(table.figures[:, 3]).mean()
            ratings[number] = losses, float(answers.flops[setting.label] + language)
        return ratings

    def _scores(self, table: Table) -> dict[int, float]:
        """The score of each question that a setting answered, by the question's number."""
        texts = texts_of(self.answers.vlm, table, self.scorer)
        numbers = table.numbers.tolist()
        return dict(
            zip(numbers, self.scorer(texts, [self.answers.questions[i] for i in numbers]), strict=True)
        )

    # The record ---------------------------------------------------------------------------------------------

    def record(self, source: str) -> TuneRecord:
        """The record, once all questions are answered."""
        answers, config, seed = self.answers, self.config, self.config.seed
        self.active(len(answers.batches) - 1)  # of a run that was killed after its last batch
        rows = self._rows()
        if config.speed:
            time_settings(answers, rows, config.speed_repeats)
        qualified = [row for row in rows[1:] if row.loss["value"] <= config.max_loss]
        attachable = [row for row in qualified if row.python]
        chosen = min(attachable, key=lambda row: row.flops, default=None)
        native = min((row for row in qualified if not row.python), key=lambda row: row.flops, default=None)
        if native is not None and chosen is not None and native.flops >= chosen.flops:
            native = None
        return TuneRecord(
            model=config.model,
            data=source,
            max_loss=config.max_loss,
            searched=self.ends[ROUNDS - 1],
            confirmed=self.ends[-1] - self.ends[ROUNDS - 1],
            scorer=self.scorer.name,
            seed=seed,
            protocol={
                "flops": COST_NOTE.format(counted=min(COUNTED, len(answers.batches[0]))),
                "batch_size": config.batch_size,
                "dtype": str(answers.vlm.model.dtype).removeprefix("torch."),
                "device": str(answers.vlm.device),
            },
            candidates=self._candidates(),
            finalists=rows,
            chosen=None if chosen is None else chosen.label,
            cheaper_native=None if native is None else native.label,
            seconds=answers.state.seconds,
        )

    def _rows(self) -> list[Row]:
        """The full model and the finalists that answered, over the questions of the confirmation."""
        answers, start = self.answers, self.ends[ROUNDS - 1]
        questions = answers.questions[start:]
        tables = answers.tables()
        rows: list[Row] = []
        for number in [0, *self.alive[-1]]:
            setting, table = answers.settings[number], tables[number]
            if setting is not FULL and setting.label in answers.refused:
                continue
            late = table.numbers >= start
            table = Table(table.numbers[late], table.ids[late], table.letters[late], table.figures[late])
            texts = texts_of(answers.vlm, table, self.scorer)
            scores = np.array(self.scorer(texts, questions))
            full = rows[0] if rows else None
            other = answers.flops[setting.label]
            row = row_of(setting, table, texts, scores, full, questions, other, self.config.seed)
            row.native = answers.native_settings(setting)
            rows.append(row)
        return rows

    def _candidates(self) -> list[Candidate]:
        ratings, listed = self._ratings(), []
        for number, setting in enumerate(self.answers.settings[1:], start=1):
            refused = self.answers.refused.get(setting.label)
            each = Candidate(setting.label, "" if refused else setting.python, refused)
            if number in ratings:
                losses, each.flops = ratings[number]
                each.questions, each.loss = len(losses), interval(losses, self.config.seed)
            listed.append(each)
        return listed
