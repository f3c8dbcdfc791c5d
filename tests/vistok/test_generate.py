"""What every generator does, whatever its family, and what is special to each."""

import itertools
import json
import math

import pytest
import tiny_generators
import tiny_tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny_generators import CASES, CLASSES, CODES, COUNT, build

import vistok
from vistok import generate
from vistok.generate.noise import ImageNoise, gumbel
from vistok.generate.registry import GENERATORS
from vistok.train.losses import autoregressive_token_loss, masked_token_loss

pytestmark = pytest.mark.usefixtures("small_and_quick")
LABELS = [3, 0, 4]


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return build(request.param)


def embedding(model):
    """The layer that every forward pass runs once, with the input ids."""
    return model.model.embeddings["word_embeddings"] if model.family == "maskgit" else model.embeddings


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the matrix --------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model):
    first, again, other = (model.sample(LABELS, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_tokens_carry_the_tokenizer_and_its_codes(model):
    tokens = model.sample(LABELS, generator=seeded())
    assert (tokens.tokenizer, tokens.codebook_sizes) == (model.config.tokenizer, (model.codebook_size,))
    assert tokens.indices.shape == (len(LABELS), model.num_tokens)
    assert tokens.grid == model.grid
    tokens.validate()


def test_a_picture_depends_neither_on_its_batch_nor_on_its_place(model):
    def alone(label, seed):
        return model.sample([label], generator=[seeded(seed)]).indices[0]

    for order in ([0, 1, 2], [2, 0, 1]):
        batch = model.sample([LABELS[i] for i in order], generator=[seeded(i) for i in order]).indices
        for row, i in enumerate(order):
            assert torch.equal(batch[row], alone(LABELS[i], i)), f"image {i} at place {row} of {order}"


def test_one_generator_gives_a_batch_in_parts_the_same_pictures(model):
    whole = model.sample([3, 3, 4, 0], generator=seeded())
    generator = seeded()
    parts = vistok.Tokens.cat([model.sample(part, generator=generator) for part in ([3], [3, 4], [0])])
    assert parts == whole
    assert not torch.equal(whole.indices[0], whole.indices[1]), "two pictures of one class are the same"


def test_temperature_0_takes_the_likeliest_tokens_whatever_the_seed(model):
    greedy = model.sample(LABELS, temperature=0, generator=seeded(1))
    assert greedy == model.sample(LABELS, temperature=0.0, generator=seeded(2))
    assert greedy != model.sample(LABELS, temperature=5.0, generator=seeded(1))


def test_guidance_of_the_unguided_value_runs_the_conditional_pass_alone(model):
    passes = []
    handle = embedding(model).register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    try:
        model.sample(LABELS, guidance=model.unguided(model.config), generator=seeded())
    finally:
        handle.remove()
    assert set(passes) <= {len(LABELS), 1}, passes


def test_guidance_changes_tokens(model):
    weak, strong = (model.sample(LABELS, guidance=g, temperature=0) for g in (1.0, 40.0))
    assert weak != strong


def test_classes_change_tokens(model):
    tokens = model.sample([0, 1], temperature=0, guidance=40.0)
    assert not torch.equal(tokens.indices[0], tokens.indices[1])


def test_sampling_equals_a_plain_loop_without_cache_or_batching(model):
    noise = Recorded(len(LABELS))
    tokens = model.sample(LABELS, noise=noise)
    plain = PLAIN[model.family](model, LABELS, noise)
    assert torch.equal(tokens.indices, plain), f"{tokens.indices.tolist()} by sample, {plain.tolist()} plain"


def test_sampling_is_free_of_dropout_and_leaves_the_mode_as_it_was(model):
    expected = model.sample(LABELS, generator=seeded())
    model.train()
    try:
        assert model.sample(LABELS, generator=seeded()) == expected
        assert model.training
        assert all(part.training for part in model.modules())
    finally:
        model.eval()


def test_no_classes_give_no_images(model):
    for none in ([], torch.zeros(0, dtype=torch.int64)):
        assert model.sample(none).indices.shape == (0, model.num_tokens)


@pytest.mark.parametrize(
    "condition", [torch.tensor([3]), [3], (3,), 3, torch.tensor(3), torch.tensor([3]).numpy()]
)
def test_one_class_is_taken_in_every_form(model, condition):
    assert model.sample(condition, generator=seeded()) == model.sample([3], generator=seeded())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_sample_valid_tokens(model, dtype):
    tokens = build_as(model, dtype).sample(LABELS, generator=seeded())
    tokens.validate()
    if dtype == torch.float64:
        assert tokens == model.sample(LABELS, generator=seeded())


def build_as(model, dtype):
    copy = GENERATORS.create(model.family, **vars(model.config))
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"condition": [0, CLASSES]},
            f"class {CLASSES} does not exist; .* takes classes in 0..{CLASSES - 1}",
        ),
        ({"condition": [-1]}, "class -1 does not exist"),
        ({"condition": [[1, 2]]}, r"classes have shape \[1, 2\]; .* int64 \[B\] or a list"),
        ({"condition": [0.5]}, r"classes are \[0.5\] \(torch.float32\)"),
        ({"condition": [True]}, r"torch.bool"),
        ({"condition": "dog"}, "classes are 'dog'"),
        ({"condition": None}, "classes are None"),
        ({"temperature": -0.1}, "temperature is -0.1; it takes a finite number of 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"guidance": -2}, "guidance is -2; it takes a finite number of 0 or more"),
        ({"guidance": True}, "guidance is True"),
        ({"top_k": 5}, "top_k does not apply to .*; it takes temperature, guidance"),
        ({"guidance_power": -1}, "guidance_scale_pow is -1"),
        ({"generator": [seeded()]}, "1 generators were given for 2 images"),
        ({"generator": seeded(), "noise": ImageNoise(2)}, "noise and a generator were given"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_sampled_says_what_is_accepted(model, change, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**{"condition": [0, 1], **change})


def test_a_generator_of_another_type_is_named(model):
    with pytest.raises(TypeError, match=r"generator is a int; give a torch\.Generator"):
        model.sample([0], generator=3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "8"])
def test_steps_are_a_whole_number_or_do_not_apply(model, steps):
    message = (
        "steps is .*; it takes a whole number of 1 or more" if "steps" in model.settings else "does not apply"
    )
    with pytest.raises(ValueError, match=message):
        model.sample([0], steps=steps)


def test_steps_are_the_forward_passes(model):
    if "steps" not in model.settings:
        pytest.skip("one token per pass")
    passes = []
    handle = embedding(model).register_forward_pre_hook(lambda *_: passes.append(1))
    model.sample([0], steps=3, guidance=0.0)
    handle.remove()
    assert len(passes) == 3


def test_a_setting_that_nothing_states_is_asked_for(model):
    for name in ("temperature", "guidance"):
        silent = build_with(model, **{model.settings[name]: None})
        with pytest.raises(ValueError, match=rf"does not state {model.settings[name]}; give {name}="):
            silent.sample([0])
        published = getattr(model.config, model.settings[name])
        sampled = silent.sample(LABELS, generator=seeded(), **{name: published})
        assert sampled == model.sample(LABELS, generator=seeded())


def build_with(model, **changes):
    return tiny_generators.filled(GENERATORS.create(model.family, **{**vars(model.config), **changes}))


def test_logits_that_overflow_are_not_turned_into_tokens(model):
    broken = build_with(model)
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if name.endswith("lm_head.bias"))[0] = math.inf
    with pytest.raises(ValueError, match=r"logits of .* hold NaN or infinity.*dtype='float32'"):
        broken.sample([0])


def test_token_indices_of_another_shape_are_refused_by_logits(model):
    with pytest.raises(ValueError, match=rf"token indices have shape \[1, {COUNT + 1}\]"):
        model.logits(torch.zeros(1, COUNT + 1, dtype=torch.int64), torch.tensor([0]))


# ---- with a tokenizer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(model):
    """One that decodes what the model writes: a grid, or the tokens of a TiTok."""
    if model.grid is None:
        tokenizer = tiny_tokenizers.build("titok-vq")
    else:
        tokenizer = tiny_tokenizers.build("maskgit-vqgan", num_embeddings=CODES)
    tokenizer.name = tiny_generators.TOKENIZER
    return tokenizer


def test_from_class_to_picture(model, tokenizer):
    model.check_tokenizer(tokenizer)
    images = tokenizer.decode(model.sample(LABELS, generator=seeded()))
    height, width = (tokenizer.image_size,) * 2 if model.grid is None else (16 * side for side in model.grid)
    assert images.shape == (len(LABELS), 3, height, width)
    assert bool(images.isfinite().all())


def test_a_tokenizer_that_does_not_fit_is_refused(model, tokenizer):
    for change, message in (
        ({"tokenizer": "another"}, "writes tokens of 'another'; 'tiny' cannot decode them"),
        ({"codebook_size": 32}, r"one codebook of 32; tiny has codebook sizes \(64,\)"),
        (
            {"image_seq_len": 5} | ({"grid": None} if model.grid else {}),
            "writes 5 tokens per image; tiny decodes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_with(model, **change).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="tokens of 'another' cannot be decoded by 'tiny'"):
        tokenizer.decode(build_with(model, tokenizer="another").sample([0]))


# ---- weights -----------------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = generate.load(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.sample(LABELS, generator=seeded()) == model.sample(LABELS, generator=seeded())
    assert type(model).from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_a_file_that_is_cut_off_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"not a whole safetensors file .* fetch it again"):
        generate.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state, key: state[key].fill_(math.nan), "holds NaN or infinity .* fetch or train them again"),
        (lambda state, key: state.pop(key), "1 missing|missing 1|does not fit this"),
        (lambda state, key: state.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda state, key: state.update({key: torch.zeros(3)}), "misshapen"),
    ],
)
def test_weights_that_do_not_fit_say_which(model, tmp_path, damage, message):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state, next(key for key in state if key.endswith("lm_head.weight")))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        generate.load(tmp_path)


def test_a_configuration_of_another_family_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"family": "titok"}))
    with pytest.raises(ValueError, match=r"unknown family 'titok'; this version has .*maskgit"):
        generate.load(tmp_path)


def test_a_class_refuses_weights_of_another_family(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = next(cls for name, cls in GENERATORS.families().items() if name != model.family)
    with pytest.raises(ValueError, match=r"checkpoint, not one of .*; use .* vistok\.generate\.load"):
        other.from_pretrained(tmp_path)


def nested(model):
    """The configuration as the original's config.json has it."""
    fields = vars(model.config).copy()
    tokenizer = {"codebook_size": fields.pop("codebook_size"), "num_latent_tokens": COUNT}
    fields["image_seq_len"] = "${model.vq_model.num_latent_tokens}"
    for own in ("tokenizer", "grid"):
        fields.pop(own, None)
    return {
        "experiment": {},
        "model": {"vq_model": tokenizer, "generator": {**fields, "use_checkpoint": False}},
    }


def test_published_files_are_recognised_by_keys_and_nested_configuration(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(nested(model)))
    loaded = generate.load(tmp_path)
    assert type(loaded) is type(model)
    unstated = dict.fromkeys({"tokenizer", "grid"} & vars(model.config).keys())
    assert vars(loaded.config) == vars(model.config) | unstated
    assert loaded.sample([1]).tokenizer is None
    assert torch.equal(
        loaded.sample([1], generator=seeded()).indices, model.sample([1], generator=seeded()).indices
    )


def test_bare_weights_need_what_the_keys_do_not_show(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    if model.family == "rar":
        loaded = generate.load(tmp_path / "model.safetensors")
        assert loaded.config.num_attention_heads == model.config.num_attention_heads
        with pytest.raises(ValueError, match="does not state randomize_temperature; give temperature="):
            loaded.sample([0])
    else:
        with pytest.raises(
            ValueError, match=f"weights of the family '{model.family}'.*give their config.json"
        ):
            generate.load(tmp_path / "model.safetensors")


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.list_generators())
def test_published_configurations_have_the_published_number_of_parameters(name):
    entry = GENERATORS.entries()[name]
    with torch.device("meta"):
        model = generate.create(name)
    millions = sum(value.numel() for value in model.state_dict().values()) / 1e6
    assert millions == pytest.approx(entry.parameters, abs=0.5 if entry.parameters > 250 else 0.05)
    assert model.config.tokenizer in vistok.list_tokenizers() or "tokenizer of a grid" in entry.notes
    assert model.check_settings({}) == model.config
    assert "gFID" in entry.figures or "gFID" in entry.notes


def test_a_generator_fits_the_tokenizer_that_its_row_names():
    for name in generate.list_generators():
        with torch.device("meta"):
            model = generate.create(name)
            if model.config.tokenizer is None:
                continue
            tokenizer = vistok.create(model.config.tokenizer)
        tokenizer.name = model.config.tokenizer
        model.check_tokenizer(tokenizer)


def test_a_grid_is_refused_by_a_tokenizer_of_one_size():
    one_size = tiny_tokenizers.build("titok-vq")
    with pytest.raises(ValueError, match=r"a grid of \(2, 3\) tokens; titok does not decode grids"):
        build("rar-grid").check_tokenizer(one_size)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match=r"unknown generator 'maskgit-l23'\. Did you mean maskgit-l32"):
        generate.create("maskgit-l23")
    with pytest.raises(ValueError, match="unknown generator 'titok-l32'"):
        generate.load("titok-l32")


def test_weights_that_are_not_on_this_machine_say_how_to_get_them(offline):
    with pytest.raises(
        FileNotFoundError, match=r"rar_b\.bin of the hub repository 'yucornetto/RAR'.*weights="
    ):
        generate.load("rar-b")


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("maskgit", {"hidden_size": 33}, "hidden_size is 33; it must be a multiple of num_attention_heads"),
        (
            "maskgit",
            {"guidance_decay": "cosine"},
            "guidance_decay is 'cosine'; it takes 'constant' or 'linear'",
        ),
        ("maskgit", {"dropout": 1.5}, "dropout is 1.5"),
        ("maskgit-uvit", {"num_steps": 0}, "num_steps is 0"),
        ("maskgit", {"width": 3}, "unknown key width"),
        ("rar", {"randomize_temperature": -1.0}, "randomize_temperature is -1"),
        ("rar", {"randomness_anneal_start": 9, "randomness_anneal_end": 8}, "the first not after the second"),
        ("rar", {"grid": (2, 2)}, r"grid is \(2, 2\); it has the 6 places of image_seq_len"),
        ("rar", {"image_seq_len": 0}, "image_seq_len is 0"),
    ],
)
def test_configurations_that_cannot_be_built_name_the_field(family, change, message):
    with pytest.raises(ValueError, match=message):
        generate.create(family, **{**tiny_generators.NETWORK, **change})


def test_sizes_must_be_stated():
    with pytest.raises(ValueError, match=r"codebook_size, image_seq_len, hidden_size.* must be given"):
        generate.create("maskgit")


def test_a_network_of_the_other_type_names_its_family():
    config = nested(build("bert-linear"))
    config["model"]["generator"]["model_type"] = "UViT"
    with pytest.raises(
        ValueError, match="model_type is 'UViT'; maskgit is 'ViT': use the family 'maskgit-uvit'"
    ):
        generate.create("maskgit", **config)
    assert generate.create("maskgit-uvit", **config).family == "maskgit-uvit"


def test_old_position_ids_in_a_bert_checkpoint_are_dropped(tmp_path):
    model = build("bert-linear")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        state | {"model.embeddings.position_ids": torch.arange(7)[None]}, tmp_path / "model.safetensors"
    )
    assert generate.load(tmp_path).sample([1], generator=seeded()) == model.sample([1], generator=seeded())


# ---- random numbers ----------------------------------------------------------------------------------------


def test_the_largest_noisy_logit_follows_the_softmax():
    draws, logits = 20_000, torch.tensor([1.0, 0.0, -1.0, 2.5])
    choices = (logits + ImageNoise(draws, seeded()).gumbel(4)).argmax(-1)
    counts, expected = choices.bincount(minlength=4), draws * logits.softmax(-1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 99.9% of chi-square with 3 degrees


def test_gumbel_draws_are_finite_at_the_ends_of_the_unit_interval():
    draws = gumbel(torch.tensor([0.0, 1 - 2**-24, 0.5]))
    assert bool(draws.isfinite().all())
    assert float(draws[2]) == pytest.approx(-math.log(math.log(2)))


def test_without_a_generator_pictures_follow_the_seed_of_torch():
    model = build("bert-linear")
    torch.manual_seed(5)
    first = model.sample(LABELS)
    assert model.sample(LABELS) != first
    torch.manual_seed(5)
    assert model.sample(LABELS) == first


# ---- plain samplers ----------------------------------------------------------------------------------------


class Recorded:
    """A stream of draws that can be read twice."""

    def __init__(self, batch):
        self.batch, self.drawn, self.random = batch, [], seeded(11)

    def gumbel(self, *shape):
        self.drawn.append(gumbel(torch.rand(self.batch, *shape, generator=self.random)))
        return self.drawn[-1]


def plain_maskgit(model, labels, noise):
    """MaskGIT image after image, with two passes per step, by the published rules."""
    config, mask, results = model.config, model.codebook_size, []
    for image, label in enumerate(labels):
        draws, ids = iter(noise.drawn), [mask] * COUNT
        for step in range(config.num_steps):
            done = (step + 1) / config.num_steps
            temperature = config.randomize_temperature * (1 - done)
            inputs = torch.tensor([ids])
            yes, no = (model.logits(inputs, torch.tensor([c]))[0].detach() for c in (label, CLASSES))
            g, share = config.guidance_scale, step / config.num_steps
            if config.guidance_decay == "power-cosine":
                logits = no + (yes - no) * ((g - 1) * (1 - math.cos(math.pi * share**3)) / 2 + 1)
            else:
                logits = yes + (yes - no) * (g if config.guidance_decay == "constant" else g * share)
            if config.softmax_temperature_annealing:
                logits = logits / (0.5 + 0.8 * (1 - done))
            first = next(draws)[image] if temperature else torch.zeros(COUNT, CODES)
            chosen = [
                int((logits[k] + temperature * first[k]).argmax()) if ids[k] == mask else ids[k]
                for k in range(COUNT)
            ]
            if done < 1:
                second = next(draws)[image]
                masked = [k for k in range(COUNT) if ids[k] == mask]
                count = math.floor(COUNT * math.acos(done) / (math.pi / 2))
                count = max(1, min(len(masked) - 1, count))
                sure = {k: float(logits[k, chosen[k]] + temperature * second[k]) for k in masked}
                for k in sorted(masked, key=sure.get)[:count]:
                    chosen[k] = mask
            ids = chosen
        results.append(ids)
    return torch.tensor(results)


def plain_rar(model, labels, noise):
    """RAR image after image, with the whole prefix and two passes for every token."""
    config, results = model.config, []
    for image, label in enumerate(labels):
        ids = []
        for step in range(COUNT):
            prefix = torch.tensor([ids], dtype=torch.int64)
            yes, no = (model.logits(prefix, torch.tensor([c]))[0, -1] for c in (label, CLASSES))
            rise = (1 - math.cos(math.pi * (step / COUNT) ** config.guidance_scale_pow)) / 2
            logits = no + (yes - no) * ((config.guidance_scale - 1) * rise + 1)
            noisy = (logits / config.randomize_temperature).log_softmax(-1) + noise.drawn[step][image]
            ids.append(int(noisy.argmax()))
        results.append(ids)
    return torch.tensor(results)


PLAIN = {"maskgit": plain_maskgit, "maskgit-uvit": plain_maskgit, "rar": plain_rar}


# ---- MaskGIT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [
        (32, 8, "32 29 26 24 21 18 14 10 0"),
        (64, 8, "64 58 53 48 42 36 29 20 0"),
        (128, 16, "128 122 117 112 107 102 96 91 85 79 72 66 58 50 41 28 0"),
        (4, 9, "4 3 2 1 1 1 1 1 1 0"),
    ],
)
def test_masked_tokens_fall_along_the_arccosine(count, steps, expected):
    model = build("bert-linear", image_seq_len=count, hidden_size=8, num_hidden_layers=1)
    settings = model.check_settings({"steps": steps})
    states = torch.stack(list(model.states(torch.tensor([1, 2]), settings, ImageNoise(2, seeded()))))
    counts = (states == CODES).sum(2)
    assert " ".join(map(str, counts[:, 0].tolist())) == expected
    assert torch.equal(counts[:, 0], counts[:, 1])


def test_a_token_once_kept_stays(model):
    if "steps" not in model.settings:
        pytest.skip("tokens are written once")
    states = list(model.states(torch.tensor(LABELS), model.config, ImageNoise(3, seeded())))
    for before, after in itertools.pairwise(states):
        kept = before != CODES
        assert torch.equal(before[kept], after[kept])


def test_options_of_one_run_take_the_place_of_the_published_ones():
    model = build("bert-linear")
    published = build("bert-linear", guidance_decay="constant", softmax_temperature_annealing=False)
    changed = model.sample(LABELS, guidance_decay="constant", annealing=False, generator=seeded())
    assert changed == published.sample(LABELS, generator=seeded())
    with pytest.raises(ValueError, match="guidance_decay is 'never'"):
        model.sample(LABELS, guidance_decay="never")


def test_masks_for_training_hide_the_share_of_the_arccosine():
    model = build("bert-linear", image_seq_len=50)
    indices = torch.randint(CODES, (4000, 50), generator=seeded())
    inputs, mask = model.mask_tokens(indices, seeded())
    assert torch.equal(inputs == CODES, mask)
    assert torch.equal(inputs[~mask], indices[~mask])
    counts = mask.sum(1)
    assert (int(counts.min()), int(counts.max())) == (1, 50)
    assert float(counts.float().mean()) == pytest.approx(50 * 2 / math.pi, rel=0.02)  # mean of arccos(u)·2/π
    assert float(mask.float().mean(0).std()) < 0.02, "some places are masked more often than others"


# ---- RAR ---------------------------------------------------------------------------------------------------


def test_logits_of_a_prefix_are_those_of_the_whole_image():
    model = build("rar")
    indices, classes = torch.randint(CODES, (2, COUNT), generator=seeded()), torch.tensor([1, CLASSES])
    orders = torch.stack([torch.randperm(COUNT, generator=seeded(i)) for i in range(2)])
    for order in (None, orders):
        whole = model.logits(indices, classes, order)
        assert whole.shape == (2, COUNT + 1, CODES)
        for k in range(COUNT):
            part = model.logits(indices[:, :k], classes, order)
            torch.testing.assert_close(part, whole[:, : k + 1], atol=1e-5, rtol=1e-5)


def test_the_raster_order_is_the_default_and_another_changes_logits():
    model = build("rar")
    indices, classes = torch.randint(CODES, (1, COUNT), generator=seeded()), torch.tensor([1])
    raster = torch.arange(COUNT)[None]
    assert torch.equal(model.logits(indices, classes), model.logits(indices, classes, raster))
    assert not torch.allclose(model.logits(indices, classes), model.logits(indices, classes, raster.flip(1)))
    with pytest.raises(ValueError, match=rf"orders have shape \[1, {COUNT - 1}\]"):
        model.logits(indices, classes, raster[:, 1:])


def test_guidance_0_is_no_guidance_as_published():
    model = build("rar")
    zero, one = (model.sample(LABELS, guidance=g, generator=seeded()) for g in (0, 1))
    assert zero == one


def test_modulations_in_parts_give_the_same_tokens(monkeypatch):
    model = build("rar")
    expected = model.sample(LABELS, generator=seeded())
    monkeypatch.setattr("vistok.generate.rar.MODULATION_NUMBERS", 1)
    assert model.sample(LABELS, generator=seeded()) == expected


def test_training_orders_turn_from_random_to_raster():
    model = build("rar", randomness_anneal_start=100, randomness_anneal_end=200)
    raster = torch.arange(COUNT)

    def share(step):
        orders = model.training_orders(4000, step, seeded())
        assert torch.equal(orders.sort(1).values, raster.expand(4000, -1))
        return float((orders != raster).any(1).float().mean())

    identical = 1 / math.factorial(COUNT)
    assert share(0) == pytest.approx(1 - identical, abs=0.002)
    assert share(150) == pytest.approx((1 - identical) / 2, abs=0.03)
    assert share(200) == 0


# ---- training ----------------------------------------------------------------------------------------------


def test_classes_are_dropped_at_the_configured_rate(model):
    classes = torch.full((4000,), 2)
    dropped = model.drop_classes(classes, seeded())
    assert set(dropped.tolist()) == {2, CLASSES}
    share = float((dropped == CLASSES).float().mean())
    assert share == pytest.approx(model.config.class_label_dropout, abs=0.02)


def test_a_model_that_learned_two_images_samples_them():
    images = torch.randint(CODES, (2, COUNT), generator=seeded(3))
    classes = torch.tensor([0, 1])
    for name in ("bert-linear", "uvit-power-cosine", "rar"):
        torch.manual_seed(0)
        model = GENERATORS.create(CASES[name][0], **{**CASES[name][1], "dropout": 0.0, "attn_drop": 0.0})
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(150):
            if name == "rar":
                orders = model.training_orders(2, step)
                labels = images.gather(1, orders)
                loss, _ = autoregressive_token_loss(model.logits(labels, classes, orders)[:, :-1], labels)
            else:
                inputs, mask = model.mask_tokens(images)
                loss, _ = masked_token_loss(model.logits(inputs, classes), images, mask, label_smoothing=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sampled = model.sample(classes, temperature=0, guidance=model.unguided(model.config)).indices
        assert torch.equal(sampled, images), name
