"""The recipes that fine-tune the test-bed model for several numbers of visual tokens."""

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from paths import ROOT
from PIL import Image

from vistok import compress
from vistok.compress.trained.tokenflex import FlexibleProjector, TokenFLEX
from vistok.train import recipe
from vistok.train.config import OptimizerConfig
from vistok.train.loop import train
from vistok.train.object_scenes import object_scene, questions, render
from vistok.train.objectives.scenes_scales import ScenesScalesConfig, ScenesScalesObjective
from vistok.train.scene_batches import encode
from vistok.train.scenes_vlm import prompt

SCALES = (36, 9, 4, 1)
COUNTS = {36: 192, 9: 51, 4: 24, 1: 7}
SHARES = {36: 1.0, 9: 0.25, 4: 0.12, 1: 0.03}
OPTIMIZER = OptimizerConfig(kind="adamw", schedule="constant", warmup=0, learning_rate=1e-4)


def config(**changes):
    values = {
        "method": "m3",
        "initial": "scenes-vlm",
        "scales": SCALES,
        "steps": 2,
        "batch_size": 2,
        "precision": "no",
        "workers": 0,
        "validation_questions": 3,
        "optimizer": OPTIMIZER,
    }
    return ScenesScalesConfig(**{**values, **changes})


def objective(**changes):
    torch.manual_seed(0)
    return ScenesScalesObjective(config(**changes), torch.device("cpu"), False)


@cache
def trained_for(method):
    """An objective that no test changes, and one of its batches."""
    learner = objective(method=method)
    return learner, learner.data[0]


@pytest.mark.parametrize("name", ["scenes-m3", "scenes-tokenflex"])
def test_shipped_recipes_are_read(name):
    settings = recipe.read(ROOT / "assets" / f"{name}.yaml")
    assert settings.method == name.removeprefix("scenes-") and settings.scales == SCALES


def test_all_tokens_are_those_of_the_stock_model():
    learner, batch = trained_for("m3")
    core = learner.model.model.model
    with torch.no_grad():
        stock = core.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"])
        tokens = learner.model._tokens(learner.model._tile_states(batch), 36)
    torch.testing.assert_close(tokens, torch.stack(list(stock.pooler_output)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["m3", "tokenflex"])
def test_training_sees_what_the_attached_reducer_gives(method, scale):
    """The logits of a question in training, and those of its prompt with M3 or TokenFLEX attached."""
    learner, _ = trained_for(method)
    reader, processor = learner.model.eval(), learner.processor
    scene = object_scene("train", 0, 5)
    question = next(iter(questions(scene, np.random.default_rng(0), ("attribute",)))).question
    inputs = processor(
        text=[prompt(processor, question)], images=[Image.fromarray(render(scene))], return_tensors="pt"
    )
    ids = torch.tensor([encode(processor, f"{question} assistant:")])
    batch = {
        "pixel_values": inputs["pixel_values"],
        "text": ids,
        "segment": torch.ones_like(ids),
        "offset": torch.arange(ids.shape[1])[None],
    }
    vlm = reader.model
    stock = vlm.model.multi_modal_projector
    reducer = compress.M3()
    try:
        if method == "tokenflex":
            reducer, vlm.model.multi_modal_projector = TokenFLEX(), reader.projector
        with torch.no_grad():
            tokens = reader._tokens(reader._tile_states(batch), scale)
            packed = vlm.lm_head(reader._states(tokens, batch).last_hidden_state[:, -1])
            with compress.attach(vlm, reducer, keep=SHARES[scale], positions="compact") as session:
                alone = vlm(**inputs).logits[:, -1]
                assert session.report().images[0].layers[0] == COUNTS[scale] == tokens.shape[1]
    finally:
        vlm.model.multi_modal_projector = stock
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_of_the_losses_at_single_scales():
    learner, batch = trained_for("m3")
    with torch.no_grad():
        losses = learner.loss(batch, 0)
        single = [learner.model(batch, (scale,))["answer"] for scale in SCALES]
    torch.testing.assert_close(losses["answer"], torch.stack(single).mean())
    for scale, loss in zip(SCALES, single, strict=True):
        torch.testing.assert_close(losses[f"answer_{scale}"], loss)
    assert set(learner.weights) == {"answer"}


@pytest.mark.parametrize(("method", "trains_tower"), [("m3", False), ("m3", True), ("tokenflex", False)])
def test_gradients_reach_what_the_method_trains(method, trains_tower):
    learner = objective(method=method, trains_tower=trains_tower, batch_size=1)
    learner.loss(learner.data[0], 0)["answer"].backward()
    core = learner.model.model.model

    def learns(module):
        return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())

    assert learns(core.language_model) and learns(core.vision_tower) == trains_tower
    assert learns(core.multi_modal_projector) == (method == "m3")
    assert method == "m3" or learns(learner.model.projector)
    assert core.image_newline.grad is not None
    trains = [parameter.requires_grad for parameter in core.vision_tower.parameters()]
    assert all(trains) if trains_tower else not any(trains)


def test_tokenflex_draws_one_scale_per_step_for_all_processes():
    learner, _ = trained_for("tokenflex")
    drawn = [learner.scales_of_step(step) for step in range(400)]
    assert drawn == [learner.scales_of_step(step) for step in range(400)]
    counts = [drawn.count((scale,)) for scale in SCALES]
    assert sum(counts) == 400 and min(counts) > 60
    assert trained_for("m3")[0].scales_of_step(7) == SCALES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": ()}, "at least one"),
        ({"scales": (9, 9)}, "different numbers"),
        ({"scales": (0,)}, "scales is"),
        ({"scales": (36, 16)}, "scales has 16; tiles of 6 × 6 tokens take 36, 9, 4, 1 with method: m3"),
        ({"scales": (8,), "method": "tokenflex"}, "scales has 8; .* 36, 25, 16, 9, 4, 1 with"),
    ],
)
def test_scales_that_tiles_cannot_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        objective(**changes)


def test_folders_of_other_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a model"):
        objective(initial=str(tmp_path))
    with pytest.raises(ValueError, match="a qwen2_5_vl model that does not read pictures in the tiles"):
        objective(initial=str(ROOT / "assets" / "scenes-qwen"))


@pytest.mark.parametrize("method", ["m3", "tokenflex"])
def test_a_short_run_exports_a_model_that_transformers_loads(method, tmp_path):
    settings = config(method=method, log_every=1)
    folder = train(settings, tmp_path / "run", steps=1, progress=False)
    folder = train(settings, tmp_path / "run", progress=False)  # resumes
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaNextForConditionalGeneration"
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    accuracies = [row for row in rows if "accuracy_at_9" in row][-1]
    assert {f"accuracy_at_{scale}" for scale in SCALES} == set(accuracies) - {"step"}
    reducer = compress.M3()
    if method == "tokenflex":
        reducer = TokenFLEX()
        model.model.multi_modal_projector = FlexibleProjector.load(folder / "projector")
    inputs = processor(
        text=[prompt(processor, "how many balls are there?")],
        images=[render(object_scene("test", 0, 0))],
        return_tensors="pt",
    )
    with compress.attach(model, reducer, keep=0.25, positions="compact") as session:
        model.generate(**inputs, max_new_tokens=2)
        assert session.report().images[0].layers[0] == 51
    assert dataclasses.asdict(settings)["scales"] == SCALES
