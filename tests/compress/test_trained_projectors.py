"""Projectors with trained weights: LDP, LDPv2, TokenFLEX, and how they are saved."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistok import compress
from vistok.compress.algorithms.grid import Grid
from vistok.compress.reducer import Image
from vistok.compress.trained.ldp import LDP, LDPConfig, LDPv2
from vistok.compress.trained.m3 import merged_tiles
from vistok.compress.trained.tokenflex import FlexibleProjector, FlexibleProjectorConfig, TokenFLEX

WIDTHS = (12, 16)
PROJECTORS = {
    "ldp": lambda: LDP(LDPConfig(*WIDTHS)),
    "ldpv2": lambda: LDPv2(LDPConfig(*WIDTHS)),
    "tokenflex": lambda: FlexibleProjector(FlexibleProjectorConfig(*WIDTHS)),
}


@pytest.fixture(params=PROJECTORS)
def projector(request):
    torch.manual_seed(0)
    return PROJECTORS[request.param]().eval()


# LDP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 96, 104])
def test_ldp_is_mobilenets_block_with_layer_norms(width):
    """The blocks of torchvision, with timm's norm over channels, under the keys of the checkpoints."""
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    from functools import partial

    mobile = torchvision.models.mobilenetv3
    norm = partial(timm.layers.LayerNormAct2d, act_layer=None)
    gate = partial(torchvision.ops.SqueezeExcitation, scale_activation=nn.Hardsigmoid)
    blocks = [
        mobile.InvertedResidual(
            mobile.InvertedResidualConfig(width, 3, width, width, True, "HS", stride, 1, 1), norm, gate
        )
        for stride in (1, 2)
    ]
    ldp = LDP(LDPConfig(8, width)).eval()
    for number, block in enumerate(blocks, start=1):
        block.load_state_dict(ldp.model.mb_block[number].state_dict())
    states = torch.randn(2, 49, 8)
    mlp = ldp.model.mlp
    x = mlp[3](F.gelu(mlp[1](states))).transpose(1, 2).unflatten(2, (7, 7))
    expected = nn.Sequential(*blocks).eval()(x)
    assert expected.shape == (2, width, 4, 4)
    torch.testing.assert_close(ldp(states), expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_ldpv2_adds_what_each_token_sees_around_it():
    torch.manual_seed(0)
    projector = LDPv2(LDPConfig(*WIDTHS)).eval()
    states = torch.randn(1, 64, 12)
    mlp, peg = projector.mlp.mlp, projector.peg.peg[0]
    wide = mlp[2](F.gelu(mlp[0](states)))[0].view(8, 8, 16)
    means = wide.view(4, 2, 4, 2, 16).mean((1, 3))  # 8 × 8 to 4 × 4
    output = projector(states)[0].view(4, 4, 16)
    for row in range(4):
        for col in range(4):
            expected = means[row, col] + peg.bias
            for i in range(3):
                for j in range(3):
                    if 0 <= row + i - 1 < 4 and 0 <= col + j - 1 < 4:
                        expected = expected + peg.weight[:, 0, i, j] * means[row + i - 1, col + j - 1]
            torch.testing.assert_close(output[row, col], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [PROJECTORS["ldp"], PROJECTORS["ldpv2"]])
def test_maps_that_are_not_square_are_refused(make):
    with pytest.raises(ValueError, match="not a square map"):
        make()(torch.randn(1, 6, 12))


# TokenFLEX --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 6), (3, 3), (4, 5), (1, 1)])
def test_the_flexible_projector_pools_and_gates(size):
    projector = PROJECTORS["tokenflex"]().eval()
    states = torch.randn(2, 36, 12)
    maps = states.view(2, 6, 6, 12)
    rows, cols = size
    pooled = torch.stack(
        [
            maps[:, i * 6 // rows : -(-(i + 1) * 6 // rows), j * 6 // cols : -(-(j + 1) * 6 // cols)].mean(
                (1, 2)
            )
            for i in range(rows)
            for j in range(cols)
        ],
        1,
    )
    mean, variance = pooled.mean(-1, keepdim=True), pooled.var(-1, keepdim=True, unbiased=False)
    normed = (pooled - mean) / (variance + 1e-6).sqrt() * projector.norm.weight + projector.norm.bias
    gate, up = projector.gate(normed), projector.up(normed)
    torch.testing.assert_close(projector(states, size), projector.down(gate * gate.sigmoid() * up))


def test_without_a_size_the_flexible_projector_keeps_every_state():
    projector = PROJECTORS["tokenflex"]().eval()
    states = torch.randn(2, 36, 12)
    assert torch.equal(projector(states), projector(states, (6, 6)))


@pytest.mark.parametrize(
    ("states", "options", "message"),
    [
        ((1, 6, 12), {}, "not a grid of 2 × 2"),
        ((1, 6, 12), {"grid": (2, 2)}, "not a grid of 2 × 2"),
        ((1, 36, 12), {"size": (7, 6)}, "takes 1 × 1 to 6 × 6"),
        ((1, 36, 12), {"size": (0, 1)}, "takes 1 × 1 to 6 × 6"),
    ],
)
def test_sizes_that_a_grid_cannot_have_are_refused(states, options, message):
    with pytest.raises(ValueError, match=message):
        PROJECTORS["tokenflex"]()(torch.randn(*states), **options)


def test_budgets_follow_the_aspect_of_a_tile():
    assert TokenFLEX().size_of(Grid.single(6, 6), 0.25) == (3, 3)
    assert TokenFLEX().size_of(Grid.single(6, 6), 4 / 9) == (4, 4)
    assert TokenFLEX().size_of(Grid.single(4, 8), 0.25) == (2, 4)
    assert TokenFLEX().size_of(Grid.single(6, 6), 0.001) == (1, 1)
    assert TokenFLEX().size_of(Grid.single(6, 6), 24) == (4, 4)
    assert TokenFLEX().size_of(Grid.single(6, 6), 25) == (5, 5)


def test_a_model_with_the_projector_gets_its_tokens_at_every_budget():
    from tiny_vlms import tiny_vlm

    torch.manual_seed(0)
    model, _, inputs = tiny_vlm("llava_next")
    inputs = inputs(images=(2, 1))
    calls, reducer = [], TokenFLEX()
    reduce = reducer.reduce

    def watched(image, budget):
        calls.append((image, reduce(image, budget)))
        return calls[-1][1]

    reducer.reduce = watched
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"FlexibleProjector\.load"), compress.attach(model, TokenFLEX()):
            model(**inputs)
        config = FlexibleProjectorConfig(
            model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        )
        projector = model.model.multi_modal_projector = FlexibleProjector(config).eval()
        whole = model(**inputs).logits
        with compress.attach(model, reducer, keep=1.0):
            assert torch.equal(model(**inputs).logits, whole)
        with compress.attach(model, reducer, keep=0.25) as session:
            model(**inputs)
            kept = [image.layers[0] for image in session.report().images]
    assert len(calls) == 3 and kept == [len(selection.kept) for _, selection in calls]
    for image, selection in calls:
        grid = image.grid
        side = grid.height // 2
        tiles = projector(image.states[:, 1:], (side, side))
        newline = model.model.image_newline
        expected = merged_tiles(tiles, grid.rows, grid.cols, image_size=grid.image_size, newline=newline)
        torch.testing.assert_close(selection.values, expected)
        assert len(selection.kept) == reducer.retained_count(grid, 0.25)


def test_states_that_were_not_recorded_are_refused():
    projector = PROJECTORS["tokenflex"]()
    image = Image(torch.randn(36, 16), torch.zeros(0, 16), Grid.single(6, 6), project=projector)
    with pytest.raises(ValueError, match="make the features itself"):
        TokenFLEX().reduce(image, 0.25)


# All of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_of_any_size_and_precision_are_projected(projector, batch, dtype):
    tokens = projector.to(dtype)(torch.randn(batch, 36, 12).to(dtype))
    assert tokens.shape[::2] == (batch, 16) and tokens.dtype == dtype


def test_saved_weights_are_read_back_exactly(projector, tmp_path):
    projector.save(tmp_path)
    loaded = type(projector).load(tmp_path)
    states = torch.randn(2, 36, 12)
    assert torch.equal(loaded(states), projector(states))
    assert loaded.config == projector.config and not loaded.training


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    LDPv2(LDPConfig(*WIDTHS)).save(tmp_path)
    with pytest.raises(ValueError, match=r"not a saved LDP: config\.json states the module 'LDPv2'"):
        LDP.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["hidden_size"] = 20
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"misshapen.*mlp"):
        LDPv2.load(tmp_path)
    config["config"] = {"mm_hidden_size": 0, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mm_hidden_size is 0"):
        LDPv2.load(tmp_path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    projector = LDPv2(LDPConfig(*WIDTHS))
    with torch.no_grad():
        projector.mlp.mlp[0].bias[3] = float("nan")
    projector.save(tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        LDPv2.load(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LDP.load(tmp_path / "nowhere")
