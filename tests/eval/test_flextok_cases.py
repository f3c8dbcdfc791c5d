"""Parity cases of FlexTok that pin a part of it, or images of several sizes."""

import copy
import json

import numpy as np
import pytest
import torch
from paths import GOLDEN
from safetensors.torch import save_file

from vistok.eval.parity.case import CannotBuild, fill
from vistok.eval.parity.verify import verify
from vistok.models.flextok.model import FlexTok, FlexTokConfig

PUBLISHED = json.loads((GOLDEN / "flextok_d12_d12.json").read_text())["config"]
SIZES = [(8, 16), (16, 12)]
FIELDS = {
    "encoder_dim": 64,
    "encoder_depth": 2,
    "decoder_dim": 96,
    "decoder_depth": 3,
    "head_dim": 32,
    "num_tokens": 8,
    "levels": [4, 5, 3],
    "latent_channels": 4,
    "latent_size": 8,
    "vae_block_out_channels": [8, 16],
    "vae_layers_per_block": 1,
    "vae_norm_num_groups": 4,
    "vae_scaling_factor": 0.7,
}


def graph():
    """The published graph of modules at a width of 64, with 8 registers and 8×8 latents."""
    text = json.dumps(PUBLISHED).replace("768", "64").replace("[16, 16]", "[4, 4]").replace("256", "8")
    config = json.loads(text)
    config["decoder"]["module_dict"]["dec_time_embedder"]["frequency_embedding_size"] = 256
    for side in ("enc", "dec"):
        config[f"{side}oder"]["module_dict"][f"{side}_transformer"]["depth"] = 2
    return config


def filled(model):
    """The model with the weights of a case of seed 5; position tables keep their values."""
    state = {
        key: value if "grid" in key or (key.endswith("posemb_module.posembs") and "registers" not in key)
        else fill(key, value.shape, 5)
        for key, value in model.state_dict().items()
    }  # fmt: skip
    model.load_state_dict(state)
    return model.eval()


def write(folder, config, state, tensors, table=None, **fields):
    data = {
        "family": "flextok",
        "config": config,
        "seed": 5,
        "keep": ["enc_posemb_module.posembs", "dec_patches_posemb_module.posembs"],
        "state_dict": {key: ["float32", list(value.shape)] for key, value in state.items()},
        "tensors": {name: "" for name in tensors} | (table or {}),
        "rtol": 1e-4,
        "atol": 1e-5,
        **fields,
    }
    (folder / "case.json").write_text(json.dumps(data))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "case.safetensors")
    return folder / "case.json"


def outcome(path):
    """Which tensors were compared, and which of them did not pass."""
    rows = verify(path)
    return {row.name for row in rows}, [row.name for row in rows if not row.passed]


def drawn(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def of_part(model, prefix):
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}


# ---- a decoder alone ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder():
    """The model of the graph without its VAE, and what its decoder gives two images at times 0.75 and 0.3."""
    model = filled(FlexTok(FlexTokConfig(**{**vars(FlexTokConfig.parse(graph())), "vae": False})))
    noise, registers = drawn(3, 2, 16, 8, 8), drawn(4, 2, 8, 6).tanh()
    with torch.no_grad():
        modulations = model.decoder.modulations(torch.tensor([0.75, 0.3]))
        (full,) = model.decoder(noise, modulations, [model.decoder.conditions(registers)])
        kept = model.decoder.conditions(registers, torch.tensor([2, 5]))
        (few,) = model.decoder(noise, modulations, [kept])
        options = {"steps": 2, "guidance": 3.0, "normalized": False, "size": 64}
        latents, lengths = registers[:1].expand(2, -1, -1), torch.tensor([1, 8])
        decoded = model.sample(latents, lengths, noise=noise, **options)
    tensors = {"quantized": registers, "velocity_full": full[:, :, ::2, ::2]}
    tensors |= {"velocity_keep": few[:, :, ::2, ::2], "decode_cfg3_T2": decoded[:, :, ::2, ::2]}
    return model, tensors


TABLE = {
    "velocity_full": "sample 0 at t=0.75 and sample 1 at t=0.3, [:, :, ::2, ::2]",
    "velocity_keep": "same, eval_keep_k=[2,5], [:, :, ::2, ::2]",
    "decode_cfg3_T2": "image 0 truncated to k=1,8, [:, :, ::2, ::2]",
}
NOISE = {"noise": "np.random.RandomState(3).standard_normal((2,16,8,8)).astype(float32)"}


@pytest.mark.parametrize("named", [True, False])
def test_a_decoder_alone_is_run(decoder, tmp_path, named):
    model, tensors = decoder
    config, state = {"decoder": graph()["decoder"]}, of_part(model, "decoder.")
    if not named:  # weights under keys without the side, which are filled by those
        bare = copy.deepcopy(model)
        state = {key.removeprefix("decoder."): value for key, value in state.items()}
        for key, value in state.items():
            if "dec_patches_posemb" not in key:
                bare.state_dict()[f"decoder.{key}"].copy_(fill(key, value.shape, 5))
        with torch.no_grad():
            modulations = bare.decoder.modulations(torch.tensor([0.75, 0.3]))
            conditions = [bare.decoder.conditions(tensors["quantized"])]
            (full,) = bare.decoder(drawn(3, 2, 16, 8, 8), modulations, conditions)
        config = config["decoder"]
        tensors = {"quantized": tensors["quantized"], "velocity_full": full[:, :, ::2, ::2]}
    table = {name: text for name, text in TABLE.items() if name in tensors}
    path = write(tmp_path, config, state, tensors, table, inputs=NOISE)
    assert outcome(path) == (set(tensors) - {"quantized"}, [])
    changed = tensors | {"velocity_full": tensors["velocity_full"] * 1.01}
    assert outcome(write(tmp_path, config, state, changed, table, inputs=NOISE))[1] == ["velocity_full"]


def test_a_decoder_alone_that_lacks_a_module_is_refused(decoder, tmp_path):
    model, tensors = decoder
    state = of_part(model, "decoder.")
    state = {key: value for key, value in state.items() if "dec_time_embedder" not in key}
    path = write(tmp_path, {"decoder": graph()["decoder"]}, state, tensors, TABLE, inputs=NOISE)
    with pytest.raises(CannotBuild, match=r"case\.json: .*dec_time_embedder"):
        verify(path)


# ---- an encoder alone, with images of several sizes --------------------------------------------------------


def test_an_encoder_alone_is_run_on_latents_of_several_sizes(decoder, tmp_path):
    model, _ = decoder
    encoded = [drawn(6, 1, 16, 4, 8), drawn(7, 1, 16, 8, 6)]
    with torch.no_grad():
        latents = [model.encoder(each, 8) for each in encoded]
    tensors = {f"vae_latents_{number}": value for number, value in enumerate(encoded)}
    config = {name: graph()[name] for name in ("encoder", "regularizer")}
    tensors |= {"latents": torch.cat(latents), "latents_1": latents[1][0]}
    tensors["indices"] = model.quantizer.encode(tensors["latents"]).int()
    path = write(tmp_path, config, of_part(model, "encoder."), tensors)
    assert outcome(path) == ({"latents", "latents_1", "indices"}, [])
    tensors["indices"] = tensors["indices"].flip(0)
    assert outcome(write(tmp_path, config, of_part(model, "encoder."), tensors))[1] == ["indices"]


# ---- whole tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False])
def test_a_tokenizer_is_run_on_images_of_several_sizes(tmp_path, stored):
    model = filled(FlexTok(FlexTokConfig.parse(FIELDS)))
    random = np.random.RandomState(9)
    cells = [random.uniform(-1, 1, (1, 3, h // 8, w // 8)) for h, w in ((8, 16), (16, 8))]
    images = [torch.from_numpy(each.astype(np.float32).repeat(8, 2).repeat(8, 3)) for each in cells]
    noise = [drawn(10, 4, 4, 8), drawn(11, 4, 8, 4)]
    with torch.no_grad():
        encoded = [model.autoencoder.encode(image) for image in images]
        latents = torch.cat([model.encoder(each, 8) for each in encoded])
        indices = model.quantizer.encode(latents)
        registers = model.quantizer.decode(indices)
        velocities = [
            model.decoder(
                each[None],
                model.decoder.modulations(time),
                [model.decoder.conditions(registers[row : row + 1])],
            )[0]
            for row, (each, time) in enumerate(zip(noise, torch.tensor([[0.9], [0.2]]), strict=True))
        ]
        sampled = model.sample(registers[1:], steps=2, guidance=1.0, noise=noise[1][None], size=(16, 8))
        recon = model.autoencoder.decode(sampled)
    tensors = {
        "indices": indices,
        "latents": latents,
        "vae_latents_0": encoded[0],
        "vae_latents_1": encoded[1],
    }
    tensors |= {f"velocity_full_{row}": value[:, :, ::2, ::2] for row, value in enumerate(velocities)}
    tensors |= {"decode_plain_T2_1": sampled[:, :, ::2, ::2], "recon_plain_T2_1": recon[:, :, ::4, ::4]}
    tensors |= {f"noise_{row}": each for row, each in enumerate(noise)}
    compared = {name for name in tensors if not name.startswith("noise")}
    inputs = {"images": {"S": 9, "B": 2, "N": [[8, 16], [16, 8]]}, "times": [0.9, 0.2]}
    if stored:
        tensors |= {f"images_{row}": image for row, image in enumerate(images)}
        del inputs["images"]
    path = write(tmp_path, FIELDS, model.state_dict(), tensors, inputs=inputs)
    assert outcome(path) == (compared, [])
    for name in compared:
        changed = tensors[name] + 1 if name == "indices" else tensors[name] * 1.1 + 0.1
        path = write(tmp_path, FIELDS, model.state_dict(), tensors | {name: changed}, inputs=inputs)
        if name == "indices":
            changed %= 60
            path = write(tmp_path, FIELDS, model.state_dict(), tensors | {name: changed}, inputs=inputs)
        assert name in outcome(path)[1]


def test_a_configuration_cannot_ask_for_more_than_its_weights(tmp_path):
    model = FlexTok(FlexTokConfig.parse(FIELDS))
    for field in ("encoder_dim", "decoder_dim", "encoder_depth", "num_tokens", "latent_channels"):
        config = FIELDS | {field: 2**20}
        path = write(tmp_path, config, model.state_dict(), {"latents": torch.zeros(1)})
        refusal = r"case\.json: (.* keys differ|this configuration|.* it takes a number from 1)"
        with pytest.raises(CannotBuild, match=refusal):
            verify(path)
