"""RAE: what is special about it beside the matrix of all tokenizers."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_tokenizers import CASES, SIDE, build, pictures, shared

from vistok import create, load
from vistok.models.rae import RAE, RAEConfig
from vistok.models.rae.keys import canonical_keys, select_part
from vistok.quantizers import ContinuousLatents

pytestmark = pytest.mark.usefixtures("small_and_quick")
SMALL = {  # widths whose number of heads is the published one
    "encoder_hidden_size": 384,
    "encoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 6,
    "encoder_intermediate_size": 16,
    "encoder_input_size": 32,
    "decoder_hidden_size": 768,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 12,
    "decoder_intermediate_size": 16,
}
KINDS = {
    "dinov2": {"encoder_image_size": 42, "encoder_input_size": 28},
    "siglip2": {"encoder_image_size": 48},
    "mae": {"encoder_image_size": 48},
}
ENTRIES = {"rae-dinov2": 5, "rae-siglip2": 0, "rae-mae": 1}  # rows before the patches


def small(kind, **changes):
    torch.manual_seed(0)
    model = create("rae", encoder_type=kind, **{**SMALL, **KINDS[kind], **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def original(config):
    """The encoder of transformers of that size, whose last norm does nothing more than normalise."""
    import transformers

    sizes = {
        "hidden_size": config.encoder_hidden_size,
        "num_hidden_layers": config.encoder_num_hidden_layers,
        "num_attention_heads": config.encoder_num_attention_heads,
        "intermediate_size": config.encoder_intermediate_size,
        "patch_size": config.encoder_patch_size,
        "image_size": config.encoder_image_size,
    }
    torch.manual_seed(3)
    if config.encoder_type == "dinov2":
        sizes["mlp_ratio"] = sizes.pop("intermediate_size") // sizes["hidden_size"]
        settings = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4)
        model = transformers.Dinov2WithRegistersModel(settings)
    elif config.encoder_type == "siglip2":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    else:
        settings = transformers.ViTMAEConfig(**sizes, mask_ratio=0.0, layer_norm_eps=1e-12)
        model = transformers.ViTMAEModel(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("layernorm.weight", "layernorm.bias")) and "head" not in name:
                parameter.fill_(float(name.endswith("weight")))
    return model.eval()


# Encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENTRIES)
def test_features_are_those_of_the_encoder_in_transformers(case):
    model = copy.deepcopy(shared(case))
    network = original(model.config)
    encoder = {f"encoder.{key}": value for key, value in network.state_dict().items()}
    decoder = {f"decoder.{key}": value for key, value in model.decoder.state_dict().items()}
    state = RAE.rename_keys(encoder | decoder)
    incompatible = model.load_state_dict(state, strict=False)
    assert {key for key in incompatible.missing_keys if not key.startswith("latents_")} == set()
    images = pictures(2)
    side = model.config.encoder_input_size
    pixels = F.interpolate(images, (side, side), mode="bicubic") if side != SIDE else images
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (model.config.image_mean, model.config.image_std)
    )
    options = {"interpolate_pos_encoding": True} if case != "rae-dinov2" else {}
    if case == "rae-mae":  # masks nothing, and the order of the noise is that of the patches
        options["noise"] = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        states = network((pixels - mean) / std, **options).last_hidden_state
    torch.testing.assert_close(model.features(images), states[:, ENTRIES[case] :], rtol=1e-4, atol=1e-5)


def test_published_encoders_have_their_own_sizes_and_pixel_statistics():
    dinov2, siglip2, mae = (RAEConfig(encoder_type=kind) for kind in ("dinov2", "siglip2", "mae"))
    assert (dinov2.encoder_patch_size, dinov2.encoder_input_size, dinov2.grid) == (14, 224, 16)
    assert (siglip2.encoder_patch_size, siglip2.encoder_input_size, siglip2.grid) == (16, 256, 16)
    assert (dinov2.encoder_image_size, siglip2.encoder_image_size, mae.encoder_image_size) == (518, 256, 224)
    assert dinov2.image_mean == mae.image_mean == (0.485, 0.456, 0.406)
    assert siglip2.image_std == (0.5, 0.5, 0.5)
    assert (dinov2.num_register_tokens, mae.num_register_tokens) == (4, 0)


def test_the_encoder_never_has_gradients():
    model = build("rae-mae").train()
    output = model(pictures(2))
    output.images.square().mean().backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert not output.codes.requires_grad


# Latents ----------------------------------------------------------------------------------------------------


def test_latents_are_features_normalised_per_channel_and_place():
    model, images = build("rae-dinov2"), pictures(3)
    torch.manual_seed(1)
    mean, variance = torch.randn(32, 4, 4), torch.rand(32, 4, 4) + 0.1
    model.set_statistics(mean, variance)
    features, latents = model.features(images), model.encode(images).latents
    for row, column, channel in ((0, 3, 5), (2, 1, 31)):
        place = 4 * row + column
        expected = features[:, place, channel] - mean[channel, row, column]
        expected = expected / math.sqrt(float(variance[channel, row, column]) + 1e-5)
        torch.testing.assert_close(latents[:, place, channel], expected)
    plain = create("rae", **{**CASES["rae-dinov2"][1], "statistics": False}).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain.encode(images).latents, features)
    torch.testing.assert_close(model.reconstruct(images), plain.reconstruct(images))


def test_statistics_of_another_shape_or_below_zero_are_refused():
    model, shape = build("rae-siglip2"), (32, 4, 4)
    with pytest.raises(ValueError, match=r"the mean has shape \[32\]; rae takes \[32, 4, 4\]"):
        model.set_statistics(torch.zeros(32), torch.ones(shape))
    for wrong in (-torch.ones(shape), torch.full(shape, torch.inf)):
        with pytest.raises(ValueError, match="the variance of the latents holds numbers that are not finite"):
            model.set_statistics(torch.zeros(shape), wrong)
    assert not model.config.statistics


def test_latents_of_another_grid_draw_images_of_the_same_size():
    model = shared("rae-siglip2")
    with torch.no_grad():
        assert model.pixels(torch.randn(2, 9, 32)).shape == (2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="latents have 8 rows; they fill a square"):
        model.pixels(torch.randn(2, 8, 32))
    with pytest.raises(ValueError, match="9 latents were given; the statistics of rae are for 16"):
        shared("rae-dinov2").pixels(torch.randn(2, 9, 32))


def test_noise_comes_before_the_statistics_and_in_training_alone():
    model, images = build("rae-dinov2"), pictures(4)
    model.set_statistics(torch.zeros(32, 4, 4), torch.full((32, 4, 4), 4.0))
    with torch.no_grad():
        clean = model(images).codes
        assert torch.equal(clean, model.encode(images).latents)
        torch.manual_seed(2)
        noise = (model.train()(images).codes - clean) * 2  # the deviation of the statistics
    per_image = noise.flatten(1).std(1)
    assert (per_image < 0.9).all()  # a level of up to 0.8 times 1
    assert per_image.unique().numel() == 4
    silent = build("rae-dinov2", noise_tau=0.0).train()
    with torch.no_grad():
        assert torch.equal(silent(images).codes, silent(images).codes)
    level, ones = torch.tensor([0.5, 0.0, 1.0, 0.0]).view(4, 1, 1), torch.ones_like(clean)
    torch.testing.assert_close(model.noised(clean, level, ones), clean + 0.8 * level)


def test_continuous_latents_are_their_own_codes():
    quantizer, latents = ContinuousLatents(4), torch.randn(2, 3, 4, requires_grad=True)
    output = quantizer(latents)
    assert output.losses == {}
    assert torch.equal(quantizer.decode(quantizer.encode(latents)), latents)
    output.latents.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))
    with pytest.raises(ValueError, match="latents have 5 channels; this tokenizer has 4"):
        quantizer.decode(torch.zeros(2, 3, 5))


# Decoder ----------------------------------------------------------------------------------------------------


def test_positions_have_the_column_in_the_first_channels():
    model = shared("rae-mae")
    table, width = model.decoder.decoder_pos_embed[0], 32
    assert not table[0].any()
    for row, column in ((0, 0), (1, 3), (3, 2)):
        expected = []
        for place in (column, row):
            angles = [place * 10_000 ** (-k / (width // 4)) for k in range(width // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(table[1 + 4 * row + column], torch.tensor(expected))


# Checkpoints ------------------------------------------------------------------------------------------------


def twin(model):
    """The state dict in diffusers' layout."""
    names = {"query": "to_q", "key": "to_k", "value": "to_v"}
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("decoder."):
            for old, new in names.items():
                key = key.replace(f"attention.attention.{old}.", f"attention.{new}.")
            key = key.replace("attention.output.dense.", "attention.to_out.0.")
        elif key.startswith("latents_"):
            key = f"_{key}"
        else:
            key = key.replace("encoder.encoder.", "encoder.", 1).replace("encoder.model.", "encoder.", 1)
        if key != "decoder.decoder_pos_embed":
            state[key] = value.contiguous()
    pixels = {"encoder_mean": model.image_mean[None], "encoder_std": model.image_std[None]}
    return state | pixels


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_diffusers_loads_by_its_keys(kind, tmp_path):
    model = small(kind)
    grid = model.config.grid
    model.set_statistics(torch.randn(384, grid, grid), torch.rand(384, grid, grid))
    save_file(twin(model), tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load(tmp_path)
    assert loaded.config == model.config
    images = pictures(2, side=model.image_size)
    assert loaded.encode(images) == model.encode(images)
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))


def test_weights_for_other_pixel_statistics_are_refused():
    state = twin(small("siglip2"))
    with pytest.raises(ValueError, match=r"encoder_std of these RAE weights is \[1.0, 1.0"):
        RAE.rename_keys(state | {"encoder_std": torch.ones(1, 3, 1, 1)})


def test_weights_without_statistics_say_what_their_keys_do_not_hold(tmp_path):
    model = small("mae")
    state = twin(model) | {"_latents_mean": torch.zeros(1), "_latents_std": torch.ones(1)}
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match="do not hold encoder_input_size"):
        load(path)
    loaded = load(path, config={"encoder_input_size": 32, "noise_tau": 0.3})
    assert (loaded.config.statistics, loaded.config.noise_tau) == (False, 0.3)
    narrow = build("rae-mae")
    save_file({key: value.contiguous() for key, value in narrow.state_dict().items()}, path)
    with pytest.raises(ValueError, match="do not hold encoder_num_attention_heads, decoder_num_attention"):
        load(path)


def test_the_training_file_of_the_original_loads_its_average(tmp_path):
    model = small("dinov2")
    unused = {
        "encoder.encoder.embeddings.mask_token": torch.zeros(1, 384),
        "encoder.encoder.layernorm.weight": torch.ones(384),
    }
    first = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    content = {"model": first | unused, "ema": model.state_dict() | unused, "epoch": 3}
    torch.save(content, tmp_path / "model.pt")
    images = pictures(1)
    assert load(tmp_path / "model.pt").encode(images) == model.encode(images)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_load_from_the_files_of_their_authors(kind, tmp_path):
    model = small(kind)
    grid = model.config.grid
    prefix = {"dinov2": "", "siglip2": "vision_model.", "mae": "vit."}[kind]
    inner = f"encoder.{model.encoder.attribute}."
    state = model.state_dict()
    encoder = {f"{prefix}{k.removeprefix(inner)}": v for k, v in state.items() if k.startswith(inner)}
    if kind != "dinov2":  # a file with another network beside the encoder
        encoder |= {"text_model.embeddings.weight": torch.ones(2), "decoder.mask_token": torch.ones(1, 1, 2)}
    drawn = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    mean, variance = torch.randn(384, grid, grid), torch.rand(384, grid, grid)
    torch.save(encoder, tmp_path / "encoder.bin")
    torch.save(drawn, tmp_path / "model.pt")
    torch.save({"mean": mean, "var": variance}, tmp_path / "stat.pt")
    files = {"encoder": tmp_path / "encoder.bin", "decoder": tmp_path / "model.pt"}
    fields = {"encoder_type": kind, **SMALL, **KINDS[kind]}
    images = pictures(2, side=model.image_size)
    plain = RAE.from_parts(fields, **files)
    assert plain.encode(images) == model.encode(images)
    model.set_statistics(mean, variance)
    whole = RAE.from_parts(fields, **files, statistics=tmp_path / "stat.pt", dtype="float64")
    assert whole.dtype == torch.float64
    torch.testing.assert_close(
        whole.encode(images).latents.float(), model.encode(images).latents, rtol=1e-3, atol=1e-4
    )
    torch.save({"mean": mean}, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match=r"stat\.pt has no var"):
        RAE.from_parts(fields, **files, statistics=tmp_path / "stat.pt")
    with pytest.raises(ValueError, match="'rae-b' is not a published RAE; they are rae-dinov2-b"):
        RAE.from_parts("rae-b", **files)
    with pytest.raises(ValueError, match=r"RAE's decoder alone.*from_parts"):
        load(tmp_path / "model.pt")


def test_the_encoder_of_another_kind_does_not_fit(tmp_path):
    model = small("siglip2")
    torch.save(select_part(model.state_dict(), ("encoder.model.",)), tmp_path / "encoder.bin")
    torch.save(select_part(model.state_dict(), ("decoder.",)), tmp_path / "model.pt")
    fields = {"encoder_type": "mae", **SMALL, **KINDS["mae"]}
    with pytest.raises(ValueError, match=r"does not fit this RAE"):
        RAE.from_parts(fields, encoder=tmp_path / "encoder.bin", decoder=tmp_path / "model.pt")


def test_keys_without_an_encoder_are_refused():
    with pytest.raises(ValueError, match="hold no encoder of DINOv2, SigLIP2 or MAE"):
        canonical_keys({"decoder.trainable_cls_token": torch.zeros(1, 1, 8)})


# Configurations ---------------------------------------------------------------------------------------------

NESTED = {
    "encoder_type": "dinov2",
    "encoder": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 4},
    "encoder_input_size": 56,
    "decoder": {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    "eps": 1e-5,
}


def test_the_nested_configuration_is_read():
    config = RAEConfig.parse(NESTED)
    assert (config.encoder_hidden_size, config.encoder_intermediate_size, config.grid) == (64, 256, 4)
    assert (config.decoder_hidden_size, config.num_register_tokens) == (32, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"use_swiglu_ffn": True}}, "encoder's use_swiglu_ffn is True; this version has False"),
        ({"encoder": {"layer_norm_eps": 1e-5}}, "encoder's layer_norm_eps is 1e-05; this version has 1e-06"),
        ({"encoder": {"attention_window": 3}}, "unknown key encoder.attention_window"),
        ({"decoder": {"hidden_act": "relu"}}, "decoder's hidden_act is 'relu'; this version has 'gelu'"),
        ({"encoder_type": "clip"}, "encoder_type is 'clip'; it is dinov2, siglip2, mae"),
        ({"encoder_input_size": 60}, "encoder_input_size is 60; it must be a multiple of encoder_patch_size"),
        ({"eps": 1e-3}, "eps is 0.001; this version has the published 1e-05"),
        (
            {"decoder": {"decoder_hidden_size": 30, "decoder_num_attention_heads": 2}},
            "sines and cosines of two axes",
        ),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    values = {**NESTED, **change}
    with pytest.raises(ValueError, match=message):
        create("rae", **values)


def test_registers_are_of_dinov2_alone():
    with pytest.raises(ValueError, match="num_register_tokens is 4; only dinov2 has registers"):
        create("rae", encoder_type="mae", num_register_tokens=4)
