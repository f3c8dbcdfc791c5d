"""pFID's perturbation: near codes instead of the true ones, as often as asked, whatever the batch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CASES, codes_of, decode, lengths_of, pictures, shared, traits

from vistok.eval.metrics import perturbation
from vistok.eval.metrics.perturbation import Cell, Perturbation, grid
from vistok.models.dualtoken.config import CodesConfig
from vistok.models.dualtoken.network import DualQuantizer
from vistok.quantizers import (
    BinaryQuantizer,
    FiniteScalarQuantizer,
    GaussianQuantizer,
    LookupFreeQuantizer,
    ProductQuantizer,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
    bits_to_integers,
)
from vistok.tokens import Tokens

pytestmark = pytest.mark.usefixtures("small_and_quick")
IMAGES = [case for case in CASES if traits(case).modality == "image"]

QUANTIZERS = {
    "vector": lambda: VectorQuantizer(300, 4),
    "unit vectors": lambda: VectorQuantizer(300, 4, l2_norm=True),
    "levels": lambda: FiniteScalarQuantizer([8, 5, 5, 1, 2]),
    "levels by token": lambda: FiniteScalarQuantizer([[16, 16], [16, 16], [256, 1], [64, 4]]),
    "signs": lambda: LookupFreeQuantizer(9),
    "bits": lambda: BinaryQuantizer(9, 4),
    "product": lambda: ProductQuantizer([VectorQuantizer(300, 2), LookupFreeQuantizer(9)]),
    "residual": lambda: ResidualQuantizer([VectorQuantizer(300, 2), VectorQuantizer(256, 2)]),
    "residual of one codebook": lambda: DualQuantizer(CodesConfig(n_embed=300, embed_dim=2, depth=3)),
}


def random_tokens(quantizer, batch, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if quantizer.kind == "bits":
        return Tokens(bits=torch.rand(batch, count, len(quantizer.embed), generator=generator) > 0.5)
    columns = [torch.randint(size, (batch, count), generator=generator) for size in quantizer.codebook_sizes]
    codes = columns[0] if len(columns) == 1 else torch.stack(columns, -1)
    return Tokens(indices=codes, codebook_sizes=quantizer.codebook_sizes)


# ---- every quantizer, every tokenizer ----------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 200), (1.0, 1), (0.7, 1)])
def test_without_probability_or_neighbours_nothing_changes(name, alpha, delta):
    quantizer = QUANTIZERS[name]()
    tokens = random_tokens(quantizer, 8)
    cell = Cell(0, alpha, delta)
    perturbed = Perturbation(quantizer, [cell])(tokens, cell, range(8))
    assert perturbed.tokens == tokens
    assert perturbed.changed == 0
    assert perturbed.total == 8 * 4 * len(quantizer.codebook_sizes or [1])


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("alpha", "delta"), [(0.9, 200), (0.5, 2), (1.0, 7)])
def test_the_share_of_changed_codes_is_alpha_less_the_draws_of_the_code_itself(name, alpha, delta):
    quantizer = QUANTIZERS[name]()
    tokens = random_tokens(quantizer, 1500)
    cell = Cell(2, alpha, delta)
    perturbed = Perturbation(quantizer, [cell])(tokens, cell, range(1500))
    share = alpha * (1 - 1 / delta)
    deviation = math.sqrt(share * (1 - share) / perturbed.total)
    assert abs(perturbed.changed / perturbed.total - share) < 3 * deviation
    differs = codes_of(perturbed.tokens) != codes_of(tokens)
    assert perturbed.changed == int((differs.any(-1) if quantizer.kind == "bits" else differs).sum())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_changed_codes_come_from_the_whole_neighbourhood_and_from_nowhere_else(name):
    quantizer, delta = QUANTIZERS[name](), 5
    tokens = random_tokens(quantizer, 1)
    cell = Cell(0, 1.0, delta)
    perturbation_ = Perturbation(quantizer, [Cell(0, 1.0, 200), cell])  # a larger cell changes nothing
    found = [codes_of(perturbation_(tokens, cell, [image]).tokens)[0] for image in range(300)]
    seen = torch.stack(found).unflatten(1, (4, 1)) if found[0].ndim == 1 else torch.stack(found)
    seen = bits_to_integers(seen)[..., None] if quantizer.kind == "bits" else seen
    for token, column in itertools.product(range(4), range(seen.shape[-1])):
        assert len(seen[:, token, column].unique()) == delta


@pytest.mark.parametrize("name", QUANTIZERS)
def test_draws_depend_on_the_image_and_not_on_the_batch(name):
    quantizer = QUANTIZERS[name]()
    tokens, cell = random_tokens(quantizer, 9), Cell(3, 0.8, 150)
    together = Perturbation(quantizer, [cell])(tokens, cell, range(20, 29)).tokens
    one = Perturbation(quantizer, [cell])
    assert (
        Tokens.cat([one(tokens[row], cell, [20 + row]).tokens for row in reversed(range(9))])
        == (together[list(reversed(range(9)))])
    )
    assert one(tokens, cell, range(9)).tokens != together
    assert Perturbation(quantizer, [cell], seed=1)(tokens, cell, range(20, 29)).tokens != together
    other = Cell(4, 0.8, 150)
    assert one(tokens, other, range(20, 29)).tokens != together


@pytest.mark.parametrize("case", IMAGES)
def test_every_discrete_tokenizer_decodes_what_was_perturbed(case):
    model = shared(case)
    if model.quantizer.kind == "latents":
        with pytest.raises(ValueError, match="latents are continuous"):
            Perturbation(model.quantizer, [Cell(0, 0.9, 8)])
        return
    images = pictures(3, side=model.image_size)
    tokens, cell = model.encode(images), Cell(0, 0.9, 8)
    perturbed = Perturbation(model.quantizer, [cell])(tokens, cell, range(3))
    assert 0 < perturbed.changed < perturbed.total
    assert perturbed.tokens._signature() == tokens._signature()
    assert lengths_of(perturbed.tokens) == lengths_of(tokens)
    decoded = decode(model, case, perturbed.tokens)
    assert decoded.shape == images.shape and decoded.isfinite().all()
    if model.adaptive:  # the place of a token is not a code
        assert torch.equal(perturbed.tokens.indices[..., 1], tokens.indices[..., 1])
        assert perturbed.total == sum(lengths_of(tokens))


def test_an_ordered_tokenizer_perturbs_a_prefix():
    model = shared("mini")
    tokens, cell = model.encode(pictures(4), 4), Cell(0, 1.0, 16)
    perturbed = Perturbation(model.quantizer, [cell])(tokens, cell, range(4))
    assert perturbed.total == 16
    assert model.decode(perturbed.tokens).shape == (4, 3, 32, 32)


# ---- neighbours against plain searches ---------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(levels=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 9), data=st.data())
def test_neighbours_in_a_grid_are_the_nearest_decoded_points(levels, seed, data):
    quantizer = FiniteScalarQuantizer(levels)
    size = math.prod(levels)
    count = data.draw(st.integers(1, min(size, 60)))
    codes = torch.randint(size, (5,), generator=torch.Generator().manual_seed(seed))
    points = quantizer.decode(torch.arange(size)[:, None])[:, 0].double()  # [V, D]
    distances = torch.cdist(points[codes], points)
    found = perturbation.nearest_levels(codes, levels, count)
    assert torch.equal(found[:, 0], codes)
    assert all(len(row.unique()) == count for row in found)
    expected = distances.sort(-1).values[:, :count]
    torch.testing.assert_close(distances.gather(1, found), expected, atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 60), dim=st.integers(1, 5), distinct=st.integers(1, 60), data=st.data())
def test_neighbours_in_a_codebook_are_the_nearest_rows(size, dim, distinct, data):
    """Also where rows repeat: a code is its own first neighbour."""
    count = data.draw(st.integers(1, size))
    rows = torch.randn(size, dim, generator=torch.Generator().manual_seed(size))[
        torch.arange(size) % distinct
    ]
    found = perturbation.nearest_rows(rows, count, chunk=7)
    distances = torch.cdist(rows.double(), rows.double())
    assert torch.equal(found[:, 0], torch.arange(size))
    assert all(len(row.unique()) == count for row in found)
    expected = distances.sort(-1).values[:, :count]
    torch.testing.assert_close(distances.gather(1, found), expected, atol=1e-6, rtol=0)


@given(bits=st.integers(1, 70), data=st.data())
@settings(max_examples=30, deadline=None)
def test_neighbours_of_bits_differ_in_ever_more_of_them(bits, data):
    count = data.draw(st.integers(1, min(2**bits, 300)))
    flips = perturbation.nearest_flips(bits, count)
    flipped = flips.sum(-1)
    assert flipped[0] == 0 and (flipped.diff() >= 0).all()
    assert len(flips.unique(dim=0)) == count
    last = int(flipped[-1])
    assert all(int((flipped == each).sum()) == math.comb(bits, each) for each in range(last))


def test_a_grid_too_large_for_a_table_gives_the_same_codes(monkeypatch):
    quantizer, cell = FiniteScalarQuantizer([8, 8, 4]), Cell(0, 0.9, 100)
    tokens = random_tokens(quantizer, 16)
    tabled = Perturbation(quantizer, [cell])(tokens, cell, range(16)).tokens
    monkeypatch.setattr(perturbation, "LARGEST_TABLE", 10)
    assert Perturbation(quantizer, [cell])(tokens, cell, range(16)).tokens == tabled


# ---- the grid, and what is refused -------------------------------------------------------------------------


def test_the_default_grid_has_fifteen_numbered_cells():
    cells = grid()
    assert [cell.index for cell in cells] == list(range(15))
    assert (cells[0].alpha, cells[0].delta, cells[-1].alpha, cells[-1].delta) == (0.9, 200, 0.5, 360)


class Unknown(Quantizer):
    codebook_sizes = (4,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid([1.5]), "0 to 1"),
        (lambda: grid(deltas=[0]), "1 \\(the code itself\\) or more"),
        (lambda: grid([]), "no alpha"),
        (lambda: Perturbation(GaussianQuantizer(4), grid()), "continuous"),
        (lambda: Perturbation(Unknown(), grid()), "Unknown"),
        (lambda: Perturbation(shared("karl-vae").quantizer, grid()), "continuous"),
        (lambda: Perturbation(VectorQuantizer(64, 4), grid()), "64 or less"),
        (lambda: Perturbation(FiniteScalarQuantizer([4, 4]), grid()), "16 or less"),
        (lambda: Perturbation(BinaryQuantizer(5, 2), grid()), "32 or less"),
    ],
)
def test_what_cannot_be_perturbed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
