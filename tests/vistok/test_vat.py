"""VAT: shapes as scales of codes, the quantizer by itself, procedural solids, and a short training."""

import math

import numpy as np
import pytest
import torch
import yaml
from paths import ROOT
from torch.distributions import Normal, kl_divergence

from vistok import Tokens, create, load
from vistok.models.vat import Mesh
from vistok.quantizers import VariationalResidualQuantizer
from vistok.train.shapes import primitive, shape

SMALL = {
    "num_latents": 8,
    "scales": (1, 2, 8),
    "codebook_size": 32,
    "token_size": 4,
    "bands": 3,
    "width": 32,
    "heads": 2,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "plane_side": 8,
    "plane_channels": 4,
    "field_width": 16,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create("vat", **SMALL).eval()


def surfaces(count, points=64):
    rng = np.random.default_rng(3)
    rows = [np.concatenate(shape("test", 0, index).surface(points, rng), 1) for index in range(count)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, points, 6)


# ---- the quantizer -----------------------------------------------------------------------------------------


def quantizer(scales=(1, 2, 4, 8), **settings):
    torch.manual_seed(0)
    return VariationalResidualQuantizer(64, 4, 8, scales, **settings)


def test_the_divergence_is_that_of_the_closed_form():
    own = quantizer(kl_weight=1.0).eval()
    assert float(own(torch.zeros(2, 8, 8)).losses["kl"]) == 0
    moments = torch.randn(3, 8, 8)
    mean, logvar = moments.chunk(2, -1)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum() / 3
    torch.testing.assert_close(own(moments).losses["kl"], expected)


def test_scales_add_up_and_the_first_ones_decode_alone():
    own, moments = quantizer().eval(), torch.randn(2, 8, 8)
    codes = own.encode(moments)
    assert own.lengths == (1, 3, 7, 15) and codes.shape == (2, 15)
    assert torch.equal(codes, own(moments).codes)
    torch.testing.assert_close(own(moments).latents, own.decode(codes))
    row, total = own.rows, torch.zeros(2, 8, 4)
    for start, count in ((0, 1), (1, 2), (3, 4), (7, 8)):  # linear between the centres of cells
        values = row[codes[:, start : start + count]].numpy()
        where = ((np.arange(8) + 0.5) * count / 8 - 0.5).clip(0, count - 1)
        for sample in range(2):
            for channel in range(4):
                line = np.interp(where, np.arange(count), values[sample, :, channel])
                total[sample, :, channel] += torch.from_numpy(line).float()
        torch.testing.assert_close(own.decode(codes[:, : start + count]), total, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="codes have 4 per sample; whole scales end at 1, 3, 7, 15"):
        own.decode(codes[:, :4])


def test_an_error_never_grows_with_scales_of_all_places():
    """Where every scale has all places, a row of zeros in the codebook can leave each rest as it is."""
    own = quantizer(scales=(8, 8, 8)).eval()
    own.codebooks[0].weight[0] = 0
    moments = 0.5 * torch.randn(4, 8, 8)
    codes, mean = own.encode(moments), moments[..., :4]
    errors = [float((own.decode(codes[:, :n]) - mean).square().mean()) for n in own.lengths]
    assert errors[0] >= errors[1] >= errors[2]


def test_training_moves_the_codebook_towards_what_it_codes_and_drops_last_scales():
    own = quantizer(dropout=0.0).train()
    moments = torch.cat([3 + 0.2 * torch.randn(64, 8, 4), torch.full((64, 8, 4), -9.0)], -1)
    first = float(own(moments).losses["commitment"])
    for _ in range(60):
        last = float(own(moments).losses["commitment"])
    assert last < 0.7 * first
    latents = own(moments, depths=torch.ones(64, dtype=torch.long)).latents
    assert float(latents.std(1).max()) < 1e-5  # one code for all places
    grad = torch.randn(2, 8, 8).requires_grad_()
    own(grad).latents.sum().backward()
    assert bool((grad.grad[..., :4] == 1).all())


def test_scales_that_cannot_be_are_refused():
    for scales in ((), (2, 1), (0, 8), (1, 9)):
        with pytest.raises(ValueError, match="in rising order, from 1 to 8"):
            quantizer(scales=scales)
    with pytest.raises(ValueError, match=r"takes moments \[B, 8, 8\]"):
        quantizer().encode(torch.zeros(1, 7, 8))


# ---- the tokenizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3])
def test_shapes_become_codes_become_fields(model, count):
    tokens = model.encode(surfaces(count))
    assert (len(tokens), tokens.num_tokens, tokens.codebook_sizes) == (count, 11, (32,))
    field = model.decode(tokens, resolution=6)
    assert field.shape == (count, 6, 6, 6) and bool(((field >= 0) & (field <= 1)).all())
    assert list(model.prefix_lengths) == [1, 3, 11]
    packed = Tokens.from_bytes(tokens.to_bytes())
    assert torch.equal(model.decode(packed, resolution=6), field)


def test_the_order_of_points_does_not_matter(model):
    points = surfaces(2)
    torch.testing.assert_close(model.latents(points), model.latents(points.flip(1)), rtol=1e-4, atol=1e-5)


def test_a_field_is_the_occupancy_at_its_cells(model):
    tokens = model.encode(surfaces(2))
    field = model.decode(tokens, resolution=4)
    cells = torch.stack(torch.meshgrid(*[torch.tensor([-0.75, -0.25, 0.25, 0.75])] * 3, indexing="ij"), -1)
    occupancy = model.occupancy(tokens, cells.view(1, -1, 3).expand(2, -1, -1))
    torch.testing.assert_close(field.flatten(1), occupancy)


def test_shapes_of_several_lengths_decode_as_each_alone(model):
    tokens = model.encode(surfaces(3))
    ragged = Tokens(
        indices=tokens.indices,
        codebook_sizes=tokens.codebook_sizes,
        lengths=torch.tensor([3, 11, 1]),
    )
    together = model.decode(ragged, resolution=5)
    for row, length in enumerate((3, 11, 1)):
        alone = model.decode(tokens[row].prefix(length), resolution=5)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-6)


def test_what_is_not_a_shape_is_refused(model):
    points = surfaces(1)
    far, nan, long = points.clone(), points.clone(), points.clone()
    far[0, 0, 0], nan[0, 0, 0], long[0, 0, 3:] = 2.0, torch.nan, 3.0
    for wrong, message in (
        (torch.rand(1, 3, 32, 32), r"takes shapes as surface points \[B, P, 6\], places and unit normals"),
        (points[..., :3], r"have shape \[1, 64, 3\]"),
        (points[:, :0], r"have shape \[1, 0, 6\]"),
        (points.numpy(), "have shape ndarray"),
        (points.int(), "torch.int32"),
        (far, r"reach beyond \[-1, 1\]"),
        (nan, "not finite"),
        (long, "normals have lengths from"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(wrong)
    with pytest.raises(
        ValueError, match="does not decode from a prefix of 5 tokens; the nearest that do have 3"
    ):
        model.encode(points, 5)
    late = create("vat", **{**SMALL, "scales": (2, 8)})
    with pytest.raises(ValueError, match="a prefix of 1 tokens; the nearest that does has 2"):
        late.encode(points, 1)
    with pytest.raises(ValueError, match="no PSNR; give num_tokens"):
        model.encode(points, target_psnr=20.0)
    with pytest.raises(ValueError, match="resolution is 1; it is 2 to 512"):
        model.decode(model.encode(points), resolution=1)


def test_a_model_comes_back_from_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, points = load(tmp_path), surfaces(2)
    assert torch.equal(again.encode(points).indices, model.encode(points).indices)


def test_a_mesh_encloses_what_is_inside_and_is_written_as_ply(model, tmp_path):
    class Ball(type(model)):
        def decode(self, tokens, *, resolution=64, **options):
            line = (torch.arange(resolution) + 0.5) * 2 / resolution - 1
            x, y, z = torch.meshgrid(line, line, line, indexing="ij")
            return torch.sigmoid(20 * (0.7 - (x**2 + y**2 + z**2).sqrt()))[None]

    mesh = Ball(model.config).meshes(None, resolution=40)[0]
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - 0.7).max() < 0.01
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(float) for i in range(3))
    volume = abs(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)
    assert volume == pytest.approx(4 / 3 * math.pi * 0.7**3, rel=0.01)
    mesh.save(tmp_path / "ball.ply")
    data = (tmp_path / "ball.ply").read_bytes()
    head, body = data.split(b"end_header\n", 1)
    assert f"element vertex {len(mesh.vertices)}\n".encode() in head
    assert len(body) == 12 * len(mesh.vertices) + 13 * len(mesh.faces)
    first = np.frombuffer(body, "<f4", 3)
    assert np.array_equal(first, mesh.vertices[0])
    with pytest.raises(ValueError, match=r"not a \.ply file"):
        mesh.save(tmp_path / "ball.obj")
    assert len(Mesh(np.zeros((0, 3)), np.zeros((0, 3))).vertices) == 0


# ---- shapes and the recipe ---------------------------------------------------------------------------------


def test_surface_points_lie_on_the_surface_and_normals_point_outwards():
    for index in range(6):
        solid = shape("train", 1, index)
        points, normals = solid.surface(200, np.random.default_rng(0))
        assert np.abs(solid.field(points.astype(float))).max() < 0.005 and np.abs(points).max() <= 1
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-4)
        outside = solid.field(points + 0.02 * normals.astype(float)) > solid.field(points.astype(float))
        assert outside.mean() > 0.97
        assert 0.005 < solid.inside(np.random.default_rng(1).uniform(-1, 1, (4000, 3))).mean() < 0.9


def test_primitives_have_their_volume():
    cube = np.random.default_rng(0).uniform(-1, 1, (100_000, 3))
    reach = 0.9
    expected = {
        "sphere": 4 / 3 * math.pi * reach**3,
        "box": (2 * reach) ** 3,
        "cylinder": math.pi * reach**2 * 2 * reach,
        "cone": math.pi * reach**2 * 2 * reach / 3,
    }
    for name, volume in expected.items():
        assert 8 * primitive(name).inside(cube).mean() == pytest.approx(volume, rel=0.2), name
    with pytest.raises(ValueError, match="no primitive 'teapot'; there are sphere"):
        primitive("teapot")
    with pytest.raises(ValueError, match="split is one of train"):
        shape("no", 0, 0)


def test_a_sphere_and_a_cube_are_learned():
    """Half a minute of training tells the two apart, inside and outside."""
    torch.manual_seed(0)
    model = create(
        "vat",
        **{
            **SMALL,
            "scale_dropout": 0.0,
            "plane_side": 16,
            "kl_weight": 1e-6,
            "plane_channels": 8,
            "field_width": 32,
        },
    )
    rng, solids = np.random.default_rng(0), [primitive("sphere"), primitive("box")]
    points = torch.from_numpy(np.stack([np.concatenate(each.surface(64, rng), 1) for each in solids]))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(400):
        queries = rng.uniform(-1, 1, (2, 512, 3))
        inside = torch.from_numpy(
            np.stack([a.inside(q) for a, q in zip(solids, queries, strict=True)])
        ).float()
        output = model(points, torch.from_numpy(queries).float())
        loss = torch.nn.functional.binary_cross_entropy_with_logits(output.images, inside)
        optimizer.zero_grad()
        (loss + sum(output.losses.values())).backward()
        optimizer.step()
    model.eval()
    queries = rng.uniform(-1, 1, (2, 8192, 3))
    inside = torch.from_numpy(np.stack([a.inside(q) for a, q in zip(solids, queries, strict=True)]))
    drawn = model.occupancy(model.encode(points), torch.from_numpy(queries).float()) > 0.5
    ratio = (drawn & inside).sum(1) / (drawn | inside).sum(1)
    assert float(ratio.min()) > 0.9, ratio


def test_the_recipe_trains_and_continues(tmp_path):
    from vistok.train.loop import train
    from vistok.train.recipe import read

    values = yaml.safe_load((ROOT / "assets" / "vat-shapes.yaml").read_text(encoding="utf-8"))
    values |= {"steps": 2, "batch_size": 2, "validate_every": 1, "checkpoint_every": 1, "workers": 0}
    values |= {
        "shapes": 3,
        "points": 16,
        "queries": 16,
        "validation_shapes": 2,
        "tokenizer": {"name": "vat", **SMALL},
    }
    values["tokenizer"]["scales"] = [1, 2, 8]
    values["optimizer"] |= {"warmup": 1, "decay": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    config = read(tmp_path / "r.yaml")
    train(config, tmp_path / "run", steps=1, progress=False)
    train(config, tmp_path / "run", progress=False)
    assert "validation_iou_11" in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
    assert load(tmp_path / "run" / "model").modality == "shape"
    values["tokenizer"] = {"name": "vistok-mini"}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ValueError, match="trains a tokenizer of shapes"):
        train(read(tmp_path / "bad.yaml"), tmp_path / "bad", progress=False)
