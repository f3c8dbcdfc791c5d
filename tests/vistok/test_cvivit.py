"""C-ViViT: what is special about it beside the matrix of all tokenizers, and what videos are in general."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_tokenizers import CASES, FRAMES, SIDE, inputs, shared
from typer.testing import CliRunner

from vistok import Tokens, create, load
from vistok.adaptive import encode_to_quality
from vistok.cli import app
from vistok.models.cvivit import CosineAttention, CViViTConfig, OffsetBias, PositionGenerator
from vistok.optimise import optimise_tokens
from vistok.quantizers import CosineQuantizer

pytestmark = pytest.mark.usefixtures("small_and_quick")
CONFIG = CASES["cvivit"][1]


@pytest.fixture
def model():
    return shared("cvivit")


def videos(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# Videos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 5, 9])
def test_videos_have_one_frame_and_any_number_of_pairs_more(model, frames):
    clips = videos(2, frames, 3, SIDE, SIDE)
    tokens = model.encode(clips)
    steps = 1 + (frames - 1) // 2
    assert (tokens.grid, tokens.num_tokens) == ((steps, 4, 4), 16 * steps)
    assert model.decode(tokens).shape == clips.shape


@pytest.mark.parametrize("frames", [0, 2, 4])
def test_another_number_of_frames_is_refused_with_those_that_are_taken(model, frames):
    message = f"videos have {frames} frames; cvivit takes one and a multiple of 2 more: 1, 3, 5, 7, … frames"
    with pytest.raises(ValueError, match=message):
        model.encode(torch.rand(1, frames, 3, SIDE, SIDE))


def test_frames_of_other_sides_keep_their_shape(model):
    clips = videos(1, 3, 3, 16, 40)
    tokens = model.encode(clips)
    assert tokens.grid == (2, 2, 5)
    assert model.decode(tokens).shape == clips.shape
    with pytest.raises(
        ValueError, match=r"videos are 20×32 pixels; cvivit takes sides that are multiples of 8"
    ):
        model.encode(torch.rand(1, 3, 3, 20, 32))


def test_images_are_refused_with_what_makes_them_videos(model):
    message = (
        r"cvivit takes videos \[B, T, 3, H, W\]; these are images \[B, 3, H, W\]: images\.unsqueeze\(1\) "
        "makes each of them a video of one frame"
    )
    with pytest.raises(ValueError, match=message):
        model.encode(torch.rand(2, 3, SIDE, SIDE))
    assert len(model.encode(torch.rand(2, 3, SIDE, SIDE).unsqueeze(1))) == 2
    message = r"takes images \[B, 3, H, W\]; these are videos \[B, T, 3, H, W\]: videos\.flatten\(0, 1\)"
    with pytest.raises(ValueError, match=message):
        shared("titok-vq").encode(torch.rand(2, 5, 3, SIDE, SIDE))


def test_the_grid_of_three_sides_survives_slicing_joining_and_files(model, tmp_path):
    tokens = model.encode(inputs("cvivit", 3))
    grid = (3, 4, 4)
    tokens.save(tmp_path / "clips.vtok")
    saved = Tokens.load(tmp_path / "clips.vtok")
    for other in (saved, Tokens.from_bytes(tokens.to_bytes()), Tokens.cat([tokens[:1], tokens[1:]])):
        assert other == tokens and other.grid == grid
    assert tokens[[2, 0]].grid == tokens[1].grid == grid
    assert tokens.bits_per_image.tolist() == [48 * 6] * 3
    assert torch.equal(model.decode(saved[1]), model.decode(tokens)[1:2])


def test_tokens_of_another_grid_are_refused(model):
    tokens = model.encode(inputs("cvivit", 1))
    flat = Tokens(indices=tokens.indices, codebook_sizes=(64,), grid=(6, 8))
    with pytest.raises(ValueError, match=r"decodes videos.*a grid of 3 sides; these have \(6, 8\)"):
        model.decode(flat)
    with pytest.raises(ValueError, match="16 tokens per step of time at 32×32 pixels; 40 is not a multiple"):
        model.decode(tokens.indices[:, :40])
    assert model.decode(tokens.indices[:, :32]).shape == (1, 3, 3, SIDE, SIDE)


def test_what_works_on_pictures_refuses_videos(model, tmp_path):
    clips = inputs("cvivit", 1)
    with pytest.raises(ValueError, match="the optimisation of tokens takes a tokenizer of images"):
        optimise_tokens(model, lambda x: x.square().mean(), clips)
    with pytest.raises(ValueError, match="does not decode from a prefix"):
        encode_to_quality(model, clips, 20.0)
    with pytest.raises(ValueError, match="does not decode from a prefix"):
        model.encode(clips, target_psnr=20.0)
    model.save_pretrained(tmp_path / "model")
    from PIL import Image

    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    model.encode(clips).save(tmp_path / "clips.vtok")
    name, picture, out = str(tmp_path / "model"), str(tmp_path / "a.png"), str(tmp_path / "out")
    for arguments in (
        ["encode", picture, "-o", str(tmp_path / "a.vtok"), "--tokenizer", name],
        ["decode", str(tmp_path / "clips.vtok"), "-o", out, "--tokenizer", name],
        ["reconstruct", picture, "--tokenizer", name, "--out", out],
        ["eval", "recon", "--tokenizer", name, "--data", str(tmp_path), "--out", out],
        ["eval", "tokens", picture, "--tokenizer", name, "--out", out],
        ["eval", "lengths", picture, "--tokenizer", name],
    ):
        result = CliRunner().invoke(app, arguments)
        message = " ".join((result.output + str(result.exception)).split())
        assert result.exit_code, arguments
        assert "tokenizes videos [B, T, 3, H, W]" in message, (arguments, message)
        assert "a tokenizer of images" in message, (arguments, message)


# Parts ------------------------------------------------------------------------------------------------------


def test_the_convolution_takes_the_row_before_in_the_order_it_is_given():
    layer = PositionGenerator(1)
    with torch.no_grad():
        layer.dsconv.weight.zero_()
        layer.dsconv.bias.zero_()
        layer.dsconv.weight[0, 0, 1, 1, 1] = 1  # one step of time before, at the same place
        x = torch.arange(2 * 3 * 4.0).view(8, 3, 1)  # sequences along time: (1 batch, 2 x 4 cells, 3 steps)
        shifted = layer(x, (1, 3, 2, 4))
    # The rows are read as if steps of time came first, 8 cells each.
    flat = x.flatten()
    assert torch.equal(shifted.flatten(), torch.cat([torch.zeros(8), flat[:-8]]))


def test_attention_normalises_what_asks_and_not_what_answers():
    torch.manual_seed(0)
    config = CViViTConfig(dim=12, heads=2, dim_head=4)
    layer, x, bias = CosineAttention(config), torch.randn(1, 5, 12), torch.randn(2, 5, 5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        normed = F.layer_norm(x, (12,), layer.norm.gamma)[0]
        query = (normed @ layer.to_q.weight.T).view(5, 2, 4)
        key, value = ((x[0] @ half.T).view(5, 2, 4) for half in layer.to_kv.weight.chunk(2))
        expected = torch.zeros(5, 2, 4)
        for row in range(5):
            for head in range(2):
                q = query[row, head] / query[row, head].norm() * layer.q_scale
                keys = key[:, head] / key[:, head].norm(dim=-1, keepdim=True) * layer.k_scale
                scores = 8 * keys @ q + bias[head, row]
                expected[row, head] = scores.softmax(0) @ value[:, head]
        expected = expected.flatten(1) @ layer.to_out.weight.T
        torch.testing.assert_close(layer(x, bias)[0], expected)


def test_the_bias_of_two_cells_follows_from_their_offset():
    torch.manual_seed(0)
    bias = OffsetBias(8, 3)
    with torch.no_grad():
        table = bias(2, 3)
        for first in range(6):
            for second in range(6):
                offset = torch.tensor([first // 3 - second // 3, first % 3 - second % 3]).float()
                x = offset.sign() * (1 + offset.abs()).log()
                for layer in bias.net:
                    x = layer(x)
                torch.testing.assert_close(table[:, first, second], x)


def test_a_patch_lists_colour_then_frame_then_row_then_column(model):
    layer, rows = model.to_patch_emb[1], []
    handle = layer.register_forward_hook(lambda *call: rows.append(call[1][0]))
    clips = torch.zeros(1, 3, 3, SIDE, SIDE)
    clips[0, 2, 1, 8 + 5, 16 + 6] = 1  # the second frame of the pair, green, in the patch (1, 2)
    with torch.no_grad():
        model.patches(clips)
    handle.remove()
    assert rows[0].nonzero().tolist() == [[0, 1 * 4 + 2, ((1 * 2 + 1) * 8 + 5) * 8 + 6]]


def test_patches_are_drawn_where_they_were_cut(model):
    model = copy.deepcopy(model)
    clips = videos(2, 5, 3, 16, 24)
    with torch.no_grad():
        first = model._ordered(_cut(clips[:, :1]), 1)
        later = torch.stack([model._ordered(_cut(clips[:, i : i + 2]), 2) for i in (1, 3)], 1)
        assert torch.equal(model._drawn(first, 1, 2, 3), clips[:, :1])
        drawn = model._drawn(later.flatten(0, 1), 2, 2, 3).unflatten(0, (2, 2)).flatten(1, 2)
    assert torch.equal(drawn, clips[:, 1:])


def _cut(clips):
    """Patches [B, N, …] of 8 pixels in the order (frame, row, column, colour), by loops."""
    return torch.stack(
        [
            clips[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(0, 1, 3, 4, 2).flatten(1)
            for row in range(2)
            for column in range(3)
        ],
        1,
    )


# Codes ------------------------------------------------------------------------------------------------------


def test_codes_are_the_directions_nearest_to_projected_latents():
    torch.manual_seed(0)
    own, latents = CosineQuantizer(16, 4, 6), torch.randn(2, 5, 6)
    codes = own.encode(latents)
    for sample in range(2):
        for token in range(5):
            projected = own.project_in(latents[sample, token])
            cosines = [F.cosine_similarity(projected, row, 0).item() for row in own.rows]
            assert codes[sample, token] == max(range(16), key=cosines.__getitem__)
    torch.testing.assert_close(own.decode(codes), own.project_out(own.rows[codes]))
    torch.testing.assert_close(own.eval()(latents).latents, own.decode(codes))


def test_training_moves_the_codebook_to_what_it_codes_and_keeps_it_on_the_sphere():
    torch.manual_seed(0)
    own, latents = CosineQuantizer(8, 4, 4).train(), torch.randn(64, 4)
    first = float(own(latents).losses["commitment"])
    for _ in range(30):
        last = float(own(latents).losses["commitment"])
    assert last < 0.8 * first
    torch.testing.assert_close(own.rows.norm(dim=-1), torch.ones(8))
    before = own.rows.clone()
    own.eval()(latents)
    assert torch.equal(own.rows, before)


def test_one_step_of_the_running_means_is_that_of_its_formula():
    torch.manual_seed(0)
    own, latents = CosineQuantizer(4, 3, 3, decay=0.8).train(), torch.randn(10, 3)
    rows, unit, codes = own.rows.clone(), own.compared(latents).detach(), own.encode(latents)
    own(latents)
    for code in range(4):
        total = 0.8 * rows[code] + 0.2 * unit[codes == code].sum(0)
        torch.testing.assert_close(own.rows[code], total / total.norm())
    counts = torch.tensor([0.2 * float((codes == code).sum()) for code in range(4)])
    torch.testing.assert_close(own._codebook.cluster_size[0], counts)


def test_the_gradient_passes_straight_to_the_latents():
    torch.manual_seed(0)
    own, latents = CosineQuantizer(8, 4, 4).eval(), torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    (grad,) = torch.autograd.grad((own(latents).latents * upstream).sum(), latents)
    (expected,) = torch.autograd.grad((own.project_out(own.compared(latents)) * upstream).sum(), latents)
    torch.testing.assert_close(grad, expected)


# Loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "cvivit.", "phenaki.cvivit."])
def test_a_bare_checkpoint_is_recognised_beside_networks_of_losses_and_generators(model, tmp_path, prefix):
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    state |= {f"{prefix}vgg.features.0.weight": torch.zeros(2), "maskgit.token_emb.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    clips = inputs("cvivit", 2)
    assert loaded.encode(clips) == model.encode(clips)
    expected = {**vars(model.config), "image_size": 128, "frames": 11, "ff_mult": loaded.config.ff_mult}
    assert vars(loaded.config) == expected


def test_the_published_configuration_is_the_originals(model):
    with torch.device("meta"):
        published = create("cvivit-echopulse")
        stated = create("cvivit", use_vgg_and_gan=False, frames=FRAMES)
    assert published.num_tokens == 1536
    assert stated.num_tokens == 768
    keys = set(published.state_dict())
    assert {"vq._codebook.initted", "enc_spatial_transformer.layers.3.1.context_norm.beta"} <= keys
    millions = sum(parameter.numel() for parameter in published.parameters()) / 1e6
    assert millions == pytest.approx(51.5, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 4}, "one and a multiple of temporal_patch_size, 2, more"),
        ({"patch_size": 7}, "must be a multiple of patch_size"),
        ({"channels": 1}, "channels is 1"),
        ({"depth": 3}, "no configuration field depth"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        create("cvivit", **{**CONFIG, **change})
