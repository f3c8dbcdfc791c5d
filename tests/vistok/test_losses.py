"""Training losses, the discriminator and the schedules do what their papers say; no weights needed."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import VGG16_Weights

from vistok.train.discriminator import BlurPool, NLayerDiscriminator
from vistok.train.losses import (
    PerceptualLoss,
    ReconstructionLoss,
    ReconstructionLossConfig,
    autoregressive_token_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    lecam_loss,
    masked_token_loss,
    parse_perceptual_name,
    proxy_code_loss,
)
from vistok.train.schedule import (
    constant_schedule,
    cosine_schedule,
    ema_decay,
    no_weight_decay,
    wsd_schedule,
)


@pytest.fixture(scope="module")
def lpips():
    return PerceptualLoss("lpips", weights=None)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    return images, (images + 0.1 * torch.randn_like(images)).requires_grad_()


def adversarial_loss(**options):
    torch.manual_seed(1)
    return ReconstructionLoss(
        ReconstructionLossConfig(discriminator_weight=0.1, discriminator_channels=32, **options)
    )


# ---- discriminator --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (8, 8), (1, 1)])
def test_discriminator_judges_any_size_in_16x16_patches(size):
    assert NLayerDiscriminator(hidden_channels=32)(torch.rand(2, 3, *size)).shape == (2, 1, 16, 16)


def test_discriminator_has_the_published_keys():
    layers = ["block_in.0", "to_logits.0", "to_logits.2"]
    layers += [f"blocks.{stage}.{layer}" for stage in range(3) for layer in (0, 2)]
    keys = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    keys |= {f"blocks.{stage}.1.kernel" for stage in range(3)}
    state_dict = NLayerDiscriminator().state_dict()
    assert set(state_dict) == keys
    assert state_dict["to_logits.2.weight"].shape == (1, 512, 5, 5)


@pytest.mark.parametrize("options", [{"hidden_channels": 48}, {"hidden_channels": 0}, {"num_stages": 0}])
def test_discriminator_refuses_impossible_widths(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NLayerDiscriminator(**options)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_blur_keeps_a_constant_away_from_the_border(size):
    blurred = BlurPool()(torch.ones(1, 2, *size))
    assert blurred.shape[-2:] == (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    torch.testing.assert_close(blurred[..., 1:-1, 1:-1], torch.ones_like(blurred[..., 1:-1, 1:-1]))
    assert (blurred[..., 0, :] < 1).all()


# ---- adversarial ----------------------------------------------------------------------------------


def test_hinge_losses_match_hand_counted_values():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == 0.5 * (0.25 + 0.5)
    assert hinge_generator_loss(fake).item() == 1.0


def test_lecam_is_zero_while_both_sides_keep_their_distance():
    far = lecam_loss(torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0))
    near = lecam_loss(torch.tensor(1.0), torch.tensor(-2.0), torch.tensor(0.0), torch.tensor(0.0))
    assert (far.item(), near.item()) == (0.0, 5.0)


def test_discriminator_joins_at_its_start_step(pair):
    loss = adversarial_loss(discriminator_start=10)
    before, after = loss.generator_step(*pair, 9), loss.generator_step(*pair, 10)
    assert "adversarial" not in before[1]
    expected = before[0] + 0.1 * after[1]["adversarial"]
    torch.testing.assert_close(after[0], expected)
    assert [loss.uses_discriminator(step) for step in (9, 10)] == [False, True]


def test_neither_step_leaves_gradients_on_the_other_side(pair):
    images, reconstructions = pair
    loss = adversarial_loss()
    loss.generator_step(images, reconstructions, 0)[0].backward()
    assert reconstructions.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss.discriminator.parameters())
    reconstructions.grad = None
    loss.discriminator_step(images, reconstructions)[0].backward()
    assert reconstructions.grad is None
    assert all(parameter.grad is not None for parameter in loss.discriminator.parameters())


def test_lecam_means_start_at_zero_and_move_after_use(pair):
    loss = adversarial_loss(lecam_weight=1.0)
    total, parts = loss.discriminator_step(*pair)
    torch.testing.assert_close(total.detach(), parts["hinge"] + parts["lecam"])
    moved = torch.cat([loss.ema_real_logits_mean, loss.ema_fake_logits_mean])
    torch.testing.assert_close(moved, 0.001 * torch.stack([parts["real_logits"], parts["fake_logits"]]))
    expected = F.relu(parts["real_logits"]).square() + F.relu(-parts["fake_logits"]).square()
    torch.testing.assert_close(parts["lecam"], expected)


def test_training_the_discriminator_separates_the_two_sides(pair):
    loss = adversarial_loss()
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), 1e-3)
    history = []
    for _ in range(8):
        total, _ = loss.discriminator_step(*pair)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < history[0] - 0.1


# ---- perceptual -----------------------------------------------------------------------------------


def test_perceptual_names_give_networks_and_weights():
    assert parse_perceptual_name("lpips") == {"lpips": 1.0}
    assert parse_perceptual_name("convnext_s") == {"convnext_s": 1.0}
    assert parse_perceptual_name("stlpips-vgg") == {"stlpips-vgg": 1.0}
    assert parse_perceptual_name("lpips-convnext_s-1.0-0.1") == {"lpips": 1.0, "convnext_s": 0.1}


@pytest.mark.parametrize(
    "name",
    ["", "vgg", "stlpips", "lpips-0.5", "lpips-convnext_s", "lpips-convnext_s-1.0-0", "lpips-lpips-1-1"],
)
def test_other_perceptual_names_are_refused(name):
    with pytest.raises(ValueError, match=r"not understood; give 'lpips'"):
        parse_perceptual_name(name)


def test_perceptual_distance_is_zero_on_equal_images_and_reaches_only_the_images(lpips, pair):
    images, reconstructions = pair
    assert lpips(images, images).item() == 0
    lpips(images, reconstructions).backward()
    assert reconstructions.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_perceptual_loss_stays_in_evaluation_mode(lpips):
    assert not any(module.training for module in nn.ModuleList([lpips]).train()[0].modules())


def test_lpips_refuses_images_too_small_for_vgg(lpips):
    with pytest.raises(ValueError, match="8x32; LPIPS needs 16 pixels"):
        lpips(torch.rand(1, 3, 8, 32), torch.rand(1, 3, 8, 32))


def test_missing_perceptual_weights_name_file_folder_and_option(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    config = ReconstructionLossConfig(perceptual_weight=1.0)
    for weights, folder in (("hub", tmp_path / "checkpoints"), (tmp_path / "mine", tmp_path / "mine")):
        with pytest.raises(FileNotFoundError) as error:
            ReconstructionLoss(config, perceptual_weights=weights)
        for part in ("vgg16-397923af.pth", f"not in {folder}:", "perceptual_weights=", "'download'"):
            assert part in str(error.value)


def test_vgg_file_in_a_folder_reaches_every_layer_of_lpips(lpips, tmp_path):
    trunk = lpips.lpips.net.state_dict()
    published = {"features." + key.split(".", 1)[1]: value for key, value in trunk.items()}
    torch.save(published, tmp_path / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    loaded = PerceptualLoss("lpips", weights=tmp_path).lpips
    assert all(torch.equal(value, trunk[key]) for key, value in loaded.net.state_dict().items())
    assert (loaded.lin0.model[1].weight >= 0).all()  # the package's own calibration, not random


# ---- reconstruction -------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Stands for a network and keeps the batches that it gets."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, *batches):
        self.batches.append(batches)
        return sum(batch.mean() for batch in batches)


def test_networks_read_the_same_random_square_of_both_batches():
    loss = adversarial_loss(crop=8)
    loss.perceptual_loss = Recorder()
    loss.config = dataclasses.replace(loss.config, perceptual_weight=1.0)
    places = torch.arange(32 * 24.0).view(1, 1, 32, 24).expand(2, 3, -1, -1)  # each pixel is its own place
    for _ in range(40):
        parts = loss.generator_losses(places, places, 0)
    assert parts["reconstruction"] == 0
    corners = set()
    for images, reconstructions in loss.perceptual_loss.batches:
        assert torch.equal(images, reconstructions) and images.shape == (2, 3, 8, 8)
        top, left = divmod(int(images[0, 0, 0, 0]), 24)
        assert torch.equal(images, places[..., top : top + 8, left : left + 8])
        corners.add((top, left))
    assert len(corners) > 30
    loss.discriminator = Recorder()
    with pytest.raises(ValueError, match=r"crop is 8 and images are 7x24"):
        loss.discriminator_step(places[..., :7, :], places[..., :7, :])


def test_the_discriminator_reads_a_square_in_both_steps(pair):
    loss = adversarial_loss(crop=16)
    sizes = []
    loss.discriminator.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape))
    loss.generator_losses(*pair, 0)
    loss.discriminator_step(*pair)
    assert sizes == [(2, 3, 16, 16), (4, 3, 16, 16)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 64}, "crop is 64 with perceptual_weight 0.0"),
        ({"crop": 0, "perceptual_weight": 1.0}, "crop is 0 .* 1 pixel or more"),
        ({"perceptual_precision": "fp8"}, "'fp8'; give 'float32' or 'bfloat16'"),
    ],
)
def test_a_crop_or_precision_without_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionLossConfig(**options)


@pytest.mark.parametrize(("kind", "distance"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_the_plain_configuration_is_the_reconstruction_alone(kind, distance, pair):
    loss = ReconstructionLoss(ReconstructionLossConfig(reconstruction=kind))
    total, parts = loss.generator_step(*pair, 0)
    assert not loss.state_dict() and list(parts) == ["reconstruction"]
    torch.testing.assert_close(total, distance(pair[1], pair[0]))


def test_every_part_enters_the_total_with_its_weight(pair):
    config = ReconstructionLossConfig(
        reconstruction_weight=2, logvar=math.log(4), quantizer_weight=3, kl_weight=0.5
    )
    total, parts = ReconstructionLoss(config).generator_step(
        *pair, 0, quantizer_loss=torch.tensor(7.0), kl=torch.tensor(5.0)
    )
    assert (parts["quantizer"].item(), parts["kl"].item()) == (7.0, 5.0)
    torch.testing.assert_close(parts["reconstruction"], F.mse_loss(*pair).detach() / 4)
    torch.testing.assert_close(total.detach(), 2 * parts["reconstruction"] + 3 * 7 + 0.5 * 5)


def test_losses_are_computed_in_float32_under_autocast(pair):
    images, reconstructions = pair
    loss = adversarial_loss()
    plain, _ = loss.generator_step(images, reconstructions, 0)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, _ = loss.generator_step(images, reconstructions, 0)
    assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize(
    "options", [{"reconstruction": "huber"}, {"kl_weight": -1.0}, {"perceptual_weight": math.nan}]
)
def test_impossible_configurations_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        ReconstructionLossConfig(**options)


def test_mismatched_images_and_an_absent_discriminator_are_refused(pair):
    loss = ReconstructionLoss(ReconstructionLossConfig())
    with pytest.raises(ValueError, match=r"\[2, 3, 32, 32\] and reconstructions \[2, 3, 16, 32\]"):
        loss.generator_step(pair[0], pair[1][:, :, ::2], 0)
    with pytest.raises(ValueError, match="discriminator_weight is 0"):
        loss.discriminator_step(*pair)


# ---- tokens ---------------------------------------------------------------------------------------


def test_masked_loss_with_equal_weights_is_smoothed_cross_entropy():
    torch.manual_seed(0)
    logits, indices = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    loss, _ = masked_token_loss(logits, indices, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), indices.flatten(), label_smoothing=0.1)
    )


def test_masked_loss_weighs_unmasked_tokens_by_a_tenth_and_scores_only_masked_ones():
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 0] = 9.0  # right, masked
    indices, mask = torch.tensor([[0, 3]]), torch.tensor([[True, False]])
    loss, accuracy = masked_token_loss(logits, indices, mask, label_smoothing=0.0)
    right, wrong = F.cross_entropy(logits[0], indices[0], reduction="none")
    assert loss.item() == pytest.approx((right + 0.1 * wrong).item() / 1.1)
    assert accuracy.item() == 1.0


def test_masked_accuracy_without_masked_tokens_is_zero():
    _, accuracy = masked_token_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), torch.zeros(1, 2))
    assert accuracy.item() == 0


def test_autoregressive_loss_is_small_when_the_next_token_is_known():
    indices = torch.tensor([[3, 1, 2]])
    loss, accuracy = autoregressive_token_loss(50.0 * F.one_hot(indices, 4), indices)
    assert loss.item() < 1e-6 and accuracy.item() == 1


def test_proxy_codes_are_read_row_by_row():
    codes = torch.randint(16, (2, 3, 4))
    logits = 50.0 * F.one_hot(codes, 16).movedim(-1, 1)  # [2, 16, 3, 4]
    for grid in (codes, codes.flatten(1)):
        total, parts = proxy_code_loss(logits, grid, torch.tensor(2.0), quantizer_weight=0.5)
        assert parts["accuracy"].item() == 1
        assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_token_losses_refuse_shapes_that_disagree():
    logits, indices = torch.zeros(2, 5, 7), torch.zeros(2, 4).long()
    with pytest.raises(ValueError, match=r"\[2, 5, 7\] and token indices \[2, 4\]"):
        autoregressive_token_loss(logits, indices)
    with pytest.raises(ValueError, match="mask is"):
        masked_token_loss(logits[:, :4], indices, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="token indices"):
        proxy_code_loss(torch.zeros(2, 7, 2, 2), torch.zeros(2, 5).long(), torch.tensor(0.0))


# ---- schedules ------------------------------------------------------------------------------------


def test_wsd_schedule_warms_up_stays_and_falls_linearly():
    rates = [wsd_schedule(step, 1.0, 0.2, 10, 20, 100) for step in (0, 5, 10, 50, 80, 90, 95, 100)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.6, 0.4, 0.2])


def test_cosine_schedule_passes_through_its_corners():
    rates = [cosine_schedule(step, 1e-4, 1e-5, 10, 50) for step in (0, 5, 10, 30, 50)]
    assert rates == pytest.approx([0, 5e-5, 1e-4, 5.5e-5, 1e-5])


@given(st.integers(0, 500), st.integers(1, 500), st.integers(0, 999))
def test_learning_rates_stay_between_their_ends(warmup, length, step):
    step = min(step, warmup + length)
    assert 0 <= constant_schedule(step, 1e-4, warmup) <= 1e-4
    rate = cosine_schedule(step, 1e-4, 1e-5, warmup, warmup + length)
    assert (0 if step < warmup else 1e-5) <= rate <= 1e-4 * (1 + 1e-12)


def test_cosine_schedule_refuses_a_warmup_as_long_as_the_run():
    with pytest.raises(ValueError, match="larger total"):
        cosine_schedule(0, 1e-4, 1e-5, warmup=10, total=10)


@given(st.integers(0, 30_000), st.floats(0, 1))
def test_ema_decay_grows_to_its_ceiling(step, ceiling):
    assert 0 <= ema_decay(step, ceiling) <= ema_decay(step + 1, ceiling) <= ceiling


def test_ema_copies_the_first_step_and_ends_at_the_ceiling():
    assert [ema_decay(step) for step in (0, 1, 2, 10_000)] == pytest.approx([0, 0, 2 / 11, 0.999])


@pytest.mark.parametrize(
    ("name", "shape", "exempt"),
    [
        ("encoder.transformer.0.mlp.c_fc.weight", (8, 8), False),
        ("encoder.transformer.0.attn.in_proj_weight", (8, 8), False),
        ("encoder.transformer.0.mlp.c_fc.bias", (8,), True),
        ("encoder.patch_embed.weight", (8, 3, 2, 2), True),
        ("quantize.embedding.weight", (8, 8), True),
        ("latent_tokens", (8, 8), True),
        ("head.scale", (8,), True),
    ],
)
def test_weight_decay_spares_vectors_and_named_tables(name, shape, exempt):
    assert no_weight_decay(name, torch.zeros(shape)) is exempt
