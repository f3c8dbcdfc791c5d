"""Reducers attached to stock models: the matrix that every model, reducer and way of decoding must satisfy."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import reducer_matrix as matrix
import torch
from reducer_matrix import BATCHES, DECODING
from tiny_vlms import FIXTURES, tiny_vlm

from vistok.compress import DivPrune, FastV, KeyNorm, Random, ToMe
from vistok.compress.reducer import LayerReducer

NAMES = tuple(FIXTURES)


@dataclass(kw_only=True)
class Cut(LayerReducer):
    """Cuts before layer `k` by hidden states: content decides, whatever the attention implementation."""

    k: int = 1

    rows: ClassVar = None

    def cuts(self, num_layers):
        return {self.k: 0.5}

    def score(self, tokens):
        return tokens.hidden.sum(-1)


@cache
def fixture(name, attention):
    return tiny_vlm(name, attention)


@pytest.fixture(params=[(n, a) for n in NAMES for a in ("sdpa", "eager")], ids=lambda p: "-".join(p))
def vlm(request):
    return fixture(*request.param)


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param]


@pytest.fixture(params=DECODING)
def decoding(request):
    return DECODING[request.param]


SELECTING = {"features": DivPrune(), "layer": FastV(k=1), "cache": KeyNorm()}


@pytest.mark.parametrize("stage", SELECTING)
def test_keep_everything_leaves_the_model_identical(vlm, batch, decoding, stage):
    model, _, inputs = vlm
    matrix.keeping_everything_changes_nothing(model, inputs(images=batch), SELECTING[stage], **decoding)


@pytest.mark.parametrize("stage", SELECTING)
def test_detaching_leaves_nothing_behind(vlm, batch, decoding, stage):
    model, _, inputs = vlm
    matrix.detaching_restores(model, inputs(images=batch), SELECTING[stage], 0.4, **decoding)


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_dropping_before_the_model_equals_the_shortened_prompt(vlm, batch, decoding, positions):
    model, _, inputs = vlm
    matrix.dropping_equals_the_oracle(model, inputs(images=batch), Random(), 0.5, positions, **decoding)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_cutting_inside_the_model_equals_masking(vlm, batch, decoding, k):
    model, _, inputs = vlm
    matrix.cutting_equals_masking(model, inputs(images=batch), Cut(k=k), 0.5, 3e-5, **decoding)


def test_evicting_from_the_cache_equals_masking(vlm, batch, decoding):
    model, _, inputs = vlm
    matrix.cutting_equals_masking(
        model, inputs(images=batch), KeyNorm(), 0.5, 3e-5, decoding_only=True, **decoding
    )
