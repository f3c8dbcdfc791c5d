"""Downsample: the picture itself made smaller and encoded again, in every family whose tower can."""

import gc
import weakref
from functools import cache

import numpy as np
import pytest
import reducer_matrix as matrix
import torch
import torch.nn.functional as F
from oracles import BEFORE_5_18
from PIL import Image
from reducer_matrix import BATCHES, DECODING
from tiny_vlms import FIXTURES, tiny_vlm

from vistok import compress
from vistok.compress import DivPrune, Downsample, ToMe
from vistok.compress.algorithms.grid import Grid
from vistok.compress.methods.downsample import nearest_places, shrunken
from vistok.compress.report.explain import Explanation

pytestmark = pytest.mark.slow

NAMES = (*FIXTURES, "paligemma", "mistral3", "qwen2_vl", "vipllava", "gemma3")
ANY_SIZE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3")


@cache
def fixture(name):
    return tiny_vlm(name)


@pytest.fixture(params=NAMES)
def vlm(request):
    return fixture(request.param)


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param]


@pytest.fixture(params=DECODING)
def decoding(request):
    return DECODING[request.param]


@torch.no_grad()
def images_of(model, inputs, reducer=None, keep=0.5):
    """What the reducer is given of each image of a prompt, in order."""
    seen = []
    with compress.attach(model, reducer or Downsample(), keep=lambda image: seen.append(image) or keep):
        model(**inputs)
    return seen


@torch.no_grad()
def resized(pixels, height, width):
    """Pictures [P, C, H, W] at another size, without new extremes."""
    small = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return small.clamp(pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True))


def test_an_image_keeps_the_promised_count(vlm, batch, decoding):
    model, _, inputs = vlm
    given = inputs(images=batch)
    with compress.attach(model, Downsample(), keep=0.5) as session:
        logits, tokens = matrix.outputs(model, given, **decoding)
        found, reported = session.explain(), session.report()
    assert len(tokens) == len(given["input_ids"])
    assert torch.isfinite(logits).all()
    assert len(found) == sum(batch)
    for explanation, image in zip(found, reported.images, strict=True):
        promised = Downsample().retained_count(explanation.grid, 0.5)
        assert image.layers == [promised] * len(image.layers)
        assert 1 <= len(explanation.tokens) == promised <= round(0.5 * explanation.num_tokens)
        assert not explanation.grid.separators[explanation.tokens].any()


def test_keeping_everything_or_detaching_leaves_the_model_identical(vlm, batch, decoding):
    model, _, inputs = vlm
    given = inputs(images=batch)
    before, state = matrix.outputs(model, given, **decoding), matrix.fingerprint(model)
    with compress.attach(model, Downsample(), keep=1.0) as session:
        everything = matrix.outputs(model, given, **decoding)
        session.keep = 0.4
        matrix.outputs(model, given, **decoding)
    after = matrix.outputs(model, given, **decoding)
    assert all(map(torch.equal, everything, before))
    assert all(map(torch.equal, after, before))
    assert matrix.fingerprint(model) == state


@pytest.mark.skipif(BEFORE_5_18, reason="features are made once per beam")
def test_beams_share_one_smaller_picture(vlm):
    model, _, inputs = vlm
    given, seen = inputs(images=(2, 1, 0)), []
    with compress.attach(model, Downsample(), keep=lambda image: seen.append(image) or 0.5) as session:
        model.generate(**given, max_new_tokens=2, num_beams=3, do_sample=False)
        matrix.kept_rows(session, rows=3, beams=3)
    assert len(seen) == 3


def test_forward_and_generate_agree(vlm):
    model, _, inputs = vlm
    given = inputs(images=(2, 1, 0))
    with compress.attach(model, Downsample(), keep=0.5):
        logits, tokens = matrix.outputs(model, given)
    last = logits[:, -1].index_fill(1, torch.tensor(matrix.placeholders(model)), -torch.inf)
    assert torch.equal(last.argmax(-1), tokens[:, 0])


def test_the_picture_at_full_size_has_the_stock_features(vlm):
    model, _, inputs = vlm
    for image in images_of(model, inputs(images=(2, 1, 0))):
        counts = {image.num_tokens}
        if image.grid.thumbnail is not None:
            counts.add(image.grid.tokens_per_tile)
        for count in counts:
            full = shrunken(image.grid, count)
            assert full.num_tokens == count or image.grid.thumbnail is not None
            features = image.encode(full)[0]
            stock = image.features[nearest_places(image.grid, full)]
            assert torch.allclose(features, stock, atol=3e-5, rtol=0)


def test_a_row_of_a_batch_is_encoded_as_alone(vlm):
    model, _, inputs = vlm
    batched = images_of(model, inputs(images=(2, 1, 1)))
    alone = [image for row in range(3) for image in images_of(model, inputs(images=(2, 1, 1), rows=(row,)))]
    assert len(batched) == len(alone) == 4
    for together, single in zip(batched, alone, strict=True):
        small = shrunken(single.grid, max(1, single.num_tokens // 3))
        for a, b in zip(together.encode(small), single.encode(small), strict=True):
            assert torch.allclose(a, b, atol=3e-5, rtol=0)


def test_hooks_and_prepared_inputs_agree(vlm):
    """Prepared inputs carry the smaller picture's features, with those that Qwen3-VL adds inside."""
    model, _, inputs = vlm
    given = inputs(images=(1, 1))
    with compress.attach(model, Downsample(), keep=0.5) as session, torch.no_grad():
        hooked = model(**given).logits[:, -1]
        prepared = model(**session.prepare(given).inputs).logits[:, -1]
    assert torch.allclose(hooked, prepared, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava", "vipllava", "paligemma"])
def test_plain_towers_see_the_resized_picture(name):
    model, _, inputs = fixture(name)
    given = inputs(batch=1)
    (image,) = images_of(model, given)
    small = resized(given["pixel_values"], 3 * 14, 2 * 14)
    stock = model.base_model.get_image_features(small, interpolate_pos_encoding=True).pooler_output[0]
    features = image.encode(Grid.single(3, 2))[0]
    assert torch.allclose(features, stock, atol=3e-5, rtol=0)


def test_llava_next_sees_resized_tiles_without_padding_or_newlines():
    model, _, inputs = fixture("llava_next")
    given = inputs(batch=1)
    (image,) = images_of(model, given)
    small = shrunken(image.grid, 24)
    assert (small.height, small.width, small.num_tokens) == (3, 3, 24)  # of 6 × 6, two rows are padding
    core, tiles = model.base_model, resized(given["pixel_values"][0], 3 * 14, 3 * 14)
    states = core.vision_tower(tiles, interpolate_pos_encoding=True, output_hidden_states=True)
    maps = core.multi_modal_projector(states.hidden_states[core.config.vision_feature_layer][:, 1:])
    stitched = torch.cat([torch.cat(list(row.unflatten(1, (3, 3))), 1) for row in maps[1:].split(2)])
    top, bottom, left, right = small.rectangle
    expected = stitched[top:bottom, left:right].flatten(0, 1)
    assert torch.allclose(image.encode(small)[0], expected, atol=3e-5, rtol=0)
    thumbnail = image.encode(shrunken(image.grid, 9))[0]
    assert torch.allclose(thumbnail, maps[0], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["internvl", "idefics3"])
def test_towers_with_pixel_shuffle_see_resized_tiles(name):
    model, _, inputs = fixture(name)
    given = inputs(batch=1, rows=(0,), images=(1,))
    (image,) = images_of(model, given)
    tiles = given["pixel_values"] if name == "internvl" else given["pixel_values"][0]
    small = resized(tiles, 28, 28)  # one token a tile
    stock = model.base_model.get_image_features(small if name == "internvl" else small[None]).pooler_output
    stock = torch.cat([item.reshape(-1, item.shape[-1]) for item in stock])
    whole = shrunken(image.grid, 1)
    assert torch.allclose(image.encode(whole)[0], stock[-1:], atol=3e-5, rtol=0)
    if image.grid.num_tiles > 1:
        cut = shrunken(image.grid, image.num_tokens)
        ones = Grid.tiled(cut.rows, cut.cols, 1, 1)
        assert torch.allclose(image.encode(ones)[0], stock[:-1], atol=3e-5, rtol=0)


def patches_of(processor, pictures):
    """The processor's patches of normalised pictures [1, C, H, W], and their grid."""
    patcher = processor.image_processor
    patches, height, width = patcher.patchify(
        pictures, patcher.patch_size, patcher.merge_size, patcher.temporal_patch_size
    )
    return patches[0], torch.tensor([[1, height, width]])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_sees_the_resized_picture(name):
    model, processor, inputs = fixture(name)
    unit = 2 * processor.image_processor.patch_size
    random = torch.Generator().manual_seed(0)
    pictures = [torch.randn(1, 3, 3 * unit, 2 * unit, generator=random) for _ in range(2)]
    given = inputs(batch=2)
    patches, grids = zip(*(patches_of(processor, picture) for picture in pictures), strict=True)
    given["pixel_values"], given["image_grid_thw"] = torch.cat(patches), torch.cat(grids)
    visual = given["input_ids"] == model.config.image_token_id
    rows = [
        torch.cat([ids[~v], ids[v][:1].repeat(6)]) for ids, v in zip(given["input_ids"], visual, strict=True)
    ]
    length = min(map(len, rows))
    given["input_ids"] = torch.stack([row[len(row) - length :] for row in rows])
    given["input_ids"] = torch.cat([given["input_ids"], torch.full((2, 1), 5)], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["mm_token_type_ids"] = (given["input_ids"] == model.config.image_token_id).long()
    for picture, image in zip(pictures, images_of(model, given), strict=True):
        small, grid = patches_of(processor, resized(picture, 2 * unit, unit))
        stock = model.base_model.get_image_features(small, grid)
        deepstack = getattr(stock, "deepstack_features", [])
        layers = [stock.pooler_output[0], *(x if BEFORE_5_18 else x[0] for x in deepstack)]
        encoded = image.encode(Grid.single(2, 1))
        assert len(layers) == len(encoded) == (3 if name == "qwen3_vl" else 1)
        for features, expected in zip(encoded, layers, strict=True):
            assert torch.allclose(features, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_a_smaller_picture_through_the_processor_has_nearly_the_same_features(name):
    model, processor, _ = fixture(name)
    unit = 32 if name == "qwen3_vl" else 28
    y, x = np.mgrid[0:1:160j, 0:1:160j]
    picture = Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))

    def prompt(side):
        image = "[IMG]" if name == "mistral3" else "<|vision_start|> <|image_pad|> <|vision_end|>"
        size = (side * unit, side * unit)
        text = f"USER : {image} describe ASSISTANT :"
        return processor(text=[text], images=[picture.resize(size, Image.BICUBIC)], return_tensors="pt")

    (large,), (small,) = images_of(model, prompt(4)), images_of(model, prompt(3))
    assert (large.num_tokens, small.num_tokens) == (16, 9)
    features = large.encode(shrunken(large.grid, 9))[0]
    assert F.cosine_similarity(features, small.features).min() > 0.99


def test_qwen3_adds_the_smaller_pictures_features_inside():
    model, _, inputs = fixture("qwen3_vl")
    given = inputs(batch=2)
    with compress.attach(model, Downsample(), keep=0.5) as session, torch.no_grad():
        output = session.prepare(given).inputs["mm_encoder_outputs"]["image"]
    for number, image in enumerate(images_of(model, given)):
        small = shrunken(image.grid, round(image.num_tokens / 2))
        order = nearest_places(image.grid, small).argsort()
        expected = [layer[order] for layer in image.encode(small)]
        found = [output.pooler_output[number], *[layer[number] for layer in output.deepstack_features]]
        assert len(found) == len(expected) == 3
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video_shrink_alike(name):
    model, _, inputs = fixture(name)
    given = inputs(videos=(1,))
    (video,) = images_of(model, given)
    frames = video.grid.cols
    assert frames > 1
    assert torch.allclose(video.encode(video.grid)[0], video.features, atol=3e-5, rtol=0)
    with compress.attach(model, Downsample(), keep=0.5) as session:
        matrix.outputs(model, given)
        (explanation,) = session.explain()
    shown = explanation.tile.bincount(minlength=frames)
    assert len(shown.unique()) == 1
    assert int(shown.sum()) == Downsample().retained_count(video.grid, 0.5)
    with pytest.raises(ValueError, match=f"1 tokens cannot show {frames} tiles or frames"):
        Downsample().retained_count(video.grid, 1)


@pytest.mark.parametrize(("name", "prompt"), [("idefics3", {"images": (1,)}), ("qwen3_vl", {"videos": (1,)})])
def test_tokens_of_several_tiles_enter_in_the_prompts_order(name, prompt):
    model, _, inputs = fixture(name)
    (image,) = images_of(model, inputs(**prompt))
    small = shrunken(image.grid, image.num_tokens // 2)
    assert len(small.tile.unique()) > 1
    places = nearest_places(image.grid, small)
    selection = Downsample().reduce(image, image.num_tokens // 2)
    assert torch.equal(selection.kept, places.unique(sorted=True))
    entered = [selection.values, *(selection.deepstack or [])]
    for values, encoded in zip(entered, image.encode(small), strict=True):
        for place, features in zip(places, encoded, strict=True):
            assert torch.equal(values[selection.kept == place][0], features)


@pytest.mark.parametrize("name", ["llava_onevision", "mllama", "blip2", "llama4"])
def test_other_families_are_refused_by_name(name):
    model, _, _ = fixture(name)
    with pytest.raises(TypeError, match=type(model).__name__):
        compress.attach(model, Downsample())
    assert "get_image_features" not in vars(model.base_model)


@pytest.mark.skipif(BEFORE_5_18, reason="features of a video come frame by frame")
def test_a_video_with_pooled_frames_is_refused():
    model, _, inputs = fixture("llava_next_video")
    with (
        compress.attach(model, Downsample(), keep=0.5),
        pytest.raises(TypeError, match="pools its frames"),
        torch.no_grad(),
    ):
        model(**inputs(videos=(1,)))


def test_merging_inside_the_tower_is_refused_beside_it():
    model, _, inputs = fixture("llava")
    with (
        compress.attach(model, [ToMe(r=2), Downsample(keep=0.5)]),
        pytest.raises(ValueError, match="merge inside the tower"),
        torch.no_grad(),
    ):
        model(**inputs(batch=1))


def test_features_without_a_picture_are_refused():
    model, _, inputs = fixture("llava")
    given = inputs(batch=1)
    with torch.no_grad():
        given["mm_encoder_outputs"] = {
            "image": model.base_model.get_image_features(given.pop("pixel_values"))
        }
    with (
        compress.attach(model, Downsample(), keep=0.5),
        pytest.raises(ValueError, match="no picture to shrink"),
        torch.no_grad(),
    ):
        model(**given)


@pytest.mark.parametrize("reducer", [DivPrune(), Downsample()])
def test_pictures_are_kept_only_for_reducers_that_want_them(reducer):
    model, _, inputs = fixture("llava")
    given = inputs(batch=1)
    picture = weakref.ref(given["pixel_values"])
    with compress.attach(model, reducer, keep=0.5), torch.no_grad():
        features = model.base_model.get_image_features(given["pixel_values"])
        del given
        gc.collect()
        assert len(features.pooler_output) == 1
        assert (picture() is not None) == reducer.wants_pixels


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, (1, 1)), (2, (1, 2)), (64, (8, 8)), (140, (11, 12)), (192, (13, 14)), (576, (24, 24))],
)
def test_a_square_picture_stays_nearly_square(count, size):
    small = shrunken(Grid.single(24, 24), count)
    assert (small.height, small.width) == size
    assert Downsample().retained_count(576, count) == size[0] * size[1]


def test_tiles_that_show_less_than_the_thumbnail_give_way_to_it():
    padded = Grid.anyres((368, 22), [(672, 336)], 24, tile_pixels=336)  # 96 of 1152 places are not padding
    assert shrunken(padded, padded.num_tokens).num_tokens == 576


def test_places_are_distinct_and_show_the_same_part_of_the_picture():
    random = torch.Generator().manual_seed(0)
    pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    for _ in range(60):
        height, width, tall, wide = torch.randint(1, 1200, (4,), generator=random).tolist()
        for grid in (
            Grid.single(height // 40 + 1, width // 40 + 1),
            Grid.anyres((tall, wide), pinpoints, 24, tile_pixels=336),
            Grid.tiled(1, tall // 300 + 1, 16, 16, thumbnail="last"),
        ):
            for budget in (1, 0.1, 0.5, grid.num_tokens):
                count = budget if isinstance(budget, int) else max(1, round(budget * grid.num_tokens))
                small = shrunken(grid, count)
                places = nearest_places(grid, small)
                assert len(places) == len(places.unique()) == small.num_tokens <= count
                assert small.num_tokens == Downsample().retained_count(grid, budget)
                assert not grid.separators[places].any()
                boxes = Explanation(0, 0, grid.num_tokens, places, grid).boxes
                every = torch.arange(small.num_tokens)
                top, left, bottom, right = Explanation(0, 0, len(every), every, small).boxes.unbind(1)
                centres = torch.stack([top + bottom, left + right], 1) / 2
                assert (boxes[:, :2] <= centres + 1e-5).all()
                assert (centres <= boxes[:, 2:] + 1e-5).all()


def test_select_spreads_exactly_the_count():
    mask = Downsample().select(torch.randn(50, 8), None, 7)
    assert mask.sum() == 7
    assert mask[0] and mask[-1]
