"""KARL: how many tokens an image gets, that only those are decoded, and what a checkpoint must be."""

import argparse
import copy
import dataclasses
import math

import pytest
import tiny_tokenizers
import torch
import torch.nn.functional as F
import yaml
from tiny_tokenizers import codes_of

from vistok import Tokens, create, load
from vistok.models.karl import model as karl
from vistok.models.karl.config import TARGETS, VARIANTS, KarlConfig
from vistok.registry import entries
from vistok.train.config import OptimizerConfig, TrainConfig
from vistok.train.loop import train
from vistok.train.losses import ReconstructionLossConfig

pytestmark = pytest.mark.usefixtures("small_and_quick")
SIDE, COUNT = 16, 12
NAMES = {
    "vqgan-quantized": "karl-vqgan-vq",
    "vqgan-continuous": "karl-vqgan",
    "vae-quantized": "karl-vae-vq",
    "vae-continuous": "karl-vae",
}
CASES = {case: {**tiny_tokenizers.CASES[name][1], "image_size": SIDE} for case, name in NAMES.items()}


def found(model, images, count=COUNT, target=0.05):
    return model.analyse(images, model.target_bins(target, len(images)), count, model.base.features(images))


@pytest.fixture
def models():
    """Variant → model; tests that change one take a copy."""
    return lambda case: tiny_tokenizers.shared(NAMES[case], image_size=SIDE)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case, models):
    return models(case)


@pytest.fixture
def quantized(models):
    return models("vqgan-quantized")


def pictures(count, seed=0):
    return tiny_tokenizers.pictures(count, seed, SIDE)


def places_of(model, tokens):
    return model.quantizer.split(model.quantizer.decode(codes_of(tokens)))[1]


# ---- how many tokens ---------------------------------------------------------------------------------------


def test_lengths_are_the_tokens_that_are_not_halted(model):
    images = pictures(5)
    tokens, analysis = model.encode(images), found(model, images)
    active = analysis.halt_logits.sigmoid() <= 0.75
    assert torch.equal(tokens.lengths, active.sum(1))
    assert tokens.num_tokens == tokens.lengths.max()
    assert tokens.lengths.unique().numel() > 1
    for image, length in enumerate(tokens.lengths.tolist()):
        places = places_of(model, tokens[image])[0, :length]
        assert torch.equal(places, active[image].nonzero()[:, 0])


def test_the_target_decides_what_is_kept_image_by_image(model):
    images = pictures(3)
    each = model.encode(images, target=[0.005, 0.05, 0.38])
    for image, target in enumerate([0.005, 0.05, 0.38]):
        alone = model.encode(images[image : image + 1], target=target)
        assert alone.lengths == each.lengths[image]
        length = int(alone.lengths)
        torch.testing.assert_close(codes_of(each)[image, :length], codes_of(alone)[0], rtol=1e-4, atol=1e-5)
    lengths = torch.stack([model.encode(images, target=target).lengths for target in TARGETS])
    assert (lengths != lengths[0]).any()


@pytest.mark.parametrize(
    ("target", "level"),
    [(0, 0), (0.005, 0), (0.0051, 1), (0.05, 5), (0.051, 6), (0.08, 8), (0.38, 18), (0.5, 18), (1, 18)],
)
def test_a_target_selects_the_smallest_level_not_below_it(quantized, target, level):
    assert quantized.target_bins(target, 2).tolist() == [level, level]
    assert quantized.target_bins(torch.tensor([target, 0.05], dtype=torch.float64), 2).tolist() == [level, 5]


def test_every_level_selects_itself(quantized):
    assert quantized.target_bins(TARGETS, len(TARGETS)).tolist() == list(range(len(TARGETS)))


@pytest.mark.parametrize(
    "target", [-0.01, 1.01, math.nan, math.inf, "fine", None, [0.1], [0.1, -1], [[0.1, 0.1]]]
)
def test_targets_that_are_no_errors_are_refused(quantized, target):
    with pytest.raises(ValueError, match=r"mean absolute error of 0 to 1.*2 images"):
        quantized.encode(pictures(2), target=target)


def test_without_halting_every_offered_token_is_kept(model):
    for count in (1, 5, 40):
        tokens = model.encode(pictures(2), count, halting=False)
        assert tokens.lengths.tolist() == [count, count]
        assert places_of(model, tokens)[1].tolist() == list(range(count))


def test_fewer_offered_tokens_are_never_more_kept(model):
    tokens = model.encode(pictures(3), 4)
    assert tokens.lengths.max() <= 4
    assert int(places_of(model, tokens).max()) < 4


@pytest.mark.parametrize("count", [0, -1, 41])
def test_counts_that_do_not_exist_are_refused(model, count):
    with pytest.raises(ValueError, match="1 to 40 tokens"):
        model.encode(pictures(1), count)


def test_a_picture_that_needs_no_token_decodes_all_the_same(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.halting_mlp[2].bias.fill_(100.0)
    tokens = model.encode(pictures(2))
    assert tokens.lengths.tolist() == [0, 0]
    images = model.decode(Tokens.from_bytes(tokens.to_bytes()))
    assert images.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(images[0], images[1])


# ---- only active tokens are decoded ------------------------------------------------------------------------


def masked_decode(model, images):
    """As the paper has it: all T tokens, with every pair of places blocked that has a halted one."""
    analysis = found(model, images)
    values = analysis.values
    if model.config.quantize_latent:
        values = model.quantize.decode(model.quantize.encode(values))
    side = SIDE // model.config.patch_size
    table = model.decoder_positional_embedding
    stride = model.config.max_grid_tokens // side
    position = table[:, ::stride, ::stride].flatten(1).T
    grid = (model.decoder_mask_token + position).expand(len(images), -1, -1)
    tokens = model.decoder_embed(values) + model.decoder_latent_tokens_timestep_embed[:COUNT]
    x = model.decoder.ln_pre(torch.cat([grid, tokens], 1))
    free = F.pad(analysis.active, (side**2, 0), value=True)
    allowed = (free[:, :, None] & free[:, None, :]) | torch.eye(x.shape[1], dtype=torch.bool)
    for block in model.decoder.transformer:
        attention = torch.nn.MultiheadAttention(x.shape[-1], 2, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        mask = ~allowed.repeat_interleave(2, 0)
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    return model.render(model.decoder.ffn(model.decoder.ln_post(x[:, : side**2])))


@torch.no_grad()
def test_decoding_the_active_tokens_is_masking_the_halted_ones(model):
    images = pictures(4)
    expected = masked_decode(model, images).clamp(0, 1)
    torch.testing.assert_close(model.decode(model.encode(images)), expected, rtol=1e-4, atol=1e-5)


def test_padded_batches_of_an_accelerator_decode_as_single_images_do(model):
    tokens = model.encode(pictures(4))
    latents, lengths = model.dequantize(tokens)
    with torch.enable_grad():  # which takes the masked path on a CPU as well
        masked = model.pixels(latents, lengths).detach().clamp(0, 1)
    torch.testing.assert_close(masked, model.decode(tokens), rtol=1e-4, atol=1e-5)


def rows_through(model, tokens):
    """How many rows the decoder's feed-forward layers see for these tokens."""
    seen = []
    block = model.decoder.transformer[0]
    handle = block.mlp.register_forward_hook(
        lambda module, inputs, out: seen.append(inputs[0].shape[:2].numel())
    )
    model.decode(tokens)
    handle.remove()
    return sum(seen)


def test_cost_falls_with_length(model):
    cells = (SIDE // 4) ** 2
    for count in (1, 6, 40):
        tokens = model.encode(pictures(2), count, halting=False)
        assert rows_through(model, tokens) == 2 * (cells + count)
    tokens = model.encode(pictures(4))
    assert rows_through(model, tokens) == 4 * cells + int(tokens.lengths.sum())
    wider = Tokens.cat([tokens, model.encode(pictures(1), 40, halting=False)])[
        :4
    ]  # more padding, no more cost
    assert rows_through(model, wider) == 4 * cells + int(tokens.lengths.sum())


def test_the_place_of_a_token_matters_and_its_order_does_not(quantized):
    indices = quantized.encode(pictures(1), halting=False).indices
    decoded = quantized.decode(indices)
    torch.testing.assert_close(quantized.decode(indices.flip(1)), decoded, rtol=1e-4, atol=1e-5)
    moved = indices.clone()
    moved[..., 1] += 20
    assert (quantized.decode(moved) - decoded).abs().max() > 1e-3


# ---- tokens ------------------------------------------------------------------------------------------------


def test_tokens_carry_code_and_place(models):
    tokens = models("vae-quantized").encode(pictures(2))
    assert tokens.codebook_sizes == (64, 40)
    assert tokens.bits_per_image.tolist() == [12 * n for n in tokens.lengths.tolist()]  # 6 bits and 6 bits
    continuous = models("vae-continuous").encode(pictures(2), 40, halting=False)
    assert continuous.latents.shape == (2, 40, 6 + 2)
    assert continuous.latents[0, :, -2:].tolist() == [[k // 32, k % 32] for k in range(40)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_places_survive_every_dtype(model, dtype):
    converted = copy.deepcopy(model).to(dtype)
    tokens = converted.encode(pictures(2), 40, halting=False)
    assert places_of(converted, tokens)[0].tolist() == list(range(40))
    assert converted.decode(tokens).isfinite().all()


def test_codes_and_places_that_do_not_exist_are_refused(models):
    quantized, continuous = models("vqgan-quantized"), models("vqgan-continuous")
    with pytest.raises(ValueError, match=r"index 64 is outside 0\.\.63"):
        quantized.decode(torch.tensor([[[64, 0]]]))
    with pytest.raises(ValueError, match=r"index 40 is outside 0\.\.39"):
        quantized.decode(torch.tensor([[[0, 40]]]))
    with pytest.raises(ValueError, match=r"place 40 is outside 0\.\.39"):
        continuous.decode(torch.tensor([[[0.0] * 6 + [1.0, 8.0]]]))
    with pytest.raises(ValueError, match=r"6 channels.*8: 6 values and the two digits"):
        continuous.decode(torch.zeros(1, 3, 6))
    with pytest.raises(ValueError, match=r"1 values|codebook|\(code, place"):
        quantized.decode(torch.zeros(1, 3, dtype=torch.int64))


def test_reconstruct_takes_the_target(model):
    images = pictures(2)
    expected = model.decode(model.encode(images, 8, target=0.2))
    assert torch.equal(model.reconstruct(images, 8, target=0.2), expected)


def test_the_vae_is_sampled_only_when_asked(models):
    vae, images = models("vae-continuous"), pictures(2)
    assert vae.encode(images) == vae.encode(images)
    one, same, other = (
        vae.encode(
            images, halting=False, sample_posterior=True, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert one == same
    assert not torch.equal(one.latents, other.latents)
    with pytest.raises(ValueError, match=r"sample_posterior.*VQGAN"):
        models("vqgan-continuous").encode(images, sample_posterior=True)


# ---- the base tokenizers -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_vqgan_is_drawn_from_the_soft_mixture_of_codes(quantized):
    output = torch.randn(1, 16, 16)
    weights = output.double().exp() / output.double().exp().sum(-1, keepdim=True)
    mixed = torch.einsum("bnk,kd->bdn", weights, quantized.base.quantize.embedding.weight.double())
    expected = quantized.base.decoder(mixed.float().unflatten(2, (4, 4)))
    torch.testing.assert_close(quantized.render(output), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_scale_of_the_vae_is_put_on_and_never_taken_off(models):
    base, images = models("vae-continuous").base, pictures(1)
    torch.testing.assert_close(base.features(images), 0.2325 * base.moments(images)[:, :8])
    noise = torch.randn(1, 8, 4, 4)
    mean, logvar = base.moments(images).chunk(2, 1)
    torch.testing.assert_close(base.features(images, noise), 0.2325 * (mean + (0.5 * logvar).exp() * noise))
    output = torch.randn(1, 16, 8)
    expected = base.decoder(base.post_quant_conv(output.transpose(1, 2).unflatten(2, (4, 4))))
    torch.testing.assert_close(models("vae-continuous").render(output), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_base_features_follow_the_patches_on_the_channels(quantized):
    caught = []
    handle = quantized.encoder_ln_pre.register_forward_hook(lambda *call: caught.append(call[1][0]))
    images = pictures(1)
    found(quantized, images)
    handle.remove()
    sequence, cells = caught[0][0], 16
    table = quantized.encoder_positional_embedding[:, ::2, ::2].flatten(1).T
    patches = quantized.patch_embed(images)[0].flatten(1).T
    features = quantized.base.features(images)[0].flatten(1).T
    assert torch.equal(sequence[0], quantized.rec_loss_embeddings[5])
    torch.testing.assert_close(sequence[1 : 1 + cells], torch.cat([patches, features], 1) + table)
    assert torch.equal(sequence[1 + cells :], quantized.latent_tokens[:COUNT])


# ---- checkpoints -------------------------------------------------------------------------------------------


def published(model, path, **more):
    """A checkpoint as the authors' training writes it: everything pickled, the average beside the weights."""
    state = model.state_dict()
    extra = {"gan_losses.0.discriminator.main.0.weight": torch.zeros(2)}
    worse = {key: torch.zeros_like(value) for key, value in state.items()}
    arguments = argparse.Namespace(model="karl_small", lr=1e-4, betas=(0.9, 0.95), data_path=None)
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": worse, "ema": state | extra, "optimizer": optimizer, "epoch": 3, "args": arguments}
    torch.save(content | more, path)
    return path


def test_published_files_load_by_their_averaged_weights(case, model, tmp_path):
    loaded = load(published(model, tmp_path / "karl.pth"), config={"family": "karl", "config": CASES[case]})
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_pickles_with_code_in_them_are_still_refused(quantized, tmp_path):
    path = published(quantized, tmp_path / "karl.pth", hook=print)
    with pytest.raises(ValueError, match="unpickling runs code"):
        load(path)


def test_keys_tell_the_variant(case, model):
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    told, ours = karl.Karl.recognise(shapes, None), dataclasses.asdict(model.config)
    untold = {
        "num_tokens",
        "image_size",
        "training_tokens",
        "encoder_heads",
        "decoder_heads",
    }  # nor the groups
    assert {name for name, value in told.items() if ours[name] != value} == untold
    assert set(told) >= {"encoder_width", "decoder_layers", "base_channel_mult", "max_latent_tokens"}


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.family == "karl"])
def test_published_shapes_are_recognised_as_their_own_configuration(name):
    with torch.device("meta"):
        model = create(name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert KarlConfig(**karl.Karl.recognise(shapes, None)) == model.config
    assert entries()[name].file.endswith(
        f"{model.config.base}_{'quantized' if model.config.quantize_latent else 'continuous'}_latents.pth"
    )


@pytest.mark.parametrize(
    ("held", "asked", "said"),
    [
        ("vae-quantized", "vqgan-quantized", r"on the VAE with quantized.*VQGAN with quantized.*karl-vae-vq"),
        ("vqgan-continuous", "vqgan-quantized", r"with continuous.*with quantized.*karl-vqgan-in100"),
        ("vqgan-quantized", "vae-continuous", r"VQGAN with quantized.*VAE with continuous.*karl-vqgan-vq"),
    ],
)
def test_another_variant_is_named_in_one_sentence(models, tmp_path, held, asked, said):
    models(held).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "model.safetensors", config={"family": "karl", "config": CASES[asked]})


def test_a_base_tokenizer_or_other_weights_are_no_karl(quantized, tmp_path):
    torch.save(quantized.base.state_dict(), tmp_path / "vqgan.pth")
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"VQGAN alone.*load_base"):
        load("karl-vqgan-vq", weights=tmp_path / "vqgan.pth")
    with pytest.raises(ValueError, match=r"not weights of KARL.*something"):
        load("karl-vqgan-vq", weights=tmp_path / "other.pth")


def test_a_cut_checkpoint_says_what_it_lacks(quantized, tmp_path):
    state = quantized.state_dict()
    del state["latent_tokens"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="lacks 'latent_tokens'"):
        load(tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="missing latent_tokens"):
        load(tmp_path / "cut.pth", config={"family": "karl", "config": CASES["vqgan-quantized"]})


def test_weights_on_no_hub_say_where_they_are():
    with pytest.raises(
        FileNotFoundError, match=r"karl_small_vae_quantized_latents\.pth.*https://.*weights='path"
    ):
        load("karl-vae-vq-in100")


@pytest.mark.parametrize("base", ["vqgan", "vae"])
def test_a_base_tokenizer_is_taken_from_its_own_file(models, tmp_path, base):
    trained, other = models(f"{base}-quantized"), {"vqgan": "vae", "vae": "vqgan"}[base]
    torch.save({"model": trained.base.state_dict()}, tmp_path / "base.pth")
    fresh = create("karl", **CASES[f"{base}-continuous"]).load_base(tmp_path / "base.pth")
    images = pictures(1)
    assert torch.equal(fresh.eval().base.features(images), trained.base.features(images))
    wrong = create("karl", **CASES[f"{other}-quantized"])
    with pytest.raises(ValueError, match=rf"is a {base.upper()}; this model uses a {other.upper()}"):
        wrong.load_base(tmp_path / "base.pth")
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a VQGAN nor a VAE"):
        wrong.load_base(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "vq"}, "'vqgan' or 'vae'"),
        ({"patch_size": 8}, "3 levels make cells of 4 pixels"),
        ({"image_size": 18}, "1 to 8 patches of 4"),
        ({"image_size": 36}, "1 to 8 patches of 4"),
        ({"num_tokens": 41}, "1 to max_latent_tokens 40"),
        ({"max_latent_tokens": 2000}, "at most 1024"),
        ({"training_tokens": [16, 368, 16]}, "1 to 40"),
        ({"base_norm_groups": 5}, "not a multiple of base_norm_groups 5"),
        ({"encoder_width": 8}, "exceed the 8 channels"),
        ({"model": "karl_huge"}, "karl_small"),
        ({"depth": 3}, "no configuration field depth"),
    ],
)
def test_impossible_configurations_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        create("karl", **{**CASES["vqgan-quantized"], **change})


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_original_can_be_built(name):
    with torch.device("meta"):
        model = create("karl", model=name)
    width, layers, heads = VARIANTS[name][3:]
    assert len(model.decoder.transformer) == layers
    assert model.decoder.transformer[0].attn.heads == heads
    assert model.decoder_mask_token.shape == (1, 1, width)


# ---- training ----------------------------------------------------------------------------------------------


def test_a_frozen_base_is_distilled_and_an_open_one_draws_pixels(case, model):
    pixels = model(pictures(2), num_tokens=6, target=0.05)
    assert {"estimate_reconstruction", "estimate_active", "active", "halted"} <= set(pixels.losses)
    assert pixels.images.requires_grad
    model = copy.deepcopy(model).train()
    model.base_tokenizer.requires_grad_(False)
    stage1 = model(pictures(2), num_tokens=6, target=0.05)
    own = {"nll", "code"} if case.startswith("vqgan") else {"code"}
    assert own | {f"estimate_{name}" for name in own} <= set(stage1.losses)
    assert "estimate_reconstruction" not in stage1.losses
    assert not stage1.images.requires_grad
    sum(stage1.losses.values()).backward()
    assert model.halting_mlp[0].weight.grad.any()
    assert all(parameter.grad is None for parameter in model.base_tokenizer.parameters())


def test_the_code_loss_on_the_vae_is_the_squared_error_against_its_scaled_latents(models):
    model = copy.deepcopy(models("vae-continuous")).train()
    model.base_tokenizer.requires_grad_(False)
    images, noise = pictures(2), torch.randn(2, 8, SIDE // 4, SIDE // 4)
    with torch.no_grad():
        mean, logvar = model.base.moments(images).chunk(2, 1)
        scaled = 0.2325 * (mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise)  # [B, E, h, w]
    passed = model.training_pass(images, scaled, 6, 0.05)
    analysed = model.analyse(images, model.target_bins(0.05, 2), 6, scaled)
    output = model.draw(analysed.values, torch.arange(6).expand(2, -1))
    expected = (
        sum(
            (output[b, i * (SIDE // 4) + j, c] - scaled[b, c, i, j]) ** 2
            for b in range(2)
            for c in range(8)
            for i in range(SIDE // 4)
            for j in range(SIDE // 4)
        )
        / output.numel()
    )
    torch.testing.assert_close(passed.losses["code"], expected)
    assert set(passed.losses) == {"active", "code"}
    features = model.base.features(images, noise)
    torch.testing.assert_close(features, scaled)


@pytest.mark.parametrize("needed", [5, COUNT])
def test_the_second_pass_wants_the_first_tokens_active_and_the_others_halted(quantized, needed):
    images = pictures(2)
    with torch.no_grad():
        features = quantized.base.features(images)
        passed = quantized.training_pass(images, features, COUNT, torch.tensor([0.05, 0.2]), needed)
        logits = torch.stack(
            [found(quantized, images[i : i + 1], COUNT, t).halt_logits[0] for i, t in enumerate([0.05, 0.2])]
        )
    active = -(1 - logits[:, :needed].sigmoid()).log().mean()
    torch.testing.assert_close(passed.losses["active"], active, rtol=1e-4, atol=1e-5)
    halted = F.softplus(-logits[:, needed:]).mean() if needed < COUNT else torch.tensor(0.0)
    torch.testing.assert_close(passed.losses["halted"], halted, rtol=1e-4, atol=1e-5)
    shown = torch.cat([quantized.reconstruct(images[i : i + 1], target=t) for i, t in enumerate([0.05, 0.2])])
    torch.testing.assert_close(passed.images.clamp(0, 1), shown, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(passed.error, (passed.images - images).abs().mean((1, 2, 3)))


def test_targets_that_are_reached_become_rarer():
    model = create("karl", **CASES["vqgan-quantized"])
    assert model.target_probabilities.tolist() == pytest.approx([0.2] * 5 + [0] * 14)
    model.update_targets(torch.tensor([0.5, 0.025]))
    expected = [0.2, 0.2, 0.2, 0.2 * 0.99, 0.2 * 0.99]
    assert model.target_probabilities[:5].tolist() == pytest.approx([x / sum(expected) for x in expected])
    assert "target_probabilities" not in model.state_dict()


OPTIMIZER = OptimizerConfig(learning_rate=2e-3, end_learning_rate=1e-4, warmup=0, betas=(0.9, 0.95))
RUN = TrainConfig(
    tokenizer={"name": "karl", **CASES["vae-quantized"]},
    data={"sources": [{"kind": "scenes"}]},
    steps=4,
    batch_size=4,
    precision="no",
    optimizer=OPTIMIZER,
    loss=ReconstructionLossConfig(reconstruction="l1"),
    workers=0,
    log_every=1,
    validate_every=100,
    checkpoint_every=2,
)


def run(config, output, **options):
    return train(config, output, progress=False, **options)


def test_a_run_lowers_the_error_and_its_model_encodes(tmp_path):
    config = dataclasses.replace(RUN, steps=40, batch_size=8, checkpoint_every=100)
    model = load(run(config, tmp_path))
    rows = [yaml.safe_load(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (sum(row["reconstruction"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first
    assert {"active", "halted", "estimate_reconstruction", "psnr"} <= set(rows[-1])
    assert model.encode(pictures(2)).lengths.shape == (2,)


def test_an_interrupted_run_ends_where_a_whole_one_does(tmp_path):
    images = {"kind": "scenes"}
    config = dataclasses.replace(
        RUN, data={"sources": [images]}, tokenizer={**RUN.tokenizer, "base": "vqgan"}
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(config, whole)
    run(config, halves, steps=2)
    run(config, halves)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, halves))
    for part in ("model", "ema", "buffers"):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())


# ---- images twice as wide as high --------------------------------------------------------------------------


def wide_pictures(count):
    return torch.cat([pictures(count), pictures(count, seed=1)], 3)


def test_wide_images_go_through_the_vae_and_come_back_in_their_size(models):
    model, images = models("vae-continuous"), wide_pictures(2)
    tokens = model.encode(images, target=0.05)
    decoded = model.decode(tokens, size=(SIDE, 2 * SIDE))
    assert decoded.shape == images.shape and torch.equal(model.reconstruct(images, target=0.05), decoded)
    alone = model.decode(model.encode(images[1:], target=0.05), size=(SIDE, 2 * SIDE))
    torch.testing.assert_close(decoded[1:], alone, rtol=1e-4, atol=1e-5)
    assert model.decode(tokens).shape == (2, 3, SIDE, SIDE)


def test_positions_of_a_wide_grid_are_the_nearest_of_the_table(models):
    """Row i of h takes row i * 64 / h of the table, column j of w column j * 64 / w, in both directions."""
    model = copy.deepcopy(models("vae-continuous"))
    table, rows = model.config.max_grid_tokens, SIDE // model.config.patch_size
    wide = (
        model.encode(wide_pictures(1), halting=False),
        model.draw(
            torch.ones(1, 1, model.config.vq_token_dim),
            torch.zeros(1, 1, dtype=torch.long),
            size=(SIDE, 2 * SIDE),
        ),
    )
    down = torch.arange(rows) * table // rows
    across = torch.arange(2 * rows) * table // (2 * rows)
    used = torch.zeros(table, table, dtype=torch.bool)
    used[down[:, None], across] = True
    for name in ("encoder_positional_embedding", "decoder_positional_embedding"):
        getattr(model, name).data[:, ~used] = 1e3
    again = (
        model.encode(wide_pictures(1), halting=False),
        model.draw(
            torch.ones(1, 1, model.config.vq_token_dim),
            torch.zeros(1, 1, dtype=torch.long),
            size=(SIDE, 2 * SIDE),
        ),
    )
    assert again[0] == wide[0] and torch.equal(again[1], wide[1])
    model.encoder_positional_embedding.data[:, down[0], across[1]] += 1
    assert model.encode(wide_pictures(1), halting=False) != wide[0]


def test_other_sizes_are_refused_and_the_vqgan_takes_squares_only(models):
    vae, vqgan = models("vae-continuous"), models("vqgan-quantized")
    for model, images in (
        (vqgan, wide_pictures(1)),
        (vae, wide_pictures(1).transpose(2, 3)),
        (vae, wide_pictures(1)[..., : SIDE + SIDE // 2]),
    ):
        with pytest.raises(ValueError, match=f"takes {SIDE}×{SIDE}"):
            model.encode(images)
        with pytest.raises(ValueError, match=f"takes {SIDE}×{SIDE}.*give another size"):
            model.decode(model.encode(pictures(1)), size=tuple(images.shape[2:]))
