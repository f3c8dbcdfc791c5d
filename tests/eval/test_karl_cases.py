"""Parity cases of KARL: a training step on the VAE, runs, and a decoder alone."""

import json

import numpy as np
import pytest
import tiny_tokenizers
import torch
from safetensors.torch import save_file

from vistok import create
from vistok.eval.parity.case import CannotBuild, fill
from vistok.eval.parity.verify import verify

pytestmark = pytest.mark.usefixtures("small_and_quick")
SIDE = 16
IMAGES = (
    "r=np.random.RandomState(40); img0=r.uniform(0,1,(3,16,16)); "
    "img1=np.kron(r.uniform(0,1,(3,4,4)),np.ones((1,4,4)))"
)
INPUTS = {"images": IMAGES, "vae_noise": "np.random.RandomState(504).standard_normal((1,8,4,4))"}


def pictures():
    random = np.random.RandomState(40)
    first = random.uniform(0, 1, (3, SIDE, SIDE))
    second = np.kron(random.uniform(0, 1, (3, 4, 4)), np.ones((1, 4, 4)))
    return [torch.from_numpy(each.astype(np.float32))[None] for each in (first, second)]


def filled(name):
    """A small model with the weights of a case of seed 3, and its configuration."""
    config = {**tiny_tokenizers.CASES[name][1], "image_size": SIDE}
    model = create("karl", **config)
    model.load_state_dict({key: fill(key, value.shape, 3) for key, value in model.state_dict().items()})
    return model.eval(), json.loads(json.dumps(config))


def write(folder, config, state, tensors, **fields):
    data = {
        "family": "karl",
        "config": config,
        "seed": 3,
        "keep": [],
        "state_dict": {key: ["float32", list(value.shape)] for key, value in state.items()},
        "tensors": dict.fromkeys(tensors, ""),
        "inputs": INPUTS,
        "rtol": 1e-4,
        "atol": 1e-5,
        **fields,
    }
    (folder / "case.json").write_text(json.dumps(data))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "case.safetensors")
    return folder / "case.json"


def missed(path):
    return [row.name for row in verify(path) if not row.passed]


def test_the_code_loss_of_a_training_step_on_the_vae_is_compared(tmp_path):
    model, config = filled("karl-vae")
    images = pictures()[1]
    noise = torch.from_numpy(np.random.RandomState(504).standard_normal((1, 8, 4, 4)).astype(np.float32))
    with torch.no_grad():
        mean, logvar = model.base.moments(images).chunk(2, 1)
        scaled = 0.2325 * (mean + (logvar.clamp(-30, 20) / 2).exp() * noise)
        analysis = model.analyse(images, model.target_bins(0.03, 1), 6, scaled)
        output = model.draw(analysis.values, torch.arange(6)[None])
        code = (output.transpose(1, 2).reshape(scaled.shape) - scaled).square().mean()
        active = torch.nn.functional.softplus(analysis.halt_logits).mean()
    config |= {"stage": "latent_distillation_pretrain", "T": 6, "epsilon": 0.03}
    tensors = {"eic.code_loss_6_0": code, "eic.latent_token_active_loss_bce_6_0": active}
    tensors |= {"eic.total": code + active, "eic.quantization_loss_6": torch.zeros(1)}
    inputs = {**INPUTS, "images": f"{IMAGES}; image 1"}
    assert missed(write(tmp_path, config, model.state_dict(), tensors, inputs=inputs)) == []
    tensors["eic.code_loss_6_0"] = code * 1.01
    path = write(tmp_path, config, model.state_dict(), tensors, inputs=inputs)
    assert missed(path) == ["eic.code_loss_6_0"]
    tensors = {"eic.nll_loss_6_0": code}
    with pytest.raises(CannotBuild, match="no loss for the recorded nll_loss_6_0"):
        verify(write(tmp_path, config, model.state_dict(), tensors, inputs=inputs))


@pytest.mark.parametrize("name", ["karl-vae", "karl-vqgan-vq"])
def test_runs_are_compared_with_or_without_a_list_of_them(tmp_path, name):
    model, config = filled(name)
    images = pictures()[0]
    features = None
    if name == "karl-vae":
        noise = torch.from_numpy(np.random.RandomState(504).standard_normal((1, 8, 4, 4)).astype(np.float32))
        features = model.base.features(images, noise)
    with torch.no_grad():
        features = model.base.features(images) if features is None else features
        analysis = model.analyse(images, model.target_bins(0.05, 1), 12, features)
    tensors = {"latent": analysis.hidden, "factorized": analysis.values, "active": analysis.active.byte()}
    tensors = {f"im0.T12.e0.05.{key}": value.detach() for key, value in tensors.items()}
    for runs in ({}, {"runs": [[0, 12, 0.05]]}):
        assert missed(write(tmp_path, config | runs, model.state_dict(), tensors)) == []
    for runs in ([], [[0, 12]], "all", [[1, 12, 0.05]], [[0, 12, 0.05], [0, 6, 0.05]]):
        with pytest.raises(CannotBuild, match=r"case\.json: runs"):
            verify(write(tmp_path, config | {"runs": runs}, model.state_dict(), tensors))


def test_a_decoder_alone_is_run_on_recorded_codes(tmp_path):
    model, config = filled("karl-vqgan-vq")
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(
            ("decoder", "quantize.", "base_tokenizer.vqgan.decoder", "base_tokenizer.vqgan.quant")
        )
    }
    indices = torch.arange(12)[None]
    active = torch.tensor([[1, 0, 1, 1] * 3], dtype=torch.uint8)
    places = active[0].nonzero()[:, 0]
    with torch.no_grad():
        values = model.quantize.decode(indices)
        logits = model.draw(values[:, places], places[None])
        recon = model.render(logits)
    prefix = "im0.T12.e0.05"
    tensors = {"indices": indices.int(), "active": active, "decoder_logits": logits, "recon": recon}
    tensors |= {"l1": (recon - pictures()[0]).abs().mean((1, 2, 3))}
    tensors = {f"{prefix}.{key}": value for key, value in tensors.items()}
    path = write(tmp_path, config, state, tensors)
    compared = {f"{prefix}.{key}" for key in ("decoder_logits", "recon", "l1")}
    assert {row.name for row in verify(path)} == compared
    assert missed(path) == []
    tensors[f"{prefix}.active"] = 1 - active
    assert set(missed(write(tmp_path, config, state, tensors))) == compared


def test_a_wide_image_on_the_vae_is_compared(tmp_path):
    model, config = filled("karl-vae")
    recipe = IMAGES.replace(f"(3,{SIDE},{SIDE})", f"(3,{SIDE},{2 * SIDE})")
    assert recipe != IMAGES
    inputs = {"images": recipe, "vae_noise": "np.random.RandomState(504).standard_normal((1,8,4,8))"}
    image = np.random.RandomState(40).uniform(0, 1, (3, SIDE, 2 * SIDE)).astype(np.float32)
    images = torch.from_numpy(image)[None]
    noise = torch.from_numpy(np.random.RandomState(504).standard_normal((1, 8, 4, 8)).astype(np.float32))
    with torch.no_grad():
        features = model.base.features(images, noise)
        analysis = model.analyse(images, model.target_bins(0.05, 1), 12, features)
        active = torch.tensor([[1, 0, 1, 1] * 3], dtype=torch.uint8)
        places = active[0].nonzero()[:, 0]
        drawn = model.draw(analysis.values[:, places], places[None], size=(SIDE, 2 * SIDE))
        recon = model.render(drawn, (SIDE, 2 * SIDE))
    tensors = {"factorized": analysis.values, "decoder_out": drawn, "recon": recon}
    tensors |= {"l1": (recon - images).abs().mean((1, 2, 3))}
    tensors = {f"im0.T12.e0.05.{name}": value for name, value in tensors.items()}
    recorded = tensors | {"im0.T12.e0.05.active": active}
    path = write(tmp_path, config, model.state_dict(), recorded, inputs=inputs)
    rows = {row.name: row.passed for row in verify(path)}
    assert all(rows[name] for name in tensors)
