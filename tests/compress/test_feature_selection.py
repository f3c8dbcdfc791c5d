"""CDPruner, VisPruner and TokenCorr: their algorithms against plain loops, and what each reads of a model."""

import math

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlms import make_tokenizer, tiny_vlm

from vistok import compress
from vistok.compress import (
    CDPruner,
    DivPrune,
    FasterVLM,
    GlobalCom2,
    HiRED,
    PruMerge,
    TokenCorr,
    UniformGrid,
    VisPruner,
)
from vistok.compress.algorithms.dpp import dpp_order, text_relevance
from vistok.compress.algorithms.grid import Grid
from vistok.compress.algorithms.important_diverse import important_and_diverse
from vistok.compress.algorithms.information import (
    attention_outliers,
    draw_by_weight,
    information_density,
    informative_order,
)
from vistok.compress.reducer import Image
from vistok.compress.vision import features as recording
from vistok.compress.vision.text_tower import TextTower

seeds = st.integers(0, 2**31 - 1)
quick = settings(deadline=None, max_examples=40)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def kept(model, inputs, reducer, keep=0.5):
    """The tokens kept of each image of a prompt."""
    with compress.attach(model, reducer, keep=keep) as session:
        model(**inputs)
        return [explanation.tokens.tolist() for explanation in session.explain()]


# CDPruner ---------------------------------------------------------------------------------------------------


def largest_volumes(kernel: torch.Tensor, count: int) -> list[int]:
    """The greedy subset by determinants, of equal ones the first."""
    picks: list[int] = []
    while len(picks) < count:
        rest = [i for i in range(len(kernel)) if i not in picks]
        volume = {i: float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]])) for i in rest}
        picks.append(max(rest, key=lambda i: (volume[i], -i)))
    return picks


@quick
@given(st.integers(1, 9), st.data(), seeds)
def test_dpp_order_spans_the_largest_volume(tokens, data, seed):
    count = data.draw(st.integers(0, tokens))
    random = generator(seed)
    features = torch.randn(tokens, 12, generator=random, dtype=torch.float64)
    relevance = torch.rand(tokens, generator=random, dtype=torch.float64) + 0.1
    unit = features / features.norm(dim=1, keepdim=True)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    assert dpp_order(features, relevance, count).tolist() == largest_volumes(kernel, count)


@quick
@given(st.integers(1, 60), st.integers(1, 5), seeds)
def test_dpp_order_never_repeats_a_token_beyond_the_rank(tokens, width, seed):
    random = generator(seed)
    features = torch.randn(tokens, width, generator=random)
    features[torch.randint(0, tokens, (3,), generator=random)] = features[0].clone()
    features[torch.randint(0, tokens, (1,), generator=random)] = 0
    relevance = torch.rand(tokens, generator=random)
    order = dpp_order(features, relevance, tokens)
    assert order.sort().values.tolist() == list(range(tokens))
    assert torch.equal(dpp_order(features, relevance, tokens // 2), order[: tokens // 2])


def test_dpp_order_takes_the_lowest_places_once_nothing_is_new():
    features = torch.eye(4)[[0, 0, 1, 1, 1, 2]].double()
    relevance = torch.tensor([1.0, 1, 3, 3, 3, 2])
    assert dpp_order(features, relevance, 6).tolist() == [2, 5, 0, 1, 3, 4]
    with pytest.raises(ValueError, match="7 tokens were requested"):
        dpp_order(features, relevance, 7)


@quick
@given(st.integers(2, 30), st.integers(1, 5), st.sampled_from([1, -1]), seeds)
def test_relevance_is_the_mean_cosine_from_its_lowest_to_its_highest(tokens, texts, sign, seed):
    random = generator(seed)
    image, text = torch.randn(tokens, 6, generator=random), torch.randn(texts, 6, generator=random)
    cosine = torch.stack(
        [torch.stack([torch.cosine_similarity(x, y, dim=0) for y in text]).mean() for x in image]
    )
    cosine = sign * cosine
    expected = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    assert torch.allclose(text_relevance(image, text, sign=sign), expected, atol=1e-5)


def test_relevance_needs_text_of_the_same_width():
    assert text_relevance(torch.ones(3, 4), torch.ones(2, 4)).tolist() == [1, 1, 1]
    for text in (torch.ones(0, 4), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="at least one text embedding of the same width"):
            text_relevance(torch.ones(3, 4), text)


def expected_of_cdpruner(embeds, text, features, count, sign=1):
    cosine = sign * torch.cosine_similarity(embeds[:, None], text[None], dim=-1).mean(1).double()
    relevance = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min())
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return sorted(largest_volumes(relevance[:, None] * (unit @ unit.T) * relevance, count))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_cdpruner_compares_features_with_the_instruction(name):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1,))
    ids, image_token = inputs["input_ids"][0], model.config.image_token_id
    after = ids[int((ids == image_token).nonzero()[-1]) + 1 :]
    media = {k: v for k, v in inputs.items() if k.startswith("pixel") or k.endswith("thw")}
    features = torch.cat(list(model.get_image_features(**media, return_dict=True).pooler_output))
    count = len(features) // 2
    expected = expected_of_cdpruner(features, model.get_input_embeddings()(after), features, count)
    assert kept(model, inputs, CDPruner(), count) == [expected]


def test_another_instruction_keeps_other_tokens_and_padding_does_not():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(images=(1,))
    first = kept(model, inputs, CDPruner(), 6)
    other = dict(inputs) | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -3] = 40
    assert kept(model, other, CDPruner(), 6) != first
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (5, 0), value=0),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (5, 0), value=0),
        "pixel_values": inputs["pixel_values"],
    }
    assert kept(model, padded, CDPruner(), 6) == first


def test_the_instruction_is_the_text_after_the_image_or_all_of_it():
    text = torch.arange(5.0)[:, None]
    assert text[Image(torch.ones(2, 1), text, text_before=3).instruction].flatten().tolist() == [3, 4]
    assert text[Image(torch.ones(2, 1), text, text_before=5).instruction].flatten().tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    with pytest.raises(ValueError, match="this prompt has none; add an instruction"):
        CDPruner().scores(Image(torch.ones(2, 1), text[:0]))


def test_newline_vectors_take_no_part_in_relevance():
    model, _, inputs = tiny_vlm("llava_next")
    inputs, images = inputs(images=(1,)), []
    reducer = CDPruner()
    scores = reducer.scores
    reducer.scores = lambda image: images.append((image, scores(image))) or images[-1][1]
    with compress.attach(model, reducer, keep=0.5):
        model(**inputs)
    image, relevance = images[0]
    patches = ~image.grid.separators
    assert bool((relevance[~patches] == 0).all()) and float(relevance[patches].max()) == pytest.approx(
        1, abs=1e-4
    )
    assert torch.equal(
        relevance[patches], text_relevance(image.features[patches], image.text[image.instruction])
    )


class Words:
    """A tokenizer that writes its tokens as words."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return " ".join(token for token in tokens if token not in self.tokenizer.all_special_tokens)


@pytest.fixture(scope="module")
def clip():
    """A whole CLIP around the tower of the tiny LLaVA, and the tokenizers of both."""
    model, processor, inputs = tiny_vlm("llava")
    tokenizer = make_tokenizer([])
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = hf.CLIPConfig(
        text_config=text, vision_config=model.config.vision_config.to_dict(), projection_dim=20
    )
    torch.manual_seed(0)
    whole = hf.CLIPModel(config).eval()
    state = model.model.vision_tower.state_dict()
    state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    whole.vision_model.load_state_dict(state)
    return model, inputs(images=(1,)), whole, tokenizer, Words(processor.tokenizer)


def test_a_text_tower_embeds_states_and_segments_of_the_instruction(clip):
    model, inputs, whole, tokenizer, own = clip
    ids = inputs["input_ids"][0]
    after = ids[int((ids == model.config.image_token_id).nonzero()[-1]) + 1 :].tolist()
    words = own.decode(after, skip_special_tokens=True)
    numbers = tokenizer(words)["input_ids"]
    numbers += [0] * (-len(numbers) % 4)
    assert len(numbers) > 4  # several segments
    text = [
        whole.text_projection(whole.text_model(input_ids=torch.tensor([numbers[i : i + 4]])).pooler_output)[0]
        for i in range(0, len(numbers), 4)
    ]
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][
        0, 1:
    ]
    embeds = whole.visual_projection(whole.vision_model.post_layernorm(states))
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    expected = expected_of_cdpruner(embeds, torch.stack(text), features, 6, sign=-1)
    reducer = CDPruner(text_tower=TextTower(whole, tokenizer, own))
    assert kept(model, inputs, reducer, 6) == [expected]
    assert kept(model, inputs, CDPruner(), 6) != [expected]


def test_a_text_tower_that_does_not_fit_is_refused_with_advice(clip):
    model, inputs, whole, tokenizer, own = clip
    with pytest.raises(TypeError, match=r"without vision_model.*give a transformers.CLIPModel"):
        TextTower(torch.nn.Linear(2, 2), tokenizer, own)
    tower = TextTower(whole, tokenizer, own)
    with pytest.raises(ValueError, match="states of width 7, and the one of this CLIP 48"):
        tower.image_embeds(torch.ones(3, 7))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    with (
        compress.attach(model, CDPruner(text_tower=tower), keep=0.5),
        pytest.raises(ValueError, match="give input_ids"),
    ):
        model(**given)
    qwen, _, questions = tiny_vlm("qwen2_5_vl")
    with (
        compress.attach(qwen, CDPruner(text_tower=tower), keep=0.5),
        pytest.raises(ValueError, match=r"not known for this model; use CDPruner\(\)"),
    ):
        qwen(**questions(images=(1,)))


def test_models_that_read_no_text_beside_the_image_are_refused():
    model, *_ = tiny_vlm("blip2")
    with pytest.raises(
        TypeError, match="CDPruner ranks by the prompt's text, which does not enter the Q-Former"
    ):
        compress.attach(model, CDPruner(), keep=0.5)


# VisPruner --------------------------------------------------------------------------------------------------


def thinned_out(attention: list[float], features: list[list[float]], count: int, ratio: float) -> list[int]:
    """VisPruner's selection with lists."""

    def cosine(i: int, j: int) -> float:
        norms = math.dist(features[i], [0] * len(features[i])) * math.dist(
            features[j], [0] * len(features[j])
        )
        return sum(a * b for a, b in zip(features[i], features[j], strict=True)) / norms

    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    important = int(count * ratio)
    picks, rest = order[:important], order[important:]
    while len(rest) > count - important:
        if count == important:
            rest = []
            break
        drop = min(8, len(rest) - (count - important))
        even, odd = rest[::2], rest[1::2]
        similar = sorted(even, key=lambda i: -max(cosine(i, j) for j in odd))
        rest = similar[min(drop, len(even)) :] + odd
    return sorted(picks + rest)


@quick
@given(st.integers(1, 60), st.data(), seeds)
def test_important_and_diverse_is_the_oracle(tokens, data, seed):
    count = data.draw(st.integers(0, tokens))
    ratio = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    random = np.random.RandomState(seed)
    features, attention = random.standard_normal((tokens, 5)), random.rand(tokens)
    places = important_and_diverse(torch.from_numpy(attention), torch.from_numpy(features), count, ratio)
    assert places.tolist() == thinned_out(attention.tolist(), features.tolist(), count, ratio)
    assert len(places) == count


def test_important_and_diverse_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at most N are accepted"):
        important_and_diverse(torch.rand(4), torch.rand(4, 2), 5)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        VisPruner(important_ratio=1.5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_vispruner_compares_states_where_they_are_known(name):
    model, _, inputs = tiny_vlm(name, "eager")
    inputs, images = inputs(images=(1,)), []
    reducer = VisPruner()
    reduce = reducer.reduce
    reducer.reduce = lambda image, budget: images.append(image) or reduce(image, budget)
    places = kept(model, inputs, reducer, 4)
    image = images[0]
    compared = image.features
    if name == "llava":
        output = model.model.vision_tower(
            inputs["pixel_values"], output_hidden_states=True, output_attentions=True
        )
        compared = output.hidden_states[-2][0, 1:]
        attention = output.attentions[-2][0, :, 0, 1:].mean(0)
        assert torch.allclose(image.attention("features").mean(1)[0], attention, atol=1e-6)
    attention = image.attention("features").mean(1).flatten()
    assert places == [thinned_out(attention.tolist(), compared.tolist(), 4, 0.5)]


# TokenCorr --------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 80), seeds)
def test_outliers_and_density_are_counted_as_defined(tokens, seed):
    random = np.random.RandomState(seed)
    attention = random.rand(tokens).astype(np.float32) ** 6
    low, high = np.percentile(attention, [25, 75])
    expected = attention > high + 1.5 * (high - low)
    assert attention_outliers(torch.from_numpy(attention)).tolist() == expected.tolist()
    keys = random.standard_normal((tokens, 2)).astype(np.float32)
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    repeating = [
        sum(j != i and unit[i] @ unit[j] > 0.9 for j in range(tokens)) >= 0.2 * tokens for i in range(tokens)
    ]
    density = information_density(torch.from_numpy(keys), 0.9, 0.2)
    assert density == pytest.approx(1 - sum(repeating) / tokens)


@quick
@given(st.integers(1, 60), st.data(), seeds)
def test_draws_are_distinct_nested_and_by_weight_without_a_generator(tokens, data, seed):
    count = data.draw(st.integers(0, tokens))
    weights = torch.rand(tokens, generator=generator(seed))
    draws = draw_by_weight(weights, tokens, generator(seed))
    assert draws.sort().values.tolist() == list(range(tokens))
    assert torch.equal(draw_by_weight(weights, count, generator(seed)), draws[:count])
    assert draw_by_weight(weights, count, None).tolist() == weights.argsort(descending=True)[:count].tolist()


def test_draws_follow_the_weights():
    weights, random = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), generator(0)
    firsts = torch.stack([draw_by_weight(weights, 2, random) for _ in range(6000)])
    share = firsts[:, 0].bincount(minlength=5) / len(firsts)
    assert torch.allclose(share, weights, atol=0.02)
    second = firsts[firsts[:, 0] == 0, 1].bincount(minlength=5).float()
    assert torch.allclose(second / second.sum(), torch.tensor([0, 0.6, 0.3, 0.1, 0]), atol=0.03)


def test_what_repeats_needs_fewer_tokens():
    random = generator(0)
    deep, low = 0.01 + 1e-4 * torch.rand(100, generator=random), torch.rand(100, generator=random)
    deep[[7, 50]] = torch.tensor([0.3, 0.4])
    differing = torch.randn(100, 32, generator=random)
    order, number = informative_order(deep, low, differing, None)
    assert order[:2].tolist() == [50, 7]
    assert order[2:].tolist() == [i for i in low.argsort(descending=True).tolist() if i not in (7, 50)]
    drawn = set(low.argsort(descending=True)[:50].tolist())
    assert number == len(drawn | {7, 50})
    repeating = differing.clone()
    repeating[:80] = differing[0]
    fewer = informative_order(deep, low, repeating, None)[1]
    assert fewer == len(set(low.argsort(descending=True)[:10].tolist()) | {7, 50}) < number
    assert informative_order(torch.ones(9), torch.ones(9), torch.ones(9, 3), None)[1] == 1


def recorded(reducer, name="llava_next", keep=None, **which):
    """The images that a reducer gets, and what it returns for each."""
    model, _, inputs = tiny_vlm(name)
    reduce, calls = reducer.reduce, []

    def watched(image, budget):
        calls.append((image, reduce(image, budget)))
        return calls[-1][1]

    reducer.reduce = watched
    with compress.attach(model, reducer, keep=keep):
        model(**inputs(**which or {"images": (2, 1)}))
    return calls


def test_tokencorr_keeps_the_thumbnail_and_what_each_tile_needs():
    for image, selection in recorded(TokenCorr(seed=4)):
        grid, mask = image.grid, torch.zeros(image.num_tokens, dtype=torch.bool)
        mask[selection.kept] = True
        assert bool(mask[grid.tile == grid.thumbnail].all()) and not mask[grid.separators].any()
        deep, low = image.attention("features").mean(1), image.attention(1).mean(1)
        random = image.generator(4)
        for tile in range(grid.num_tiles):
            own = (grid.tile == tile).nonzero().squeeze(1)
            index = grid.index[own]
            keys = image.keys[tile, 1:][index].flatten(1)
            order, number = informative_order(deep[tile, index], low[tile, index], keys, random)
            if tile != grid.thumbnail:
                assert mask[own].nonzero().flatten().tolist() == order[:number].sort().values.tolist()


def test_the_keys_are_those_of_the_low_layer():
    model, _, inputs = tiny_vlm("llava")
    inputs, outputs = inputs(images=(1,)), []
    layers = (
        model.model.vision_tower.vision_model.encoder.layers
        if hasattr(model.model.vision_tower, "vision_model")
        else model.model.vision_tower.encoder.layers
    )
    hook = layers[0].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    model(**inputs)
    hook.remove()
    ((image, _),) = recorded(TokenCorr(low_layer=0), "llava", images=(1,))
    assert torch.allclose(image.encoded_keys(), outputs[0][0, 1:], atol=1e-6)


def test_tokencorr_draws_by_image_and_seed():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(images=(1, 1))
    first = kept(model, inputs, TokenCorr(), 5)
    assert kept(model, inputs, TokenCorr(), 5) == first
    assert any(kept(model, inputs, TokenCorr(seed=seed), 5) != first for seed in range(1, 6))
    fixed = [kept(model, inputs, TokenCorr(deterministic=True, seed=seed), 5) for seed in (0, 1)]
    assert fixed[0] == fixed[1]
    for name in ("redundant_share", "sample_share"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            TokenCorr(**{name: 0})
    with pytest.raises(ValueError, match="by the picture; give keep to fix it"):
        TokenCorr().retained_count(Grid.single(4, 4), None)


# One computation for all ------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """How often rows or column sums of the tower's attention are computed."""
    calls = []
    for name in ("attention_rows", "column_sums"):
        function = getattr(recording, name)

        def counted(*args, name=name, function=function, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(recording, name, counted)
    return calls


@pytest.mark.parametrize(
    ("name", "reducers", "layers"),
    [
        ("llava", FasterVLM(), 1),
        ("llava", HiRED(early=1, late="features"), 1),  # vision_feature_layer -2 of three layers: layer 1
        ("llava", HiRED(early=-2, late="features"), 1),
        ("llava", HiRED(early=0, late="features"), 2),
        ("llava", TokenCorr(low_layer=1), 1),
        ("llava", [FasterVLM(keep=0.75), VisPruner()], 1),
        ("llava", [GlobalCom2(layer=1, keep=0.75), FasterVLM(keep=0.5), VisPruner()], 1),  # logits, too
        ("llava", [PruMerge(layer=1, keep=0.75), DivPrune()], 1),
        ("llava_next", [HiRED(keep=0.75), TokenCorr(low_layer=0, keep=0.5), FasterVLM()], 2),
        ("qwen2_5_vl", [HiRED(early=-1, keep=0.75), FasterVLM()], 1),
    ],
)
def test_attention_of_a_layer_is_computed_once_for_all_that_read_it(name, reducers, layers, computed):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1,))
    with compress.attach(model, FasterVLM(), keep=0.25):
        model(**inputs)
    once = len(computed)  # some towers call their attention window by window
    computed.clear()
    with compress.attach(model, reducers, keep=0.25):
        model(**inputs)
        assert len(computed) == layers * once > 0
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(computed) == 2 * layers * once


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3", "qwen3_vl"])
@pytest.mark.parametrize(
    "second", [FasterVLM(), VisPruner(important_ratio=1.0), TokenCorr(deterministic=True)]
)
def test_a_second_reader_ranks_the_tokens_that_are_left(name, second):
    """It keeps those of the tokens left that it would take first of all, by the scores it has alone."""
    model, _, inputs = tiny_vlm(name)
    inputs, images = inputs(images=(1,)), []
    first = UniformGrid(keep=0.75)
    scores = second.scores
    second.scores = lambda image: images.append((image, scores(image))) or images[-1][1]
    alone = kept(model, inputs, second, 2)
    whole, all_scores = images.pop()
    left = kept(model, inputs, first, 0.75)[0]
    both = kept(model, inputs, [first, second], 2)[0]
    image, own = images.pop()
    assert len(alone[0]) == len(both) == 2 and set(both) <= set(left)
    assert torch.equal(image.features, whole.features[left])
    if not isinstance(second, TokenCorr):  # whose ranks are among the tokens that are left
        assert torch.equal(own, all_scores[left])
    if whole.grid is None or whole.grid.num_tiles == 1:
        assert (
            own[torch.isin(torch.tensor(left), torch.tensor(both))].min()
            >= own.sort(descending=True).values[1]
        )


def test_readers_that_cannot_share_are_refused_by_name():
    model, *_ = tiny_vlm("llava")
    with pytest.raises(ValueError, match=r"HiRED reads .* must be the first"):
        compress.attach(model, [FasterVLM(keep=0.5), HiRED()], keep=0.25)
    with pytest.raises(ValueError, match=r"FasterVLM reads .* must be the first"):
        compress.attach(
            model, [PruMerge(keep=0.5), FasterVLM()], keep=0.25
        )  # merged tokens have no attention
    with pytest.raises(
        ValueError, match="GlobalCom2 and FasterVLM read the attention of tower layer 1 in diff"
    ):
        compress.attach(model, [GlobalCom2(layer=1, keep=0.5), FasterVLM(layer=1)], keep=0.25)
    with pytest.raises(ValueError, match="keys of layers 'features' and 0"):
        compress.attach(model, [VisPruner(keep=0.5), TokenCorr(low_layer=0)], keep=0.25)
