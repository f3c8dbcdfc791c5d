"""Every value of a configuration is built, or refused in one line before anything is allocated."""

import dataclasses
import math

import pytest
import torch
from tiny_tokenizers import CASES

from vistok import create
from vistok.registry import families

pytestmark = pytest.mark.usefixtures("small_and_quick")
FAMILIES = ["titok-vq", "titok-legacy", "tatitok-vae", "maskgit-vqgan", "instella", "flextok"]
FAMILIES += ["karl-vqgan-vq", "karl-vae", "seed-1", "seed-2", "slotmllm", "dualtoken"]
VALUES = [
    0,
    -1,
    3,
    7,
    2**40,
    10**30,
    0.5,
    -0.5,
    math.nan,
    math.inf,
    None,
    True,
    "8",
    "x",
    [],
    [0],
    [-1],
    [3],
    {},
]
FIELDS = [
    (case, field.name)
    for case in FAMILIES
    for field in dataclasses.fields(families()[CASES[case][0]].config_class)
]


@pytest.mark.parametrize(("case", "field"), FIELDS, ids=lambda part: part)
def test_a_value_is_built_or_refused_in_one_line(case, field):
    family, config = CASES[case]
    refused = 0
    for value in VALUES:
        try:
            with torch.device("meta"):
                create(family, **{**config, field: value})
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 400
    assert refused >= len(VALUES) // 3


RELATIONS = [
    ("titok-vq", {"crop_size": 40}, "crop_size 40 is not a multiple of vit_enc_patch_size 16"),
    ("titok-legacy", {"vit_dec_patch_size": 8}, "legacy decoders predict MaskGIT-VQGAN codes"),
    ("titok-vq", {"commitment_cost": -0.1}, "commitment_cost is -0.1; it takes a number from 0"),
    ("maskgit-vqgan", {"num_channels": 1}, "num_channels is 1; images have 3 channels"),
    ("maskgit-vqgan", {"hidden_channels": 48}, "multiples of 32, the groups"),
    ("maskgit-vqgan", {"image_size": 40}, "image_size is 40; it must be a multiple of 16"),
    ("maskgit-vqgan", {"z_channels": 16}, "z_channels 16 and embedding_dim 8 differ"),
    ("maskgit-vqgan", {"num_resolutions": 4}, "num_resolutions=4 does not match"),
    ("instella", {"in_channels": 4}, "in_channels is 4; images have 3 channels"),
    ("instella", {"scale": 4}, "scale is 4; it is a side in pixels of 8 or more"),
    ("instella", {"upsample_idx": [5]}, "rising block numbers below 2"),
    ("instella", {"decoder_head_dim": 18}, "sum to 16, but decoder_head_dim is 18"),
    ("flextok", {"latent_size": 9}, "latent_size is 9; it must be a multiple of patch_size, 2"),
    ("flextok", {"vae_block_out_channels": [8, 18]}, "must be a multiple of vae_norm_num_groups, 4"),
    ("flextok", {"levels": [8, 1]}, "levels is .*; it takes one or more numbers from 2"),
    ("flextok", {"levels": [65536] * 4}, "more than 2"),
    ("flextok", {"frequency_embedding_size": 7}, "frequency_embedding_size is 7; it must be even"),
    ("flextok", {"mode_scale": 2.0}, "times stay in order from -1 to 1.752"),
    ("flextok", {"null_probability": 1.5}, "null_probability is 1.5; it takes a number from 0 to 1"),
    ("karl-vae", {"encoder_heads": 5}, "encoder_width is 48; it must be a multiple of encoder_heads, 5"),
    ("karl-vae", {"training_tokens": [5, 4, 1]}, "first, last and step"),
    ("karl-vae", {"base_channels": 48}, "encoder_width 48 must exceed the 48 channels"),
    ("karl-vqgan", {"base_hidden_channels": 16}, "of 32, the groups of a VQGAN"),
]


@pytest.mark.parametrize(("case", "change", "message"), RELATIONS, ids=lambda part: str(part)[:40])
def test_values_that_do_not_fit_together_are_refused_by_name(case, change, message):
    family, config = CASES[case]
    with pytest.raises(ValueError, match=message):
        create(family, **{**config, **change})


NESTED = {
    "model": {"vq_model": {"finetune_decoder": False}},
    "dataset": {"preprocessing": {"crop_size": 256}},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NESTED | {"model": "titok.yaml"}, "the configuration's model is 'titok.yaml'; it takes a mapping"),
        (NESTED | {"dataset": [256]}, r"the configuration's dataset is \[256\]; it takes a mapping"),
        (NESTED | {"model": {"vq_model": "x"}}, "a TiTok one has a mapping vq_model"),
        (NESTED | {"model": {"vq_model": {"codebook_size": "many"}}}, "codebook_size is 'many'"),
        (NESTED | {"model": {"vq_model": {"codebook_size": -4}}}, "codebook_size is -4"),
    ],
)
def test_a_nested_configuration_of_other_types_is_refused_in_words(config, message):
    with pytest.raises(ValueError, match=message):
        create("titok", **config)
