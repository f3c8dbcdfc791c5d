"""Token-Shuffle: the order of tokens in windows, and a causal model that predicts windows."""

import json

import pytest
import torch
import torch.nn.functional as F
from paths import GOLDEN
from safetensors.torch import load_file, save_file

from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.nn.token_shuffle import TokenShuffle, shuffle, unshuffle

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.mark.parametrize(
    ("grid", "window"), [((2, 2), 2), ((4, 6), 2), ((6, 3), 3), ((3, 5), 1), ((2, 8), 2)]
)
def test_each_window_holds_its_tokens_row_by_row(grid, window):
    height, width = grid
    tokens = torch.rand(2, height * width, 3)
    merged = shuffle(tokens, grid, window)
    for i in range(height // window):
        for j in range(width // window):
            for p in range(window):
                for q in range(window):
                    part = merged[:, i * (width // window) + j].unflatten(1, (window * window, 3))
                    source = tokens[:, (i * window + p) * width + j * window + q]
                    assert torch.equal(part[:, p * window + q], source)
    assert torch.equal(unshuffle(merged, grid, window), tokens)


def test_a_window_of_1_changes_nothing():
    tokens = torch.rand(2, 15, 3)
    assert torch.equal(shuffle(tokens, (3, 5), 1), tokens)


@pytest.mark.parametrize("function", [shuffle, unshuffle])
@pytest.mark.parametrize(("grid", "window"), [((3, 4), 2), ((4, 3), 2), ((2, 2), 0), ((0, 2), 1)])
def test_grids_that_windows_do_not_fill_are_refused(function, grid, window):
    with pytest.raises(ValueError, match=r"does not divide into windows of .* multiples of the window"):
        function(torch.rand(1, grid[0] * grid[1], 4), grid, window)


def test_tokens_of_another_number_are_refused():
    with pytest.raises(
        ValueError, match=r"tokens have shape \[1, 15, 4\]; a grid of 4 × 4 takes \[B, 16, C\]"
    ):
        shuffle(torch.rand(1, 15, 4), (4, 4), 2)
    with pytest.raises(ValueError, match=r"merged tokens have shape \[1, 4, 6\]; .* takes \[B, 4, 4 · C\]"):
        unshuffle(torch.rand(1, 4, 6), (4, 4), 2)


@pytest.mark.parametrize("arguments", [(6, 2), (0, 1), (8, 0), (8, 2, -1)])
def test_sizes_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ValueError, match=r"the width is a multiple of window²"):
        TokenShuffle(*arguments)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ends_keep_the_width_and_windows_divide_the_positions(batch, dtype):
    model = TokenShuffle(18, window=3, blocks=1).to(dtype)
    merged = model.merge(torch.rand(batch, 36, 18, dtype=dtype), (6, 6))
    assert merged.shape == (batch, 4, 18) and merged.dtype == dtype
    assert model.split(merged, (6, 6)).shape == (batch, 36, 18)


def test_logits_of_a_window_do_not_depend_on_it_or_later_ones():
    torch.manual_seed(0)
    grid, dim = (4, 6), 16
    model, start = TokenShuffle(dim).eval(), torch.randn(1, 1, dim)
    tokens = torch.randn(1, 24, dim)

    def outputs(tokens):
        merged = model.merge(tokens, grid)
        rows = torch.cat([start, merged[:, :-1]], 1)
        return model.split(F.scaled_dot_product_attention(rows, rows, rows, is_causal=True), grid)

    plain, windows = outputs(tokens), shuffle(torch.arange(24)[None, :, None], grid, 2)[0]
    for window, places in enumerate(windows):
        other = tokens.clone()
        other[:, places] += 1
        same = [torch.allclose(outputs(other)[:, w], plain[:, w], atol=1e-6) for w in windows]
        assert same == [w <= window for w in range(len(windows))]


def rewritten(folder, change):
    """The recorded case with its json and tensors changed."""
    path = GOLDEN / "paper_token_shuffle.json"
    data, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    change(data, tensors)
    (folder / "case.json").write_text(json.dumps(data))
    save_file(tensors, folder / "case.safetensors")
    return folder / "case.json"


@pytest.mark.parametrize("tensor", ["shuffled_2", "order_3", "composed_in", "composed_out"])
def test_a_changed_recording_is_a_miss(tmp_path, tensor):
    def change(data, tensors):
        tensors[tensor].view(-1)[-1] += 1

    assert [row.name for row in verify(rewritten(tmp_path, change)) if not row.passed] == [tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("cases"), "config has cases as None; it takes sizes by name"),
        (lambda config: config.update(composed=[]), r"config has composed as \[\]; it takes sizes by name"),
        (lambda config: config["cases"][0].update(s=0), "s is 0; it takes a whole number"),
        (lambda config: config["cases"][1].update(s=3), "does not divide into windows of 3 × 3"),
        (lambda config: config["composed"].update(d=18), "the width is a multiple of window²"),
    ],
)
def test_cases_that_cannot_be_run_say_why(tmp_path, change, message):
    with pytest.raises(CannotBuild, match=message):
        verify(rewritten(tmp_path, lambda data, _: change(data["config"])))
