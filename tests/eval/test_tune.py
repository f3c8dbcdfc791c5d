"""The search for the cheapest reducer: its rounds, its choice, and that a killed search repeats itself."""

import dataclasses
import json

import pytest
import torch
from vlm_questions import answering_vlm, write_questions, write_rows

from vistok.compress.registry import comparable_reducers
from vistok.eval.commands.tune import conclusion
from vistok.eval.options import TuneConfig
from vistok.eval.tasks import tune
from vistok.eval.tasks.vlm.measure import Measure

CPU = torch.device("cpu")
COUNT = 144
NAMES = ("uniformgrid", "divprune", "fastv")


@pytest.fixture(scope="module")
def vlm():
    return answering_vlm("llava", max_new_tokens=2)


@pytest.fixture(scope="module")
def data(vlm, tmp_path_factory):
    """Questions that the full model always answers rightly."""
    folder = tmp_path_factory.mktemp("questions")
    path = write_questions(folder, count=6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    from vistok.eval.data.questions import open_questions

    batch = vlm.batch(open_questions(str(path)).questions)
    for row, answer in zip(rows, vlm.texts(vlm.answer(batch.inputs).ids), strict=True):
        row["answers"] = [answer]
    return write_rows(path, rows * (COUNT // 6))


def search(vlm, data, out, **settings):
    settings = {"keep": (0.5, 0.25), "reducers": NAMES, "batch_size": 36, "speed": False} | settings
    result = tune.run(TuneConfig(model="tiny", data=str(data), **settings), out, CPU, vlm=vlm)
    result.state.remove()
    return result.record


def test_rounds_grow_threefold_and_half_of_the_questions_confirm():
    assert tune.rounds(144) == [8, 16, 48, 72]
    assert sum(tune.rounds(501)) == 501 and tune.rounds(501)[-1] == 251
    with pytest.raises(
        ValueError, match="143 questions are too few to search and confirm: give at least 144"
    ):
        tune.rounds(143)


def test_survivors_are_those_that_no_other_beats_in_cost_and_loss():
    costs, losses = [1, 2, 3, 4, 5], [0.5, 0.1, 0.2, 0.0, 0.0]
    assert tune.survivors(costs, losses, 3) == [0, 1, 3]
    assert tune.survivors(costs, losses, 2) == [1, 3]  # the smaller losses of the first front
    assert tune.survivors(costs, losses, 4) in ([0, 1, 2, 3], [0, 1, 3, 4])
    assert tune.survivors([1, 1], [0.0, 0.0], 5) == [0, 1]


def test_candidates_are_reducers_at_budgets_below_one_and_pairs_of_stages():
    settings = tune.candidates(NAMES, (1.0, 0.5, 0.25), native=True, combinations=True)
    labels = [setting.label for setting in settings]
    assert labels[0] == "full model" and len(set(labels)) == len(labels)
    assert set(labels[1:]) == {
        *(f"{name} {keep}" for name in ("native", *NAMES) for keep in (0.5, 0.25)),
        "uniformgrid 0.5 + fastv 0.25",
        "divprune 0.5 + fastv 0.25",
    }
    plain = tune.candidates(NAMES, (0.5,), native=False, combinations=False)
    assert [setting.label for setting in plain[1:]] == [f"{name} 0.5" for name in NAMES]
    every = tune.candidates(None, (0.5,), native=False, combinations=False)
    assert {setting.name for setting in every[1:]} == set(comparable_reducers())
    with pytest.raises(ValueError, match="no share below 1"):
        tune.candidates(NAMES, (1.0,), native=True, combinations=True)


def test_the_cheapest_setting_within_the_loss_is_a_line_to_paste(vlm, data, tmp_path):
    record = search(vlm, data, tmp_path, max_loss=0.999)
    rows = {row.label: row for row in record.finalists}
    chosen = rows[record.chosen]
    assert rows["full model"].score["value"] == 1.0 and record.confirmed == 72
    assert chosen.loss["value"] <= 0.999
    assert all(row.flops >= chosen.flops for row in rows.values() if row.loss["value"] <= 0.999)
    lines = conclusion(record).splitlines()
    assert lines[0] == chosen.python and lines[0].startswith("compress.attach(model, ")
    assert f"loses {100 * chosen.loss['value']:.1f}" in lines[1]
    assert {each.questions for each in record.candidates} == {72}  # few enough to stay in every round


def test_none_is_chosen_where_every_setting_loses_more(vlm, data, tmp_path):
    record = search(vlm, data, tmp_path, max_loss=0.0, reducers=("uniformgrid",), keep=(0.1,))
    assert record.chosen is None and record.finalists[1].loss["value"] > 0
    text = conclusion(record)
    assert text.startswith("No reducer qualifies: each of the last 1 loses more than 0 points.")
    assert 'compress.attach(model, "uniformgrid", keep=0.1)' in text


def test_a_setting_that_loses_too_much_leaves_the_search(vlm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FINALISTS", 1)
    record = search(vlm, data, tmp_path, keep=(0.75, 0.5, 0.25, 0.1), combinations=False)
    question_counts = sorted(each.questions for each in record.candidates)
    assert (
        question_counts[0] == 8
        and question_counts[-1] == 72
        and question_counts.count(72) < question_counts.count(8)
    )
    assert len(record.finalists) == 2


class Killed(BaseException):
    pass


def test_a_killed_search_continues_with_the_identical_record(vlm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "FINALISTS", 1)
    options = {"keep": (0.5, 0.25), "combinations": False}
    whole = search(vlm, data, tmp_path / "whole", **options)
    calls, original = [], Measure.__call__

    def measure(self, setting, batch):
        calls.append(len(batch))
        if len(calls) == 14:  # in the third round
            raise Killed
        return original(self, setting, batch)

    monkeypatch.setattr(Measure, "__call__", measure)
    with pytest.raises(Killed):
        search(vlm, data, tmp_path / "killed", **options)
    continued = search(vlm, data, tmp_path / "killed", **options)
    one, two = (dataclasses.asdict(record) for record in (whole, continued))
    for record in (one, two):
        record.pop("seconds")
    assert one == two


def test_the_command_prints_the_line_and_writes_json(run, tmp_path):
    vlm = answering_vlm("llava", max_new_tokens=2)
    data = write_questions(tmp_path, count=6)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    write_rows(data, lines * (COUNT // 6))
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    command = (
        "tune",
        "--model",
        tmp_path / "model",
        "--data",
        data,
        "--batch-size",
        72,
        "--max-new-tokens",
        1,
    )
    more = ("--keep", "0.5", "--reducers", "uniformgrid", "--speed-repeats", 1)
    status, out, _ = run(*command, *more, "--max-loss", "5%", "--out", "tuned")
    assert status == 0 and 'compress.attach(model, "uniformgrid", keep=0.5)' in out
    record = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    assert (
        record["chosen"] == "uniformgrid 0.5" and record["finalists"][1]["speed"]["first_token_seconds"] > 0
    )
    assert not (tmp_path / "tuned" / "state").exists()
    status, _, error = run(*command, "--max-loss", "all")
    assert status == 1 and "--max-loss 'all'" in error
    status, _, error = run(*command, "--count", 20)
    assert status == 1 and "20 questions are too few" in error
