"""`eval speed`: what is timed gives what the straightforward implementation gives, and runs are paired."""

import json
import math

import pytest
import tiny_tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CASES

from vistok import create
from vistok.eval.speed.plain_flextok import GUIDED_STEPS
from vistok.eval.speed.plain_karl import PlainKarl
from vistok.eval.speed.tokenizers import HEADER, Speed, measure
from vistok.eval.speed.variants import Variant

FLEXTOK = {
    **CASES["flextok"][1],
    "decoder_dim": 64,
    "decoder_depth": 2,
    "num_tokens": 16,
    "levels": (8, 5, 4),
    "latent_size": 8,
}
del FLEXTOK["null_probability"]
KARL = {**tiny_tokenizers.KARL, "image_size": 16, "num_tokens": 16}
BASES = [(base, quantized) for base in ("vqgan", "vae") for quantized in (True, False)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(speed: Speed, pairs: dict[str, str | None], repeats: int):
    """Every variant by name has its baseline, as many runs as it, and what that gives."""
    assert {v.name: v.baseline and v.baseline.name for v in speed.variants} == pairs
    record = json.loads(json.dumps(speed.record()))
    assert all(len(row) == len(HEADER) for row in speed.table())
    for variant in record["variants"]:
        assert len(variant["ratio"]) == repeats
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in variant["ratio"])
        if variant["encode_seconds"]:
            assert variant["codes_equal"] == 1.0
        else:
            assert variant["largest_difference"] < 1e-4


def test_flextok_is_compared_with_the_plain_one_and_its_prefixes_with_the_whole():
    encoding = {
        "straightforward, 16 tokens": None,
        "vistok, 16 tokens": "straightforward, 16 tokens",
        "vistok, 2 tokens": "vistok, 16 tokens",
    }
    steps = f"{GUIDED_STEPS} guided steps"
    decoding = {
        "straightforward, 16 tokens, " + steps: None,
        "vistok, 16 tokens, " + steps: "straightforward, 16 tokens, " + steps,
        "straightforward, 2 tokens, " + steps: None,
        "vistok, 2 tokens, " + steps: "straightforward, 2 tokens, " + steps,
        "vistok, prefixes of 4, 16, one call per prefix": None,
        "vistok, prefixes of 4, 16, one batch": "vistok, prefixes of 4, 16, one call per prefix",
    }
    speed = measure("flextok", 2, 2, **FLEXTOK)
    check(speed, encoding | decoding, 2)
    codes = speed.variants[0].codes
    assert codes.unique().numel() > 8  # otherwise equal codes say little
    assert speed.variants[2].codes.shape == (2, 2)
    pictures = [variant.images for variant in speed.variants[3:]]
    assert all(picture.std() > 1e-3 for picture in pictures)
    assert not torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize(("base", "quantized"), BASES)
def test_karl_is_compared_with_the_plain_one_at_three_lengths(base, quantized):
    pairs = {"straightforward": None, "vistok": "straightforward"}
    for count in (16, 8, 2):
        name = f"{count} active tokens"
        pairs |= {f"straightforward, {name}": None, f"vistok, {name}": f"straightforward, {name}"}
    speed = measure("karl", 2, 1, **KARL, base=base, quantize_latent=quantized)
    check(speed, pairs, 1)
    whole, short = (speed.variants[row].images for row in (3, 7))
    assert (whole - short).abs().max() > 1e-4


@pytest.fixture(scope="module", params=BASES, ids=lambda case: f"{case[0]}-{case[1]}")
def halting(request):
    """A KARL that halts about half of the tokens, by image, and its plain twin."""
    torch.manual_seed(0)
    model = create("karl", **KARL, base=request.param[0], quantize_latent=request.param[1]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        images = torch.rand(3, 3, 16, 16)
        bins = model.target_bins(0.05, 3)
        found = model.analyse(images, bins, 16, model.base.features(images)).halt_logits
        model.halting_mlp[2].bias.add_(math.log(3) - found.quantile(0.5))
    return model, PlainKarl(model), images


def test_plain_karl_halts_and_draws_as_the_tokenizer_does(halting):
    model, plain, images = halting
    tokens = model.encode(images)
    assert tokens.lengths.min() > 0 and tokens.lengths.max() < 16
    codes = plain.encode(images)
    torch.testing.assert_close(plain.codes(tokens), codes, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(plain.decode(codes), model.decode(tokens), rtol=1e-4, atol=1e-5)


@given(shift=st.integers(1, 60))
@settings(max_examples=5, deadline=None)
def test_codes_that_differ_are_counted(shift):
    codes = torch.arange(12).view(2, 6)
    base = Variant("base", codes, encode=lambda x: x)
    same = Variant("first half", codes, encode=lambda x: x[:, :3], baseline=base)
    other = Variant("one other", codes, encode=lambda x: x + shift * (x == 4), baseline=base)
    for variant in (base, same, other):
        variant.run()
    assert (same.equal_codes, other.equal_codes) == (1.0, pytest.approx(11 / 12))


def test_a_difference_of_pictures_shows():
    base = Variant("base", torch.zeros(1, 3), decode=lambda x: x)
    other = Variant("other", torch.zeros(1, 3), decode=lambda x: x + 0.25, baseline=base)
    for variant in (base, other):
        variant.run()
    assert other.difference == 0.25
    speed = Speed("name", 10**6, 1, torch.device("cpu"), 16, [base, other], True)
    assert speed.table()[1][-3::2] == ["1", "2e-01 apart"] and "1.0 M parameters" in speed.title


def test_compiling_is_refused_where_it_is_not_timed():
    with pytest.raises(ValueError, match="--compile"):
        measure("flextok", 1, 1, compiled=True, **FLEXTOK)


def test_prefill_times_pairs_of_equal_logits_and_further_decode_steps():
    from vistok.compress import UniformGrid
    from vistok.eval.speed import prefill

    measured = prefill.run([UniformGrid()], (0.25,), repeats=2, tokens=64, steps=3)
    (one,) = measured.runs
    assert [len(each) for each in (one.full, one.short, one.attached)] == [2, 2, 2]
    assert len(one.extra_step) == 2 * 3
    assert measured.table()[0][:2] == ["UniformGrid", "0.25"]


def test_net_gain_weighs_costs_against_the_layers_that_lose_tokens():
    from vistok.compress import IMA, FastV, HiRED, KeyNorm
    from vistok.eval.speed import net_gain

    widths = net_gain.Widths(32, 48, 2, 32, 4, 2)
    reducers = {"fastv": FastV(), "hired": HiRED(), "keynorm": KeyNorm(), "deep": FastV(k=20), "ima": IMA()}
    result = net_gain.run(
        reducers, 0.25, sizes=(36, net_gain.TILED), widths=widths, repeats=1, dtype=torch.float32
    )
    assert list(result.failures) == ["deep"]  # the measured model has 8 layers
    fastv, hired, keynorm, ima = result.gains
    assert fastv.layers[36] == [36] * 2 + [9] * 30 and hired.layers[36] == [9] * 32
    assert sum(keynorm.layers[36]) == 36 * 32 and keynorm.break_even is None
    whole, short = (4 * n * 32**2 + 2 * n * n * 32 + 3 * n * 32 * 48 for n in (64 + 36, 64 + 9))
    assert hired.counted_share(36) == pytest.approx(1 - short / whole)
    assert hired.net(36) == pytest.approx(hired.saved(36) - hired.costs[0].total)
    assert any("keynorm cannot pay at 36 visual tokens" in text for text in result.warnings([36]))
    assert ima.layers[36] == [36] * 32 and ima.skipped[36] > 0 and ima.saved(36) > 0
    assert len(result.table([36])) == 4 and len(result.record()["reducers"][0]["sizes"]) == 2


@given(st.floats(1e-4, 10.0), st.floats(0, 1e-3))
@settings(max_examples=50, deadline=None)
def test_break_even_is_where_a_fixed_cost_is_saved(fixed, per_token):
    from vistok.compress.reducer import Stage
    from vistok.eval.speed.net_gain import LAYERS, SEVEN_B, Cost, LayerTime, NetGain

    layer = LayerTime(SEVEN_B, (0.0, 1e-3, 1e-3), {})
    sizes = (10, 100, 1000)
    costs = [Cost(n, n * per_token, fixed) for n in sizes]
    layers = {n: [n // 2] * LAYERS for n in sizes}
    half = NetGain("half", Stage.FEATURES, costs, layers, layer, dict.fromkeys(sizes, 0))
    per_saved = 0.5 * LAYERS * 1e-3 - per_token
    expected = max(10, math.ceil(fixed / per_saved))
    assert half.break_even in (expected, expected + 1)
