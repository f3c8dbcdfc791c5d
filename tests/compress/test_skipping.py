"""Leaving out layers for tokens that stay: IMA.

The published modes are compared with recorded outputs in `test_verify.py`; what holds for every reducer is in
`test_attach.py`.
"""

import copy
from contextlib import ExitStack, contextmanager

import pytest
import torch
import transformers as hf
from oracles import checkpoint_layers, decoder, going_on, real_tokens, the_cache, visual_tokens
from reducer_matrix import fingerprint, hidden_columns, placeholders, whole
from tiny_vlms import FIXTURES, tiny_vlm
from torch.utils.flop_counter import FlopCounterMode

from vistok import compress
from vistok.compress import IMA, DivPrune, FastV, KeyNorm
from vistok.compress.report.accounting import llm_block_macs

MODES = [
    f"{calls}{what}{prompt}"
    for calls in ("", "context_", "onlycontext_")
    for what in ("skip_block", "skip_ffn", "skip_attn", "parrallel_attn", "parrallel_block")
    for prompt in ("", "_prompt")
    if not prompt or (calls and what.startswith("skip"))
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def llava():
    model, _, inputs = tiny_vlm("llava", seed=4)
    return model, inputs


def ima(mode, **settings):
    pairs = {"block_pairs": (0, 2)} if "parrallel_block" in mode else {}
    return IMA(skip_mode=mode, **pairs, **settings)


def wide_llava(seed=4):
    """A LLaVA whose keys are as wide as its hidden states."""
    model, _, inputs = tiny_vlm("llava", seed=seed)
    config = copy.deepcopy(model.config)
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads
    wide = hf.LlavaForConditionalGeneration(config).eval()
    state = model.state_dict()
    for key in [k for k in state if "language_model" in k and ("k_proj" in k or "v_proj" in k)]:
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(len(key)))
        state[key] = 1.5 * noise / 8
    wide.load_state_dict(state)
    return wide, inputs


def generated(model, inputs, steps=4, **more):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=placeholders(model),
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


@contextmanager
def parts_left_out(model, inputs, layers, what):
    """Stock layers whose attention or MLP adds nothing to visual tokens, in the prompt's forward."""
    visual = visual_tokens(model, inputs)

    def silence(module, args, output):
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if hidden.shape[1] != visual.shape[1]:
            return None
        frozen = visual.repeat_interleave(len(hidden) // len(visual), 0)[..., None]
        hidden = hidden.masked_fill(frozen, 0)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for i in layers:
            layer = decoder(model).layers[i]
            for part in {"block": ("self_attn", "mlp"), "ffn": ("mlp",), "attn": ("self_attn",)}[what]:
                stack.enter_context(getattr(layer, part).register_forward_hook(silence))
        yield


# An image's tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [(1,), (2, 1, 0)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("what", ["block", "ffn", "attn"])
def test_what_is_left_out_adds_nothing(what, attention, images):
    model, _, inputs = tiny_vlm("llava", attention, seed=4)
    inputs = inputs(images=images)
    with compress.attach(model, IMA(skip_mode=f"context_skip_{what}_prompt", skip_interval=1, start_layer=0)):
        logits, out = model(**inputs).logits, generated(model, inputs)
    with parts_left_out(model, inputs, (1, 2, 3), what):
        expected_logits, expected = model(**inputs).logits, generated(model, inputs)
    real = real_tokens(inputs)
    torch.testing.assert_close(logits[real], expected_logits[real], atol=3e-5, rtol=0)
    assert torch.equal(out.sequences, expected.sequences)
    for step, reference in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, reference, atol=3e-5, rtol=0)
    for i in range(4):
        ours, theirs = (the_cache(each).layers[i] for each in (out, expected))
        torch.testing.assert_close(ours.keys, theirs.keys, atol=3e-5, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=3e-5, rtol=0)


def operations(model, inputs):
    """Floating-point operations that one forward runs, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("context")])
def test_what_is_left_out_is_not_computed_and_the_report_counts_it(mode):
    model, inputs = wide_llava()
    model.set_attn_implementation("eager")  # of which torch counts the products
    inputs = inputs(batch=1)
    stock = operations(model, inputs)
    with compress.attach(model, ima(mode)) as session:
        left = operations(model, inputs)
        report = session.report()
    assert stock - left == report.flops_full - report.flops
    assert (left < stock) == ("skip" in mode or "block" in mode)
    assert report.images[0].layers == [16] * 4


def test_grouped_keys_and_padding_are_counted(llava):
    model, inputs = llava
    inputs = inputs(batch=2)
    with compress.attach(model, IMA()) as session:
        model(**inputs)
        report = session.report()
    config, saved, full = decoder(model).config, 0, 0
    d, m = config.hidden_size, config.intermediate_size
    for length in real_tokens(inputs).sum(1).tolist():
        saved += 2 * 16 * d * d + 2 * 16 * length * d + 3 * 16 * d * m  # in layer 2
        full += 4 * llm_block_macs(length, d, m, d // 2)
    assert (report.flops_full, report.flops) == (2 * full, 2 * (full - saved))


@pytest.mark.parametrize(
    ("keep", "layers"), [(0.75, [1]), (0.5, [1, 3]), (0.01, [1, 2, 3]), (8, [1, 3]), (16, []), (1.0, [])]
)
def test_a_budget_is_the_share_of_layers_that_compute_an_image(llava, keep, layers):
    model, inputs = llava
    inputs = inputs(batch=2)
    with compress.attach(model, IMA(), keep=keep):
        logits = model(**inputs).logits
    with parts_left_out(model, inputs, layers, "block"):
        expected = model(**inputs).logits
    real = real_tokens(inputs)
    torch.testing.assert_close(logits[real], expected[real], atol=3e-5, rtol=0)


def test_every_image_of_a_prompt_has_its_own_budget(llava):
    model, inputs = llava
    inputs = inputs(images=(2,))
    visual = visual_tokens(model, inputs)[0].nonzero()[:, 0]
    with compress.attach(model, IMA(), keep=lambda image: (0.75, 0.25)[image.number]):
        logits = model(**inputs).logits[0]

    def freeze(places):
        def hook(module, args, output):
            output = output.clone()
            output[:, places] = args[0][:, places]
            return output

        return hook

    frozen = {1: visual, 2: visual[16:], 3: visual[16:]}
    handles = [decoder(model).layers[i].register_forward_hook(freeze(p)) for i, p in frozen.items()]
    expected = model(**inputs).logits[0]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=0)


def test_the_last_token_of_a_prompt_is_computed_even_if_it_is_visual(llava):
    model, inputs = llava
    inputs = inputs(batch=1)
    end = int(visual_tokens(model, inputs)[0].nonzero().max()) + 1
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :end]
    stock = model(**inputs).logits
    with compress.attach(model, IMA(skip_interval=1)):
        logits = model(**inputs).logits

    def freeze(module, args, output):
        output = output.clone()
        output[:, end - 16 : end - 1] = args[0][:, end - 16 : end - 1]
        return output

    handles = [layer.register_forward_hook(freeze) for layer in decoder(model).layers[1:]]
    expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits[0, -1], expected[0, -1], atol=3e-5, rtol=0)
    assert not torch.allclose(logits[0, -1], stock[0, -1], atol=1e-3)


# All tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["normal", *MODES])
def test_nothing_changes_at_keep_1_and_after_detaching(mode):
    model, inputs = wide_llava()
    inputs = inputs(images=(2, 1, 0))
    before, hooks = generated(model, inputs), fingerprint(model)
    with compress.attach(model, ima(mode), keep=1.0):
        during = generated(model, inputs)
    with compress.attach(model, ima(mode)) as session:
        generated(model, inputs)
        assert all(image.layers == [image.tokens] * 4 for image in session.report().images)
    after = generated(model, inputs)
    for out in (during, after):
        assert torch.equal(out.sequences, before.sequences)
        assert all(map(torch.equal, out.logits, before.logits))
    assert fingerprint(model) == hooks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_a_batch_are_as_each_alone(mode, beams):
    model, inputs = wide_llava()
    batch, more = inputs(images=(2, 1)), {"num_beams": beams}
    lengths = real_tokens(batch).sum(1)
    assert lengths[0] != lengths[1]
    with compress.attach(model, ima(mode)):
        together = generated(model, batch, **more)
        cache = the_cache(together)
        for row in range(2):
            alone = generated(model, inputs(images=(2, 1), rows=(row,)), **more)
            assert torch.equal(together.sequences[row, -4:], alone.sequences[0, -4:])
    assert {layer.keys.shape[2] for layer in cache.layers} == {batch["input_ids"].shape[1] + 3}


@pytest.mark.parametrize(
    "mode", [mode for mode in MODES if mode.startswith("context") and "parrallel_block" not in mode]
)
def test_steps_on_a_cache_are_those_without_one(mode):
    model, inputs = wide_llava()
    inputs = inputs(batch=2)
    with compress.attach(model, ima(mode)):
        cached, whole_again = generated(model, inputs), generated(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, whole_again.sequences)
    for step, reference in zip(cached.logits, whole_again.logits, strict=True):
        torch.testing.assert_close(step, reference, atol=3e-5, rtol=1e-4)


def test_text_that_follows_on_a_cache_is_treated_as_the_prompt_was():
    model, inputs = wide_llava()
    inputs, more = inputs(batch=1), torch.tensor([[30, 41, 52]])
    ids = torch.cat([inputs["input_ids"], more], 1)
    with compress.attach(model, ima("context_skip_ffn")):
        at_once = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        cache = the_cache(model(**inputs, use_cache=True))
        later = model(input_ids=more, **going_on(model, cache)).logits
    torch.testing.assert_close(later[0], at_once[0, -3:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["skip_block", "skip_ffn", "skip_attn", "parrallel_attn", "parrallel_block"])
def test_plain_modes_leave_the_prompt_alone_and_act_on_steps(mode):
    model, inputs = wide_llava()
    inputs = inputs(batch=2)
    stock = generated(model, inputs)
    with compress.attach(model, ima(mode)):
        out = generated(model, inputs)
    assert torch.equal(out.logits[0], stock.logits[0])
    assert not torch.allclose(out.logits[1], stock.logits[1], atol=1e-3)


def test_a_block_that_is_left_out_holds_the_cache_of_the_one_before():
    model, inputs = wide_llava()
    inputs = inputs(batch=1)
    with compress.attach(model, ima("onlycontext_skip_block")):
        cache = the_cache(model(**inputs, use_cache=True))
        layers = cache.layers
        assert torch.equal(layers[2].keys, layers[1].keys) and torch.equal(layers[2].values, layers[1].values)
        assert layers[2].keys.data_ptr() != layers[1].keys.data_ptr()
        model(input_ids=torch.tensor([[30]]), **going_on(model, cache))
        assert not torch.equal(layers[2].keys[:, :, -1], layers[1].keys[:, :, -1])


def test_a_prompt_without_pictures_passes_through():
    model, inputs = wide_llava()
    inputs = inputs(images=(0, 0))
    stock = generated(model, inputs)
    with compress.attach(model, ima("context_skip_block")):
        out = generated(model, inputs)
    assert all(map(torch.equal, out.logits, stock.logits))


def test_a_treated_cache_cannot_be_continued_after_detaching():
    model, inputs = wide_llava()
    with compress.attach(model, ima("skip_ffn")):
        cache = the_cache(model(**inputs(batch=1), use_cache=True))
    with pytest.raises(RuntimeError, match="has been detached since"):
        model(input_ids=torch.tensor([[30]]), **going_on(model, cache))


def test_an_interval_for_each_part_of_the_depth():
    reducer = IMA(skip_mode="context_skip_ffn", skip_interval=(4, 1, 3), start_layer=2, end_layer=11)
    assert list(reducer.skips(12, None)) == [4, 5, 6, 7, 9]
    assert list(IMA().skips(32, None)) == list(range(2, 31, 2))
    assert list(IMA(skip_mode="context_parrallel_block", block_pairs=4).skips(10, None)) == [0, 4, 8]


@pytest.mark.parametrize("mode", ["context_skip_ffn_prompt", "skip_ffn_prompt"])
def test_leading_tokens_get_the_input_of_the_mlp(mode):
    """As the code has it: the first tokens of the prompt and the token of every step."""
    model, inputs = wide_llava()
    inputs = inputs(batch=1)

    def quirk(module, args, output):
        length = args[0].shape[1]
        if length > 1 and not mode.startswith("context"):
            return None
        output = output.clone()
        output[:, :5] = args[0][:, :5]
        return output

    with compress.attach(model, IMA(skip_mode=mode, prompt_len=5)):
        out = generated(model, inputs)
    handle = decoder(model).layers[2].mlp.register_forward_hook(quirk)
    expected = generated(model, inputs)
    handle.remove()
    for step, reference in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, reference, atol=3e-5, rtol=0)


# Beside other reducers --------------------------------------------------------------------------------------


def test_layers_are_left_out_for_what_fastv_keeps(llava):
    model, inputs = llava
    inputs = inputs(images=(2, 1))
    visual = visual_tokens(model, inputs)
    with compress.attach(model, [FastV(k=1, keep=0.5), IMA()]) as session:
        out = generated(model, inputs)
        kept = visual.new_zeros(visual.shape)
        for image in session.explain():
            places = visual[image.row].nonzero()[:, 0][16 * image.number :]
            kept[image.row, places[image.tokens]] = True
    dropped = visual & ~kept
    with hidden_columns(model, [None, *[dropped] * 3], False), parts_left_out(model, inputs, (2,), "block"):
        expected = generated(model, inputs)
    assert torch.equal(out.sequences, expected.sequences)
    for step, reference in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, reference, atol=3e-5, rtol=0)


@pytest.mark.parametrize("other", [DivPrune(keep=0.5), KeyNorm(keep=0.5)], ids=["features", "cache"])
def test_tokens_dropped_elsewhere_stay_dropped(llava, other):
    model, inputs = llava
    with compress.attach(model, [other, IMA()]) as session:
        out = generated(model, inputs(images=(2, 1)))
        assert all(len(image.tokens) == 8 for image in session.explain(cache=True))
    assert all(step.isfinite().all() for step in out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_on_every_model(name):
    model, _, inputs = tiny_vlm(name)
    whole(model, inputs(images=(2, 1, 0)), IMA())


# What cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_mode": "skip_all"}, "skip_mode is 'skip_all'; it takes normal, or skip_block"),
        ({"skip_mode": "context_parrallel_attn_prompt"}, "it takes normal, or skip_block"),
        ({"skip_mode": "skip_ffn_prompt"}, "where no image's tokens are; put context_ in front"),
        ({"skip_interval": 0}, "skip_interval is 0; it takes a number of layers from 1"),
        ({"skip_interval": ()}, r"skip_interval is \(\)"),
        ({"skip_mode": "parrallel_block"}, "takes the first layers of its pairs"),
        ({"block_pairs": 4}, "other modes take none"),
        ({"skip_mode": "parrallel_block", "block_pairs": (0, 1)}, "two or more apart"),
        ({"skip_mode": "parrallel_block", "block_pairs": 1}, "two or more apart"),
        ({"prompt_len": 10}, "for skip_ffn_prompt alone"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IMA(**settings)


def test_models_that_cannot_leave_out_a_part_are_refused(llava):
    model, inputs = llava
    with pytest.raises(TypeError, match=r"must be as wide as hidden states \(64\)"):
        compress.attach(model, ima("context_skip_attn"))
    with pytest.raises(ValueError, match=r"needs its neighbour 4, but .* has layers 0 to 3"):
        compress.attach(model, IMA(skip_mode="parrallel_block", block_pairs=(3,)))
    with pytest.raises(ValueError, match="attach it alone"):
        compress.attach(model, [ima("context_skip_ffn"), FastV(k=1)])
    with pytest.raises(ValueError, match="attach it alone"):
        compress.attach(model, [ima("context_skip_ffn"), KeyNorm()])
    with (
        compress.attach(model, ima("context_skip_ffn"), keep=0.5),
        pytest.raises(ValueError, match=r"takes no budget but 1\.0"),
    ):
        model(**inputs(batch=1))
    with (
        compress.attach(model, ima("context_skip_ffn"), keep=lambda image: (1.0, None)[image.number]),
        pytest.raises(TypeError, match="keep is None"),
    ):
        model(**inputs(images=(2,)))
    sliding, _, _ = tiny_vlm("gemma3")
    with pytest.raises(ValueError, match="which needs full attention in both"):
        compress.attach(sliding, ima("context_skip_block"))
    model(**inputs(batch=1))


def test_layers_that_are_computed_again_are_refused(llava):
    model, inputs = llava
    model.train()
    checkpoint_layers(model, True)
    refused = pytest.raises(NotImplementedError, match="turn gradient checkpointing off")
    with torch.enable_grad(), compress.attach(model, IMA()), refused:
        model(**inputs(batch=1))


def test_gradients_are_those_of_frozen_layers(llava):
    model, inputs = llava
    inputs, gradients = inputs(batch=2), []
    parameter = decoder(model).layers[0].mlp.up_proj.weight
    for context in (compress.attach(model, IMA()), parts_left_out(model, inputs, (2,), "block")):
        model.zero_grad()
        with torch.enable_grad(), context:
            model(**inputs).logits[:, -1].square().sum().backward()
        gradients.append(parameter.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
