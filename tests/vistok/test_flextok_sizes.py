"""FlexTok on images that are not square, lists of several sizes, and VAEs of other channel counts."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from paths import GOLDEN
from small_flextok import build_flextok

from vistok import Tokens
from vistok.eval.speed.plain_flextok import attention_mask
from vistok.models.flextok.config import FlexTokConfig
from vistok.models.flextok.network import timestep_features
from vistok.models.flextok.vae import vae_config

SMALL = {
    "encoder_dim": 64,
    "encoder_depth": 2,
    "decoder_dim": 96,
    "decoder_depth": 2,
    "head_dim": 32,
    "num_tokens": 8,
    "levels": (4, 5, 3),
    "latent_channels": 4,
    "latent_size": 8,
    "vae_block_out_channels": (8, 16),
    "vae_layers_per_block": 1,
    "vae_norm_num_groups": 4,
    "vae_scaling_factor": 0.7,
}
SIZES = [(8, 16), (16, 16), (16, 4), (8, 16), (12, 8)]
GRAPH = json.loads((GOLDEN / "flextok_d12_d12.json").read_text())["config"]


def build(**changes):
    """A small tokenizer with every weight at random, none at zero."""
    return build_flextok(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def model():
    return build()


def picture(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(1, 3, 4, 4, generator=generator), size)[0]


def pictures(sizes=SIZES):
    return [picture(size, seed) for seed, size in enumerate(sizes)]


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def close(result, expected, tolerance=2e-5):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


# ---- against straightforward code --------------------------------------------------------------------------


class Plain:
    """The tokenizer's formulas for one image [3, H, W], with loops where the model has none."""

    def __init__(self, model):
        self.model = model
        self.vae = AutoencoderKL(**vae_config(model.config)).eval()
        self.vae.load_state_dict(model.autoencoder.vae.state_dict())

    def latents(self, image):
        parts, patch = self.model.encoder.module_dict, self.model.config.patch_size
        x = self.vae.encode(2 * image[None] - 1).latent_dist.mode()[0] * 0.7
        rows = self._patches(x, parts["enc_patch_emb"].patch_proj, parts["enc_posemb_module"].posembs[0])
        count = len(rows)
        assert count == x.shape[1] * x.shape[2] // patch**2
        rows = torch.cat([rows, parts["enc_register_module"].registers])
        mask = attention_mask("causal_last", count, len(rows) - count)
        for block in parts["enc_transformer"].blocks:
            rows = rows + self._attend(block.attn, _norm(rows), mask)
            rows = rows + _mlp(block.mlp, _norm(rows))
        return parts["enc_to_latents"].proj(_norm(rows[count:]))

    def picture(self, quantized, noise, scales):
        """Classifier-free guidance with one scale per step."""
        x = noise
        for step, scale in enumerate(scales):
            time = 1 - step / len(scales)
            conditional, nothing = (self._velocity(quantized, x, time, null) for null in (False, True))
            x = x - (nothing + scale * (conditional - nothing)) / len(scales)
        return ((self.vae.decode(x[None] / 0.7).sample[0] + 1) / 2).clamp(0, 1)

    def _velocity(self, quantized, x, time, null):
        model, parts = self.model, self.model.decoder.module_dict
        registers = parts["dec_from_latents"].proj(quantized)
        registers = registers + parts["dec_registers_posemb_module"].posembs[0, 0].T[: len(registers)]
        hidden = parts["dec_nested_dropout"].dropout_mask_token
        registers = torch.cat([registers, hidden.expand(model.num_tokens - len(registers), -1)])
        if null:
            registers = parts["dec_latent_dropout"].nullcond.expand_as(registers)
        patches = self._patches(
            x, parts["dec_noise_patch_emb"].patch_proj, parts["dec_patches_posemb_module"].posembs[0]
        )
        rows, count = torch.cat([patches, registers]), len(patches)
        embedded = parts["dec_time_embedder"].mlp(timestep_features(torch.tensor([time]), 1.0))
        for block in parts["dec_transformer"].blocks:
            halves = block.adaLN_modulation(embedded).view(2, 6, -1)
            modulation = torch.stack([halves[int(row >= count)] for row in range(len(rows))], 1)
            gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = modulation
            rows = rows + gate_a * self._attend(block.attn, _norm(rows) * (1 + scale_a) + shift_a)
            rows = rows + gate_m * _mlp(block.mlp, _norm(rows) * (1 + scale_m) + shift_m)
        head = parts["dec_to_patches"]
        shift, scale = head.adaLN_modulation(embedded).view(2, -1)
        cells = head.proj(_norm(rows[:count]) * (1 + scale) + shift)
        return self._unpatched(cells, x.shape)

    def _patches(self, x, layer, table):
        patch = self.model.config.patch_size
        rows = []
        for i in range(x.shape[1] // patch):
            for j in range(x.shape[2] // patch):
                cell = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                rows.append(layer(cell.permute(1, 2, 0).flatten()) + table[:, i, j])
        return torch.stack(rows)

    def _unpatched(self, cells, shape):
        patch, x = self.model.config.patch_size, torch.zeros(shape)
        columns = shape[2] // patch
        for number, cell in enumerate(cells):
            i, j = patch * (number // columns), patch * (number % columns)
            x[:, i : i + patch, j : j + patch] = cell.view(patch, patch, -1).permute(2, 0, 1)
        return x

    def _attend(self, attention, x, mask=None):
        heads = x.shape[1] // attention.head_dim
        query, key, value = (
            layer(x).view(len(x), heads, -1).transpose(0, 1)
            for layer in (attention.wq, attention.wk, attention.wv)
        )
        logits = _norm(query) @ _norm(key).mT * (8 / attention.head_dim)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return attention.proj((logits.softmax(-1) @ value).transpose(0, 1).flatten(1))


def _norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def _mlp(mlp, x):
    return mlp.fc2(F.silu(mlp.fc1(x)) * mlp.fc3(x))


@pytest.mark.parametrize("size", [(8, 16), (16, 4), (12, 12)])
@torch.no_grad()
def test_any_size_gives_what_straightforward_code_gives(model, size):
    plain, image = Plain(model), picture(size)
    latents = plain.latents(image)
    close(model.latents(image[None])[0], latents)
    tokens = model.encode(image[None])
    quantized = model.quantizer.decode(tokens.indices)[0]
    close(quantized, model.quantizer(latents).latents)
    noise = torch.randn(4, size[0] // 2, size[1] // 2, generator=seeded())
    scales = {1.0: 4.0, 0.75: 3.0, 0.5: 2.0, 0.25: 1.0}
    for k in (3, 8):
        decoded = model.decode(
            tokens.prefix(k),
            size=size,
            steps=4,
            guidance=scales.__getitem__,
            normalized=False,
            noise=noise[None],
        )
        close(decoded[0], plain.picture(quantized[:k], noise, scales.values()), 1e-4)


# ---- sizes -------------------------------------------------------------------------------------------------


def test_a_list_of_sizes_is_encoded_and_decoded_as_its_images_are_alone(model):
    images = pictures()
    tokens = model.encode(images, num_tokens=5)
    together = model.decode(tokens, size=SIZES, steps=2, generator=seeded())
    for row, (image, size) in enumerate(zip(images, SIZES, strict=True)):
        assert model.encode(image[None], num_tokens=5) == tokens[row]
        alone = model.decode(tokens[row], size=size, steps=2, generator=seeded())
        assert together[row].shape == (3, *size)
        close(together[row], alone[0])


def test_a_list_takes_lengths_generators_and_noises_by_image(model):
    tokens = model.encode(pictures())
    ragged = Tokens.cat([tokens[row].prefix(k) for row, k in enumerate((8, 1, 3, 5, 2))])
    noises = [torch.randn(4, h // 2, w // 2, generator=seeded(row)) for row, (h, w) in enumerate(SIZES)]
    generators = [seeded(row) for row in range(5)]
    by_generator = model.decode(ragged, size=SIZES, steps=2, generator=generators)
    by_noise = model.decode(ragged, size=SIZES, steps=2, noise=noises)
    for row, size in enumerate(SIZES):
        alone = model.decode(ragged[row], size=size, steps=2, generator=seeded(row))[0]
        close(by_generator[row], alone)
        close(by_noise[row], alone)


def test_reconstruct_keeps_every_size(model):
    images = pictures()
    together = model.reconstruct(images, 4, steps=2)
    for image, result in zip(images, together, strict=True):
        close(result, model.reconstruct(image[None], 4, steps=2)[0])
    assert model.reconstruct(images[0][None], size=16, steps=1).shape == (1, 3, 16, 16)


def test_tokens_of_any_size_are_saved_and_loaded(model, tmp_path):
    tokens = model.encode(pictures())
    tokens.save(tmp_path / "mixed.vtok")
    again = Tokens.load(tmp_path / "mixed.vtok")
    assert again == tokens
    for ours, theirs in zip(
        model.decode(again, size=SIZES, steps=1), model.decode(tokens, size=SIZES, steps=1), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_generator_advances_past_a_list_and_the_same_state_gives_the_same(model):
    tokens, generator = model.encode(pictures()), seeded(5)
    first = model.decode(tokens, size=SIZES, steps=1, generator=generator)
    second = model.decode(tokens, size=SIZES, steps=1, generator=generator)
    assert not torch.equal(first[1], second[1])
    again = model.decode(tokens, size=SIZES, steps=1, generator=seeded(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_empty_lists_stay_empty(model):
    tokens = model.encode([])
    assert (len(tokens), tokens.num_tokens) == (0, 8)
    assert model.decode(tokens, size=[]) == []
    assert model.decode(tokens, size=(8, 4)).shape == (0, 3, 8, 4)


def test_a_quality_is_reached_at_every_size(model):
    images = pictures()
    options = {"target_psnr": 8.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = model.encode(images, **options)
        for row, image in enumerate(images):
            alone = model.encode(image[None], **options)
            assert alone.tokens.lengths == together.tokens.lengths[row]
            close(alone.psnr[0], together.psnr[row], 1e-4)
    reached = model.decode(together.tokens, size=SIZES)
    psnr = [-10 * (a - b).square().mean().log10() for a, b in zip(images, reached, strict=True)]
    close(torch.stack(psnr).double(), together.psnr, 1e-4)


def test_training_takes_images_that_are_not_square(model):
    model = copy.deepcopy(model).train()
    model(torch.stack([picture((8, 16)), picture((8, 16), 1)])).losses["flow"].backward()
    assert model.encoder.module_dict["enc_patch_emb"].patch_proj.weight.grad.any()


def test_size_multiple_says_which_sides_are_taken(model):
    assert model.size_multiple == 4
    for height in range(1, 21):
        image = torch.zeros(1, 3, height, 8)
        if height % 4 == 0 and height <= 16:
            assert model.encode(image).num_tokens == 8
        else:
            with pytest.raises(ValueError, match=rf"{height}×8 pixels.*multiples of 4, from 4 to 16"):
                model.encode(image)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (6, "6×6 pixels"),
        ((8, 20), "8×20 pixels"),
        ((0, 8), "0×8 pixels"),
        ((8, 8, 8), "a side or"),
        ("8", "a side or"),
        (8.0, "a side or"),
        (True, "a side or"),
        ([8, 16], r"a list holds one \(height, width\) per image"),
        ([(8, 16)], "1 sizes were given for 2 images"),
        ([(8, 16), (8, 17)], "8×17 pixels"),
    ],
)
def test_other_sizes_are_refused_in_words(model, size, message):
    tokens = model.encode([picture((8, 8)), picture((8, 8), 1)])
    with pytest.raises(ValueError, match=message):
        model.decode(tokens, size=size, steps=1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)], r"image 1 of the list is \[1, 3, 8, 8\]"),
        ([torch.zeros(3, 8, 8), "picture.png"], "image 1 of the list is str"),
        ([torch.zeros(3, 8, 8), torch.full((3, 4, 4), 2.0)], r"span \[2, 2\]"),
        ([torch.zeros(3, 8, 6)], "8×6 pixels"),
        ("picture.png", "images are a str"),
    ],
)
def test_lists_of_other_things_are_refused_in_words(model, images, message):
    with pytest.raises(ValueError, match=message):
        model.encode(images)


def test_noise_for_a_list_must_fit_it(model):
    tokens = model.encode(pictures(SIZES[:2]))
    noises = [torch.zeros(4, 4, 8), torch.zeros(4, 8, 8)]
    assert len(model.decode(tokens, size=SIZES[:2], steps=1, noise=noises)) == 2
    with pytest.raises(ValueError, match="1 noises were given for 2 images"):
        model.decode(tokens, size=SIZES[:2], noise=noises[:1])
    with pytest.raises(ValueError, match=r"\[1, 4, 4, 8\] is needed"):
        model.decode(tokens, size=SIZES[:2], noise=noises[::-1])
    with pytest.raises(ValueError, match="give one of them"):
        model.decode(tokens, size=SIZES[:2], noise=noises, generator=seeded())


def test_a_published_model_warns_of_a_size_it_was_not_trained_on(model):
    named = copy.deepcopy(model)
    named.name = "flextok-d12-d12-in1k"
    with pytest.warns(UserWarning, match="trained on 16×16 images only"):
        named.encode(torch.zeros(1, 3, 8, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named.encode(torch.zeros(1, 3, 16, 16))
        model.encode(torch.zeros(1, 3, 8, 16))


# ---- guidance and channels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [True, False])
def test_a_constant_function_guides_as_the_number_does(model, normalized):
    tokens, options = (
        model.encode(pictures([(8, 16)])),
        {"size": (8, 16), "steps": 3, "normalized": normalized},
    )
    number = model.decode(tokens, guidance=4.0, **options)
    assert torch.equal(model.decode(tokens, guidance=lambda t: 4.0, **options), number)
    assert torch.equal(model.decode(tokens, guidance=lambda t: torch.tensor(4.0), **options), number)
    times = []
    model.decode(tokens, guidance=lambda t: times.append(t) or 2.0, **options)
    assert times == [1.0, 2 / 3, 1 / 3]


@pytest.mark.parametrize("value", [None, float("nan"), "3", True])
def test_a_function_that_returns_no_scale_is_refused(model, value):
    with pytest.raises(
        ValueError, match=r"guidance returned .* for the time 1; it must return a finite number"
    ):
        model.decode(model.encode(pictures([(8, 8)])), size=8, guidance=lambda t: value)


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_the_number_of_latent_channels_is_the_configurations(channels):
    text = json.dumps(GRAPH).replace("768", "64").replace("[16, 16]", "[4, 4]").replace("256", "8")
    for name in ("latent_channels", "channels_in", "channels_out", "out_channels"):
        text = text.replace(f'"{name}": 16', f'"{name}": {channels}')
    graph = json.loads(text)
    graph["decoder"]["module_dict"]["dec_time_embedder"]["frequency_embedding_size"] = 256
    for drop in (False, True):
        if drop:
            del graph["vae"]["latent_channels"]
        assert FlexTokConfig.parse(graph).latent_channels == channels
    model = build(latent_channels=channels)
    assert model.autoencoder.encode(torch.zeros(1, 3, 8, 16)).shape == (1, channels, 4, 8)
    assert model.reconstruct(picture((8, 16))[None], steps=1).shape == (1, 3, 8, 16)
    graph["encoder"]["module_dict"]["enc_patch_emb"]["channels_in"] = 2
    with pytest.raises(ValueError, match=r"(channels_in=2|elsewhere it is 2)"):
        FlexTokConfig.parse(graph)
