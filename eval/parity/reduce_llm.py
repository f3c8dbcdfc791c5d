"""Parity of token reducers inside a language model: one picture between text, and three further steps.

The recorded originals are Llamas; here their weights stand in a LLaVA whose tower never runs, so that a case
goes through the same session as a user's model.
"""

from typing import Any

import torch
from torch import Tensor

from ...compress import attach
from ...compress.hosts import ENCODES_BEFORE_FORWARD, cache_in, release, with_cache
from ...compress.methods.fastv import FastV
from ...compress.methods.ima import IMA
from ...compress.methods.pyramiddrop import PyramidDrop
from ...compress.methods.transprune import TransPrune
from ...compress.reducer import LayerReducer
from ...compress.session import Session
from .case import CannotBuild, Case, Outputs

# Names of the score parts, both in the case and in TransPrune's trace.
PARTS = ("acc_raw", "iga_raw", "acc", "iga")
MODULES = {"attention": "ttv_attn", "mlp": "ttv_ffn"}


@torch.no_grad()
def run(case: Case) -> Outputs:
    """Prefill, scores, kept tokens and decode steps of one prompt. Raises CannotBuild for another method, and
    when sequence lengths differ from the stated ones, and before transformers 5.18."""
    if not ENCODES_BEFORE_FORWARD:
        raise CannotBuild(
            f"{case.path.name}: {release()} takes no features made before the forward, as this case gives "
            "them; install transformers 5.18 or later"
        )
    if any("skip_mode" in entry for entry in case.data["config"].get("runs", ())):
        yield from _skipping(case)
        return
    reducer = _reducer(case)
    text, features = case.recorded("text_ids").long(), case.recorded("image_features")
    steps = case.recorded("decode_ids").long()
    placeholder = _free_id(case, torch.cat([text.flatten(), steps]))
    before = case.data["config"]["text_before"]
    case.check_config("image_tokens", features.shape[1])
    case.check_config("text_after", text.shape[1] - before)
    image = text.new_full((1, features.shape[1]), placeholder)
    ids = torch.cat([text[:, :before], image, text[:, before:]], 1)
    model = _model(case, placeholder)

    yield "logits_last_unpruned", model(**_prompt(ids, features), logits_to_keep=1).logits[:, -1]

    entered: list[int] = []
    try:
        session = attach(model, reducer, positions="paper")
    except ValueError as error:
        raise CannotBuild(f"{case.path.name}: {error}") from error
    with session:
        session.trace = {}
        counters = [
            layer.register_forward_hook(lambda module, args, output: entered.append(output.shape[1]))
            for layer in model.model.language_model.layers
        ]
        output = model(**_prompt(ids, features))
        for counter in counters:
            counter.remove()
        cache = cache_in(output)
        case.check_config("tokens_into_block", entered)
        case.check_config("kv_len_after_prefill", _lengths(cache))
        kept = torch.ones_like(ids[0], dtype=torch.bool)
        kept[before : before + features.shape[1]] = False
        kept[before + session.explain(layer=-1)[0].tokens] = True
        yield "logits", output.logits[:, kept]
        yield from _scores(case, session, reducer.cuts(len(entered)))
        decoded = [
            model(input_ids=step.reshape(1, 1), **with_cache(model, cache)).logits[0, -1] for step in steps
        ]
        yield "decode_logits", torch.stack(decoded)
        case.check_config(f"kv_len_after_{len(steps)}_steps", _lengths(cache))


def _skipping(case: Case) -> Outputs:
    """Logits of the prompt, the picture in front, and of further steps, for each mode of skipping."""
    config, features, text = case.data["config"], case.recorded("visual"), case.recorded("text_ids").long()
    steps = case.recorded("decode_ids").long()
    placeholder = _free_id(case, torch.cat([text.flatten(), steps.flatten()]))
    ids = torch.cat([text.new_full(features.shape[:2], placeholder), text], 1)
    case.check_config("prompt_len", features.shape[1])
    model = _model(case, placeholder)
    for entry in config["runs"]:
        mode, name = entry["skip_mode"], f"m{entry['index']}"
        reducer = IMA(
            skip_mode=mode,
            skip_interval=entry["skip_interval"],
            start_layer=entry["start_layer"],
            end_layer=entry["end_layer"],
            block_pairs=entry["block_pairs_from"] or None,
            prompt_len=config["prompt_len"] if "prompt" in mode else None,
        )
        layers = len(model.model.language_model.layers)
        case.check_stated(f"{name}: layers treated", len(reducer.skips(layers, None)), entry["skips"])
        with attach(model, reducer):
            output = model(**_prompt(ids, features), use_cache=True)
            yield f"{name}.logits", output.logits
            cache = cache_in(output)
            decoded = [
                model(input_ids=step[:, None], **with_cache(model, cache)).logits[:, -1] for step in steps
            ]
            case.check_stated(f"{name}: cache", set(_lengths(cache)), {ids.shape[1] + len(steps)})
            yield f"{name}.decode", torch.stack(decoded)


def _reducer(case: Case) -> LayerReducer:
    config = case.data["config"]
    if "accumulating_layer_list" in config:
        return TransPrune(
            accumulating_layer_list=config["accumulating_layer_list"],
            pruning_layer_list=config["pruning_layer_list"],
            image_token_ratio_list=config["image_token_ratio_list"],
        )
    if "pruning_layer_list" in config:
        return PyramidDrop(
            layer_list=config["pruning_layer_list"], image_token_ratio_list=config["image_token_ratio_list"]
        )
    if {"k", "r"} <= set(config):
        return FastV(k=config["k"], r=config["r"])
    raise CannotBuild(f"{case.path.name}: no reducer of this version has the settings {', '.join(config)}")


def _free_id(case: Case, used: Tensor) -> int:
    """A token id that can stand for the picture because no text uses it."""
    free = set(range(case.data["config"]["llama"]["vocab_size"])) - set(used.tolist())
    if not free:
        raise CannotBuild(f"{case.path.name}: the text leaves no token id to stand for the picture")
    return min(free)


def _model(case: Case, placeholder: int) -> Any:
    """The case's Llama, filled under its published keys, as the language model of a LLaVA."""
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
    )

    sizes = case.data["config"]["llama"]
    llama = case.build(lambda: LlamaForCausalLM(LlamaConfig(**sizes)))
    tower = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=2,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(**sizes),
        image_token_id=placeholder,
        tie_word_embeddings=sizes["tie_word_embeddings"],
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=case.dtype)
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    return model.to(case.device).eval()  # `.to(dtype)` would round the rotary frequencies


def _prompt(ids: Tensor, features: Tensor) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return {
        "input_ids": ids,
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(features))},
    }


def _lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


def _scores(case: Case, session: Session, cuts: dict[int, float]) -> Outputs:
    """The session's trace, under the case's names: modules by their layer, the rest by stage."""
    trace = session.trace
    for name, values in trace.items():
        module, layer = name.rsplit(".", 1)
        if module in MODULES:
            yield f"{MODULES[module]}.block{layer}", values[0][0]
    for stage, layer in enumerate(sorted(cuts)):
        if f"score.{layer}" not in trace:
            raise CannotBuild(f"{case.path.name}: stage {stage} drops nothing, so it has no scores here")
        suffix = "" if "kept" in case.tensors else f".stage{stage}"
        for part in (*PARTS, "score", "kept"):
            for value in trace.get(f"{part}.{layer}", ()):
                yield f"{part}{suffix}", value
        if suffix:
            yield f"kept_original{suffix}", session.explain(layer)[0].tokens
