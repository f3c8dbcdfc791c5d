"""Trying a reducer of each stage on a tiny random model of every family."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.utils import is_num2words_available

from ..families import refusal
from ..hosts import release
from ..methods.divprune import DivPrune
from ..methods.fastv import FastV
from ..methods.key_norm import KeyNorm
from ..methods.pixelprune import PixelPrune
from ..methods.tome import ToMe
from ..reducer import Reducer
from ..session import attach
from .bare import BARE, bare_vlm
from .prompted import build, inputs_of

REDUCERS: tuple[Reducer, ...] = (PixelPrune(), ToMe(), DivPrune(), FastV(k=1), KeyNorm())
# Fixtures whose name is not the `model_type`.
_NAMES = {"blip-2": "blip2"}


@dataclass(frozen=True)
class Trial:
    """What happened with the models of one `model_type`: the stages whose reducer worked, whether the layout
    of visual tokens is known, and the reason where none works."""

    model_type: str
    family: str
    stages: list[str] = field(default_factory=list)
    layout: bool = False
    reason: str = ""


def family_of(model_type: str) -> str:
    """The name of a family: its class without its task."""
    name = CLASSES.get(model_type, model_type)
    return name.rpartition("For")[0] or name


def tried(model_type: str) -> Trial:
    """Build a tiny random model of a `model_type` of the installed release, and generate with a reducer of
    each stage attached. Families that are refused or not in the release are not built."""
    trial = partial(Trial, model_type, family_of(model_type))
    if (reason := refusal(model_type)) is not None:
        return trial(reason=reason)
    if model_type not in CLASSES:
        return trial(reason=f"not in {release()}")
    if model_type == "smolvlm" and not is_num2words_available():
        return trial(reason="not tried: its processor needs num2words (pip install num2words)")
    with _quietly():
        try:
            model, inputs = _model(model_type)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        except Exception as error:  # whatever a release raises for a family that it cannot run
            return trial(reason=f"without a reducer it fails in {release()}: {error}")
        stages, layouts, reasons = [], [], {}
        for reducer in REDUCERS:
            try:
                layouts += _generated(model, inputs, reducer)
            except (TypeError, NotImplementedError) as error:  # how models refuse reducers
                reasons[reducer.stage.value] = str(error)
            else:
                stages.append(reducer.stage.value)
    return trial(stages, all(layouts) and bool(layouts), "" if stages else next(iter(reasons.values())))


def _model(model_type: str) -> tuple[hf.PreTrainedModel, Any]:
    if model_type in BARE:
        return bare_vlm(model_type)
    name = _NAMES.get(model_type, model_type)
    fixture = build(name)
    fixture.model.eval()
    return fixture.model, inputs_of(fixture, 1)


def _generated(model: hf.PreTrainedModel, inputs: Any, reducer: Reducer) -> list[bool]:
    """Whether the layout of each image is known, after generating with the reducer. Raises what attaching and
    running raise."""
    media = [getattr(model.config, f"{name}_token_id", None) for name in ("image", "video")]
    media = [token for token in media if token is not None]
    settings = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": media or None}
    with torch.no_grad(), attach(model, reducer, keep=None if reducer is REDUCERS[0] else 0.5) as session:
        model.generate(**inputs, **settings)
        session.report()
        if session.host is None:  # at a Q-Former or in cross-attention, where tokens are not traced
            return []
        return [explanation.grid is not None for explanation in session.explain()]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the advice of transformers on settings of random models, and with one thread, which is faster
    in kernels as small as these."""
    logger, threads = logging.getLogger("transformers"), torch.get_num_threads()
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        torch.set_num_threads(threads)
