"""What is special about vistok-mini: tokens know the weights that wrote them."""

import dataclasses
import hashlib
import json

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

import vistok
from vistok import Tokens, checkpoint
from vistok.models.mini import FIRST_WEIGHTS
from vistok.registry import entries

ASSETS = ROOT / "assets"
SHIPPED = entries()["vistok-mini"].sha256[:8]


@pytest.fixture(scope="module")
def mini():
    return vistok.load("vistok-mini")


@pytest.fixture
def marked_as(mini):
    """A function that marks the model as one of other weights, until the test ends."""
    digest = mini.weights_digest

    def mark(weights):
        mini.weights_digest = weights
        return mini

    yield mark
    mini.weights_digest = digest


@pytest.fixture(scope="module")
def tokens(mini):
    return mini.encode(vistok.to_tensor(ASSETS / "coffee.jpg", 128), 8)


def test_tokens_and_their_file_carry_the_weights_of_the_shipped_model(mini, tokens, tmp_path):
    digest = hashlib.sha256((ASSETS / "vistok-mini.safetensors").read_bytes()).hexdigest()
    assert tokens.weights == mini.weights_digest == SHIPPED == digest[:8]
    tokens.save(tmp_path / "a.vtok")
    again = Tokens.load(tmp_path / "a.vtok")
    assert again.weights == SHIPPED and torch.equal(mini.decode(again), mini.decode(tokens))


def test_tokens_of_other_weights_are_refused_with_both_marks(tokens, marked_as):
    with pytest.raises(ValueError, match=rf"with weights {SHIPPED}, and .* 00000000 here.*encode .* again"):
        marked_as("00000000").decode(tokens)


def test_tokens_without_a_mark_are_those_of_the_first_weights_only(tokens, marked_as):
    """Before there were marks all tokens of this name came from one file of weights."""
    unmarked = dataclasses.replace(tokens, weights=None)
    for weights in ("00000000", "ffffffff"):
        with pytest.raises(ValueError, match=rf"without a mark \(the first ones, {FIRST_WEIGHTS}\)"):
            marked_as(weights).decode(unmarked)
    assert marked_as(FIRST_WEIGHTS).decode(unmarked).shape == (1, 3, 128, 128)
    assert marked_as(None).decode(unmarked).shape == (
        1,
        3,
        128,
        128,
    )  # a folder saved before there were marks


def test_a_saved_copy_has_the_mark_and_decodes_the_same_tokens(mini, tokens, tmp_path):
    mini.save_pretrained(tmp_path)
    copy = vistok.load(tmp_path)
    assert copy.weights_digest == SHIPPED
    assert torch.equal(copy.decode(tokens), mini.decode(tokens))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"weights_digest": "../../etc"}))
    with pytest.raises(ValueError, match=r"weights_digest '\.\./\.\./etc'; it has 8 hexadecimal digits"):
        vistok.load(tmp_path)


def test_weights_of_a_file_under_the_shipped_name_have_the_mark_of_that_file(mini, tokens, tmp_path):
    state = load_file(ASSETS / "vistok-mini.safetensors")
    state["decoder.norm.bias"] += 0.5
    save_file(state, tmp_path / "other.safetensors")
    other = vistok.load("vistok-mini", weights=tmp_path / "other.safetensors")
    assert (
        other.weights_digest == hashlib.sha256((tmp_path / "other.safetensors").read_bytes()).hexdigest()[:8]
    )
    with pytest.raises(ValueError, match="other pictures"):
        other.decode(tokens)
    assert other.decode(tokens.indices).shape == (1, 3, 128, 128)  # bare codes claim nothing


def test_a_model_without_a_name_marks_nothing(mini, tokens):
    fresh = vistok.create("mini").eval()
    assert fresh.encode(torch.rand(1, 3, 128, 128)).weights is None
    assert fresh.decode(tokens).shape == (1, 3, 128, 128)  # as for every tokenizer: no name, no check


def test_the_digest_of_shards_is_that_of_their_bytes_in_order(tmp_path):
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        save_file({f"key{number}": torch.full((2,), float(number))}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"key0": "a.safetensors", "key1": "b.safetensors"}}))
    content = (tmp_path / "a.safetensors").read_bytes() + (tmp_path / "b.safetensors").read_bytes()
    assert checkpoint.digest(index) == hashlib.sha256(content).hexdigest()


def test_tokens_of_tiles_and_of_a_target_quality_are_marked_and_checked_too(marked_as):
    model = marked_as(SHIPPED)
    images = torch.rand(1, 3, 130, 40)
    tiles = model.encode_tiles(images, 2)
    adaptive = model.encode(torch.rand(1, 3, 128, 128), target_psnr=8.0)
    assert tiles.weights == adaptive.tokens.weights == SHIPPED
    assert model.decode(tiles).shape == (1, 3, 130, 40)
    with pytest.raises(ValueError, match="other pictures"):
        marked_as("00000000").decode(tiles)
