"""What is special to the methods that evict by attention or choose what each step attends to: H2O, Keyformer,
TokenSelect and Recycled Attention.

What every method must satisfy on every model is in `test_attach.py`, recorded outputs in `test_verify.py`.
"""

from dataclasses import replace
from functools import cache

import pytest
import reducer_matrix as matrix
import torch
import torch.nn.functional as F
import transformers as hf
from answers import ANSWERS, with_answer
from cache_oracle import HeavyHitters, Recycled, TokenLoop, Votes, prompts
from oracles import going_on, the_cache, visual_tokens
from reducer_matrix import placeholders
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import H2O, DivPrune, FastV, Keyformer, KeyNorm, RecycledAttention, TokenSelect
from vistok.compress.algorithms.heavy_hitters import accumulated, favour_recent, gumbel_softmax
from vistok.compress.algorithms.soft_vote import max_pooled, soft_vote
from vistok.compress.language import eviction
from vistok.compress.language.cache_stage import gathered

STEPS = 8
BATCH = (2, 1, 0)


@cache
def built(name, seed):
    return tiny_vlm(name, seed=seed)


def fixture(name="llava", attention="sdpa", seed=3):
    """The model, and the function that makes its inputs."""
    model, _, inputs = built(name, seed)
    model.set_attn_implementation(attention)
    return model, inputs


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def gumbel(seed):
    """Keyformer's noise for one prompt of up to 64 tokens."""

    def noise(layer, tokens):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        return -torch.empty(4, tokens, tokens).exponential_(generator=generator).log()

    return noise


def recycled(count):
    return Recycled(count, stride=2, threshold=0.5, kernel=3)


# A reducer, its rule for a budget, and how its budget divides.
METHODS = {
    "h2o": (H2O(), lambda count: HeavyHitters(count, round(count / 2))),
    "h2o recent": (H2O(heavy=1, recent=3), lambda count: HeavyHitters(count, round(count * 0.75))),
    "keyformer": (
        Keyformer(tau_init=2.0, seed=5),
        lambda count: HeavyHitters(count, round(count * 0.3), gumbel(5), 2.0),
    ),
    "tokenselect": (TokenSelect(), Votes),
    "tokenselect pooled": (TokenSelect(pool=3), lambda count: Votes(count, 3)),
    "recycled": (RecycledAttention(stride=2, threshold=0.5, kernel_size=3), recycled),
    "recycled never": (
        RecycledAttention(stride=3, threshold=-1.0),
        lambda count: Recycled(count, 3, -1.0, 7),
    ),
}
every = pytest.mark.parametrize("method", METHODS)


def generated(model, inputs, reducer, keep, **settings):
    """New tokens [B, n] and the logits [B, n, V] that they were chosen from."""
    with compress.attach(model, reducer, keep=keep):
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=placeholders(model),
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def looped(model, inputs, rule, share):
    """The same of the token loop, each prompt on its own."""
    tokens, logits, rules = [], [], []
    for embeds, visual in prompts(model, inputs):
        made = rule(round(share * sum(visual)))
        loop = TokenLoop(model, made)
        made.loop = loop
        new, row = loop.run(embeds, visual, STEPS, placeholders(model))
        tokens.append(new)
        logits.append(row)
        rules.append(made)
    return torch.tensor(tokens), torch.stack(logits), rules


@every
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_equals_a_loop_over_tokens(method, attention):
    model, inputs = fixture(attention=attention)
    inputs, (reducer, rule) = inputs(images=BATCH), METHODS[method]
    tokens, logits = generated(model, inputs, reducer, 0.25)
    expected, expected_logits, _ = looped(model, inputs, rule, 0.25)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=0)
    whole, _ = generated(model, inputs, reducer, 1.0)
    assert not torch.equal(tokens, whole), "the budget changes nothing, so the test shows nothing"


def test_the_schedule_of_recycling_has_both_kinds_of_steps():
    """What the comparison above covers: due steps at which a layer attends to everything, and others."""
    model, inputs = fixture()
    _, _, rules = looped(model, inputs(images=BATCH), recycled, 0.25)
    full = [steps for rule in rules for steps in rule.full.values()]
    assert any(len(steps) < STEPS // 2 for steps in full)
    assert any(len(steps) == STEPS // 2 for steps in full)


def test_recycling_with_full_attention_at_every_step_changes_nothing():
    model, inputs = fixture()
    inputs = inputs(images=BATCH)
    always, logits = generated(model, inputs, RecycledAttention(stride=1, threshold=1.0), 0.1)
    whole, expected = generated(model, inputs, RecycledAttention(), 1.0)
    assert torch.equal(always, whole)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# On all models ----------------------------------------------------------------------------------------------

EVERYWHERE = {
    "h2o": H2O(),
    "h2o, one set per layer": H2O(per_head=False, per_image=True),
    "keyformer": Keyformer(),
    "tokenselect": TokenSelect(pool=3, per_image=True),
    "recycled": RecycledAttention(stride=2, threshold=0.5),
}


def everywhere():
    for name in [*FIXTURES, "gemma3", "llava_mistral_narrow"]:
        for method in EVERYWHERE:
            for decoding in ({}, {"num_beams": 3}):
                windows = name not in FIXTURES and method in ("h2o", "keyformer")
                marks = [] if name == "qwen2_5_vl" else [pytest.mark.slow]
                if not windows:
                    yield pytest.param(
                        name, method, decoding, marks=marks, id=f"{name}-{method}-{len(decoding)}"
                    )


@pytest.mark.parametrize(("name", "method", "decoding"), list(everywhere()))
def test_every_method_on_every_model(name, method, decoding):
    model, inputs = fixture(name, seed=0)
    matrix.whole(model, inputs(images=BATCH), EVERYWHERE[method], **decoding)


@pytest.mark.parametrize("name", ["gemma3", "llava_mistral_narrow"])
def test_heads_of_their_own_are_refused_where_windows_count_entries(name):
    model, _ = fixture(name, seed=0)
    with pytest.raises(TypeError, match=r"layers \[0.*attend within a window.*give it per_head=False"):
        compress.attach(model, H2O(), keep=0.5)


# Ways of calling --------------------------------------------------------------------------------------------

ways = pytest.mark.parametrize("reducer", EVERYWHERE.values(), ids=EVERYWHERE)


@ways
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generating_without_a_cache_is_the_same(reducer, settings):
    model, inputs = fixture("qwen2_5_vl", seed=0)
    inputs = inputs(images=BATCH)
    cached, _ = generated(model, inputs, reducer, 0.3, **settings)
    recomputed, _ = generated(model, inputs, reducer, 0.3, use_cache=False, **settings)
    assert torch.equal(cached, recomputed)


@ways
def test_an_answer_in_the_same_forward_or_in_one_later_call_equals_token_by_token(reducer):
    model, inputs = fixture("llava_next", seed=1)
    inputs, answer = inputs(images=(2, 1)), ANSWERS[0]
    longer, labels = with_answer(inputs, answer)
    count, cut = len(answer), inputs["input_ids"].shape[1]
    mask = longer["attention_mask"]
    with compress.attach(model, reducer, keep=0.2):
        whole = model(**longer, labels=labels).logits[:, -count:]
        at_once = the_cache(model(**inputs, use_cache=True))
        new = longer["input_ids"][:, -count:]
        later = model(input_ids=new, attention_mask=mask, **going_on(model, at_once)).logits
        cache, steps = the_cache(model(**inputs, use_cache=True)), []
        for i in range(count):
            step = {"input_ids": new[:, i : i + 1], "attention_mask": mask[:, : cut + i + 1]}
            steps.append(model(**step, **going_on(model, cache)).logits[:, -1])
    torch.testing.assert_close(whole, torch.stack(steps, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(later, torch.stack(steps, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("reducer", [H2O(), TokenSelect(), TokenSelect(pool=3)], ids=str)
def test_drafts_equal_greedy(reducer):
    model, inputs = fixture()
    inputs = inputs(images=(1,))
    greedy, _ = generated(model, inputs, reducer, 0.3)
    drafted, _ = generated(model, inputs, reducer, 0.3, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, drafted)


def test_drafts_are_refused_where_steps_depend_on_those_before():
    model, inputs = fixture()
    with pytest.raises(NotImplementedError, match=r"tokens cannot be taken back.*without drafts"):
        generated(model, inputs(images=(1,)), RecycledAttention(), 0.3, prompt_lookup_num_tokens=3)


@ways
def test_rows_of_a_second_turn_with_another_picture_may_change_places(reducer):
    model, inputs = fixture()
    first, second = inputs(images=(1, 1)), inputs(images=(1, 0))
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    runs = []
    with compress.attach(model, reducer, keep=0.25):
        for order in (torch.tensor([0, 1]), torch.tensor([1, 0])):
            cache, logits, columns = the_cache(model(**first, use_cache=True)), [], mask[order]
            model(**{**second, "attention_mask": mask}, **going_on(model, cache))
            cache.reorder_cache(order)
            for token in (30, 41, 52):
                columns = F.pad(columns, (0, 1), value=1)
                step = {"input_ids": torch.full((2, 1), token), "attention_mask": columns}
                logits.append(model(**step, **going_on(model, cache)).logits[:, -1])
            runs.append(torch.stack(logits, 1)[order])
    torch.testing.assert_close(*runs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("method", [TokenSelect, RecycledAttention])
def test_two_turns_choose_as_one_prompt_of_both(method, per_image):
    """Prompts are read with full attention, so what steps choose from is the same."""
    model, inputs = fixture()
    turn = inputs(images=(1,))
    both = {k: torch.cat([v, v], 0 if k == "pixel_values" else 1) for k, v in turn.items()}
    logits = []
    with compress.attach(model, method(per_image=per_image), keep=3):
        for prompts in ([turn, turn], [both]):
            cache = hf.DynamicCache(config=model.config.get_text_config())
            for prompt in prompts:
                read = cache.get_seq_length()
                mask = torch.ones(1, read + prompt["input_ids"].shape[1], dtype=torch.long)
                model(**{**prompt, "attention_mask": mask}, **going_on(model, cache))
            steps = [
                model(input_ids=torch.tensor([[token]]), **going_on(model, cache)).logits[:, -1]
                for token in (30, 41, 52)
            ]
            logits.append(torch.stack(steps, 1))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@ways
@pytest.mark.parametrize("before", [DivPrune(keep=0.5), FastV(k=1, keep=0.5)], ids=["features", "layers"])
def test_behind_a_reducer_of_another_stage_budgets_count_what_it_leaves(reducer, before):
    model, inputs = fixture()
    inputs = inputs(images=BATCH)
    reducer = replace(reducer, keep=0.25)
    with compress.attach(model, [before, reducer]) as session:
        session.trace = {}
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=placeholders(model))
        assert out.shape[1] == inputs["input_ids"].shape[1] + 2
        for row, count in ((0, 4), (1, 2)):  # of 32 and 16 tokens, half and then a quarter stay
            if "attended.2" in session.trace:
                attended = session.trace["attended.2"][-1][row, :, 0].sum(-1)
            else:
                found = [e for e in session.explain(2, cache=True) if e.row == row]
                heads = [torch.ones(1, len(e.tokens)) if e.heads is None else e.heads for e in found]
                attended = torch.cat(heads, 1).sum(-1)
            assert attended.tolist() == [count] * len(attended)


# Budgets ----------------------------------------------------------------------------------------------------


def held(model, inputs, reducer, **options):
    """Visual tokens in the first layer's cache of each image, for each head."""
    with compress.attach(model, reducer, **options) as session:
        model(**inputs)
        return [
            e.heads.sum(1).tolist() if e.heads is not None else len(e.tokens)
            for e in session.explain(0, cache=True)
        ]


def test_images_of_a_prompt_share_a_budget_unless_each_has_its_own():
    model, inputs = fixture()
    inputs = inputs(images=(2, 1))
    assert held(model, inputs, H2O(per_image=True), keep=5) == [[5, 5]] * 3
    newest = H2O(heavy=0, recent=1)  # with one budget they are tokens of the second image
    assert held(model, inputs, newest, keep=5) == [[0, 0], [10, 10], [5, 5]]
    assert held(model, inputs, replace(newest, per_image=True), keep=5) == [[5, 5]] * 3


@pytest.mark.parametrize(
    ("reducer", "count"),
    [
        (H2O(), 4),  # of 16 tokens 0.1 and 0.1, rounded each
        (H2O(heavy=0.25, recent=3), 7),
        (H2O(heavy=20, recent=0), 16),
        (Keyformer(), 10),
        (Keyformer(kv_cache=0.25), 4),
    ],
    ids=str,
)
def test_without_a_budget_the_papers_number_stays(reducer, count):
    model, inputs = fixture()
    result = held(model, inputs(images=(1,)), reducer)
    assert result == [[count] * 2 if count < 16 else 16]


def test_steps_without_a_budget_attend_to_the_papers_number():
    assert TokenSelect(top_k=5).default_count(16) == 5
    assert TokenSelect().default_count(16) == 16
    assert RecycledAttention().default_count(16) == 2
    assert RecycledAttention().default_count(3) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(heavy=-1), "heavy is -1; it takes a share from 0.0 to 1.0 or a count from 0"),
        (lambda: H2O(recent=1.5), "recent is 1.5"),
        (lambda: H2O(heavy=True), "heavy is True"),
        (lambda: H2O(heavy=0, recent=0.0), "both 0, which keeps no token"),
        (lambda: Keyformer(kv_cache=0), "kv_cache is 0; it takes a share above 0"),
        (lambda: Keyformer(recent=2), "recent is 2; it takes a share from 0 to 1"),
        (lambda: Keyformer(tau_init=0), "tau_init is 0; it takes a temperature above 0"),
        (lambda: TokenSelect(top_k=0), "top_k is 0; it takes a count from 1"),
        (lambda: TokenSelect(pool=4), "pool is 4; it takes an odd number"),
        (lambda: RecycledAttention(stride=0), "stride is 0"),
        (lambda: RecycledAttention(threshold=1.1), "threshold is 1.1; it takes a cosine"),
        (lambda: RecycledAttention(kernel_size=2), "kernel_size is 2; it takes an odd number"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What is refused --------------------------------------------------------------------------------------------


def test_reducers_that_exclude_each_other_are_refused_by_name():
    model, inputs = fixture()
    with pytest.raises(ValueError, match=r"TokenSelect chooses at each step.*KeyNorm, TokenSelect"):
        compress.attach(model, [KeyNorm(), TokenSelect()])
    with pytest.raises(ValueError, match=r"keeps tokens of its own with H2O.*give it last"):
        compress.attach(model, [H2O(), KeyNorm()])
    matrix.cutting_equals_masking(model, inputs(images=(2, 1)), [KeyNorm(keep=0.75), H2O()], 0.25, 3e-5, True)


def test_scores_of_another_shape_are_refused(monkeypatch):
    model, inputs = fixture()
    monkeypatch.setattr(H2O, "rank", lambda self, tokens: tokens.received[0])
    with (
        compress.attach(model, H2O(), keep=0.5),
        pytest.raises(
            ValueError, match=r"H2O returned scores of shape \(16,\) in layer 0.*\(2, 16\): one per key"
        ),
    ):
        model(**inputs(images=(1,)))


@pytest.mark.parametrize("reducer", [H2O(), KeyNorm(), TokenSelect(), RecycledAttention()], ids=str)
def test_attention_that_does_not_report_is_an_error(reducer):
    model, inputs = fixture()
    longer, labels = with_answer(inputs(images=(1,)), ANSWERS[0])
    silent = rf"attention of layer 0 .*did not report to {type(reducer).__name__}"
    with compress.attach(model, reducer, keep=0.5):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match=silent):
            model(**longer, labels=labels)
        if not isinstance(reducer, KeyNorm):  # which reads nothing but keys
            with pytest.raises(RuntimeError, match=silent):
                model.generate(**inputs(images=(1,)), max_new_tokens=2, suppress_tokens=placeholders(model))


def test_a_layer_that_holds_other_entries_than_planned_is_an_error(monkeypatch):
    model, inputs = fixture()
    inputs, stock = inputs(images=(1,)), eviction.replace_entries

    def too_many_values(cache, layer, keys, values):
        stock(cache, layer, keys, values)
        cache.layers[layer].values = F.pad(values, (0, 0, 1, 0))

    with compress.attach(model, H2O(), keep=0.5):
        monkeypatch.setattr(eviction, "replace_entries", too_many_values)
        with pytest.raises(
            RuntimeError, match=r"cache of Llava.* holds 17 and 18 entries in layer 0 where 17 were"
        ):
            model(**inputs)
    monkeypatch.undo()
    with compress.attach(model, TokenSelect(), keep=0.5):
        cache = the_cache(model(**inputs, use_cache=True))
        layer = cache.layers[1]
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        refused = r"attention of layer 1 of Llava.* got 25 entries where 26 were planned"
        with pytest.raises(RuntimeError, match=refused):
            model(input_ids=torch.tensor([[30]]), **going_on(model, cache))


@ways
def test_a_prompt_whose_end_is_not_known_is_refused_or_has_no_effect(reducer):
    model, inputs = fixture()
    inputs = inputs(images=(1,))
    labels = inputs["input_ids"].masked_fill(visual_tokens(model, inputs), -100)
    with compress.attach(model, reducer, keep=0.2):
        if isinstance(reducer, TokenSelect):
            with pytest.warns(UserWarning, match="TokenSelect acts on the cache once .* no effect here"):
                model(**inputs, labels=labels)
        else:
            with pytest.raises(ValueError, match="it is not known where the prompt of row 0 ends"):
                model(**inputs, labels=labels)


# The algorithms ---------------------------------------------------------------------------------------------


def test_what_entries_have_received_grows_with_the_cache():
    maps = torch.rand(3, 9, 9).tril()
    score = accumulated(accumulated(None, maps[:, :6, :6]), maps[:, 6:, :])
    torch.testing.assert_close(score, maps.sum(1))


def test_the_newest_are_favoured_and_the_scores_left_alone():
    scores = torch.tensor([[3.0, 9, 1, 2]])
    assert favour_recent(scores, 2).tolist() == [[3, 9, torch.inf, torch.inf]]
    assert favour_recent(scores, 0).tolist() == scores.tolist() == [[3, 9, 1, 2]]
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"recent is {wrong}; of 4 tokens"):
            favour_recent(scores, wrong)


def test_gumbel_softmax_draws_from_the_softmax_of_the_logits():
    """Its highest entry is a sample of the distribution, at every temperature; noise is seeded."""
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(20_000, 4)
    for tau in (0.5, 2.0):
        rows = gumbel_softmax(logits, tau, torch.Generator().manual_seed(1))
        torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows)))
        shares = rows.argmax(-1).bincount(minlength=4) / len(rows)
        torch.testing.assert_close(shares, logits[0].exp(), atol=0.015, rtol=0)
        again = gumbel_softmax(logits, tau, torch.Generator().manual_seed(1))
        assert torch.equal(rows, again)
    masked = gumbel_softmax(torch.tensor([0.0, torch.finfo(torch.float32).min]), 0.5)
    assert masked.tolist() == [1, 0]


def test_votes_are_sums_of_softmaxes_over_the_candidates():
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 10, 8)
    candidates = torch.rand(2, 1, 3, 10) < 0.6
    candidates[..., 0] = True
    votes = soft_vote(query, key, candidates, 0.5)
    for b in range(2):
        for r in range(3):
            chosen = candidates[b, 0, r]
            expected = sum((query[b, h, r] @ key[b, h // 2, chosen].T * 0.5).softmax(-1) for h in range(4))
            torch.testing.assert_close(votes[b, r, chosen], expected)
            assert not votes[b, r, ~chosen].any()


def test_pooling_takes_the_highest_neighbour():
    scores = torch.randn(2, 3, 11)
    for size in (1, 3, 7, 15):
        reach = size // 2
        expected = [scores[..., max(0, i - reach) : i + reach + 1].amax(-1) for i in range(11)]
        assert torch.equal(max_pooled(scores, size), torch.stack(expected, -1))
    for wrong in (0, 2):
        with pytest.raises(ValueError, match=f"pooling size is {wrong}; it takes an odd number"):
            max_pooled(scores, wrong)


def test_equal_prompts_draw_the_same_wherever_they_stand():
    model, inputs = fixture()
    batch = inputs(images=(1, 1))
    alone = {name: value[:1] for name, value in batch.items()}
    twice = {name: torch.cat([value, value]) for name, value in alone.items()}

    def kept(inputs, seed):
        with compress.attach(model, Keyformer(seed=seed), keep=0.3) as session:
            model(**inputs)
            return [(e.tokens.tolist(), e.heads.tolist()) for e in session.explain(3, cache=True)]

    first = kept(alone, 1)
    assert kept(twice, 1) == first * 2
    assert kept(batch, 1)[0] == first[0]
    assert kept(alone, 2) != first


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
def test_one_query_on_gathered_entries_equals_a_mask_on_all(kernel, padded, heads):
    """In the form of mask of each kernel, with rows and heads that attend to other entries."""
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    attended = torch.zeros(2, heads, 9, dtype=torch.bool)
    attended[0, :, [0, 2, 5, 8]] = attended[1, :, [0, 1, 8]] = True
    attended[:, -1] = attended[:, -1].roll(-1, -1).index_fill(-1, torch.tensor([8]), True)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :1] = not padded
    mask = None
    if padded:
        mask = {"sdpa": real[:, None, None], "flash_attention_2": real.long()}.get(kernel)
        if mask is None:
            mask = torch.zeros(2, 1, 1, 9).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    if kernel == "flash_attention_2" and heads == 2:
        with pytest.raises(NotImplementedError, match="flash_attention_2 takes no mask for each head"):
            gathered(kernel, attended, query, key, value, mask)
        return
    short, values, short_mask = gathered(kernel, attended, query, key, value, mask)
    assert short.shape[2] < 9
    if kernel == "flash_attention_2":
        short_mask = short_mask.bool()[:, None, None]
    allowed = (attended & real[:, None]).repeat_interleave(4 // heads, 1)[:, :, None]
    expected = F.scaled_dot_product_attention(query, key, value, allowed, enable_gqa=True)
    result = F.scaled_dot_product_attention(query, short, values, short_mask, enable_gqa=True)
    torch.testing.assert_close(result, expected)
