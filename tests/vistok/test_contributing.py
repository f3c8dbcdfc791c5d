"""The example of a tokenizer in CONTRIBUTING passes the matrix that all tokenizers pass."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest
import tiny_tokenizers
from paths import ROOT
from tiny_tokenizers import SIDE, shared

from vistok.registry import TOKENIZERS, entries, families

pytestmark = pytest.mark.usefixtures("small_and_quick", "contributed")
NAME = "contributed"
ALIKE = "titok-vq"
"""A case with the same traits as the example: one pass, discrete codes, one number of tokens."""
OF_SIX_TOKENS = "test_fixed_length_tokenizers_refuse_another_count"
"""The one test that counts on the six tokens of the fixed-length cases; the example has four here."""


@pytest.fixture(scope="module")
def contributed():
    """Register the family of the page, and take it out again."""
    entries()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TOKENIZERS, "_families", dict(TOKENIZERS._families))
        patch.setattr(TOKENIZERS, "_entries", dict(TOKENIZERS._entries))
        section = (
            (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A tokenizer in one file", 1)[1]
        )
        exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {"__name__": NAME})
        patch.setitem(tiny_tokenizers.CASES, NAME, ("toy", {"image_size": SIDE}))
        yield


@pytest.fixture
def case():
    return NAME


@pytest.fixture
def models():
    return shared


@pytest.fixture
def model():
    return shared(NAME)


def test_the_example_is_registered_with_its_published_configuration():
    assert families()["toy"].__module__ == NAME
    assert tiny_tokenizers.create("toy-64").num_tokens == 16


def test_another_number_of_tokens_is_refused(model):
    with pytest.raises(ValueError, match="exactly 4 tokens per image; 6 was asked for"):
        model.encode(tiny_tokenizers.pictures(1), num_tokens=6)


def matrix():
    """The tests of `test_tokenizer.py` that take any case, or a list of cases in which `ALIKE` is."""
    path = Path(__file__).with_name("test_tokenizer.py")
    specification = importlib.util.spec_from_file_location("tokenizer_matrix", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name, function in vars(module).items():
        if not name.startswith("test_") or "case" not in inspect.signature(function).parameters:
            continue
        if name == OF_SIX_TOKENS:
            continue
        marks = getattr(function, "pytestmark", [])
        lists = [mark for mark in marks if mark.name == "parametrize" and "case" in mark.args[0]]
        if all(mark.args[0] == "case" and ALIKE in mark.args[1] for mark in lists):
            yield name, function, [mark for mark in marks if mark not in lists]


def without_list(function, marks):
    """The same test, whose case is the fixture's."""
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.pytestmark = marks
    return copy


MATRIX = {name: without_list(function, marks) for name, function, marks in matrix()}
globals().update(MATRIX)


def test_the_matrix_is_not_empty():
    assert len(MATRIX) > 20
