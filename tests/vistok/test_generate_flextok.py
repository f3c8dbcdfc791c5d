"""FlexTok's generators: classes and texts, prefixes of any length, and all options of the transformer."""

import json
import math

import generator_claims
import pytest
import tiny_tokenizers
import torch
import torch.nn.functional as F
from generator_claims import LABELS, changed, plain_choice, seeded
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_generators import CLASSES, CODES, FLEXTOK_CASES, TOKENIZER, build

from vistok import generate
from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.generate.flextok_ar import TextCondition, position_table
from vistok.generate.noise import ImageNoise
from vistok.generate.registry import GENERATORS
from vistok.nn.text_features import TextFeatures, WordTextEncoder
from vistok.train.losses import autoregressive_token_loss

pytestmark = pytest.mark.usefixtures("small_and_quick")
NAMES = list(FLEXTOK_CASES)
CLASS_NAMES = [name for name in NAMES if "class" in name]
TEXT_NAMES = [name for name in NAMES if "text" in name]
WIDTH, LENGTH = 12, 5
# Those that name keys or modules of LLaMA blocks have their own tests here.
CLAIMS = [
    claim
    for claim in generator_claims.CLAIMS
    if claim.__name__
    not in (
        "guidance_1_runs_the_conditional_pass_alone",
        "logits_that_overflow_are_not_turned_into_tokens",
    )
]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module", params=CLASS_NAMES)
def class_model(request):
    return build(request.param)


@pytest.fixture(scope="module", params=TEXT_NAMES)
def text_model(request):
    return build(request.param)


def texts(count=3, seed=0):
    """Features of `count` texts of 1, 2, … real tokens, and those of the empty text, one token shorter."""
    states = torch.randn(count + 1, LENGTH, WIDTH, generator=seeded(seed))
    mask = torch.arange(LENGTH) <= torch.arange(count)[:, None]
    empty = TextFeatures(states[-1:, :-1], (torch.arange(LENGTH - 1) < 1)[None])
    return TextCondition(TextFeatures(states[:-1], mask), empty)


def rows_of(condition, rows):
    """Some images of a condition."""
    if isinstance(condition, TextCondition):
        text = TextFeatures(*(each[rows] for each in condition.text))
        return TextCondition(text, condition.unconditional)
    return [condition[row] for row in rows]


def condition_of(model):
    return texts() if "text" in model.conditions else [3, 0, 4]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_generator_of_classes_keeps_its_contract(class_model, claim):
    claim(class_model)


# ---- plain computation -------------------------------------------------------------------------------------


def plain_logits(model, ids, condition):
    """Logits [R, V] of one image whose first tokens are `ids`, head by head and row by row.

    `condition` is a class, None for none, or the real states [T, text_dim] of a text.
    """
    state = {
        key.removeprefix("models.").removeprefix("ar_image_model."): value
        for key, value in model.state_dict().items()
    }
    config = model.config
    heads, head = config.num_heads, config.embed_dim // config.num_heads

    def linear(x, name):
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    def normalised(x, name):
        if f"{name}.weight" not in state:
            return x
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(q, k, v, name, visible):
        out = torch.zeros_like(q)
        for h in range(heads):
            part = slice(h * head, (h + 1) * head)
            query, key = normalised(q[:, part], f"{name}.q_norm"), normalised(k[:, part], f"{name}.k_norm")
            for row, end in enumerate(visible):
                weights = (key[:end] @ query[row] / math.sqrt(head)).softmax(0)
                out[row, part] = weights @ v[:end, part]
        return linear(out, f"{name}.proj")

    x = torch.cat([state["preprocessor.sos_token_embed"][0], state["preprocessor.embedding.weight"][ids]])
    has_text = isinstance(condition, torch.Tensor)
    if has_text:
        hidden = linear(condition, "text_encoder.mlp.fc1")
        hidden = hidden / 2 * (1 + (math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)).tanh())
        text = linear(hidden, "text_encoder.mlp.fc2")
    elif condition is not None:
        x[0] += state["preprocessor.cls_embedding.weight"][condition]
    x = x + state["preprocessor.positional_embedding"][: len(x)]
    for layer in range(config.num_blocks):
        block = f"trunk.blocks.{layer}."
        name = block + ("self_attn" if has_text else "attn")
        q, k, v = linear(normalised(x, f"{block}norm_1"), f"{name}.qkv").chunk(3, -1)
        x = x + attention(q, k, v, name, range(1, len(x) + 1))
        if has_text:
            name, y = f"{block}cross_attn", normalised(x, f"{block}norm_2")
            k, v = linear(text, f"{name}.Wk"), linear(text, f"{name}.Wv")
            x = x + attention(linear(y, f"{name}.Wq"), k, v, name, [len(text)] * len(x))
        y = normalised(x, f"{block}norm_{3 if has_text else 2}")
        y = F.silu(linear(y, f"{block}mlp.fc1")) * linear(y, f"{block}mlp.fc3")
        x = x + linear(y, f"{block}mlp.fc2")
    return linear(normalised(x, "trunk.post_trunk_norm"), "head.linear")


def plain_conditions(condition):
    """Each image's condition and the unconditional one, for `plain_logits`."""
    if not isinstance(condition, TextCondition):
        return condition, None
    empty = condition.unconditional
    real = [states[mask] for states, mask in zip(*condition.text, strict=True)]
    return real, empty.states[0][empty.mask[0]]


def plain_sample(model, condition, seed, count, second=None):
    """Tokens by two passes over the whole prefix for each; from the second token on, `second` in place of no
    condition."""
    settings = model.check_settings({})
    own, none = plain_conditions(condition)
    noise, results = ImageNoise(len(own), seeded(seed)), [[] for _ in own]
    for place in range(count):
        draws = noise.gumbel(1, model.codebook_size)
        other = none if place == 0 or second is None else second
        for ids, each, draw in zip(results, own, draws, strict=True):
            yes, no = (plain_logits(model, ids, part)[-1] for part in (each, other))
            ids.append(plain_choice(no + settings.guidance * (yes - no), settings, draw[0]))
    return results


def test_sampling_equals_a_plain_loop_without_cache_or_batching(model):
    condition = condition_of(model)
    sampled = model.sample(condition, generator=seeded(5))
    assert sampled.indices.tolist() == plain_sample(model, condition, 5, model.num_tokens)


def test_reference_compat_takes_class_0_for_none_from_the_second_token(class_model):
    condition = [3, 1, 4]
    sampled = class_model.sample(condition, generator=seeded(5), reference_compat=True, guidance=3.0)
    assert sampled.indices.tolist() == plain_sample(class_model, condition, 5, 8, second=0)
    fixed = class_model.sample(condition, generator=seeded(5))
    assert torch.equal(fixed.indices[:, 0], sampled.indices[:, 0])
    assert fixed != sampled


def test_logits_equal_plain_ones_and_those_of_steps_with_a_cache(model):
    condition = condition_of(model)
    ids = torch.randint(CODES, (3, model.num_tokens), generator=seeded())
    checked = model.check_condition(condition)
    with torch.no_grad():
        whole = model.logits(ids[:, :-1], checked)
        settings = model.check_settings({"guidance": 1.0})
        steps = [logits for _, logits in model.guided_logits(checked, settings, ids)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)
    for image, own in enumerate(plain_conditions(condition)[0]):
        plain = plain_logits(model, ids[image, :-1].tolist(), own)
        torch.testing.assert_close(whole[image], plain, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids[:, :2], checked), whole[:, :3], atol=1e-5, rtol=1e-5)


def test_a_class_of_none_adds_nothing(class_model):
    with torch.no_grad():
        logits = class_model.logits(torch.tensor([[5, 6]]), torch.tensor([CLASSES]))[0]
    torch.testing.assert_close(logits, plain_logits(class_model, [5, 6], None), atol=1e-5, rtol=1e-4)


def test_the_table_of_positions_is_the_one_of_a_column_behind_a_row_of_zeros():
    table = position_table(4, 8)
    assert not table[0].any()
    for place in range(1, 4):
        angles = [place - 1, (place - 1) / 100]
        row = [0, 0, 1, 1, *map(math.sin, angles), *map(math.cos, angles)]
        torch.testing.assert_close(table[place], torch.tensor(row, dtype=torch.float32))


# ---- prefixes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_shorter_image_is_the_prefix_of_the_whole_one(model, count):
    condition = condition_of(model)
    whole = model.sample(condition, generator=seeded())
    assert model.sample(condition, generator=seeded(), num_tokens=count) == whole.prefix(count)


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "num_tokens is 0; .* writes 1..8"), (9, "sampled_tokens is 9"), (2.5, "sampled_tokens is 2.5")],
)
def test_other_numbers_of_tokens_are_refused(model, count, message):
    with pytest.raises(ValueError, match=message):
        model.sample(condition_of(model), num_tokens=count)


def test_prefixes_decode_with_the_tokenizer():
    tokenizer = tiny_tokenizers.build("flextok")
    tokenizer.name = TOKENIZER
    fields = {"codebook_size": tokenizer.quantizer.codebook_sizes[0], "num_tokens": tokenizer.num_tokens}
    model = build("flextok-class", **fields)
    model.check_tokenizer(tokenizer)
    tokens = model.sample([1, 2], generator=seeded(), num_tokens=3)
    assert tokens.num_tokens == 3 and tokens.grid is None and tokens.tokenizer == TOKENIZER
    assert bool(tokenizer.decode(tokens, steps=2).isfinite().all())
    for change, message in (
        ({"codebook_size": 7}, "writes codes of one codebook of 7; tiny has codebook sizes"),
        ({"num_tokens": 16}, "writes 16 tokens per image; tiny decodes 8"),
        (
            {"num_tokens": 16, "grid": (4, 4)},
            r"writes a grid of \(4, 4\) tokens; tiny decodes ordered tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build("flextok-class", **{**fields, **change}).check_tokenizer(tokenizer)


def test_a_grid_is_written_whole():
    model = build("flextok-text", grid=(2, 4))
    assert model.sample(texts(), generator=seeded()).grid == (2, 4)
    with pytest.raises(ValueError, match=r"num_tokens is 3; .* writes 8..8"):
        model.sample(texts(), num_tokens=3)


# ---- text --------------------------------------------------------------------------------------------------


def test_a_text_depends_neither_on_its_batch_nor_on_its_padding(text_model):
    condition = texts()
    for order in ([0, 1, 2], [2, 0, 1]):
        batch = text_model.sample(rows_of(condition, order), generator=[seeded(i) for i in order]).indices
        for row, i in zip(batch, order, strict=True):
            states, mask = (each[i : i + 1, : i + 1] for each in condition.text)
            short = TextCondition(TextFeatures(states, mask), condition.unconditional)
            assert torch.equal(text_model.sample(short, generator=[seeded(i)]).indices[0], row)


def test_what_stands_at_padded_places_does_not_matter(text_model):
    condition = texts()
    states = condition.text.states.masked_fill(~condition.text.mask[..., None], math.nan)
    other = TextCondition(TextFeatures(states, condition.text.mask.long()), condition.unconditional)
    expected = text_model.sample(condition, generator=seeded())
    assert text_model.sample(other, generator=seeded()) == expected


def test_captions_go_through_the_attached_text_encoder():
    model, encoder = build("flextok-text"), WordTextEncoder(["red", "disc"], WIDTH, LENGTH)
    with pytest.raises(ValueError, match=r"no text encoder for captions; call attach_text_encoder"):
        model.sample(["red disc"])

    def encode(captions):  # the empty text has one token, its end
        states, mask = encoder(captions)
        mask[:, 0] = True
        return TextFeatures(states, mask)

    model.attach_text_encoder(encode)
    assert not any("table" in key for key in model.state_dict())
    expected = model.sample(TextCondition(encode(["red disc"]), encode([""])), generator=seeded())
    assert model.sample("red disc", generator=seeded()) == expected
    assert model.sample(["red"], generator=seeded()) != expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text, empty: TextCondition(text),
            "compares with the empty text, whose features are not given",
        ),
        (
            lambda text, empty: TextFeatures(text.states[..., :5], text.mask),
            r"takes states \[B, T, 12\] and a",
        ),
        (lambda text, empty: TextFeatures(text.states, text.mask[:, :2]), r"and a mask \[3, 2\]; .* takes"),
        (lambda text, empty: TextFeatures(text.states, text.mask * 0.5), "is bool, or whole numbers 0 and 1"),
        (lambda text, empty: TextFeatures(text.states, text.mask & False), "leaves an image without a token"),
        (
            lambda text, empty: TextCondition(text, TextFeatures(*(each[:2] for each in text))),
            "unconditional text has 2 rows for 3 images",
        ),
        (lambda text, empty: [1, 2], r"the condition is \[1, 2\]; .* takes a TextCondition"),
        (lambda text, empty: text.states, "the condition is a Tensor; .* takes a TextCondition"),
    ],
)
def test_texts_that_do_not_fit_are_refused(text_model, change, message):
    condition = texts()
    with pytest.raises(ValueError, match=message):
        text_model.sample(change(condition.text, condition.unconditional))


def test_guidance_1_needs_no_empty_text_and_takes_no_reference_compat(text_model):
    condition = texts()
    sampled = text_model.sample(condition.text, guidance=1, generator=seeded())
    assert sampled == text_model.sample(condition, guidance=1, generator=seeded())
    assert sampled != text_model.sample(condition, guidance=20.0, generator=seeded())
    with pytest.raises(ValueError, match="reference_compat does not apply"):
        text_model.sample(condition, reference_compat=True)


def test_training_drops_a_share_of_texts_and_classes():
    condition = texts(400)
    model = build("flextok-text", text_dropout=0.25)
    dropped = model.drop_texts(model.check_condition(condition), seeded())
    empty = F.pad(condition.unconditional.states[0, :1], (0, 0, 0, LENGTH - 1))
    is_empty = (dropped.text.states == empty).flatten(1).all(1)
    assert 70 < int(is_empty.sum()) < 130
    assert (dropped.text.mask[is_empty].sum(1) == 1).all()
    assert torch.equal(dropped.text.mask[~is_empty], condition.text.mask[~is_empty])
    classes = build("flextok-class").drop_classes(torch.zeros(400, dtype=torch.int64), seeded())
    assert 20 < int((classes == CLASSES).sum()) < 60


# ---- sampling and files ------------------------------------------------------------------------------------


def test_guidance_1_runs_the_conditional_pass_alone(model):
    batches = {1.0: set(), 2.0: set()}
    for guidance, sizes in batches.items():
        handle = model.image_model.register_forward_pre_hook(
            lambda _, inputs, sizes=sizes: sizes.add(len(inputs[0]))
        )
        model.sample(condition_of(model), guidance=guidance, generator=seeded())
        handle.remove()
    assert batches == {1.0: {3}, 2.0: {6}}


def test_logits_that_overflow_are_not_turned_into_tokens(model):
    broken = changed(model)
    with torch.no_grad():
        broken.image_model.preprocessor.sos_token_embed[0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"logits of .* hold NaN or infinity"):
        broken.sample(condition_of(model))


def test_half_precision_samples_valid_tokens(text_model):
    for dtype in (torch.bfloat16, torch.float16):
        tokens = changed(text_model).to(dtype).sample(texts(), generator=seeded())
        tokens.validate()


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = generate.load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    condition = condition_of(model)
    assert loaded.sample(condition, generator=seeded()) == model.sample(condition, generator=seeded())


def test_bare_weights_show_all_but_the_heads_beside_other_models_in_the_file(model, tmp_path):
    others = {
        "models.image_tokenizer.encoder.weight": torch.zeros(2),
        "models.text_encoder.model.shared.weight": torch.zeros(3, 2),
        "models.text_encoder.text_model.shared.weight": torch.zeros(3, 2),
    }
    path = tmp_path / "model.safetensors"
    save_file({**model.state_dict(), **others}, path)
    if not model.config.qk_norm:  # its width is that of a head
        with pytest.raises(ValueError, match="whose heads the keys do not show; give config="):
            generate.load(path)
    settings = {name: getattr(model.config, name) for name in ("top_k", "top_p", "temperature", "guidance")}
    loaded = generate.load(path, config={"num_heads": 2, "tokenizer": TOKENIZER, **settings})
    condition = condition_of(model)
    assert loaded.sample(condition, generator=seeded()) == model.sample(condition, generator=seeded())
    with pytest.raises(ValueError, match="unknown key head_norm"):
        generate.load(path, config={"num_heads": 2, "head_norm": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "embed_dim is 32; it must be a multiple of num_heads, 3"),
        ({"pos_embed": "rope"}, "pos_embed is 'rope'; it takes 'absolute' or 'sincos1d'"),
        ({"grid": (2, 3)}, r"grid is \(2, 3\); it has the 8 places of num_tokens"),
        ({"norm": "rmsnorm"}, "unknown key norm"),
        ({"embed_dim": 34}, "embed_dim is 34; the table of sines takes a multiple of 4"),
        ({"top_p": 0}, "top_p is 0"),
        ({"swiglu_hidden": 0}, "swiglu_hidden is 0"),
    ],
)
def test_configurations_that_cannot_be_built_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        build("flextok-class", **change)


@pytest.mark.parametrize("shape", [(1, 8), (2, 3), (3,)], ids=str)
def test_indices_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes \[B, P\] with up to 7 tokens for each of B conditions"):
        build("flextok-class").logits(torch.zeros(shape, dtype=torch.int64), torch.tensor([0]))


def test_published_rows_state_sizes_guidance_and_the_licence():
    entries = [entry for entry in GENERATORS.entries().values() if entry.family.startswith("flextok-ar")]
    sizes = {
        entry.repo: (entry.config["embed_dim"], entry.config["num_blocks"], entry.config["guidance"])
        for entry in entries
    }
    assert sizes == {
        "EPFL-VILAB/FlexAR-113M-T2I": (768, 12, 3.0),
        "EPFL-VILAB/FlexAR-382M-T2I": (1152, 18, 3.0),
        "EPFL-VILAB/FlexAR-1B-T2I": (1664, 26, 3.0),
        "EPFL-VILAB/FlexAR-3B-T2I": (2304, 36, 3.0),
        "EPFL-VILAB/FlexAR-1B-C2I": (1664, 26, 1.5),
        "EPFL-VILAB/GridAR-3B-T2I": (2304, 36, 3.0),
    }
    assert all("research only" in entry.license for entry in entries)
    with torch.device("meta"):
        assert generate.create("flexar-1b-c2i").config.hidden == 4608


def test_a_published_name_warns_of_its_licence_and_of_what_is_assumed(tmp_path):
    model = build("flextok-class")
    model.save_pretrained(tmp_path)
    name = "flexar-1b-c2i"
    with (
        pytest.warns(UserWarning, match=f"{name}: .*research only.* are assumed here"),
        pytest.raises(ValueError, match="misshapen"),
    ):
        generate.load(
            name,
            weights=tmp_path / "model.safetensors",
            config={"num_blocks": 2, "num_heads": 4, "swiglu_hidden": 8},
        )
    with pytest.warns(UserWarning, match=name):
        loaded = generate.load(name, weights=tmp_path, config=vars(model.config))
    assert loaded.sample(LABELS, generator=seeded()) == model.sample(LABELS, generator=seeded())


# ---- recorded cases ----------------------------------------------------------------------------------------


def rewritten(folder, change):
    """The recorded case with its json and tensors changed."""
    path = GOLDEN / "flextok_ar_small.json"
    data, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    change(data, tensors)
    (folder / "case.json").write_text(json.dumps(data))
    save_file(tensors, folder / "case.safetensors")
    return folder / "case.json"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_recorded_case_passes_in_half_precision(dtype):
    assert all(row.passed for row in verify(GOLDEN / "flextok_ar_small.json", dtype=dtype))


@pytest.mark.parametrize(
    "tensor", ["c2i_ids", "c2i_embeds", "c2i_loss", "t2i_logits", "t2i_greedy_cfg3", "filter_k5"]
)
def test_a_changed_recording_is_a_miss(tmp_path, tensor):
    def change(data, tensors):
        tensors[tensor].view(-1)[-1] += 1

    assert [row.name for row in verify(rewritten(tmp_path, change)) if not row.passed] == [tensor]


def test_the_original_run_and_the_corrected_one_differ(tmp_path):
    def change(data, tensors):
        first, second = "c2i_greedy_cfg1.5", "c2i_greedy_cfg1.5_fixed"
        tensors[first], tensors[second] = tensors[second], tensors[first]

    misses = [row.name for row in verify(rewritten(tmp_path, change)) if not row.passed]
    assert misses == ["c2i_greedy_cfg1.5", "c2i_greedy_cfg1.5_fixed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, _: data["config"].update(norm="RMSNorm, eps 1e-5"), "norm is 'RMSNorm, eps 1e-5'"),
        (lambda data, _: data["config"].update(head_norm=True), "head_norm is True"),
        (lambda data, _: data["config"].update(rope=True), "config has rope; known are"),
        (lambda data, _: data["config"].update(num_classes=9), "cls_embedding"),
        (lambda data, _: data["config"]["c2i"].update(pos_embed="rope"), "pos_embed is 'rope'"),
        (lambda data, _: data["config"]["t2i"].update(text_mlp="one layer"), "text_mlp is 'one layer'"),
        (lambda data, _: data["config"].update(t2i=3), "config has t2i as 3"),
        (lambda data, _: data["state_dict"].update(v2i={}), r"state_dict has \['v2i'\]"),
        (lambda data, _: data["tensors"].update({"c2i_greedy": "ids"}), "does not name its classes"),
        (lambda data, _: data["tensors"].update({"filter_k5": "{'min_p': 1}"}), "filter_k5 has the settings"),
        (lambda data, _: data["inputs"].popitem(), "needs a recipe of text encoder outputs"),
    ],
)
def test_cases_that_cannot_be_run_say_why(tmp_path, change, message):
    with pytest.raises(CannotBuild, match=message):
        verify(rewritten(tmp_path, change))


@pytest.mark.parametrize("name", ["flextok-class", "flextok-text-all"])
def test_a_model_that_learned_two_images_samples_them(name):
    torch.manual_seed(0)
    model = generate.create(FLEXTOK_CASES[name][0], **FLEXTOK_CASES[name][1])
    images = torch.randint(CODES, (2, 8), generator=seeded(3))
    condition = rows_of(texts() if "text" in name else LABELS, [0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss, _ = autoregressive_token_loss(
            model.logits(images[:, :-1], model.check_condition(condition)), images
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.sample(condition, temperature=0, guidance=1).indices, images)
