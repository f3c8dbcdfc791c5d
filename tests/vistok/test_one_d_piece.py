"""One-D-Piece: any prefix of its tokens decodes, and a dropped token is absent."""

import pytest
import torch
from tiny_tokenizers import COUNT, SIDE, build

from vistok import load
from vistok.models.one_d_piece import OneDPiece

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture
def tokenizer():
    return build("one-d-piece")


@pytest.fixture
def images():
    return torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_images_of_several_lengths_decode_as_each_does_alone(tokenizer, images):
    tokens = tokenizer.encode(images)
    lengths = torch.tensor([3, 1, COUNT, 3])
    latents, _ = tokenizer.dequantize(tokens)
    with torch.no_grad():
        together = tokenizer.pixels(latents, lengths).clamp(0, 1)
    for i, length in enumerate(lengths.tolist()):
        alone = tokenizer.decode(tokens[i : i + 1].prefix(length))
        assert torch.allclose(together[i], alone[0], atol=1e-4)


def test_a_dropped_token_is_absent_from_the_sequence(tokenizer, images):
    sequences = []
    tokenizer.decoder.ln_pre.register_forward_hook(lambda m, i, out: sequences.append(out.shape[1]))
    tokenizer.decode(tokenizer.encode(images, 2))
    assert sequences == [1 + (SIDE // 16) ** 2 + 2]


@pytest.mark.parametrize("length", [0, COUNT + 1])
def test_no_tokens_and_too_many_are_refused(tokenizer, images, length):
    with pytest.raises(ValueError, match=f"1 to {COUNT} tokens"):
        tokenizer.encode(images, length)


def test_training_drops_one_tail_per_batch_and_evaluation_none(tokenizer, images):
    torch.manual_seed(3)
    drawn = int(torch.randint(1, COUNT + 1, (1,)))
    torch.manual_seed(3)
    trained = tokenizer.train()(images).images
    expected = tokenizer(images, torch.full((len(images),), drawn)).images
    whole = tokenizer.eval()(images).images
    assert drawn < COUNT and torch.equal(trained, expected)
    assert not torch.equal(whole, trained)


def test_its_own_configuration_is_recognised_and_keys_alone_are_a_titok(tokenizer, tmp_path):
    vq_model = {
        "vit_enc_model_size": "tiny",
        "vit_dec_model_size": "tiny",
        "num_latent_tokens": COUNT,
        "use_l2_norm": True,
        "strict_length_assertion": False,
    }
    config = {
        "model": {"type": "one_d_piece", "vq_model": vq_model},
        "dataset": {"preprocessing": {"crop_size": SIDE}},
    }
    torch.save(tokenizer.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load(tmp_path / "pytorch_model.bin", config=config)
    assert isinstance(loaded, OneDPiece)
    assert load(tmp_path / "pytorch_model.bin").family == "titok"
