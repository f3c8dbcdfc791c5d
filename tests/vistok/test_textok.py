"""TexTok: captions on both sides, which stay apart from tokens and pictures, and what they are worth."""

import pytest
import torch
import yaml
from paths import ROOT

from vistok import create, load
from vistok.nn.text_features import T5TextEncoder, TextFeatures, WordTextEncoder
from vistok.train.object_scenes import CAPTION_WORDS, caption, object_scene
from vistok.train.object_scenes.layout import ObjectScene, SceneObject, Sign

WORDS = ("red", "blue", "green", "ball", "cube")
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "num_latent_tokens": 3,
    "token_size": 4,
    "encoder_width": 32,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "text_encoder": "words",
    "words": WORDS,
    "text_length": 4,
    "text_dim": 16,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create("textok", **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pictures(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_captions_change_tokens_and_pictures(model):
    images = pictures(2)
    red, blue = (model.encode(images, condition=text) for text in ("red ball", "blue cube"))
    assert (red.latents - blue.latents).abs().max() > 1e-3
    as_red, as_blue = (model.decode(red, condition=text) for text in ("red ball", "blue cube"))
    assert (as_red - as_blue).abs().max() > 1e-3
    together = model.encode(images, condition=["red ball", "blue cube"]).latents
    torch.testing.assert_close(together, torch.stack([red.latents[0], blue.latents[1]]))


def test_what_stands_at_padded_places_does_not_matter(model):
    images, generator = pictures(2), torch.Generator().manual_seed(2)
    states = torch.randn(2, 4, 16, generator=generator)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    other = torch.where(mask[..., None], states, torch.inf)
    one, two = (model.encode(images, condition=TextFeatures(s, mask)) for s in (states, other))
    assert torch.equal(one.latents, two.latents)
    one, two = (model.decode(one, condition=TextFeatures(s, mask)) for s in (states, other))
    assert torch.equal(one, two)
    cut = model.encode(images[1:], condition=TextFeatures(states[1:, :1], mask[1:, :1]))
    torch.testing.assert_close(
        cut.latents, model.encode(images, condition=TextFeatures(states, mask))[1].latents
    )


def test_no_caption_is_one_that_is_padded_throughout(model):
    images = pictures(1)
    nothing = TextFeatures(torch.ones(1, 4, 16), torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(model.encode(images).latents, model.encode(images, condition=nothing).latents)
    assert torch.equal(model.encode(images).latents, model.encode(images, condition="").latents)


def test_tokens_follow_their_queries_and_their_number_that_of_the_configuration(model):
    images = pictures(1)
    before = model.encode(images, condition="red cube").latents
    order = torch.tensor([2, 0, 1])
    queries = model.encoder.queries
    try:
        model.encoder.queries = torch.nn.Parameter(queries[order])
        torch.testing.assert_close(model.encode(images, condition="red cube").latents, before[:, order])
    finally:
        model.encoder.queries = queries
    for side in (16, 64):
        wide = create("textok", **{**SMALL, "image_size": side})
        assert wide.encode(torch.rand(1, 3, side, side)).latents.shape == (1, 3, 4)


def test_patches_become_pixels_again(model):
    """With blocks that pass patches on, what `patch_embed` reads is what `to_pixels` writes."""
    images, patch = pictures(1), 8
    rows = (2 * images - 1).unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, h, w, p, p]
    rows = rows.permute(0, 2, 3, 4, 5, 1).reshape(1, 16, -1)
    seen = []
    hook = model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.encode(images)
    hook.remove()
    torch.testing.assert_close(seen[0], rows)
    hook = model.to_pixels.register_forward_hook(lambda module, inputs, output: rows)
    drawn = model.pixels(torch.zeros(1, 3, 4))
    hook.remove()
    torch.testing.assert_close(drawn, images)


def test_a_caption_that_names_the_class_lowers_the_error():
    """One token of one channel cannot hold the class; the caption does."""
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0.1, 0.9, 0.1]])
    errors = {}
    for name, changes in {"text": {}, "twin": {"text_encoder": None, "words": ()}}.items():
        torch.manual_seed(0)
        model = create(
            "textok", **{**SMALL, "num_latent_tokens": 1, "token_size": 1, "text_dropout": 0.0, **changes}
        )
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(150):
            generator = torch.Generator().manual_seed(step)
            kinds = torch.randint(0, 3, (16,), generator=generator)
            level = torch.rand(16, 1, generator=generator)
            images = (colours[kinds] * level)[..., None, None].expand(-1, -1, 32, 32)
            texts = [WORDS[kind] for kind in kinds] if name == "text" else None
            output = model(images, text=texts)
            loss = (output.images - images).square().mean() + 1e-5 * output.losses["kl"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[name] = float((output.images - images).square().mean())
    assert errors["text"] < 0.5 * errors["twin"], errors


def test_training_drops_captions_of_whole_images(model):
    torch.manual_seed(0)
    quiet = create("textok", **{**SMALL, "text_dropout": 1.0}).train()
    seen = []
    hook = quiet.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].mask))
    quiet(pictures(3), text="red ball")
    hook.remove()
    assert not seen[0].any()


def test_bad_text_is_refused_in_one_sentence(model):
    images = pictures(2)
    for condition, message in (
        ("purple ball", "the word 'purple'; this text encoder knows red, blue"),
        ("red red red red red", "has 5 words; the tokenizer reads 4"),
        (["red"], "1 captions were given for 2 images"),
        (torch.zeros(2, 4, 15), "2 images need .2, T, 16. and .2, T."),
        (TextFeatures(torch.zeros(2, 4, 16), torch.ones(2, 3, dtype=torch.bool)), "a mask of .2, 3."),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(images, condition=condition)
    twin = create("textok", **{**SMALL, "text_encoder": None, "words": ()})
    with pytest.raises(ValueError, match="built without text; leave condition out"):
        twin.encode(images, condition="red")
    with pytest.raises(ValueError, match="without text"):
        twin.attach_text_encoder()
    with pytest.raises(ValueError, match='words belong to text_encoder: "words"'):
        create("textok", **{**SMALL, "words": ()})
    t5 = create("textok", **{**SMALL, "text_encoder": "owner/none", "words": ()})
    with pytest.raises(FileNotFoundError, match=r"give hf://owner/none to download it"):
        t5.encode(images, condition="red")


def test_a_model_comes_back_from_its_folder_with_its_words(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again, images = load(tmp_path / "m"), pictures(1)
    assert torch.equal(
        again.encode(images, condition="red cube").latents, model.encode(images, condition="red cube").latents
    )
    assert again.config.words == WORDS


def test_a_t5_folder_reads_captions(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(("<pad>", "<unk>", *WORDS))}, "<unk>")
    )
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", unk_token="<unk>")
    sizes = {"vocab_size": 8, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    features = T5TextEncoder.load(tmp_path, 4)(["red ball", "cube"])
    assert features.states.shape == (2, 4, 16) and features.mask.sum(1).tolist() == [2, 1]
    model = create("textok", **{**SMALL, "text_encoder": str(tmp_path), "words": ()})
    tokens = model.encode(pictures(2), condition=["red ball", "cube"])
    assert len(tokens) == 2 and "text_encoder" not in "".join(model.state_dict())
    model.attach_text_encoder(WordTextEncoder(WORDS, 16, 4))
    model.attach_text_encoder(
        lambda captions: TextFeatures(torch.ones(len(captions), 2, 16), torch.ones(len(captions), 2).bool())
    )
    assert len(model.encode(pictures(2), condition="anything")) == 2


# ---- captions and the recipe -------------------------------------------------------------------------------


def test_captions_name_everything_from_the_top_down():
    scene = ObjectScene(
        (
            SceneObject("red", "cube", "shiny", "large", 20, 90, 13),
            SceneObject("blue", "ball", "matte", "small", 60, 60, 7),
        ),
        (Sign("white", "A4", 90, 5),),
        (0, 0, 0),
        (),
    )
    assert caption(scene) == (
        "white sign a 4 top right, small blue matte ball middle centre, large red shiny cube bottom left"
    )
    encoder = WordTextEncoder(CAPTION_WORDS, 16, 80)
    texts = [caption(object_scene("train", 0, index)) for index in range(300)]
    assert len(set(texts)) == 300 and bool((encoder.ids(texts) > 0).any(1).all())


def test_the_recipe_trains_and_continues(tmp_path):
    from vistok.train.loop import train
    from vistok.train.recipe import read

    values = yaml.safe_load((ROOT / "assets" / "textok-scenes.yaml").read_text(encoding="utf-8"))
    values |= {
        "steps": 4,
        "batch_size": 2,
        "validate_every": 2,
        "checkpoint_every": 2,
        "validation_scenes": 3,
    }
    values["workers"], values["optimizer"] = 0, values["optimizer"] | {"warmup": 1, "decay": 1}
    for name in ("encoder", "decoder"):
        values["tokenizer"] |= {f"{name}_width": 16, f"{name}_depth": 1, f"{name}_heads": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    config = read(tmp_path / "r.yaml")
    train(config, tmp_path / "run", steps=2)
    train(config, tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
    assert "validation_psnr_wrong_captions" in log
    model = load(tmp_path / "run" / "model")
    assert model.encode(torch.rand(1, 3, 60, 60), condition="small red matte cube top left").num_tokens == 4
