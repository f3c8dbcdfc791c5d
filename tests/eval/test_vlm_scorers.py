"""Scores of answers against values worked out by hand."""

import sys
from types import ModuleType

import pytest

from vistok import plugins
from vistok.eval.data.questions import VisualQuestion
from vistok.eval.metrics.answers import Scorer, levenshtein, scorer_by_name, scorers, vqa_normalised


def question(*accepted, choices=()):
    return VisualQuestion("line 1", "what is it?", accepted, list, choices=choices)


def score(name, answer, *accepted, choices=()):
    return scorers()[name]([answer], [question(*accepted, choices=choices)])[0]


@pytest.mark.parametrize(
    ("answer", "accepted", "value"),
    [
        ("red", ("red",), 1),
        (" Red. ", ("blue", "red"), 1),
        ("dark  red", ("dark red",), 1),
        ("red cube", ("red",), 0),
        ("", ("red",), 0),
    ],
)
def test_exact_match(answer, accepted, value):
    assert score("exact", answer, *accepted) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("B", 1),
        ("b", 1),
        ("(B) a dog", 1),
        ("B. cat", 1),
        ("**B**", 1),
        ("A", 0),
        ("Both", 0),
        ("D", 0),
        ("", 0),
    ],
)
def test_a_choice_is_the_letter_at_the_beginning(answer, value):
    assert score("choice", answer, "B", choices=("cat", "dog", "cow")) == value


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The two dogs.", "2 dogs"),
        ("A cat, an owl", "cat owl"),
        ("1,000", "1000"),
        ("2.5 m.", "2.5 m"),
        ("don't", "dont"),
        ("T-shirt!", "t shirt"),
        ("None", "0"),
    ],
)
def test_vqa_normalisation(text, normalised):
    assert vqa_normalised(text) == normalised


def test_vqa_accuracy_is_a_third_per_equal_annotator_up_to_one():
    annotations = ["a cat"] * 2 + ["dog"] * 7 + ["cow"]
    assert score("vqa", "Cat", *annotations) == pytest.approx(2 / 3)
    assert score("vqa", "the dog", *annotations) == 1
    assert score("vqa", "cow", *annotations) == pytest.approx(1 / 3)
    assert score("vqa", "horse", *annotations) == 0


def test_anls_is_the_best_similarity_above_one_half():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3
    assert score("anls", "hallo", "hello") == pytest.approx(0.8)
    assert score("anls", "Hello  World", "hello world") == 1
    assert score("anls", "ab", "abcd") == 0  # a distance of exactly one half
    assert score("anls", "abc", "abcd", "abce", "abc!x") == pytest.approx(0.75)
    assert score("anls", "", "a") == 0


def test_cider_without_its_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pycocoevalcap"):
        score("cider", "a cat", "a cat")


def test_cider_passes_words_of_answers_and_all_references(monkeypatch):
    calls = []

    class Cider:
        def compute_score(self, references, candidates):
            calls.append((references, candidates))
            return 0.75, [1.0, 0.5]

    module = ModuleType("pycocoevalcap.cider.cider")
    module.Cider = Cider
    for name in ("pycocoevalcap", "pycocoevalcap.cider"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", module)
    values = scorers()["cider"](
        ["A cat!", "dogs, two"], [question("A cat.", "The cat's bed"), question("Dogs")]
    )
    assert values == [1.0, 0.5]
    assert calls == [({0: ["a cat", "the cat's bed"], 1: ["dogs"]}, {0: ["a cat"], 1: ["dogs two"]})]


def test_the_scorer_fits_the_questions():
    plain, choice = question("red"), question("A", choices=("red", "blue"))
    assert scorer_by_name(None, [plain, choice]).name == "exact"
    assert scorer_by_name(None, [choice]).name == "choice"
    with pytest.raises(ValueError, match=r"choice-likelihood needs choices, and line 1 has none"):
        scorer_by_name("choice-likelihood", [choice, plain])
    with pytest.raises(ValueError, match=r"no scorer is called 'anl'; did you mean anls\?"):
        scorer_by_name("anl", [plain])


def test_other_packages_add_scorers_and_broken_ones_are_left_out(monkeypatch):
    length = Scorer("length", "length", lambda answers, questions: [float(len(each)) for each in answers])
    again = Scorer("exact", "exact", lambda answers, questions: [0.0] * len(answers))
    points = {"length": length, "again": again, "nonsense": 3}
    monkeypatch.setattr(plugins, "plugins", lambda group: points if group == "vistok.scorers" else {})
    scorers.cache_clear()
    try:
        with pytest.warns(UserWarning) as warnings:
            assert scorers()["length"](["four"], [question("x")]) == [4.0]
        assert scorers()["exact"] is not again
        texts = [str(each.message) for each in warnings]
        assert any("not a Scorer" in text for text in texts) and any("'exact'" in text for text in texts)
    finally:
        scorers.cache_clear()


@pytest.mark.parametrize("values", [[], [float("nan")], [-1.0]])
def test_a_scorer_that_returns_nonsense_is_refused(values):
    broken = Scorer("broken", "broken", lambda answers, questions: values)
    with pytest.raises(ValueError, match="one value of at least 0 per answer"):
        broken(["a"], [question("a")])
