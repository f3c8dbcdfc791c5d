"""M3: nested means of square blocks, merged with other tiles as the original does, and attached to models."""

from functools import cache

import pytest
import reducer_matrix as matrix
import torch
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import M3
from vistok.compress.algorithms.grid import Grid
from vistok.compress.families import frames_grid
from vistok.compress.reducer import Image
from vistok.compress.trained.m3 import merged_tiles, nested, nested_pool, nested_scales
from vistok.compress.trained.tiles import resized

NEWLINE = torch.full((3,), -7.0)
MODELS = ("llava", "llava_next", "internvl", "idefics3")


def by_loops(tokens, height, width, side):
    """Means of square blocks of [N, C], one block after the other."""
    maps = tokens.view(height, width, -1)
    blocks = [
        maps[row : row + side, col : col + side].flatten(0, 1).mean(0)
        for row in range(0, height - side + 1, side)
        for col in range(0, width - side + 1, side)
    ]
    return torch.stack(blocks)


def token_map(tiles, height, width):
    """Tokens [tiles, N, 3] of which each is (tile, row, column)."""
    index = torch.arange(height * width)
    place = torch.stack([index // width, index % width], 1).float()
    return torch.stack([torch.cat([torch.full((len(index), 1), float(t)), place], 1) for t in range(tiles)])


# Pooling ----------------------------------------------------------------------------------------------------


def test_the_scales_of_a_map_are_those_that_square_blocks_give():
    assert nested_scales(24, 24) == (576, 144, 64, 36, 16, 9, 4, 1)
    assert nested_scales(27, 27) == (729, 81, 9, 1)
    assert nested_scales(6, 9) == (54, 6)
    assert nested_scales(5, 7) == (35,)


@pytest.mark.parametrize(("height", "width", "scale", "side"), [(6, 6, 9, 2), (6, 9, 6, 3), (4, 4, 1, 4)])
def test_pooling_averages_blocks_row_by_row(height, width, scale, side):
    tokens = torch.randn(2, 5, height * width, 3)
    pooled = nested_pool(tokens, scale, size=(height, width))
    assert pooled.shape == (2, 5, scale, 3)
    torch.testing.assert_close(pooled[1, 4], by_loops(tokens[1, 4], height, width, side))


def test_coarse_tokens_are_means_of_fine_ones():
    tokens = torch.randn(1, 576, 4)
    whole, fine, coarse = nested(tokens, (576, 144, 36))
    assert torch.equal(whole, tokens)
    torch.testing.assert_close(nested_pool(fine, 36), coarse)


@pytest.mark.parametrize(
    ("scale", "actual"), [(100, 144), (256, 576), (25, 36), (300, 576), (7, 4), (4, 4), (576, 576)]
)
def test_scales_that_round_are_refused_unless_asked_for(scale, actual):
    tokens = torch.randn(1, 576, 2)
    assert nested_pool(tokens, scale, exact=False).shape[1] == actual
    if scale == actual:
        assert nested_pool(tokens, scale).shape[1] == actual
    else:
        with pytest.raises(ValueError, match=rf"scale is {scale}, which rounds to .* = {actual} tokens"):
            nested_pool(tokens, scale)


def test_rounding_may_leave_out_rows_which_counts_as_inexact():
    tokens = torch.randn(1, 25, 2)
    assert nested_pool(tokens, 4, exact=False).shape[1] == 4
    torch.testing.assert_close(nested_pool(tokens, 4, exact=False)[0], by_loops(tokens[0], 5, 5, 2))
    with pytest.raises(ValueError, match="give one of 25, 1"):
        nested_pool(tokens, 4)


@pytest.mark.parametrize("scale", [0, -1, 577])
def test_scales_outside_the_map_are_refused(scale):
    with pytest.raises(ValueError, match="takes 1 to 576"):
        nested_pool(torch.randn(1, 576, 2), scale, exact=False)


def test_maps_that_are_not_square_need_their_size():
    with pytest.raises(ValueError, match=r"give the size of the map"):
        nested_pool(torch.randn(1, 6, 2), 1)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_of_any_size_and_precision_are_pooled(batch, dtype):
    pooled = nested_pool(torch.ones(batch, 36, 8, dtype=dtype), 9)
    assert pooled.shape == (batch, 9, 8) and pooled.dtype == dtype


# Tiles ------------------------------------------------------------------------------------------------------


def test_tiles_are_stitched_after_the_whole_picture():
    tiles = token_map(5, 2, 2)
    tokens = merged_tiles(tiles, 2, 2, newline=NEWLINE)
    rows = [
        torch.stack([tiles[1 + 2 * (row // 2) + col // 2, row % 2 * 2 + col % 2] for col in range(4)])
        for row in range(4)
    ]
    expected = [tiles[0], *(part for row in rows for part in (row, NEWLINE[None]))]
    assert torch.equal(tokens, torch.cat(expected))
    assert torch.equal(merged_tiles(tiles, 2, 2), torch.cat([tiles[0], *rows]))


def test_padding_is_cut_away_by_the_size_of_the_pooled_map():
    tiles = token_map(5, 6, 6)
    # 100 × 50 pixels on a square canvas: half of the rows show the picture.
    tokens = merged_tiles(tiles, 2, 2, image_size=(50, 100), newline=NEWLINE)
    assert len(tokens) == 36 + 6 * (12 + 1)
    assert tokens[36].tolist() == [1, 3, 0]
    # Of 2 × 2 tokens one row is to go, of which half is nothing.
    tokens = merged_tiles(nested_pool(tiles, 1), 2, 2, image_size=(50, 100), newline=NEWLINE)
    assert len(tokens) == 1 + 2 * (2 + 1)


def test_a_picture_of_one_tile_ends_in_one_newline():
    tiles = token_map(1, 3, 3)
    assert torch.equal(merged_tiles(tiles, 1, 1, newline=NEWLINE), torch.cat([tiles[0], NEWLINE[None]]))


def test_a_number_of_tiles_that_is_not_the_grids_is_refused():
    with pytest.raises(ValueError, match="2 × 2 tiles and the whole are 5"):
        merged_tiles(token_map(4, 2, 2), 2, 2)


def test_layouts_of_tiles_one_after_the_other_stay_so():
    video = frames_grid(3, 4, 4, video=True, separators=1)
    smaller = resized(video, 2, 2)
    assert smaller.tile.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1]
    assert smaller.index.tolist() == [0, 1, 2, 3] * 3 + [-1]
    assert smaller.video and (smaller.height, smaller.width) == (2, 2)


def test_stitched_layouts_are_stitched_again():
    grid = Grid.tiled(1, 2, 4, 4, newline=True)
    smaller = resized(grid, 2, 2)
    assert smaller.tile.tolist() == [0, 0, 1, 1, -1] * 2


# Attached ---------------------------------------------------------------------------------------------------


@cache
def fixture(name):
    return tiny_vlm(name)


@torch.no_grad()
def reduced(name, reducer, keep=0.5, positions="keep", **which):
    """What an attached M3 is given of each image, and what it returns."""
    model, _, inputs = fixture(name)
    calls, reduce = [], reducer.reduce

    def watched(image, budget):
        calls.append((image, reduce(image, budget)))
        return calls[-1][1]

    reducer.reduce = watched
    with compress.attach(model, reducer, keep=keep, positions=positions):
        model(**inputs(**which or {"images": (2, 1)}))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_an_image_keeps_the_count_that_layout_and_budget_promise(name):
    for keep in (0.3, 0.6, 12):
        for image, selection in reduced(name, M3(), keep):
            count = M3().retained_count(image.grid, keep)
            assert len(selection.kept) == len(selection.values) == count <= image.num_tokens
            assert torch.equal(selection.kept, selection.kept.unique())
            assert M3().retained_count(image.grid, 1.0) == image.num_tokens


@pytest.mark.parametrize("name", MODELS)
def test_everything_that_reducers_must_satisfy(name):
    model, _, inputs = fixture(name)
    matrix.whole(model, inputs(images=(2, 1, 0)), M3())


def test_a_llava_model_gets_the_means_in_raster_order():
    for image, selection in reduced("llava", M3(), 0.25):
        side = image.grid.height // 2
        torch.testing.assert_close(
            selection.values, by_loops(image.features, image.grid.height, image.grid.width, 2)
        )
        assert len(selection.values) == side**2


def test_padding_counts_in_the_means_at_its_edge():
    """What an attached M3 keeps of tiles with padding is what M3 makes of the whole tiles."""
    model = fixture("llava_next")[0]
    calls = reduced("llava_next", M3(), 0.25)
    assert any(bool((image.grid.place < 0).any()) for image, _ in calls)
    for image, selection in calls:
        grid = image.grid
        tiles = model.model.multi_modal_projector(image.states[:, 1:])
        pooled = nested_pool(tiles, grid.tokens_per_tile // 4)
        newline = model.model.image_newline
        expected = merged_tiles(pooled, grid.rows, grid.cols, image_size=grid.image_size, newline=newline)
        torch.testing.assert_close(selection.values, expected)


def test_without_the_towers_states_padding_is_refused():
    grid = Grid.tiled(2, 2, 4, 4, thumbnail="first", image_size=(50, 100), newline=True)
    image = Image(torch.randn(grid.num_tokens, 8), torch.zeros(0, 8), grid)
    with pytest.raises(ValueError, match="padding around the image was cut away"):
        M3().reduce(image, 0.25)


def test_a_scale_stands_for_a_budget_and_rounds_only_when_asked():
    image = Image(torch.randn(36, 8), torch.zeros(0, 8), Grid.single(6, 6))
    assert len(M3(scale=4).reduce(image, None).kept) == 4
    assert len(M3(scale=8, exact=False).reduce(image, None).kept) == 9
    with pytest.raises(ValueError, match="which rounds to 3 × 3 = 9 tokens"):
        M3(scale=8).reduce(image, None)
    with pytest.raises(ValueError, match="give one of them"):
        M3(scale=4).reduce(image, 0.25)


@pytest.mark.parametrize(
    ("keep", "count"), [(0.9, 9), (0.25, 9), (0.24, 4), (0.1, 1), (0.001, 1), (35, 9), (8, 4), (1, 1)]
)
def test_a_budget_is_the_finest_scale_within_it(keep, count):
    grid = Grid.single(6, 6)
    assert M3().retained_count(grid, keep) == count


def test_tiles_without_square_blocks_and_images_without_layout_are_refused():
    features, text = torch.randn(6, 8), torch.zeros(0, 8)
    with pytest.raises(ValueError, match="2 × 3 tokens divide into no square blocks"):
        M3().reduce(Image(features, text, Grid.single(2, 3)), 0.5)
    with pytest.raises(ValueError, match="the layout of this image's 6 tokens is not known"):
        M3().reduce(Image(features, text), 0.5)


def test_kept_places_lie_in_the_middle_of_their_blocks():
    image = Image(torch.randn(36, 8), torch.zeros(0, 8), Grid.single(6, 6))
    assert M3().reduce(image, 4).kept.tolist() == [7, 10, 25, 28]


def test_gradients_reach_what_is_averaged():
    tokens = torch.randn(1, 36, 4, requires_grad=True)
    nested_pool(tokens, 9).sum().backward()
    torch.testing.assert_close(tokens.grad, torch.full_like(tokens, 0.25))
