"""What a session does around generation: chats, labels, text-only prompts, other modes, threads, and
refusals."""

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from answers import continued
from layer_cut import Cut
from oracles import checkpoint_layers, going_on, real_tokens, the_cache, visual_tokens
from PIL import Image
from reducer_matrix import kept_rows, outputs, placeholders
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, FastV, KeyNorm, Random, ToMe, TransPrune, UniformGrid
from vistok.compress.language.call import CURRENT

STAGES = {
    "features": [Random()],
    "layer": [Cut(k=1)],
    "both": [Random(), Cut(k=2)],
    "all but vision": [UniformGrid(), Cut(k=2), KeyNorm()],
}


@pytest.fixture(params=FIXTURES)
def vlm(request):
    return tiny_vlm(request.param)


@pytest.mark.parametrize("stages", ["features", "layer", "both"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [(1,), (2, 1, 0)], ids=str)
def test_a_chat_on_one_cache_equals_one_go(vlm, stages, attention, images):
    model, _, inputs = vlm
    model.set_attn_implementation(attention)
    inputs = inputs(images=images)
    settings = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": placeholders(model),
    }
    with torch.no_grad(), compress.attach(model, STAGES[stages], keep=0.5):
        first = model.generate(**inputs, **settings)
        more = torch.tensor([[9, 10, 11]]).expand(len(first.sequences), -1)
        longer = continued(inputs, torch.cat([first.sequences, more], 1))
        text = {k: v for k, v in longer.items() if not k.startswith(("pixel", "image_sizes"))}
        second = model.generate(**text, **going_on(model, the_cache(first)), **settings)
        expected = model.generate(**longer, **settings)
    assert torch.equal(second.sequences, expected.sequences)
    for step, reference in zip(second.logits, expected.logits, strict=True):
        assert torch.allclose(step, reference, atol=3e-5, rtol=0)


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_a_manual_loop_without_position_ids_equals_generate(vlm, positions):
    model, _, inputs = vlm
    inputs = inputs(1)
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": placeholders(model)}
    with torch.no_grad(), compress.attach(model, Random(), keep=0.5, positions=positions):
        expected = model.generate(**inputs, **settings)[:, -4:]
        out, tokens = model(**inputs, use_cache=True), []
        for _ in range(4):
            logits = out.logits[:, -1].clone()
            logits[:, placeholders(model)] = -torch.inf
            tokens.append(logits.argmax(-1, keepdim=True))
            out = model(input_ids=tokens[-1], **going_on(model, the_cache(out)), use_cache=True)
    assert torch.equal(torch.cat(tokens, 1), expected)


@pytest.mark.parametrize("stages", STAGES)
def test_text_only_prompts_are_untouched(vlm, stages):
    model, processor, _ = vlm
    inputs = processor(text=["USER : describe a cat ASSISTANT :"], return_tensors="pt")
    before = outputs(model, inputs)
    with compress.attach(model, STAGES[stages], keep=0.5):
        during = outputs(model, inputs)
    assert torch.equal(before[0], during[0])
    assert torch.equal(before[1], during[1])


@pytest.mark.parametrize("stages", STAGES)
def test_labels_and_likelihoods_see_the_whole_prompt(vlm, stages):
    model, _, inputs = vlm
    inputs = inputs(images=(2, 1, 0))
    visual = visual_tokens(model, inputs) | ~real_tokens(inputs)
    labels = inputs["input_ids"].masked_fill(visual, -100)
    with torch.no_grad(), compress.attach(model, STAGES[stages], keep=0.5):
        out = model(**inputs, labels=labels)
        last = model(**inputs, logits_to_keep=1).logits
    assert out.logits.shape[:2] == labels.shape
    assert torch.allclose(last[:, 0], out.logits[:, -1], atol=1e-5)
    chosen = out.logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)
    own = -chosen.gather(1, labels[:, 1:][labels[:, 1:] != -100][:, None]).mean()
    assert torch.allclose(out.loss, own, atol=1e-5)


def test_gradients_flow_and_checkpointing_does_not_change_them():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(2)
    labels = inputs["input_ids"].masked_fill(visual_tokens(model, inputs), -100)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            checkpoint_layers(model, True)
        model.zero_grad()
        with compress.attach(model, [DivPrune(), Cut(k=2)], keep=0.5):
            model(**inputs, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


PATTERNS = {
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams and sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stages", ["features", "layer", "both"])
def test_ways_of_calling_generate(vlm, stages, pattern):
    model, _, inputs = vlm
    inputs = inputs(images=(1,) if "lookup" in pattern else (1, 2))
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": placeholders(model),
        **PATTERNS[pattern],
    }

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        out = model.generate(**inputs, **settings)
        return out if isinstance(out, torch.Tensor) else out.sequences

    with torch.no_grad():
        stock = run()
        with compress.attach(model, STAGES[stages], keep=0.5) as session:
            reduced = run()
            session.keep = 1.0
            everything = run()
            session.keep = 0.5
            assert torch.equal(run(), reduced)
            if pattern in ("no cache", "prompt lookup"):
                plain = {k: v for k, v in settings.items() if k not in PATTERNS[pattern]}
                assert torch.equal(model.generate(**inputs, **plain), reduced)
    assert torch.equal(everything, stock)
    assert reduced.shape == stock.shape


# The functional mode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prepared_inputs_give_what_hooks_give(vlm, positions, beams):
    model, _, inputs = vlm
    inputs = inputs(images=(2, 1) if beams == 1 else (1,))
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "suppress_tokens": placeholders(model),
        "num_beams": beams,
    }
    with torch.no_grad(), compress.attach(model, DivPrune(), keep=0.5, positions=positions) as session:
        hooked = model.generate(**inputs, **settings)
        prepared = session.prepare(inputs)
        attached = prepared.restore(model.generate(**copy.deepcopy(prepared.inputs), **settings))
    with torch.no_grad():
        detached = prepared.restore(model.generate(**prepared.inputs, **settings))
    assert prepared.inputs["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert torch.equal(attached, hooked)
    assert torch.equal(detached, hooked)


def test_static_caches_and_chunked_prefill_are_refused_with_the_way_that_works():
    model, _, inputs = tiny_vlm("llava")
    inputs, settings = inputs(1), {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), compress.attach(model, "divprune", keep=0.5) as session:
        expected = model.generate(**inputs, **settings)
        for other in ({"cache_implementation": "static"}, {"prefill_chunk_size": 7}):
            with pytest.raises(NotImplementedError, match=r"session\.prepare\(inputs\)"):
                model.generate(**inputs, **settings, **other)
            assert CURRENT.get() is None
            assert torch.equal(model.generate(**inputs, **settings), expected)
            prepared = session.prepare(inputs)
            assert torch.equal(
                prepared.restore(model.generate(**prepared.inputs, **settings, **other)), expected
            )


def test_reducers_inside_the_model_cannot_be_prepared():
    model, _, inputs = tiny_vlm("llava")
    with (
        compress.attach(model, FastV(k=1)) as session,
        pytest.raises(NotImplementedError, match="FastV act"),
    ):
        session.prepare(inputs(1))


# Budgets ----------------------------------------------------------------------------------------------------


def test_budgets_are_fractions_counts_and_functions_of_the_image(vlm):
    model, _, inputs = vlm
    inputs = inputs(images=(2, 1))
    sizes = [len(row) for row in kept_rows_of(model, inputs, 1.0)]
    assert [int(row.sum()) for row in kept_rows_of(model, inputs, 3)] == [6, 3]
    half = kept_rows_of(model, inputs, 0.5)
    assert all(abs(int(row.sum()) - size / 2) <= 1 for row, size in zip(half, sizes, strict=True))
    first = kept_rows_of(model, inputs, lambda image: 1 if image.number else min(2, image.num_tokens))
    assert [int(row.sum()) for row in first] == [3, 2]


def kept_rows_of(model: hf.PreTrainedModel, inputs: Any, keep: Any) -> list[torch.Tensor]:
    with torch.no_grad(), compress.attach(model, UniformGrid(), keep=keep) as session:
        model(**inputs)
        return kept_rows(session, len(inputs["input_ids"]))


def test_the_budget_changes_between_calls_and_goes_before_the_methods_own():
    model, _, inputs = tiny_vlm("llava")
    inputs, kept = inputs(1), []
    with torch.no_grad(), compress.attach(model, UniformGrid(keep=4)) as session:
        for keep in (None, 5, 0.5, None):
            session.keep = keep
            model(**inputs)
            kept.append(session.report().images[0].layers[0])
    assert kept == [4, 5, 8, 4]


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (0, ValueError, "at least 1"),
        (0.0, ValueError, "fraction in"),
        (1.5, ValueError, "fraction in"),
        (-0.1, ValueError, "fraction in"),
        (64.0, ValueError, "did you mean the count 64"),
        (float("nan"), ValueError, "fraction in"),
        (True, TypeError, "fraction in"),
        ("half", TypeError, "fraction in"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(keep, error, message):
    model, _, inputs = tiny_vlm("llava")
    with pytest.raises(error, match=message):
        compress.attach(model, "divprune", keep=keep)
    with compress.attach(model, "divprune") as session:
        with pytest.raises(error, match=message):
            session.keep = keep
        session.keep = lambda image: keep
        with pytest.raises(error, match=message):
            model(**inputs(1))
    compress.attach(model, "divprune", keep=0.5).detach()


@pytest.mark.parametrize("reducer", ["divprune", FastV(k=1), KeyNorm()], ids=str)
def test_a_count_above_the_image_says_how_many_it_has(reducer):
    model, _, inputs = tiny_vlm("llava")
    with compress.attach(model, reducer, keep=17), pytest.raises(ValueError, match="this image has 16"):
        model(**inputs(1))


# Refusals ---------------------------------------------------------------------------------------------------


def test_names_and_families_that_are_not_known_are_refused():
    model, *_ = tiny_vlm("llava")
    with pytest.raises(ValueError, match="did you mean divprune"):
        compress.attach(model, "divprun")
    with pytest.raises(TypeError, match="not a reducer"):
        compress.attach(model, 3)
    with pytest.raises(ValueError, match="positions is 'short'"):
        compress.attach(model, "divprune", positions="short")
    with pytest.raises(ValueError, match="no reducer was given"):
        compress.attach(model, [])
    text = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(TypeError, match=r"LlamaForCausalLM .*no vision tower"):
        compress.attach(text, "divprune")
    with pytest.raises(TypeError, match="Linear is not a transformers model"):
        compress.attach(torch.nn.Linear(2, 2), "divprune")
    model, *_ = tiny_vlm("llama4")
    with pytest.raises(TypeError, match="Llama4ForConditionalGeneration: its vision features"):
        compress.attach(model, "divprune")


def test_attaching_twice_is_refused_and_the_first_session_stays():
    model, _, inputs = tiny_vlm("llava")
    with torch.no_grad(), compress.attach(model, "divprune", keep=4) as session:
        with pytest.raises(ValueError, match=r"already has a session with DivPrune; detach it first"):
            compress.attach(model, "fastv")
        model(**inputs(1))
        assert session.report().images[0].layers == [4] * 4
    compress.attach(model, FastV(k=1)).detach()


def test_images_without_placeholders_are_refused():
    model, _, inputs = tiny_vlm("llava")
    inputs = dict(inputs(1))
    inputs["input_ids"] = torch.full_like(inputs["input_ids"], 5)
    with (
        compress.attach(model, "divprune"),
        pytest.raises(ValueError, match="none of the placeholder tokens"),
    ):
        model(**inputs)


def test_features_that_are_not_finite_are_refused_and_nothing_stays_half_set(vlm):
    model, _, inputs = vlm
    inputs = inputs(2)
    with torch.no_grad():
        expected = model(**inputs).logits
        broken = dict(inputs) | {"pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}
        with compress.attach(model, [DivPrune(), FastV(k=1)], keep=0.5) as session:
            good = model(**inputs).logits
            with pytest.raises(ValueError, match="NaN or infinite"):
                model(**broken)
            assert CURRENT.get() is None
            assert torch.equal(model(**inputs).logits, good)
            assert session.report().images
        assert torch.equal(model(**inputs).logits, expected)


def test_an_exception_inside_forward_leaves_nothing_attached_or_half_set():
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = inputs(2)

    def explode(*_: Any) -> None:
        raise KeyboardInterrupt

    layers = TransPrune(
        accumulating_layer_list=(1, 2), pruning_layer_list=(1, 3), image_token_ratio_list=(0.5, 0.2)
    )
    reducers = [DivPrune(), layers]
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(KeyboardInterrupt), compress.attach(model, reducers, keep=0.5):
            handle = model.model.language_model.layers[2].mlp.register_forward_hook(explode)
            try:
                model(**inputs)
            finally:
                handle.remove()
        assert CURRENT.get() is None
        assert torch.equal(model(**inputs).logits, expected)


def test_renumbering_inside_the_layers_is_refused_for_positions_in_planes():
    model, _, inputs = tiny_vlm("qwen2_5_vl")
    with pytest.raises(ValueError, match="several planes"):
        compress.attach(model, FastV(k=1), positions="compact")
    with torch.no_grad(), compress.attach(model, [DivPrune(), FastV(k=1)], positions="paper"):
        model.generate(**inputs(1), max_new_tokens=2)


# Threads, copies, telling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "internvl", "idefics3"])
def test_two_threads_with_one_model_give_the_sequential_results(name):
    model, _, inputs = tiny_vlm(name)
    prompts = [inputs(images=(1,)), inputs(images=(2, 1)), inputs(images=(0, 2)), inputs(images=(1, 1, 1))]

    def run(prompt: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(**prompt, max_new_tokens=4, do_sample=False)

    with compress.attach(model, [DivPrune(), FastV(k=1)], keep=0.5):
        expected = [run(prompt) for prompt in prompts]
        found: list[Any] = [None] * len(prompts)

        def work(i: int) -> None:
            for _ in range(3):
                found[i] = run(prompts[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_shortened_cache_survives_copies_and_pickles_and_guards_its_prompt():
    model, _, inputs = tiny_vlm("llava")
    with torch.no_grad(), compress.attach(model, "divprune", keep=0.25):
        cache = the_cache(model(**inputs(1), use_cache=True))
        length = inputs(1)["input_ids"].shape[1]
        for other in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert other.get_seq_length() == length
            assert other.layers[0].keys.shape[2] == length - 12
        with pytest.raises(NotImplementedError, match="only 7 came after the last image"):
            cache.crop(-8)


def test_the_report_counts_tokens_operations_and_bytes():
    model, _, inputs = tiny_vlm("llava")
    with (
        torch.no_grad(),
        compress.attach(model, [UniformGrid(keep=8), Cut(k=2, keep=4), KeyNorm(keep=2)]) as session,
    ):
        with pytest.raises(RuntimeError, match="no prompt with images"):
            session.report()
        prompt = inputs(1)
        model(**prompt, use_cache=True)
        report = session.report()
    text = prompt["input_ids"].shape[1] - 16
    assert report.images[0].tokens == 16
    assert report.images[0].layers == [8, 8, 4, 4]
    assert report.average_tokens == 6
    assert report.cache_bytes == 2 * 32 * 4 * 4 * (
        text + 2
    )  # keys and values, 2 heads of 16, 4 bytes, 4 layers
    assert report.cache_bytes_full == 2 * 32 * 4 * 4 * (text + 16)
    n = [text + k for k in (8, 8, 4, 4)]
    assert report.flops == sum(2 * (2 * k * 64 * 96 + 2 * k * k * 64 + 3 * k * 64 * 96) for k in n)
    assert 0 < report.flops < report.flops_full
    assert "8, 4 from layer 2" in str(report)
    assert report.to_dict()["images"][0]["average"] == 6


def test_kept_tokens_are_explained_by_their_patches(vlm):
    model, _, inputs = vlm
    with torch.no_grad(), compress.attach(model, UniformGrid(), keep=3) as session:
        model(**inputs(images=(1, 2)))
        explained = session.explain()
        assert [(e.row, e.number) for e in explained] == [(0, 0), (1, 0), (1, 1)]
        for explanation in explained:
            assert len(explanation.tokens) == len(explanation.boxes) == 3
            boxes = explanation.boxes[~explanation.boxes.isnan().any(1)]
            assert len(boxes)
            assert (boxes >= 0).all() and (boxes <= 1).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
        picture = Image.fromarray(np.full((60, 80, 3), 200, dtype=np.uint8))
        drawn = np.asarray(session.overlay(picture, index=1))
        assert drawn.shape == (60, 80, 3)
        assert set(np.unique(drawn)) == {50, 200}
        with pytest.raises(ValueError, match="held 3 images"):
            session.overlay(picture, index=3)


def test_merging_in_the_tower_shortens_the_prompt():
    model, _, inputs = tiny_vlm("llava")
    with torch.no_grad(), compress.attach(model, [ToMe(keep=0.5), DivPrune(keep=5)]) as session:
        model.generate(**inputs(2), max_new_tokens=2)
        assert [image.layers for image in session.report().images] == [[5] * 4] * 2
    with torch.no_grad(), compress.attach(model, ToMe(keep=0.5)) as session:
        model.generate(**inputs(2), max_new_tokens=2)
        assert [image.layers for image in session.report().images] == [[8] * 4] * 2


@pytest.mark.parametrize("stages", STAGES)
def test_half_precision_models(vlm, stages):
    model, _, inputs = vlm
    model.to(torch.bfloat16)
    inputs = inputs(images=(2, 1, 0)).to(torch.bfloat16)
    before = outputs(model, inputs)
    with compress.attach(model, STAGES[stages], keep=0.5) as session:
        during = outputs(model, inputs, num_beams=2)
        assert during[0].dtype == torch.bfloat16
        assert torch.isfinite(during[0]).all()
        session.keep = 1.0
        everything = outputs(model, inputs)
    assert torch.equal(everything[0], before[0])
    assert torch.equal(everything[1], before[1])


def test_a_session_keeps_no_cache_or_features_alive():
    model, _, inputs = tiny_vlm("qwen3_vl")
    with torch.no_grad(), compress.attach(model, [Random(), Cut(k=1), KeyNorm()], keep=0.5) as session:
        out = model(**inputs(2), use_cache=True)
        keys = weakref.ref(the_cache(out).layers[0].keys)
        before = str(session.report())
        del out
        gc.collect()
        assert keys() is None
        assert str(session.report()) == before and len(session.explain()) == 2
        largest = max((t.numel() for t in _tensors(session)), default=0)
        assert largest <= 2 * inputs(2)["input_ids"].numel()


def _tensors(session: compress.Session) -> list[torch.Tensor]:
    found, seen, todo = [], {id(session.host)}, [session._hooks.last]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return found


# Around a session -------------------------------------------------------------------------------------------


def test_a_forgotten_session_does_not_keep_its_model():
    model = tiny_vlm("llava")[0]
    compress.attach(model, "divprune")
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_is_the_same_however_it_is_given():
    model, *_ = tiny_vlm("llava")

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def get_base_model(self):
            return self.inner

    with compress.attach(Wrapper(), "divprune"):
        for other in (model, model.model, Wrapper()):
            with pytest.raises(ValueError, match="already has a session"):
                compress.attach(other, "fastv")
    compress.attach(model.model, "divprune").detach()


@pytest.mark.parametrize(
    "reducer",
    [
        FastV(k=1),
        TransPrune(
            accumulating_layer_list=(1,), pruning_layer_list=(1, 2), image_token_ratio_list=(0.5, 0.2)
        ),
        "hired",
        "divprune",
    ],
    ids=str,
)
def test_autocast_changes_no_scores_to_half_precision(reducer):
    model, _, inputs = tiny_vlm("llava")
    with torch.no_grad(), compress.attach(model, reducer, keep=0.5) as session:
        session.trace = {}
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**inputs(2))
    assert torch.isfinite(out.logits).all()
    assert all(
        value.dtype == torch.float32 for name, v in session.trace.items() if "score" in name for value in v
    )


def test_features_made_past_the_session_are_not_silently_left_whole():
    model, _, inputs = tiny_vlm("llava")
    with compress.attach(model, "divprune", keep=0.5):
        del vars(model.model)["get_image_features"]
        with pytest.raises(RuntimeError, match="made no image features through get_image_features"):
            model(**inputs(1))


def test_a_users_own_feature_function_comes_back():
    model, _, inputs = tiny_vlm("llava")
    stock, calls = model.model.get_image_features, []

    def counted(pixel_values, **kwargs):
        calls.append(1)
        return stock(pixel_values, **kwargs)

    model.model.get_image_features = counted
    with torch.no_grad(), compress.attach(model, "divprune", keep=0.5):
        model(**inputs(1))
    assert model.model.get_image_features is counted
    assert calls == [1]


def test_changing_the_attention_while_attached_is_said_and_kept():
    model, _, inputs = tiny_vlm("llava")
    with torch.no_grad(), compress.attach(model, FastV(k=1)):
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="implementation was changed"):
            model(**inputs(1))
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "eager"


def test_a_model_may_run_inside_another():
    outer, _, inputs = tiny_vlm("llava")
    inner, _, other = tiny_vlm("internvl")
    with torch.no_grad(), compress.attach(outer, [DivPrune(), FastV(k=1)], keep=0.5):
        expected = outer(**inputs(2)).logits
        with compress.attach(inner, [DivPrune(), FastV(k=1)], keep=0.5):
            alone = inner(**other(2)).logits
            nested = []
            handle = outer.model.language_model.layers[0].register_forward_pre_hook(
                lambda *_: nested.append(inner(**other(2)).logits)
            )
            found = outer(**inputs(2)).logits
            handle.remove()
    assert torch.equal(found, expected)
    assert torch.equal(nested[0], alone)
    assert CURRENT.get() is None


def test_copies_of_attached_models_are_refused():
    model, *_ = tiny_vlm("llava")
    with compress.attach(model, "divprune"), pytest.raises(TypeError, match="detach, copy, and attach again"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_functions_of_the_image_see_its_tokens_at_every_stage():
    model, _, inputs = tiny_vlm("llava")
    seen: dict[str, list[float]] = {}
    for stage, reducer in (("features", UniformGrid()), ("layer", Cut(k=1)), ("cache", KeyNorm())):

        def keep(image, stage=stage):
            seen.setdefault(stage, []).append(float(image.features.abs().sum()))
            return 0.5

        with torch.no_grad(), compress.attach(model, reducer, keep=keep):
            model(**inputs(1), use_cache=True)
    assert seen["layer"] == seen["cache"] == seen["features"] and len(seen["features"]) == 1


@pytest.mark.parametrize(
    "reducer",
    [
        FastV(k=1, r=1.0),
        FastV(k=1, r=2.0),
        compress.PyramidDrop(layer_list=(1, 2), image_token_ratio_list=(0.25, 0.5)),
        compress.PyramidDrop(layer_list=(2, 1), image_token_ratio_list=(0.5, 0.25)),
        compress.PyramidDrop(layer_list=(1, 2), image_token_ratio_list=(0.5, 0.0)),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_met_are_refused(reducer):
    model, *_ = tiny_vlm("llava")
    with pytest.raises(ValueError, match="layers must ascend, and shares fall"):
        compress.attach(model, reducer)


def test_reading_a_towers_attention_and_merging_in_it_exclude_each_other():
    model, *_ = tiny_vlm("llava")
    with pytest.raises(ValueError, match="HiRED reads the tower's attention"):
        compress.attach(model, [ToMe(r=1), "hired"])


def test_sliding_windows_count_the_tokens_that_are_left():
    model, _, inputs = tiny_vlm("gemma3", seed=2)
    inputs = inputs(1)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    rest = {k: v for k, v in inputs.items() if k.startswith("pixel")}
    types = inputs["token_type_ids"]
    with torch.no_grad(), compress.attach(model, Cut(k=1), keep=0.5):
        whole = model(input_ids=ids, token_type_ids=types, **rest).logits[:, -1]
        out = model(input_ids=ids[:, :-1], token_type_ids=types[:, :-1], use_cache=True, **rest)
        position = torch.tensor([[length - 1]])
        step = model(input_ids=ids[:, -1:], **going_on(model, the_cache(out)), position_ids=position)
    assert torch.allclose(step.logits[:, -1], whole, atol=1e-5)


@pytest.mark.parametrize("reducer", [DivPrune(), FastV(k=1), ToMe()], ids=str)
def test_attached_models_are_not_saved_and_other_things_are_not_attached(reducer, tmp_path):
    model, processor, _ = tiny_vlm("llava")
    with compress.attach(model, reducer, keep=0.5):
        for save in (lambda: torch.save(model, tmp_path / "model.pt"), lambda: pickle.dumps(model)):
            with pytest.raises(TypeError, match=r"cannot be pickled or saved whole: detach first, or save"):
                save()
        torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(TypeError, match=r"compiled LlavaForConditionalGeneration.*attach to the model first"):
        compress.attach(torch.compile(model), reducer)
    pipeline = hf.pipeline("image-text-to-text", model=model, processor=processor)
    with pytest.raises(TypeError, match=r"ImageTextToTextPipeline; give .*its \.model, a LlavaForCond"):
        compress.attach(pipeline, reducer)
