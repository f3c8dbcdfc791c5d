"""FlexTok: any prefix encodes and decodes alone, whatever the batch; the flow's formulas; what is refused."""

import copy
import json
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import cached
from diffusers import AutoencoderKL
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from small_flextok import build_flextok
from torch import nn

from vistok import Tokens, create, load
from vistok.checkpoint import Located
from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.eval.speed.plain_flextok import PlainFlexTok
from vistok.models.flextok.config import FlexTokConfig
from vistok.models.flextok.model import FlexTok, draw_lengths
from vistok.models.flextok.network import Conditions
from vistok.models.flextok.vae import load_vae, vae_config
from vistok.nn import flow
from vistok.quantizers import FiniteScalarQuantizer
from vistok.registry import entries

SIDE, TOKENS = 16, 8
SMALL = {
    "encoder_dim": 64,
    "encoder_depth": 2,
    "decoder_dim": 96,
    "decoder_depth": 3,
    "head_dim": 32,
    "num_tokens": TOKENS,
    "levels": (4, 5, 3),
    "latent_channels": 4,
    "latent_size": 8,
    "vae_block_out_channels": (8, 16),
    "vae_layers_per_block": 1,
    "vae_norm_num_groups": 4,
    "vae_scaling_factor": 0.7,
}
GRAPH = json.loads((GOLDEN / "flextok_d12_d12.json").read_text())["config"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**changes):
    """A small tokenizer with every weight at random, none at zero."""
    return build_flextok(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def shared_model():
    return build()


@pytest.fixture
def model(shared_model):
    return shared_model


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), SIDE)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def grid_points(model, count, seed=0):
    codes = torch.randint(60, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    return model.quantizer.decode(codes)


# ---- prefixes and batches ----------------------------------------------------------------------------------


def test_the_first_k_registers_alone_give_the_first_k_tokens(model):
    full = model.encode(pictures(3))
    assert full.indices.unique().numel() > 4
    for k in range(1, TOKENS + 1):
        assert model.encode(pictures(3), num_tokens=k) == full.prefix(k)


def test_asking_for_k_tokens_computes_only_k_registers(model):
    rows = []
    block = model.encoder.module_dict["enc_transformer"].blocks[0]
    handle = block.register_forward_pre_hook(lambda m, inputs: rows.append(inputs[0].shape[1]))
    model.encode(pictures(1), num_tokens=3)
    handle.remove()
    assert rows == [16 + 3]


def test_tokens_do_not_depend_on_the_batch(model):
    together = model.encode(pictures(4))
    for image in range(4):
        assert model.encode(pictures(4)[image : image + 1]) == together[image]


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_picture_depends_on_neither_neighbours_nor_place(model, guidance):
    tokens = model.encode(pictures(4))
    options = {"steps": 3, "guidance": guidance}
    together = model.decode(tokens, generator=seeded(), **options)
    turned = model.decode(tokens[[3, 2, 1, 0]], generator=seeded(), **options)
    close(turned.flip(0), together)
    for image in range(4):
        close(model.decode(tokens[image], generator=seeded(), **options), together[image : image + 1])


@pytest.mark.parametrize("lengths", [[1, 8, 3, 5], [2, 4, 1, 4], [8, 8, 8, 7]])
def test_images_of_different_length_decode_as_they_do_alone(model, lengths):
    tokens = model.encode(pictures(4))
    ragged = Tokens.cat([tokens[i].prefix(k) for i, k in enumerate(lengths)])
    together = model.decode(ragged, steps=3, generator=seeded())
    alone = [model.decode(tokens[i].prefix(k), steps=3, generator=seeded()) for i, k in enumerate(lengths)]
    close(together, torch.cat(alone))


def test_every_prefix_gives_another_picture_and_only_its_tokens_matter(model):
    tokens = model.encode(pictures(1))
    pictures_of = [model.decode(tokens.prefix(k), steps=2) for k in range(1, TOKENS + 1)]
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(pictures_of))
    other = tokens.indices.clone()
    other[:, 3:] = (other[:, 3:] + 7) % 60
    three = [Tokens(indices=each, lengths=torch.tensor([3])) for each in (tokens.indices, other)]
    latents = [model.quantizer.decode(each.indices) for each in three]
    with torch.no_grad():
        assert torch.equal(*(model.pixels(each, torch.tensor([3]), steps=2) for each in latents))


def test_a_mixed_batch_needs_no_more_rows_than_a_full_one(model):
    latents = grid_points(model, 3)
    full = model.decoder.conditions(latents)
    mixed = model.decoder.conditions(latents, torch.tensor([8, 1, 5]))
    short = model.decoder.conditions(latents[:, :3], torch.tensor([3, 1, 2]))
    assert full.registers.shape[1] == mixed.registers.shape[1] == TOKENS
    assert full.key_bias is None  # nothing hidden: attention without a mask
    assert short.registers.shape[1] == 4
    assert model.decoder.unconditional(3).registers.shape[1] == 1


def test_a_mixed_batch_computes_what_its_images_do_alone(model):
    rows, block = [], model.decoder.module_dict["dec_transformer"].blocks[0]
    handle = block.register_forward_pre_hook(lambda m, inputs: rows.append(inputs[0].shape[1]))
    tokens = model.encode(pictures(3))
    prefixes = [tokens[image].prefix(k) for image, k in enumerate((8, 1, 3))]
    model.decode(Tokens.cat(prefixes), steps=1)
    for prefix in prefixes:
        model.decode(prefix, steps=1)
    model.decode(Tokens.cat([tokens[0].prefix(3), tokens[1].prefix(3)]), steps=1)
    handle.remove()
    assert rows == [sum(rows[1:4]), *(2 * 16 + 1 + own for own in (8, 2, 4)), 2 * rows[3]]


def test_empty_batches_stay_empty(model):
    tokens = model.encode(torch.empty(0, 3, SIDE, SIDE))
    assert tokens.indices.shape == (0, TOKENS)
    assert model.decode(tokens, generator=[]).shape == (0, 3, SIDE, SIDE)


# ---- one row for equal tokens ------------------------------------------------------------------------------


def explicit(model, latents, lengths, null):
    """All registers as rows, hidden ones repeated: the decoder's conditions without any collapsing."""
    parts = model.decoder.module_dict
    x = parts["dec_from_latents"].proj(latents) + parts["dec_registers_posemb_module"].posembs[0, 0].T
    for image, length in enumerate(lengths):
        x[image, length:] = parts["dec_nested_dropout"].dropout_mask_token
        if null[image]:
            x[image] = parts["dec_latent_dropout"].nullcond
    return Conditions(x, None)


@pytest.mark.parametrize("times", [[0.4], [0.9, 0.1, 0.5, 0.3]])
def test_equal_tokens_collapse_exactly_into_one_row(model, times):
    model, lengths, null = copy.deepcopy(model).double(), [1, 8, 3, 5], [False, False, True, False]
    latents = grid_points(model, 4).double()
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        modulations = model.decoder.modulations(torch.tensor(times))
        conditions = model.decoder.conditions(latents, torch.tensor(lengths), torch.tensor(null))
        (expected,) = model.decoder(x, modulations, [explicit(model, latents, lengths, null)])
        close(model.decoder(x, modulations, [conditions])[0], expected, 1e-12)


def test_the_unconditional_pass_with_one_row_equals_all_null_tokens(model):
    latents, x = grid_points(model, 2), torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        modulations = model.decoder.modulations(torch.tensor([0.6]))
        conditional = model.decoder.conditions(latents)
        both = model.decoder(x, modulations, [conditional, model.decoder.unconditional(2)])
        alone = model.decoder(x, modulations, [conditional])
        nothing = model.decoder(x, modulations, [explicit(model, latents, [8, 8], [True, True])])
    close(both[0], alone[0])
    close(both[1], nothing[0])
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_gradients_through_collapsed_rows_are_those_of_all_rows(model):
    model, lengths, null = copy.deepcopy(model).double(), [2, 8], [False, True]
    latents, x = grid_points(model, 2).double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    modulations = model.decoder.modulations(torch.tensor([0.4, 0.8]))
    collapsed = model.decoder.conditions(latents, torch.tensor(lengths), torch.tensor(null))
    found, expected = [], []
    for conditions, gradients in ((collapsed, found), (explicit(model, latents, lengths, null), expected)):
        (velocity,) = model.decoder(x, modulations, [conditions])
        vectors = [
            model.decoder.module_dict[name].values for name in ("dec_nested_dropout", "dec_latent_dropout")
        ]
        gradients += torch.autograd.grad(velocity.square().sum(), vectors, retain_graph=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        close(ours, theirs, 1e-9)


def test_in_place_and_recorded_passes_are_one_function(model):
    latents, x = grid_points(model, 2), torch.randn(2, 4, 8, 8, generator=seeded())
    for times in ([0.5], [0.2, 0.7]):
        outputs = []
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                modulations = model.decoder.modulations(torch.tensor(times))
                conditions = [model.decoder.conditions(latents[:, :3]), model.decoder.unconditional(2)]
                outputs.append(torch.cat(model.decoder(x, modulations, conditions)))
        close(outputs[1], outputs[0].detach())


# ---- the flow ----------------------------------------------------------------------------------------------


def reference_sampling(model, latents, x, steps, guide):
    """Euler steps one by one; `guide(time, conditional, unconditional, state)` gives the velocity."""
    state = {}
    for i in range(steps, 0, -1):
        modulations = model.decoder.modulations(torch.tensor([i / steps]))
        ((conditional,), (unconditional,)) = (
            model.decoder(x, modulations, [conditions])
            for conditions in (model.decoder.conditions(latents), model.decoder.unconditional(len(x)))
        )
        x = x - guide(i / steps, conditional, unconditional, state) / steps
    return x


def apg(scale):
    def guide(time, conditional, unconditional, state):
        images = []
        for image in range(len(conditional)):
            v, difference = conditional[image], conditional[image] - unconditional[image]
            if image in state:
                difference = difference - 0.5 * state[image]
            state[image] = difference
            norm = difference.square().sum().sqrt()
            if norm > 2.5:
                difference = difference * (2.5 / norm)
            direction = v.double() / v.double().square().sum().sqrt()
            orthogonal = difference.double() - (difference.double() * direction).sum() * direction
            images.append(v + (scale - 1) * orthogonal.float())
        return torch.stack(images)

    return guide


GUIDES = {
    "none": ({"guidance": 1}, lambda t, c, u, s: c),
    "classifier-free": ({"guidance": 3.0, "normalized": False}, lambda t, c, u, s: u + 3.0 * (c - u)),
    "of the time": (
        {"guidance": lambda t: 1 + 4 * t, "normalized": False},
        lambda t, c, u, s: u + (1 + 4 * t) * (c - u),
    ),
    "normalized": ({"guidance": 7.5}, apg(7.5)),
    "zero": ({"guidance": 0.0, "normalized": False}, lambda t, c, u, s: u),
}


@pytest.mark.parametrize("kind", GUIDES)
def test_sampling_follows_the_formulas(model, kind):
    options, guide = GUIDES[kind]
    latents, noise = grid_points(model, 2)[:, :5], torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        found = model.sample(latents, steps=4, noise=noise, **options)
        close(found, reference_sampling(model, latents, noise, 4, guide), 1e-4)


def test_many_steps_take_their_modulations_in_portions(model):
    latents, noise = grid_points(model, 1), torch.randn(1, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        found = model.sample(latents, steps=70, guidance=1, noise=noise)
        close(found, reference_sampling(model, latents, noise, 70, GUIDES["none"][1]), 1e-4)


def test_twenty_steps_at_7_5_normalized_are_the_default(model):
    tokens = model.encode(pictures(1))
    told = model.decode(tokens, steps=20, guidance=7.5, normalized=True, generator=seeded(0))
    assert torch.equal(model.decode(tokens), told)


def test_guidance_is_off_only_at_exactly_one(model):
    calls = []
    handle = model.decoder.register_forward_pre_hook(lambda m, inputs: calls.append(len(inputs[2])))
    tokens = model.encode(pictures(1))
    for guidance in (1, 1.0, lambda t: 1.0, 0.0):
        model.decode(tokens, steps=1, guidance=guidance)
    handle.remove()
    assert calls == [1, 1, 2, 2]


def test_normalized_guidance_without_momentum_or_clip_keeps_the_share_eta_of_the_parallel_part():
    conditional, unconditional = torch.randn(2, 3, 4, 4, 4, generator=seeded()).unbind(1)[:2]
    guided, average = flow.normalized_guidance(
        conditional, unconditional, 3.0, momentum=0, threshold=0, eta=1.0
    )
    close(guided, conditional + 2.0 * (conditional - unconditional))
    assert torch.equal(average, conditional - unconditional)
    zero = torch.zeros_like(conditional)
    assert torch.equal(flow.normalized_guidance(zero, zero, 3.0)[0], zero)


def test_time_sampling_has_its_limits():
    uniform = torch.linspace(0, 1, 101)
    times = flow.mode_times(uniform)
    close(times[[0, 50, 100]], torch.tensor([1.0, 0.5, 0.0]))
    assert (times.diff() < 0).all()
    strata = flow.stratified_times(torch.full((1000,), 0.5))
    close(strata.mean(), torch.tensor(0.5), 1e-4)
    assert (strata.diff() > 0).all()


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_must_be_a_positive_integer(model, steps):
    with pytest.raises(ValueError, match="1 or more"):
        model.decode(model.encode(pictures(1)), steps=steps)


# ---- noise -------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_picture_again_and_another_seed_another(model):
    tokens = model.encode(pictures(2))
    first, again, other = (model.decode(tokens, steps=2, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-2
    generator = seeded(5)
    model.decode(tokens, steps=1, generator=generator)
    second = model.decode(tokens, steps=2, generator=generator)  # a generator moves on, as everywhere
    assert not torch.equal(first, second)


def test_without_a_generator_decoding_is_deterministic_and_leaves_the_global_one_alone(model):
    tokens, state = model.encode(pictures(1)), torch.get_rng_state()
    assert torch.equal(model.decode(tokens, steps=1), model.decode(tokens, steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_image_may_have_its_own_generator(model):
    tokens = model.encode(pictures(3))
    together = model.decode(tokens, steps=2, generator=[seeded(s) for s in (1, 2, 3)])
    for image in range(3):
        close(model.decode(tokens[image], steps=2, generator=seeded(image + 1)), together[image : image + 1])


def test_given_noise_is_where_sampling_starts(model):
    tokens = model.encode(pictures(2))
    noise = torch.randn(4, 8, 8, generator=seeded(4)).expand(2, -1, -1, -1)
    assert torch.equal(
        model.decode(tokens, steps=2, noise=noise), model.decode(tokens, steps=2, generator=seeded(4))
    )


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, TOKENS + 1])
def test_counts_beyond_the_registers_are_refused(model, count):
    with pytest.raises(ValueError, match=f"1 to {TOKENS} tokens.*{count} was asked"):
        model.encode(pictures(1), num_tokens=count)
    with pytest.raises(ValueError):
        model.encode(pictures(1)).prefix(count)


def test_images_without_tokens_or_with_too_many_are_refused_at_decoding(model):
    tokens = model.encode(pictures(2))
    with pytest.raises(ValueError, match="1 to 8 tokens per image; an image here has none"):
        model.decode(Tokens(indices=tokens.indices, lengths=torch.tensor([3, 0]), codebook_sizes=(60,)))
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        model.decode(tokens.indices.repeat(1, 2))
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        model.decode(tokens.indices[:, :0])
    with pytest.raises(ValueError, match="60"):
        model.decode(torch.full((1, 3), 60))


@pytest.mark.parametrize("guidance", [math.nan, math.inf, "strong", True])
def test_sampling_takes_finite_guidance_only(guidance):
    """Of any velocity, not only FlexTok's."""

    def velocity(step, x, guided):
        return x, x

    for given in (guidance, lambda time: guidance):
        with pytest.raises(ValueError, match="finite number"):
            flow.sample(velocity, torch.ones(1, 2), 2, given)
    expected = flow.sample(velocity, torch.ones(1, 2), 2, 3.0)
    assert torch.equal(flow.sample(velocity, torch.ones(1, 2), 2, lambda time: np.float32(3)), expected)


@pytest.mark.parametrize("guidance", [math.nan, math.inf, "strong"])
def test_guidance_must_be_finite_or_a_function(model, guidance):
    with pytest.raises(ValueError, match="finite number or a function"):
        model.decode(model.encode(pictures(1)), guidance=guidance)


def test_noise_and_generators_must_fit_the_batch(model):
    tokens = model.encode(pictures(2))
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\].*\[2, 4, 8, 8\]"):
        model.decode(tokens, noise=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="without a generator"):
        model.decode(tokens, noise=torch.zeros(2, 4, 8, 8), generator=seeded())
    with pytest.raises(ValueError, match="3 generators were given for 2 images"):
        model.decode(tokens, generator=[seeded()] * 3)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match="17×16"):
        model.encode(torch.zeros(1, 3, 17, 16))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder_dim": 65}, "encoder_dim is 65"),
        ({"latent_size": 7}, "latent_size is 7"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"kept_tokens": "all"}, "kept_tokens is 'all'"),
        ({"depth": 3}, "unknown key depth"),
    ],
)
def test_impossible_configurations_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        create("flextok", **{**SMALL, **change})


# ---- checkpoints and the original's configuration ----------------------------------------------------------


def test_saved_and_loaded_is_the_same_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, FlexTok)
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokens = model.encode(pictures(2), num_tokens=5)
    assert loaded.encode(pictures(2), num_tokens=5) == tokens
    assert torch.equal(loaded.decode(tokens, steps=2), model.decode(tokens, steps=2))
    assert FlexTok.from_pretrained(tmp_path).config == model.config


def test_position_tables_are_loaded_and_never_trained(model, tmp_path):
    changed = copy.deepcopy(model)
    changed.encoder.module_dict["enc_posemb_module"].posembs.add_(1)
    changed.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(
        loaded.encoder.module_dict["enc_posemb_module"].posembs,
        model.encoder.module_dict["enc_posemb_module"].posembs + 1,
    )
    assert not any("posemb_module.posembs" in name and "enc" in name for name, _ in loaded.named_parameters())


def test_the_published_graph_is_read():
    config = FlexTokConfig.parse(GRAPH)
    assert config == FlexTokConfig(max_timestep=1000.0, vae_scaling_factor=1.3)
    assert FlexTokConfig.parse({"config": GRAPH}) == config
    shuffled = copy.deepcopy(GRAPH)
    for side in ("encoder", "decoder"):
        shuffled[side]["module_dict"] = dict(sorted(shuffled[side]["module_dict"].items()))
    assert FlexTokConfig.parse(shuffled) == config


def encoder(graph):
    return graph["encoder"]["module_dict"]


def decoder(graph):
    return graph["decoder"]["module_dict"]


GRAPH_FAULTS = {
    "mask": (
        lambda g: encoder(g)["enc_seq_packer"].update(mask_mode="full"),
        "mask_mode='full'; this version accepts causal_last",
    ),
    "class": (lambda g: decoder(g)["dec_latent_dropout"].update(_target_="x.ZeroNullCond"), "x.ZeroNullCond"),
    "argument": (lambda g: decoder(g)["dec_transformer"].update(window=3), "argument window"),
    "module": (
        lambda g: decoder(g).update(extra={"_target_": "x.MLPHead"}),
        r"module decoder.extra \(x.MLPHead",
    ),
    "move": (
        lambda g: encoder(g)["enc_channels_to_last"]["per_sample_op"].update(_target_="x.sum_tensors"),
        "module encoder.enc_channels_to_last",
    ),
    "missing": (lambda g: encoder(g).pop("enc_register_module"), "lacks encoder.enc_register_module"),
    "widths": (lambda g: encoder(g)["enc_transformer"].update(dim=64), "dim=64; elsewhere it is 768"),
    "oblong": (lambda g: encoder(g)["enc_posemb_module"].update(max_sizes=[16, 8]), "grids are square"),
    "levels": (lambda g: g["regularizer"].update(levels=[8, 8]), r"levels=\(8, 8\)"),
    "time": (lambda g: decoder(g)["dec_time_embedder"].pop("max_timestep"), "lacks max_timestep"),
    "factor": (lambda g: g["vae"].update(scaling_factor=None), "neither scaling_factor nor hf_hub_path"),
    "section": (lambda g: g.pop("pipeline"), "lacks pipeline"),
}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_other_graphs_are_refused_by_name(fault):
    change, said = GRAPH_FAULTS[fault]
    graph = copy.deepcopy(GRAPH)
    change(graph)
    with pytest.raises(ValueError, match=said):
        FlexTokConfig.parse(graph)


def small_graph():
    """The published graph at the sizes of a tokenizer without VAE."""
    text = json.dumps(GRAPH)
    graph = json.loads(text.replace("768", "64").replace("[16, 16]", "[4, 4]").replace("256", "8"))
    decoder(graph)["dec_time_embedder"]["frequency_embedding_size"] = 256
    for side in ("enc", "dec"):
        graph[f"{side}oder"]["module_dict"][f"{side}_transformer"]["depth"] = 1
    return graph


def published_files(folder, *, head):
    """A checkpoint as its authors write it: the graph in config.json or in the head of the weights."""
    graph = small_graph()
    model = FlexTok(FlexTokConfig(**{**vars(FlexTokConfig.parse(graph)), "vae": False}))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {k: repr(v) for k, v in graph.items()} if head else None)
    if not head:
        (folder / "config.json").write_text(json.dumps({"config": graph}))
    return model


@pytest.mark.parametrize("head", [False, True])
def test_the_configuration_that_comes_with_the_weights_wins(tmp_path, monkeypatch, head):
    model = published_files(tmp_path, head=head)
    found = Located(
        tmp_path / "model.safetensors", None if head else json.loads((tmp_path / "config.json").read_text())
    )
    monkeypatch.setattr("vistok.checkpoint.fetch", lambda repo, file, **options: found)
    with pytest.warns(UserWarning, match="research only"):
        loaded = load("flextok-d12-d12-in1k")
    assert (loaded.name, loaded.config) == ("flextok-d12-d12-in1k", model.config)
    assert loaded.config.max_timestep == 1000.0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert FlexTok.from_pretrained(tmp_path).config == model.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = load("flextok-d12-d12-in1k", weights=tmp_path / "model.safetensors")
    assert given.config == model.config


def test_weights_without_any_configuration_say_what_they_need(tmp_path):
    published_files(tmp_path, head=False)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"max_timestep.*beside them or in the head.*config='path/to"):
        load(tmp_path)


@pytest.mark.parametrize("head", [False, True])
def test_a_repository_of_someone_is_read_with_the_configuration_that_comes_with_it(tmp_path, head):
    (tmp_path / "files").mkdir()
    model = published_files(tmp_path / "files", head=head)
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    options = cached(tmp_path / "hub", "someone/flextok", files)
    for loader in (load, FlexTok.from_pretrained):
        assert loader("hf://someone/flextok", **options).config == model.config
        assert loader(tmp_path / "files").config == model.config


@pytest.mark.parametrize("source", ["someone/flextok", "runs/flextok"])
def test_nothing_is_asked_of_the_hub_for_a_name_without_the_prefix(headless, source, caplog):
    for read in (FlexTok.from_pretrained, load_vae, headless.attach_vae):
        with pytest.raises(FileNotFoundError, match=f"hf://|no file or folder {source}"):
            read(source)
    assert "downloading" not in caplog.text


def test_a_section_in_the_head_of_a_file_that_is_no_literal_is_not_run(tmp_path):
    for text in ("(" * 10_000, "__import__('os')", "[" * 5000 + "]" * 5000, "9" * 2**21):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"encoder": text, "vae": "{}"})
        assert FlexTok.config_in_file(tmp_path / "model.safetensors") is None


def test_a_table_of_positions_beyond_memory_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="latent_size 65536 in patches of 2 needs a position table of"):
        create("flextok", latent_size=65536)


def test_a_missing_key_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["decoder.module_dict.dec_latent_dropout.nullcond"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing +decoder.module_dict.dec_latent_dropout.nullcond \[96\]"):
        load(tmp_path)


@pytest.mark.parametrize("name", [name for name in entries() if name.startswith("flextok")])
def test_published_names_build_and_say_that_their_weights_are_not_open(name):
    entry = entries()[name]
    assert entry.repo.startswith("EPFL-VILAB/")
    assert "not open source" in entry.license
    with torch.device("meta"):
        tokenizer = create(name)
    millions = sum(value.numel() for value in tokenizer.state_dict().values()) / 1e6
    assert millions == pytest.approx(entry.parameters, abs=0.06)
    assert tokenizer.quantizer.codebook_sizes == (64000,)


# ---- the VAE -----------------------------------------------------------------------------------------------


@pytest.fixture
def headless(model):
    """The same tokenizer with weights that hold no VAE."""
    bare = create("flextok", **{**SMALL, "vae": False, "vae_scaling_factor": None}).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("vae.")})
    return bare


def vae(model):
    """The model's VAE as diffusers makes it."""
    own = AutoencoderKL(**vae_config(model.config))
    own.load_state_dict(model.autoencoder.vae.state_dict())
    return own


def test_weights_without_a_vae_say_how_to_attach_one(headless):
    with pytest.raises(ValueError, match=r"attach_vae\('flextok-vae-c4'\)"):
        headless.encode(pictures(1))


@pytest.mark.parametrize("form", ["module", "folder", "file", "old names"])
def test_an_attached_vae_is_the_one_of_the_checkpoint(model, headless, tmp_path, form):
    source = vae(model)
    if form != "module":
        source.save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        if form == "old names":
            old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            state = load_file(path)
            for new, name in old.items():
                state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
            assert any(".query." in key for key in state)
            save_file(state, path)
        source = path if form == "file" else tmp_path
    headless.attach_vae(source)
    tokens = model.encode(pictures(2))
    assert headless.encode(pictures(2)) == tokens
    close(headless.decode(tokens, steps=2), model.decode(tokens, steps=2))
    assert not any(key.startswith("vae") for key in headless.state_dict())
    assert copy.deepcopy(headless).double().companion("vae").vae.encoder.conv_in.weight.dtype == torch.float64


def test_attaching_leaves_the_given_vae_as_it_was(model, headless):
    given = vae(model)
    upsampler = given.decoder.up_blocks[0].upsamplers[0]
    headless.attach_vae(given, scaling_factor=2.0)
    assert given.decoder.up_blocks[0].upsamplers[0] is upsampler
    assert headless.autoencoder.scaling_factor == 2.0


def test_the_wrong_vae_is_refused(model, headless, tmp_path):
    other = build(latent_channels=8)
    with pytest.raises(
        ValueError, match=r"8 latent channels at 1/2.*takes 4 channels at 1/2, as flextok-vae-c4"
    ):
        headless.attach_vae(vae(other))
    coarse = build(vae_block_out_channels=(8, 8, 16))
    with pytest.raises(ValueError, match="1/4 of the image's side"):
        headless.attach_vae(vae(coarse))
    with pytest.raises(ValueError, match="Linear was given"):
        headless.attach_vae(nn.Linear(1, 1))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not an AutoencoderKL"):
        headless.attach_vae(tmp_path)
    vae(model).save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for faults in (
        {"block_out_channels": [2**20] * 4},
        {"block_out_channels": "wide"},
        {"norm_num_groups": 0},
    ):
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | faults))
        with pytest.raises(ValueError, match="the configuration"):
            headless.attach_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match="has its VAE in its checkpoint"):
        model.attach_vae(vae(model))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        headless.attach_vae(tmp_path / "nowhere")


def test_latents_are_the_posteriors_mean_times_the_factor(model):
    images = pictures(2)
    with torch.no_grad():
        expected = vae(model).eval().encode(2 * images - 1).latent_dist.mean * 0.7
        close(model.autoencoder.encode(2 * images - 1), expected)
        close(model.autoencoder.decode(expected), vae(model).eval().decode(expected / 0.7).sample)


def test_a_missing_factor_is_asked_of_the_vaes_repository(monkeypatch):
    model = build(vae_scaling_factor=None, vae_source="owner/name")
    monkeypatch.setattr("vistok.models.flextok.vae._hub_config", lambda repo: {"scaling_factor": 0.3})
    assert model.autoencoder.scaling_factor == 0.3
    other = build(vae_scaling_factor=None, vae_source="owner/name")
    monkeypatch.setattr("vistok.models.flextok.vae._hub_config", lambda repo: {})
    with pytest.raises(ValueError, match="owner/name's has the VAE's scaling_factor"):
        other.encode(pictures(1))
    for value in ("wide", math.nan, -1, 0):
        monkeypatch.setattr(
            "vistok.models.flextok.vae._hub_config", lambda repo, value=value: {"scaling_factor": value}
        )
        with pytest.raises(ValueError, match="the scaling_factor of owner/name is"):
            other.encode(pictures(1))


def test_a_repository_that_only_a_configuration_names_is_not_downloaded(caplog):
    model = build(vae_scaling_factor=None, vae_source="owner/name")
    with pytest.raises(FileNotFoundError, match="'owner/name', which is not in the cache"):
        model.encode(pictures(1))
    assert "downloading" not in caplog.text


# ---- the yardstick, training, precision --------------------------------------------------------------------


def test_the_plain_implementation_gives_the_same_tokens_and_pictures(model):
    plain, images = PlainFlexTok(model), pictures(3)
    codes = model.encode(images).indices
    assert torch.equal(plain.encode(images), codes)
    noise = torch.randn(3, 4, 8, 8, generator=seeded())
    for count, guidance in ((8, 7.5), (3, 7.5), (3, 1.0)):
        found = model.decode(codes[:, :count], steps=3, guidance=guidance, noise=noise)
        close(found, plain.decode(codes[:, :count], noise, 3, guidance), 1e-4)


@pytest.mark.parametrize("times", ["mode", "logit_normal", "stratified"])
def test_training_sends_gradients_to_every_part_but_the_vae(times):
    torch.manual_seed(0)
    model = build(
        times=times, sample_posterior=True, kept_tokens="uniform_pow2", null_probability=0.5
    ).train()
    output = model(pictures(6))
    assert output.images is None  # the flow is the whole objective
    output.losses["flow"].backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {name for name, _ in model.named_parameters() if name.startswith("vae.")}
    assert all(p.grad.any() for n, p in model.named_parameters() if n not in silent)


def test_fresh_weights_predict_no_velocity():
    torch.manual_seed(0)
    fresh = create("flextok", **SMALL)
    assert not fresh.sample(grid_points(fresh, 1), steps=1, noise=torch.zeros(1, 4, 8, 8)).any()
    assert fresh.encode(pictures(2)).indices.unique().numel() == 1


@pytest.mark.parametrize("mode", ["uniform", "pow2", "uniform_pow2"])
def test_nested_dropout_keeps_one_to_all_tokens(mode):
    torch.manual_seed(0)
    drawn = draw_lengths(4000, 8, mode).bincount(minlength=9)
    assert not drawn[0]
    allowed = {"uniform": range(1, 9)}.get(mode, (1, 2, 4, 8))
    assert set(drawn.nonzero().flatten().tolist()) == set(allowed)
    if mode == "uniform_pow2":
        assert drawn[8] / 4000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_other_precisions_give_nearly_the_same_picture(model, dtype, tolerance):
    converted, tokens = copy.deepcopy(model).to(dtype), model.encode(pictures(2))
    decoded = converted.decode(tokens, steps=3, guidance=2.0)
    assert decoded.dtype == dtype
    assert (decoded.double() - model.decode(tokens, steps=3, guidance=2.0)).abs().mean() < tolerance
    assert converted.encode(pictures(2)).num_tokens == TOKENS
    if dtype == torch.float64:
        assert converted.encode(pictures(2)) == tokens


def test_what_the_quantizer_rounds_lies_between_its_levels():
    quantizer = FiniteScalarQuantizer((8, 5))
    bounded = quantizer.bound(torch.tensor([[[1e4, 1e4], [-1e4, -1e4], [0.0, 0.0]]]))
    close(bounded, torch.tensor([[[3.0035, 2.002], [-4.0035, -2.002], [0.0, 0.0]]]))
    with torch.device("meta"):
        assert FiniteScalarQuantizer((8, 5)).codebook_sizes == (40,)


# ---- recorded cases ----------------------------------------------------------------------------------------


def test_a_case_of_the_generator_without_weights_names_what_cannot_be_computed(tmp_path):
    save_file({"c2i_ids": torch.zeros(1)}, tmp_path / "case.safetensors")
    case = {
        "family": "flextok",
        "config": {"embed_dim": 192},
        "tensors": {"c2i_ids": ""},
        "reference": "search",
    }
    (tmp_path / "case.json").write_text(json.dumps(case))
    with pytest.raises(CannotBuild, match="does not compute: c2i_ids"):
        verify(tmp_path / "case.json")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_picture(model):
    moved, tokens = copy.deepcopy(model).cuda(), model.encode(pictures(2))
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    decoded = moved.decode(tokens, steps=3, noise=noise).cpu()
    torch.testing.assert_close(decoded, model.decode(tokens, steps=3, noise=noise), rtol=1e-2, atol=1e-2)
