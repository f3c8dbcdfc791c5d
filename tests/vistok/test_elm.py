"""ELM's binary autoencoder: what is special about it beside the matrix of all tokenizers."""

import pytest
import torch
from tiny_tokenizers import SIDE, build

from vistok import create
from vistok.models.elm import GridBinaryQuantizer
from vistok.quantizers import BinaryQuantizer

pytestmark = pytest.mark.usefixtures("small_and_quick")


def test_images_of_other_shapes_keep_their_grid():
    model = build("elm")
    tokens = model.encode(torch.rand(2, 3, SIDE, 2 * SIDE))
    assert tokens.grid == (2, 4) and tokens.bits.shape == (2, 8, 6)
    assert model.decode(tokens).shape == (2, 3, SIDE, 2 * SIDE)


def test_a_latent_is_linear_in_the_bits():
    torch.manual_seed(0)
    quantizer = GridBinaryQuantizer(5, 3, drawn=False, code_weight=0.0)
    one, other = torch.zeros(2, 1, 5, dtype=torch.bool)
    one[0, :2] = other[0, 3:] = True
    assert torch.allclose(
        quantizer.decode(one | other), quantizer.decode(one) + quantizer.decode(other), atol=1e-6
    )


def test_layouts_differ_and_values_do_not():
    torch.manual_seed(0)
    grid, linear = GridBinaryQuantizer(5, 3, drawn=False, code_weight=1.0), BinaryQuantizer(5, 3)
    linear.proj[0].weight.data.copy_(grid.proj[0].weight.flatten(1))
    linear.proj[0].bias.data.copy_(grid.proj[0].bias)
    linear.embed.data.copy_(grid.embed.weight)
    latents = torch.randn(2, 4, 3)
    assert torch.equal(grid.encode(latents), linear.encode(latents))
    assert torch.allclose(grid(latents).latents, linear.eval()(latents).latents)


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_draws_bits_unless_deterministic(deterministic):
    model = build("elm", deterministic=deterministic).train()
    images = torch.rand(4, 3, SIDE, SIDE)
    codes = [model(images).codes for _ in range(4)]
    same = all(torch.equal(codes[0], other) for other in codes)
    assert same == deterministic
    assert torch.equal(model.eval()(images).codes, model.encode(images).bits)


@pytest.mark.parametrize("change", [{"use_tanh": True}, {"quantizer": "nearest"}, {"gen_mul": 2.0}])
def test_variants_that_were_not_published_are_refused(change):
    with pytest.raises(ValueError, match="this version has the published"):
        create("elm", **change)
