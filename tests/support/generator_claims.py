"""What generators of LLaMA blocks have in common: claims that hold for each, and a plain computation of the
blocks."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_generators import CLASSES, filled

from vistok import Tokens, generate
from vistok.generate.llama import choose
from vistok.generate.noise import ImageNoise
from vistok.generate.registry import GENERATORS

LABELS = [3, 0, 4, 1, 2]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(tokens):
    """The codes or bits of tokens."""
    return tokens.indices if tokens.bits is None else tokens.bits


def changed(model, **changes):
    """The same family with other fields of the configuration and weights of the same rule."""
    return filled(GENERATORS.create(model.family, **{**vars(model.config), **changes}))


# ---- claims ------------------------------------------------------------------------------------------------


def a_seed_gives_the_same_tokens_and_another_others(model):
    first, again, other = (model.sample(LABELS, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    first.validate()


def an_image_depends_neither_on_its_batch_nor_on_its_place(model):
    alone = [data(model.sample([label], generator=[seeded(i)]))[0] for i, label in enumerate(LABELS)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        batch = model.sample([LABELS[i] for i in order], generator=[seeded(i) for i in order])
        for row, i in zip(data(batch), order, strict=True):
            assert torch.equal(row, alone[i]), f"image {i} of {order}"


def one_generator_gives_a_batch_in_parts_the_same_images(model):
    whole, generator = model.sample([3, 3, 4, 0], generator=seeded()), seeded()
    parts = Tokens.cat([model.sample(part, generator=generator) for part in ([3], [3, 4], [0])])
    assert parts == whole
    assert not torch.equal(data(whole)[0], data(whole)[1]), "two images of one class are the same"


def temperature_0_takes_the_likeliest_codes_whatever_the_seed(model):
    greedy = model.sample(LABELS, temperature=0, generator=seeded(1))
    assert greedy == model.sample(LABELS, temperature=0, generator=seeded(2))
    assert greedy == model.sample(LABELS, top_k=1, generator=seeded(3))
    assert greedy != model.sample(LABELS, temperature=5.0, top_k=0, top_p=1.0, generator=seeded(1))


def guidance_1_runs_the_conditional_pass_alone(model):
    batches = {1.0: set(), 2.0: set()}
    for guidance, sizes in batches.items():
        handle = model.norm.register_forward_pre_hook(
            lambda _, inputs, sizes=sizes: sizes.add(len(inputs[0]))
        )
        model.sample(LABELS, guidance=guidance, generator=seeded())
        handle.remove()
    assert batches == {1.0: {len(LABELS)}, 2.0: {2 * len(LABELS)}}
    assert model.unguided(model.config) == 1


def guidance_and_classes_change_tokens(model):
    weak, strong = (model.sample(LABELS, guidance=scale, temperature=0) for scale in (1.0, 20.0))
    assert weak != strong
    assert len({tuple(row.flatten().tolist()) for row in data(strong)}) == len(LABELS)


def sampling_is_free_of_dropout_and_leaves_the_mode_as_it_was(model):
    expected = model.sample(LABELS, generator=seeded())
    model.train()
    try:
        assert model.sample(LABELS, generator=seeded()) == expected
        assert all(part.training for part in model.modules())
    finally:
        model.eval()


def no_classes_give_no_images_and_one_gives_one(model):
    shape = data(model.sample(LABELS, generator=seeded())).shape
    for none in ([], torch.zeros(0, dtype=torch.int64)):
        assert data(model.sample(none)).shape == (0, *shape[1:])
    assert data(model.sample(3)).shape == (1, *shape[1:])


def other_dtypes_sample_valid_tokens(model):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        copy = changed(model).to(dtype)
        tokens = copy.sample(LABELS, generator=seeded())
        tokens.validate()
        if dtype == torch.float64:
            assert tokens == model.sample(LABELS, generator=seeded())


def what_cannot_be_sampled_names_what_is_accepted(model):
    for change, message in (
        ({"condition": [0, CLASSES]}, rf"class {CLASSES} does not exist; .* 0\.\.{CLASSES - 1}"),
        ({"condition": [0.5]}, r"classes are \[0.5\]"),
        ({"temperature": -1}, "temperature is -1; it takes a finite number of 0 or more"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"top_k": -1}, "top_k is -1; it takes a number from 0"),
        ({"top_k": 2.5}, "top_k .*2.5"),
        ({"top_p": 0}, r"top_p is 0\.0; it takes a number"),
        ({"steps": 3}, "steps does not apply to .*; it takes temperature, guidance, top_k, top_p"),
        ({"generator": [seeded()]}, "1 generators were given for 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(**{"condition": [0, 1], **change})


def a_setting_that_nothing_states_is_asked_for(model):
    for name in ("temperature", "guidance"):
        field = model.settings[name]
        silent = changed(model, **{field: None})
        with pytest.raises(ValueError, match=rf"does not state {field}; give {name}="):
            silent.sample([0])
        sampled = silent.sample(LABELS, generator=seeded(), **{name: getattr(model.config, field)})
        assert sampled == model.sample(LABELS, generator=seeded())


def logits_that_overflow_are_not_turned_into_tokens(model):
    broken = changed(model)
    with torch.no_grad():
        broken.norm.weight[0] = math.inf
    with pytest.raises(ValueError, match=r"logits of .* hold NaN or infinity"):
        broken.sample([0])


def save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = generate.load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    assert loaded.sample(LABELS, generator=seeded()) == model.sample(LABELS, generator=seeded())


def bare_weights_need_their_configuration(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"weights of the family '{model.family}', whose heads .* give config="
    ):
        generate.load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(model.config)))
    assert generate.load(tmp_path).sample([1], temperature=0) == model.sample([1], temperature=0)


def weights_that_do_not_fit_name_the_key(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("layers.0.attention.wo.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wo\.weight"):
        generate.load(tmp_path)


def sampling_follows_the_probabilities_of_the_first_token(model):
    count = 4000
    settings = model.check_settings({})
    with torch.no_grad():
        _, logits = next(model.guided_logits(torch.tensor([2]), settings, model.empty_codes(1)))
    chosen = choose(logits.expand(count, *logits.shape[1:]), settings, ImageNoise(count, seeded()))
    logits = logits[0, 0] / settings.temperature  # [V] or [t, V]
    for part, row in enumerate(logits.view(-1, logits.shape[-1])):
        expected = count * plain_restricted(row, settings.top_k, settings.top_p)
        counts = chosen.view(count, -1)[:, part].bincount(minlength=len(row))
        assert not counts[expected == 0].any()
        kept = expected > 5
        error = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
        assert float(error) < int(kept.sum()) + 5 * math.sqrt(2 * int(kept.sum()))


CLAIMS = [
    a_seed_gives_the_same_tokens_and_another_others,
    an_image_depends_neither_on_its_batch_nor_on_its_place,
    one_generator_gives_a_batch_in_parts_the_same_images,
    temperature_0_takes_the_likeliest_codes_whatever_the_seed,
    guidance_1_runs_the_conditional_pass_alone,
    guidance_and_classes_change_tokens,
    sampling_is_free_of_dropout_and_leaves_the_mode_as_it_was,
    no_classes_give_no_images_and_one_gives_one,
    other_dtypes_sample_valid_tokens,
    what_cannot_be_sampled_names_what_is_accepted,
    a_setting_that_nothing_states_is_asked_for,
    logits_that_overflow_are_not_turned_into_tokens,
    sampling_follows_the_probabilities_of_the_first_token,
]
FILE_CLAIMS = [
    save_and_load_give_the_same_model,
    bare_weights_need_their_configuration,
    weights_that_do_not_fit_name_the_key,
]


# ---- plain computation -------------------------------------------------------------------------------------


def plain_restricted(logits, top_k, top_p):
    """Probabilities [V] of the codes that are drawn from, from a list sorted by hand."""
    order = sorted(range(len(logits)), key=lambda code: -float(logits[code]))
    if top_k:
        order = [code for code in order if logits[code] >= logits[order[min(top_k, len(order)) - 1]]]
    weights = {code: math.exp(float(logits[code]) - float(logits[order[0]])) for code in order}
    total, reached, kept = sum(weights.values()), 0.0, {}
    for code in order:
        if reached >= top_p * total:
            break
        kept[code] = weights[code]
        reached += weights[code]
    return torch.tensor([kept.get(code, 0.0) / reached for code in range(len(logits))])


def plain_transformer(model, rows, places, visible):
    """Normalised rows [R, D] of one image after all blocks, head by head and row by row.

    `places` holds the two positions of each row, None for a class, and `visible` how many rows each sees.
    """
    state, config = model.state_dict(), model.config
    head = config.dim // config.n_head
    half = head // 2
    angles = [config.rope_base ** (-2 * i / half) for i in range(half // 2)]
    turns = [
        [0j] * half
        if place is None
        else [complex(math.cos(p * a), math.sin(p * a)) for p in place for a in angles]
        for place in places
    ]
    turns = torch.tensor(turns)  # complex [R, d/2]

    def normalised(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * state[weight]

    x = rows
    for layer in range(config.n_layer):
        name = f"layers.{layer}."
        qkv = normalised(x, f"{name}attention_norm.weight") @ state[f"{name}attention.wqkv.weight"].T
        out = torch.zeros_like(x)
        for h in range(config.n_head):
            q, k, v = (
                qkv[:, part * config.dim + h * head : part * config.dim + (h + 1) * head] for part in range(3)
            )
            q, k = (
                torch.view_as_real(
                    torch.view_as_complex(each.reshape(-1, half, 2).contiguous()) * turns
                ).flatten(1)
                for each in (q, k)
            )
            for row, end in enumerate(visible):
                weights = (k[:end] @ q[row] / math.sqrt(head)).softmax(0)
                out[row, h * head : (h + 1) * head] = weights @ v[:end]
        x = x + out @ state[f"{name}attention.wo.weight"].T
        y = normalised(x, f"{name}ffn_norm.weight")
        w1, w2, w3 = (state[f"{name}feed_forward.w{i}.weight"] for i in (1, 2, 3))
        x = x + (F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    return normalised(x, "norm.weight")


def plain_choice(logits, settings, noise):
    """One code from guided logits [V] and its Gumbel noise [V]."""
    scaled = logits / settings.temperature
    probabilities = plain_restricted(scaled, settings.top_k, settings.top_p)
    return int((probabilities.log() + noise).argmax())
