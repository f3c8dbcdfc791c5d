"""Fewer multiplications give the same convolution, strip by strip, and flat pictures keep their digits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vistok.nn.cpu import winograd
from vistok.nn.cpu.winograd import ExactGroupNorm, norm_silu_conv


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layers(channels, outputs, groups=4, bias=True):
    norm, conv = nn.GroupNorm(groups, channels), nn.Conv2d(channels, outputs, 3, padding=1, bias=bias)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, conv.to(memory_format=torch.channels_last)


def expected(x, norm, conv):
    norm, conv = copy.deepcopy(norm).double(), copy.deepcopy(conv).double()
    with torch.no_grad():
        return conv(F.silu(norm(x.double())))


def close(found, exact, tolerance=3e-6):
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < tolerance * float(exact.abs().max())


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9).map(lambda half: 2 * half),
    width=st.integers(1, 9).map(lambda half: 2 * half),
    channels=st.sampled_from([4, 8, 12]),
    outputs=st.sampled_from([3, 8]),
    both=st.booleans(),
    strip=st.sampled_from([1, 300, 2**20]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    shortcut=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_in_any_strips_is_the_plain_convolution(
    batch, height, width, channels, outputs, both, strip, layout, shortcut, bias
):
    torch.manual_seed(0)
    norm, conv = layers(channels, outputs, bias=bias)
    x = (torch.randn(batch, channels, height, width) + 1).contiguous(memory_format=layout)
    given_x, residual = x.clone(), torch.randn(batch, outputs, height, width)
    exact = expected(x, norm, conv) + (residual if shortcut else 0)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(winograd, "FEWEST_PIXELS", 0)
        patch.setattr(winograd, "BOTH_AXES", 0 if both else 1000)
        patch.setattr(winograd, "STRIP", strip)
        found = norm_silu_conv(x, norm, conv, residual if shortcut else None)
    close(found, exact)
    assert torch.equal(x, given_x)


@pytest.mark.parametrize("side", [8, 64])
def test_small_and_large_images_take_their_ways_to_one_result(side):
    torch.manual_seed(0)
    norm, conv = layers(8, 6)
    x, residual = torch.randn(2, 8, side, side), torch.randn(2, 6, side, side)
    exact = expected(x, norm, conv) + residual
    with torch.no_grad():
        close(norm_silu_conv(x, norm, conv, residual), exact)


def test_images_of_odd_size_other_kernels_and_float64_are_convolved_plainly():
    torch.manual_seed(0)
    norm, conv = layers(8, 6)
    for height, dtype in ((65, torch.float32), (64, torch.float64)):
        x = torch.randn(1, 8, height, 64, dtype=dtype)
        one, other = copy.deepcopy(norm).to(dtype), copy.deepcopy(conv).to(dtype)
        with torch.no_grad():
            found = norm_silu_conv(x, one, other)
        torch.testing.assert_close(found, expected(x, norm, conv).to(dtype), rtol=1e-4, atol=1e-5)
    strided = nn.Conv2d(8, 6, 3, stride=2, padding=1)
    with torch.no_grad():
        assert norm_silu_conv(torch.randn(1, 8, 64, 64), norm, strided).shape == (1, 6, 32, 32)


def test_gradients_flow_and_nothing_is_overwritten_while_they_are_recorded():
    norm, conv = layers(8, 8)
    x, residual = torch.randn(1, 8, 64, 64, requires_grad=True), torch.randn(1, 8, 64, 64)
    kept = residual.clone()
    norm_silu_conv(x, norm, conv, residual).sum().backward()
    assert x.grad.any() and conv.weight.grad.any() and torch.equal(residual, kept)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("brightness", [0.0, 1.0, 100.0])
def test_flat_pictures_keep_their_digits(brightness, layout):
    torch.manual_seed(0)
    norm = ExactGroupNorm(4, 16, eps=1e-6)
    x = (brightness + 1e-2 * torch.randn(1, 16, 64, 64)).contiguous(memory_format=layout)
    exact = F.group_norm(x.double(), 4, eps=1e-6)
    with torch.no_grad():
        found = norm(x)
    # What float32 can say about x itself: a digit less for every digit of brightness above the variation.
    assert (found - exact).abs().max() < 4 * torch.finfo(torch.float32).eps * (4 + brightness / 1e-2)
