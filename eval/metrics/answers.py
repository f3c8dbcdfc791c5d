"""Scores of generated answers: exact match, multiple choice, VQA accuracy, ANLS and CIDEr."""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Literal

from ...plugins import modules_of, with_plugins
from ..data.questions import LETTERS, VisualQuestion

Score = Callable[[Sequence[str], Sequence[VisualQuestion]], Sequence[float]]


@dataclass(frozen=True)
class Scorer:
    """One way to score answers.

    Args:
        name: the name that `--scorer` takes.
        label: its name in tables.
        score: a function of answers [n] and their questions [n] that returns one value per answer, 1 for a
            right one; it gets the whole set at once.
        reads: whether the answers are the generated "text", or the most likely "letter" of the choices as
            the first token.
        summary: what it does, in one line.
        choices: whether every question needs choices.
    """

    name: str
    label: str
    score: Score
    reads: Literal["text", "letter"] = "text"
    summary: str = ""
    choices: bool = False

    def check(self, questions: Sequence[VisualQuestion]) -> None:
        """Raise ValueError unless all questions can be scored like this."""
        if self.choices and (without := [each for each in questions if not each.choices]):
            raise ValueError(
                f"the scorer {self.name} needs choices, and {without[0].name} has none: give every question "
                f'"choices", or another --scorer ({", ".join(scorers())})'
            )

    def __call__(self, answers: Sequence[str], questions: Sequence[VisualQuestion]) -> list[float]:
        """One checked value per answer."""
        values = [float(value) for value in self.score(answers, questions)]
        if len(values) != len(questions) or any(value != value or value < 0 for value in values):
            raise ValueError(
                f"the scorer {self.name} returned {len(values)} values for {len(questions)} answers, or some "
                "that are negative or NaN; it must return one value of at least 0 per answer"
            )
        return values


@cache
def scorers() -> dict[str, Scorer]:
    """All scorers by name: those in the `SCORERS` of this folder's files, and those that other packages add
    by entry points of the group `vistok.scorers`, each a `Scorer`."""
    own = [each for module in modules_of(__package__) for each in getattr(module, "SCORERS", ())]
    return with_plugins(own, "vistok.scorers", lambda value: isinstance(value, Scorer), "a Scorer")


def scorer_by_name(name: str | None, questions: Sequence[VisualQuestion]) -> Scorer:
    """The scorer of that name, checked against the questions. None: "choice" where all questions have
    choices, else "exact". Raises ValueError, with the nearest name, for others."""
    if name is None:
        name = "choice" if all(each.choices for each in questions) else "exact"
    if name not in scorers():
        close = get_close_matches(name, scorers(), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"no scorer is called {name!r}{hint} Known: {', '.join(scorers())}")
    scorer = scorers()[name]
    scorer.check(questions)
    return scorer


def _per_answer(score: Callable[[str, VisualQuestion], float]) -> Score:
    return lambda answers, questions: [score(*pair) for pair in zip(answers, questions, strict=True)]


# Exact match and multiple choice ----------------------------------------------------------------------------


def exact_match(answer: str, question: VisualQuestion) -> float:
    """1 if the answer is one of the accepted ones, apart from case, repeated spaces and a final full stop."""
    return float(_plain(answer) in {_plain(each) for each in question.answers})


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def chosen_letter(answer: str, question: VisualQuestion) -> str:
    """The letter that an answer begins with, as in "B", "(b) red" or "B. red"; empty where it begins with
    another word."""
    match = re.match(r"[\W_]*([A-Za-z])(?![A-Za-z0-9'])", answer)
    letter = match[1].upper() if match else ""
    return letter if letter in LETTERS[: len(question.choices)] else ""


def choice(answer: str, question: VisualQuestion) -> float:
    """1 if the answer begins with the right letter."""
    return float(chosen_letter(answer, question) in question.answers)


# VQA accuracy -----------------------------------------------------------------------------------------------

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}


def vqa_normalised(text: str) -> str:
    """Lower case, number words as digits, without articles, punctuation and apostrophes; commas and full
    stops inside numbers stay out or in: "1,000" becomes "1000" and "2.5" stays."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("'", "").replace("’", ""))
    text = re.sub(r"\.(?!\d)|(?<!\d)\.", " ", text)
    text = text.translate(str.maketrans(dict.fromkeys(string.punctuation.replace(".", ""), " ")))
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


def vqa_accuracy(answer: str, question: VisualQuestion) -> float:
    """min(n / 3, 1), for n annotators whose normalised answer is the same.

    "VQA: Visual Question Answering" (2015, arXiv 1505.00468), section 4. The benchmark's program averages
    over all subsets that leave one annotator out, which gives up to 0.1 less for n up to 3.
    """
    normalised = vqa_normalised(answer)
    return min(sum(vqa_normalised(each) == normalised for each in question.answers) / 3, 1.0)


# ANLS -------------------------------------------------------------------------------------------------------

ANLS_THRESHOLD = 0.5


def anls(answer: str, question: VisualQuestion) -> float:
    """The best normalised Levenshtein similarity to an accepted answer, 0 where the distance is at least half
    of the longer text; case and repeated spaces do not count.

    "Scene Text Visual Question Answering" (2019, arXiv 1905.13648), equation 1.
    """
    return max(
        _similarity(" ".join(answer.lower().split()), " ".join(each.lower().split()))
        for each in question.answers
    )


def _similarity(one: str, two: str) -> float:
    longest = max(len(one), len(two))
    distance = levenshtein(one, two) / longest if longest else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def levenshtein(one: str, two: str) -> int:
    """The fewest insertions, deletions and substitutions of characters that turn one text into the other."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


# CIDEr ------------------------------------------------------------------------------------------------------


def cider(answers: Sequence[str], questions: Sequence[VisualQuestion]) -> list[float]:
    """CIDEr-D of each answer against its references, by the package pycocoevalcap.

    "CIDEr: Consensus-based Image Description Evaluation" (2014, arXiv 1411.5726). Words are split as in
    `caption_words`, not by the Java tokenizer of the COCO tools. ModuleNotFoundError without the package.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CIDEr needs pycocoevalcap, which is not installed: pip install pycocoevalcap", name=error.name
        ) from error
    references = {
        number: [caption_words(each) for each in question.answers]
        for number, question in enumerate(questions)
    }
    candidates = {number: [caption_words(answer)] for number, answer in enumerate(answers)}
    _, values = Cider().compute_score(references, candidates)
    return [float(value) for value in values]


def caption_words(text: str) -> str:
    """Lower-case words with one space between them, without punctuation."""
    return " ".join(re.findall(r"\w+(?:['’]\w+)?", text.lower()))


SCORERS = (
    Scorer("exact", "accuracy", _per_answer(exact_match), summary="equal to an accepted answer"),
    Scorer(
        "choice",
        "accuracy",
        _per_answer(choice),
        summary="the answer begins with the right letter",
        choices=True,
    ),
    Scorer(
        "choice-likelihood",
        "accuracy",
        _per_answer(choice),
        reads="letter",
        summary="the right letter is the most likely first token",
        choices=True,
    ),
    Scorer(
        "vqa", "VQA accuracy", _per_answer(vqa_accuracy), summary="min(equal answers of annotators / 3, 1)"
    ),
    Scorer("anls", "ANLS", _per_answer(anls), summary="normalised edit similarity, threshold 0.5"),
    Scorer("cider", "CIDEr", cider, summary="CIDEr-D against all answers, needs pycocoevalcap"),
)
