"""KL-16: what is special about it beside the matrix of all tokenizers."""

import json

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_tokenizers import SIDE, build, pictures, shared

import vistok
from vistok import create
from vistok.eval.parity.verify import verify
from vistok.registry import families

pytestmark = pytest.mark.usefixtures("small_and_quick")


def test_images_of_other_shapes_keep_their_grid():
    model = shared("kl16-vae")
    tokens = model.encode(torch.rand(2, 3, SIDE, 2 * SIDE))
    assert tokens.grid == (4, 8) and tokens.latents.shape == (2, 32, 4)
    assert model.decode(tokens).shape == (2, 3, SIDE, 2 * SIDE)


def test_tokens_are_the_means_of_the_posterior_row_by_row():
    model, images = shared("kl16-vae"), pictures(2)
    mean = model.moments(images)[:, :4]
    latents = model.encode(images).latents
    for row in range(4):
        for column in range(4):
            assert torch.equal(latents[:, 4 * row + column], mean[:, :, row, column])


def test_training_draws_from_the_posterior():
    model, images = build("kl16-vae"), pictures(1).repeat(200, 1, 1, 1)
    with torch.no_grad():
        output = model(images)
        means, log_variances = model.latents(images)[0].chunk(2, -1)
    torch.testing.assert_close(output.codes.mean(0), means, atol=0.5, rtol=0)
    spread = output.codes.std(0) / (log_variances / 2).exp()
    assert float((spread - 1).abs().max()) < 0.3
    assert set(output.losses) == {"kl"} and output.images.shape == images.shape


def test_the_scale_of_generators_is_not_in_the_tokens():
    model = shared("kl16-vae")
    latents = model.encode(pictures(2)).latents
    assert torch.equal(model.normalised(latents), 0.2325 * latents)
    torch.testing.assert_close(model.denormalised(model.normalised(latents)), latents)


def test_the_published_checkpoint_is_recognised_by_its_shapes(tmp_path):
    model = build("kl16-vae")
    discriminator = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save({"model": {**model.state_dict(), **discriminator}}, tmp_path / "kl16.ckpt")
    loaded = vistok.load(tmp_path / "kl16.ckpt")
    assert loaded.family == "kl16" and loaded.image_size == 256
    assert torch.equal(loaded.encode(pictures(1)).latents, model.encode(pictures(1)).latents)


def test_no_other_family_recognises_the_weights():
    for name in ("kl16-vae", "maskgit-vqgan"):
        shapes = {key: value.shape for key, value in shared(name).state_dict().items()}
        assert [each for each, cls in families().items() if cls.recognise(shapes, None) is not None] == [
            name.removesuffix("-vae")
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": False}, "double_z is False; a KL autoencoder has true"),
        ({"ch_mult": ()}, "ch_mult is"),
        ({"ch_mult": (1,) * 11}, "ch_mult has 11 levels; it takes up to 10"),
        ({"image_size": 100}, "image_size is 100; it must be a multiple of factor, 16"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"z_channels": 0}, "z_channels is 0"),
    ],
)
def test_configurations_that_cannot_be_built_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        create("kl16", **change)


@pytest.mark.slow
def test_a_changed_recording_is_a_miss(tmp_path):
    path = GOLDEN / "xar_kl16_vae.json"
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors["moments_std"].view(-1)[3] *= 1.01
    (tmp_path / "case.json").write_text(json.dumps(json.loads(path.read_text())))
    save_file(tensors, tmp_path / "case.safetensors")
    assert [row.name for row in verify(tmp_path / "case.json") if not row.passed] == ["moments_std"]
