"""GigaTok: what is special about it beside the matrix of all tokenizers."""

import argparse

import pytest
import torch
from tiny_tokenizers import SIDE, build

from vistok import create, load
from vistok.models.gigatok import GigaTokConfig, depth_to_space
from vistok.quantizers import VectorQuantizer

pytestmark = pytest.mark.usefixtures("small_and_quick")


def test_queries_start_as_pools_from_coarse_to_fine():
    assert GigaTokConfig().pools == [
        (1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16),
    ]  # fmt: skip
    model = build("gigatok")
    reader, memory = model.s2to1encoder, torch.rand(1, 64, 64)
    with torch.no_grad():
        queries = reader.queries(memory, 8)
        expected = reader.global_proj(torch.stack([memory[0].mean(0), *_cells(memory[0])]))
    assert torch.allclose(queries[0, [0, 4, 5, 6, 7]], expected, atol=1e-5)


def _cells(memory):
    """Means of the quarters of an 8×8 grid of rows [64, D], row by row."""
    grid = memory.view(8, 8, -1)
    return [grid[r : r + 4, c : c + 4].reshape(16, -1).mean(0) for r in (0, 4) for c in (0, 4)]


def test_depth_to_space_takes_the_place_in_a_block_before_the_channel():
    x = torch.arange(8.0).view(1, 8, 1, 1)  # channels 0 and 1 of the four places in turn
    assert depth_to_space(x)[0, :, :, :].tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_the_training_file_loads_from_its_model_and_skips_arguments_and_optimizer(tmp_path):
    model = build("gigatok")
    path = tmp_path / "VQ.pt"
    training = {"optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model": model.state_dict(), **training}, path)
    images = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(load(path).encode(images).indices, model.encode(images).indices)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_latent_tokens": 6}, "a power of two"),
        ({"num_latent_tokens": 256}, "cells of the 8×8 grid"),
        ({"image_size": 30}, "a multiple of 4"),
        ({"distill_depth": 3}, "the decoder has 2 blocks"),
        ({"encoder_size": "huge"}, "encoder_size is 'huge'; it is small"),
        ({"decoder_ch_mult": (1, 2)}, "they are as many"),
        ({"model": {"init_args": {"adaptive_gn": False}}}, "adaptive_gn is False; this version has True"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    tiny = {"image_size": 32, "encoder_size": "tiny", "decoder_size": "tiny", "distill_depth": 1}
    tiny |= {"encoder_ch_mult": (1, 1, 2), "decoder_ch_mult": (1, 1, 2), "num_latent_tokens": 8}
    with pytest.raises(ValueError, match=message):
        create("gigatok", **(change if "model" in change else tiny | change))


def test_the_rotation_gives_the_code_and_turns_the_gradient():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, l2_norm=True, rotation=True)
    straight = VectorQuantizer(16, 4, l2_norm=True)
    straight.load_state_dict(quantizer.state_dict())
    latents = torch.randn(5, 4).requires_grad_()
    turned = quantizer(latents)
    assert torch.allclose(turned.latents, straight(latents).latents, atol=1e-5)
    codes = quantizer.decode(turned.codes).detach()
    upstream = torch.randn(5, 4)
    upstream -= (upstream * codes).sum(-1, keepdim=True) * codes  # along the sphere at the code
    unit = torch.nn.functional.normalize(latents.detach(), dim=-1).requires_grad_()
    (grad,) = torch.autograd.grad((quantizer(unit).latents * upstream).sum(), unit)
    # Turned with the latent it lies along the sphere there, as long as before.
    assert torch.allclose((grad * unit).sum(-1), torch.zeros(5), atol=1e-5)
    assert torch.allclose(grad.norm(dim=-1), upstream.norm(dim=-1), atol=1e-5)


def test_a_rotation_of_vectors_of_any_length_is_refused():
    with pytest.raises(ValueError, match="rotation needs l2_norm"):
        VectorQuantizer(16, 4, rotation=True)


def test_recent_codes_are_kept_in_a_window():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 2, usage_window=6).train()
    first = quantizer(torch.randn(4, 2)).codes
    second = quantizer(torch.randn(3, 2)).codes
    assert quantizer.codebook_used.tolist() == [*first[1:].tolist(), *second.tolist()]
    assert quantizer.recent_usage == len({*first[1:].tolist(), *second.tolist()}) / 8
