"""Kept tokens whose positions are spread anew over the extent of their image."""

import re

import pytest
import torch
from bare_vlms import bare_vlm
from hypothesis import given
from hypothesis import strategies as st
from layer_cut import Cut
from oracles import BEFORE_5_18, decoder, real_tokens, visual_tokens
from reducer_matrix import kept_rows, outputs, placeholders
from tiny_vlms import tiny_vlm

from vistok import compress
from vistok.compress import H2O, FastV, KeyNorm, Random, ToMe
from vistok.compress.algorithms.spreading import even_places, spread_places

ONE_PLANE, PLANES = ("llava", "llava_next", "idefics3"), ("qwen2_5_vl", "qwen3_vl")


# The algorithm ----------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data())
def test_even_places_rise_reach_both_ends_and_have_gaps_that_differ_by_one(total, data):
    count = data.draw(st.integers(1, total))
    places = even_places(count, total)
    gaps = places.diff()
    assert len(places) == count
    if count == 1:
        assert places.tolist() == [(total - 1) // 2]
    else:
        assert places[0] == 0 and places[-1] == total - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_places_on_a_grid_rise_and_fill_evenly_spaced_rows(lines, width, data):
    count = data.draw(st.integers(1, lines * width))
    places = spread_places(count, lines, width)
    assert len(places) == count and (places.diff() > 0).all()
    assert int(places[0]) >= 0 and int(places[-1]) < lines * width
    rows, per_row = (places // width).unique(return_counts=True)
    assert per_row.max() - per_row.min() <= 1
    assert torch.equal(rows, even_places(len(rows), lines))
    for row in rows:
        columns = places[places // width == row] % width
        assert torch.equal(columns, even_places(len(columns), width))


def test_a_quarter_of_a_square_is_a_square_of_half_the_side():
    assert spread_places(4, 4, 4).tolist() == [0, 3, 12, 15]
    assert spread_places(9, 5, 5).tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert spread_places(16, 4, 4).tolist() == list(range(16))
    assert spread_places(3, 1, 9).tolist() == [0, 4, 8]


@pytest.mark.parametrize("count", [0, 7])
def test_more_tokens_than_places_are_refused(count):
    with pytest.raises(ValueError, match="2 × 3 places; give 1 to 6"):
        spread_places(count, 2, 3)


# In models --------------------------------------------------------------------------------------------------


class PositionsOfCalls:
    """Records what every call of the language model and of its rotations gets, as stock code sees it."""

    def __init__(self, model):
        self.entering, self.rotated = [], []
        lm = decoder(model)
        self.handles = [
            lm.register_forward_pre_hook(
                lambda module, args, kwargs: self.entering.append(kwargs["position_ids"]), with_kwargs=True
            ),
            lm.rotary_emb.register_forward_hook(self._rotation, with_kwargs=True),
        ]

    def _rotation(self, module, args, kwargs, output):
        self.rotated.append(args[1] if len(args) > 1 else kwargs["position_ids"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def stock_positions(model, inputs):
    """Position ids of the whole prompt, [B, L] or [planes, B, L], as stock code makes them."""
    with torch.no_grad(), PositionsOfCalls(model) as calls:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    batch, length = inputs["input_ids"].shape
    positions = calls.entering[0]
    if positions is None:
        positions = torch.arange(length)[None]
    return positions.expand(*positions.shape[:-2], batch, length)


def expected_positions(whole, row, visual, kept):
    """The positions of one row's kept tokens by plain loops: a line for one plane, a grid for several."""
    result = []
    place = 0
    length = whole.shape[-1]
    while place < length:
        if not visual[place]:
            result.append(whole[..., row, place])
            place += 1
            continue
        end = place
        while end < length and visual[end]:
            end += 1
        count = int(kept[place:end].sum())
        cells = [whole[..., row, i] for i in range(place, end)]
        if count == len(cells):
            result += cells
        elif count and whole.ndim == 2:
            result += [cells[i] for i in evenly(count, len(cells))]
        elif count:
            lines = len({tuple(cell[-3:-1].tolist()) for cell in cells})
            width = len(cells) // lines
            rows = max(-(-count // width), min(round(lines * (count / len(cells)) ** 0.5), count), 1)
            sizes = [sum(token * rows // count == number for token in range(count)) for number in range(rows)]
            for number, line in enumerate(evenly(rows, lines)):
                result += [cells[line * width + column] for column in evenly(sizes[number], width)]
        place = end
    return torch.stack(result, -1)


def evenly(count, total):
    """Numbers out of 0 … total - 1 with even gaps, half rounded up."""
    if count == 1:
        return [(total - 1) // 2]
    return [int(i * (total - 1) / (count - 1) + 0.5) for i in range(count)]


def rotary_part(positions):
    """Without the plane that counts text, which nothing rotates by."""
    return positions[-3:] if positions.ndim > 1 else positions


@pytest.mark.parametrize("keep", [0.25, 0.6, 1])
@pytest.mark.parametrize("name", ONE_PLANE + PLANES)
def test_features_stand_at_evenly_spread_positions(name, keep):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(2, 1, 0))
    whole = stock_positions(model, inputs)
    visual, real = visual_tokens(model, inputs), real_tokens(inputs)
    with torch.no_grad(), compress.attach(model, Random(), keep=keep, positions="spread") as session:
        with PositionsOfCalls(model) as calls:
            model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=placeholders(model))
        kept = kept_rows(session, len(real))
    entering = calls.entering[0]
    for row in range(len(real)):
        stays = real[row].clone()
        stays[visual[row]] = kept[row]
        hidden = visual[row] & real[row]
        expected = expected_positions(whole[..., real[row]], row, hidden[real[row]], stays[real[row]])
        result = entering[..., row, -int(stays.sum()) :]
        assert torch.equal(rotary_part(result), rotary_part(expected))
    # What is generated continues the positions of the whole prompt.
    following = whole[..., -1] + 1
    assert torch.equal(rotary_part(calls.entering[1][..., 0]), rotary_part(following))


@pytest.mark.parametrize("reducer", [Cut(k=1), FastV(k=2)], ids=["Cut", "FastV"])
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl", "qwen3_vl"))
def test_layers_after_a_cut_rotate_by_evenly_spread_positions(name, reducer):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(2, 1))
    whole = stock_positions(model, inputs)
    visual, real = visual_tokens(model, inputs), real_tokens(inputs)
    with torch.no_grad(), compress.attach(model, reducer, keep=0.5, positions="spread") as session:
        with PositionsOfCalls(model) as calls:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=placeholders(model))
        kept = kept_rows(session, 2, layer=-1)
    assert torch.equal(calls.entering[0], whole) or torch.equal(rotary_part(calls.entering[0]), whole[-3:])
    # The language model rotates once for all layers, and the session once more after the cut.
    after = calls.rotated[1]
    for row in range(2):
        stays = real[row].clone()
        stays[visual[row]] = kept[row]
        expected = expected_positions(
            whole[..., real[row]], row, (visual[row] & real[row])[real[row]], stays[real[row]]
        )
        assert torch.equal(after[..., row, -int(stays.sum()) :], rotary_part(expected))
    assert torch.equal(rotary_part(calls.entering[1][..., 0]), rotary_part(whole[..., -1] + 1))


COMBINATIONS = [[Random()], [Cut(k=1)], [Random(), Cut(k=2)], [Random(), KeyNorm()], [Cut(k=1), Cut(k=2)]]


@torch.no_grad()
@pytest.mark.parametrize("reducers", COMBINATIONS, ids=str)
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_everything_kept_is_exact_and_detaching_leaves_nothing(name, reducers):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(2, 1))
    before = outputs(model, inputs)
    with compress.attach(model, reducers, keep=1.0, positions="spread"):
        everything = outputs(model, inputs)
    with compress.attach(model, reducers, keep=0.5):
        kept = outputs(model, inputs)
    with compress.attach(model, reducers, keep=0.5, positions="spread"):
        spread = outputs(model, inputs)
    assert all(map(torch.equal, everything, before))
    assert all(map(torch.equal, outputs(model, inputs), before))
    assert not torch.equal(spread[0], kept[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_a_second_cut_spreads_over_the_extent_of_the_whole_image(name):
    model, _, inputs = tiny_vlm(name)
    inputs = inputs(images=(1,))
    whole = stock_positions(model, inputs)
    visual = visual_tokens(model, inputs)[0]
    settings = {"max_new_tokens": 1, "do_sample": False, "suppress_tokens": placeholders(model)}
    session = compress.attach(model, [Random(), Cut(k=2)], keep=0.5, positions="spread")
    with session, PositionsOfCalls(model) as calls:
        model.generate(**inputs, **settings)
        kept = kept_rows(session, 1, layer=-1)[0]
    stays = torch.ones_like(visual)
    stays[visual] = kept
    expected = expected_positions(whole, 0, visual, stays)
    assert torch.equal(calls.rotated[1][..., 0, :], rotary_part(expected))


@torch.no_grad()
def test_prepared_inputs_hold_the_same_positions():
    if BEFORE_5_18:
        pytest.skip("no prepared inputs before 5.18")
    for name in ("llava", "qwen2_5_vl"):
        model, _, inputs = tiny_vlm(name)
        inputs = inputs(images=(1,))
        settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": placeholders(model)}
        with compress.attach(model, Random(), keep=0.5, positions="spread") as session:
            expected = model.generate(**inputs, **settings)
            prepared = session.prepare(inputs)
        result = prepared.restore(model.generate(**prepared.inputs, **settings))
        assert torch.equal(result, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))
def test_beams_and_single_rows_get_the_same_positions(name):
    model, _, inputs = tiny_vlm(name)
    batch, alone = inputs(images=(2, 1)), inputs(images=(2, 1), rows=(1,))
    with compress.attach(model, Random(), keep=0.5, positions="spread"):
        _, together = outputs(model, batch, num_beams=3)
        _, single = outputs(model, alone, num_beams=3)
    assert torch.equal(together[1], single[0])


# Where it cannot apply --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reducer", [KeyNorm(), H2O()], ids=["KeyNorm", "H2O"])
def test_caches_alone_have_no_positions_to_spread(reducer):
    model, _, _ = tiny_vlm("llava")
    message = f"{type(reducer).__name__} drops no token before its position is used"
    with pytest.raises(ValueError, match=message):
        compress.attach(model, reducer, keep=0.5, positions="spread")


def test_models_without_visual_tokens_in_the_prompt_are_refused():
    for name in ("blip2", "mllama"):
        model, _, _ = tiny_vlm(name)
        with pytest.raises(ValueError, match=r"spread.* of which \w+ForConditionalGeneration has none"):
            compress.attach(model, Random(), keep=0.5, positions="spread")
        compress.attach(model, Random(), keep=0.5).detach()  # nothing is left behind
    tower = tiny_vlm("llava")[0].model.vision_tower
    with pytest.raises(ValueError, match="spread"):
        compress.attach(tower, ToMe(), keep=0.5, positions="spread")


def test_positions_that_are_not_those_of_a_grid_are_refused(monkeypatch):
    model, inputs = bare_vlm("glm4v")
    core = model.model
    stock = core.get_rope_index

    def shuffled(*args, **kwargs):
        positions, deltas = stock(*args, **kwargs)
        positions = positions.clone()
        positions[2, :, 4] += 7
        return positions, deltas

    monkeypatch.setattr(core, "get_rope_index", shuffled)
    message = r"positions that Glm4vForConditionalGeneration gives to an image of 4 tokens are not"
    session = compress.attach(model, Random(), keep=0.5, positions="spread")
    with torch.no_grad(), session, pytest.raises(ValueError, match=message):
        model(**inputs)


def test_an_unknown_word_is_refused_with_those_that_are_accepted():
    accepted = re.escape('it takes "keep", "compact", "spread" or "paper"')
    with pytest.raises(ValueError, match=f"positions is 'even'; {accepted}"):
        compress.attach(tiny_vlm("llava")[0], Random(), positions="even")
