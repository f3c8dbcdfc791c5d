"""What every reducer must satisfy on every model, as functions that tests (and new reducers) call.

Each takes a model built by `tiny_vlm` and a reducer; the oracles are in `oracles.py`.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers as hf
from oracles import (
    Inputs,
    _hide,
    decoder,
    kept_tokens,
    real_tokens,
    shortened_generate,
    shortened_logits,
    the_cache,
    visual_tokens,
)
from torch import Tensor

from vistok import compress
from vistok.compress.reducer import LayerReducer, Reducer, SkipReducer, Stage, StepReducer
from vistok.compress.session import Session

BATCHES = {"one": (1,), "mixed": (2, 1, 0)}
DECODING = {"greedy": {}, "beams": {"num_beams": 3}}


def assert_same(what: str, one: Tensor, two: Tensor, model: hf.PreTrainedModel, reducer: Any) -> None:
    """Bit-equal, or an error that names the model, the reducer, the kernel and what differs."""
    if one.shape == two.shape and torch.equal(one, two):
        return
    by = f"shapes {list(one.shape)} and {list(two.shape)}"
    if one.shape == two.shape:
        most = float((one - two).abs().max())
        by = f"{int((one != two).sum())} of {one.numel()} values, by up to {most:.3g}"
    kernel = model.config._attn_implementation
    raise AssertionError(f"{type(model).__name__}, {reducer!r}, {kernel}: {what} differ in {by}")


def placeholders(model: hf.PreTrainedModel) -> list[int]:
    """Token ids that a random model must not emit, because they would be read as pictures when fed back."""
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]


@torch.no_grad()
def outputs(model: hf.PreTrainedModel, inputs: Inputs, **generate: Any) -> tuple[Tensor, Tensor]:
    """Logits of the prompt, and new tokens."""
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": placeholders(model), **generate}
    new = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return model(**inputs).logits, new


def kept_rows(
    session: Session, rows: int, layer: int = 0, cache: bool = False, beams: int = 1
) -> list[Tensor]:
    """Which of each prompt's visual tokens reached a layer (or stayed in its cache), in order, as the session
    reports: [N], or [H_k, N] in a cache whose heads hold tokens of their own. All beams of a prompt must have
    kept the same."""
    found: list[list[list[Tensor]]] = [[[] for _ in range(beams)] for _ in range(rows)]
    for explanation in session.explain(layer, cache=cache):
        heads = explanation.heads
        mask = torch.zeros(*(() if heads is None else heads.shape[:1]), explanation.num_tokens).bool()
        mask[..., explanation.tokens] = True if heads is None else heads
        found[explanation.row // beams][explanation.row % beams].append(mask)
    joined = [[torch.cat(beam, -1) if beam else torch.zeros(0).bool() for beam in row] for row in found]
    assert all(torch.equal(beam, row[0]) for row in joined for beam in row)
    return [row[0] for row in joined]


def whole(model: hf.PreTrainedModel, inputs: Inputs, reducer: Reducer, **generate: Any) -> None:
    """All that a reducer must satisfy on one model, batch and way of decoding.

    keep=1.0 and detaching leave logits and tokens bit-identical and nothing behind; what is dropped before
    the model equals the shortened prompt exactly, and what is dropped inside it equals masking.
    """
    before, state = outputs(model, inputs, **generate), fingerprint(model)
    with compress.attach(model, reducer, keep=1.0):
        everything = outputs(model, inputs, **generate)
    assert_same("logits at keep=1.0", everything[0], before[0], model, reducer)
    assert_same("tokens at keep=1.0", everything[1], before[1], model, reducer)
    if reducer.stage is Stage.FEATURES and reducer.merges:
        with compress.attach(model, reducer, keep=0.5) as session:
            outputs(model, inputs, **generate)
            kept = [len(each.tokens) / each.num_tokens for each in session.explain()]
        assert not kept or max(kept) < 0.75, f"{reducer!r} keeps {kept} of the tokens at keep=0.5"
    elif reducer.stage is Stage.FEATURES:
        for positions in ("keep", "compact"):
            dropping_equals_the_oracle(model, inputs, reducer, 0.5, positions, **generate)
    elif isinstance(reducer, StepReducer):
        choosing_equals_masking(model, inputs, reducer, 0.5, 3e-5, **generate)
    elif isinstance(reducer, SkipReducer):
        skipping_equals_freezing(model, inputs, reducer, 0.5, 3e-5, **generate)
    elif isinstance(reducer, LayerReducer) and reducer.revives:  # later tokens select anew
        once = {**generate, "max_new_tokens": 1}
        cutting_equals_masking(model, inputs, reducer, 0.5, 3e-5, **once)
        with compress.attach(model, reducer, keep=0.5):
            outputs(model, inputs, **generate)
    elif isinstance(reducer, LayerReducer) and reducer.merges:
        with compress.attach(model, reducer, keep=0.5) as session:
            outputs(model, inputs, **generate)
            for image in session.report().images:
                assert image.layers[-1] == round(image.tokens / 2), f"{reducer!r} keeps {image.layers}"
    elif reducer.stage is not Stage.VISION:
        cutting_equals_masking(model, inputs, reducer, 0.5, 3e-5, reducer.stage is Stage.CACHE, **generate)
    after = outputs(model, inputs, **generate)
    assert_same("logits after detaching", after[0], before[0], model, reducer)
    assert_same("tokens after detaching", after[1], before[1], model, reducer)
    assert fingerprint(model) == state, f"{reducer!r} leaves something in {type(model).__name__}"


def fingerprint(model: hf.PreTrainedModel) -> list[Any]:
    """What attaching could leave behind: hooks, instance attributes, attention implementations."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = [
            # transformers leaves hooks of its own in layers whose states someone has asked for.
            [h for h in registered.values() if not getattr(h, "__module__", "").startswith("transformers.")]
            for registered in (module._forward_hooks, module._forward_pre_hooks)
        ]
        hooks.append(list(module._forward_hooks_always_called))
        own = sorted(key for key, value in vars(module).items() if callable(value) and key != "forward_fn")
        found.append((name, [len(h) for h in hooks], own))
        if isinstance(module, hf.PreTrainedModel):
            found.append(module.config._attn_implementation)
    return found


def dropping_equals_the_oracle(
    model: hf.PreTrainedModel,
    inputs: Inputs,
    reducer: Reducer,
    keep: Any,
    positions: str = "keep",
    **generate: Any,
) -> None:
    """A selecting reducer of features gives exactly what the shortened prompt gives."""
    rows = len(inputs["input_ids"])
    with compress.attach(model, reducer, keep=keep, positions=positions) as session:
        with torch.no_grad():
            logits = model(**inputs).logits
        keep_rows = kept_rows(session, rows)
        _, tokens = outputs(model, inputs, **generate)
        assert all(map(torch.equal, kept_rows(session, rows), keep_rows))
    kept = kept_tokens(model, inputs, keep_rows)
    expected = shortened_logits(model, inputs, keep_rows, positions)
    assert_same(f"logits with positions={positions!r}", logits[kept], expected[kept], model, reducer)
    oracle = shortened_generate(
        model,
        inputs,
        keep_rows,
        positions,
        max_new_tokens=4,
        num_beams=generate.get("num_beams", 1),
        suppress_tokens=placeholders(model),
    )
    assert_same(f"tokens with positions={positions!r}", tokens, oracle.tokens, model, reducer)


@contextmanager
def hidden_columns(model: hf.PreTrainedModel, dropped: Sequence[Tensor | None], decoding_only: bool) -> Any:
    """Mask the columns `dropped[i]` [B, L] of each layer i, in all calls or in those after the prompt."""

    def hook(index: int, module: Any, args: tuple, kwargs: dict) -> Any:
        if decoding_only and the_cache(kwargs).get_seq_length(index) == 0:
            return None
        return _hide(dropped[index], index, module, args, kwargs)

    handles = [
        layer.register_forward_pre_hook(partial(hook, i), with_kwargs=True)
        for i, layer in enumerate(decoder(model).layers)
        if dropped[i] is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_by_head(model: hf.PreTrainedModel, inputs: Inputs, rows: Sequence[Tensor]) -> Tensor:
    """Which places of the prompt remain [B, L], or [B, H, L] where heads hold visual tokens of their own."""
    by_head = max((len(row) for row in rows if row.ndim == 2), default=0)
    if not by_head:
        return kept_tokens(model, inputs, rows)
    rows = [row.expand(by_head, -1) for row in rows]
    heads = [kept_tokens(model, inputs, [row[head] for row in rows]) for head in range(by_head)]
    groups = decoder(model).config.num_attention_heads // by_head
    return torch.stack(heads, 1).repeat_interleave(groups, 1)


def cutting_equals_masking(
    model: hf.PreTrainedModel,
    inputs: Inputs,
    reducer: Reducer,
    keep: Any,
    tolerance: float,
    decoding_only: bool = False,
    **generate: Any,
) -> None:
    """Tokens cut inside the model are tokens that no later layer sees: logits of the prompt and every
    step."""
    rows, layers = len(inputs["input_ids"]), len(decoder(model).layers)
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": placeholders(model),
        "return_dict_in_generate": True,
        "output_logits": True,
        **generate,
    }

    def kept(session: Session, beams: int = 1) -> list[Tensor]:
        found = [kept_rows(session, rows, i, decoding_only, beams) for i in range(layers)]
        return [kept_by_head(model, inputs, row) for row in found]

    def hidden(kept: list[Tensor]) -> Any:
        real = real_tokens(inputs)
        dropped = [(real if k.ndim == 2 else real[:, None]) & ~k for k in kept]
        return hidden_columns(model, dropped, decoding_only)

    with torch.no_grad(), compress.attach(model, reducer, keep=keep) as session:
        logits, in_forward = model(**inputs).logits, kept(session)
        out = model.generate(**inputs, **settings)
        in_generate = kept(session, generate.get("num_beams", 1))
    with torch.no_grad(), hidden(in_forward):
        expected_logits = model(**inputs).logits
    with (
        torch.no_grad(),
        hidden(in_generate),
    ):  # pads count in a plain forward's positions, so ties may differ
        expected = model.generate(**inputs, **settings)
    last = real_tokens(inputs) if decoding_only else in_forward[-1]
    where = f"{type(model).__name__}, {reducer!r}, {model.config._attn_implementation}"
    error = float((logits[last] - expected_logits[last]).abs().max())
    assert error <= tolerance, f"{where}: logits differ from masking by {error:.3g}"
    assert_same("tokens", out.sequences, expected.sequences, model, reducer)
    for number, (step, reference) in enumerate(zip(out.logits, expected.logits, strict=True)):
        close = torch.allclose(step, reference, atol=tolerance, rtol=0)
        error = float((step - reference).abs().nan_to_num(0).max())
        assert close, f"{where}: step {number} differs by {error:.3g}"


def choosing_equals_masking(
    model: hf.PreTrainedModel,
    inputs: Inputs,
    reducer: StepReducer,
    keep: Any,
    tolerance: float,
    **generate: Any,
) -> None:
    """A step that attends to some visual tokens is one that sees no other: tokens and logits of every step.

    The choices themselves are the session's own; `test_cache_methods.py` has them worked out by hand.
    """
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": placeholders(model),
        "return_dict_in_generate": True,
        "output_logits": True,
        **generate,
    }
    layers = decoder(model).layers
    groups = decoder(model).config.num_attention_heads
    visual = visual_tokens(model, inputs)
    with torch.no_grad(), compress.attach(model, reducer, keep=keep) as session:
        session.trace = {}
        out = model.generate(**inputs, **settings)
        chosen = {i: session.trace[f"attended.{i}"][int(reducer.starts) :] for i in range(len(layers))}

    def hook(index: int, module: Any, args: tuple, kwargs: dict) -> Any:
        past = the_cache(kwargs).get_seq_length(index)
        if past == 0:
            return None
        attended = chosen[index][past - visual.shape[1]][:, :, 0]  # [B, 1 or H_k, S]
        missing = past + 1 - attended.shape[2]
        attended = torch.nn.functional.pad(attended, (missing, 0))  # what a window has dropped
        columns = torch.nn.functional.pad(visual, (0, past + 1 - visual.shape[1]))
        columns = columns.repeat_interleave(len(attended) // len(visual), 0)[:, None] & ~attended
        return _hide(columns.repeat_interleave(groups // columns.shape[1], 1), index, module, args, kwargs)

    handles = [
        layer.register_forward_pre_hook(partial(hook, i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        expected = model.generate(**inputs, **settings)
    for handle in handles:
        handle.remove()
    assert_same("tokens", out.sequences, expected.sequences, model, reducer)
    for number, (step, reference) in enumerate(zip(out.logits, expected.logits, strict=True)):
        error = float((step - reference).abs().nan_to_num(0).max())
        assert error <= tolerance, (
            f"{type(model).__name__}, {reducer!r}: step {number} differs by {error:.3g}"
        )


def skipping_equals_freezing(
    model: hf.PreTrainedModel,
    inputs: Inputs,
    reducer: SkipReducer,
    keep: Any,
    tolerance: float,
    **generate: Any,
) -> None:
    """Layers that a reducer leaves out for visual tokens leave those as they are: logits of the prompt and
    every step equal those of stock layers whose outputs at the pictures are replaced by their inputs."""
    layers, visual = decoder(model).layers, visual_tokens(model, inputs)
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": placeholders(model),
        "return_dict_in_generate": True,
        "output_logits": True,
        **generate,
    }

    def freeze(module: Any, args: tuple, output: Any) -> Any:
        hidden = args[0]
        if hidden.shape[1] != visual.shape[1]:  # a step after the prompt
            return None
        frozen = visual.repeat_interleave(len(hidden) // len(visual), 0)[..., None]
        return torch.where(frozen, hidden, output)

    with torch.no_grad(), compress.attach(model, reducer, keep=keep):
        logits = model(**inputs).logits
        out = model.generate(**inputs, **settings)
    treated = reducer.skips(len(layers), keep)
    assert treated, f"{reducer!r} leaves out nothing at keep={keep}"
    handles = [layers[i].register_forward_hook(freeze) for i in treated]
    try:
        with torch.no_grad():
            expected_logits, expected = model(**inputs).logits, model.generate(**inputs, **settings)
    finally:
        for handle in handles:
            handle.remove()
    real = real_tokens(inputs)
    error = float((logits[real] - expected_logits[real]).abs().max())
    where = f"{type(model).__name__}, {reducer!r}, {model.config._attn_implementation}"
    assert error <= tolerance, f"{where}: logits differ from freezing by {error:.3g}"
    assert_same("tokens", out.sequences, expected.sequences, model, reducer)
    for number, (step, reference) in enumerate(zip(out.logits, expected.logits, strict=True)):
        error = float((step - reference).abs().nan_to_num(0).max())
        assert error <= tolerance, f"{where}: step {number} differs by {error:.3g}"
