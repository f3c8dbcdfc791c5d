"""One run of the vision tower per batch, with the answers of a run per setting."""

import pytest
import torch
from vlm_questions import answering_vlm, write_questions

from vistok.compress.registry import reducers
from vistok.eval.data.questions import open_questions
from vistok.eval.tasks.vlm import Setting
from vistok.eval.tasks.vlm.measure import Measure, Refused
from vistok.eval.tasks.vlm.settings import FULL
from vistok.eval.tasks.vlm.shared_tower import SharedTower, leaves_tower_alone

ALONE = {
    *("averagepool", "divprune", "downsample", "fastv", "keynorm", "pyramiddrop", "random", "transprune"),
    *("uniformgrid", "dart", "ima", "promptdistill", "sparsevlm", "cdpruner", "lazyllm", "evs", "vidcom2"),
    *("h2o", "keyformer", "tokenselect", "recycledattention"),
}


def settings(keep=0.5):
    return [FULL, *(Setting("reducers", keep, ((name, keep),)) for name in reducers())]


def test_what_merges_in_the_tower_or_reads_it_gets_a_run_of_its_own():
    alone = {setting.name for setting in settings() if leaves_tower_alone(setting)}
    assert alone == {"full model", *ALONE}
    assert not leaves_tower_alone(Setting("native", 0.5))
    assert not leaves_tower_alone(Setting("reducers", 0.25, (("tome", 0.5), ("fastv", 0.25))))


@pytest.mark.parametrize(
    "name", ["llava_next", "qwen2_5_vl", pytest.param("internvl", marks=pytest.mark.slow)]
)
def test_answers_are_those_without_sharing_and_the_tower_runs_less(name, tmp_path, monkeypatch):
    vlm = answering_vlm(name, max_new_tokens=2)
    batch = vlm.batch(open_questions(str(write_questions(tmp_path, count=3))).questions)
    tower, runs = SharedTower(vlm.model).tower, []
    tower.register_forward_hook(lambda *_: None)  # what is hooked on the tower stays in place
    patch = type(tower).forward
    monkeypatch.setattr(
        type(tower), "forward", lambda *args, **kwargs: runs.append(1) or patch(*args, **kwargs)
    )

    def answers(measure):
        outcomes = []
        for setting in settings():
            try:
                outcomes.append(measure(setting, batch))
            except Refused:
                outcomes.append(None)
        return outcomes

    shared = answers(Measure(vlm))
    in_shared, runs[:] = len(runs), []
    with monkeypatch.context() as without:
        without.setattr(Measure, "__init__", _without_sharing(Measure.__init__))
        alone = answers(Measure(vlm))
    assert len(runs) >= in_shared + 5
    for setting, one, two in zip(settings(), shared, alone, strict=True):
        assert (one is None) == (two is None), setting.label
        if one is not None:
            assert torch.equal(one.answers.ids, two.answers.ids), setting.label
            assert torch.equal(one.figures.nan_to_num(), two.figures.nan_to_num()), setting.label
    assert "forward" not in vars(tower)


def _without_sharing(original):
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._tower.tower = None

    return init


def test_another_batch_is_not_served_with_the_first_ones_features(tmp_path):
    vlm = answering_vlm("llava", max_new_tokens=2)
    questions = open_questions(str(write_questions(tmp_path, count=4))).questions
    measure = Measure(vlm)
    first = vlm.batch(questions[:2])
    second = vlm.batch(questions[2:])
    expected = vlm.answer(second.inputs).ids
    measure(FULL, first)
    assert torch.equal(measure(FULL, second).answers.ids, expected)


def test_other_pictures_within_a_context_run_the_tower(tmp_path):
    vlm = answering_vlm("llava")
    tower = SharedTower(vlm.model)
    pictures = torch.randn(2, 1, 3, 56, 56)
    with tower.serve(FULL), torch.no_grad():
        one, other = (tower.tower(pixel_values=each).last_hidden_state for each in pictures)
        again = tower.tower(pixel_values=pictures[0].clone()).last_hidden_state
    assert torch.equal(one, again) and not torch.equal(one, other)
