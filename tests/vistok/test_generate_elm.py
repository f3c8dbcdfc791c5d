"""ELM's language model: sub-codes, schedules of guidance, and tokens that its autoencoder decodes."""

import math

import pytest
import tiny_tokenizers
import torch
from generator_claims import (
    CLAIMS,
    FILE_CLAIMS,
    LABELS,
    changed,
    plain_choice,
    plain_transformer,
    seeded,
)
from tiny_generators import CLASSES, LLAMA_CASES, TOKENIZER, build

from vistok import generate
from vistok.generate.elm import SCHEDULES, bits_to_subcodes, subcodes_to_bits
from vistok.generate.noise import ImageNoise
from vistok.train.losses import autoregressive_token_loss

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture(scope="module", params=[name for name in LLAMA_CASES if name.startswith("elm")])
def model(request):
    return build(request.param)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_generator_keeps_its_contract(model, claim):
    claim(model)


@pytest.mark.parametrize("claim", FILE_CLAIMS, ids=lambda claim: claim.__name__)
def test_files(model, tmp_path, claim):
    claim(model, tmp_path)


def plain_logits(model, codes, label):
    """Logits [P+1, t, V] of one image whose first tokens have these sub-codes [P, t]."""
    state, t, side = model.state_dict(), model.config.token_each, math.isqrt(model.num_tokens)
    rows = [state["cls_embedding.embedding_table.weight"][label]]
    for token in codes:
        if t == 1:
            rows.append(state["tok_embedder.weight"][token[0]])
        else:
            parts = [state[f"tok_embedder.{i}.weight"][code] for i, code in enumerate(token)]
            rows.append(state["proj.weight"] @ torch.cat(parts))
    places = [None] + [divmod(k, side) for k in range(len(codes))]
    x = plain_transformer(model, torch.stack(rows), places, [r + 1 for r in range(len(rows))])
    heads = ["output.weight"] if t == 1 else [f"output.{i}.weight" for i in range(t)]
    return torch.stack([x @ state[head].T for head in heads], 1)


PLAIN_SCHEDULES = {
    "constant": lambda i, n, s: s,
    "linear": lambda i, n, s: 1 + (s - 1) * (i + 1) / n,
    "cos": lambda i, n, s: 1 + (s - 1) * math.sin((i + 1) / n * math.pi / 2),
    "log": lambda i, n, s: 1 + (s - 1) * math.log(1 + (i + 1) / n * (math.exp(1) - 1)),
    "square": lambda i, n, s: 1 + (s - 1) * ((i + 1) / n) ** 2,
    "square_root": lambda i, n, s: 1 + (s - 1) * (i / n) ** 0.5,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampling_equals_a_plain_loop_without_cache_or_batching(model, schedule):
    settings = model.check_settings({"schedule": schedule})
    sampled = model.sample(LABELS, schedule=schedule, generator=seeded(5))
    noise, results = ImageNoise(len(LABELS), seeded(5)), [[] for _ in LABELS]
    t, count = model.config.token_each, model.num_tokens
    for step in range(count):
        draws = noise.gumbel(t, model.codebook_size)
        scale = PLAIN_SCHEDULES[schedule](step, count, settings.cfg_scale)
        for codes, label, draw in zip(results, LABELS, draws, strict=True):
            yes, no = (plain_logits(model, codes, c)[-1] for c in (label, CLASSES))
            guided = no + scale * (yes - no)
            codes.append([plain_choice(guided[i], settings, draw[i]) for i in range(t)])
    assert model.subcodes(sampled).tolist() == results


def test_logits_equal_plain_ones_and_do_not_depend_on_later_tokens(model):
    config = model.config
    shape = (2, model.num_tokens - 1, config.token_each)
    codes, classes = torch.randint(model.codebook_size, shape, generator=seeded()), torch.tensor([1, CLASSES])
    whole = model.logits(codes, classes)
    assert whole.shape == (2, model.num_tokens, config.token_each, model.codebook_size)
    for image in range(2):
        plain = plain_logits(model, codes[image].tolist(), int(classes[image]))
        torch.testing.assert_close(whole[image], plain, atol=1e-5, rtol=1e-4)
    for count in (0, 1, 4):
        part = model.logits(codes[:, :count], classes)
        torch.testing.assert_close(part, whole[:, : count + 1], atol=1e-5, rtol=1e-5)


def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(model):
    shape = (2, model.num_tokens, model.config.token_each)
    codes, classes = torch.randint(model.codebook_size, shape, generator=seeded()), torch.tensor([1, 3])
    settings = model.check_settings({"guidance": 1.0})
    steps = torch.cat([logits for _, logits in model.guided_logits(classes, settings, codes)], 1)
    torch.testing.assert_close(steps, model.logits(codes[:, :-1], classes), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "batch"), [((1, 9, 2), 1), ((1, 3, 3), 1), ((1, 3), 1), ((2, 3, 2), 1)], ids=str
)
def test_subcodes_of_another_shape_are_refused(shape, batch):
    model = build("elm-lm-2x3")
    with pytest.raises(
        ValueError, match=rf"sub-codes have shape .* for {batch} classes; .* takes \[B, P, 2\]"
    ):
        model.logits(torch.zeros(shape, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64))


@pytest.mark.parametrize(
    ("bits", "parts"), [(n, t) for n in (16, 20, 24) for t in range(1, n + 1) if n % t == 0]
)
def test_bits_to_subcodes_and_back_is_exact(bits, parts):
    values = torch.rand(3, 5, bits, generator=seeded()) < 0.5
    codes = bits_to_subcodes(values, parts)
    assert torch.equal(subcodes_to_bits(codes, bits // parts), values)
    text = "".join(str(int(bit)) for bit in values[1, 2])
    size = bits // parts
    assert codes[1, 2].tolist() == [int(text[i : i + size], 2) for i in range(0, bits, size)]


def test_bits_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="16 bits do not make 3 sub-codes of one size"):
        bits_to_subcodes(torch.zeros(1, 16, dtype=torch.bool), 3)


def test_from_class_to_picture(model):
    tokenizer = tiny_tokenizers.build("elm")
    tokenizer.name = TOKENIZER
    model.check_tokenizer(tokenizer)
    tokens = model.sample(LABELS, generator=seeded())
    assert tokens.grid == (3, 3) and tokens.tokenizer == TOKENIZER and tokens.bits.shape == (5, 9, 6)
    images = tokenizer.decode(tokens)
    assert images.shape == (5, 3, 3 * tokenizer.factor, 3 * tokenizer.factor)
    assert torch.equal(subcodes_to_bits(model.subcodes(tokens), model.config.code_dim), tokens.bits)


def test_a_tokenizer_that_does_not_fit_is_refused():
    tokenizer = tiny_tokenizers.build("elm")
    with pytest.raises(ValueError, match=r"writes tokens of 4 bits; those of elm are 6 bits"):
        build("elm-lm-1x6", code_dim=4).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"writes tokens of 6 bits; those of maskgit-vqgan are indices"):
        build("elm-lm-1x6").check_tokenizer(tiny_tokenizers.build("maskgit-vqgan"))
    tokenizer.name = "other"
    with pytest.raises(ValueError, match=r"writes tokens of 'tiny'; 'other' cannot decode them"):
        build("elm-lm-1x6").check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"reads tokens of 4 bits; the tokens given are"):
        build("elm-lm-1x6", code_dim=4).subcodes(build("elm-lm-1x6").sample([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 8}, "block_size is 8; tokens fill a square grid"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule is 'cosine'; it takes constant, linear, cos, log"),
        ({"code_dim": 0}, "code_dim is 0"),
        ({"token_each": 0}, "token_each is 0"),
        ({"dim": 36}, r"dim is 36 and n_head 2; dim is a multiple of 4 · n_head"),
        ({"preset": "S"}, "preset is 'S'; it takes L, XL, XXL, 2B"),
        ({"width": 3}, "unknown key width"),
    ],
)
def test_configurations_that_cannot_be_built_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        build("elm-lm-1x6", **change)


def test_a_schedule_that_nothing_states_is_asked_for(model):
    with pytest.raises(ValueError, match=r"does not state cfg_schedule; give schedule="):
        changed(model, cfg_schedule=None).sample([0])
    with pytest.raises(ValueError, match="cfg_schedule is 'never'"):
        model.sample([0], schedule="never")


@pytest.mark.parametrize(
    ("preset", "depth", "dim", "hidden"),
    [("L", 24, 1024, 2816), ("XL", 36, 1280, 3584), ("XXL", 48, 1536, 4096), ("2B", 48, 1792, 4864)],
)
def test_presets_are_the_sizes_of_the_paper(preset, depth, dim, hidden):
    with torch.device("meta"):
        model = generate.create("elm-lm", preset=preset, block_size=256, token_each=2, code_dim=10)
    blocks = depth * (4 * dim * dim + 3 * dim * hidden + 2 * dim) + dim
    tables = 1001 * dim + 2 * 2 * 1024 * dim + 2 * dim * dim
    assert sum(value.numel() for value in model.state_dict().values()) == blocks + tables


def test_a_model_that_learned_two_images_samples_them():
    torch.manual_seed(0)
    fields = {**LLAMA_CASES["elm-lm-2x3"][1], "token_dropout_p": 0.0, "resid_dropout_p": 0.0}
    model = generate.create("elm-lm", **{**fields, "ffn_dropout_p": 0.0})
    assert not model.logits(torch.zeros(1, 0, 2, dtype=torch.int64), torch.tensor([0])).any(), "zero heads"
    images, classes = torch.randint(8, (2, 9, 2), generator=seeded(3)), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        logits = model.logits(images[:, :-1], classes)
        loss, _ = autoregressive_token_loss(logits.flatten(1, 2), images.flatten(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = model.sample(classes, temperature=0, guidance=1)
    assert torch.equal(model.subcodes(sampled), images)
