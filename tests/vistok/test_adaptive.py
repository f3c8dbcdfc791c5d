"""Tokens by quality: what the search for the shortest sufficient prefix promises, on any curve."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import fresh

from vistok import Tokenizer, create
from vistok.adaptive import AdaptiveTokens, encode_to_quality
from vistok.quantizers import VectorQuantizer

SIDE, COUNT = 4, 13


@dataclass(frozen=True)
class FakeConfig:
    num_tokens: int = COUNT


class Fake(Tokenizer):
    """An ordered tokenizer whose image number b, decoded from k tokens, has the PSNR `curves[b][k - 1]`.

    An image carries its number in its brightness; a decoding is off by a constant.
    """

    family, config_class, ordered = "fake", FakeConfig, True

    def __init__(self, curves, noisy=False):
        super().__init__(FakeConfig(len(curves[0])))
        self.image_size, self.num_tokens = SIDE, len(curves[0])
        self.quantizer = VectorQuantizer(len(curves) + 1, 1)
        self.quantizer.embedding.weight.data = torch.arange(len(curves) + 1.0)[:, None]
        self.curves, self.noisy, self.decoded = curves, noisy, []

    def latents(self, images):
        numbers = (images[:, 0, 0, 0] * 100).round()
        return numbers[:, None, None].expand(-1, self.num_tokens, 1)

    def decode(self, tokens, *, steps=None, guidance=None, generator=None):
        numbers = tokens.indices[:, 0]
        lengths = tokens.lengths.tolist() if tokens.lengths is not None else [tokens.num_tokens] * len(tokens)
        self.decoded.append(list(zip(numbers.tolist(), lengths, strict=True)))
        wanted = torch.tensor([self.curves[n][k - 1] for n, k in self.decoded[-1]], dtype=torch.float64)
        error = 10 ** (-wanted / 20)
        if self.noisy:
            error = error * torch.rand(len(error), generator=generator, dtype=torch.float64)
        pictures = (numbers / 100)[:, None, None, None] + error.float()[:, None, None, None]
        return pictures.expand(-1, 3, SIDE, SIDE)


def pictures(count):
    return (torch.arange(float(count)) / 100)[:, None, None, None].expand(-1, 3, SIDE, SIDE).contiguous()


def quietly(tokenizer, images, target, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode_to_quality(tokenizer, images, target, **options)


def measured(model, images, tokens):
    error = (model.decode(tokens).double() - images.double()).square().mean((1, 2, 3))
    return -10 * error.log10()


curve = st.lists(st.integers(5, 40), min_size=COUNT, max_size=COUNT)


@settings(max_examples=60, deadline=None)
@given(curves=st.lists(curve, min_size=1, max_size=4), target=st.integers(5, 41))
def test_on_any_curve_the_found_prefix_reaches_the_target_and_one_token_fewer_does_not(curves, target):
    target = target - 0.5  # between the qualities, so that rounding decides nothing
    found = quietly(Fake(curves), pictures(len(curves)), target)
    assert found.tokens.num_tokens == int(found.tokens.lengths.max())
    powers = [1, 2, 4, 8, COUNT]
    for values, length, psnr, reached in zip(
        curves, found.tokens.lengths.tolist(), found.psnr.tolist(), found.reached.tolist(), strict=True
    ):
        assert psnr == pytest.approx(values[length - 1], abs=0.01)
        assert reached == (psnr >= target)
        assert reached == any(values[k - 1] >= target for k in powers)
        if reached:
            assert length == 1 or values[length - 2] < target
            assert all(values[k - 1] < target for k in powers if k < length)
        else:
            assert values[length - 1] == max(values[k - 1] for k in powers)


@settings(max_examples=30, deadline=None)
@given(curves=st.lists(curve.map(sorted), min_size=1, max_size=4), target=st.integers(5, 41))
def test_on_a_rising_curve_it_is_the_shortest_of_all(curves, target):
    target = target - 0.5
    found = quietly(Fake(curves), pictures(len(curves)), target)
    for values, length, reached in zip(
        curves, found.tokens.lengths.tolist(), found.reached.tolist(), strict=True
    ):
        enough = [k for k, value in enumerate(values, 1) if value >= target]
        assert reached == bool(enough)
        assert not enough or length == enough[0]


@settings(max_examples=30, deadline=None)
@given(curves=st.lists(curve, min_size=1, max_size=4), target=st.integers(5, 41))
def test_batches_are_decoded_together_and_seldom(curves, target):
    model = Fake(curves)
    quietly(model, pictures(len(curves)), target - 0.5)
    assert len(model.decoded) <= 2 * math.ceil(math.log2(COUNT)) + 1
    assert all(len({number for number, _ in batch}) == len(batch) for batch in model.decoded)


@settings(max_examples=20, deadline=None)
@given(curves=st.lists(curve, min_size=2, max_size=4), target=st.integers(5, 41))
def test_an_image_does_not_see_its_neighbours(curves, target):
    images = pictures(len(curves))
    together = quietly(Fake(curves), images, target - 0.5)
    for number in range(len(curves)):
        alone = quietly(Fake(curves), images[number : number + 1], target - 0.5)
        assert torch.equal(alone.tokens.lengths, together.tokens.lengths[number : number + 1])
        assert torch.equal(alone.psnr, together.psnr[number : number + 1])


def test_encode_takes_the_target_and_decode_gives_the_quality_said():
    torch.manual_seed(0)
    model = fresh("mini", levels=[[4, [8, 8]], [4, [4, 4, 4]]])
    images = torch.nn.functional.interpolate(torch.rand(200, 3, 2, 2), 32, mode="bilinear")
    model.fit_linear_path(images)
    images = images[:6]
    full = model.encode(images)
    quality = torch.stack([measured(model, images, full.prefix(k)) for k in range(1, 9)], 1)  # [B, 8]
    target = float(quality.max(1).values.min()) - 0.5
    found = model.encode(images, target_psnr=target)
    assert isinstance(found, AdaptiveTokens)
    assert found.reached.all()
    assert (found.psnr >= target).all()
    assert found.tokens.lengths.unique().numel() > 1
    torch.testing.assert_close(measured(model, images, found.tokens), found.psnr, atol=1e-3, rtol=0)
    for row, length in enumerate(found.tokens.lengths.tolist()):
        assert torch.equal(found.tokens.indices[row, :length], full.indices[row, :length])
        assert length == 1 or quality[row, length - 2] < target


def test_an_unreachable_target_gives_the_best_and_a_warning():
    model = Fake([[10, 12, 14, 13], [10, 30, 30, 30]])
    with pytest.warns(UserWarning, match=r"1 of 2 images do not reach 20 dB with up to 4 tokens.*13\.00 dB"):
        found = model.encode(pictures(2), target_psnr=20)
    assert found.reached.tolist() == [False, True]
    assert found.tokens.lengths.tolist() == [4, 2]
    assert found.psnr.tolist() == pytest.approx([13, 30], abs=0.01)


def test_reached_everywhere_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Fake([[30] * 4]).encode(pictures(1), target_psnr=20)
    assert (found.tokens.lengths.tolist(), found.reached.tolist()) == ([1], [True])


def test_num_tokens_is_the_most_that_is_tried():
    model = Fake([list(range(10, 23))])
    found = quietly(model, pictures(1), 21.5, num_tokens=6)
    assert found.tokens.lengths.tolist() == [6]
    assert not found.reached.any()
    assert max(length for batch in model.decoded for _, length in batch) == 6


def test_a_generator_starts_every_decoding_from_the_same_noise():
    model, generator = Fake([sorted(range(10, 23)), [25] * 13], noisy=True), torch.Generator().manual_seed(3)
    state = generator.get_state()
    found = quietly(model, pictures(2), 24.0, generator=generator)
    assert torch.equal(generator.get_state(), state)
    assert all(len(batch) == 2 for batch in model.decoded)
    decoded = model.decode(found.tokens, generator=generator).double()
    error = (decoded - pictures(2).double()).square().mean((1, 2, 3))
    torch.testing.assert_close(-10 * error.log10(), found.psnr, atol=1e-3, rtol=0)


def test_an_exact_reconstruction_is_infinitely_good():
    class Exact(Fake):
        def decode(self, tokens, **options):
            return pictures(len(tokens))

    found = Exact([[1] * 4]).encode(pictures(1), target_psnr=99)
    assert found.psnr.tolist() == [math.inf]


def test_no_images_need_no_search():
    found = Fake([[1] * 4]).encode(pictures(0), target_psnr=20)
    assert (len(found.tokens), found.psnr.shape, found.reached.shape) == (0, (0,), (0,))


@pytest.mark.parametrize("target", [0, -3, math.nan, math.inf, "30", True, None])
def test_targets_that_are_no_decibels_are_refused(target):
    with pytest.raises(ValueError, match="positive number of dB"):
        encode_to_quality(Fake([[1] * 4]), pictures(1), target)


def test_tokenizers_of_fixed_length_are_refused_by_name():
    vit = {"crop_size": 32, "num_latent_tokens": 4, "finetune_decoder": False, "is_legacy": False}
    with torch.device("meta"):
        model = create("titok", **vit, vit_enc_model_size="small", vit_dec_model_size="small")
    with pytest.raises(ValueError, match=r"titok does not decode from a prefix.*vistok-mini"):
        model.encode(torch.rand(1, 3, 32, 32), target_psnr=30)


def test_bad_images_and_counts_are_refused_as_always():
    model = Fake([[1] * 4])
    with pytest.raises(ValueError, match="divide by 255"):
        model.encode(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), target_psnr=30)
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        model.encode(pictures(1), 5, target_psnr=30)
