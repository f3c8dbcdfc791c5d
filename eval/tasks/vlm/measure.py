"""One setting on one batch: its answers, the tokens and cache bytes it needs, and its operations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ....compress import attach
from ....compress.native_budget import ProcessorSetting, native_budget
from ....compress.session import Session
from .model import UNUSED, Answers, Batch, VisionLanguageModel
from .settings import Setting
from .shared_tower import SharedTower

FIGURES = ("tokens", "tokens_per_layer", "cache_bytes", "language_flops")
"""Columns of what is counted per question: visual tokens that enter the language model, their mean over its
layers, bytes of keys and values after the prompt, and operations in the language model's layers at
prefill."""
IDENTITY = Setting("reducers", 1.0, (("uniformgrid", 1.0),))
"""A session that changes nothing, to count the tokens of the stock model."""
CANNOT = (TypeError, ValueError, NotImplementedError)
"""Errors by which a reducer refuses a model or a picture."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The answers of a setting to a batch, with `figures` float64 [B, len(FIGURES)] (NaN where unknown), the
    same of the full model where the session counted them, and the processor's settings where it was those."""

    answers: Answers
    figures: Tensor
    full: Tensor | None = None
    native: Sequence[ProcessorSetting] = ()


class Refused(Exception):
    """A setting that cannot answer; its text is the reason."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the errors of a reducer into Refused, but for a lack of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except CANNOT as error:
        raise Refused(str(error)) from error
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


class Measure:
    """Answers of any setting to batches of questions. The full model's errors are raised as they are."""

    def __init__(self, vlm: VisionLanguageModel, *, letters: bool = False) -> None:
        self.vlm, self.letters = vlm, letters
        self._native: dict[tuple[float, Any], ProcessorSetting] = {}
        self._tower, self._batch = SharedTower(vlm.model), None

    def __call__(self, setting: Setting, batch: Batch) -> Outcome:
        """The answers of a setting. Raises Refused where a reducer cannot take the model or a picture."""
        if batch is not self._batch:
            self._tower.forget()
            self._batch = batch
        if setting.kind == "full":
            with self._tower.serve(setting):
                answers = self._answer(batch.inputs, batch)
            return Outcome(answers, torch.full((len(batch), len(FIGURES)), torch.nan, dtype=torch.float64))
        with _refusals():
            if setting.kind == "native":
                return self._native_outcome(setting, batch)
            with self._tower.serve(setting), attach(self.vlm.model, **setting.arguments()) as session:
                answers = self._answer(batch.inputs, batch)
            return Outcome(answers, *_figures(session, len(batch)))

    def _answer(self, inputs: dict[str, Any], batch: Batch) -> Answers:
        choices = [len(question.choices) for question in batch.questions] if self.letters else None
        return self.vlm.answer(inputs, choices)

    # The processor's own budget -----------------------------------------------------------------------------

    def native(self, setting: Setting, batch: Batch) -> list[ProcessorSetting]:
        """The processor's setting for every question of a batch."""
        full = self.vlm.visual_tokens(batch.inputs).tolist()
        budgets = []
        for row in range(len(batch)):
            key = (setting.keep, batch.sizes(row))
            if key not in self._native:
                self._native[key] = native_budget(
                    self.vlm.model, self.vlm.processor, batch.sizes(row), full[row], setting.keep
                )
            budgets.append(self._native[key])
        return budgets

    @contextmanager
    def native_inputs(self, budget: ProcessorSetting, batch: Batch, rows: Sequence[int]) -> Iterator[Batch]:
        """Some questions of a batch with the inputs that the processor's setting gives, which is in force
        inside the block."""
        questions = [batch.questions[row] for row in rows]
        pictures = [batch.pictures[row] for row in rows]
        with budget.applied(self.vlm.model, self.vlm.processor):
            yield Batch(questions, pictures, self.vlm.inputs(questions, pictures))

    def _native_outcome(self, setting: Setting, batch: Batch) -> Outcome:
        budgets = self.native(setting, batch)
        ids = torch.full((len(batch), self.vlm.max_new_tokens), UNUSED, dtype=torch.int32)
        letters = torch.full((len(batch),), -1, dtype=torch.int16) if self.letters else None
        figures = torch.full((len(batch), len(FIGURES)), torch.nan, dtype=torch.float64)
        for text in dict.fromkeys(budget.text for budget in budgets):
            rows = [row for row, budget in enumerate(budgets) if budget.text == text]
            with (
                self.native_inputs(budgets[rows[0]], batch, rows) as part,
                attach(self.vlm.model, **IDENTITY.arguments()) as session,
            ):
                answers = self._answer(part.inputs, part)
            ids[rows], figures[rows] = answers.ids, _figures(session, len(rows))[0]
            if letters is not None:
                letters[rows] = answers.letters
        return Outcome(Answers(ids, letters), figures, native=budgets)

    # Operations ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def other_flops(self, setting: Setting, first: Batch) -> float:
        """Operations at the prefill of one question, without those of the language model's layers.

        They are those of tower, projector, reducer and output head: everything that ran is counted (two per
        multiply-add of matrix products, convolutions and attention), less what `Session.report` counts by
        formula (nothing where it does not). Raises Refused as the call does.
        """
        if setting.kind == "full":
            total, language = self._counted(first.inputs), None
            with suppress(Refused), _refusals(), attach(self.vlm.model, **IDENTITY.arguments()) as session:
                self.vlm.generate(first.inputs, max_new_tokens=1)
                language = session.report().flops
        elif setting.kind == "native":
            with _refusals():
                budget = self.native(setting, first)[0]
                with self.native_inputs(budget, first, [0]) as part:
                    total = self._counted(part.inputs)
                    with attach(self.vlm.model, **IDENTITY.arguments()) as session:
                        self.vlm.generate(part.inputs, max_new_tokens=1)
                language = session.report().flops
        else:
            with _refusals(), attach(self.vlm.model, **setting.arguments()) as session:
                total = self._counted(first.inputs)
                language = session.report().flops
        return total - (language or 0)

    def _counted(self, inputs: dict[str, Any]) -> float:
        with _without_gradients(self.vlm.model), FlopCounterMode(display=False) as counter:
            self.vlm.generate(inputs, max_new_tokens=1)
        return float(counter.get_total_flops())


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients, for which the counter would set hooks that fail on some models."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _figures(session: Session, rows: int) -> tuple[Tensor, Tensor]:
    """What a session counted in its last prompt, [B, len(FIGURES)], and the same of the full model."""
    report = session.report()
    figures = torch.zeros(rows, len(FIGURES), dtype=torch.float64)
    full = torch.zeros_like(figures)
    for image in report.images:
        figures[image.row, 0] += image.layers[0] if image.layers else torch.nan
        figures[image.row, 1] += image.average if image.layers else torch.nan
        full[image.row, :2] += image.tokens
    for column, kept, whole in (
        (2, report.cache_bytes, report.cache_bytes_full),
        (3, report.flops, report.flops_full),
    ):
        figures[:, column] = torch.nan if kept is None else kept / rows
        full[:, column] = torch.nan if whole is None else whole / rows
    return figures, full
