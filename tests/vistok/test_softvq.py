"""SoftVQ-VAE and MAETok: what is special about them beside the matrix of all tokenizers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_tokenizers import CASES, build, pictures, shared

from vistok import create, load
from vistok.models.softvq import SoftVQ, SoftVQConfig
from vistok.quantizers import SoftVectorQuantizer
from vistok.registry import entries

pytestmark = pytest.mark.usefixtures("small_and_quick")
ORIGINAL = {  # a configuration as it lies beside the published weights
    "image_size": 256,
    "base_image_size": 256,
    "codebook_size": 8192,
    "codebook_embed_dim": 32,
    "codebook_l2_norm": True,
    "codebook_show_usage": True,
    "commit_loss_beta": 0.0,
    "entropy_loss_ratio": 0.01,
    "vq_loss_ratio": 0.0,
    "tau": 0.07,
    "num_codebooks": 4,
    "enc_type": "vit",
    "dec_type": "vit",
    "encoder_model": "vit_base_patch14_dinov2.lvd142m",
    "decoder_model": "vit_large_patch14_dinov2.lvd142m",
    "num_latent_tokens": 32,
    "to_pixel": "linear",
    "enc_patch_size": 16,
    "dec_patch_size": 16,
    "use_ape": True,
    "use_rope": False,
    "repa": True,
    "vq_mean": 0.1,
    "vq_std": 0.4,
}
MAETOK = {
    **{key: value for key, value in ORIGINAL.items() if not key.startswith(("codebook_s", "tau"))},
    "decoder_model": "vit_base_patch14_dinov2_movqv2",
    "num_latent_tokens": 128,
    "dec_cls_token": False,
    "use_ape": False,
    "use_rope": True,
    "rope_mixed": True,
    "enc_token_drop": 0.4,
}


# The quantizer ----------------------------------------------------------------------------------------------


def test_a_latent_becomes_a_mixture_of_the_rows_of_its_own_codebook():
    torch.manual_seed(0)
    own = SoftVectorQuantizer(5, 3, num_codebooks=2, tau=0.5)
    latents = torch.randn(2, 4, 3)
    mixed = own.encode(latents)
    for sample in range(2):
        for token in range(4):
            rows = own.embedding[token // 2]
            cosines = torch.stack([F.cosine_similarity(latents[sample, token], row, 0) for row in rows])
            weights = (cosines / 0.5).exp() / (cosines / 0.5).exp().sum()
            expected = sum(w * row / row.norm() for w, row in zip(weights, rows, strict=True))
            torch.testing.assert_close(mixed[sample, token], expected)
    assert torch.equal(own.decode(mixed), mixed)


def test_a_low_temperature_gives_the_nearest_row_and_a_high_one_the_mean():
    torch.manual_seed(0)
    cold, warm = (SoftVectorQuantizer(8, 3, tau=tau) for tau in (1e-4, 1e4))
    latents = torch.randn(1, 6, 3)
    nearest = (F.normalize(latents, dim=-1) @ cold.embedding[0].T).argmax(-1)
    torch.testing.assert_close(cold.encode(latents), cold.embedding[0][nearest], rtol=1e-4, atol=1e-4)
    mean = warm.embedding[0].mean(0)
    torch.testing.assert_close(warm.encode(latents), mean.expand(1, 6, 3), rtol=1e-3, atol=1e-4)


def test_rows_learn_from_the_mixture_and_not_from_the_entropy():
    torch.manual_seed(0)
    own, latents = SoftVectorQuantizer(8, 3, entropy_weight=0.5), torch.randn(2, 4, 3, requires_grad=True)
    result = own(latents)
    rows, moved = torch.autograd.grad(result.losses["entropy"], [own.embedding, latents], allow_unused=True,
                                      retain_graph=True)  # fmt: skip
    assert rows is None and bool(moved.abs().sum() > 0)
    rows, moved = torch.autograd.grad(result.latents.square().sum(), [own.embedding, latents])
    assert bool(rows.abs().sum() > 0) and bool(moved.abs().sum() > 0)
    assert not SoftVectorQuantizer(8, 3)(latents).losses


def test_the_entropy_falls_where_latents_choose_different_rows_clearly():
    own = SoftVectorQuantizer(4, 4, entropy_weight=1.0)
    with torch.no_grad():
        own.embedding.copy_(torch.eye(4))
    spread, same = torch.eye(4)[None], torch.eye(4)[:1].expand(1, 4, 4)
    between = torch.full((1, 4, 4), 0.5)
    losses = [float(own(x).losses["entropy"].detach()) for x in (spread, same, between)]
    assert losses[0] == pytest.approx(-math.log(4), abs=1e-3)  # all rows alike, each certain
    assert losses[1] == pytest.approx(0, abs=1e-3) and losses[2] == pytest.approx(0, abs=1e-3)


def test_latents_that_cannot_be_shared_out_are_refused():
    own = SoftVectorQuantizer(8, 3, num_codebooks=2)
    with pytest.raises(ValueError, match="5 latents per image were given; they share 2 codebooks"):
        own.encode(torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="latents have 4 channels; this tokenizer has 3"):
        own.encode(torch.zeros(1, 4, 4))


# Networks ---------------------------------------------------------------------------------------------------


def timm_model(vit):
    """timm's vision transformer in DINOv2's layout with the weights of a tiny one for images of 32 pixels."""
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, init_values=1e-5, num_classes=0
    )
    missing, unexpected = model.load_state_dict(vit.state_dict(), strict=False)
    assert not unexpected and all(key.startswith("patch_embed.") for key in missing)
    return model.eval()


def test_both_networks_are_timms_with_latent_tokens_at_the_end():
    model, images = shared("softvq"), 2 * pictures(2) - 1
    encoder, decoder = model.encoder, model.decoder
    oracle = timm_model(encoder.model)
    with torch.no_grad():
        x = oracle._pos_embed(oracle.patch_embed(images))
        x = torch.cat([x, (encoder.latent_tokens + encoder.latent_pos_embed).expand(2, -1, -1)], 1)
        x = oracle.norm(oracle.blocks(oracle.norm_pre(x)))[:, -6:]
        torch.testing.assert_close(encoder(images), x, rtol=1e-4, atol=1e-4)
        latents, oracle = torch.randn(2, 6, 64), timm_model(decoder.model)
        x = oracle._pos_embed(decoder.mask_token.expand(2, 16, -1))
        x = oracle.norm(oracle.blocks(torch.cat([x, latents + decoder.latent_pos_embed], 1)))[:, 1:17]
        patches = decoder.to_pixel.model(x).view(2, 4, 4, 8, 8, 3)  # rows, columns, row, column, colour
        expected = torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 3, 32, 32)
        torch.testing.assert_close(decoder(latents, latents), expected, rtol=1e-4, atol=1e-4)


def test_rotations_depend_on_the_offset_of_two_patches_alone():
    model = shared("maetok")
    attend = model.encoder.attends(4, 1)[0]
    rows = torch.randn(1, 2, 1, 32).expand(-1, -1, 18, -1)  # the same query and key everywhere
    scores = {}
    for row in range(1, 17):
        # The value of a row is its own one-hot, so that the result is the weights.
        weights = attend(rows, rows, torch.eye(18).expand(1, 2, 18, 18))[0, :, row].log()
        for column in range(1, 17):
            a, b = divmod(row - 1, 4), divmod(column - 1, 4)
            offset = (a[0] - b[0], a[1] - b[1])
            score = weights[:, column] - weights[:, row]  # against itself, where nothing is turned
            scores.setdefault(offset, []).append(score)
    for values in scores.values():
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-3, atol=1e-4)
    assert (scores[0, 1][0] - scores[1, 0][0]).abs().max() > 1e-3


def test_turned_pairs_are_multiplied_as_complex_numbers():
    model = shared("maetok")
    encoder, x = model.encoder, torch.randn(1, 2, 17, 32)
    freqs = encoder.freqs.detach().unflatten(-1, (2, 16))[:, 1]  # of the second layer: [2, h, d / 2]
    turned = []
    attention = F.scaled_dot_product_attention

    def record(query, key, value):
        turned.append(query)
        return attention(query, key, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        encoder.attends(4, 1)[1](x, x, x)
    for cell in range(16):
        angle = (cell % 4) * freqs[0] + (cell // 4) * freqs[1]
        pairs = torch.view_as_complex(x[0, :, 1 + cell].unflatten(-1, (-1, 2)).contiguous())
        expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        torch.testing.assert_close(turned[0][0, :, 1 + cell], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(turned[0][:, :, 0], x[:, :, 0])  # the class token


def test_latents_modulate_their_own_rows_of_the_decoder_alone():
    block = copy.deepcopy(shared("maetok").decoder.model.blocks[0])
    torch.nn.init.zeros_(block.attn.proj.weight)  # without attention no row sees another
    torch.nn.init.zeros_(block.attn.proj.bias)
    x, latents = torch.randn(1, 9, 64), torch.randn(1, 6, 4)
    with torch.no_grad():
        result = block(x, latents, F.scaled_dot_product_attention)
        other = block(x, latents + 1, F.scaled_dot_product_attention)
        shift, scale = block.adaLN_modulation(latents).chunk(4, -1)[2:]
        normed = F.layer_norm(x, (64,), eps=1e-6)
        expected = x[:, 3:] + block.mlp(normed[:, 3:] * scale + shift)
    assert torch.equal(result[:, :3], other[:, :3])
    torch.testing.assert_close(result[:, 3:], expected)


def test_training_hides_as_many_patches_of_every_image_as_its_range_has():
    encoder = build("maetok").encoder
    torch.manual_seed(0)
    counts = set()
    for _ in range(60):
        hidden = encoder.hidden(3, 100)
        assert len(set(hidden.sum(1).tolist())) == 1
        counts.add(int(hidden[0].sum()))
    assert len({tuple(row) for row in hidden.tolist()}) == 3
    assert 40 <= min(counts) < 46 and 56 < max(counts) <= 61
    images = 2 * pictures(1) - 1
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images), encoder.eval()(images))
        assert not torch.equal(encoder.train()(images), encoder.train()(images))


def test_tokens_are_normalised_only_for_generators():
    model = build("softvq", vq_mean=0.5, vq_std=2.0)
    latents = model.encode(pictures(1)).latents
    torch.testing.assert_close(model.normalised(latents), (latents - 0.5) / 2)
    torch.testing.assert_close(model.denormalised(model.normalised(latents)), latents)


# Loading ----------------------------------------------------------------------------------------------------


def published(case, folder):
    """The weights of a case as the originals write them, with parts of their training."""
    model = shared(case)
    state = dict(model.state_dict())
    width = model.encoder.latent_tokens.shape[2]
    state |= {"repa_model.blocks.0.attn.qkv.weight": torch.zeros(2), "projection.0.weight": torch.zeros(2)}
    state |= {"decoder.model.patch_embed.proj.weight": torch.zeros(2)}
    if case == "softvq":
        state["quantize.codebook_used"] = torch.zeros(2, 65_536)
    else:
        state |= {"decoder.model.pos_embed": torch.zeros(1, 17, width)}
        state |= {"decoder.model.norm.adaLN_modulation.1.weight": torch.zeros(2 * width, 4)}
        state |= {"encoder.freqs_t_x": torch.zeros(16), "decoder.freqs_t_x": torch.zeros(16)}
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("case", ["softvq", "maetok"])
def test_published_weights_load_without_parts_of_their_training(case, tmp_path):
    config = {"family": "softvq", "config": CASES[case][1]}
    loaded = load(published(case, tmp_path), config=config)
    assert loaded.encode(pictures(2)) == shared(case).encode(pictures(2))


def test_an_autoencoder_is_recognised_from_its_weights_alone(tmp_path):
    loaded = load(published("maetok", tmp_path))
    assert loaded.config == shared("maetok").config
    images = pictures(2)
    assert torch.equal(loaded.reconstruct(images), shared("maetok").reconstruct(images))


def test_a_quantizer_without_its_temperature_is_refused(tmp_path):
    with pytest.raises(ValueError, match="come without the configuration of their quantizer"):
        load(published("softvq", tmp_path))


def test_the_originals_configurations_are_read():
    soft, masked = SoftVQConfig.parse(ORIGINAL), SoftVQConfig.parse({**MAETOK, "quantized": False})
    assert (soft.encoder_model, soft.decoder_model, soft.masked) == ("base", "large", False)
    assert (soft.tau, soft.num_codebooks, soft.vq_mean, soft.vq_std) == (0.07, 4, 0.1, 0.4)
    assert (masked.decoder_model, masked.masked, masked.enc_token_drop) == ("base", True, 0.4)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create("softvq-bl-32").state_dict().items()}
        own = {key: value.shape for key, value in create("maetok-b-128").state_dict().items()}
    assert SoftVQ.recognise(shapes, dict(ORIGINAL))["quantized"] is True
    assert SoftVQ.recognise(own, dict(MAETOK))["quantized"] is False
    assert SoftVQConfig.parse(SoftVQ.recognise(own, None)).num_latent_tokens == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rope": True}, "use_rope is True; this version has False"),
        ({"enc_type": "cnn"}, "enc_type is 'cnn'; this version has 'vit'"),
        ({"to_pixel": "siren"}, "to_pixel is 'siren'"),
        ({"encoder_model": "vit_giant_patch14_dinov2.lvd142m"}, "encoder_model is 'vit_giant"),
        ({"num_latent_tokens": 30}, "must be a multiple of num_codebooks, 4"),
        ({"enc_patch_size": 24}, "must be a multiple of enc_patch_size"),
        ({"enc_token_drop": 0.9}, "enc_token_drop_max, 0.6, or less"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        create("softvq", **{**ORIGINAL, **change})


def test_published_rows_state_that_nothing_was_recorded():
    rows = [entry for entry in entries().values() if entry.family == "softvq"]
    assert len(rows) == 7 and not any(row.verified for row in rows)
    assert {row.repo for row in rows} >= {"SoftVQVAE/softvq-l-64", "MAETok/maetok-b-128"}
