"""Tiny vision-language models for tests: those of `vistok.compress.tiny.prompted`, built as a test asks."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers as hf
from oracles import BEFORE_5_18

from vistok.compress.tiny.prompted import (
    FIXTURES,
    MORE,
    QUESTIONS,
    QWEN_TOKENS,
    WINDOWED,
    build,
    inputs_of,
    llava,
    make_tokenizer,
    picture,
)

__all__ = [
    "FIXTURES",
    "MORE",
    "QUESTIONS",
    "QWEN_TOKENS",
    "WINDOWED",
    "llava",
    "make_tokenizer",
    "picture",
    "tiny_vlm",
]


def tiny_vlm(
    name: str, attn: str = "sdpa", seed: int = 0
) -> tuple[hf.PreTrainedModel, hf.ProcessorMixin, Callable[..., hf.BatchFeature]]:
    """The fixture `name` of `FIXTURES` or `MORE`: model, processor and `inputs`.

    `inputs(batch=2)` is a padded batch of one-picture prompts. `inputs(images=(2, 1, 0))` has that many
    pictures in its rows, `videos=` likewise; `rows=(1,)` picks rows of such a batch, which keep their
    pictures and text but are padded anew; `padding_side=` is "left" unless "right" is asked for. Two
    families cannot do every tuple in stock: PaliGemma needs a picture in the batch, Mllama in each row
    (or in none).
    """
    if reason := _stock_failure(name):
        pytest.skip(f"stock {name} of transformers {hf.__version__} and torch {torch.__version__} {reason}")
    fixture = build(name, seed)
    model, processor = fixture.model, fixture.processor
    model.eval().set_attn_implementation(attn)
    return model, processor, partial(inputs_of, fixture)


def _stock_failure(name: str) -> str | None:
    """Why the installed transformers and torch cannot run a fixture even without reducers; None: they can."""
    if name == "vipllava" and BEFORE_5_18:
        return "reads hidden states that are not there (before 5.18)"
    if name.startswith(("llava_mixtral", "llava_phimoe", "llava_qwen3_moe")) and not _groups_experts():
        return "multiplies experts by torch._grouped_mm, which this torch has on GPUs alone"
    return None


def _groups_experts() -> bool:
    try:
        torch._grouped_mm(torch.ones(1, 16), torch.ones(1, 16, 16), offs=torch.ones(1, dtype=torch.int32))
    except NotImplementedError:
        return False
    return True
