"""DualToken: two vocabularies of one tower, the quantizer's running means, and its SigLIP parts."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizers import CASES, build, fresh, pictures, shared
from transformers import SiglipConfig, SiglipModel

from vistok import Tokens, create, load
from vistok.models.dualtoken.config import CodesConfig, DualTokenConfig
from vistok.models.dualtoken.network import DualQuantizer, Projection
from vistok.registry import entries, families

pytestmark = pytest.mark.usefixtures("small_and_quick")


# ---- codes of pixels and of meaning ------------------------------------------------------------------------


def test_codes_of_pixels_alone_decode_as_all_codes():
    model = shared("dualtoken")
    tokens = model.encode(pictures(2))
    assert tokens.indices.shape == (2, 16, 4) and tokens.codebook_sizes == (64,) * 4
    parts = model.split(tokens)
    assert parts["pixel"].indices.shape == parts["semantic"].indices.shape == (2, 16, 2)
    images = model.decode(tokens)
    assert torch.equal(model.decode(parts["pixel"]), images)
    assert torch.equal(model.decode(tokens.indices[..., :2]), images)
    packed = Tokens.from_bytes(parts["pixel"].to_bytes())
    assert torch.equal(model.decode(packed), images)


def test_semantic_codes_do_not_change_the_pixels_nor_codes_of_pixels_the_features():
    model = shared("dualtoken")
    codes = model.encode(pictures(1)).indices
    semantic, pixel = codes.clone(), codes.clone()
    semantic[..., 2:] = (semantic[..., 2:] + 1) % 64
    pixel[..., :2] = (pixel[..., :2] + 1) % 64
    assert torch.equal(model.decode(semantic), model.decode(codes))
    assert not torch.equal(model.decode(pixel), model.decode(codes))
    assert torch.equal(model.features_of(pixel), model.features_of(codes))
    assert not torch.allclose(model.features_of(semantic), model.features_of(codes), atol=1e-3)


@pytest.mark.parametrize("name", [None, "dualtoken-256"])
def test_semantic_codes_alone_are_not_drawn_but_give_features(name):
    model = build("dualtoken")
    model.name = name
    tokens = model.encode(pictures(2))
    semantic = model.split(tokens)["semantic"]
    with pytest.raises(ValueError, match="semantic codes alone, which hold no pixels"):
        model.decode(semantic)
    features = model.features(pictures(2))
    assert torch.equal(model.features_of(semantic), features)
    assert torch.equal(model.features_of(tokens.indices[..., 2:]), features)
    assert features.shape == (2, 16, 32)
    with pytest.raises(ValueError, match="hold 2 codes per place, of pixels alone"):
        model.features_of(model.split(tokens)["pixel"])


def test_tokens_of_other_codebooks_are_refused():
    model = shared("dualtoken")
    tokens = model.encode(pictures(1))
    other = dataclasses.replace(tokens, codebook_sizes=(32,) * 4)
    with pytest.raises(ValueError, match="codebook sizes"):
        model.split(other)
    alone = dataclasses.replace(model.split(tokens)["pixel"], codebook_sizes=(128, 128))
    with pytest.raises(ValueError, match=r"\(128, 128\)"):
        model.decode(alone)
    with pytest.raises(ValueError, match="64"):
        model.features_of(tokens.indices + 64)
    with pytest.raises(ValueError, match="exactly 16 tokens"):
        model.decode(tokens.indices[:, :15])


def test_a_code_changes_only_what_comes_after_it():
    model = shared("dualtoken")
    codes = model.encode(pictures(1)).indices
    changed = codes.clone()
    changed[:, 9, 2:] = (changed[:, 9, 2:] + 1) % 64
    before, after = model.features_of(codes), model.features_of(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before - after).abs().amax(2)[:, 9:] > 0).all()


@torch.no_grad()
def test_inwards_every_row_reads_all_rows_and_heads_are_averaged():
    torch.manual_seed(0)
    projection = Projection(12, 4, 3, causal=False)
    for parameter in projection.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(1, 5, 12)
    query, key, value = F.linear(projection.norm1(x[0]), projection.attn.qkv.weight).chunk(3, -1)
    query, value = query + projection.attn.q_bias, value + projection.attn.v_bias
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (query[:, part] @ key[:, part].T / 2).softmax(-1)
        heads.append(weights @ value[:, part])
    y = projection.proj(projection.norm3(x)) + projection.attn.proj(sum(heads) / 3)
    mlp, inner = projection.mlp, projection.mlp.norm(projection.norm2(y))
    y = y + mlp.w2(F.gelu(mlp.w0(inner), approximate="tanh") * mlp.w1(inner))
    torch.testing.assert_close(projection(x), y, rtol=1e-4, atol=1e-5)


def test_without_a_shortcut_its_module_is_absent():
    model = build("dualtoken", layer_shortcut=None)
    assert not hasattr(model, "prequant_shortcut")
    pixel, _ = model.both_latents(pictures(1))
    torch.testing.assert_close(pixel, model.prequant_pix(model.states(pictures(1), 2)[0]))
    full = build("dualtoken")
    shallow, shortcut = full.states(pictures(1), 2, 1)
    expected = full.prequant_pix(shallow) + 0.6 * full.prequant_shortcut(shortcut)
    torch.testing.assert_close(full.both_latents(pictures(1))[0], expected)


# ---- the tower ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_towers_are_transformers_siglip():
    model = build("dualtoken")
    config = CASES["dualtoken"][1]
    original = SiglipModel(SiglipConfig(vision_config=config["vision"], text_config=config["text"])).eval()
    original.load_state_dict(model.siglip_model.state_dict())
    images = 2 * pictures(2) - 1
    vision = original.vision_model(images, output_hidden_states=True)
    for layer, states in zip((1, 2, 3), model.states(images, 1, 2, 3), strict=True):
        torch.testing.assert_close(states, vision.hidden_states[layer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.pooled(states), vision.pooler_output, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[1, 4, 10, 0, 2], [3, 3, 3, 3, 9]])
    text = F.normalize(original.text_model(ids).pooler_output, dim=-1)
    torch.testing.assert_close(model.text_features(ids), text, rtol=1e-4, atol=1e-5)


def test_pooled_features_are_unit_vectors_and_go_through_the_quantized_states():
    model = shared("dualtoken")
    tokens = model.encode(pictures(3))
    pooled = model.pooled_features(tokens)
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(3), atol=1e-5)
    expected = F.normalize(model.pooled(model.features(pictures(3))), dim=-1)
    torch.testing.assert_close(pooled, expected)
    assert torch.equal(model.pooled_features(model.split(tokens)["semantic"]), pooled)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.int64), "texts have 6 tokens; give 1 to 5"),
        (torch.full((1, 2), 11), r"token ids span 11\.\.11; the vocabulary has 11"),
        (torch.zeros(2, 3), r"text is torch\.float32 \[2, 3\]"),
        ("a jay", "text is str"),
    ],
)
def test_texts_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        shared("dualtoken").text_features(ids)


# ---- the quantizer -----------------------------------------------------------------------------------------


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    quantizer = DualQuantizer(CodesConfig(n_embed=6, embed_dim=3, depth=3, restart_unused_codes=False))
    table = torch.cat([torch.zeros(1, 3), torch.randn(5, 3), torch.zeros(1, 3)])
    for book in quantizer.codebooks:
        book.weight.copy_(table)
        book.embed_ema.copy_(table[:-1])
    return quantizer


def test_rows_of_all_depths_add_up_and_the_padding_is_never_matched(quantizer):
    latents = torch.randn(4, 7, 3)
    for book in quantizer.codebooks:
        book.weight[-1] = latents[0, 0]  # the nearest by far
    codes = quantizer.encode(latents)
    assert codes.shape == (4, 7, 3) and codes.max() < 6
    torch.testing.assert_close(quantizer.decode_by_depth(codes).sum(2), quantizer.decode(codes))
    residuals = [(latents - quantizer.decode(codes[..., :depth])).norm(dim=-1) for depth in (1, 2, 3)]
    assert all((after <= before + 1e-6).all() for before, after in pairwise(residuals))
    assert (residuals[0] <= latents.norm(dim=-1) + 1e-6).all()
    with pytest.raises(ValueError, match="tokens have 4 codes each; this codebook is read 1 to 3 times"):
        quantizer.decode(torch.zeros(1, 1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="latents have 5 channels; this codebook has rows of 3"):
        quantizer.encode(torch.randn(1, 1, 5))


def _one_step(rows, counts, sums, latents, depth, decay):
    """One training step of a residual quantizer with running means, row by row."""
    rows, counts, sums = rows.clone(), counts.clone(), sums.clone()
    residuals = [latent.clone() for latent in latents]
    totals = [torch.zeros_like(latent) for latent in latents]
    distances = []
    for _ in range(depth):
        codes = [int((rows - residual).square().sum(-1).argmin()) for residual in residuals]
        chosen = [rows[code].clone() for code in codes]
        for row in range(len(rows)):
            own = [residual for residual, code in zip(residuals, codes, strict=True) if code == row]
            counts[row] = decay * counts[row] + (1 - decay) * len(own)
            sums[row] = decay * sums[row] + (1 - decay) * sum(own, torch.zeros(rows.shape[1]))
        total = counts.sum()
        for row in range(len(rows)):
            smoothed = (counts[row] + 1e-5) / (total + len(rows) * 1e-5) * total
            rows[row] = sums[row] / smoothed
        residuals = [residual - row for residual, row in zip(residuals, chosen, strict=True)]
        totals = [each + row for each, row in zip(totals, chosen, strict=True)]
        pairs = zip(latents, totals, strict=True)
        distances.append(sum((latent - each).square().mean() for latent, each in pairs) / len(latents))
    return rows, counts, sums, totals, sum(distances) / depth


def test_a_training_step_moves_rows_to_running_means_depth_after_depth(quantizer):
    latents = torch.randn(2, 4, 3)
    before = [table.clone() for table in quantizer.tables(quantizer.codebooks[-1])]
    rows, counts, sums, totals, commitment = _one_step(*before, list(latents.flatten(0, 1)), 3, 0.99)
    latents.requires_grad_()
    result = quantizer.train()(latents)
    after = quantizer.tables(quantizer.codebooks[-1])
    for own, expected in zip(after, (rows, counts, sums), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.latents.flatten(0, 1), torch.stack(totals), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.losses["commitment"], commitment, rtol=1e-4, atol=1e-5)
    for book in quantizer.codebooks:
        assert torch.equal(book.weight, quantizer.codebooks[-1].weight)
    (through,) = torch.autograd.grad(result.latents.sum(), latents)
    assert torch.equal(through, torch.ones_like(latents))


def test_in_evaluation_nothing_moves(quantizer):
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.eval()(torch.randn(2, 4, 3))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("count", [2, 40])
def test_unused_rows_become_latents_of_the_batch(quantizer, count):
    quantizer.restart_unused = True
    quantizer.codebook_sizes = (6,)  # one depth, whose residuals are the latents
    for book in quantizer.codebooks:
        book.cluster_size_ema.copy_(torch.tensor([0.5, 3.0, 0.9, 2.0, 1.5, 0.1]))
    latents = 10 + torch.randn(1, count, 3)
    quantizer.train()(latents)
    rows, counts, _ = quantizer.tables(quantizer.codebooks[-1])
    restarted = torch.tensor([0, 2, 5])
    if count == 2:  # codes 0, 2 and 5 have no hit, or too few
        assert (counts[restarted] == 1).all()
    distance = torch.cdist(rows[restarted], latents[0]).amin(1)
    assert (distance[counts[restarted] == 1] < 0.05).all()
    assert (counts[[1, 3, 4]] > 1).all()


# ---- configurations ----------------------------------------------------------------------------------------


def test_published_configurations_read_27_by_27_cells_and_draw_from_24_by_24():
    model = families()["dualtoken"].outline(**entries()["dualtoken-384"].config)
    assert (model.num_tokens, model.config.vision.side) == (729, 27)
    assert model.quantizer.codebook_sizes == (16_384,) * 16
    assert [len(part.attn) for part in model.decoder.up] == [0, 0, 0, 0, 3]
    assert families()["dualtoken"].outline().num_tokens == 256


ORIGINAL = {
    "hidden_size": 1152,
    "pretrained_model": "google/siglip2-so400m-patch14-384",
    "layer_recon": 6,
    "layer_sem": 26,
    "layer_shortcut": 4,
    "weight_shortcut": 0.6,
    "vq_pix": {
        "bottleneck_type": "rq",
        "code_shape": [27, 27, 8],
        "latent_shape": [27, 27, 32],
        "decay": 0.99,
        "embed_dim": 32,
        "n_embed": 16384,
        "restart_unused_codes": True,
        "shared_codebook": True,
    },
    "ddconfig": {
        "attn_resolutions": [24],
        "ch": 128,
        "ch_mult": [1, 1, 4, 4, 8],
        "decoder_in_channels": 1024,
        "double_z": False,
        "dropout": 0.0,
        "in_channels": 3,
        "num_res_blocks": 2,
        "out_ch": 3,
        "resolution": 384,
    },
    "decoder_latent_shape": [24, 24],
}


def test_the_originals_configuration_is_that_of_the_row():
    original = {**ORIGINAL, "vq_sem": {**ORIGINAL["vq_pix"], "bottleneck_type": "rq_ema"}}
    assert DualTokenConfig.parse(original) == DualTokenConfig.parse(entries()["dualtoken-384"].config)
    assert ORIGINAL["vq_pix"]["code_shape"] == [27, 27, 8]  # the caller's mapping stays as it was
    del original["layer_shortcut"]
    assert DualTokenConfig.parse(original).layer_shortcut is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained_model": "google/vit"}, "pretrained_model is 'google/vit'"),
        ({"hidden_size": 64}, "hidden_size is 64; the tower's is 1152"),
        ({"vq_pix": {"shared_codebook": False}}, "another shared_codebook than True"),
        ({"vq_pix": {"bottleneck_type": "vq"}}, "bottleneck_type is 'vq'; it is rq or rq_ema"),
        ({"vq_pix": {"code_shape": [8, 4, 4]}}, r"code_shape \[8, 4, 4\]; it is \[side, side, depth\]"),
        ({"vq_pix": {"code_shape": [8, 8, 4], "latent_shape": [4, 4, 3]}}, "and latent_shape"),
        ({"ddconfig": {"dropout": 0.1}}, "another dropout than 0.0"),
    ],
)
def test_variants_that_were_never_published_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        create("dualtoken", **{**ORIGINAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_sem": 5}, "layer_sem is 5; the tower has 4 layers"),
        ({"layer_shortcut": 0}, "layer_shortcut is 0"),
        ({"vq_sem": {"embed_dim": 16}}, "codes of pixels have 8 channels and semantic ones 16"),
        ({"decoder_latent_shape": (4, 4)}, "becomes 4 times as many pixels; the image has 32 per side"),
        ({"decoder_latent_shape": (8, 4)}, "decoder_latent_shape"),
        ({"text": {"hidden_size": 64}}, "text tower's hidden_size is 64"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fresh("dualtoken", **change)


def test_no_weights_are_published_and_loading_says_so(offline):
    with pytest.raises(FileNotFoundError, match=r"no weights of dualtoken-256 are published.*create\("):
        load("dualtoken-256")


def test_bare_weights_need_the_originals_configuration(tmp_path):
    model = build("dualtoken")
    torch.save(model.state_dict(), tmp_path / "dual.pt")
    with pytest.raises(ValueError, match="without the configuration that has layer_recon and layer_sem"):
        load(tmp_path / "dual.pt")
    loaded = load(tmp_path / "dual.pt", config=dataclasses.asdict(model.config))
    assert loaded.encode(pictures(2)) == model.encode(pictures(2))


def test_a_teacher_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"the teacher's pooled have shape \[2, 3\]; .* \[2, 32\]"):
        shared("dualtoken")(pictures(2), (torch.zeros(2, 16, 32), torch.zeros(2, 3)))


def test_losses_are_zero_minus_one_for_a_teacher_that_agrees():
    model = shared("dualtoken")
    with torch.no_grad():
        states = model.features(pictures(2))
        losses = model(pictures(2), (states, model.pooled(states))).losses
    assert losses["states"].item() == pytest.approx(-5, abs=1e-4)
    assert losses["pooled"].item() == pytest.approx(-1, abs=1e-4)
