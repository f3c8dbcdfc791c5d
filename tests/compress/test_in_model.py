"""What is special to the methods that drop tokens between the layers: FastV, PyramidDrop, TransPrune.

What every such method must satisfy on every model is in `test_attach.py`, their published numbers in
`test_verify.py`.
"""

import copy
from functools import partial

import pytest
import torch
import transformers
from oracles import real_tokens, visual_tokens
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress.methods.fastv import FastV
from vistok.compress.methods.pyramiddrop import PyramidDrop
from vistok.compress.methods.transprune import TransPrune

TRANSPRUNE = partial(
    TransPrune,
    accumulating_layer_list=(1, 2, 3),
    pruning_layer_list=(1, 2, 3),
    image_token_ratio_list=(0.875, 0.625, 0.25),
)
METHODS = {
    "fastv": partial(FastV, k=2),
    "pyramiddrop": partial(PyramidDrop, layer_list=(1, 2, 3)),
    "transprune": TRANSPRUNE,
}
EVERY = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@torch.no_grad()
def prefill(model, inputs, reducer, **options):
    """Logits, the trace, and the kept tokens of every image in the last layer."""
    with compress.attach(model, reducer, **options) as session:
        session.trace = {}
        logits = model(**inputs).logits
        return logits, session.trace, [found.tokens for found in session.explain()]


@torch.no_grad()
def counts(model, inputs, reducer, **options):
    """How many tokens of the first image each layer reads."""
    with compress.attach(model, reducer, **options) as session:
        model(**inputs)
        return [len(session.explain(layer)[0].tokens) for layer in range(4)]


def eager_maps(model, inputs):
    """Head-mean attention maps [B, L, L] of the model as it is, a layer each."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [attention.mean(1) for attention in maps]


# What the scores are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "layer", "cut"),
    [(FastV(k=2), 1, 2), (FastV(k=3), 2, 3), (PyramidDrop(layer_list=(1, 2, 3)), 1, 1)],
    ids=["fastv2", "fastv3", "pyramiddrop"],
)
def test_the_score_is_the_last_row_of_the_map_fastv_in_the_layer_before_and_pyramiddrop_in_the_next(
    reducer, layer, cut
):
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=2)
    rows = eager_maps(model, inputs)[layer][:, -1]
    _, trace, _ = prefill(model, inputs, reducer)
    for row, score in enumerate(trace[f"score.{cut}"]):
        expected = rows[row, visual_tokens(model, inputs)[row]]
        torch.testing.assert_close(score, expected, atol=1e-6, rtol=1e-4)


def test_transprune_reads_the_mean_row_of_the_instruction_in_the_next_layer():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=2)
    attention, visual = eager_maps(model, inputs)[1], visual_tokens(model, inputs)
    _, trace, _ = prefill(model, inputs, TRANSPRUNE())
    for row, found in enumerate(trace["iga_raw.1"]):
        end = int(visual[row].nonzero().max())
        expected = attention[row, end + 1 :].mean(0)[visual[row]]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_transprune_sums_the_transitions_of_the_finished_layers():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=1)
    visual = visual_tokens(model, inputs)[0]
    _, trace, _ = prefill(model, inputs, TRANSPRUNE())
    first = (trace["attention.0"][0] + trace["mlp.0"][0])[0]
    torch.testing.assert_close(trace["acc_raw.1"][0], first[visual])
    kept = trace["kept.1"][0]
    second = (trace["attention.1"][0] + trace["mlp.1"][0])[0]
    start = int(visual.nonzero().min())
    expected = first[visual][kept] + second[start : start + len(kept)]
    torch.testing.assert_close(trace["acc_raw.2"][0], expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_weighs_transition_against_attention(alpha):
    model, _, inputs = tiny_vlm("llava")
    _, trace, _ = prefill(model, inputs(batch=1), TRANSPRUNE(alpha=alpha))
    part = "acc" if alpha else "iga"
    torch.testing.assert_close(trace["score.1"][0], 2 * trace[f"{part}.1"][0])


# The variants of TransPrune ---------------------------------------------------------------------------------


def test_only_the_released_code_of_transprune_weighs_text_against_image_tokens():
    random = torch.Generator().manual_seed(0)
    states = torch.randn(2, 1, 12, 8, generator=random)
    other = states.clone()
    other[:, :, 8:] = torch.randn(2, 1, 4, 8, generator=random)  # another text
    valid = torch.ones(1, 12, dtype=torch.bool)
    visual = torch.arange(12)[None] < 8

    def transitions(variant, pair):
        return TransPrune(variant=variant).measure("mlp", *pair, valid, visual)

    assert not transitions("paper", states)[~visual].any()
    assert transitions("code", states)[~visual].all()
    assert torch.equal(transitions("paper", states)[visual], transitions("paper", other)[visual])
    assert not torch.equal(transitions("code", states)[visual], transitions("code", other)[visual])


def test_a_reversed_token_has_turned_in_the_code_of_transprune_and_not_in_its_paper():
    inputs = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    outputs = inputs.clone()
    outputs[:, 2] *= -1
    real = torch.ones(1, 6, dtype=torch.bool)
    paper = TransPrune(variant="paper").measure("mlp", inputs, outputs, real, real)
    code = TransPrune(variant="code").measure("mlp", inputs, outputs, real, real)
    torch.testing.assert_close(paper, torch.full((1, 6), 1 / 6))
    assert code[0, 2] > 5 * code[0, 1]


def test_the_variants_of_transprune_score_differently():
    model, _, inputs = tiny_vlm("llava")
    traces = [prefill(model, inputs(batch=1), TRANSPRUNE(variant=v))[1] for v in ("code", "paper")]
    assert not torch.allclose(traces[0]["score.1"][0], traces[1]["score.1"][0], rtol=1e-3)
    text = ~visual_tokens(model, inputs(batch=1))
    assert traces[0]["attention.0"][0][text].all()
    assert not traces[1]["attention.0"][0][text].any()


def test_padding_takes_no_part_in_transitions():
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=2)
    padding = ~real_tokens(inputs)
    assert padding.any()
    _, trace, _ = prefill(model, inputs, TRANSPRUNE())
    assert not trace["mlp.0"][0][padding].any()


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_without_an_instruction_the_last_row_stands_in(variant):
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=1)
    end = int(visual_tokens(model, inputs)[0].nonzero().max()) + 1
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :end]
    logits, trace, (kept,) = prefill(model, inputs, TRANSPRUNE(variant=variant))
    assert all(value.isfinite().all() for values in trace.values() for value in values)
    assert logits.isfinite().all()
    assert len(kept) == 4
    assert kept[-1] == 15  # its output predicts the next token
    _, pyramid, _ = prefill(model, inputs, PyramidDrop(layer_list=(1, 2, 3)))
    torch.testing.assert_close(trace["iga_raw.1"][0], pyramid["score.1"][0])


# Heads and batches ------------------------------------------------------------------------------------------


@EVERY
def test_grouped_key_heads_are_the_same_as_repeated_ones(make):
    grouped, _, inputs = tiny_vlm("llava")
    config = copy.deepcopy(grouped.config)
    heads = config.text_config.num_attention_heads
    groups = heads // config.text_config.num_key_value_heads
    assert groups == 2
    config.text_config.num_key_value_heads = heads
    repeated = transformers.LlavaForConditionalGeneration(config).eval()
    state = grouped.state_dict()
    for key in [k for k in state if "language_model" in k and ("k_proj" in k or "v_proj" in k)]:
        by_head = state[key].unflatten(0, (heads // groups, -1))
        state[key] = by_head.repeat_interleave(groups, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    found = []
    for model in (grouped, repeated):
        with compress.attach(model, make(), positions="paper") as session:
            out = model.generate(
                **inputs(batch=2),
                max_new_tokens=4,
                do_sample=False,
                suppress_tokens=[config.image_token_id],
                output_logits=True,
                return_dict_in_generate=True,
            )
            found.append((out, [image.tokens for image in session.explain()]))
    (ours, kept), (expected, expected_kept) = found
    assert all(map(torch.equal, kept, expected_kept))
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@EVERY
@pytest.mark.parametrize("positions", ["keep", "paper"])
def test_left_padded_prompts_select_what_each_selects_alone(make, positions):
    model, _, inputs = tiny_vlm("llava")
    batch = inputs(batch=2)
    assert (~real_tokens(batch)).any()
    logits, trace, kept = prefill(model, batch, make(), positions=positions)
    last = max(int(name.split(".")[1]) for name in trace if name.startswith("score"))
    for row in range(2):
        alone, trace_alone, (kept_alone,) = prefill(
            model, inputs(images=(1, 1), rows=(row,)), make(), positions=positions
        )
        assert torch.equal(kept[row], kept_alone)
        score, score_alone = trace[f"score.{last}"][row], trace_alone[f"score.{last}"][0]
        torch.testing.assert_close(score, score_alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[row, -1], alone[0, -1], atol=1e-4, rtol=1e-4)


# Budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8125])
def test_fastv_drops_what_it_does_not_keep(keep):
    model, _, inputs = tiny_vlm("llava")
    inputs = inputs(batch=2)
    by_keep, _, kept = prefill(model, inputs, FastV(k=1), keep=keep)
    by_r, _, kept_by_r = prefill(model, inputs, FastV(k=1, r=1 - keep))
    own, _, _ = prefill(model, inputs, FastV(k=1, keep=keep))
    assert torch.equal(by_keep, by_r)
    assert torch.equal(by_keep, own)
    assert all(map(torch.equal, kept, kept_by_r))
    assert [len(tokens) for tokens in kept] == [round(16 * keep)] * 2


def test_pyramiddrop_halves_three_times():
    model, _, inputs = tiny_vlm("llava")
    assert counts(model, inputs(batch=1), PyramidDrop(layer_list=(1, 2, 3))) == [16, 8, 4, 2]


def test_transprune_keeps_the_floor_of_its_shares_of_the_whole_image():
    model, _, inputs = tiny_vlm("llava")
    reducer = TRANSPRUNE(image_token_ratio_list=(0.9, 0.6, 0.1))
    assert counts(model, inputs(batch=1), reducer) == [16, 14, 9, 1]


def test_published_schedules_fit_shallow_models_at_the_same_relative_depths():
    assert PyramidDrop().fitted(32) == PyramidDrop() and TransPrune().fitted(13) == TransPrune()
    assert PyramidDrop().fitted(16).layer_list == (4, 8, 12)
    assert PyramidDrop().fitted(4).layer_list == (1, 2, 3)
    fitted = TransPrune().fitted(6)
    assert (fitted.pruning_layer_list, fitted.accumulating_layer_list) == ((1, 2, 3), (1, 2, 3))
    with pytest.raises(ValueError, match="3 cuts do not fit a model of 3 layers"):
        PyramidDrop().fitted(3)


@pytest.mark.parametrize("keep", [0.03, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("make", [PyramidDrop, TransPrune], ids=["pyramiddrop", "transprune"])
def test_keep_sets_the_last_share_and_scales_the_others(make, keep):
    reducer = make()
    own = list(reducer.schedule(32, None, 576).values())
    shares = list(reducer.schedule(32, keep, 576).values())
    assert own == list(reducer.image_token_ratio_list)
    assert shares[-1] == keep
    assert shares == sorted(shares, reverse=True)
    compare = {0.03: float.__lt__, 0.125: float.__eq__, 0.5: float.__gt__, 1.0: float.__gt__}[keep]
    assert all(map(compare, shares, own))
    if keep == 1:
        assert shares == [1, 1, 1]


@EVERY
@pytest.mark.parametrize("keep", [1, 3, 11, 16])
def test_a_count_is_met_exactly_at_the_last_cut(make, keep):
    model, _, inputs = tiny_vlm("llava")
    layers = counts(model, inputs(batch=1), make(), keep=keep)
    assert layers[-1] == keep
    assert layers == sorted(layers, reverse=True)


# What cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reducer", "layer"),
    [
        (PyramidDrop(), 8),
        (TransPrune(), 7),
        (FastV(k=4), 4),
        (PyramidDrop(layer_list=(1, 2, 4)), 4),
        (FastV(k=-1), -1),
    ],
    ids=["pyramiddrop", "transprune", "fastv", "last_of_pyramiddrop", "negative"],
)
def test_a_cut_beyond_the_model_is_refused_and_nothing_stays_attached(reducer, layer):
    model, _, inputs = tiny_vlm("llava")
    with pytest.raises(ValueError, match=rf"before layers \[{layer}\b.*4 layers"):
        compress.attach(model, reducer)
    with compress.attach(model, FastV(k=1)):
        model(**inputs(batch=1))


def test_fastv_has_no_layer_to_read_before_the_first():
    model, _, _ = tiny_vlm("llava")
    with pytest.raises(ValueError, match="cannot drop before layer 0"):
        compress.attach(model, FastV(k=0))


def test_pyramiddrop_can_drop_before_the_first_layer():
    model, _, inputs = tiny_vlm("llava")
    reducer = PyramidDrop(layer_list=(0, 2), image_token_ratio_list=(0.5, 0.25))
    assert counts(model, inputs(batch=1), reducer) == [8, 8, 4, 4]


@pytest.mark.parametrize(
    "make",
    [partial(PyramidDrop, layer_list=(8, 16)), partial(TransPrune, pruning_layer_list=(7, 9))],
    ids=["pyramiddrop", "transprune"],
)
def test_lists_of_unequal_length_are_refused(make):
    with pytest.raises(ValueError, match="2 layers and image_token_ratio_list 3 shares"):
        make()
