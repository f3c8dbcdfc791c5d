"""Reducers that rank by the prompt look at nothing that follows it."""

import pytest
import torch
from answers import ANSWERS, RANKED, with_answer
from oracles import going_on, the_cache, visual_tokens
from reducer_matrix import kept_rows, placeholders
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import FastV, KeyNorm
from vistok.compress.language.prompt_end import Generation, Hints, last_of_prompt

ALL = RANKED | {"KeyNorm": KeyNorm(), "both": ["divprune", FastV(k=1)]}
ranked = pytest.mark.parametrize("reducer", RANKED.values(), ids=RANKED)
everyone = pytest.mark.parametrize("reducer", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def token_by_token(model, inputs, answer):
    """Logits before each token of the answer and after the last."""
    ids = inputs["input_ids"]
    out = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=False,
        suppress_tokens=placeholders(model),
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits, cache = [out.logits[0]], the_cache(out)
    mask = inputs["attention_mask"]
    for token in answer:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = model(
            input_ids=torch.full_like(ids[:, :1], token),
            attention_mask=mask,
            **going_on(model, cache),
            use_cache=True,
        )
        logits.append(step.logits[:, -1])
    return torch.stack(logits, 1)


@everyone
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FIXTURES)
def test_one_forward_with_labels_equals_token_by_token(name, attention, reducer):
    model, _, inputs = tiny_vlm(name, attention)
    inputs, answer = inputs(images=(1,)), ANSWERS[0]
    longer, labels = with_answer(inputs, answer)
    with compress.attach(model, reducer, keep=0.4):
        whole = model(**longer, labels=labels).logits[:, -len(answer) - 1 :]
        steps = token_by_token(model, inputs, answer)
    torch.testing.assert_close(whole, steps, atol=1e-4, rtol=0)


@ranked
@pytest.mark.parametrize("how", ["labels", "logits_to_keep", "prompt_length"])
def test_all_answers_share_one_kept_set(reducer, how):
    model, _, inputs = tiny_vlm("llava", seed=3)
    inputs = inputs(images=(2, 1))
    length, kept = inputs["input_ids"].shape[1], []
    with compress.attach(model, reducer, keep=0.3) as session:
        model(**inputs)
        kept.append(kept_rows(session, 2, layer=-1))
        for answer in ANSWERS:
            longer, labels = with_answer(inputs, answer)
            session.prompt_length = length if how == "prompt_length" else None
            extra = {"labels": {"labels": labels}, "logits_to_keep": {"logits_to_keep": len(answer) + 1}}
            model(**longer, **extra.get(how, {}))
            kept.append(kept_rows(session, 2, layer=-1))
    for other in kept[1:]:
        assert all(map(torch.equal, kept[0], other))


@ranked
def test_right_padded_answers_end_where_their_labels_say(reducer):
    model, _, inputs = tiny_vlm("llava", seed=3)
    inputs = inputs(images=(1, 1), padding_side="right")
    lengths = inputs["attention_mask"].sum(1).tolist()
    with compress.attach(model, reducer, keep=0.3) as session:
        model(**inputs)
        kept = kept_rows(session, 2, layer=-1)
        labels = torch.full_like(inputs["input_ids"], -100)
        longer, _ = with_answer(inputs, ANSWERS[0])
        ids, mask = longer["input_ids"].clone(), torch.zeros_like(longer["input_ids"])
        labels = torch.full_like(ids, -100)
        for row, length in enumerate(lengths):
            ids[row, length : length + 3] = labels[row, length : length + 3] = torch.tensor(ANSWERS[row])
            mask[row, : length + 3] = 1
        model(**longer | {"input_ids": ids, "attention_mask": mask}, labels=labels)
        assert all(map(torch.equal, kept, kept_rows(session, 2, layer=-1)))


@everyone
@pytest.mark.parametrize("pattern", ["prompt lookup", "assistant", "no cache", "beams without cache"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_drafts_and_no_cache_equal_greedy(name, pattern, reducer):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1,))
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": placeholders(model)}
    beams = {"num_beams": 3} if pattern.startswith("beams") else {}
    more = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_vlm(name, seed=0)[0]},
        "no cache": {"use_cache": False},
        "beams without cache": {"use_cache": False},
    }[pattern]
    with compress.attach(model, reducer, keep=0.3):
        greedy = model.generate(**inputs, **settings, **beams)
        other = model.generate(**inputs, **settings, **beams, **more)
    assert torch.equal(greedy, other)


@ranked
def test_a_prompt_that_is_not_known_is_refused_with_what_to_do(reducer):
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(images=(1, 1))
    labels = inputs["input_ids"].masked_fill(visual_tokens(model, inputs), -100)
    with compress.attach(model, reducer, keep=0.5) as session:
        with pytest.raises(ValueError, match=r"not known where the prompt of row 0 ends.*prompt_length"):
            model(**inputs, labels=labels)
        session.prompt_length = inputs["input_ids"].shape[1]
        model(**inputs, labels=labels)
        session.prompt_length = 1000
        with pytest.raises(ValueError, match="prompt_length is 1000, but this forward holds tokens 1 to"):
            model(**inputs)
        for wrong in (0, -1, 2.5, True, []):
            with pytest.raises(ValueError, match="prompt_length is"):
                session.prompt_length = wrong


def test_the_prompt_ends_where_the_first_word_on_it_says():
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    labels = torch.tensor([[-100, -100, -100, -100, 7, 8], [-100, -100, 5, 6, 7, -100]])

    def last(given=None, generation=None, before=0, **hints):
        return last_of_prompt(real, before, given, generation, Hints(**hints)).tolist()

    assert last() == [5, 4]
    assert last(labels=labels) == [3, 1]
    assert last(labels=torch.full_like(labels, -100)) == [5, 4]
    assert last(logits_to_keep=1) == [5, 4]
    assert last(logits_to_keep=3) == [3, 3]
    assert last(logits_to_keep=torch.tensor([4, 5])) == [4, 4]
    assert last(generation=Generation(torch.nn.Identity(), 4), labels=labels) == [3, 3]
    assert last(generation=Generation(torch.nn.Identity(), 12), before=10) == [0, 1]
    assert last(given=5, generation=Generation(torch.nn.Identity(), 4)) == [4, 4]
    assert last(given=[5, 4]) == [4, 3]
    with pytest.raises(ValueError, match="prompt_length has 3 entries; this forward has 2 rows"):
        last(given=[5, 4, 3])
