"""SEED-1 and SEED-2: what is special about them beside the matrix of all tokenizers, and their renderers."""

import copy

import numpy as np
import pytest
import torch
from evaluated import save
from PIL import Image
from tiny_renderers import tiny_pipeline
from tiny_tokenizers import CASES, SIDE, build, fresh, pictures, shared
from torchvision import transforms

from vistok import create, load
from vistok.eval.options import CurvesConfig, ReconConfig
from vistok.eval.speed.plain_seed import variants
from vistok.eval.tasks import rate_distortion, reconstruction
from vistok.models.seed import SEED, SEEDConfig, merge_weights

pytestmark = pytest.mark.usefixtures("small_and_quick")
VARIANTS = ["seed-1", "seed-2"]
KIND = {"seed-1": "text", "seed-2": "unclip"}


# ---- codes -------------------------------------------------------------------------------------------------


def test_state_j_depends_on_queries_0_to_j_alone():
    model = build("seed-2")
    images = pictures(2)
    before = model.features(images)
    with torch.no_grad():
        model.query_tokens[:, 3].normal_()
    after = model.features(images)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert ((before - after).abs().amax((0, 2))[3:] > 1e-4).all()
    assert before.shape == (2, 6, 32)


def test_without_causality_every_state_depends_on_every_query():
    model = build("seed-2", causal=False)
    before = model.features(pictures(1))
    with torch.no_grad():
        model.query_tokens[:, 5].normal_()
    assert ((before - model.features(pictures(1))).abs().amax(2) > 1e-5).all()


def test_features_are_refused_for_images_that_encode_refuses():
    with pytest.raises(ValueError, match=r"span \[255, 255\]"):
        shared("seed-2").features(torch.full((1, 3, SIDE, SIDE), 255.0))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("keep_ratio", [False, True])
def test_preprocessing_is_torchvisions(keep_ratio, interpolation):
    random = np.random.RandomState(0)
    image = Image.fromarray(random.randint(0, 256, (50, 83, 3), dtype=np.uint8))
    mode = transforms.InterpolationMode(interpolation)
    resize = transforms.Resize(SIDE if keep_ratio else (SIDE, SIDE), mode)
    steps = [resize, *([transforms.CenterCrop(SIDE)] if keep_ratio else []), transforms.ToTensor()]
    expected = transforms.Compose(steps)(image)
    prepared = shared("seed-2").preprocess([image], keep_ratio=keep_ratio, interpolation=interpolation)
    assert torch.equal(prepared[0], expected)


def test_the_default_preprocessing_squeezes_the_whole_picture_and_others_give_other_codes():
    model = build("seed-2")
    wide = Image.fromarray((pictures(1, side=96)[0, :, :40] * 255).byte().permute(1, 2, 0).numpy())
    squeezed, cropped = model.preprocess([wide]), model.preprocess([wide], keep_ratio=True)
    assert not torch.equal(squeezed, cropped)
    assert model.preprocess([]).shape == (0, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="interpolation is 'nearest'; it is 'bicubic' or 'bilinear'"):
        model.preprocess([wide], interpolation="nearest")


@pytest.mark.parametrize("case", VARIANTS)
def test_codes_are_those_of_a_straightforward_encoder(case):
    model = shared(case)
    base, own = variants(model, pictures(3))
    assert torch.equal(base.encode(base.inputs), own.encode(own.inputs))


def test_the_embedding_of_the_reverse_q_former_is_that_of_its_one_query():
    model = build("seed-2", use_qformer_image=True, reverse_layers=2)
    assert not hasattr(model, "image_down")
    latents = model.quantize.decode(model.encode(pictures(2)).indices)
    with torch.no_grad():
        memory = model.blocks_image(model.decode_task_layer(latents) + model.pos_embed_image)
        state = model.Reverse_Qformer(model.reverse_tokens.expand(2, -1, -1), memory)
        text, image = model.conditions_of(latents)
    assert text is None
    assert state.shape == (2, 1, 32)
    torch.testing.assert_close(image, model.distill_image_proj(state[:, 0]))


# ---- checkpoints -------------------------------------------------------------------------------------------


def _without_heads(config):
    return {name: value for name, value in vars(config).items() if not name.endswith("_heads")}


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("seed-1", {}),
        ("seed-2", {"causal": False}),
        ("seed-2", {"use_qformer_image": True, "reverse_layers": 2, "causal": False}),
    ],
)
def test_the_variant_follows_from_the_keys(case, changes):
    model = fresh(case, **changes)
    config = SEED.recognise({key: value.shape for key, value in model.state_dict().items()}, None)
    built = SEEDConfig(**config)
    expected = _without_heads(model.config) | {"causal": False, "renderer_text_dim": 1024}
    if model.config.has_mlp_head:
        expected |= {"reverse_tokens": None, "reverse_layers": None}
    else:
        expected |= dict(zip(("reverse_tokens", "reverse_layers"), model.config.reverse, strict=True))
    if case == "seed-2":
        expected["text_features_dim"] = 768
    else:
        expected |= {"image_features_dim": 1024}
    assert _without_heads(built) == expected


def test_thirty_two_queries_are_causal():
    model = fresh("seed-2", num_query_token=32, image_features_dim=32)
    config = SEED.recognise({key: value.shape for key, value in model.state_dict().items()}, None)
    assert config["causal"]


def test_a_checkpoint_with_a_text_branch_loads_and_one_without_a_layer_names_it(tmp_path):
    model = build("seed-2")
    state = model.state_dict()
    text = {"Qformer.cls.predictions.bias": torch.zeros(3), "temp": torch.zeros(())}
    text["Qformer.bert.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(4, 32)
    text["Qformer.bert.encoder.layer.0.output.dense.weight"] = torch.zeros(32, 4)
    del state["Qformer.bert.embeddings.position_ids"]
    torch.save(state | text, tmp_path / "whole.pt")
    config = {"family": "seed", "config": CASES["seed-2"][1]}
    loaded = load(tmp_path / "whole.pt", config=config)
    assert torch.equal(loaded.encode(pictures(2)).indices, model.encode(pictures(2)).indices)
    del state["Qformer.bert.encoder.layer.1.attention.output.dense.weight"]
    torch.save(state | text, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"missing Qformer\.bert\.encoder\.layer\.1\.attention\.output"):
        load(tmp_path / "cut.pt", config=config)


def test_weights_in_several_files_are_joined_and_the_last_one_counts(tmp_path):
    model = build("seed-1")
    state = model.state_dict()
    vit = {k.removeprefix("visual_encoder."): v for k, v in state.items() if k.startswith("visual_encoder.")}
    rest = {k: v for k, v in state.items() if not k.startswith("visual_encoder.")}
    unused = {"norm.weight": torch.zeros(3), "blocks.39.norm1.weight": torch.zeros(3)}
    torch.save(vit | unused, tmp_path / "vit.pth")
    torch.save({"model": rest | {"ln_vision.weight": torch.zeros(32)}}, tmp_path / "causal_qformer.pth")
    torch.save({"model": rest}, tmp_path / "seed_tokenizer.pth")
    names = ("vit.pth", "causal_qformer.pth", "seed_tokenizer.pth")
    merge_weights(tmp_path / "seed.safetensors", *(tmp_path / name for name in names))
    loaded = load(tmp_path / "seed.safetensors", config={"family": "seed", "config": CASES["seed-1"][1]})
    assert torch.equal(loaded.ln_vision.weight, model.ln_vision.weight)
    assert torch.equal(loaded.encode(pictures(2)).indices, model.encode(pictures(2)).indices)
    with pytest.raises(ValueError, match="no weights to merge"):
        merge_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit_heads": 5}, "vit_width is 32; it must be a multiple of vit_heads, 5"),
        ({"image_size": 30}, "a multiple of patch, 8"),
        ({"image_features_dim": 25}, "a multiple of num_query_token, 6"),
        ({"variant": "seed3"}, "variant is 'seed3'"),
        ({"reverse_tokens": 2}, "SEED-2 has one embedding"),
        ({"reverse_layers": 0}, "reverse_layers is 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fresh("seed-2", **change)


# ---- training ----------------------------------------------------------------------------------------------


def test_a_quarter_of_the_codebook_loss_is_on_the_codebook():
    model, images = shared("seed-1"), pictures(2)
    with torch.no_grad():
        z = model.latents(images)
        losses = model(images).losses
        distance = (z - model.quantize.decode(model.quantize.encode(z))).square().mean()
    assert losses["commitment"] == pytest.approx(5 * float(distance), rel=1e-5)
    assert losses["codebook"] == pytest.approx(1.25 * float(distance), rel=1e-5)
    assert set(losses) == {"commitment", "codebook"}


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets have shape \[2, 5\]; these images decode to \[2, 24\]"):
        shared("seed-2")(pictures(2), torch.zeros(2, 5))


# ---- pictures ----------------------------------------------------------------------------------------------


def _bare(case):
    """The tokenizer without its renderer."""
    model = copy.deepcopy(shared(case))
    model._companions.clear()
    return model


@pytest.mark.parametrize("case", VARIANTS)
def test_without_a_renderer_the_error_says_how_to_attach_one(case):
    model = _bare(case)
    tokens = model.encode(pictures(2))
    with pytest.raises(ValueError, match=rf"attach_renderer\('{model.renderer_name}'\), or give a folder"):
        model.decode(tokens)
    text, image = model.embeddings(tokens)
    assert (text.shape if image is None else image.shape) == ((2, 5, 16) if case == "seed-1" else (2, 24))


def _pipelines_picture(case, model, tokens, noise, steps, guidance, opposite=None):
    """The picture of diffusers' own pipeline for the same conditions and noise."""
    pipeline = copy.deepcopy(tiny_pipeline(KIND[case]))
    pipeline.set_progress_bar_config(disable=True)
    text, image = model.embeddings(tokens)
    options = {"latents": noise, "num_inference_steps": steps, "guidance_scale": guidance}
    options |= {"output_type": "pt"}
    if case == "seed-1":
        return pipeline(prompt_embeds=text, negative_prompt="", **options).images
    # The pipeline draws the embedding's noise from its generator; the picture's is given.
    generator = torch.Generator().manual_seed(7)
    return pipeline(prompt=[""], image_embeds=image, generator=generator, **options).images


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize(("steps", "guidance"), [(4, 3.0), (3, 1.0)])
def test_pictures_are_those_of_diffusers_pipelines(case, steps, guidance):
    model = shared(case)
    tokens = model.encode(pictures(1))
    noise = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(5))
    expected = _pipelines_picture(case, model, tokens, noise, steps, guidance)
    options = {"steps": steps, "guidance": guidance, "noise": noise}
    picture = model.decode(tokens, generator=torch.Generator().manual_seed(7), **options)
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", VARIANTS)
def test_defaults_are_the_originals(case):
    model = shared(case)
    tokens = model.encode(pictures(1))
    steps, guidance = (50, 7.5) if case == "seed-1" else (20, 10)
    assert torch.equal(model.decode(tokens), model.decode(tokens, steps=steps, guidance=guidance))


@pytest.mark.parametrize("case", VARIANTS)
def test_a_generator_decides_the_picture_and_every_image_has_its_own(case):
    model = shared(case)
    tokens = model.encode(pictures(6))

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    together = model.decode(tokens, steps=2, generator=[seeded(seed) for seed in range(6)])
    alone = model.decode(tokens[5], steps=2, generator=seeded(5))
    torch.testing.assert_close(together[5:], alone, rtol=1e-4, atol=1e-5)
    assert (model.decode(tokens[5], steps=2, generator=seeded(6)) - alone).abs().max() > 1e-2
    assert torch.equal(model.decode(tokens[5], steps=2), model.decode(tokens[5], steps=2))
    with pytest.raises(ValueError, match="5 generators were given for 6 images"):
        model.decode(tokens, steps=2, generator=[seeded(seed) for seed in range(5)])


def test_guidance_leads_away_from_negative_codes():
    model = shared("seed-2")
    tokens = model.encode(pictures(2))
    options = {"steps": 2, "guidance": 4.0}
    plain = model.decode(tokens[0], **options)
    away = model.decode(tokens[0], negative=tokens[1], **options)
    assert (plain - away).abs().max() > 1e-4
    # Away from itself, guidance has no direction.
    itself = model.decode(tokens[0], negative=tokens[0], **options)
    unguided = model.decode(tokens[0], steps=2, guidance=1.0)
    torch.testing.assert_close(itself, unguided, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="negative tokens are of 2 images for 1"):
        model.decode(tokens[0], negative=tokens)
    first = shared("seed-1")
    with pytest.raises(ValueError, match="leave negative out"):
        first.decode(first.encode(pictures(1)), negative=first.encode(pictures(1)))


def test_the_noise_of_the_embedding_counts_at_level_0():
    model = shared("seed-2")
    tokens = model.encode(pictures(1))
    noise = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(5))
    images = [
        model.decode(tokens, steps=2, noise=noise, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_a_picture_is_resized_to_the_size_asked_for():
    model = shared("seed-2")
    tokens = model.encode(pictures(1))
    assert model.decode(tokens, steps=1, size=20).shape == (1, 3, 20, 20)
    assert model.decode(tokens, steps=1, size=(20, 30)).shape == (1, 3, 20, 30)


def test_a_renderer_of_another_size_draws_it_and_refuses_tiles():
    model = _bare("seed-2")
    model.attach_renderer(tiny_pipeline("unclip"), size=48)
    assert model.decode(model.encode(pictures(1)), steps=1).shape == (1, 3, 48, 48)
    with pytest.raises(ValueError, match="reads 32 pixels and its renderer draws 48"):
        model.encode_tiles(torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "an integer of 1 or more; got 0"),
        ({"steps": 2.5}, "an integer of 1 or more; got 2.5"),
        ({"guidance": float("nan")}, "guidance is a finite number"),
        ({"guidance": "strong"}, "guidance is a finite number"),
        ({"noise": torch.zeros(1, 4, 3, 3)}, r"noise of shape \[1, 4, 3, 3\].*\[1, 4, 16, 16\] is needed"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    model = shared("seed-2")
    with pytest.raises(ValueError, match=message):
        model.decode(model.encode(pictures(1)), **options)


def test_the_progress_bar_is_shown_when_asked_for(capsys):
    model = shared("seed-2")
    tokens = model.encode(pictures(1))
    model.decode(tokens, steps=2)
    assert "denoising" not in capsys.readouterr().err
    model.decode(tokens, steps=2, progress=True)
    assert "denoising" in capsys.readouterr().err


# ---- where renderers come from -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIANTS)
def test_a_renderer_is_read_from_a_folder(case, tmp_path):
    model = _bare(case)
    tiny_pipeline(KIND[case]).save_pretrained(tmp_path)
    model.attach_renderer(tmp_path)
    tokens = model.encode(pictures(1))
    assert torch.equal(model.decode(tokens, steps=2), shared(case).decode(tokens, steps=2))


def test_a_renderer_that_is_not_there_is_named(tmp_path, offline):
    model = _bare("seed-2")
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        model.attach_renderer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"another repository.*given as hf://owner/name"):
        model.attach_renderer("owner/name")
    with pytest.raises(FileNotFoundError, match=r"cannot be read or fetched.*give the folder"):
        model.attach_renderer("stabilityai/stable-diffusion-2-1-unclip")
    with pytest.raises(ValueError, match="is not a hub repository"):
        model.attach_renderer("hf://one")
    with pytest.raises(ValueError, match="a folder or a hub repository; got int"):
        model.attach_renderer(3)


def test_another_kind_of_pipeline_is_refused():
    with pytest.raises(ValueError, match=r"a StableDiffusionPipeline was given.*StableUnCLIPImg2ImgPipeline"):
        _bare("seed-2").attach_renderer(tiny_pipeline("text"))
    with pytest.raises(ValueError, match=r"CLIP embeddings of width 30; the tokenizer gives .* width 24"):
        _bare("seed-2").attach_renderer(tiny_pipeline("unclip", image_width=30))
    with pytest.raises(ValueError, match=r"text states of width 8 alone; the tokenizer gives .* 16 alone"):
        _bare("seed-1").attach_renderer(tiny_pipeline("text", text_width=8))
    headless = copy.copy(tiny_pipeline("unclip"))
    headless.text_encoder = None
    with pytest.raises(ValueError, match="has no text_encoder, which drawing pictures needs"):
        _bare("seed-2").attach_renderer(headless)
    with pytest.raises(ValueError, match="size is the side of pictures in pixels, 1 or more; got 0"):
        _bare("seed-2").attach_renderer(tiny_pipeline("unclip"), size=0)
    with pytest.raises(ValueError, match=r"pictures of 33 pixels.*multiples of 2"):
        _bare("seed-2").attach_renderer(tiny_pipeline("unclip"), size=33)


# ---- evaluation --------------------------------------------------------------------------------------------


def test_comparing_pixels_of_a_semantic_tokenizer_takes_an_option(tmp_path):
    data, model = save(pictures(3), tmp_path / "pictures"), shared("seed-2")

    def evaluate(**options):
        config = ReconConfig("seed", (str(data),), workers=0, steps=1, **options)
        result = reconstruction.run(config, tmp_path / "out", torch.device("cpu"), model=model)
        result.state.remove()
        return result.record

    with pytest.raises(
        ValueError, match=r"seed is a semantic tokenizer.*so that psnr would.*give --semantic"
    ):
        evaluate(metrics=("psnr", "codes"))
    assert evaluate(metrics=("codes",)).metrics["tokens-per-image"]["value"] == 6
    assert "psnr" in evaluate(metrics=("psnr",), semantic=True).metrics
    curves = CurvesConfig(("seed",), (str(data),), workers=0, metrics=("psnr",))
    with pytest.raises(ValueError, match="semantic tokenizer"):
        rate_distortion.run(curves, tmp_path / "curves", torch.device("cpu"), models=[model])


def test_published_rows_are_the_two_releases():
    model = create("seed-2", vit_depth=1, qformer_layers=1)
    assert (model.num_tokens, model.quantizer.codebook_sizes) == (32, (8192,))
    assert model.renderer_options() == {"text_width": 1024, "image_width": 1024}
