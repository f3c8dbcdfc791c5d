"""A vision-language model with token reducers on questions: accuracy and cost of every setting.

The full model, the baselines (random tokens, a uniform grid, a smaller picture, the processor's own budget)
and the reducers answer the same batches greedily, one setting after the other, so that pictures are prepared
once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....commands.options import binding
from ....compress import attach
from ....compress.native_budget import has_native_budget
from ...data.questions import QuestionSet, VisualQuestion, open_questions
from ...engine import passes
from ...engine.state import State
from ...metrics.answers import Scorer, scorer_by_name
from ...options import AskingConfig, VlmConfig
from ...speed import answers as answer_times
from .answering import COUNTED, AnswerPass
from .model import Batch, VisionLanguageModel, load
from .pictures import Example, examples
from .record import Row, VlmRecord, bare_row, mark_losers, noise_of, row_of, texts_of
from .settings import FULL, Setting, plan

if TYPE_CHECKING:
    from accelerate import PartialState

COST_NOTE = (
    "Prefill FLOPs per prompt, two per multiply-add. In each layer of the language model, over all "
    "questions: 2 (2 n d (d + k) + 2 n² d + 3 n d m), for n tokens of width d, keys of width k and a gated "
    "MLP of width m. In tower, projector, reducer and output head: all products, convolutions and attention "
    "that ran on the first {counted} questions"
)


@dataclass(frozen=True)
class Result:
    """The record; `examples` makes the pictures of a report (it runs the model again). Delete the `state`
    when all is written."""

    record: VlmRecord
    examples: Callable[[], list[Example]]
    state: State


def run(
    config: VlmConfig, out: Path, device: torch.device, *, vlm: VisionLanguageModel | None = None
) -> Result | None:
    """Evaluate, keeping the state in `out`/state; None on all processes but the first.

    `vlm` takes the place of loading `config.model`. A reducer that cannot take the model has a row with the
    reason. Raises ValueError or OSError, before any long work, for data or a model that is not there,
    settings that do not exist, and the unfinished state of another run.
    """
    process, device = passes.join(device)
    data = open_questions(config.data, count=config.count, seed=config.seed, split=config.split)
    scorer = scorer_by_name(config.scorer, data.questions)
    plan(config.reducers, config.keep, config.positions, native=True)  # checks them before the model is read
    vlm = vlm or model_of(config, device)
    settings = plan(
        config.reducers,
        config.keep,
        config.positions,
        native=has_native_budget(vlm.model),
        layers=vlm.num_layers,
    )
    parts = [data.questions] + ([data.again.questions] if data.again is not None else [])
    answers = open_answers(config, vlm, data, parts, settings, scorer, out, process)
    own = sum(batch.start < len(data) for batch in answers.batches)
    everything = range(len(settings))
    if not answers.run(lambda batch: everything if batch < own else (0,), f"answer with {config.model}"):
        return None
    rows, noise = _rows(answers, scorer, len(data), config.seed, data.again is not None)
    if config.speed:
        time_settings(answers, rows, config.speed_repeats)
    full = rows[0]
    record = VlmRecord(
        model=config.model,
        parameters=sum(each.numel() for each in vlm.model.parameters()),
        data=data.source,
        n=len(data),
        seed=config.seed,
        scorer=scorer.name,
        protocol=_protocol(config, vlm, answers, scorer),
        rows=rows,
        noise=noise,
        questions=[
            {"name": each.name, "question": each.prompt, "answers": each.answers, "category": each.category}
            for each in data.questions
        ],
        warnings=_warnings(rows, full),
        seconds=answers.state.seconds,
    )
    return Result(record, lambda: examples(answers.measure, data, record, settings), answers.state)


def model_of(config: AskingConfig, device: torch.device) -> VisionLanguageModel:
    """The model that a configuration names. Raises as `load`."""
    return load(
        config.model,
        dtype=config.dtype,
        device=device,
        max_new_tokens=config.max_new_tokens,
        prompt=config.prompt,
    )


def open_answers(
    config: AskingConfig,
    vlm: VisionLanguageModel,
    data: QuestionSet,
    parts: Sequence[Sequence[VisualQuestion]],
    settings: Sequence[Setting],
    scorer: Scorer,
    out: Path,
    process: "PartialState",
) -> AnswerPass:
    """The pass over the `parts` of the questions, with its state in `out`/state.

    Raises as `AnswerPass.open`.
    """
    answers = AnswerPass(
        vlm,
        parts,
        settings,
        out / "state",
        process,
        binding(config) | {"scorer": scorer.name, "questions": data.digest},
        data.inventory,
        batch_size=config.batch_size,
        letters=scorer.reads == "letter",
    )
    answers.open()
    return answers


def _rows(
    answers: AnswerPass, scorer: Scorer, count: int, seed: int, has_again: bool
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of all settings, and the noise of the full model."""
    tables = answers.tables()
    rows: list[Row] = []
    again = None
    for setting, table in zip(answers.settings, tables, strict=True):
        if setting.label in answers.refused:
            rows.append(bare_row(setting, answers.refused[setting.label]))
            continue
        texts = texts_of(answers.vlm, table, scorer)
        scores = np.array(scorer(texts[:count], answers.questions[:count]))
        if setting is FULL and has_again:
            again = np.array(scorer(texts[count:], answers.questions[count:]))
        if len(table.figures) > count:
            table = type(table)(table.numbers[:count], table.ids, table.letters, table.figures[:count])
        row = row_of(
            setting,
            table,
            texts[:count],
            scores,
            rows[0] if rows else None,
            answers.questions[:count],
            answers.flops[setting.label],
            seed,
        )
        row.native = answers.native_settings(setting)
        rows.append(row)
    mark_losers(rows, seed)
    basis = (
        f"questions of seed {seed} and of seed {seed + 1}" if has_again else "the even and the odd questions"
    )
    return rows, noise_of(rows[0], again, basis, seed)


# Times ------------------------------------------------------------------------------------------------------


def time_settings(answers: AnswerPass, rows: Sequence[Row], repeats: int) -> None:
    """Set the `speed` of rows that were not refused: each setting is timed on the first question in turn with
    the full model, but for those that a killed run has timed."""
    batch = answers.vlm.batch(answers.questions[:1])
    full, times = _way(answers, FULL, batch), answers.times.values
    settings = {setting.label: setting for setting in answers.settings}
    for row in rows:
        if row.refused is not None:
            continue
        if row.label not in times:
            way = _way(answers, settings[row.label], batch)
            times[row.label] = answer_times.measure(way, full, answers.vlm.device, repeats).record()
            answers.state.save()
        row.speed = times[row.label]


def _way(answers: AnswerPass, setting: Setting, batch: Batch) -> answer_times.Way:
    vlm, measure = answers.vlm, answers.measure

    def generate(inputs: dict[str, Any], criterion: Any) -> Any:
        count = answer_times.TOKENS
        return vlm.generate(inputs, max_new_tokens=count, min_new_tokens=count, stopping_criteria=[criterion])

    @contextmanager
    def way() -> Iterator[Any]:
        if setting.kind == "full":
            yield lambda criterion: generate(batch.inputs, criterion), None
        elif setting.kind == "native":
            budget = measure.native(setting, batch)[0]
            with measure.native_inputs(budget, batch, [0]) as part:
                yield lambda criterion: generate(part.inputs, criterion), None
        else:
            with attach(vlm.model, **setting.arguments()) as session:
                yield lambda criterion: generate(batch.inputs, criterion), session

    return way


# The record -------------------------------------------------------------------------------------------------


def _protocol(
    config: VlmConfig, vlm: VisionLanguageModel, answers: AnswerPass, scorer: Scorer
) -> dict[str, Any]:
    import transformers

    counted = min(len(answers.batches[0]), COUNTED)
    return {
        "scorer": f"{scorer.name}: {scorer.summary}",
        "answers": f"greedy, at most {vlm.max_new_tokens} tokens",
        "batch_size": config.batch_size,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "device": str(vlm.device),
        "attention": vlm.model.config._attn_implementation,
        "transformers": transformers.__version__,
        "model_type": vlm.model.config.model_type,
        "flops": COST_NOTE.format(counted=counted),
        "speed": (
            f"the first question alone, {answer_times.TOKENS} tokens, medians of {config.speed_repeats} runs "
            "in turn with the full model after a warm-up, from prepared inputs on, with the reducer's time"
            if config.speed
            else "not measured"
        ),
    }


def _warnings(rows: Sequence[Row], full: Row) -> list[str]:
    changed = [
        row.label for row in rows if row.keep == 1 and row.refused is None and row.answers != full.answers
    ]
    if changed:
        return [f"answers at keep=1.0 differ from the full model's: {', '.join(changed)}; please report this"]
    return []
