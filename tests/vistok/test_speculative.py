"""Speculative decoding: rules against exhaustive enumeration, invariants of relaxation, and recorded runs."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from vistok.eval.parity.verify import verify as verify_case
from vistok.generate.speculative import (
    GSD,
    DraftTree,
    Lantern,
    neighbour_table,
    verify,
    verify_drafts,
    verify_greedy,
)

GOLDEN = Path(__file__).parents[1] / "golden"
V = 4


@pytest.mark.parametrize("name", ["trees", "lantern_small", "lantern_extend57", "gsd"])
def test_recorded_runs_are_replayed(name):
    rows = verify_case(GOLDEN / f"specdec_{name}.json")
    assert rows and all(row.passed for row in rows), [row.name for row in rows if not row.passed]


# ---- trees -------------------------------------------------------------------------------------------------


def test_a_chain_and_its_tables():
    chain = DraftTree.chain(3)
    assert chain.paths == ((0,), (0, 0), (0, 0, 0))
    assert chain.candidates.tolist() == [[0, 1, 2, 3]]
    assert torch.equal(chain.mask, torch.ones(4, 4).tril().bool())
    assert chain.draft_places.tolist() == [0, 1, 11, 21]


def test_trees_that_cannot_be_are_refused():
    for paths, message in (
        ([], "none, or one twice"),
        ([(0,), (0,)], "none, or one twice"),
        ([(0,), (1, 0)], r"\[1, 0\] has no parent"),
        ([(10,)], "a node drafts 10 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            DraftTree.of(paths)


def test_neighbours_are_the_nearest_rows():
    codebook = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    table = neighbour_table(codebook, 5)
    for row in range(40):
        order = sorted(
            (other for other in range(40) if other != row),
            key=lambda other: float((codebook[row] - codebook[other]).double().square().sum()),
        )
        assert table[row].tolist() == order[:5]
    equal = neighbour_table(torch.ones(3, 2))
    assert equal.tolist() == [[1, 2], [0, 2], [0, 1]]
    for wrong, count in ((torch.ones(1, 2), None), (torch.full((3, 2), torch.nan), None), (codebook, 40)):
        with pytest.raises(ValueError):
            neighbour_table(wrong, count)


# ---- plain acceptance --------------------------------------------------------------------------------------


def exact_law(run, drafts, weights, tries=2, grid=200):
    """The distribution [V] of the first token that a rule gives, over drafts with weights and uniforms that
    stand for `grid` equal cells each."""
    law = torch.zeros(V, dtype=torch.float64)
    cells = (np.arange(grid) + 0.5) / grid
    for draft, weight in zip(drafts, weights, strict=True):
        for uniforms in product(cells, repeat=tries):
            verdict, tokens = run(draft, uniforms)
            share = weight / grid**tries
            if verdict.length:
                law[tokens[verdict.path, 1]] += share
            else:
                law += share * verdict.result.double()
    return law


def multiples(generator, total=20):
    """A distribution of V multiples of 1 / total, none zero, so that equal cells are exact."""
    parts = np.sort(generator.choice(np.arange(1, total), V - 1, replace=False))
    return torch.tensor(np.diff([0, *parts, total]) / total, dtype=torch.float64)


def logits_of(*rows):
    return torch.stack([torch.stack([row.log().float(), torch.zeros(V)]) for row in rows])


@pytest.mark.parametrize("seed", range(2))
def test_plain_acceptance_of_certain_drafts_keeps_the_distribution(seed):
    """Drafts of a dynamic tree count as certain, whichever they are."""
    target = multiples(np.random.default_rng(seed))
    for first, second in ((0, 1), (3, 2)):
        candidates = torch.tensor([[0, first], [0, second]])

        def run(draft, uniforms, candidates=candidates):
            return verify(candidates, logits_of(target, target), uniforms), candidates

        law = exact_law(run, [None], [1.0], grid=40)
        torch.testing.assert_close(law, target, rtol=0, atol=2.5e-2)


def test_plain_acceptance_of_drawn_drafts_keeps_the_distribution():
    """A chi-square test over 20,000 draws from a chain of three, on a small vocabulary."""
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(3, V, generator=generator).softmax(-1)
    drafter = torch.randn(3, V, generator=generator).softmax(-1)
    tree, count = DraftTree.chain(2), 20_000
    logits = torch.cat([target.log(), torch.zeros(0, V)])[None]
    pairs = np.zeros((V, V))
    uniforms = torch.rand(count, 2, generator=generator)
    drafts = torch.stack([torch.multinomial(drafter[i], count, True, generator=generator) for i in (0, 1)], 1)
    for draft, own in zip(drafts, uniforms, strict=True):
        candidates = torch.cat([torch.zeros(1, dtype=torch.long), draft])[None]
        probabilities = torch.tensor([[1.0, drafter[0, draft[0]], drafter[1, draft[1]]]])
        verdict = verify(
            candidates,
            logits,
            own,
            tree=tree,
            draft_probabilities=probabilities,
            draft_distributions=[drafter[:1], drafter[1:2]],
        )
        tokens = candidates[0, 1 : 1 + verdict.length].tolist()
        tokens.append(int(torch.multinomial(verdict.result, 1, generator=generator)))
        if len(tokens) < 2:  # the second token is then drawn from the model
            tokens.append(int(torch.multinomial(target[1], 1, generator=generator)))
        pairs[tokens[0], tokens[1]] += 1
    expected = np.outer(target[0].double(), target[1].double()).ravel()
    assert chisquare(pairs.ravel(), count * expected / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(2))
def test_siblings_drawn_without_replacement_keep_the_distribution(seed):
    random = np.random.default_rng(seed)
    target, drafter = multiples(random), multiples(random)
    tree = DraftTree.of([(0,), (1,)])
    drafts = [(a, b) for a in range(V) for b in range(V) if a != b]
    weights = [float(drafter[a] * drafter[b] / (1 - drafter[a])) for a, b in drafts]

    def run(draft, uniforms):
        a, b = draft
        candidates = torch.tensor([[0, a], [0, b]])
        probabilities = torch.tensor([[1.0, float(drafter[a])], [1.0, float(drafter[b] / (1 - drafter[a]))]])
        verdict = verify(
            candidates,
            logits_of(target, target),
            uniforms,
            tree=tree,
            draft_probabilities=probabilities,
            draft_distributions=[drafter[None].float()],
        )
        return verdict, candidates

    law = exact_law(run, drafts, weights, grid=20)
    torch.testing.assert_close(law, target, rtol=0, atol=2.5e-2)


# ---- relaxed acceptance ------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 14), st.floats(0.01, 0.9), st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_moved_mass_stays_within_its_bound_and_grows_with_k_and_delta(seed, k, delta, token):
    generator = torch.Generator().manual_seed(seed)
    table = neighbour_table(torch.randn(16, 3, generator=generator))
    probabilities = torch.randn(16, generator=generator).mul(2).softmax(-1)
    mass = Lantern(table, k, delta).moved(probabilities, token) or 0.0
    assert 0 <= mass <= delta + 1e-6
    assert mass <= (Lantern(table, k + 1, delta).moved(probabilities, token) or 0.0) + 1e-7
    assert mass <= (Lantern(table, k, min(1.0, 1.1 * delta)).moved(probabilities, token) or 0.0) + 1e-7
    above = Lantern(table, k, 1 + delta).moved(probabilities, token) or 0.0
    assert above <= delta * float(probabilities[token]) + 1e-6


def test_a_relaxed_token_is_counted_and_can_be_capped():
    table = neighbour_table(torch.tensor([[0.0], [0.1], [5.0], [9.0]]))
    target = torch.tensor([0.05, 0.55, 0.2, 0.2])
    candidates = torch.tensor([[2, 0]])
    logits = torch.stack([target.log(), torch.zeros(4)])[None]
    rule = Lantern(table, 1, 0.6)
    plain = verify(candidates, logits, [0.3])
    relaxed = verify(candidates, logits, [0.3], rule=rule)
    assert (plain.length, relaxed.length, relaxed.relaxed) == (0, 1, 1)
    assert relaxed.moved == pytest.approx(0.55)
    capped = verify(candidates, logits, [0.3], rule=rule, most_relaxed=0)
    assert capped.length == 0 and torch.equal(capped.result, plain.result)
    assert verify(candidates, logits, [0.03], rule=rule).relaxed == 0
    assert verify_greedy(candidates, logits).length == 0
    greedy = verify_greedy(candidates, logits, rule=rule)
    assert (greedy.length, greedy.relaxed) == (1, 1)


# ---- Jacobi windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("certain", [True, False])
def test_a_jacobi_check_keeps_the_distribution(certain):
    """Over drafts with their weights and uniforms, one check gives the model's distribution."""
    random = np.random.default_rng(1)
    target, drafter = multiples(random), multiples(random)
    law, grid = torch.zeros(V, dtype=torch.float64), 200
    for token in range(V):
        draft = torch.nn.functional.one_hot(torch.tensor(token), V).double() if certain else drafter
        weight = 1 / V if certain else float(drafter[token])
        own = torch.zeros(V, dtype=torch.float64)
        for uniform in (np.arange(grid) + 0.5) / grid:
            verdict = verify_drafts(
                torch.stack([target, target]).log()[None].float(),
                torch.stack([draft, draft])[None].float(),
                torch.tensor([[0, token]]),
                torch.zeros(1, 2, dtype=torch.long),
                torch.tensor([[0.0, uniform]]),
                greedy=True,
            )
            if int(verdict.first_rejected) == 2:
                own[token] += 1 / grid
            else:
                own += verdict.residuals[0].double() / grid
        if certain:  # for every draft that is certain
            torch.testing.assert_close(own, target, rtol=0, atol=6e-3)
        law += weight * own
    torch.testing.assert_close(law, target, rtol=0, atol=6e-3)


def window(target, draft, tokens):
    return (
        target.log()[None],
        draft[None],
        torch.tensor([tokens]),
        torch.zeros(1, len(tokens), dtype=torch.long),
        torch.full((1, len(tokens)), 0.5),
    )


def test_equal_distributions_accept_everything_and_certain_drafts_their_probability():
    target = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    shifted = torch.cat([target[:1], target[:-1]])
    verdict = verify_drafts(*window(target, shifted, [0, 3, 1, 5, 2]))
    assert int(verdict.first_rejected) == 5
    assert verdict.tokens.tolist() == [[3, 1, 5, 2, 0]]
    certain = torch.nn.functional.one_hot(torch.tensor([0, 3, 1, 5, 2]), 6).float()
    acceptance = verify_drafts(*window(target, certain, [0, 3, 1, 5, 2])).acceptance[0, 1:]
    torch.testing.assert_close(acceptance, target[torch.arange(4), [3, 1, 5, 2]])


def test_a_group_of_one_is_the_plain_rule():
    target = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)).softmax(-1)
    draft = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)).softmax(-1)
    apart = GSD(torch.full((30, 30), 9.0).fill_diagonal_(0.0))
    plain = verify_drafts(*window(target, draft, [0, 7, 11, 20]), greedy=True)
    grouped = verify_drafts(*window(target, draft, [0, 7, 11, 20]), group=apart, greedy=True)
    assert torch.equal(plain.tokens, grouped.tokens)
    torch.testing.assert_close(plain.acceptance, grouped.acceptance)


def test_shapes_that_do_not_belong_together_are_refused():
    logits = torch.zeros(2, 3, V)
    with pytest.raises(ValueError, match=r"they are \[P, D \+ 1\]"):
        verify(torch.zeros(2, 2, dtype=torch.long), logits, [0.5])
    with pytest.raises(ValueError, match="do not begin with one token"):
        verify(torch.tensor([[0, 1, 1], [1, 1, 1]]), logits, [0.5])
    with pytest.raises(ValueError, match="give all"):
        verify(torch.zeros(2, 3, dtype=torch.long), logits, [0.5], tree=DraftTree.chain(2))
    with pytest.raises(ValueError, match="0 uniforms were given"):
        verify(torch.zeros(2, 3, dtype=torch.long), logits, [])
    with pytest.raises(ValueError, match="k is 9"):
        Lantern(torch.zeros(4, 3, dtype=torch.int), 9)
    with pytest.raises(ValueError, match="delta is 0"):
        Lantern(torch.zeros(4, 3, dtype=torch.int), 2, 0)
    with pytest.raises(ValueError, match="uniforms are"):
        verify_drafts(
            torch.zeros(1, 2, V),
            torch.zeros(1, 2, V),
            torch.zeros(1, 2).long(),
            torch.zeros(1, 2).long(),
            torch.zeros(2),
        )
