"""`vistok verify` on vision transformers of other kinds than the published cases: distilled, globally pooled.

The recordings are made by the plain loops of `vision_oracle`, in double precision.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from typer.testing import CliRunner
from vision_oracle import timm_attend, timm_feed, tome_forward

from vistok.cli import app
from vistok.eval.parity.case import fill

SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
    "qkv_bias": True,
    "mlp_ratio": 4,
}
RECIPE = (
    "image = float32(kron(RandomState(7).standard_normal((2,3,4,4)), ones((8,8)))"
    " + 0.3*RandomState(8).standard_normal((2,3,32,32)))"
)
NORM = partial(nn.LayerNorm, eps=1e-6)
KINDS = {
    "distilled": (lambda: VisionTransformerDistilled(**SIZES, norm_layer=NORM), True, "token"),
    "mae": (lambda: VisionTransformer(**SIZES, norm_layer=NORM, global_pool="avg"), True, "avg"),
    "pooled after the norm": (
        lambda: VisionTransformer(**SIZES, norm_layer=NORM, global_pool="avg", fc_norm=False),
        True,
        "avg",
    ),
    "no class token": (
        lambda: VisionTransformer(**SIZES, norm_layer=NORM, global_pool="avg", class_token=False),
        False,
        "avg",
    ),
}


@torch.no_grad()
def record(folder, kind, plan):
    """A case of ToMe with `plan`, recorded by plain loops."""
    make, class_token, pool = KINDS[kind]
    model = make().eval()
    shapes = {key: ["float32", list(value.shape)] for key, value in model.state_dict().items()}
    model.load_state_dict({key: fill(key, value.shape, 3) for key, value in model.state_dict().items()})
    model = model.double()
    blocks, noise = (
        np.random.RandomState(seed).standard_normal(shape)
        for seed, shape in ((7, (2, 3, 4, 4)), (8, (2, 3, 32, 32)))
    )
    picture = (np.kron(blocks, np.ones((8, 8))) + 0.3 * noise).astype(np.float32)
    images = torch.from_numpy(picture).double()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    prefix = model.num_prefix_tokens
    tokens, size, _ = tome_forward(x, model.blocks, plan, prefix, timm_attend, timm_feed)
    normed = model.norm(tokens)
    if kind == "distilled":
        logits = torch.stack([model.head(normed[:, 0]), model.head_dist(normed[:, 1])])
    else:
        pooled = (normed * size[..., None])[:, prefix:].sum(1) / 16
        logits = model.head(model.fc_norm(pooled))
    config = {
        "vit": {**SIZES, "norm_eps": 1e-6, "class_token": class_token, "pool": pool},
        "r": plan,
        "r_form": "tuple",
        "prop_attn": True,
    }
    if kind == "distilled":
        config["vit"]["distilled"] = True
    case = {
        "family": "reduce",
        "config": config,
        "seed": 3,
        "state_dict": shapes,
        "inputs": RECIPE,
        "tensors": {"logits": "", "tokens_last_block": "", "size": ""},
        "rtol": 1e-4,
        "atol": 1e-4,
    }
    (folder / "case.json").write_text(json.dumps(case))
    recorded = {"logits": logits, "tokens_last_block": tokens, "size": size[..., None]}
    save_file(
        {name: value.float().contiguous() for name, value in recorded.items()}, folder / "case.safetensors"
    )
    return folder / "case.json"


@pytest.mark.parametrize("kind", KINDS)
def test_vision_transformers_of_every_kind_are_verified(tmp_path, kind):
    path = record(tmp_path, kind, [3, 2, 4])
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exit_code == 0, result.output


def test_a_recording_of_another_plan_fails(tmp_path):
    path = record(tmp_path, "distilled", [3, 2, 4])
    case = json.loads(path.read_text())
    case["config"]["r"] = [2, 3, 4]
    path.write_text(json.dumps(case))
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 1
