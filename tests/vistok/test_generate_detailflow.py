"""DetailFlow's generator: groups of tokens at once, and tokens that its tokenizer decodes."""

import json

import pytest
import tiny_tokenizers
import torch
from generator_claims import (
    CLAIMS,
    FILE_CLAIMS,
    LABELS,
    plain_choice,
    plain_transformer,
    seeded,
)
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_generators import CLASSES, LLAMA_CASES, TOKENIZER, build

from vistok import generate
from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.generate.noise import ImageNoise
from vistok.generate.registry import GENERATORS
from vistok.train.losses import autoregressive_token_loss

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture(scope="module", params=[name for name in LLAMA_CASES if name.startswith("detailflow")])
def model(request):
    return build(request.param)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_generator_keeps_its_contract(model, claim):
    claim(model)


@pytest.mark.parametrize("claim", FILE_CLAIMS, ids=lambda claim: claim.__name__)
def test_files(model, tmp_path, claim):
    claim(model, tmp_path)


def plain_logits(model, ids, label):
    """Logits [R, V] of one image whose first tokens are `ids`, by the rows that the paper's text lists."""
    state, g = model.state_dict(), model.config.group_size
    c = model.config.causal_num or g
    table = state["tok_embeddings.weight"]
    rows = [state["cls_embedding.embedding_table.weight"][label], *(table[i] for i in ids[:c])]
    if len(ids) >= c:
        rows += [*state["spe_tok_embeddings.special_embeddings.weight"], *(table[i] for i in ids[c:])]
    places = [None] + [((r - 1) // g, (r - 1) % g) for r in range(1, len(rows))]
    visible = [r + 1 if r < c else (r // g + 1) * g for r in range(len(rows))]
    return plain_transformer(model, torch.stack(rows), places, visible) @ state["output.weight"].T


@pytest.mark.parametrize("gradual", [False, True])
def test_sampling_equals_a_plain_loop_without_cache_or_batching(model, gradual):
    settings = model.check_settings({"gradual": gradual})
    sampled = model.sample(LABELS, gradual=gradual, generator=seeded(5))
    noise, results = ImageNoise(len(LABELS), seeded(5)), [[] for _ in LABELS]
    g, count = model.config.group_size, model.num_tokens
    c = model.config.causal_num or g
    while len(results[0]) < count:
        start = len(results[0])
        size = 1 if start < c else g
        draws = noise.gumbel(size, model.codebook_size)
        scale = settings.cfg_scale
        if gradual and start >= c:
            scale *= (count // g - start // g + 1) / (count // g + 1)
        for ids, label, draw in zip(results, LABELS, draws, strict=True):
            yes, no = (plain_logits(model, ids, each)[-size:] for each in (label, CLASSES))
            guided = no + scale * (yes - no)
            ids += [plain_choice(guided[i], settings, draw[i]) for i in range(size)]
    assert sampled.indices.tolist() == results


def test_logits_of_prefixes_equal_plain_ones_and_those_of_the_whole_image(model):
    config = model.config
    longest = model.num_tokens - config.group_size
    ids = torch.randint(model.codebook_size, (2, longest), generator=seeded())
    classes = torch.tensor([1, CLASSES])
    whole = model.logits(ids, classes)
    assert whole.shape == (2, model.num_tokens, model.codebook_size)
    for count in (*range(config.first + 1), *range(config.first, longest + 1, config.group_size)):
        part = model.logits(ids[:, :count], classes)
        rows = count + 1 if count < config.first else count + config.group_size
        torch.testing.assert_close(part, whole[:, :rows], atol=1e-5, rtol=1e-5)
        for image in range(2):
            plain = plain_logits(model, ids[image, :count].tolist(), int(classes[image]))
            torch.testing.assert_close(part[image], plain, atol=1e-5, rtol=1e-4)


def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(model):
    ids = torch.randint(model.codebook_size, (2, model.num_tokens), generator=seeded())
    classes, settings = torch.tensor([1, 3]), model.check_settings({"guidance": 1.0})
    steps = torch.cat([logits for _, logits in model.guided_logits(classes, settings, ids)], 1)
    whole = model.logits(ids[:, : -model.config.group_size], classes)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


def test_forward_passes_are_the_single_tokens_and_the_groups(model):
    passes = []
    handle = model.norm.register_forward_pre_hook(lambda *_: passes.append(1))
    model.sample([0])
    handle.remove()
    config = model.config
    assert len(passes) == config.first + (config.block_size - config.first) // config.group_size


def test_gradual_guidance_changes_groups_alone(model):
    plain, gradual = (
        model.sample(LABELS, gradual=each, guidance=9.0, temperature=0) for each in (False, True)
    )
    first = model.config.first
    assert torch.equal(plain.indices[:, :first], gradual.indices[:, :first])
    assert plain != gradual
    with pytest.raises(ValueError, match="gradual_cfg"):
        model.sample([0], gradual="yes")


@pytest.mark.parametrize("shape", [(1, 3), (1, 7), (1, 9), (2, 2), (1, 2, 1)], ids=str)
def test_prefixes_that_end_within_a_group_and_other_shapes_are_refused(shape):
    model = build("detailflow-gpt", causal_num=2, group_size=2)
    message = r"token indices have shape .* takes \[B, P\] for B classes, with up to 2 tokens, or 2 and whole"
    with pytest.raises(ValueError, match=message):
        model.logits(torch.zeros(shape, dtype=torch.int64), torch.tensor([0]))


def test_without_groups_every_token_follows_the_one_before():
    model = build("detailflow-gpt", causal_num=8)
    assert model.step_sizes() == [1] * 8
    ids = torch.randint(model.codebook_size, (1, 8), generator=seeded())
    steps = [
        logits
        for _, logits in model.guided_logits(torch.tensor([1]), model.check_settings({"guidance": 1}), ids)
    ]
    whole = model.logits(ids[:, :-1], torch.tensor([1]))
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_from_class_to_picture_and_its_coarse_prefix():
    tokenizer = tiny_tokenizers.build("detailflow")
    tokenizer.name = TOKENIZER
    fields = {"vocab_size": tokenizer.config.codebook_size, "block_size": tokenizer.num_tokens}
    model = build("detailflow-gpt", group_size=tokenizer.config.group_size, **fields)
    model.check_tokenizer(tokenizer)
    tokens = model.sample(LABELS, generator=seeded())
    assert tokens.grid is None and tokens.tokenizer == TOKENIZER
    assert bool(tokenizer.decode(tokens).isfinite().all())
    assert len(tokenizer.decode(tokens.prefix(model.config.first))) == len(LABELS)


def test_a_tokenizer_that_does_not_fit_is_refused():
    tokenizer = tiny_tokenizers.build("detailflow")
    fields = {"vocab_size": tokenizer.config.codebook_size, "block_size": tokenizer.num_tokens}
    for change, message in (
        ({"vocab_size": 7}, "writes codes of one codebook of 7; detailflow has codebook sizes"),
        ({"block_size": 2 * tokenizer.num_tokens}, "tokens per image; detailflow decodes"),
    ):
        with pytest.raises(ValueError, match=message):
            build("detailflow-gpt", **{**fields, **change}).check_tokenizer(tokenizer)
    tokenizer.name = "other"
    with pytest.raises(ValueError, match=r"writes tokens of 'tiny'; 'other' cannot decode them"):
        build("detailflow-gpt", **fields).check_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 3}, "block_size is 8; it must be a multiple of group_size, 3"),
        ({"causal_num": 3}, "causal_num is 3; it must be a multiple of group_size, 2"),
        ({"causal_num": 16}, "causal_num is 16; it takes a number from 1 to 8"),
        ({"cls_token_num": 2}, "cls_token_num is 2"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"preset": "GPT-S"}, "preset is 'GPT-S'; it takes GPT-L"),
        ({"n_head": 3}, "dim is 32 and n_head 3"),
    ],
)
def test_configurations_that_cannot_be_built_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        build("detailflow-gpt", **change)


def test_published_rows_state_tokens_guidance_and_all_codes():
    entries = {name: entry for name, entry in GENERATORS.entries().items() if name.startswith("detailflow")}
    rows = {
        name: (
            entry.repo,
            entry.file,
            entry.config["block_size"],
            entry.config["cfg_scale"],
            entry.figures["gFID"],
        )
        for name, entry in entries.items()
    }
    assert rows == {
        f"detailflow-{n}-gpt-l": (
            f"ByteFlow-AI/DetailFlow-{n}-GPT-L",
            f"checkpoints/{k}.pt",
            k,
            guidance,
            gfid,
        )
        for n, k, guidance, gfid in ((16, 128, 1.45, 2.96), (32, 256, 1.5, 2.75), (64, 512, 1.32, 2.59))
    }
    with torch.device("meta"):
        model = generate.create("detailflow-16-gpt-l")
    assert len(model.step_sizes()) == 23
    assert model.config.hidden == 2816


def test_a_pickle_of_averaged_weights_loads(tmp_path):
    model = build("detailflow-gpt")
    other = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "8.pt"
    torch.save({"model": other, "ema": model.state_dict(), "steps": 3}, path)
    loaded = generate.load(path, config={"family": model.family, "config": vars(model.config)})
    assert loaded.sample(LABELS, generator=seeded()) == model.sample(LABELS, generator=seeded())


def rewritten(folder, change):
    """The recorded case of a small generator with its json and tensors changed."""
    path = GOLDEN / "detailflow_ar_small.json"
    data, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    change(data, tensors)
    (folder / "case.json").write_text(json.dumps(data))
    save_file(tensors, folder / "case.safetensors")
    return folder / "case.json"


@pytest.mark.parametrize("tensor", ["gen_gradual", "gen_topk_margin", "logits_prefix_20", "rope", "mask"])
def test_a_changed_recording_is_a_miss(tmp_path, tensor):
    def change(data, tensors):
        tensors[tensor].view(-1)[-1] += 1

    assert [row.name for row in verify(rewritten(tmp_path, change)) if not row.passed] == [tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data, _: data["generation"]["cfg"].update(beams=2),
            "the run cfg has the settings beams; known",
        ),
        (lambda data, _: data["generation"].update(cfg=3), "generation is .*; it maps names of runs"),
        (lambda data, _: data["inputs"].update(cls="ten classes"), "cannot read the recipe of cls"),
        (lambda data, _: data["config"].update(causal_num=6), "causal_num is 6"),
        (lambda data, _: data["config"].update(group_size=8), "special_embeddings"),
    ],
)
def test_cases_that_cannot_be_run_say_why(tmp_path, change, message):
    with pytest.raises(CannotBuild, match=message):
        verify(rewritten(tmp_path, change))


def test_a_model_that_learned_two_images_samples_them():
    torch.manual_seed(0)
    fields = {**LLAMA_CASES["detailflow-gpt"][1], "token_dropout_p": 0.0, "resid_dropout_p": 0.0}
    model = generate.create("detailflow-gpt", **{**fields, "ffn_dropout_p": 0.0})
    images, classes = torch.randint(64, (2, 8), generator=seeded(3)), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss, _ = autoregressive_token_loss(model.logits(images[:, :-2], classes), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.sample(classes, temperature=0, guidance=1).indices, images)
