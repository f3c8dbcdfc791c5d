"""Instella's binary tokenizer: its formulae written out, sizes, checkpoints, training and parity cases."""

import copy
import json
import math

import numpy as np
import pytest
import tiny_tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vistok import Tokens, create, load
from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.models.instella import Downsample, Instella, InstellaConfig, Rotary, Upsample
from vistok.quantizers import bits_to_integers, integers_to_bits
from vistok.registry import entries
from vistok.train.config import OptimizerConfig, TrainConfig
from vistok.train.loop import train

pytestmark = pytest.mark.usefixtures("small_and_quick")
TINY = {**tiny_tokenizers.CASES["instella"][1], "image_size": 16}


def build(**changes):
    return tiny_tokenizers.build("instella", **{**TINY, **changes})


@pytest.fixture
def model():
    return tiny_tokenizers.shared("instella", image_size=16)


def pictures(count, height=16, width=16, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ---- the formulae ------------------------------------------------------------------------------------------


def plain_table(config, height, width, scale):
    """The angle of every token and channel, number by number: [K + height·width][head dim]."""
    places = [(i, 0, 0) for i in range(config.num_latent_tkns)]
    for row in range(height):
        for column in range(width):
            if scale is None:
                places.append((0, row, column))
            else:
                stretch = [
                    place / (count - 1) * (scale - 1) if count > 1 else 0
                    for place, count in ((row, height), (column, width))
                ]
                places.append((0, *stretch))
    return [
        [
            place * 10000 ** (-2 * (channel // 2) / axis)
            for place, axis in zip(token, config.axes_dims_rope, strict=True)
            for channel in range(axis)
        ]
        for token in places
    ]


def plain_rotate(x, angles):
    """x [B, N, h, d] with channel i paired with i + d/2, each with its own angle."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for token, row in enumerate(angles):
        for i in range(half):
            first, second = x[:, token, :, i], x[:, token, :, i + half]
            out[:, token, :, i] = first * math.cos(row[i]) - second * math.sin(row[i])
            out[:, token, :, i + half] = second * math.cos(row[i + half]) + first * math.sin(row[i + half])
    return out


def plain_norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_block(x, state, prefix, heads, angles):
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    normed = plain_norm(x, weights["input_layernorm.weight"])
    q, k, v = (
        (normed @ weights[f"attn.{name}_proj.weight"].T).unflatten(-1, (heads, -1))
        for name in ("q", "k", "v")
    )
    q = plain_rotate(plain_norm(q, weights["attn.norm_q.weight"]), angles)
    k = plain_rotate(plain_norm(k, weights["attn.norm_k.weight"]), angles)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    x = x + mixed @ weights["attn.o_proj.weight"].T
    normed = plain_norm(x, weights["post_attention_layernorm.weight"])
    gate, up = normed @ weights["mlp.gate_proj.weight"].T, normed @ weights["mlp.up_proj.weight"].T
    return x + (gate * gate.sigmoid() * up) @ weights["mlp.down_proj.weight"].T


def plain_logits(state, config, images):
    """Paper and specification, step by step, in float64: images in [0, 1] → logits."""
    x = F.conv2d(images * 2 - 1, state["encoder.patch_embedder.weight"],
                 state["encoder.patch_embedder.bias"], stride=config.patch_size)  # fmt: skip
    height, width = x.shape[2:]
    scale = None if config.scale is None else config.scale / config.patch_size
    count = config.num_latent_tkns
    x = torch.cat([state["encoder.latent_tokens"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    for depth in range(config.encoder_layers):
        angles = plain_table(config, height, width, scale)
        x = plain_block(x, state, f"encoder.transformer_blocks.{depth}.", config.encoder_num_heads, angles)
        if depth in config.downsample_idx:
            number = config.downsample_idx.index(depth)
            grid = x[:, count:].mT.unflatten(2, (height, width))
            pooled = F.pixel_unshuffle(grid, 2).unflatten(1, (-1, 4)).mean(2)
            layer = f"encoder.down_layers.{number}.conv"
            grid = F.conv2d(grid, state[f"{layer}.weight"], state[f"{layer}.bias"], 2, 1) + pooled
            x = torch.cat([x[:, :count], grid.flatten(2).mT], 1)
            height, width, scale = height // 2, width // 2, None if scale is None else scale // 2
    x = plain_norm(x[:, :count], state["encoder.norm_out.weight"])
    x = x @ state["encoder.proj_out.weight"].T + state["encoder.proj_out.bias"]
    return x @ state["quantizer.proj.0.weight"].T + state["quantizer.proj.0.bias"]


def plain_pixels(state, config, bits, height, width):
    """Bits → images [B, 3, H, W] in the original's range, `height`×`width` patches."""
    x = torch.stack([
        torch.stack([state["quantizer.embed"][token].sum(0) for token in image]) for image in bits
    ])  # fmt: skip
    x = plain_norm(x, state["decoder.input_layer.0.weight"])
    x = x @ state["decoder.input_layer.1.weight"].T + state["decoder.input_layer.1.bias"]
    steps, count = len(config.upsample_idx), config.num_latent_tkns
    rows, columns = height // 2**steps, width // 2**steps
    scale = None if config.scale is None else config.scale / config.patch_size
    if scale is not None and steps:
        scale = scale // 2**steps
    x = torch.cat([x, state["decoder.mask_tokens"].expand(len(x), rows * columns, -1)], 1)
    for depth in range(config.decoder_layers):
        angles = plain_table(config, rows, columns, scale)
        x = plain_block(x, state, f"decoder.transformer_blocks.{depth}.", config.decoder_num_heads, angles)
        if depth in config.upsample_idx:
            layer = f"decoder.up_layers.{config.upsample_idx.index(depth)}.conv"
            grid = x[:, count:].mT.unflatten(2, (rows, columns))
            up = F.conv2d(grid, state[f"{layer}.weight"], state[f"{layer}.bias"], 1, 1)
            grid = F.pixel_shuffle(up + grid.repeat_interleave(4, 1), 2)
            x = torch.cat([x[:, :count], grid.flatten(2).mT], 1)
            rows, columns, scale = 2 * rows, 2 * columns, None if scale is None else 2 * scale
    x = plain_norm(x[:, count:], state["decoder.norm_out.weight"])
    x = x @ state["to_pixel.weight"].T + state["to_pixel.bias"]
    patch = config.patch_size
    out = x.new_empty(len(x), 3, height * patch, width * patch)
    for row in range(height * patch):
        for column in range(width * patch):
            first = ((row % patch) * patch + column % patch) * 3
            out[:, :, row, column] = x[:, row // patch * width + column // patch, first : first + 3]
    return out


VARIANTS = {
    "published layout": {},
    "no scale": {"scale": None},
    "odd scale": {"scale": 36},  # 9 patches: half of one is lost
    "resized after the last block": {"upsample_idx": (1,), "downsample_idx": (1,)},
    "resized twice": {"downsample_idx": (0, 1), "upsample_idx": (0, 1)},
    "never resized": {"downsample_idx": (), "upsample_idx": (), "image_size": 8, "scale": 18},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 32)])
def test_the_model_is_its_formulae_written_out(variant, height, width):
    model = build(**VARIANTS[variant]).double()
    images = pictures(2, height, width).double()
    state = {key: value.detach() for key, value in model.state_dict().items()}
    logits = plain_logits(state, model.config, images)
    with torch.no_grad():
        ours = model.quantizer.logits(model.latents(images))
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)  # tables are float32
    tokens = model.encode(images)
    assert torch.equal(tokens.bits, logits > 0)
    patch = model.config.patch_size
    expected = plain_pixels(state, model.config, tokens.bits, height // patch, width // patch)
    with torch.no_grad():
        found = model.pixels(model.dequantize(tokens)[0], size=(height, width))
    torch.testing.assert_close(found, expected / 2 + 0.5, rtol=1e-5, atol=1e-5)


def test_a_grid_of_one_row_stands_at_coordinate_zero():
    rotary = Rotary(InstellaConfig(num_latent_tkns=1))
    cos, sin = rotary(1, 1, 64.0, torch.device("cpu"))
    assert torch.equal(cos, torch.ones(2, 64))
    assert torch.equal(sin, torch.zeros(2, 64))
    assert rotary(1, 5, 64.0, torch.device("cpu"))[0].isfinite().all()


def test_bfloat16_ids_round_stretched_coordinates_and_nothing_else():
    exact, rounded = (
        Rotary(InstellaConfig(rope_id_dtype=dtype))(32, 32, 64.0, torch.device("cpu"))[0]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert torch.equal(exact[:128], rounded[:128])  # whole numbers below 256
    assert (exact[128:] - rounded[128:]).abs().max() > 0.05


def test_the_scale_changes_bits():
    images = pictures(4)
    stretched, plain = build(), build(scale=None)
    assert (stretched.encode(images).bits != plain.encode(images).bits).any()


def test_resizing_starts_from_the_mean_and_the_repeated_cell():
    x = torch.randn(1, 4, 4, 6)
    down, up = Downsample(4), Upsample(4)
    for layer in (down, up):
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
    torch.testing.assert_close(down(x), F.avg_pool2d(x, 2))
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_half_precision_is_clipped_and_not_infinite():
    model = build().half()
    with torch.no_grad():
        model.encoder.transformer_blocks[0].mlp.down_proj.weight.fill_(60000)
    seen = []
    model.encoder.transformer_blocks[0].register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        model.encoder(pictures(1).half())
    assert seen[0].isfinite().all()
    assert seen[0].abs().max() == 65504


# ---- tokens and sizes --------------------------------------------------------------------------------------


def test_images_become_bits_and_bits_pack_at_one_bit_a_bit(model):
    tokens = model.encode(pictures(3))
    assert tokens.bits.dtype == torch.bool
    assert tokens.bits.shape == (3, 6, 12)
    assert tokens.bits_per_image.tolist() == [72] * 3
    assert len(tokens.to_bytes()) <= 27 + 16
    assert torch.equal(integers_to_bits(bits_to_integers(tokens.bits), 12), tokens.bits)


@pytest.mark.parametrize("size", [8, 16, 48, (8, 24), (24, 16)])
def test_the_same_bits_decode_at_any_size(model, size):
    tokens = model.encode(pictures(2, 24, 8))
    images = model.decode(tokens, size=size)
    assert images.shape == (2, 3, *((size, size) if isinstance(size, int) else size))
    assert images.min() >= 0
    assert images.max() <= 1


def test_without_a_size_decoding_gives_image_size_and_reconstruct_the_images_own(model):
    images = pictures(2, 24, 8)
    assert model.decode(model.encode(images)).shape == (2, 3, 16, 16)
    assert model.reconstruct(images).shape == images.shape
    assert model.reconstruct(images, size=8).shape == (2, 3, 8, 8)
    assert model.train()(images).images.shape == images.shape
    assert model(images, size=(8, 16)).images.shape == (2, 3, 8, 16)
    model.eval()


@pytest.mark.parametrize("size", [0, 4, 12, (16, 20), -8])
def test_sizes_that_do_not_divide_are_refused_with_the_multiple(model, size):
    with pytest.raises(ValueError, match=r"multiples of 8"):
        model.decode(model.encode(pictures(1)), size=size)


def test_images_whose_grid_cannot_be_halved_are_refused(model):
    with pytest.raises(ValueError, match=r"16×20 pixels.*multiples of 8"):
        model.encode(pictures(1, 16, 20))


def test_bits_of_another_width_and_latents_are_refused(model):
    tokens = model.encode(pictures(1))
    with pytest.raises(ValueError, match=r"bool \[\.\.\., 12\]"):
        model.decode(tokens.bits[..., :11])
    with pytest.raises(ValueError, match="decodes bits"):
        model.decode(Tokens(latents=torch.zeros(1, 6, 12)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_nearly_all_bits(model, dtype):
    images = pictures(4)
    found = copy.deepcopy(model).to(dtype).encode(images)
    assert (found.bits == model.encode(images).bits).float().mean() > 0.9


# ---- checkpoints -------------------------------------------------------------------------------------------


def published_shapes():
    """Keys and shapes of the released tokenizer."""
    shapes = {
        "encoder.latent_tokens": (1, 128, 768),
        "encoder.patch_embedder.weight": (768, 3, 16, 16),
        "encoder.patch_embedder.bias": (768,),
        "encoder.down_layers.0.conv.weight": (768, 768, 3, 3),
        "encoder.down_layers.0.conv.bias": (768,),
        "encoder.norm_out.weight": (768,),
        "encoder.proj_out.weight": (768, 768),
        "encoder.proj_out.bias": (768,),
        "decoder.mask_tokens": (1, 1, 1024),
        "decoder.input_layer.0.weight": (768,),
        "decoder.input_layer.1.weight": (1024, 768),
        "decoder.input_layer.1.bias": (1024,),
        "decoder.up_layers.0.conv.weight": (4096, 1024, 3, 3),
        "decoder.up_layers.0.conv.bias": (4096,),
        "decoder.norm_out.weight": (1024,),
        "quantizer.embed": (64, 768),
        "quantizer.proj.0.weight": (64, 768),
        "quantizer.proj.0.bias": (64,),
        "to_pixel.weight": (768, 1024),
        "to_pixel.bias": (768,),
    }
    for side, width, layers in (("encoder", 768, 12), ("decoder", 1024, 16)):
        for layer in range(layers):
            block = f"{side}.transformer_blocks.{layer}."
            shapes |= {f"{block}{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
            shapes |= {f"{block}attn.{name}_proj.weight": (width, width) for name in "qkvo"}
            shapes |= {f"{block}attn.norm_{name}.weight": (64,) for name in "qk"}
            shapes |= {f"{block}mlp.{name}_proj.weight": (4 * width, width) for name in ("gate", "up")}
            shapes[f"{block}mlp.down_proj.weight"] = (width, 4 * width)
    return shapes


def test_the_registered_model_has_the_published_keys_and_size():
    with torch.device("meta"):
        model = create("instella-bae")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes()
    entry = entries()["instella-bae"]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.parameters, abs=0.01)
    assert entry.repo == "amd/Instella-T2I"
    assert "research-only" in entry.license
    assert (model.num_tokens, model.config.codebook_size, model.config.scale) == (128, 64, 1024)


def test_the_configuration_is_read_off_the_published_shapes():
    fields = Instella.recognise({key: torch.Size(shape) for key, shape in published_shapes().items()}, None)
    assert InstellaConfig(**fields) == InstellaConfig()
    assert Instella.recognise({"latent_tokens": torch.Size([32, 768])}, None) is None


def test_a_bare_file_loads_with_the_originals_configuration_beside_it(model, tmp_path):
    original = {key: value for key, value in TINY.items() if key not in ("image_size", "scale")}
    original |= {"in_channels": 3, "train_temp": 0.1, "use_repa": True, "repa_dim": 768, "repa_index": 7}
    state = model.state_dict() | {"decoder.repa_proj.0.weight": torch.zeros(4, 48)}  # training only
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(original))
    loaded = load(tmp_path)
    assert loaded.config == InstellaConfig(**{**TINY, "image_size": 1024, "scale": 1024})
    changed = load(tmp_path, config=original | {"scale": 64, "image_size": 16})
    assert changed.config == model.config
    assert changed.encode(pictures(2)) == model.encode(pictures(2))


def test_shapes_that_need_a_configuration_ask_for_it(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"axes_dims_rope.*encoder_head_dim is 16"):
        load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"axes_dims_rope": (4, 6)}, "list of 3"),
        ({"axes_dims_rope": (5, 5, 6)}, "three even numbers"),
        ({"axes_dims_rope": (4, 4, 4)}, "sum to 12"),
        ({"downsample_idx": (3,)}, r"rising block numbers below 3"),
        ({"upsample_idx": (1, 0)}, r"rising block numbers below 2"),
        ({"encoder_layers": 0}, "encoder_layers is 0"),
        ({"image_size": 20}, "multiple of 8"),
        ({"rope_id_dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"depth": 3}, "no configuration field depth"),
    ],
)
def test_impossible_configurations_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        create("instella", **{**TINY, **change})


# ---- training ----------------------------------------------------------------------------------------------


def test_training_draws_bits_and_reaches_every_parameter():
    model = build(entropy_weight=0.1).train()
    output = model(pictures(2))
    assert output.codes.dtype == torch.bool
    assert set(output.losses) == {"code", "entropy"}
    (output.images.square().mean() + sum(output.losses.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert (model(pictures(2)).codes != model(pictures(2)).codes).any()
    still = model.eval()(pictures(2))
    assert torch.equal(still.codes, model.encode(pictures(2)).bits)
    expected = model.decode(model.encode(pictures(2)))
    torch.testing.assert_close(still.images.clamp(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_the_training_log_shows_the_entropy_of_the_bits(tmp_path):
    optimizer = OptimizerConfig(learning_rate=2e-3, end_learning_rate=1e-4, warmup=0)
    config = TrainConfig(
        tokenizer={"name": "instella", **TINY, "entropy_weight": 0.1, "code_weight": 0.01},
        data={"sources": [{"kind": "scenes"}]},
        steps=12,
        batch_size=8,
        precision="no",
        optimizer=optimizer,
        workers=0,
        log_every=4,
        validate_every=100,
        checkpoint_every=100,
    )
    folder = train(config, tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 <= row["bit_entropy"] <= 1 for row in rows)
    loaded = load(folder)
    usage = loaded.quantizer.usage(loaded.encode(pictures(8)).bits)
    assert 0 <= float(usage["bit_entropy"]) <= 1


# ---- parity cases ------------------------------------------------------------------------------------------


def recorded_case(folder, name="other", **changes):
    """A case of other sizes than the published one, recorded from this model itself."""
    config = {**TINY, "scale": None}
    fields = {key: value for key, value in config.items() if key not in ("image_size", "scale")}
    state = create("instella", **config).state_dict()
    data = {
        "family": "instella",
        "case": name,
        "config": fields,
        "seed": 3,
        "keep": [],
        "state_dict": {key: ["float32", list(value.shape)] for key, value in state.items()},
        "tensors": {
            "s96.enc_block2": "last block, stored [:,::2,::3]",
            "s96.dec_block1": "last block, stored [:,::2,::3]",
        },
        "inputs": {"x": "np.random.RandomState(7).uniform(-1,1,(2,3,24,16)).astype(float32)"},
        "rtol": 1e-4,
        "atol": 1e-4,
    }
    data |= changes
    names = ["enc_block2", "enc_down", "logits", "bits", "dec_block1", "dec_up", "recon", "recon_8x24"]
    tensors = {f"s96.{name}": torch.zeros(1) for name in names}
    tensors |= {"snone.bits": torch.zeros(1), "s96.recon_8x24": torch.zeros(1, 3, 8, 24)}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path, tensors


def test_cases_of_other_sizes_and_scales_go_through_the_same_adapter(tmp_path, monkeypatch):
    from vistok.eval.parity import instella
    from vistok.eval.parity.case import Case

    path, tensors = recorded_case(tmp_path)
    save_file(tensors, path.with_suffix(".safetensors"))
    case = Case.open(path)
    monkeypatch.setattr(Case, "recorded", lambda self, name: recorded_bits[name])
    config = {**json.loads(path.read_text())["config"], "image_size": 1024}
    model = case.build(lambda: create("instella", **config))
    model.encoder.scale = model.decoder.scale = 96
    drawn = case.draw("RandomState(7)").uniform(-1, 1, (2, 3, 24, 16))
    images = torch.from_numpy(drawn).float() / 2 + 0.5
    with torch.no_grad():
        bits = model.encode(images).bits
        model.encoder.scale = model.decoder.scale = None
        recorded_bits = {"s96.bits": bits, "snone.bits": model.encode(images).bits}
        found = {name: value.clone() for name, value in instella.run(case)}
    assert set(found) == set(tensors)
    monkeypatch.undo()
    save_file({name: value.contiguous() for name, value in found.items()}, path.with_suffix(".safetensors"))
    assert all(row.passed for row in verify(path))
    assert found["s96.enc_block2"].shape == (2, 6, 11)  # 6 latent tokens and 3×2 patches, 32 channels
    assert found["s96.recon_8x24"].shape == (1, 3, 8, 24)
    assert torch.equal(found["s96.bits"].bool(), bits)
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors["s96.bits"][0, 0, 0] = 1 - tensors["s96.bits"][0, 0, 0]
    save_file(tensors, path.with_suffix(".safetensors"))
    assert "s96.bits" in [row.name for row in verify(path) if not row.passed]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The json of a case of two variants, s96 and snone, and its tensors as recorded from this model."""
    from vistok.eval.parity import instella
    from vistok.eval.parity.case import Case

    with pytest.MonkeyPatch.context() as patch:
        path, tensors = recorded_case(tmp_path_factory.mktemp("recorded"))
        tensors = {name: value for name, value in tensors.items() if "_8x24" not in name}
        tensors |= {name.replace("s96", "snone"): value.clone() for name, value in tensors.items()}
        tensors |= {name: torch.zeros(1) for name in ("rope8.cos_fp32", "rope8.sin_fp32")}
        data = json.loads(path.read_text())
        texts = data["tensors"].items()
        data["tensors"] |= {name.replace("s96", "snone"): text for name, text in texts}
        data["tensors"]["rope8.cos_fp32"] = "(6+12,16) rotary table, H=3, W=4, scale=5, stored [::2]"
        path.write_text(json.dumps(data))
        save_file(tensors, path.with_suffix(".safetensors"))
        model = Case.open(path).build(lambda: create("instella", **data["config"]))
        drawn = np.random.RandomState(7).uniform(-1, 1, (2, 3, 24, 16)).astype(np.float32)
        bits = {}
        for tag, scale in (("s96", 96), ("snone", None)):
            model.encoder.scale = scale
            with torch.no_grad():
                bits[f"{tag}.bits"] = model.quantizer.encode(model.encoder(torch.from_numpy(drawn)))
        patch.setattr(Case, "recorded", lambda self, name: bits[name])
        with torch.no_grad():
            outputs = {name: value.clone().contiguous() for name, value in instella.run(Case.open(path))}
    assert set(outputs) == set(tensors)
    return data, outputs


def verified(folder, data, tensors):
    """The outcome of a case: which tensors were compared, and which of them did not pass."""
    (folder / "case.json").write_text(json.dumps(data))
    save_file(tensors, folder / "case.safetensors")
    rows = verify(folder / "case.json")
    return {row.name for row in rows}, [row.name for row in rows if not row.passed]


def untagged(data, tensors, tag):
    """The same case with the tensors of one variant, under names without it."""
    table = {"enc_block2": data["tensors"]["s96.enc_block2"], "dec_block1": data["tensors"]["s96.dec_block1"]}
    own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{tag}.")}
    return {**data, "tensors": table}, own


@pytest.mark.parametrize("tag", ["s96", "snone"])
def test_a_case_may_record_one_variant(recording, tmp_path, tag):
    data, tensors = recording
    own = {name: value for name, value in tensors.items() if name.startswith(f"{tag}.")}
    table = {name: text for name, text in data["tensors"].items() if name in own}
    compared, missed = verified(tmp_path, {**data, "tensors": table}, own)
    assert (compared, missed) == (set(own), [])


@pytest.mark.parametrize(
    ("tag", "change"),
    [
        ("snone", {}),
        ("s96", {"tensors": {"logits": "projection with set_scale=96"}}),
        ("s96", {"config": {"scale": 96}}),
    ],
)
def test_a_case_may_record_no_variant(recording, tmp_path, tag, change):
    data, own = untagged(*recording, tag)
    data = {**data, **{field: {**data[field], **values} for field, values in change.items()}}
    assert verified(tmp_path, data, own) == (set(own), [])
    if change:
        _, missed = verified(tmp_path, untagged(*recording, tag)[0], own)  # the scale matters
        assert "logits" in missed


def test_a_case_may_hold_rotary_tables_alone(recording, tmp_path):
    data, tensors = recording
    own = {name: value for name, value in tensors.items() if name.startswith("rope8.")}
    table = {"rope8.cos_fp32": data["tensors"]["rope8.cos_fp32"]}
    del (data := dict(data))["state_dict"]
    assert verified(tmp_path, {**data, "tensors": table}, own) == (set(own), [])


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (("encoder",), {"enc_block2", "enc_down"}),
        (("encoder", "quantizer"), {"enc_block2", "enc_down", "logits", "bits"}),
        (("decoder", "quantizer", "to_pixel"), {"dec_block1", "dec_up", "recon"}),
        (("decoder", "quantizer"), {"dec_block1", "dec_up"}),
    ],
)
def test_a_case_may_pin_a_part(recording, tmp_path, parts, names):
    data, own = untagged(*recording, "snone")
    state = {key: entry for key, entry in data["state_dict"].items() if key.split(".")[0] in parts}
    table = {name: text for name, text in data["tensors"].items() if name in names}
    own = {name: value for name, value in own.items() if name in names}
    data = {**data, "state_dict": state}
    if "encoder" not in parts:
        own["bits"] = recording[1]["snone.bits"]
        table |= {"bits": "input of the decoder", "dec_up": "decoder output at H=6,W=4"}
        del data["inputs"]
    compared, missed = verified(tmp_path, {**data, "tensors": table}, own)
    assert (compared, missed) == (names, [])
    changed = {name: value + 1 for name, value in own.items() if value.is_floating_point()}
    assert set(verified(tmp_path, {**data, "tensors": table}, own | changed)[1]) == set(changed)


def test_generator_cases_are_named_as_not_built(tmp_path):
    path, tensors = recorded_case(
        tmp_path, "generators_tiny", state_dict={"ar:x_embedder.weight": ["float32", [4, 4]]}
    )
    save_file(tensors, path.with_suffix(".safetensors"))
    with pytest.raises(CannotBuild, match=r"generators_tiny.*not in this version"):
        verify(path)


def test_a_list_of_sizes_is_encoded_and_decoded_as_its_images_are_alone():
    model = tiny_tokenizers.shared("instella")
    multiple = model.size_multiple
    sides = ((multiple, 2 * multiple), (2 * multiple, multiple), (multiple, 2 * multiple))
    generator = torch.Generator().manual_seed(4)
    images = [torch.rand(3, *size, generator=generator) for size in sides]
    tokens = model.encode(images)
    decoded = model.decode(tokens, size=list(sides))
    assert [tuple(image.shape[1:]) for image in decoded] == list(sides)
    for row, (image, size) in enumerate(zip(images, sides, strict=True)):
        alone = model.encode(image[None])
        assert torch.equal(tokens.bits[row], alone.bits[0])
        torch.testing.assert_close(decoded[row], model.decode(alone, size=size)[0], rtol=1e-4, atol=1e-5)
    again = model.reconstruct(images)
    assert all(torch.equal(a, b) for a, b in zip(again, decoded, strict=True))
    assert len(model.encode([])) == 0 and model.decode(model.encode([]), size=[]) == []
    with pytest.raises(ValueError, match="2 sizes were given for 3 images"):
        model.decode(tokens, size=list(sides[:2]))
    with pytest.raises(ValueError, match=r"image 1 of the list is \[1, 3"):
        model.encode([images[0], images[1][None]])
    with pytest.raises(ValueError, match="multiples of"):
        model.encode([images[0], images[1][:, :-1]])
