"""The evaluation of vision-language models: what it must equal, and how it continues, refuses and reports."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_vlms import picture
from vlm_questions import answering_vlm, write_questions, write_rows

from vistok import compress
from vistok.compress.registry import comparable_reducers
from vistok.compress.report.accounting import llm_block_macs, vit_block_macs
from vistok.eval.options import VlmConfig, loss, shares
from vistok.eval.report.vlm import charts, tables, write_vlm
from vistok.eval.tasks.vlm import Setting, load, plan, run
from vistok.eval.tasks.vlm.measure import Measure
from vistok.eval.tasks.vlm.record import Row, mark_losers, noise_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llava_next():
    return answering_vlm("llava_next")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"))


def evaluate(vlm, data, out, **settings):
    settings = {"speed": False, "keep": (0.5,), "reducers": ("divprune",), "batch_size": 3} | settings
    result = run(VlmConfig(model="tiny", data=str(data), **settings), out, CPU, vlm=vlm)
    result.state.remove()
    return result.record


def rows_of(record):
    return {row.label: row for row in record.rows}


# What the numbers must equal --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llava_next", None),
        ("llava_deep", ("pyramiddrop", "transprune")),  # deep enough for the published schedules
        pytest.param("qwen2_5_vl", None, marks=pytest.mark.slow),
    ],
)
def test_keeping_everything_gives_every_answer_of_the_full_model(name, names, data, tmp_path):
    record = evaluate(answering_vlm(name), data, tmp_path, keep=(1.0,), reducers=names)
    full = record.rows[0]
    assert {row.name for row in record.rows[1:]} >= set(names or comparable_reducers())
    assert not [row.refused for row in record.rows if row.refused is not None]
    assert len(set(full.answers)) > 1  # pictures and questions decide
    for row in record.rows:
        assert (row.answers, row.agreement, row.score) == (full.answers, 1.0, full.score), row.label
        assert (row.tokens, row.cache_bytes) == (full.tokens, full.cache_bytes), row.label
    assert not record.warnings


def test_a_budget_changes_answers_and_lowers_tokens_operations_and_cache(llava_next, data, tmp_path):
    record = evaluate(
        llava_next,
        data,
        tmp_path,
        keep=(0.25,),
        positions=("keep", "compact"),
        reducers=("divprune", "tome", "fastv", "keynorm"),
    )
    full, *others = record.rows
    assert any(row.answers != full.answers for row in others)
    rows = rows_of(record)
    assert rows["divprune 0.25"].tokens < 0.3 * full.tokens
    assert rows["divprune 0.25, compact"].tokens == rows["divprune 0.25"].tokens
    assert "fastv 0.25, compact" not in rows  # what enters the model is the same
    assert rows["fastv 0.25"].tokens == full.tokens > rows["fastv 0.25"].tokens_per_layer
    assert rows["keynorm 0.25"].cache_bytes < 0.5 * full.cache_bytes
    assert rows["tome 0.25"].flops_reducer < 0 < rows["downsample 0.25"].flops_reducer
    for name in ("divprune", "tome", "fastv"):
        assert rows[f"{name} 0.25"].flops < full.flops


def test_operations_of_the_full_model_are_those_of_the_formulas(tmp_path):
    vlm = answering_vlm("llava")
    data = write_questions(tmp_path, count=1)
    full = evaluate(vlm, data, tmp_path / "out").rows[0]
    text = "USER : <image> what is in the image ASSISTANT :"
    prompt = len(vlm.tokenizer(text.replace("<image>", " ".join(["<image>"] * 16))).input_ids)
    width, hidden, keys, vocabulary = 64, 96, 32, len(vlm.tokenizer)
    language = 2 * 4 * llm_block_macs(prompt, width, hidden, keys)
    assert full.flops_language == language
    # Two of three blocks of the tower are used, with 17 tokens of width 48 and an MLP of width 64.
    block = vit_block_macs(17, 48) - 17 * 48 * (8 * 48 - 2 * 64)
    patches, projector = 16 * 3 * 14 * 14 * 48, 16 * (48 * 64 + 64 * 64)
    tower = 2 * (3 * block + patches)
    head = 2 * width * vocabulary
    assert full.flops - language == tower + 2 * projector + head
    assert full.cache_bytes == 2 * 4 * keys * prompt * 4 and full.tokens == 16


def test_answers_do_not_depend_on_the_batch(data, tmp_path):
    vlm = answering_vlm("llava_next")
    batched = evaluate(vlm, data, tmp_path, keep=(0.5,), reducers=("divprune", "fastv"), batch_size=5)
    alone = evaluate(vlm, data, tmp_path, keep=(0.5,), reducers=("divprune", "fastv"), batch_size=1)
    for one, two in zip(batched.rows, alone.rows, strict=True):
        assert one.answers == two.answers, one.label


def test_scores_and_agreement_are_means_over_the_same_answers(llava_next, data, tmp_path):
    full = evaluate(llava_next, data, tmp_path / "first").rows[0]
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for number, line in enumerate(lines):  # three of five right
        line["answers"] = [full.answers[number] if number < 3 else "w39 w39"]
        line["images"] = [str(data.parent / line["images"][0])]
    record = evaluate(llava_next, write_rows(tmp_path / "right.jsonl", lines), tmp_path / "second")
    assert record.rows[0].score["value"] == 0.6
    assert record.rows[0].categories["first"]["value"] == pytest.approx(2 / 3)
    assert record.rows[0].categories["second"]["value"] == 0.5
    for row in record.rows[1:]:
        same = [one == two for one, two in zip(row.answers, full.answers, strict=True)]
        assert row.agreement == sum(same) / 5
        assert row.loss["value"] == pytest.approx(0.6 - sum(same[:3]) / 5)


def test_baselines_are_always_there_with_the_processors_own_budget(data, tmp_path):
    record = evaluate(answering_vlm("qwen2_5_vl"), data, tmp_path, keep=(1.0, 0.5), reducers=("divprune",))
    names = [(row.name, row.baseline) for row in record.rows if row.keep == 0.5]
    baselines = ["native", "random", "uniformgrid", "downsample"]
    assert names == [*((name, True) for name in baselines), ("divprune", False)]
    native = rows_of(record)["native 0.5"]
    assert native.tokens <= 0.5 * record.rows[0].tokens
    assert native.native and all(each["fits"] for each in native.native)
    assert native.flops < record.rows[0].flops


def test_letters_by_likelihood_are_those_of_the_first_token(tmp_path, monkeypatch):
    vlm = answering_vlm("llava_next")
    vlm.__dict__["letter_ids"] = list(range(20, 46))
    choices = ["cat", "dog", "red"]
    data = write_questions(tmp_path, count=4, answer="cat", choices=choices)
    record = evaluate(vlm, data, tmp_path / "out", scorer="choice-likelihood")
    for number, answer in enumerate(record.rows[0].answers):
        batch = vlm.batch([_question(data, number)])
        logits = vlm.model(**batch.inputs).logits[0, -1, vlm.letter_ids[:3]]
        assert answer == "ABC"[int(logits.argmax())]


def _question(data, number):
    from vistok.eval.data.questions import open_questions

    return open_questions(str(data)).questions[number]


# Refusals and continuing ------------------------------------------------------------------------------------


def test_a_reducer_that_a_model_cannot_take_is_a_row_with_the_reason(llava_next, data, tmp_path):
    record = evaluate(llava_next, data, tmp_path, reducers=("tome", "divprune"), keep=(0.05,))
    rows = rows_of(record)
    assert "cannot leave" in rows["tome 0.05"].refused and not rows["tome 0.05"].score
    assert rows["divprune 0.05"].refused is None
    assert any("tome 0.05" in row for each in tables(record) for row in each.rows)


def test_a_reducer_that_fails_on_a_later_picture_is_a_row_with_the_reason(
    llava_next, data, tmp_path, monkeypatch
):
    original = compress.DivPrune.reduce

    def reduce(self, image, budget):
        if image.grid.image_size == (90, 60):  # height and width of the second picture, after the trial
            raise IndexError("no such token")
        return original(self, image, budget)

    monkeypatch.setattr(compress.DivPrune, "reduce", reduce)
    record = evaluate(llava_next, data, tmp_path, batch_size=1, reducers=("divprune", "visionzip"))
    rows = rows_of(record)
    assert rows["divprune 0.5"].refused is not None and "no such token" in rows["divprune 0.5"].refused
    assert rows["visionzip 0.5"].refused is None


class Killed(BaseException):
    pass


def test_a_killed_run_continues_with_the_identical_record(llava_next, data, tmp_path, monkeypatch):
    options = {"reducers": ("divprune", "fastv", "tome"), "batch_size": 2}
    whole = evaluate(llava_next, data, tmp_path / "whole", **options)
    calls, original = [], Measure.__call__

    def measure(self, setting, batch):
        calls.append(setting.label)
        if len(calls) == 12:
            raise Killed
        return original(self, setting, batch)

    monkeypatch.setattr(Measure, "__call__", measure)
    with pytest.raises(Killed):
        evaluate(llava_next, data, tmp_path / "killed", **options)
    continued = evaluate(llava_next, data, tmp_path / "killed", **options)
    settings = len(whole.rows)
    assert len(calls) == 12 + 2 * settings  # the first of three batches was not answered again
    one, two = (dataclasses.asdict(record) for record in (whole, continued))
    for record in (one, two):
        record.pop("seconds")
    assert one == two
    assert not (tmp_path / "killed" / "state").exists()


def test_a_run_of_other_settings_does_not_continue(llava_next, data, tmp_path, monkeypatch):
    def measure(self, setting, batch):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Measure, "__call__", measure)
        with pytest.raises(Killed):
            evaluate(llava_next, data, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(keep was"):
        evaluate(llava_next, data, tmp_path, keep=(0.25,))
    other = answering_vlm("llava_next")
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="model was"):
        evaluate(other, data, tmp_path)


# Marks and noise --------------------------------------------------------------------------------------------


def row(name, scores, keep=0.5, **more):
    baseline = name in ("native", "random", "uniformgrid", "downsample")
    mean = {"value": float(np.mean(scores))}
    return Row(f"{name} {keep}", name, keep, "keep", baseline, scores=list(scores), score=mean, **more)


def test_what_loses_to_a_baseline_of_its_budget_is_marked():
    full, down = row("full model", [1, 1, 1, 1], keep=1.0), row("downsample", [1, 1, 0, 0])
    small = row("native", [1, 1, 1, 0], native=[{"fits": False, "setting": "max_patches=1", "tokens": 9}])
    worse, better, other = (
        row("divprune", [1, 0, 0, 0]),
        row("fastv", [1, 1, 1, 0]),
        row("tome", [0] * 4, 0.25),
    )
    mark_losers([full, small, down, worse, better, other], seed=0)
    assert list(worse.loses_to) == ["downsample"] and worse.loses_to["downsample"]["value"] == 0.25
    assert worse.loses_to_downsampling
    assert not better.loses_to and not other.loses_to  # nothing of that budget to compare with
    small.native[0]["fits"], worse.loses_to = True, {}
    mark_losers([full, small, down, worse], seed=0)
    assert set(worse.loses_to) == {"native", "downsample"}


def test_losing_to_random_tokens_is_noted_without_the_mark_of_downsampling():
    worse = row("divprune", [1, 0, 0, 0])
    mark_losers([row("full model", [1] * 4, keep=1.0), row("random", [1, 1, 0, 0]), worse], seed=0)
    assert list(worse.loses_to) == ["random"] and not worse.loses_to_downsampling


def test_noise_is_the_difference_to_another_seed_or_between_halves():
    full = row("full model", [1, 0, 1, 0, 1])
    other = noise_of(full, np.array([1.0, 1.0, 1.0, 0.0]), "seed 1", 0)
    assert other["difference"] == pytest.approx(0.15) and other["second"]["value"] == 0.75
    halves = noise_of(full, None, "halves", 0)
    assert (halves["first"]["value"], halves["second"]["value"], halves["difference"]) == (1.0, 0.0, 1.0)
    assert noise_of(row("full model", [1]), None, "halves", 0)["difference"] is None


def test_scenes_are_asked_again_with_another_seed(tmp_path):
    record = evaluate(answering_vlm("llava_next", max_new_tokens=2), "scenes", tmp_path, count=7)
    assert record.n == 7 and len(record.rows[1].answers) == 7
    assert record.noise["basis"] == "questions of seed 0 and of seed 1"
    assert list(record.rows[0].categories) == [each["category"] for each in record.questions]


# Settings, the report and the command -----------------------------------------------------------------------


def test_plans_name_every_setting_once():
    settings = plan(("DivPrune", "fast_v", "random"), (0.5, 1.0, 0.5), ("keep", "compact"), native=True)
    labels = [setting.label for setting in settings]
    assert len(labels) == len(set(labels))
    assert labels[:3] == ["full model", "random 1", "random 1, compact"]
    assert "native 0.5" in labels and "native 1" not in labels
    assert "divprune 0.5, compact" in labels and "fastv 0.5, compact" not in labels
    for names, keeps, positions in (
        (("no",), (1.0,), ("keep",)),
        (None, (0.0,), ("keep",)),
        (None, (1.0,), ("x",)),
    ):
        with pytest.raises(ValueError):
            plan(names, keeps, positions, native=True)


def test_reducers_that_act_together_are_named_with_their_budgets():
    names = ("fastv", "tome:0.5+DivPrune:0.25", "divprune:0.1")
    settings = plan(names, (0.5,), ("keep",), native=False, layers=4)
    assert [setting.label for setting in settings[5:]] == ["tome 0.5 + divprune 0.25", "divprune 0.1"]
    assert settings[5].reducers == (("tome", 0.5), ("divprune", 0.25)) and settings[5].keep == 0.25
    everything = plan(None, (0.5,), ("keep",), native=False)
    assert {"divprune 0.5", "lazyllm 0.5"} <= {setting.label for setting in everything}
    only = plan(("tome:0.5+fastv:0.25",), (0.5,), ("keep",), native=False)
    assert [setting.label for setting in only[4:]] == ["tome 0.5 + fastv 0.25"]
    mixed = plan(("pixelprune+fastv:0.25",), (0.5,), ("keep",), native=False)[-1]
    assert mixed.label == "pixelprune + fastv 0.25" and mixed.keep == 0.25
    assert mixed.python == "compress.attach(model, [compress.PixelPrune(), compress.FastV(keep=0.25)])"
    with pytest.raises(ValueError, match=r"has no budget; write one .* as tome\+divprune:0\.25"):
        plan(("tome+divprune",), (0.5,), ("keep",), native=False)
    for text in (
        "+divprune:0.5",
        "tome:0.5+",
        "tome:2+divprune:0.5",
        "tome:x+divprune:0.5",
        "no:0.5+tome:0.5",
    ):
        with pytest.raises(ValueError, match=r"tome:0\.5\+divprune:0\.25|no reducer|unknown"):
            plan((text,), (0.5,), ("keep",), native=False)


def test_the_line_of_python_attaches_what_was_measured(llava_next):
    for setting in (
        Setting("reducers", 0.25, (("divprune", 0.25),)),
        Setting("reducers", 0.25, (("divprune", 0.5), ("fastv", 0.25)), "compact"),
        Setting("reducers", 0.25, (("transprune", 0.25),), layers=4),
    ):
        with eval(setting.python, {"compress": compress, "model": llava_next.model}) as session:
            described = session.reducers, session.keep, session._settings.positions
        with compress.attach(llava_next.model, **setting.arguments()) as session:
            assert (session.reducers, session.keep, session._settings.positions) == described


def test_options_are_checked():
    assert shares("1, 0.5") == (1.0, 0.5) and loss("1%") == 0.01 == loss("0.01")
    for text in ("", "2", "0", "half", "nan"):
        with pytest.raises(ValueError, match="--keep"):
            shares(text)
    for text in ("", "-1%", "100%", "one", "nan"):
        with pytest.raises(ValueError, match="--max-loss"):
            loss(text)


@pytest.mark.slow
def test_the_report_has_curves_tables_and_pictures(llava_next, data, tmp_path):
    config = VlmConfig(model="tiny", data=str(data), keep=(0.5, 0.25), reducers=("divprune", "keynorm"))
    result = run(dataclasses.replace(config, speed_repeats=1), tmp_path, CPU, vlm=llava_next)
    write_vlm(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text()
    for text in ("divprune 0.25", "downsample 0.25 (baseline)", "full model", "Cost per prompt", "2 n² d"):
        assert text in page
    examples = result.examples()
    assert [example.question for example in examples] == ["what is in the image", "describe describe"]
    views = {view.label: view for view in examples[0].views}
    original = np.asarray(picture(0))
    assert (np.asarray(views["full model"].picture) == original).all()
    kept = np.asarray(views["divprune 0.25"].picture)
    assert 0 < (kept == original).all(-1).mean() < 0.9 and views["divprune 0.25"].note.endswith("tokens")
    for each in charts(result.record):
        lines = each.figure.axes[0].lines
        assert lines[-1].get_label() == "full model" and lines[-1].get_linestyle() == "--"
    for row in result.record.rows:
        assert row.speed["first_token_seconds"] > 0 and row.speed["tokens_per_second"] > 0
    result.state.remove()


def test_the_command_writes_json_and_page_and_reports_errors_in_one_line(run, tmp_path):
    vlm, data = answering_vlm("llava_next"), write_questions(tmp_path, count=2)
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    command = ("eval", "vlm", "--data", data, "--no-speed", "--max-new-tokens", 2, "--reducers", "divprune")
    status, out, _ = run(*command, "--model", tmp_path / "model", "--keep", "1.0,0.5", "--out", "result")
    assert status == 0 and "divprune 0.5" in out
    record = json.loads((tmp_path / "result" / "vlm.json").read_text())
    assert [row["label"] for row in record["rows"]][:2] == ["full model", "random 1"]
    assert (tmp_path / "result" / "report.html").exists() and not (tmp_path / "result" / "state").exists()
    for model, words in (
        ("nowhere/at/all", "does not exist"),
        ("misspelt", "scenes-vlm"),
        (data, "is a file"),
    ):
        status, _, error = run(*command, "--model", model)
        assert status == 1 and words in error and error.count("\n") == 1
    status, _, error = run(*command, "--model", tmp_path / "model", "--keep", "7")
    assert status == 1 and "--keep '7'" in error
    status, _, error = run(*command, "--model", tmp_path / "model", "--scorer", "exakt")
    assert status == 1 and "did you mean exact?" in error


def test_models_and_processors_that_do_not_fit_are_refused(tmp_path):
    vlm = answering_vlm("llava_next")
    vlm.processor.chat_template = None
    with pytest.raises(ValueError, match="--prompt"):
        type(vlm)(vlm.model, vlm.processor)
    with pytest.raises(ValueError, match=r"no \{question\}"):
        type(vlm)(vlm.model, vlm.processor, prompt="USER : <image>")
    vlm = type(vlm)(
        vlm.model, vlm.processor, prompt="USER : <image> {question} ASSISTANT :", max_new_tokens=4
    )
    with_template = answering_vlm("llava_next")
    data = write_questions(tmp_path, count=2)
    first, second = evaluate(vlm, data, tmp_path / "a"), evaluate(with_template, data, tmp_path / "b")
    assert first.rows[0].answers == second.rows[0].answers
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="cannot be loaded as a vision-language model"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load(str(tmp_path / "empty"), dtype="int8")
