"""Patches dropped before the tower: what runs, what is computed, and what is refused."""

from dataclasses import dataclass, replace

import pytest
import reducer_matrix as matrix
import torch
import transformers as hf
from oracles import BEFORE_5_18, kept_tokens, shortened_generate, shortened_logits
from screens import UNIT, screens, tower_without
from tiny_vlms import QWEN_TOKENS, tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, Downsample, FasterVLM, FastV, KeyNorm, PixelPrune, ToMe
from vistok.compress.reducer import FeatureReducer, PixelReducer, Selection

MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BATCH = (2, 1, 0)
TOLERANCE = 1e-4  # of logits up to 6: the oracle's tower has a kernel of its own
every_model = pytest.mark.parametrize("name", MODELS)


@dataclass(kw_only=True)
class Attentive(FeatureReducer):
    """Keeps everything, and remembers the tower's attention of each image."""

    rows: tuple = ()

    def tower_layers(self):
        return {"features": True}

    def reduce(self, image, budget):
        own = image.attention("features").mean(1)
        self.rows = (*self.rows, self.per_token(own, image.grid))
        return Selection(torch.arange(image.num_tokens))


@dataclass(kw_only=True)
class Whole(PixelReducer):
    """Returns the mask it is given."""

    mask: object = None

    def select(self, patches):
        return torch.ones(len(patches.pixels), dtype=torch.bool) if self.mask is None else self.mask


@torch.no_grad()
def entered(model, inputs, reducer):
    """The tokens whose patches enter the tower, one mask per picture of the batch, by their pixels alone."""
    vision = model.config.vision_config
    pixels = inputs["pixel_values"].view(-1, UNIT, 3, 2, vision.patch_size, vision.patch_size)[:, :, :, 0]
    masks, start = [], 0
    for _, height, width in inputs["image_grid_thw"].tolist():
        count = height * width // UNIT
        masks.append(reducer.mask(pixels[start : start + count].flatten(1), height // 2, width // 2))
        start += count
    return masks


def by_row(masks, images=BATCH):
    """Masks of pictures → one mask per prompt."""
    masks, rows = iter(masks), []
    for count in images:
        own = [next(masks) for _ in range(count)]
        rows.append(torch.cat(own) if own else torch.zeros(0, dtype=torch.bool))
    return rows


def qwen3_5():
    """A tiny Qwen3.5, whose language model mixes attention with linear attention, and Qwen3-VL's inputs."""
    _, processor, inputs = tiny_vlm("qwen3_vl")
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    linear = {f"linear_{part}": 2 for part in ("num_key_heads", "num_value_heads")}
    linear |= {f"linear_{part}_head_dim": 16 for part in ("key", "value")} | {"linear_conv_kernel_dim": 4}
    config = hf.Qwen3_5Config(
        vision_config={
            **{"depth": 2, "hidden_size": 48, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64},
            **{"num_position_embeddings": 64, "patch_size": 16, "spatial_merge_size": 2},
        },
        text_config={
            **{"vocab_size": len(processor.tokenizer), "hidden_size": 64, "intermediate_size": 96},
            **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": rope | {"partial_rotary_factor": 0.25},
            **linear,
            **{"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None},
        },
        **dict(zip(names, processor.tokenizer.convert_tokens_to_ids(QWEN_TOKENS), strict=True)),
    )
    torch.manual_seed(0)
    model = hf.Qwen3_5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model, processor, inputs


def test_a_model_with_linear_attention_reads_the_prompt_without_the_tokens():
    model, _, inputs = qwen3_5()
    inputs = screens(model, inputs(images=BATCH))
    before = matrix.outputs(model, inputs)
    masks = entered(model, inputs, PixelPrune())
    rows = by_row(masks)
    kept = kept_tokens(model, inputs, rows)
    with tower_without(model, inputs, masks):
        expected = shortened_logits(model, inputs, rows, "keep")
        oracle = shortened_generate(
            model, inputs, rows, "keep", max_new_tokens=4, suppress_tokens=matrix.placeholders(model)
        )
    with compress.attach(model, PixelPrune()) as session:
        logits, tokens = matrix.outputs(model, inputs)
        assert all(map(torch.equal, matrix.kept_rows(session, 3), rows)) and not rows[0].all()
    assert torch.allclose(logits[kept], expected[kept], atol=3e-4, rtol=0)
    assert torch.equal(tokens, oracle.tokens)
    with compress.attach(model, PixelPrune(), keep=1.0):
        assert all(map(torch.equal, before, matrix.outputs(model, inputs)))


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("colours", [1, 3])
def test_dropping_equals_a_tower_and_a_model_that_never_see_the_patches(name, attention, colours):
    model, _, inputs = tiny_vlm(name, attention)
    inputs = screens(model, inputs(images=BATCH), colours)
    masks = entered(model, inputs, PixelPrune())
    assert 0 < sum(int(mask.sum()) for mask in masks) < sum(map(len, masks))
    rows = by_row(masks)
    kept = kept_tokens(model, inputs, rows)
    with tower_without(model, inputs, masks):
        expected = shortened_logits(model, inputs, rows, "keep")
        oracle = shortened_generate(
            model, inputs, rows, "keep", max_new_tokens=4, suppress_tokens=matrix.placeholders(model)
        )
    with compress.attach(model, PixelPrune()) as session:
        logits, tokens = matrix.outputs(model, inputs)
        assert all(map(torch.equal, matrix.kept_rows(session, len(BATCH)), rows))
    assert torch.allclose(logits[kept], expected[kept], atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, oracle.tokens)


@every_model
def test_beams_drop_what_greedy_search_drops(name):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=BATCH))
    rows = by_row(entered(model, inputs, PixelPrune()))
    with tower_without(model, inputs, entered(model, inputs, PixelPrune())):
        oracle = shortened_generate(
            model,
            inputs,
            rows,
            "keep",
            max_new_tokens=4,
            num_beams=3,
            suppress_tokens=matrix.placeholders(model),
        )
    with compress.attach(model, PixelPrune()):
        _, tokens = matrix.outputs(model, inputs, num_beams=3)
    assert torch.equal(tokens, oracle.tokens)


@every_model
def test_every_block_of_the_tower_runs_on_the_patches_that_stay(name):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=BATCH))
    kept = sum(int(mask.sum()) for mask in entered(model, inputs, PixelPrune()))
    blocks, counts = model.base_model.visual.blocks, []
    hooks = [block.register_forward_pre_hook(lambda m, args: counts.append(len(args[0]))) for block in blocks]
    with torch.no_grad(), compress.attach(model, PixelPrune()):
        model(**inputs)
    [hook.remove() for hook in hooks]
    assert counts == [UNIT * kept] * len(blocks) and kept < len(inputs["pixel_values"]) // UNIT


@every_model
@pytest.mark.parametrize("after", [1, 2, 3, -1])
def test_patches_can_leave_after_some_blocks(name, after):
    model, _, inputs = tiny_vlm(name)
    inputs, reducer = screens(model, inputs(images=BATCH)), PixelPrune(after_blocks=after)
    masks, blocks = entered(model, inputs, reducer), model.base_model.visual.blocks
    first = len(blocks) if after == -1 else after
    rows = by_row(masks)
    kept = kept_tokens(model, inputs, rows)
    with tower_without(model, inputs, masks, first):
        expected = shortened_logits(model, inputs, rows, "keep")
    counts = []
    with compress.attach(model, reducer):
        hooks = [b.register_forward_hook(lambda m, args, out: counts.append(len(out))) for b in blocks]
        logits, _ = matrix.outputs(model, inputs)
        [hook.remove() for hook in hooks]
    whole, fewer = len(inputs["pixel_values"]), UNIT * sum(int(mask.sum()) for mask in masks)
    assert counts[: len(blocks)] == [whole] * first + [fewer] * (len(blocks) - first)
    if first == len(blocks):
        assert torch.equal(logits[kept], shortened_logits(model, inputs, rows, "keep")[kept])
    assert torch.allclose(logits[kept], expected[kept], atol=TOLERANCE, rtol=0)


@every_model
def test_a_picture_without_repeats_is_answered_bit_for_bit(name):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=BATCH)
    before = matrix.outputs(model, inputs)
    with compress.attach(model, PixelPrune()) as session:
        during = matrix.outputs(model, inputs)
        assert all(image.layers[0] == image.tokens for image in session.report().images)
    assert all(map(torch.equal, before, during))


@every_model
@pytest.mark.parametrize("reducer", [PixelPrune(), [PixelPrune(), DivPrune(), FastV(k=1)]], ids=str)
def test_keeping_everything_and_detaching_leave_outputs_identical(name, reducer):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=BATCH))
    before, state = matrix.outputs(model, inputs), matrix.fingerprint(model)
    with compress.attach(model, reducer, keep=1.0):
        assert all(map(torch.equal, before, matrix.outputs(model, inputs)))
    with compress.attach(model, PixelPrune(keep=1.0)):
        assert all(map(torch.equal, before, matrix.outputs(model, inputs)))
    with compress.attach(model, PixelPrune()):
        assert not torch.equal(
            before[0], matrix.outputs(model, inputs)[0]
        )  # repeats are no longer attended to
    assert all(map(torch.equal, before, matrix.outputs(model, inputs)))
    assert matrix.fingerprint(model) == state


@every_model
def test_prompts_of_a_batch_are_as_alone(name):
    model, _, make = tiny_vlm(name)
    batch = screens(model, make(images=BATCH))
    tokens = int(batch["image_grid_thw"][:2].prod(-1).sum())
    with torch.no_grad(), compress.attach(model, PixelPrune()):
        together = model(**batch).logits
        for row, (first, last) in enumerate(((0, tokens), (tokens, None))):
            alone = make(images=BATCH, rows=(row,))
            alone["pixel_values"] = batch["pixel_values"][first:last]
            logits = model(**alone).logits[0]
            assert torch.allclose(together[row, -len(logits) :], logits, atol=TOLERANCE)


@every_model
def test_videos_in_the_same_prompt_stay_whole(name):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=(1, 1), videos=(1, 0)), colours=1)
    video = inputs["pixel_values_videos"]
    inputs["pixel_values_videos"] = torch.zeros_like(video)  # nothing but repeats
    with torch.no_grad(), compress.attach(model, PixelPrune()) as session:
        assert torch.isfinite(model(**inputs).logits).all()
        kept = [(image.tokens, image.layers[0]) for image in session.report().images]
        model.generate(**inputs, max_new_tokens=2)
    pictures = [int(n) // UNIT for n in inputs["image_grid_thw"].prod(-1)]
    assert sorted(kept) == sorted([*((n, 1) for n in pictures), (len(video) // UNIT, len(video) // UNIT)])


@every_model
def test_features_and_layers_continue_with_what_the_pixels_left(name):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=BATCH))
    masks = entered(model, inputs, PixelPrune())
    chain = [PixelPrune(), DivPrune(), FastV(k=1), KeyNorm()]
    with torch.no_grad(), compress.attach(model, chain, keep=0.25) as session:
        model.generate(**inputs, max_new_tokens=3)
        first, last = session.explain(0), session.explain(-1)
    for mask, enters, stays in zip(masks, first, last, strict=True):
        budget = min(max(1, round(0.25 * len(mask))), int(mask.sum()))
        assert len(enters.tokens) == budget and mask[enters.tokens].all()
        assert set(stays.tokens.tolist()) < set(enters.tokens.tolist()) or budget == 1
    with compress.attach(model, [PixelPrune(), DivPrune()], keep=0.5) as session:
        logits = model(**inputs).logits
        rows = matrix.kept_rows(session, len(BATCH))
    kept = kept_tokens(model, inputs, rows)
    with tower_without(model, inputs, masks):
        expected = shortened_logits(model, inputs, rows, "keep")
    assert torch.allclose(logits[kept], expected[kept], atol=TOLERANCE, rtol=0)


@every_model
@pytest.mark.parametrize("after", [0, 1, -1])
def test_the_attention_of_the_tower_is_that_of_the_patches_in_it(name, after):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=BATCH))
    masks = entered(model, inputs, PixelPrune())
    probe = Attentive()
    reducer = PixelPrune(after_blocks=after)
    with torch.no_grad(), compress.attach(model, [reducer, probe]):
        model(**inputs)
    with torch.no_grad(), tower_without(model, inputs, masks, after % 4) as layers:
        model(**inputs)
    received = layers[-1].mean(0).view(-1, UNIT).mean(1).split([len(mask) for mask in masks])
    for rows, expected, mask in zip(probe.rows, received, masks, strict=True):
        assert torch.allclose(rows, expected[mask], atol=1e-6)
    with torch.no_grad(), compress.attach(model, [reducer, FasterVLM()], keep=1) as session:
        model(**inputs)
        best = [int(image.tokens) for image in session.explain()]
    assert best == [
        int(each.masked_fill(~mask, -1).argmax()) for each, mask in zip(received, masks, strict=True)
    ]


@pytest.mark.parametrize("after", [0, 1])
@every_model
def test_gradients_are_those_of_a_tower_that_never_sees_the_patches(name, after):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=(2,)))
    masks = entered(model, inputs, PixelPrune())
    weight = model.base_model.visual.patch_embed.proj.weight
    kept = torch.cat(masks)

    def gradient(features):
        model.zero_grad()
        torch.cat(features)[kept].square().sum().backward()
        return weight.grad.clone()

    def features():
        arguments = inputs["pixel_values"], inputs["image_grid_thw"]
        return model.base_model.get_image_features(*arguments, return_dict=True).pooler_output

    with tower_without(model, inputs, masks, after):
        expected = gradient(features())
    with compress.attach(model, PixelPrune(after_blocks=after)):
        assert torch.allclose(gradient(features()), expected, atol=1e-3 * float(expected.abs().max()))
    model.zero_grad()


# Positions --------------------------------------------------------------------------------------------------


def positions_of(model, inputs, reducer, **generate):
    """The position ids of every call of the language model, in three planes."""
    calls = []
    with compress.attach(model, reducer) as session:
        hook = model.base_model.language_model.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append(kwargs["position_ids"][-3:].clone()), with_kwargs=True
        )
        model.generate(**inputs, do_sample=False, suppress_tokens=matrix.placeholders(model), **generate)
        hook.remove()
        kept = [image.tokens for image in session.explain()]
    return calls, kept


@every_model
@pytest.mark.parametrize("beams", [1, 3])
def test_text_starts_where_the_engine_starts_it(name, beams):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=(2,)), colours=1)  # one token of each picture stays
    settings = {"max_new_tokens": 3, "num_beams": beams}
    stock, _ = positions_of(model, inputs, PixelPrune(keep=1.0), **settings)
    keep, kept = positions_of(model, inputs, PixelPrune(), **settings)
    engine, _ = positions_of(model, inputs, PixelPrune(positions="engine"), **settings)
    assert [each.tolist() for each in kept[:2]] == [[0], [0]]
    count = keep[0].shape[2]
    # One token per picture stands on the diagonal, so positions of the whole prompt count on.
    assert torch.equal(engine[0], torch.arange(count).expand_as(engine[0]))
    assert int(keep[0].max()) == int(stock[0].max()) > count - 1
    for step in (1, 2):
        assert (keep[step] == stock[0].max() + step).all()
        assert (engine[step] == count - 1 + step).all()


@every_model
def test_a_later_picture_counts_from_the_text_before_it(name):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=(2, 1)), colours=2, seed=3)
    (stock, *_), _ = positions_of(model, inputs, PixelPrune(keep=1.0), max_new_tokens=1)
    (engine, *_), _ = positions_of(model, inputs, PixelPrune(positions="engine"), max_new_tokens=1)
    rows = by_row(entered(model, inputs, PixelPrune()), (2, 1))
    kept = kept_tokens(model, inputs, rows)
    ids, picture = inputs["input_ids"], model.config.image_token_id
    for row in range(2):
        expected, shift, run = [], 0, []
        for place in range(ids.shape[1]):
            if ids[row, place] == picture:
                run.append(place)
                continue
            if run:
                largest = max(int(stock[:, row, p].max()) for p in run if kept[row, p])
                expected += [stock[:, row, p] - shift for p in run if kept[row, p]]
                shift += int(stock[0, row, place]) - largest - 1
                run = []
            if inputs["attention_mask"][row, place]:
                expected.append(stock[:, row, place] - shift)
        assert torch.equal(engine[:, row, -len(expected) :], torch.stack(expected, 1))


@pytest.mark.skipif(BEFORE_5_18, reason="older releases take no features made before the forward")
@every_model
@pytest.mark.parametrize("positions", ["keep", "engine"])
def test_prepared_inputs_give_the_same(name, positions):
    model, _, inputs = tiny_vlm(name)
    inputs = screens(model, inputs(images=BATCH))
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": matrix.placeholders(model)}
    with (
        torch.no_grad(),
        compress.attach(model, [PixelPrune(positions=positions), DivPrune()], keep=0.5) as s,
    ):
        expected = model.generate(**inputs, **settings)
        prepared = s.prepare(inputs)
        assert torch.equal(prepared.restore(model.generate(**prepared.inputs, **settings)), expected)
    assert prepared.inputs["input_ids"].shape[1] < inputs["input_ids"].shape[1]


def test_a_conversation_goes_on_with_what_was_kept():
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = screens(model, inputs(images=(1,)))
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": matrix.placeholders(model)}
    for positions in ("keep", "engine"):
        with torch.no_grad(), compress.attach(model, PixelPrune(positions=positions)):
            whole = model.generate(**inputs, **{**settings, "max_new_tokens": 6})
            first = model.generate(**inputs, **settings, return_dict_in_generate=True)
            cache = first.get("past_key_values", first.get("cache"))
            name = "cache" if "cache" in first else "past_key_values"
            ones = torch.ones_like(first.sequences)
            rest = model.generate(input_ids=first.sequences, attention_mask=ones, **{name: cache}, **settings)
        assert torch.equal(rest, whole)


# Refusals ---------------------------------------------------------------------------------------------------


def test_budgets_are_refused_where_nothing_takes_them():
    model, _, _ = tiny_vlm("qwen3_vl")
    for keep in (0.5, 8, lambda image: 4):
        with pytest.raises(ValueError, match="depends on the pixels; leave keep out"):
            compress.attach(model, PixelPrune(), keep=keep)
    with pytest.raises(ValueError, match=r"keep is 0.5, and how many patches PixelPrune keeps"):
        PixelPrune(keep=0.5)
    with compress.attach(model, PixelPrune()) as session, pytest.raises(ValueError, match="leave keep out"):
        session.keep = 0.3
    compress.attach(model, [PixelPrune(), DivPrune()], keep=0.5).detach()


@pytest.mark.parametrize(
    ("name", "reducers", "message"),
    [
        (
            "llava",
            [PixelPrune()],
            "PixelPrune cannot act in LlavaForConditionalGeneration: its CLIPVisionModel",
        ),
        ("idefics3", [PixelPrune()], "It acts in Qwen2-VL, Qwen2.5-VL, Qwen3-VL"),
        ("qwen3_vl", [PixelPrune(), ToMe()], "ToMe plans its merges for whole pictures"),
        ("qwen3_vl", [PixelPrune(), Whole()], "PixelPrune and Whole both drop patches"),
        ("qwen3_vl", [PixelPrune(), Downsample()], "Downsample encodes the whole picture again"),
    ],
)
def test_what_cannot_work_together_is_refused(name, reducers, message):
    model, _, _ = tiny_vlm(name)
    state = matrix.fingerprint(model)
    with pytest.raises((TypeError, ValueError), match=message):
        compress.attach(model, reducers)
    assert matrix.fingerprint(model) == state


@pytest.mark.parametrize("after", [4, -2, True])
def test_patches_cannot_leave_after_more_blocks_than_there_are(after):
    model, _, _ = tiny_vlm("qwen3_vl")
    with pytest.raises(ValueError, match="the tower has 3 blocks"):
        compress.attach(model, PixelPrune(after_blocks=after))


def test_engine_positions_exclude_compact_ones():
    model, _, _ = tiny_vlm("qwen3_vl")
    with pytest.raises(ValueError, match="keeps the positions of pictures"):
        compress.attach(model, [PixelPrune(positions="engine"), DivPrune()], positions="compact")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["pixel_values"].resize_(len(x["pixel_values"]), 7), "use the model's own processor"),
        (lambda x: x["image_grid_thw"].add_(2), "image_grid_thw has 3 frames|and the model's patches"),
        (lambda x: x["pixel_values"][0].fill_(torch.nan), "different pixels|NaN"),
        (lambda x: x["pixel_values"][3, :40].add_(1), "different pixels in its 2 temporal slices"),
    ],
)
def test_pixels_that_are_not_those_of_the_model_are_refused(change, message):
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = screens(model, inputs(images=(1,)))
    inputs = {key: value.clone() for key, value in inputs.items()}
    change(inputs)
    with torch.no_grad(), compress.attach(model, PixelPrune()), pytest.raises(ValueError, match=message):
        model(**inputs)


def test_pictures_of_several_frames_are_refused():
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = screens(model, inputs(images=(1,)))
    frames, height, width = inputs["image_grid_thw"][0].tolist()
    inputs["image_grid_thw"] = torch.tensor([[2 * frames, height, width]])
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1)
    with (
        torch.no_grad(),
        compress.attach(model, PixelPrune()),
        pytest.raises(ValueError, match="2 frames for"),
    ):
        model.base_model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])


@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(8), "none"])
def test_masks_of_another_form_are_refused(mask):
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = screens(model, inputs(images=(1,)))
    tokens = len(inputs["pixel_values"]) // UNIT
    mask = torch.zeros(tokens, dtype=torch.bool) if isinstance(mask, str) else mask
    with (
        torch.no_grad(),
        compress.attach(model, Whole(mask=mask)),
        pytest.raises(ValueError, match="bool mask"),
    ):
        model(**inputs)


def test_a_prompt_must_not_end_with_a_dropped_token():
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = screens(model, inputs(images=(1,)), colours=1)
    last = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
    short = {
        key: value[:, :last] for key, value in inputs.items() if value.shape == inputs["input_ids"].shape
    }
    with (
        torch.no_grad(),
        compress.attach(model, PixelPrune()),
        pytest.raises(ValueError, match="end the prompt"),
    ):
        model(**{**inputs, **short})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "spiral"}, "method is 'spiral'; it takes pred_2d, raster"),
        ({"metric": "cosine"}, "metric is 'cosine'; it takes max, mae"),
        ({"threshold": 5}, "threshold is 5; it takes pixel units"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 0.02}, "how the pixels were normalised is not known"),
        ({"metric": "exact", "threshold": 0.1}, 'metric="exact" is for threshold 0'),
        ({"method": "conncomp", "skip_ratio": 0.5}, "give a skip_ratio and align_compression=False"),
        ({"method": "conncomp", "align_compression": False}, "give a skip_ratio and"),
        ({"method": "conncomp", "align_compression": False, "skip_ratio": 2}, "share from 0 to 1"),
        ({"image_mean": (0.5,) * 3}, "give both or neither"),
        ({"positions": "compact"}, 'it takes "keep" or "engine"'),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PixelPrune(**settings)


# The processor's numbers ------------------------------------------------------------------------------------


def test_the_processor_gives_mean_and_deviation_and_must_be_the_models():
    model, processor, inputs = tiny_vlm("qwen3_vl")
    _, other, _ = tiny_vlm("qwen2_vl")  # patches of 14 pixels
    with pytest.raises(ValueError, match="patch_size is 14, and the model's is 16"):
        compress.attach(model, PixelPrune(threshold=0.1, processor=other))
    with pytest.raises(TypeError, match="without image_mean"):
        PixelPrune(threshold=0.1, processor=processor.tokenizer)
    reducer = PixelPrune(threshold=0.1, processor=processor)
    images = processor.image_processor
    assert reducer.normalisation == (tuple(images.image_mean), tuple(images.image_std))
    assert replace(reducer, threshold=0.2).normalisation == reducer.normalisation
    inputs = inputs(images=(1,))
    with torch.no_grad(), compress.attach(model, reducer):
        model(**inputs)


def test_pixels_that_were_normalised_with_other_numbers_are_noticed():
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = screens(model, inputs(images=(1,)))  # mean and deviation 0.5
    right = PixelPrune(threshold=0.02, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    with torch.no_grad(), compress.attach(model, right):
        model(**inputs)
    wide = PixelPrune(threshold=0.02, image_mean=(0.5,) * 3, image_std=(0.7,) * 3)
    with torch.no_grad(), compress.attach(model, wide), pytest.raises(ValueError, match="with other numbers"):
        model(**inputs)
    narrow = PixelPrune(threshold=0.02, image_mean=(0.5,) * 3, image_std=(0.26,) * 3)
    with torch.no_grad(), compress.attach(model, narrow), pytest.warns(UserWarning, match="in other units"):
        model(**inputs)
    grey = PixelPrune(threshold=0.02, image_mean=(0.5,), image_std=(0.5,))
    with torch.no_grad(), compress.attach(model, grey), pytest.raises(ValueError, match="3 channels"):
        model(**inputs)


def test_a_threshold_is_in_units_of_pixels():
    model, _, inputs = tiny_vlm("qwen3_vl")
    inputs = inputs(images=(1,))
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    levels = torch.tensor([100.0, 101.0, 102.0, 100.0]).repeat_interleave(UNIT)[:, None]
    inputs["pixel_values"] = ((levels / 255 - 0.5) / 0.5).expand_as(inputs["pixel_values"]).clone()

    def kept(levels):
        settings = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
        with (
            torch.no_grad(),
            compress.attach(model, PixelPrune(threshold=levels / 255, **settings)) as session,
        ):
            model(**inputs)
            return session.explain()[0].tokens.tolist()

    assert kept(0.9) == [0, 1, 2, 3]
    assert kept(1.1) == [0, 2, 3]
    assert kept(2.1) == [0]
