"""Tokens that follow a loss: they never end worse, and what is returned is what their tokens decode to."""

import pytest
import torch
from tiny_tokenizers import CASES, SIDE, pictures, shared, text_states, traits

import vistok
from vistok import Tokens, create
from vistok.train.data import photo

pytestmark = pytest.mark.usefixtures("small_and_quick")
DETERMINISTIC = [
    case
    for case in CASES
    if not (traits(case).stochastic or traits(case).adaptive or traits(case).semantic)
    and traits(case).modality == "image"
    and case != "titok-stage1"
]


def squared_error(target):
    return lambda images: (images - target).square().mean((1, 2, 3))


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_tokens_of_every_family_get_nearer_to_a_picture(case):
    model, images, target = shared(case), pictures(2), pictures(2, seed=7)
    options = {"text": text_states(2)} if "text" in model.conditions else {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    result = vistok.optimise_tokens(
        model, squared_error(target), images, steps=6, learning_rate=0.3, **options
    )
    assert result.history.shape == (7, 2)
    assert torch.equal(result.start, result.history[0])
    torch.testing.assert_close(result.loss, result.history.amin(0))
    assert bool((result.loss <= result.start).all()) and bool((result.loss < result.start).any())
    decoded = model.decode(result.tokens, **({"condition": options["text"]} if options else {}))
    torch.testing.assert_close(decoded, result.images, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("case", ["mini", "titok-vq", "one-d-piece"])
def test_a_start_from_tokens_begins_with_their_picture(case):
    model, target = shared(case), pictures(2, seed=7)
    tokens = model.encode(pictures(2), 3 if model.ordered else None)
    result = vistok.optimise_tokens(model, squared_error(target), tokens, steps=2, learning_rate=0.1)
    expected = (model.decode(tokens) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(result.start, expected, rtol=1e-4, atol=1e-6)
    assert result.tokens.num_tokens == tokens.num_tokens


def test_one_value_for_all_images_and_an_empty_batch():
    model = shared("mini")
    result = vistok.optimise_tokens(model, lambda x: x.mean(), pictures(3), steps=2, num_tokens=2)
    assert result.loss.shape == (3,) and result.tokens.num_tokens == 2
    nothing = vistok.optimise_tokens(
        model, lambda x: x.sum((1, 2, 3)), torch.zeros(0, 3, SIDE, SIDE), steps=1
    )
    assert len(nothing.tokens) == 0


def test_a_hole_is_drawn_better_than_it_was_encoded():
    tokenizer = vistok.load("vistok-mini")
    target = vistok.to_tensor([photo("coffee")], 128)
    hole = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
    hole[:, :, 48:80, 48:80] = True
    seen = (~hole).float()
    damaged = torch.where(hole, (target * seen).sum((2, 3), keepdim=True) / seen.sum(), target)

    def error(images, where):
        return ((images - target).square() * where).sum((1, 2, 3)) / where.sum() / 3

    result = vistok.optimise_tokens(tokenizer, lambda x: error(x, seen), damaged, num_tokens=24, steps=30)
    before = error(tokenizer.reconstruct(damaged, 24), hole.float())
    assert float(error(result.images, hole.float())) < 0.97 * float(before)


def test_what_cannot_be_optimised_is_refused():
    mini, images = shared("mini"), pictures(1)
    loss = squared_error(images)
    for model, arguments, message in (
        (shared("flextok"), {}, "drawn from noise in steps"),
        (shared("karl-vqgan"), {}, "choose how many tokens they take"),
        (shared("titok-stage1"), {}, "carry no gradient"),
        (create("vat", width=32, heads=2, encoder_depth=1, decoder_depth=1), {}, "tokenizes shapes"),
        (mini, {"steps": 0}, "steps is 0"),
        (mini, {"learning_rate": 0.0}, "learning_rate 0.0"),
        (mini, {"num_tokens": 99}, "99 was asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            vistok.optimise_tokens(model, loss, images, **{"steps": 1, **arguments})
    with pytest.raises(ValueError, match=r"the loss returned \[1, 3\]; it returns one value per image \[1\]"):
        vistok.optimise_tokens(mini, lambda x: x.mean((2, 3)), images, steps=1)
    with pytest.raises(FloatingPointError, match="at step 0"):
        vistok.optimise_tokens(mini, lambda x: x.sum() * torch.nan, images, steps=1)
    tokens = mini.encode(images)
    with pytest.raises(ValueError, match=r"start from start.prefix\(k\)"):
        vistok.optimise_tokens(mini, loss, tokens, num_tokens=2, steps=1)
    ragged = Tokens(indices=tokens.indices, codebook_sizes=tokens.codebook_sizes, lengths=torch.tensor([2]))
    with pytest.raises(ValueError, match="differ in length"):
        vistok.optimise_tokens(mini, loss, ragged, steps=1)
    binary = shared("instella")
    with pytest.raises(ValueError, match="start from images instead"):
        vistok.optimise_tokens(binary, loss, binary.encode(images), steps=1)
