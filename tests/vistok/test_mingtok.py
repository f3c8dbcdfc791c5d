"""MingTok: what is special about it beside the matrix of all tokenizers."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_tokenizers import CASES, pictures, shared

from vistok import create, load
from vistok.eval.speed.plain_mingtok import PlainMingTok
from vistok.models.mingtok import FlowHead, FlowHeadConfig, MingTok
from vistok.models.mingtok.network import split_tokens

pytestmark = pytest.mark.usefixtures("small_and_quick")
CONFIG = CASES["mingtok"][1]


@pytest.fixture
def model():
    return shared("mingtok")


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    head = FlowHead(FlowHeadConfig(target_channels=4, z_channels=6, depth=2, width=16, num_sampling_steps=4))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head.eval()


# Latents ----------------------------------------------------------------------------------------------------


def test_the_class_token_stands_last_and_is_not_a_token(model):
    encoder, rows = model.low_level_encoder, []
    handle = encoder.blocks[0][0].register_forward_hook(lambda *call: rows.append(call[1][0]))
    with torch.no_grad():
        raw = model.raw_latents(pictures(1))
    handle.remove()
    assert rows[0].shape[1] == raw.shape[1] == model.num_tokens + 1
    torch.testing.assert_close(rows[0][0, -1], encoder.cls_token[0, 0] + encoder.pos_embed[0, -1])
    tokens = model.encode(pictures(1))
    assert (tokens.num_tokens, tokens.grid) == (16, (4, 4))
    torch.testing.assert_close(tokens.latents, (raw[:, :-1] - 0.3) / 2.5)


def test_the_shortcut_takes_means_of_neighbouring_channels(model):
    encoder, rows = copy.deepcopy(model.low_level_encoder), []
    torch.nn.init.zeros_(encoder.out_proj.weight)
    torch.nn.init.zeros_(encoder.out_proj.bias)
    encoder.blocks[0][-1].register_forward_hook(lambda *call: rows.append(call[2]))
    with torch.no_grad():
        latents = encoder(2 * pictures(1) - 1)
    for channel in range(8):
        expected = rows[0][0, :, 8 * channel : 8 * channel + 8].mean(-1)
        torch.testing.assert_close(latents[0, :, channel], expected)


def test_latents_enter_the_features_by_repeated_channels(model):
    decoder = copy.deepcopy(model.semantic_decoder)
    torch.nn.init.zeros_(decoder.in_proj.weight)
    torch.nn.init.zeros_(decoder.in_proj.bias)
    rows = []
    decoder.blocks[0][0].register_forward_hook(lambda *call: rows.append(call[1][0]))
    latents = torch.randn(1, 3, 8)
    with torch.no_grad():
        decoder(latents)
    expected = torch.stack([latents[..., channel // 16] for channel in range(128)], -1)
    torch.testing.assert_close(rows[0], expected)


def test_a_grid_of_another_size_has_resized_positions(model):
    encoder = model.low_level_encoder
    assert encoder.positions(4, 4) is encoder.pos_embed
    with torch.no_grad():
        places = encoder.positions(6, 3)
        table = encoder.pos_embed[:, :16].mT.unflatten(2, (4, 4))
        by_size = F.interpolate(table, (6, 3), mode="bicubic").flatten(2).mT
    assert places.shape == (1, 19, 64)
    assert torch.equal(places[:, -1], encoder.pos_embed[:, -1])
    difference = (places[:, :-1] - by_size).abs()
    assert 1e-3 < difference.max() < by_size.std()  # the factors have a tenth of a cell more


def test_images_that_are_not_square_keep_their_shape(model):
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    tokens = model.encode(images)
    assert (tokens.num_tokens, tokens.grid) == (15, (3, 5))
    assert model.decode(tokens).shape == images.shape
    assert model.features(images).shape == (2, 15, 128)
    assert model(images).images.shape == images.shape
    with pytest.raises(ValueError, match="15 features do not fill a grid of 3×3"):
        model.paint(torch.zeros(1, 15, 128))


# Features ---------------------------------------------------------------------------------------------------


def test_features_read_the_latents_up_to_their_own(model):
    latents = model.encode(pictures(1)).latents
    changed = latents.clone()
    changed[:, 7] += 1
    with torch.no_grad():
        before, after = model.expand(latents), model.expand(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert bool(((before - after).abs().amax(-1)[:, 7:] > 1e-4).all())


@pytest.mark.parametrize("sizes", [(1,) * 16, (16,), (1, 5, 3, 7), (10, 6)])
def test_streamed_features_are_those_of_the_whole_sequence(model, sizes):
    latents = model.encode(pictures(2)).latents
    stream = model.stream()
    with torch.no_grad():
        features = torch.cat([stream(some) for some in latents.split(sizes, 1)], 1)
        torch.testing.assert_close(features, model.expand(latents), rtol=1e-4, atol=1e-5)
    assert len(stream) == 16


def test_a_stream_refuses_other_images_and_channels(model):
    stream = model.stream()
    with torch.no_grad():
        stream(torch.randn(2, 1, 8))
    with pytest.raises(ValueError, match=r"latents of 3 images follow those of 2"):
        stream(torch.randn(3, 1, 8))
    with pytest.raises(ValueError, match=r"\[2, 1, 9\].*\[B, n, 8\]"):
        stream(torch.randn(2, 1, 9))


def test_features_of_images_are_those_of_their_tokens(model):
    images = pictures(2)
    with torch.no_grad():
        expected = model.expand(model.encode(images).latents)
    torch.testing.assert_close(model.features(images), expected)


def test_each_token_splits_into_cells_of_the_finer_grid():
    tokens = torch.arange(2 * 3 * 4).view(1, 6, 4)  # a grid of 2×3, each 2×2 cells of one channel
    finer = split_tokens(tokens, 2, 3, 2)[0, :, 0].view(4, 6)
    for row in range(4):
        for column in range(6):
            token, place = (row // 2) * 3 + column // 2, (row % 2) * 2 + column % 2
            assert finer[row, column] == tokens[0, token, place]


def test_the_baseline_of_its_speed_gives_the_same(model):
    plain, images = PlainMingTok(model), pictures(2)
    tokens = model.encode(images)
    torch.testing.assert_close(plain.encode(images), tokens.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.decode(tokens.latents), model.decode(tokens), rtol=1e-4, atol=1e-5)


# Loading ----------------------------------------------------------------------------------------------------


def test_the_copy_inside_a_language_model_loads(tmp_path, model):
    state = {f"vision.{key}": value for key, value in model.state_dict().items()}
    state |= {"model.embed_tokens.weight": torch.zeros(3, 2), "vis_head.0.bias": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", config={"family": "mingtok", "config": CONFIG})
    assert loaded.encode(pictures(2)) == model.encode(pictures(2))


def test_a_training_checkpoint_loads_without_its_teacher(tmp_path, model):
    state = model.state_dict() | {"target_backbone.blocks.0.weight": torch.zeros(2)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "run.pt")
    config = {**CONFIG, "pretrained_checkpoint": "", "model_type": "mingtok"}
    config["pixel_decoder"] = {**config["pixel_decoder"], "norm_pix_loss": True, "ffn_layer": "swiglufused"}
    loaded = load(tmp_path / "run.pt", config=config)
    assert loaded.config == model.config
    assert loaded.encode(pictures(2)) == model.encode(pictures(2))


def test_weights_without_the_constants_of_their_latents_are_refused(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"without the constants of their latents.*scaling_factor"):
        load(tmp_path / "model.safetensors")
    stages = {key: value for key, value in CONFIG.items() if key != "mean"}
    with pytest.raises(ValueError, match="the configuration has no mean"):
        create("mingtok", **stages)


def test_weights_of_the_published_sizes_have_the_published_constants():
    with torch.device("meta"):
        published = create("mingtok-vision")
    shapes = {key: value.shape for key, value in published.state_dict().items()}
    assert len(shapes) == 738
    assert MingTok.recognise(shapes, None) == {}
    inside = {f"vision.{key}": shape for key, shape in shapes.items()} | {"lm_head.weight": torch.Size([2])}
    assert MingTok.recognise(inside, None) == {}
    assert MingTok.recognise({"encoder.weight": torch.Size([2])}, None) is None
    assert published.config.scaling_factor == pytest.approx(8.09449291)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("low_level_encoder", {"embed_dim": 96}, "a multiple of 64"),
        ("low_level_encoder", {"out_dim": 7}, "must be a multiple of out_dim"),
        ("low_level_encoder", {"ffn_layer": "gated"}, "ffn_layer is 'gated'"),
        ("semantic_decoder", {"in_dim": 4}, "it is the encoder's out_dim, 8"),
        ("semantic_decoder", {"patch_size": 4}, "it is the encoder's, 8"),
        ("pixel_decoder", {"patch_size": 3}, "it divides the encoder's, 8"),
    ],
)
def test_configurations_that_cannot_be_are_refused(stage, change, message):
    with pytest.raises(ValueError, match=message):
        create("mingtok", **{**CONFIG, stage: {**CONFIG[stage], **change}})


def test_a_plain_feedforward_is_built_where_the_configuration_has_one():
    plain = {**CONFIG, "semantic_decoder": {**CONFIG["semantic_decoder"], "ffn_layer": "mlp"}}
    keys = set(create("mingtok", **plain).state_dict())
    assert "semantic_decoder.blocks.0.0.mlp.fc1.weight" in keys
    assert "low_level_encoder.blocks.0.0.mlp.w12.weight" in keys


# The flow head ----------------------------------------------------------------------------------------------


def euler(velocity, x, times):
    for start, end in pairwise(times):
        x = x + (start - end) * velocity(x, start)
    return x


def test_samples_follow_the_velocity_from_noise(head):
    conditions, noise = torch.randn(5, 6), torch.randn(5, 4)

    def velocity(x, time):
        return head.net(x, torch.full((5,), time), conditions)

    with torch.no_grad():
        expected = euler(velocity, 0.9 * noise, [1, 0.75, 0.5, 0.25, 0])
        torch.testing.assert_close(head.sample(conditions, noise, temperature=0.9), expected)
        times = [1 - t / (t + 2 - 2 * t) for t in (0, 0.5, 1)]
        expected = euler(velocity, noise, times)
        torch.testing.assert_close(head.sample(conditions, noise, steps=2, shift=2.0), expected)
    assert head.sample(conditions[:0], noise[:0], unconditional=conditions[:0]).shape == (0, 4)


def test_guidance_mixes_the_velocities_of_all_conditions(head):
    conditions, others, images, noise = *(torch.randn(3, 6) for _ in range(3)), torch.randn(3, 4)

    def guided(x, time, with_images, renormalise=False):
        of = [head.net(x, torch.full((3,), time), rows) for rows in (conditions, others, images)]
        v = of[1] + 3 * (of[0] - of[1])
        if with_images:
            v = of[1] + 1.1 * (of[2] - of[1]) + 3 * (of[0] - of[2])
        share = of[0].norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True)
        return v * share.clamp(max=1) if renormalise else v

    times = [1, 0.75, 0.5, 0.25, 0]
    with torch.no_grad():
        one = euler(lambda x, t: guided(x, t, False), noise, times)
        torch.testing.assert_close(head.sample(conditions, noise, unconditional=others), one)
        short = euler(lambda x, t: guided(x, t, False, True), noise, times)
        sampled = head.sample(conditions, noise, unconditional=others, renormalise=True)
        torch.testing.assert_close(sampled, short)
        both = euler(lambda x, t: guided(x, t, True), noise, times)
        sampled = head.sample(conditions, noise, unconditional=others, image_conditions=images)
        torch.testing.assert_close(sampled, both)


def test_rows_do_not_see_each_other(head):
    conditions, noise = torch.randn(4, 6), torch.randn(4, 4)
    together = head.sample(conditions, noise, unconditional=-conditions)
    alone = head.sample(conditions[2:3], noise[2:3], unconditional=-conditions[2:3])
    torch.testing.assert_close(together[2:3], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"image_conditions": torch.zeros(2, 6)}, "guide only beside unconditional"),
        ({"unconditional": torch.zeros(1, 6)}, r"unconditional has shape \[1, 6\].*\[2, 6\]"),
        ({"noise": torch.zeros(2, 5)}, r"noise has shape \[2, 5\].*\[2, 4\]"),
        ({"conditions": torch.zeros(2, 5)}, r"conditions have shape \[2, 5\].*\[B, 6\]"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(head, change, message):
    arguments = {"conditions": torch.zeros(2, 6), "noise": torch.zeros(2, 4), **change}
    with pytest.raises(ValueError, match=message):
        head.sample(arguments.pop("conditions"), arguments.pop("noise"), **arguments)


def test_the_head_learns_to_draw_from_two_points():
    torch.manual_seed(0)
    head = FlowHead(FlowHeadConfig(target_channels=2, z_channels=1, depth=1, width=32))
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(300):
        side = torch.randint(2, (64, 1)) * 2.0 - 1
        loss = head.loss(torch.cat([side, -side], 1), side)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sides = torch.tensor([[1.0], [-1.0]]).repeat(8, 1)
    samples = head.sample(sides, torch.randn(16, 2))
    assert float((samples - torch.cat([sides, -sides], 1)).abs().mean()) < 0.15


def test_a_fresh_head_moves_nothing():
    head = FlowHead(FlowHeadConfig(target_channels=2, z_channels=3, depth=1, width=8))
    noise = torch.randn(2, 2)
    assert torch.equal(head.sample(torch.randn(2, 3), noise), noise)
