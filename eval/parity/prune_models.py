"""Parity of token selection in a whole model: one picture between text, through an attached session."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compress import attach
from ...compress.algorithms.anyres import globalcom2_ratios
from ...compress.algorithms.select import farthest_first
from ...compress.methods.divprune import DivPrune
from ...compress.methods.globalcom2 import GlobalCom2
from ...compress.methods.hired import HiRED
from ...compress.methods.prumerge import PruMerge
from ...compress.methods.visionzip import VisionZip
from ...compress.reducer import Budget, FeatureReducer, Image
from .case import CannotBuild, Case, Outputs

MODELS = {
    "LlavaForConditionalGeneration": "LlavaConfig",
    "LlavaNextForConditionalGeneration": "LlavaNextConfig",
}
BEFORE, EVERY = 35, 37  # text tokens before the picture; recorded visual tokens of the unreduced sequence


@torch.no_grad()
def run(case: Case) -> Outputs:
    """The model without reduction, then with each method. Raises CannotBuild for other models and methods,
    and when counts differ from the stated ones."""
    config = case.data["config"]
    model = _model(case)
    inputs, text = _inputs(case, model)
    yield "input_ids", text
    with _entering(model) as entered:
        logits = model(**inputs, logits_to_keep=config["T"]).logits[0]
    visual = entered[0][0, BEFORE : -config["T"]]
    yield "base.visual_sample", visual[::EVERY]
    yield "base.logits", logits
    for name, settings in config["methods"].items():
        case.check_stated(
            f"{name}: tokens before", len(visual), settings.get("visual_tokens_before", len(visual))
        )
        yield from _method(case, model, inputs, name, settings)


def _method(case: Case, model: Any, inputs: dict[str, Any], name: str, settings: dict[str, Any]) -> Outputs:
    reducer, keep = _reducer(case, name, settings)
    calls: list[tuple[Image, Any]] = []
    reduce = reducer.reduce

    def watched(image: Image, budget: Any) -> Any:
        calls.append((image, budget))
        return reduce(image, budget)

    reducer.reduce = watched
    last = case.data["config"]["T"]
    with attach(model, reducer, keep=keep, positions="paper"), _entering(model) as entered:
        logits = model(**inputs).logits[0, -last:]
    (image, budget), visual = calls[0], entered[0][0, BEFORE:-last]
    yield from _selected(case, name, settings, reducer, image, budget)
    case.check_stated(
        f"{name}: tokens", len(visual), settings.get("visual_tokens", settings.get("kept", len(visual)))
    )
    yield f"{name}.visual", visual
    yield f"{name}.logits", logits


def _reducer(case: Case, name: str, settings: dict[str, Any]) -> tuple[FeatureReducer, Budget]:
    """The method of a case, and its budget."""
    if name == "divprune":
        return DivPrune(), settings["ratio"]
    if name == "hired":
        alpha = settings["alpha"]
        options = {} if alpha is None else {"alpha": alpha}
        # As a count: a whole budget drops newlines here, where keep=1.0 drops nothing.
        return HiRED(geometry="reference", **options), partial(_encoded, rate=settings["token_budget_rate"])
    if name == "globalcom2":
        return GlobalCom2(geometry="reference"), settings["retention_ratio"]
    if name == "visionzip":
        return VisionZip(dominant=settings["dominant"], contextual=settings["contextual"]), None
    if name in ("prumerge", "prumerge_plus"):
        return PruMerge(plus=name == "prumerge_plus"), None
    raise CannotBuild(f"{case.path.name}: no reducer of this version is called {name!r}")


def _encoded(image: Image, rate: float) -> int:
    """A share of the tokens of all tiles, padding included."""
    return int(image.grid.num_tiles * image.grid.tokens_per_tile * min(rate, 1))


def _selected(
    case: Case,
    name: str,
    settings: dict[str, Any],
    reducer: FeatureReducer,
    image: Image,
    budget: float | int | None,
) -> Outputs:
    """The decisions of each method, where they were recorded."""
    if isinstance(reducer, DivPrune):
        count = reducer.retained_count(image.num_tokens, budget)
        yield f"{name}.order", farthest_first(image.features, count)
    elif isinstance(reducer, HiRED) and image.grid.thumbnail is None:
        yield f"{name}.kept", reducer.reduce(image, budget).kept
    elif isinstance(reducer, HiRED):
        tiles = reducer.tiles(image, budget)
        chosen = settings.get("selected_before_unpad", len(tiles.kept))
        case.check_stated(f"{name}: chosen", len(tiles.kept), chosen)
        yield f"{name}.selected", tiles.kept
        yield f"{name}.kept", tiles.packed
    elif isinstance(reducer, GlobalCom2):
        tiles = reducer.tiles(image, budget)
        newlines = int((tiles.packed < 0).sum())
        case.check_stated(f"{name}: newlines", newlines, settings.get("newlines", newlines))
        yield f"{name}.scales", globalcom2_ratios(reducer.scores(image), image.grid, budget)
        yield f"{name}.sequence", tiles.packed


@contextmanager
def _entering(model: Any) -> Iterator[list[Tensor]]:
    """Collects the embeddings that enter the first layer of the language model, call by call."""
    entered: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        yield entered
    finally:
        hook.remove()


def _model(case: Case) -> Any:
    """The case's model, filled under its published keys."""
    import transformers

    config = case.data["config"]
    if config["model"] not in MODELS:
        raise CannotBuild(f"{case.path.name}: no adapter for {config['model']}; known: {', '.join(MODELS)}")
    options = {
        key: config[key]
        for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act")
    }
    if "image_grid_pinpoints_hw" in config:
        options["image_grid_pinpoints"] = config["image_grid_pinpoints_hw"]

    def make() -> Any:
        settings = getattr(transformers, MODELS[config["model"]])(
            vision_config=dict(config["vision_config"]),
            text_config=dict(config["text_config"]),
            image_token_id=config["image_token_index"],
            tie_word_embeddings=config["text_config"].get("tie_word_embeddings", False),
            **options,
        )
        return getattr(transformers, config["model"])(settings)

    return case.build(make)


def _inputs(case: Case, model: Any) -> tuple[dict[str, Any], Tensor]:
    """The model's inputs by the case's recipe, and the text alone."""
    config = case.data["config"]
    vision, crops, sizes = config["vision_config"], config["ncrops"], config.get("image_sizes_hw")
    if sizes is not None and len(sizes) != 1:
        raise CannotBuild(f"{case.path.name}: {len(sizes)} pictures; this version takes one per case")
    pixels, patch = vision["image_size"], vision["patch_size"]
    side = pixels // patch
    random = np.random.RandomState(config["in_seed"])
    values = random.standard_normal((crops, 3, pixels, pixels)).astype(np.float32)
    contrast = random.uniform(0.2, 2.0, (crops, 1, side, side)).repeat(patch, 2).repeat(patch, 3)
    values = case.place(torch.from_numpy(values * contrast.astype(np.float32)))
    text = torch.from_numpy(random.randint(1, 100, BEFORE + config["T"])).to(case.device)
    media: dict[str, Any] = {"pixel_values": values}
    if sizes is not None:
        media = {"pixel_values": values[None], "image_sizes": torch.tensor(sizes, device=case.device)}
    tokens = len(model.get_image_features(**media, return_dict=True).pooler_output[0])
    image = text.new_full((tokens,), config["image_token_index"])
    ids = torch.cat([text[:BEFORE], image, text[BEFORE:]])
    return {"input_ids": ids[None], **media}, text
