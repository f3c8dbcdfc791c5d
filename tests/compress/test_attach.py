"""Reducers attached to stock models: the matrix that every model, reducer and way of decoding must
satisfy."""

import re
from functools import cache

import pytest
import reducer_matrix as matrix
import torch
from layer_cut import Cut
from paths import ROOT
from reducer_matrix import BATCHES, DECODING
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, KeyNorm, Random, ToMe


def the_reducer_of_contributing():
    """The class that CONTRIBUTING shows, as anyone would write it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A reducer in one file", 1)[1]
    space = {"__name__": "contributed"}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], space)
    return space["Longest"]()


REDUCERS = {
    "DivPrune": DivPrune(),
    "Random": Random(),
    "FastV": FastV(k=1),
    "Cut2": Cut(k=2),
    "Cut3": Cut(k=3),
    "KeyNorm": KeyNorm(),
    "ToMe": ToMe(),
    "contributed": the_reducer_of_contributing(),
}


@cache
def fixture(name, attention):
    return tiny_vlm(name, attention)


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FIXTURES)
def test_every_reducer_on_every_model(name, attention, batch, decoding, reducer):
    model, _, inputs = fixture(name, attention)
    matrix.whole(model, inputs(images=BATCHES[batch]), reducer, **DECODING[decoding])


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3"])
def test_merging_nothing_is_bit_exact(name):
    model, _, inputs = fixture(name, "sdpa")
    inputs = inputs(images=(2, 1, 0))
    before = matrix.outputs(model, inputs)
    with compress.attach(model, ToMe(r=0)):
        during = matrix.outputs(model, inputs)
    assert torch.equal(before[0], during[0])
    assert torch.equal(before[1], during[1])
