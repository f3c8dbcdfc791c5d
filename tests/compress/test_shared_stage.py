"""Several reducers at one stage act in the order given, each on what those before it left."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import reducer_matrix as matrix
import torch
from layer_cut import Cut
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import AveragePool, DivPrune, FastV, HiRED, KeyNorm, PiToMe, ToMe, UniformGrid
from vistok.compress.reducer import CacheReducer, FeatureReducer, LayerReducer, Selection


@dataclass(kw_only=True)
class Leading(FeatureReducer):
    """Keeps the first tokens."""

    def select(self, features, grid, count, scores=None):
        return torch.arange(len(features)) < count


@dataclass(kw_only=True)
class Even(FeatureReducer):
    """Keeps tokens at even places, then odd ones."""

    def select(self, features, grid, count, scores=None):
        order = torch.tensor([*range(0, len(features), 2), *range(1, len(features), 2)])
        return torch.zeros(len(features), dtype=torch.bool).index_fill(0, order[:count], True)


@dataclass(kw_only=True)
class ByPlace(LayerReducer):
    """Keeps tokens by their place among those that are left: the last ones, or the first."""

    k: int = 1
    sign: int = 1
    rows: ClassVar = None

    def cuts(self, num_layers):
        return {self.k: 0.5}

    def score(self, tokens):
        return self.sign * torch.arange(len(tokens.hidden)).float()


@dataclass(kw_only=True)
class LastKeys(CacheReducer):
    """Keeps the last entries, or the first."""

    sign: int = 1

    def score(self, layer, keys, values):
        return self.sign * torch.arange(keys.shape[1]).float()


@torch.no_grad()
def kept(model, inputs, reducers, layer=-1, cache=False, **options):
    """The tokens of the first image that reach a layer, or stay in its cache."""
    with compress.attach(model, reducers, **options) as session:
        model(**inputs)
        return session.explain(layer, cache=cache)[0].tokens.tolist()


@pytest.fixture(scope="module")
def llava():
    model, _, inputs = tiny_vlm("llava")
    return model, inputs(images=(1,))


def test_features_pass_from_one_reducer_to_the_next(llava):
    count = len(kept(*llava, Leading(), keep=1.0))
    half, quarter = count // 2, count // 4
    assert kept(*llava, [Leading(keep=0.5), Even()], keep=0.25) == list(range(0, half, 2))
    evens = list(range(0, count, 2))
    assert kept(*llava, [Even(keep=0.5), Leading()], keep=0.25) == evens[:quarter]


def test_an_earlier_reducer_goes_by_its_own_budget(llava):
    count = len(kept(*llava, Leading(), keep=1.0))
    own = [Even(keep=4), Leading(keep=2)]
    assert kept(*llava, own) == [0, 2]
    assert kept(*llava, own, keep=3) == [0, 2, 4]
    assert kept(*llava, own, keep=1.0) == list(range(count))  # everything stays as it is
    assert kept(*llava, own, keep=lambda image: 1) == [0]


def test_merged_values_and_their_sources_pass_on(llava):
    model, inputs = llava

    @dataclass(kw_only=True)
    class Both(FeatureReducer):
        """Pools to a quarter and keeps the first two of what is left."""

        def reduce(self, image, budget):
            pooled = AveragePool().reduce(image, 0.25)
            source = None if pooled.source is None else pooled.source[:2]
            return Selection(pooled.kept[:2], pooled.values[:2], source)

    with torch.no_grad(), compress.attach(model, Both(), keep=2) as session:
        expected, places = model(**inputs).logits, session.explain()[0].tokens
    with torch.no_grad(), compress.attach(model, [AveragePool(keep=0.25), Leading()], keep=2) as session:
        logits = model(**inputs).logits
        assert torch.equal(session.explain()[0].tokens, places)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["llava_next", "internvl", "qwen2_5_vl"])
def test_two_reducers_of_features_equal_the_shortened_prompt(name):
    model, _, inputs = tiny_vlm(name)
    chain = [UniformGrid(keep=0.75), DivPrune()]
    with compress.attach(model, chain, keep=0.5) as session, torch.no_grad():
        logits = model(**inputs(images=(2, 1))).logits
        rows = matrix.kept_rows(session, 2)
    keep = matrix.kept_tokens(model, inputs(images=(2, 1)), rows)
    expected = matrix.shortened_logits(model, inputs(images=(2, 1)), rows, "keep")
    assert all(0 < int(row.sum()) < len(row) for row in rows)
    assert torch.equal(logits[keep], expected[keep])


def test_cuts_before_one_layer_act_in_order(llava):
    model, inputs = llava
    count = len(kept(model, inputs, ByPlace(), layer=0))
    last_then_first = [ByPlace(k=2, keep=0.5), ByPlace(k=2, sign=-1)]
    assert kept(model, inputs, last_then_first, keep=0.25) == list(range(count // 2, count // 2 + count // 4))
    first_then_last = last_then_first[::-1]
    first_then_last = [ByPlace(k=2, sign=-1, keep=0.5), ByPlace(k=2)]
    assert kept(model, inputs, first_then_last, keep=0.25) == list(range(count // 4, count // 2))
    assert len(kept(model, inputs, first_then_last, layer=1, keep=0.25)) == count


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "reducers",
    [
        [FastV(k=1, keep=0.75), Cut(k=2)],
        [Cut(k=3), FastV(k=1, keep=0.75)],
        [FastV(k=2, keep=0.75), Cut(k=2)],
        [Cut(k=2, keep=0.75), FastV(k=2)],
    ],
    ids=["ascending", "descending", "one layer", "one layer, ranked last"],
)
def test_two_layer_reducers_equal_masking(name, reducers):
    model, _, inputs = tiny_vlm(name)
    matrix.cutting_equals_masking(model, inputs(images=(2, 1, 0)), reducers, 0.5, 3e-5)


def test_attention_is_ranked_among_the_tokens_that_are_left(llava):
    """FastV behind a cut of the same layer picks the best of what that cut left."""
    model, inputs = llava
    with torch.no_grad(), compress.attach(model, FastV(k=2), keep=0.5) as session:
        session.trace = {}
        model(**inputs)
        scores = session.trace["score.2"][0]
    count = len(scores)
    left = torch.arange(count // 2, count)
    best = left[scores[left].argsort(descending=True)[: count // 4]].sort().values
    assert kept(model, inputs, [ByPlace(k=2, keep=0.5), FastV(k=2)], keep=0.25) == best.tolist()


def test_two_evictions_act_in_order(llava):
    model, inputs = llava
    count = len(kept(model, inputs, KeyNorm(), keep=1.0))
    both = [LastKeys(keep=0.5), LastKeys(sign=-1)]
    expected = list(range(count // 2, count // 2 + count // 4))
    assert kept(model, inputs, both, cache=True, keep=0.25) == expected
    matrix.cutting_equals_masking(model, inputs, both, 0.25, 3e-5, True)


@pytest.mark.parametrize(
    "reducers",
    [["uniformgrid", DivPrune()], [FastV(k=1), Cut(k=2)], [KeyNorm(), LastKeys()]],
    ids=["features", "layers", "cache"],
)
def test_keeping_everything_is_bit_identical(llava, reducers):
    model, inputs = llava
    before, state = matrix.outputs(model, inputs), matrix.fingerprint(model)
    with compress.attach(model, reducers, keep=1.0):
        during = matrix.outputs(model, inputs)
    after = matrix.outputs(model, inputs)
    for number, name in enumerate(("logits", "tokens")):
        assert torch.equal(before[number], during[number]), f"{name} differ while attached"
        assert torch.equal(before[number], after[number]), f"{name} differ after detaching"
    assert matrix.fingerprint(model) == state


def test_reducers_that_cannot_share_are_refused_by_name(llava):
    model, _ = llava
    with pytest.raises(ValueError, match=r"HiRED reads .* must be the first reducer of features; DivPrune"):
        compress.attach(model, [DivPrune(), HiRED()], keep=0.5)
    with pytest.raises(ValueError, match="ToMe and PiToMe both merge in the blocks"):
        compress.attach(model, [ToMe(), PiToMe()], keep=0.5)
    assert kept(model, tiny_vlm("llava")[2](images=(1,)), [HiRED(keep=0.5), DivPrune()], keep=0.25)
