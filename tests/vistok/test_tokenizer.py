"""What every tokenizer must satisfy, over every family; then what is special to each."""

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizers import (
    ADAPTIVE,
    CASES,
    FIXED_LENGTH,
    ORDERED,
    SIDE,
    STOCHASTIC,
    assert_close_tokens,
    build,
    codes_of,
    decode,
    fresh,
    inputs,
    lengths_of,
    options,
    pictures,
    saved_and_loaded,
    shared,
    text_states,
    traits,
)

import vistok
from vistok import Tokens, create, load
from vistok.adaptive import encode_to_quality
from vistok.quantizers import DiagonalGaussian
from vistok.registry import entries

pytestmark = pytest.mark.usefixtures("small_and_quick")
HALF_PRECISION_FRIENDLY = [
    case for case in CASES if case != "titok-legacy"
]  # 30M weights in its pixel decoder
DETERMINISTIC = [case for case in CASES if case not in STOCHASTIC]


@pytest.fixture
def models():
    """Case → tokenizer; tests that change one take a copy."""
    return shared


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def model(case):
    return shared(case)


# ---- every tokenizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_images_become_tokens_become_images(case, model, count):
    tokens = model.encode(inputs(case, count))
    assert len(tokens) == count
    assert tokens.num_tokens == max(lengths_of(tokens))
    assert tokens.num_tokens == model.num_tokens or (model.adaptive and tokens.num_tokens < model.num_tokens)
    assert tokens.codebook_sizes == model.quantizer.codebook_sizes
    tokens.validate()
    images = decode(model, case, tokens)
    assert images.shape == inputs(case, count).shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert not images.requires_grad


def test_reconstruct_is_encode_then_decode(case, model):
    images, given = inputs(case, 2), options(case, 2)
    tokens = model.encode(images, **({"condition": given["condition"]} if model.encodes_conditions else {}))
    assert torch.equal(model.reconstruct(images, **given), decode(model, case, tokens))


def test_different_images_give_different_tokens_and_pictures(case, model):
    tokens = model.encode(inputs(case, 2))
    assert not torch.equal(codes_of(tokens[0]), codes_of(tokens[1]))
    if case != "titok-stage1":  # with random weights the likeliest proxy codes hardly change
        images = decode(model, case, tokens)
        assert (images[0] - images[1]).abs().max() > 2e-4


def test_an_empty_batch_stays_empty(case, model):
    tokens = model.encode(inputs(case, 0))
    assert (len(tokens), tokens.num_tokens) == (0, model.num_tokens)
    assert decode(model, case, tokens).shape == inputs(case, 0).shape


def test_no_tokens_decode_to_no_images(case, model):
    tokens = model.encode(inputs(case, 1))[[]]
    assert decode(model, case, tokens).shape == inputs(case, 0).shape


def test_an_image_does_not_see_its_neighbours(case, model):
    images = inputs(case, 3)
    together, alone = model.encode(images), model.encode(images[1:2])
    assert_close_tokens(together[1], alone)
    states = {"condition": text_states(3)[1:2]} if "text" in model.conditions else {}
    single = model.decode(together[1], **options(case, 1) | states)
    torch.testing.assert_close(decode(model, case, together)[1:2], single, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
@pytest.mark.parametrize("case", HALF_PRECISION_FRIENDLY)
def test_any_floating_dtype_gives_nearly_the_same_picture(case, models, dtype, tolerance):
    model = models(case)
    images, tokens = inputs(case, 2), model.encode(inputs(case, 2))
    converted = copy.deepcopy(model).to(dtype)
    assert converted.dtype == dtype
    assert all(value.dtype == dtype for value in converted.state_dict().values() if value.is_floating_point())
    own = converted.encode(images)  # float32 pictures are taken whatever the model's dtype
    assert len(own) == 2
    own.validate()
    decoded = decode(converted, case, tokens)
    assert decoded.dtype == dtype
    if case != "titok-stage1":  # an argmax over proxy codes: another code is another patch
        assert (decoded.double() - decode(model, case, tokens).double()).abs().mean() < tolerance
    assert decode(converted, case, own).isfinite().all()


@pytest.mark.parametrize("case", HALF_PRECISION_FRIENDLY)
def test_float64_model_finds_the_codes_of_the_float32_model(case, models):
    model = models(case)
    exact = copy.deepcopy(model).double().encode(inputs(case, 3).double())
    assert_close_tokens(model.encode(inputs(case, 3)), exact)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "case", ["mini", "titok-stage1", "titok-vae", "tatitok-vq", "maskgit-vqgan", "instella"]
)
def test_encode_compiles_to_one_graph(case, models, backend):
    torch.compiler.reset()
    model, images = models(case), inputs(case, 2)
    assert torch.compile(model.encode, fullgraph=True, backend=backend)(images) == model.encode(images)


@pytest.mark.parametrize(
    "case", ["mini", "titok-legacy", "titok-stage1", "titok-vae", "tatitok-vq", "maskgit-vqgan", "instella"]
)
def test_decode_compiles_to_one_graph(case, models):
    torch.compiler.reset()
    model = models(case)
    tokens = model.encode(inputs(case, 2))
    compiled = torch.compile(model.decode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens, **options(case, 2)), decode(model, case, tokens))


def test_saved_and_loaded_is_the_same_bit_for_bit(case, model, tmp_path):
    loaded = saved_and_loaded(model, tmp_path)
    for name, companion in model._companions.items():
        loaded.add_companion(name, companion)
    tokens = model.encode(inputs(case, 2))
    assert loaded.encode(inputs(case, 2)) == tokens
    assert torch.equal(decode(loaded, case, tokens), decode(model, case, tokens))


@pytest.mark.parametrize("case", ["mini", "titok-vq"])
def test_loading_in_a_dtype_is_loading_and_converting(case, models, tmp_path):
    models(case).save_pretrained(tmp_path)
    loaded, converted = load(tmp_path, dtype=torch.bfloat16), load(tmp_path).to(torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for key, value in converted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_half_precision_checkpoint_loads_as_float32(models, tmp_path):
    copy.deepcopy(models("mini")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32


def training_options(case, count):
    """What a training pass is given beside images, where drawing it could leave a part out."""
    if case in ORDERED:
        return {"lengths": torch.tensor([2, 6, 3, 1])}
    if case in ADAPTIVE:
        return {"num_tokens": 6, "target": 0.05}
    if case == "dualtoken":
        generator = torch.Generator().manual_seed(3)
        shapes = ((count, 16, 32), (count, 32))
        return {"teacher": [torch.randn(shape, generator=generator) for shape in shapes]}
    if traits(case).semantic:
        text, image = shared(case).embeddings(shared(case).encode(inputs(case, count)))
        return {"targets": 1 + (text if image is None else image)}
    return {"text": text_states(count)} if "text" in traits(case).conditions else {}


def test_training_forward_sends_gradients_to_every_part(case, model):
    model = copy.deepcopy(model).train()
    torch.manual_seed(0)
    output = model(inputs(case, 4), **training_options(case, 4))
    loss = sum(output.losses.values())
    if not model.stochastic:  # which learns a velocity, and draws no picture
        loss = loss + output.images.square().mean()
        proxy = case == "titok-stage1"
        drawn = (4, 1024, SIDE // 16, SIDE // 16) if proxy else inputs(case, 4).shape
        assert output.images.shape == drawn
    loss.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # The second learns from a teacher alone, the next two from a diffusion model, text encoders not at all.
    frozen = ("vae.", "s1to2decoder.distill_mlp.", "out_layer_norm.", "out_linear_1024.")
    frozen += ("siglip_model.text_model.", "siglip_model.logit_")
    frozen += ("encoder.",) if CASES[case][0] == "rae" else ()
    unused = ".conv_out." if case == "elm" else None  # of blocks that do not change the width
    assert silent == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(frozen) or (unused is not None and unused in name)
    }


ONE_PASS = [  # others sample the posterior, end at proxy codes or learn something else than to draw
    case
    for case in CASES
    if not case.endswith("vae") and case not in ("titok-stage1", *STOCHASTIC, *ADAPTIVE)
]


@pytest.mark.parametrize("case", ONE_PASS)
def test_training_forward_shows_what_encode_and_decode_give(case, models):
    model, images = models(case), inputs(case, 2)
    with torch.no_grad():
        output = model(images, **({"text": text_states(2)} if "text" in model.conditions else {}))
    tokens = model.encode(images)
    assert torch.equal(output.codes, codes_of(tokens))
    torch.testing.assert_close(output.images.clamp(0, 1), decode(model, case, tokens), rtol=1e-4, atol=1e-4)


def test_flags_say_what_a_family_is_given_and_gives(case, model):
    assert model.modality in ("image", "video")
    if model.has_features:
        features = model.features(inputs(case, 2))
        assert features.ndim == 3 and len(features) == 2 and bool(features.isfinite().all())
    else:
        with pytest.raises(ValueError, match="no features"):
            model.features(inputs(case, 2))
    assert set(model.conditions) <= {"text", "class"}
    if model.size_multiple is not None:
        sides = (model.size_multiple, model.size_multiple * 2)
        if model.image_size >= max(sides):
            model.check_image_size(*sides, "")
        with pytest.raises(ValueError, match="multiples of"):
            model.check_image_size(sides[0] + 1, sides[1], "")
    else:
        with pytest.raises(ValueError, match="pixels"):
            model.check_image_size(model.image_size, model.image_size * 3, "")
    assert model.sized == ("size" in inspect.signature(model.decode).parameters)


def test_a_condition_is_taken_where_there_is_one_and_refused_elsewhere(case, model):
    tokens = model.encode(inputs(case, 1))
    if model.encodes_conditions:
        assert model.decode(tokens, condition=text_states(1)).shape == (1, 3, SIDE, SIDE)
    elif "text" in model.conditions:
        states = text_states(1)
        assert torch.equal(model.decode(tokens, condition=states), model.decode(tokens, text=states))
        with pytest.raises(ValueError, match="condition and text mean the same"):
            model.decode(tokens, condition=states, text=states)
    else:
        with pytest.raises(ValueError, match="decodes tokens alone; leave condition out"):
            model.decode(tokens, condition=["a jay"])


# ---- what a user gets wrong --------------------------------------------------------------------------------


def bad_inputs(modality):
    """Kind of fault → inputs of that modality with it, and parts of the message."""
    lead, other = ((1,), (1, 1)) if modality == "image" else ((1, 1), (1,))
    layouts = {1: "[B, 3, H, W]", 2: "[B, T, 3, H, W]"}
    layout, others = layouts[len(lead)], {1: "images", 2: "videos"}[len(other)]

    def of(channels=3, height=SIDE, value=0.0, **options):
        return torch.full((*lead, channels, height, SIDE), value, **options)

    def shape(channels):
        return str([*lead, channels, SIDE, SIDE])

    return {
        "integers": (of().long(), ["torch.int64", "divide by 255"]),
        "none, of the wrong size": (of(height=SIDE + 1)[:0], [f"{SIDE + 1}×{SIDE}", "to_tensor"]),
        "bytes": (of().byte(), ["torch.uint8", "divide by 255"]),
        "grey": (of(1), [shape(1), layout, "to_tensor"]),
        "alpha": (of(4), [shape(4), "to_tensor"]),
        "unbatched": (torch.zeros(3, SIDE, SIDE), [f"[3, {SIDE}, {SIDE}]", layout]),
        "of another modality": (
            torch.zeros(*other, 3, SIDE, SIDE),
            [layout, f"these are {others} {layouts[len(other)]}: "],
        ),
        "wrong size": (of(height=SIDE + 1), [f"{SIDE + 1}×{SIDE}", "to_tensor"]),
        "not a number": (of(value=torch.nan), ["nan", "NaN"]),
        "infinite": (of(value=torch.inf), ["inf", "[0, 1]"]),
        "normalised": (of(value=-1.0), ["[-1, -1]", "mean/std"]),
        "8-bit range": (of(value=255.0), ["255", "divide"]),
        "array": (of().numpy(), ["ndarray", "to_tensor"]),
        "without values": (of(device="meta"), ["meta device", "to_tensor"]),
        "sparse": (of().to_sparse(), ["sparse", "to_tensor"]),
    }


@pytest.mark.parametrize("fault", bad_inputs("image"))
def test_bad_inputs_are_refused_with_what_was_given_and_the_fix(model, fault):
    images, parts = bad_inputs(model.modality)[fault]
    with pytest.raises(ValueError) as raised:
        model.encode(images)
    assert all(part in str(raised.value) for part in [*parts, model.label])


def test_latents_that_are_not_finite_name_the_image(models):
    model = copy.deepcopy(models("mini"))
    images = torch.rand(3, 3, model.image_size, model.image_size)

    def overflow(module, arguments, latents):
        latents[1, 0, 0] = float("nan")
        latents[2] = float("inf")
        return latents

    model.encoder.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"latents of image 1 of 3 hold NaN or infinity.*dtype='float32'"):
        model.encode(images)
    with pytest.raises(ValueError, match="latents of image 1 of 3"):
        model.encode(images, target_psnr=20)


@pytest.mark.parametrize("count", [np.int64(2), np.uint8(2)])
def test_numpy_integers_are_numbers_of_tokens(models, count):
    model = models("mini")
    images = torch.rand(1, 3, model.image_size, model.image_size)
    assert model.encode(images, count) == model.encode(images, 2)


def test_weights_that_give_no_finite_latents_are_refused(case, model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        parts = (p for name, p in model.named_parameters() if "encoder" in name or name.startswith("enc_"))
        next(parts).fill_(torch.inf)
    with pytest.raises(ValueError, match="latents of image 0 of 1 hold NaN or infinity"):
        model.encode(inputs(case, 1))


def test_one_bad_pixel_is_enough(models):
    images = pictures(2)
    images[1, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        models("mini").encode(images)


def test_the_suggested_conversion_is_accepted(model):
    pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
    if model.modality == "video":
        frames = vistok.to_tensor([pixels] * 3, size=SIDE)
        assert len(model.encode(frames.unsqueeze(0))) == 1
    else:
        assert len(model.encode(vistok.to_tensor(pixels, size=SIDE))) == 1


@pytest.mark.parametrize("case", FIXED_LENGTH)
def test_fixed_length_tokenizers_refuse_another_count(case, models):
    model = models(case)
    count = model.num_tokens
    assert model.encode(inputs(case, 1), num_tokens=count).num_tokens == count
    message = f"exactly {count} tokens.*{count - 1} was asked"
    with pytest.raises(ValueError, match=message):
        model.encode(inputs(case, 1), num_tokens=count - 1)
    with pytest.raises(ValueError, match=message):
        decode(model, case, model.encode(inputs(case, 1)).prefix(count - 1))


def test_fixed_length_tokenizers_refuse_ragged_tokens(models):
    model = models("titok-vq")
    tokens = dataclasses.replace(model.encode(pictures(2)), lengths=torch.tensor([6, 4]))
    with pytest.raises(ValueError, match="exactly 6 tokens"):
        model.decode(tokens)
    full = dataclasses.replace(tokens, lengths=torch.tensor([6, 6]))
    assert model.decode(full).shape[0] == 2


@pytest.mark.parametrize("option", [{"steps": 4}, {"guidance": 2.0}])
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_deterministic_decoders_refuse_steps_and_guidance(case, models, option):
    model = models(case)
    with pytest.raises(ValueError, match="one deterministic pass"):
        model.decode(model.encode(inputs(case, 1)), **options(case, 1), **option)


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_deterministic_decoders_ignore_the_generator(case, models):
    model = models(case)
    tokens, generator = model.encode(inputs(case, 1)), torch.Generator().manual_seed(3)
    state = generator.get_state()
    images = model.decode(tokens, **options(case, 1), generator=generator)
    assert torch.equal(images, decode(model, case, tokens))
    assert torch.equal(generator.get_state(), state)


def test_bare_codes_decode_like_tokens(case, model):
    tokens = model.encode(inputs(case, 1))  # of several images, padding would count
    bare = model.decode(codes_of(tokens), **options(case, 1))
    assert torch.equal(bare, decode(model, case, tokens))


@pytest.mark.parametrize("code", [-1, 10**6])
@pytest.mark.parametrize("case", ["mini", "titok-vq", "maskgit-vqgan", "flextok", "karl-vqgan-vq"])
def test_codes_outside_the_codebook_are_refused(case, models, code):
    codes = codes_of(models(case).encode(inputs(case, 1))).clone()
    codes[0, 1] = code
    with pytest.raises(ValueError, match=str(code)):
        models(case).decode(codes)


def test_tokens_of_another_tokenizer_are_refused(models):
    model = copy.deepcopy(models("titok-vq"))
    model.name = "one"
    tokens = model.encode(pictures(1))
    assert tokens.tokenizer == "one"
    model.name = "other"
    with pytest.raises(ValueError, match=r"'one'.*'other'"):
        model.decode(tokens)


def test_tokens_of_another_codebook_or_kind_are_refused(models):
    discrete, continuous = models("titok-vq"), models("titok-vae")
    with pytest.raises(ValueError, match=r"\(4096,\).*\(64,\)"):
        discrete.decode(models("titok-legacy").encode(pictures(1)))
    with pytest.raises(ValueError, match="decodes latents"):
        continuous.decode(discrete.encode(pictures(1)))
    with pytest.raises(ValueError, match="decodes indices"):
        discrete.decode(continuous.encode(pictures(1)))


def test_latents_of_the_wrong_width_are_refused_by_name(models):
    with pytest.raises(ValueError, match=r"5.*8|8.*5"):
        models("titok-vae").decode(torch.randn(1, 6, 5))


def test_packed_tokens_decode_to_the_same_picture(case, model):
    tokens = model.encode(inputs(case, 2))
    assert torch.equal(decode(model, case, Tokens.from_bytes(tokens.to_bytes())), decode(model, case, tokens))


PUBLISHED = {  # a name of each family, and the case that is like it
    "vistok-mini": "mini",
    "titok-l32": "titok-legacy",
    "tatitok-bl32-vq": "tatitok-vq",
    "maskgit-vqgan": "maskgit-vqgan",
    "instella-bae": "instella",
    "flextok-d12-d12-in1k": "flextok",
    "karl-vae-in100": "karl-vae",
    "seed-2": "seed-2",
    "slot-mllm": "slotmllm",
    "mingtok-vision": "mingtok",
    "cvivit-echopulse": "cvivit",
    "softvq-l-64": "softvq",
}


@pytest.mark.filterwarnings("ignore:.*research only")
@pytest.mark.parametrize("name", PUBLISHED)
def test_half_a_weights_file_is_refused_by_its_path(name, models, tmp_path):
    models(PUBLISHED[name]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = r"model\.safetensors \(\d+ bytes\) is not a whole.*fetch it again"
    for given in ({"source": tmp_path}, {"source": name, "weights": path}):
        with pytest.raises(ValueError, match=said):
            load(**given)


@pytest.mark.filterwarnings("ignore:.*research only")
@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_another_family_are_refused_by_both_names(name, models, tmp_path):
    other = "mini" if name != "vistok-mini" else "instella"
    models(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is of family '{other}'; {name} is '{CASES[PUBLISHED[name]][0]}'"):
        load(name, weights=tmp_path)


@pytest.mark.filterwarnings("ignore:.*research only")
@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_that_are_not_there_are_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere\.safetensors; give a weights"):
        load(name, weights=tmp_path / "nowhere.safetensors")


@pytest.mark.filterwarnings("ignore:.*research only")
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "vistok-mini"])
def test_without_network_a_published_name_says_which_file_to_bring(name, offline):
    entry = entries()[name]
    with pytest.raises(FileNotFoundError) as raised:
        load(name)
    assert entry.repo in str(raised.value)
    assert entry.file in str(raised.value)
    assert "weights='path/to/" in str(raised.value)


@pytest.mark.parametrize("count", [2.5, "3", True])
@pytest.mark.parametrize("case", ["mini", "titok-vq", "flextok", "karl-vae"])
def test_a_number_of_tokens_that_is_no_integer_is_refused(case, count, models):
    model = models(case)
    with pytest.raises(ValueError, match=r"whole number|integer"):
        model.encode(torch.rand(1, 3, model.image_size, model.image_size), count)


@pytest.mark.parametrize("case", ["titok-vq", "karl-vae"])
def test_what_are_no_tokens_are_refused_by_their_kind(case, models):
    with pytest.raises(ValueError, match="decodes Tokens or a tensor of codes; a list was given"):
        models(case).decode([1, 2, 3])


def test_create_refuses_unknown_fields_and_names():
    with pytest.raises(ValueError, match="no configuration field depth"):
        create("mini", depth=3)
    with pytest.raises(ValueError, match="unknown key depth"):
        create("titok", depth=3)
    with pytest.raises(ValueError, match=r"Did you mean.*titok-l32"):
        create("titok-l23")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantize_mode": "fsq"}, "fsq"),
        ({"quantize_mode": "vae"}, "no second stage"),
        ({"is_legacy": False}, "legacy second stage"),
        ({"vit_enc_model_size": "huge"}, "huge"),
        ({"crop_size": 250}, "250"),
    ],
)
def test_create_refuses_impossible_titok_configurations(config, said):
    with pytest.raises(ValueError, match=said):
        create("titok", **config)


# ---- ordered tokens ----------------------------------------------------------------------------------------


@pytest.fixture(params=ORDERED)
def ordered(request):
    """A case of which any prefix decodes."""
    return request.param


def test_every_prefix_decodes_to_another_whole_picture(ordered):
    model = shared(ordered)
    tokens = model.encode(inputs(ordered, 2))
    decoded = [decode(model, ordered, tokens.prefix(k)) for k in model.prefix_lengths]
    assert all(images.shape == (2, 3, SIDE, SIDE) for images in decoded)
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(decoded))


def test_encoding_to_k_tokens_is_the_prefix_of_the_full_code(ordered):
    model = shared(ordered)
    full = model.encode(inputs(ordered, 3))
    for k in model.prefix_lengths:
        assert model.encode(inputs(ordered, 3), num_tokens=k) == full.prefix(k)


@pytest.mark.parametrize("count", [0, -1, 9])
def test_ordered_tokenizers_say_which_counts_they_take(ordered, count):
    model = shared(ordered)
    with pytest.raises(ValueError, match=f"1 to {model.num_tokens} tokens.*{count} was asked"):
        model.encode(inputs(ordered, 1), num_tokens=count)


def test_images_of_different_length_decode_as_they_do_alone(ordered):
    model = shared(ordered)
    tokens = model.encode(inputs(ordered, 3))
    ragged = Tokens.cat([tokens[i].prefix(k) for i, k in enumerate([2, 5, 1])])
    assert Tokens.from_bytes(ragged.to_bytes()) == ragged
    alone = torch.cat([decode(model, ordered, tokens[i].prefix(k)) for i, k in enumerate([2, 5, 1])])
    torch.testing.assert_close(decode(model, ordered, ragged), alone, rtol=1e-4, atol=2e-5)


def test_absent_tokens_have_no_influence(ordered):
    model = shared(ordered)
    tokens = model.encode(inputs(ordered, 1))
    other = codes_of(tokens).clone()
    other[:, 3:] = (other[:, 3:] + 5) % 16
    lengths, told = torch.tensor([3]), options(ordered, 1)
    with torch.no_grad():
        images = [
            model.pixels(model.quantizer.decode(codes), lengths, **told)
            for codes in (codes_of(tokens), other)
        ]
    assert torch.equal(*images)


def measured(model, images, tokens):
    """PSNR of each image, decoded as it is when nothing is said."""
    error = (model.decode(tokens).double() - images.double()).square().mean((1, 2, 3))
    return -10 * error.log10()


def test_a_target_quality_is_reached_by_what_is_returned(ordered):
    model, images = shared(ordered), inputs(ordered, 2)
    full = model.encode(images)
    target = float(measured(model, images, full).min()) - 0.01
    found = model.encode(images, target_psnr=target)
    assert found.reached.all()
    assert (found.psnr >= target).all()
    torch.testing.assert_close(measured(model, images, found.tokens), found.psnr, rtol=0, atol=1e-3)
    assert_close_tokens(found.tokens, dataclasses.replace(full, lengths=found.tokens.lengths))


@pytest.mark.parametrize("case", ADAPTIVE)
def test_who_chooses_lengths_takes_no_target_psnr(case, models):
    with pytest.raises(
        ValueError, match=r"karl does not decode from a prefix.*give it a target.*vistok-mini"
    ):
        encode_to_quality(models(case), pictures(1), 30)


def test_an_unreachable_target_gives_the_best_prefix_and_a_warning(ordered):
    model, images = shared(ordered), inputs(ordered, 2)
    with pytest.warns(UserWarning, match=f"2 of 2 images do not reach 60 dB.*{model.num_tokens} tokens"):
        found = model.encode(images, target_psnr=60)
    assert not found.reached.any()
    torch.testing.assert_close(measured(model, images, found.tokens), found.psnr, rtol=0, atol=1e-3)
    tried = [measured(model, images, model.encode(images, k)) for k in (1, 2, 4, model.num_tokens)]
    torch.testing.assert_close(torch.stack(tried).amax(0), found.psnr, rtol=0, atol=1e-3)


def test_nested_dropout_in_training_is_prefix_decoding(models):
    ordered, images = models("mini"), pictures(3)
    lengths = torch.tensor([1, 4, 6])
    with torch.no_grad():
        trained = ordered(images, lengths=lengths).images.clamp(0, 1)
    tokens = ordered.encode(images)
    for image, k in enumerate([1, 4, 6]):
        torch.testing.assert_close(
            trained[image : image + 1], ordered.decode(tokens[image].prefix(k)), atol=1e-5, rtol=1e-5
        )


def test_linear_path_of_a_fresh_tokenizer_reconstructs_better_than_the_mean_colour():
    torch.manual_seed(0)
    model = fresh("mini", levels=[[3, [8, 8]], [3, [8, 8]]])
    images = F.interpolate(torch.rand(512, 3, 2, 2), SIDE, mode="bilinear")
    model.fit_linear_path(images)
    errors = [(model.reconstruct(images, k) - images).square().mean() for k in (1, 3, 6)]
    mean_colour = (images.mean((0, 2, 3), keepdim=True) - images).square().mean()
    assert mean_colour > errors[0] > errors[1] > errors[2]


# ---- TiTok -------------------------------------------------------------------------------------------------


def layers(prefix, names, kinds=("weight", "bias")):
    return {f"{prefix}{name}.{kind}" for name in names for kind in kinds}


def trunk(side, depth):
    keys = {
        f"{side}.{name}"
        for name in ("class_embedding", "positional_embedding", "latent_token_positional_embedding")
    }
    keys |= layers(f"{side}.", ["ln_pre", "ln_post"])
    for block in range(depth):
        at = f"{side}.transformer.{block}."
        keys |= layers(at, ["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"])
        keys |= {f"{at}attn.in_proj_weight", f"{at}attn.in_proj_bias"}
    return keys


def published_keys(*, legacy, pixels, vq, text, depth=2):
    """The key list of section 13 of the family's specification, written out independently."""
    keys = {"latent_tokens", "decoder.mask_token"} | trunk("encoder", depth) | trunk("decoder", depth)
    keys |= layers("", ["encoder.patch_embed", "encoder.conv_out", "decoder.decoder_embed", "decoder.ffn.0"])
    keys |= layers("decoder.", ["ffn.2"] if legacy else ["conv_out"])
    keys |= {"quantize.embedding.weight"} if vq else set()
    if text:
        keys |= layers("decoder.", ["text_guidance_proj"]) | {"decoder.text_guidance_positional_embedding"}
    if pixels:
        keys |= {"pixel_quantize.embedding.weight"}
        keys |= {key.replace("decoder.", "pixel_decoder.", 1) for key in grid_decoder_keys(shortcuts=(1, 3))}
    return keys


def grid_decoder_keys(shortcuts):
    keys = layers("decoder.", ["conv_in", "norm_out", "conv_out"])
    blocks = [f"up.{level}.block.{i}" for level in range(5) for i in range(2)] + ["mid.0", "mid.1"]
    for block in blocks:
        keys |= layers(f"decoder.{block}.", ["norm1", "norm2"]) | layers(
            f"decoder.{block}.", ["conv1", "conv2"], ["weight"]
        )
    keys |= layers("decoder.", [f"up.{level}.upsample_conv" for level in range(1, 5)])
    return keys | {f"decoder.up.{level}.block.0.nin_shortcut.weight" for level in shortcuts}


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("titok-legacy", {"legacy": True, "pixels": True, "vq": True, "text": False}),
        ("titok-stage1", {"legacy": True, "pixels": False, "vq": True, "text": False}),
        ("titok-vq", {"legacy": False, "pixels": False, "vq": True, "text": False}),
        ("titok-vae", {"legacy": False, "pixels": False, "vq": False, "text": False}),
        ("tatitok-vq", {"legacy": False, "pixels": False, "vq": True, "text": True}),
        ("tatitok-vae", {"legacy": False, "pixels": False, "vq": False, "text": True}),
    ],
)
def test_state_dict_has_the_published_keys_and_no_other(case, parts, models):
    assert set(models(case).state_dict()) == published_keys(**parts)


def test_maskgit_vqgan_has_the_published_keys():
    with torch.device("meta"):
        keys = set(create("maskgit-vqgan").state_dict())
    decoder = {key for key in keys if key.startswith("decoder.")}
    assert decoder == grid_decoder_keys(shortcuts=(1, 3))
    encoder = {key for key in keys if key.startswith("encoder.")}
    shortcuts = {key for key in encoder if "nin_shortcut" in key}
    assert shortcuts == {f"encoder.down.{level}.block.0.nin_shortcut.weight" for level in (2, 4)}
    assert "encoder.conv_in.bias" not in keys
    assert keys - encoder - decoder == {"quantize.embedding.weight"}


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.repo])
def test_published_configurations_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = create(name)
    history = ("codebook_used", "ema_vocab_hit_SV")  # of codes
    state = model.state_dict()
    millions = sum(value.numel() for key, value in state.items() if not key.endswith(history)) / 1e6
    assert millions == pytest.approx(entries()[name].parameters, abs=0.06)


def kept_rows(model, images):
    """The latent rows [B, K, W] that the encoder's last normalisation gives."""
    caught = []
    handle = model.encoder.ln_post.register_forward_hook(lambda *call: caught.append(call[2]))
    with torch.no_grad():
        latents = model.latents(images)
    handle.remove()
    return caught[0], latents


def test_legacy_encoder_reads_the_memory_of_tokens_by_width_as_width_by_tokens(models):
    model = models("titok-stage1")
    rows, latents = kept_rows(model, pictures(2))
    count, width = rows.shape[1:]
    weight, bias = model.encoder.conv_out.weight[:, :, 0, 0], model.encoder.conv_out.bias
    expected = torch.empty_like(latents)
    for image in range(2):
        memory = rows[image].flatten().tolist()  # token after token, each `width` long
        for k in range(count):
            column = torch.tensor([memory[w * count + k] for w in range(width)])
            expected[image, k] = weight.detach() @ column + bias.detach()
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_single_stage_encoder_projects_every_token_by_itself(models):
    model = models("titok-vq")
    rows, latents = kept_rows(model, pictures(1))
    weight, bias = model.encoder.conv_out.weight[:, :, 0, 0], model.encoder.conv_out.bias
    torch.testing.assert_close(latents[0], rows[0] @ weight.T + bias)


def test_rgb_head_places_colours_fastest_then_columns_then_rows(models):
    model, caught = models("titok-vq"), []
    handle = model.decoder.ffn.register_forward_hook(lambda *call: caught.append(call[2]))
    with torch.no_grad():
        images = model.pixels(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)))
    handle.remove()
    flat = torch.empty(1, 3, SIDE, SIDE)
    for row in range(SIDE):
        for column in range(SIDE):
            first = ((row % 16) * 16 + column % 16) * 3
            flat[0, :, row, column] = caught[0][0, first : first + 3, row // 16, column // 16]
    with torch.no_grad():
        torch.testing.assert_close(images, model.decoder.conv_out(flat), rtol=1e-4, atol=1e-5)


def test_legacy_decoder_mixes_code_vectors_by_softmax(models):
    model = models("titok-legacy")
    latents = model.dequantize(model.encode(pictures(1)))[0]
    with torch.no_grad():
        logits = model.decoder(latents)
        assert logits.shape == (1, 1024, 2, 2)
        probabilities = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
        mixed = torch.einsum("bnhw,nd->bdhw", probabilities, model.pixel_quantize.embedding.weight.double())
        expected = model.pixel_decoder(mixed.float())
        torch.testing.assert_close(model.pixels(latents), expected, rtol=1e-3, atol=1e-4)


def test_l2_normalised_decoders_receive_unit_vectors(models):
    model = models("titok-stage1")
    latents, _ = model.dequantize(model.encode(pictures(2)))
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(2, 6))


def test_stage_one_weights_say_how_to_attach_the_pixel_tokenizer():
    model = fresh("titok-stage1")
    tokens = model.encode(pictures(1))
    with pytest.raises(ValueError, match=r"attach_pixel_tokenizer\('maskgit-vqgan'\)"):
        model.decode(tokens)


def test_stage_one_weights_draw_the_likeliest_proxy_codes(models, tmp_path):
    model, drawer = copy.deepcopy(models("titok-stage1")), models("maskgit-vqgan")
    tokens = model.encode(pictures(2))
    with torch.no_grad():
        codes = model.decoder(model.dequantize(tokens)[0]).argmax(1).flatten(1)
    assert torch.equal(model.decode(tokens), drawer.decode(codes))
    drawer.save_pretrained(tmp_path)
    model.attach_pixel_tokenizer(tmp_path)
    assert torch.equal(model.decode(tokens), drawer.decode(codes))


def test_the_attached_tokenizer_is_no_part_of_the_checkpoint(models):
    model = models("titok-stage1")
    assert not any("pixel" in key for key in model.state_dict())
    assert copy.deepcopy(model).double().companion("pixel_tokenizer").dtype == torch.float64


def test_attaching_leaves_the_given_tokenizer_as_it_was(models):
    drawer = build("maskgit-vqgan").train()
    model = fresh("titok-stage1").to(torch.bfloat16)
    model.attach_pixel_tokenizer(drawer)
    assert drawer.dtype == torch.float32
    assert drawer.training
    assert all(parameter.requires_grad for parameter in drawer.parameters())


def test_only_stage_one_takes_a_pixel_tokenizer(models):
    with pytest.raises(ValueError, match="only stage-1"):
        models("titok-vq").attach_pixel_tokenizer(models("maskgit-vqgan"))


def test_stage_one_takes_no_other_family_as_its_pixel_tokenizer(models, tmp_path):
    models("mini").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a mini tokenizer.*maskgit-vqgan"):
        models("titok-stage1").attach_pixel_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"is a mini tokenizer.*maskgit-vqgan"):
        models("titok-stage1").attach_pixel_tokenizer(models("mini"))


def test_kl_encode_is_the_mean_of_the_posterior(models):
    model = models("titok-vae")
    moments = model.latents(pictures(2))
    assert moments.shape == (2, 6, 16)
    assert torch.equal(model.encode(pictures(2)).latents, DiagonalGaussian(moments).mean.detach())
    assert model.encode(pictures(2)) == model.encode(pictures(2))


# ---- TA-TiTok ----------------------------------------------------------------------------------------------


def test_the_caption_changes_the_picture_and_never_the_tokens(models):
    model = models("tatitok-vq")
    tokens = model.encode(pictures(1))
    one, other = (model.decode(tokens, text=text_states(2)[i : i + 1]) for i in range(2))
    assert (one - other).abs().max() > 1e-4


def test_text_states_of_the_wrong_shape_are_refused(models):
    model = models("tatitok-vq")
    with pytest.raises(ValueError, match=r"\[1, 5, 16\].*\[2, 5, 16\]"):
        model.decode(model.encode(pictures(2)), text=text_states(1))


@pytest.mark.parametrize("captions", [[], ["one"], ["one", "two", "three"]])
def test_captions_must_be_one_for_each_image(models, captions):
    model = models("tatitok-vq")
    with pytest.raises(ValueError, match=f"{len(captions)} captions.*2 images"):
        model.decode(model.encode(pictures(2)), text=captions)


def test_captions_go_through_the_attached_text_tower():
    from vistok.nn.clip_text import CLIPTextEncoder

    torch.manual_seed(0)
    model = fresh("tatitok-vq", text_context_length=77, text_embed_dim=32)
    tower = CLIPTextEncoder(width=32, layers=2, heads=2, embed_dim=16).eval()
    model.attach_text_encoder(tower)
    tokens = model.encode(pictures(2))
    captions = ["A photo of a jay.", ""]
    states = tower(captions).states.detach()
    # Rounding only: torch's attention takes another kernel for the attached copy, which is frozen.
    torch.testing.assert_close(model.decode(tokens, text=captions), model.decode(tokens, text=states))
    assert torch.equal(model.decode(tokens), model.decode(tokens, text=["", ""]))
    assert not any(key.startswith("text_encoder") for key in model.state_dict())


def test_captions_without_a_text_tower_say_how_to_attach_one(models, offline):
    model = copy.deepcopy(models("tatitok-vq"))
    with pytest.raises(FileNotFoundError, match=r"ViT-L-14-336.*attach_text_encoder\("):
        model.decode(model.encode(pictures(1)), text=["A photo of a jay."])


def test_a_text_tower_is_downloaded_only_when_its_repository_is_named(tmp_path):
    script = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): raise socket.gaierror(-2, 'Name or service not known')\n"
        "socket.getaddrinfo = refuse\n"
        "from vistok.nn.clip_text import CLIPTextEncoder\n"
        "for source in sys.argv[1:]:\n"
        "    print('loading', source, file=sys.stderr)\n"
        "    try: CLIPTextEncoder.load(source)\n"
        "    except FileNotFoundError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    repository = "hf://timm/vit_large_patch14_clip_336.openai"
    done = subprocess.run(
        [sys.executable, "-c", script, "openai", repository],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.count(f"attach_text_encoder('{repository}')") == 2, done.stderr
    tag, named = done.stderr.split(f"loading {repository}")
    message = "downloading from the Hugging Face hub"
    assert (tag.count(message), named.count(message)) == (0, 1)


def test_another_tag_or_file_of_a_text_tower_is_refused(tmp_path):
    from vistok.nn.clip_text import CLIPTextEncoder

    with pytest.raises(ValueError, match=r"'laion' is neither .* its tags are openai"):
        CLIPTextEncoder.load("laion")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*runs/tower"):
        CLIPTextEncoder.load("runs/tower")


def test_an_empty_batch_needs_no_text_tower(models, offline):
    model = copy.deepcopy(models("tatitok-vq"))
    tokens = model.encode(pictures(1))[[]]
    assert model.decode(tokens, text=[]).shape == (0, 3, SIDE, SIDE)


# ---- MaskGIT-VQGAN -----------------------------------------------------------------------------------------


def test_any_size_divisible_by_the_factor_is_taken_row_by_row(models):
    model = models("maskgit-vqgan")
    images = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    tokens = model.encode(images)
    assert tokens.num_tokens == 3 * 4
    with torch.no_grad():
        grid = model.quantizer.encode(model.encoder(images).permute(0, 2, 3, 1))
    assert torch.equal(tokens.indices, grid.flatten(1))
    assert model.decode(model.encode(torch.rand(1, 3, 48, 48))).shape == (1, 3, 48, 48)


def test_an_oblong_grid_decodes_by_the_sides_that_its_tokens_carry(models, tmp_path):
    model = models("maskgit-vqgan")
    tokens = model.encode(torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)))
    assert tokens.grid == (3, 4)
    tokens.save(tmp_path / "oblong.vtok")
    with torch.no_grad():
        latents = model.quantizer.decode(tokens.indices).view(1, 3, 4, -1).permute(0, 3, 1, 2)
        expected = model.decoder(latents).clamp(0, 1)
    decoded = model.decode(Tokens.load(tmp_path / "oblong.vtok"))
    torch.testing.assert_close(decoded, expected)
    assert model.reconstruct(torch.rand(2, 3, 16, 80)).shape == (2, 3, 16, 80)
    with pytest.raises(ValueError, match=r"decodes one image size; these tokens have a grid of \(\d+,\)"):
        fixed = models("titok-vq")
        codes = fixed.encode(pictures(1))
        fixed.decode(dataclasses.replace(codes, grid=(codes.num_tokens,)))


def test_oblong_grids_are_refused_at_decoding_without_their_sides(models):
    model = models("maskgit-vqgan")
    with pytest.raises(ValueError, match="12 is not a square"):
        model.decode(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 tokens per image; 9"):
        model.encode(pictures(1), num_tokens=9)


def test_sizes_that_do_not_divide_are_refused(models):
    with pytest.raises(ValueError, match=r"40×32.*multiples of 16"):
        models("maskgit-vqgan").encode(torch.rand(1, 3, 40, 32))


def test_the_shortcut_convolves_the_blocks_output_and_drops_its_input():
    from vistok.models.maskgit_vqgan import ResidualBlock

    torch.manual_seed(0)
    block, x = ResidualBlock(32, 64), torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
        torch.testing.assert_close(block(x), h + block.nin_shortcut(h))


@pytest.mark.parametrize("size", [(32, 32), (33, 40), (8, 8)])
def test_folded_upsampling_is_nearest_upsampling_and_a_convolution(size):
    from vistok.nn.cpu.upsample import upsample_conv

    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(5, 7, 3, padding=1), torch.randn(2, 5, *size)
    with torch.no_grad():
        expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(upsample_conv(x, conv), expected, rtol=1e-5, atol=1e-5)


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_picture(case, models):
    model = models(case)
    tokens = model.encode(inputs(case, 2))
    moved = copy.deepcopy(model).cuda()
    found = moved.encode(inputs(case, 2))  # pictures on the CPU are moved
    assert found.device.type == "cuda"
    decoded = decode(moved, case, tokens).cpu()
    if case != "titok-stage1":
        torch.testing.assert_close(decoded, decode(model, case, tokens), rtol=1e-2, atol=1e-2)
