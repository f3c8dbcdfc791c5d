"""The resumable pass over questions: every active setting answers every batch."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...data.inventory import Inventory
from ...data.questions import VisualQuestion
from ...engine.instruments import fingerprint
from ...engine.record import Clock
from ...engine.state import State
from .measure import FIGURES, Measure, Refused
from .model import VisionLanguageModel
from .settings import FULL, Setting

if TYPE_CHECKING:
    from accelerate import PartialState

UNASKED = -2
"""Fills the table of token ids where a setting did not answer."""
COUNTED = 2
"""Questions whose prefill is counted operation by operation, where their pictures differ in size."""

Active = Callable[[int], Sequence[int]]


class Log:
    """Plain values by name that a state saves: refusals, times."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The values."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.values = dict(state)

    def merge(self, other: "Log") -> None:
        """Add the values of another process; the first one's stay."""
        self.values = {**other.values, **self.values}


@dataclass(frozen=True, eq=False)
class Table:
    """What one setting answered: `numbers` int64 [n] of the questions, `ids` int32 [n, T], `letters` int16
    [n] (-1 without choices), `figures` float64 [n, len(FIGURES)]."""

    numbers: np.ndarray
    ids: Tensor
    letters: np.ndarray
    figures: np.ndarray


class AnswerPass:
    """All settings on all questions, in batches whose state is on disk in `folder`.

    `parts` are groups of questions that share no batch. `refused` has the reason for every setting that
    cannot answer, by label.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        parts: Sequence[Sequence[VisualQuestion]],
        settings: Sequence[Setting],
        folder: Path,
        process: "PartialState",
        identity: dict[str, Any],
        inventory: Inventory,
        *,
        batch_size: int,
        letters: bool,
    ) -> None:
        import transformers

        self.vlm, self.settings = vlm, list(settings)
        self.measure = Measure(vlm, letters=letters)
        self.questions = [question for part in parts for question in part]
        self.batches: list[range] = []
        start = 0
        for part in parts:
            ends = range(start, start + len(part), batch_size)
            self.batches += [range(i, min(i + batch_size, start + len(part))) for i in ends]
            start += len(part)
        identity = identity | {
            "settings": [setting.label for setting in settings],
            "model": fingerprint(vlm.model),
            "device": vlm.device.type,
            "transformers": transformers.__version__,
        }
        self.state = State(folder, len(self.questions), identity, inventory, process)
        count, tokens = len(settings), vlm.max_new_tokens
        self.state.add_table("ids", "int32", count * tokens)
        self.state.add_table("letters", "int16", count)
        self.state.add_table("figures", "float64", count * len(FIGURES))
        self._failures = self.state.add("failures", Log())
        self._native = self.state.add("native", Log())
        self.times = self.state.add("times", Log())
        """Times of settings by label, for the stage after the pass."""
        self.refused: dict[str, str] = {}
        self.flops: dict[str, float] = {}
        """Operations per prompt beside the language model's layers, by label."""

    def open(self) -> None:
        """Try every setting on the first question or two, count its operations, and open the state.

        Raises what the full model raises, and ValueError or OSError as `State.open`.
        """
        first = [self.vlm.batch([question]) for question in self.questions[: self.batches[0].stop][:COUNTED]]
        first = list({batch.sizes(0): batch for batch in reversed(first)}.values())
        for setting in self.settings:
            try:
                counts = [self.measure.other_flops(setting, batch) for batch in first]
            except Refused as error:
                self.refused[setting.label] = str(error)
            else:
                self.flops[setting.label] = sum(counts) / len(counts)
        self.state.open()

    def run(self, active: Active, title: str) -> bool:
        """Answer all batches from the position in the state on; True in the first process.

        `active` returns the numbers of the settings that answer a batch; it is called with the number of
        the batch once all batches before it are done (by this process).
        """
        state, process = self.state, self.state.process
        own = range(process.process_index, len(self.batches), process.num_processes)
        clock = Clock(state.seconds, self.vlm.device)
        visible = process.is_main_process and sys.stderr.isatty()
        bar = tqdm(
            desc=title, total=len(own), initial=state.done, delay=1.0, leave=False, disable=not visible
        )
        with ExitStack() as on_failure, bar:
            on_failure.callback(state.close)
            for number in own[state.done :]:
                self._answer(self.batches[number], active(number), clock)
                state.done += 1
                state.save()
                bar.update()
            first = state.merge()
            on_failure.pop_all()
        self.refused |= self.failures
        return first

    def _answer(self, rows: range, active: Sequence[int], clock: Clock) -> None:
        with clock("pictures and prompts"):
            batch = self.vlm.batch(self.questions[rows.start : rows.stop])
        shape = (len(rows), len(self.settings))
        ids = torch.full((*shape, self.vlm.max_new_tokens), UNASKED, dtype=torch.int32)
        letters = torch.full(shape, -1, dtype=torch.int16)
        figures = torch.full((*shape, len(FIGURES)), torch.nan, dtype=torch.float64)
        for number in active:
            setting = self.settings[number]
            if setting.label in self.refused or setting.label in self.failures:
                continue
            try:
                with clock("full model" if setting is FULL else "reducers and baselines"):
                    outcome = self.measure(setting, batch)
            except Refused as error:
                names = f"{batch.questions[0].name} to {batch.questions[-1].name}"
                self.failures[setting.label] = f"{names}: {error}"
                continue
            for each in outcome.native:
                values = {"setting": each.text, "tokens": each.tokens, "fits": each.fits}
                self._native.values[f"{setting.label}: {each.text}, {each.tokens} tokens"] = values
            ids[:, number] = outcome.answers.ids
            figures[:, number] = outcome.figures
            if outcome.answers.letters is not None:
                letters[:, number] = outcome.answers.letters
            if outcome.full is not None and bool(figures[:, 0].isnan().any()):
                figures[:, 0] = outcome.full
        images = torch.tensor(list(rows))
        self.state.write("ids", images, ids.flatten(1))
        self.state.write("letters", images, letters)
        self.state.write("figures", images, figures.flatten(1))
        digests = [hashlib.sha256(question.name.encode()).digest() for question in batch.questions]
        self.state.mark(images, digests)

    @property
    def failures(self) -> dict[str, str]:
        """The reason for every setting that failed on a batch, by label."""
        return self._failures.values

    def native_settings(self, setting: Setting) -> list[dict[str, Any]]:
        """The processor's settings that a native budget became for pictures of some sizes, most tokens first:
        each {"setting", "tokens", "fits"}."""
        prefix = f"{setting.label}: "
        own = [values for key, values in self._native.values.items() if key.startswith(prefix)]
        return sorted(own, key=lambda each: (-each["tokens"], each["setting"]))

    def tables(self) -> list[Table]:
        """What each setting has answered so far."""
        tokens, width, numbers = self.vlm.max_new_tokens, len(FIGURES), self.state.measured()
        ids, figures = self.state.rows("ids"), self.state.rows("figures").numpy()
        letters = self.state.rows("letters").numpy()
        tables = []
        for number in range(len(self.settings)):
            own = ids[:, number * tokens : (number + 1) * tokens]
            rows = (own[:, 0] != UNASKED).numpy()
            counts = figures[rows, number * width : (number + 1) * width]
            tables.append(Table(numbers[rows], own[rows], letters[rows, number], counts))
        return tables
