"""Lengths against difficulty: figures are those of the decoded images, and fixed lengths are refused."""

import json
import math

import pytest
import torch
from tiny_tokenizers import shared

import vistok
from vistok import cli
from vistok.eval.tasks.lengths import Lengths, jpeg_sizes, measure

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture(scope="module")
def plain_and_busy():
    """Eight pictures [8, 3, 128, 128], each busier than the one before: noise of a growing share."""
    noise = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return 0.5 + (noise - 0.5) * torch.linspace(0.05, 0.6, 8).view(8, 1, 1, 1)


def test_busier_pictures_get_more_tokens_and_the_figures_are_of_what_decodes(plain_and_busy):
    tokenizer = vistok.load("vistok-mini")
    (found,) = measure(tokenizer, plain_and_busy, [24.0])
    again = tokenizer.encode(plain_and_busy, target_psnr=24.0).tokens
    decoded = tokenizer.decode(again)
    assert torch.equal(found.lengths, again.lengths)
    torch.testing.assert_close(found.error, (decoded - plain_and_busy).abs().mean((1, 2, 3)))
    assert found.correlation > 0.5
    assert jpeg_sizes(plain_and_busy) == sorted(jpeg_sizes(plain_and_busy))


def test_equal_lengths_have_no_correlation_and_say_so(plain_and_busy):
    (found,) = measure(vistok.load("vistok-mini"), plain_and_busy, [1.0])
    assert math.isnan(found.correlation) and found.row()[-1] == "all lengths equal"
    assert found.record()["rank_correlation"] is None


def test_an_adaptive_tokenizer_is_asked_for_an_error():
    tokenizer = shared("karl-vae")
    images = torch.rand(3, 3, tokenizer.image_size, tokenizer.image_size)
    found = measure(tokenizer, images, [0.05, 0.2])
    assert [each.asked for each in found] == ["error 0.05", "error 0.2"]
    assert torch.equal(found[1].lengths, tokenizer.encode(images, target=0.2).lengths)


def test_fixed_lengths_and_single_images_are_refused(plain_and_busy):
    with pytest.raises(ValueError, match=r"gives every image .* tokens"):
        measure(shared("titok-vq"), torch.rand(2, 3, 32, 32), [20.0])
    with pytest.raises(ValueError, match="cannot be ranked"):
        measure(vistok.load("vistok-mini"), plain_and_busy[:1], [20.0])


def test_the_command_ranks_held_out_scenes(tmp_path, monkeypatch, capsys):
    command = ["vistok", "eval", "lengths", "--scenes", "6", "--target", "14"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "lengths.json")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "6 scenes of seed 1" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "lengths.json").read_text())["results"]
    assert result["images"] == 6 and len(result["tokens"]) == 6


def test_an_exact_image_is_counted_and_not_averaged():
    found = Lengths(
        "20 dB", torch.tensor([2, 4]), torch.tensor([0.1, 0.0]), torch.tensor([20.0, math.inf]), math.nan
    )
    assert found.row()[3] == "20.00, 1 exact"
    assert (found.record()["psnr"], found.record()["exact"]) == (20.0, 1)
