"""Reducers attached to stock models: the matrix that every model, reducer and way of decoding must
satisfy."""

import re
from functools import cache
from itertools import product

import pytest
import reducer_matrix as matrix
import torch
from layer_cut import Cut
from paths import ROOT
from reducer_matrix import BATCHES, DECODING
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, KeyNorm, Random, ToMe
from vistok.compress.registry import comparable_reducers, reducers


def the_reducer_of_contributing():
    """The class that CONTRIBUTING shows, as anyone would write it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A reducer in one file", 1)[1]
    space = {"__name__": "contributed"}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], space)
    return space["Longest"]()


# One per stage on all models, kernels, batches and ways of decoding …
STAGES = {"DivPrune": DivPrune(), "FastV": FastV(k=1), "KeyNorm": KeyNorm(), "ToMe": ToMe()}
# … cuts at other depths, and draws, on all models …
OTHERS = {"Random": Random(), "Cut2": Cut(k=2), "Cut3": Cut(k=3)}
# … and every reducer that there is on one model whose tower has a class token and tiles.
SETTINGS = {
    "dart": {"pruned_layer": 1},
    "fastv": {"k": 1},
    "lazyllm": {"prune_layers": (1, 2), "prune_ratios": (0.3, 0.3)},
    "promptdistill": {"select_layers": (0, 1), "keep_tokens": (12, 8)},
    "sparsevlm": {"pruning_loc": (1, 2), "retained_tokens": (300, 110)},
    "pyramiddrop": {"layer_list": (1, 2), "image_token_ratio_list": (0.5, 0.25)},
    "transprune": {
        "accumulating_layer_list": (1,),
        "pruning_layer_list": (1, 2),
        "image_token_ratio_list": (0.5, 0.25),
    },
}
EVERY = {name: reducers()[name](**SETTINGS.get(name, {})) for name in comparable_reducers()}
EVERY["contributed"] = the_reducer_of_contributing()


@cache
def fixture(name, attention):
    return tiny_vlm(name, attention)


def cases():
    """All of the first tier; what the quick run leaves out is marked as slow."""
    for name in FIXTURES:
        for attention, batch, decoding in product(["sdpa", "eager"], BATCHES, DECODING):
            quick = (attention, batch, decoding) == ("sdpa", "mixed", "greedy")
            for reducer in STAGES:
                marks = [] if quick else [pytest.mark.slow]
                yield pytest.param(name, attention, batch, decoding, reducer, marks=marks)


@pytest.mark.parametrize(("name", "attention", "batch", "decoding", "reducer"), list(cases()))
def test_a_reducer_of_every_stage_on_every_model(name, attention, batch, decoding, reducer):
    model, _, inputs = fixture(name, attention)
    matrix.whole(model, inputs(images=BATCHES[batch]), STAGES[reducer], **DECODING[decoding])


@pytest.mark.parametrize("reducer", OTHERS)
@pytest.mark.parametrize("name", FIXTURES)
def test_cuts_at_other_depths_and_draws_on_every_model(name, reducer):
    model, _, inputs = fixture(name, "sdpa")
    matrix.whole(model, inputs(images=BATCHES["mixed"]), OTHERS[reducer])


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reducer", EVERY)
def test_every_reducer_on_one_model(reducer, attention, decoding):
    model, _, inputs = fixture("llava_next", attention)
    matrix.whole(model, inputs(images=BATCHES["mixed"]), EVERY[reducer], **DECODING[decoding])


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3"])
def test_merging_nothing_is_bit_exact(name):
    model, _, inputs = fixture(name, "sdpa")
    inputs = inputs(images=(2, 1, 0))
    before = matrix.outputs(model, inputs)
    with compress.attach(model, ToMe(r=0)):
        during = matrix.outputs(model, inputs)
    assert torch.equal(before[0], during[0])
    assert torch.equal(before[1], during[1])
