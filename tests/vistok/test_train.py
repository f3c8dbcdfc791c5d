"""Training end to end on tiny models: the loss falls, a killed run resumes exactly, mistakes are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from vistok import create, load
from vistok.models import titok
from vistok.train import recipe
from vistok.train.config import OptimizerConfig, TrainConfig
from vistok.train.loop import train
from vistok.train.losses import ReconstructionLossConfig

SIDE = 32
MINI = {
    "name": "mini",
    "image_size": SIDE,
    "patch_size": 8,
    "thumbnail_size": 8,
    "levels": [[2, [8, 8]], [2, [4, 4, 4]]],
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
}
VIT = {
    "name": "titok",
    "crop_size": SIDE,
    "vit_enc_model_size": "tiny",
    "vit_dec_model_size": "tiny",
    "num_latent_tokens": 4,
    "token_size": 8,
    "codebook_size": 64,
    "finetune_decoder": False,
}
TITOK = {**VIT, "is_legacy": False}
SCENES = {"sources": [{"kind": "scenes"}]}
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, end_learning_rate=1e-4, warmup=0, betas=(0.9, 0.95))
BASE = TrainConfig(
    tokenizer=MINI,
    data=SCENES,
    steps=6,
    batch_size=4,
    precision="no",
    optimizer=OPTIMIZER,
    discriminator_optimizer=OPTIMIZER,
    workers=0,
    log_every=1,
    validate_every=100,
    checkpoint_every=3,
)


@pytest.fixture(autouse=True, scope="module")
def small_and_quick():
    """One more ViT size beside the published three, and one thread: tiny kernels wait for a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(titok.SIZES, "tiny", (64, 2, 2))
        yield
    torch.set_num_threads(threads)


def run(config, output, **options):
    return train(config, output, progress=False, **options)


def rows(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def checkpoint(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def same(one, other):
    """Whether two nested states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---- a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [MINI, TITOK, {**TITOK, "quantize_mode": "vae"}])
def test_thirty_steps_lower_the_loss(tokenizer, tmp_path):
    folder = run(replace(BASE, tokenizer=tokenizer, steps=40, batch_size=8, checkpoint_every=100), tmp_path)
    log = rows(tmp_path)
    assert [row["step"] for row in log] == list(range(1, 41))
    first, last = (sum(row["reconstruction"] for row in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.8 * first
    assert load(folder).reconstruct(torch.rand(1, 3, SIDE, SIDE)).shape == (1, 3, SIDE, SIDE)


def test_the_log_names_losses_and_psnr(tmp_path):
    run(replace(BASE, tokenizer=TITOK, steps=1), tmp_path)
    assert set(rows(tmp_path)[0]) == {"step", "loss", "reconstruction", "quantizer", "psnr"}


def test_the_exported_model_is_the_running_average(tmp_path):
    folder = run(BASE, tmp_path)
    state = checkpoint(tmp_path)
    assert same(dict(load(folder).state_dict()), dict(state["ema"]))
    assert not same(dict(state["ema"]), dict(state["model"]))


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(replace(BASE, seed=seed, steps=2, nested_dropout=0.5), tmp_path / name)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


def test_worker_processes_change_no_number(tmp_path):
    for workers in (0, 1):
        run(replace(BASE, steps=2, workers=workers), tmp_path / str(workers))
    assert rows(tmp_path / "0") == rows(tmp_path / "1")


def test_validation_writes_a_picture_and_rates_every_length(tmp_path):
    from PIL import Image

    names = ["astronaut", "coffee"]
    config = replace(BASE, steps=2, validation=tuple(names), validation_tokens=(1, 4), validate_every=2)
    run(config, tmp_path)
    assert {"validation_psnr_1", "validation_psnr_4"} <= set(rows(tmp_path)[-1])
    with Image.open(tmp_path / "samples" / "step_0000002.png") as sheet:
        assert sheet.width >= 3 * SIDE


def test_warm_start_begins_at_the_linear_code(tmp_path):
    for name, images in (("cold", 0), ("warm", 128)):
        run(replace(BASE, steps=1, warm_start_images=images), tmp_path / name)
    assert rows(tmp_path / "warm")[0]["psnr"] > rows(tmp_path / "cold")[0]["psnr"] + 3


def test_bfloat16_runs_beside_float32_in_one_process(tmp_path):
    run(replace(BASE, steps=2), tmp_path / "float32")
    run(replace(BASE, steps=2, precision="bf16"), tmp_path / "bfloat16")
    losses = [rows(tmp_path / name)[-1]["loss"] for name in ("float32", "bfloat16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Sample numbers run on through the parts: 2 × 4 sees the eight pictures that one batch of 8 sees."""
    plain = replace(BASE, steps=2, optimizer=replace(OPTIMIZER, clip_norm=0.0))
    run(replace(plain, batch_size=8), tmp_path / "one")
    run(replace(plain, batch_size=4, gradient_accumulation=2), tmp_path / "two")
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    # Adam's first moment is linear in the gradients, the weights themselves hang on their signs.
    moments = [[state["exp_avg"] for state in run["optimizer"][0]["state"].values()] for run in (one, two)]
    for together, accumulated in zip(*moments, strict=True):
        torch.testing.assert_close(together, accumulated, rtol=1e-3, atol=1e-6)


# ---- killed and resumed ------------------------------------------------------------------------------------

RESUMABLE = {
    "plain": BASE,
    "nested dropout and accumulation": replace(
        BASE, nested_dropout=0.5, gradient_accumulation=2, batch_size=2
    ),
    "warm start": replace(BASE, warm_start_images=16),
    "KL samples": replace(BASE, tokenizer={**TITOK, "quantize_mode": "vae"}),
    "clustering": replace(BASE, tokenizer={**TITOK, "clustering_vq": True}),
    "discriminator": replace(
        BASE,
        loss=ReconstructionLossConfig(
            discriminator_weight=0.1, discriminator_start=2, discriminator_channels=32
        ),
    ),
}


@pytest.mark.parametrize("case", RESUMABLE)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(case, tmp_path):
    config = RESUMABLE[case]
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", steps=3)
    assert checkpoint(tmp_path / "parts")["step"] == 3
    resumed = run(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert same(checkpoint(tmp_path / "parts"), checkpoint(tmp_path / "whole"))
    assert same(dict(load(resumed).state_dict()), dict(load(whole).state_dict()))


def test_rows_written_after_the_last_checkpoint_are_replaced(tmp_path):
    run(BASE, tmp_path / "whole")
    run(BASE, tmp_path / "killed", steps=3)
    at_three = (tmp_path / "killed" / "checkpoint.pt").read_bytes()
    run(BASE, tmp_path / "killed", steps=5)
    (tmp_path / "killed" / "checkpoint.pt").write_bytes(
        at_three
    )  # as if killed at step 5, before the next checkpoint
    run(BASE, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_a_row_cut_in_the_middle_by_the_kill_does_not_stop_the_resumption(tmp_path):
    run(BASE, tmp_path / "whole")
    run(BASE, tmp_path / "killed", steps=3)
    with (tmp_path / "killed" / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 0.1')
    run(BASE, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(tmp_path):
    run(BASE, tmp_path)
    before = checkpoint(tmp_path)
    run(BASE, tmp_path)
    assert same(checkpoint(tmp_path), before)
    assert len(rows(tmp_path)) == 6


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 2}, {"nested_dropout": 0.1}, {"steps": 7}, {"tokenizer": TITOK}]
)
def test_a_folder_of_another_run_is_refused(change, one_step):
    with pytest.raises(ValueError, match=r"holds another run.*choose a new output folder"):
        run(replace(BASE, **change), one_step)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The folder of a run stopped after one step."""
    output = tmp_path_factory.mktemp("run")
    run(BASE, output, steps=1)
    return output


def test_how_often_to_log_may_change_on_resumption(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path / "run")
    run(replace(BASE, log_every=2, checkpoint_every=2, workers=0), tmp_path / "run", steps=2)
    assert checkpoint(tmp_path / "run")["step"] == 2


# ---- a loss that is not a number ---------------------------------------------------------------------------

EXPLODING = replace(
    BASE, steps=8, optimizer=OptimizerConfig(learning_rate=1e37, schedule="constant", warmup=0, clip_norm=0.0)
)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"not finite.*learning rate"):
        run(EXPLODING, tmp_path)


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 1), (4, 1), (8, 2)])
def test_no_checkpoint_holds_what_made_the_loss_explode(log_every, checkpoint_every, tmp_path):
    with pytest.raises(FloatingPointError):
        run(replace(EXPLODING, log_every=log_every, checkpoint_every=checkpoint_every), tmp_path)
    if (tmp_path / "checkpoint.pt").exists():
        state = checkpoint(tmp_path)
        assert all(value.isfinite().all() for part in ("model", "ema") for value in state[part].values())


def test_the_message_names_the_checkpoint_that_is_there(tmp_path):
    config = replace(EXPLODING, log_every=1, checkpoint_every=1)
    with pytest.raises(FloatingPointError) as raised:
        run(config, tmp_path)
    path = tmp_path / "checkpoint.pt"
    if path.exists():
        assert f"checkpoint of step {checkpoint(tmp_path)['step']} " in str(raised.value)
    else:
        assert "checkpoint of step" not in str(raised.value)


# ---- what trains and what does not -------------------------------------------------------------------------


def weights_before_and_after(config, tmp_path):
    torch.manual_seed(config.seed)
    fields = dict(config.tokenizer)
    start = load(config.initial) if config.initial else create(fields.pop("name"), **fields)
    run(config, tmp_path)
    return start.state_dict(), checkpoint(tmp_path)["model"]


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
    config = replace(BASE, tokenizer=TITOK, steps=3, freeze=("encoder.*", "latent_tokens", "quantize.*"))
    before, after = weights_before_and_after(config, tmp_path)
    for key, value in before.items():
        frozen = key.startswith(("encoder.", "latent_tokens", "quantize."))
        assert torch.equal(value, after[key]) == frozen, key


def test_a_frozen_codebook_is_not_moved_by_clustering_either(tmp_path):
    config = replace(
        BASE, tokenizer={**TITOK, "clustering_vq": True}, steps=3, freeze=("quantize.embedding.*",)
    )
    before, after = weights_before_and_after(config, tmp_path)
    assert torch.equal(before["quantize.embedding.weight"], after["quantize.embedding.weight"])


KARL = {
    "name": "karl",
    "base": "vae",
    "quantize_latent": False,
    "image_size": SIDE,
    "patch_size": 8,
    "max_grid_tokens": 4,
    "num_tokens": 8,
    "max_latent_tokens": 8,
    "training_tokens": [1, 8, 1],
    "encoder_width": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "base_hidden_channels": 8,
    "base_norm_groups": 4,
    "base_channel_mult": [1, 1, 2, 2],
    "base_res_blocks": 1,
}
KARL_VQ = {
    **KARL,
    "base": "vqgan",
    "quantize_latent": True,
    "base_channels": 8,
    "base_hidden_channels": 32,
    "base_norm_groups": 32,
}
FLEXTOK = {
    "name": "flextok",
    "encoder_dim": 32,
    "encoder_depth": 1,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "head_dim": 16,
    "num_tokens": 8,
    "frequency_embedding_size": 16,
    "latent_channels": 4,
    "latent_size": 8,
    "vae_block_out_channels": [8, 8, 8],
    "vae_layers_per_block": 1,
    "vae_norm_num_groups": 4,
    "vae_scaling_factor": 1.0,
}
TWO_STAGES = [(KARL, "base_tokenizer."), (KARL_VQ, "base_tokenizer."), (FLEXTOK, "vae.")]


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "base"), TWO_STAGES, ids=["karl", "karl-vq", "flextok"])
def test_a_base_tokenizer_trains_first_and_then_stays(tokenizer, base, tmp_path):
    first = replace(BASE, tokenizer=tokenizer, steps=60, batch_size=8, freeze=(f"[!{base[0]}]*",))
    before, after = weights_before_and_after(first, tmp_path / "base")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.startswith(base)
    }
    losses = [row["reconstruction"] for row in rows(tmp_path / "base")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])

    second = replace(first, initial=str(tmp_path / "base" / "model"), freeze=(f"{base}*",), steps=20)
    start, end = weights_before_and_after(second, tmp_path / "whole")
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert moved and not any(key.startswith(base) for key in moved)
    losses = [row["loss"] for row in rows(tmp_path / "whole")]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(("tokenizer", "base"), [TWO_STAGES[0], TWO_STAGES[2]], ids=["karl", "flextok"])
def test_a_discriminator_without_images_to_judge_is_refused(tokenizer, base, tmp_path):
    loss = ReconstructionLossConfig(discriminator_weight=0.1)
    with pytest.raises(ValueError, match="nothing for a discriminator to judge"):
        run(replace(BASE, tokenizer=tokenizer, freeze=(f"{base}*",), loss=loss, steps=1), tmp_path)


def test_a_run_adds_a_part_to_the_tokenizer_that_it_starts_from(tmp_path):
    run(replace(BASE, tokenizer=MINI, steps=2), tmp_path / "base")
    start = tmp_path / "base" / "model"
    base = load(start)
    frozen = tuple(f"{part}*" for part in ("encoder", "decoder.[!r]"))
    grown = replace(BASE, tokenizer=MINI | {"refiner_width": 8}, initial=str(start), freeze=frozen, steps=2)
    run(grown, tmp_path / "grown")
    result = load(tmp_path / "grown" / "model")
    assert result.config.refiner_width == 8
    assert all(torch.equal(value, result.state_dict()[key]) for key, value in base.state_dict().items())
    assert result.decoder.refiner.leave.weight.any()


def test_fields_that_change_the_initial_tokenizer_are_refused(tmp_path):
    run(replace(BASE, tokenizer=MINI, steps=1), tmp_path / "base")
    other = replace(BASE, tokenizer=MINI | {"width": 64}, initial=str(tmp_path / "base" / "model"), steps=1)
    with pytest.raises(ValueError, match="may add parts and change none"):
        run(other, tmp_path / "other")


@pytest.mark.parametrize("freeze", [("nothing.*",), ("encoder.*", "latent_tokenz")])
def test_a_pattern_that_freezes_nothing_is_refused(freeze, tmp_path):
    with pytest.raises(ValueError, match=f"{freeze[-1][:7]}.*matches no parameter"):
        run(replace(BASE, tokenizer=TITOK, steps=1, freeze=freeze), tmp_path)


def test_nested_dropout_needs_ordered_tokens(tmp_path):
    with pytest.raises(ValueError, match="nested_dropout needs an ordered tokenizer; titok"):
        run(replace(BASE, tokenizer=TITOK, nested_dropout=0.5), tmp_path)


def test_warm_start_needs_something_to_fit(tmp_path):
    with pytest.raises(ValueError, match=r"warm_start_images.*titok"):
        run(replace(BASE, tokenizer=TITOK, warm_start_images=8), tmp_path)


def test_a_pattern_scales_the_learning_rate(tmp_path):
    config = replace(
        BASE, steps=3, optimizer=replace(OPTIMIZER, weight_decay=0.0, scales={"*linear_path*": 0.0})
    )
    before, after = weights_before_and_after(config, tmp_path)
    for key, value in before.items():
        if "linear_path" in key:
            assert torch.equal(value, after[key])


def test_training_goes_on_from_given_weights(tmp_path):
    start = run(replace(BASE, steps=3), tmp_path / "first")
    run(
        replace(
            BASE,
            initial=str(start),
            steps=3,
            optimizer=replace(OPTIMIZER, learning_rate=0.0, end_learning_rate=0.0),
        ),
        tmp_path / "second",
    )
    first, second = (load(tmp_path / name / "model").state_dict() for name in ("first", "second"))
    assert same(dict(first), dict(second))


def test_the_discriminator_trains_from_its_first_step_on(tmp_path):
    config = RESUMABLE["discriminator"]
    run(config, tmp_path, steps=4)
    assert ["adversarial" in row for row in rows(tmp_path)] == [False, False, True, True]
    state = checkpoint(tmp_path)
    assert any(key.startswith("discriminator.block_in") for key in state["objective"])
    assert float(state["objective"]["ema_real_logits_mean"]) != 0
    assert len(state["adversary_optimizer"][0]["state"]) > 0


@pytest.mark.parametrize("which", ["optimizer", "discriminator_optimizer"])
def test_a_warm_up_longer_than_the_run_is_refused_before_the_first_step(which, tmp_path):
    loss = ReconstructionLossConfig(
        discriminator_weight=0.1, discriminator_start=2, discriminator_channels=32
    )
    with pytest.raises(ValueError, match=r"warm-?up"):
        run(
            replace(BASE, loss=loss, **{which: replace(OPTIMIZER, warmup=5 if which != "optimizer" else 6)}),
            tmp_path,
        )
    assert not (tmp_path / "log.jsonl").exists() or not rows(tmp_path)


# ---- stage 1: a teacher's codes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny MaskGIT-VQGAN of 1024 codes, 16 × 16 pixels each, on disk."""
    torch.manual_seed(0)
    model = create(
        "maskgit-vqgan",
        channel_mult=(1,) * 5,
        hidden_channels=32,
        z_channels=8,
        embedding_dim=8,
        image_size=SIDE,
    )
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return str(folder)


def test_stage_one_learns_the_teachers_codes(teacher, tmp_path):
    config = replace(BASE, tokenizer=VIT, teacher=teacher, steps=40, batch_size=8, checkpoint_every=100)
    folder = run(config, tmp_path)
    log = rows(tmp_path)
    assert set(log[0]) == {"step", "loss", "cross_entropy", "accuracy", "quantizer"}
    assert log[-1]["cross_entropy"] < log[0]["cross_entropy"] - 1
    student = load(folder)
    student.attach_pixel_tokenizer(teacher)
    assert student.reconstruct(torch.rand(1, 3, SIDE, SIDE)).shape == (1, 3, SIDE, SIDE)


def test_stage_one_with_a_kl_bottleneck_trains_or_says_why_not(teacher, tmp_path):
    config = replace(BASE, tokenizer={**VIT, "quantize_mode": "vae"}, teacher=teacher, steps=1)
    try:
        run(config, tmp_path)
    except ValueError as error:
        assert "teacher" in str(error)


def test_a_student_that_writes_pixels_cannot_have_a_teacher(teacher, tmp_path):
    with pytest.raises(ValueError):
        run(replace(BASE, tokenizer=TITOK, teacher=teacher, steps=1), tmp_path)


# ---- the configuration file --------------------------------------------------------------------------------

VALID = {"tokenizer": {"name": "mini"}, "data": SCENES, "steps": 10, "batch_size": 2}


def written(tmp_path, values):
    path = tmp_path / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_a_file_gives_the_configuration(tmp_path):
    values = {**VALID, "optimizer": {"learning_rate": "1e-3", "betas": [0.9, 0.95]}, "validation": ["coffee"]}
    config = recipe.read(written(tmp_path, values))
    assert config == TrainConfig(
        **VALID, optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.95)), validation=("coffee",)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 3}, "unknown key stepz"),
        ({"optimizer": {"lr": 1}}, "optimizer: unknown key lr"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"precision": "fp8"}, "precision is 'fp8'.*'bf16'"),
        ({"compile": 1}, "compile is 1"),
        ({"ema": "high"}, "ema is 'high'"),
        ({"freeze": "encoder.*"}, r"freeze is 'encoder\.\*'"),
        ({"freeze": [1]}, r"freeze\[0\] is 1"),
        ({"tokenizer": "mini"}, "tokenizer is 'mini'"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer: schedule is 'linear'.*'cosine'"),
        ({"initial": 3}, "initial is 3"),
        ({"steps": 0}, "steps is 0"),
        ({"tokenizer": {"width": 3}}, "tokenizer needs a name"),
        ({"loss": {"reconstruction": "l3"}}, "reconstruction is 'l3'"),
        ({"loss": {"perceptual_weight": -1}}, "perceptual_weight is -1"),
        ({"optimizer": {"betas": [0.9]}}, "betas"),
        ({3: "x"}, "unknown key 3"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(change, said, tmp_path):
    with pytest.raises(ValueError, match=rf"run\.yaml.*{said}"):
        recipe.read(written(tmp_path, {**VALID, **change}))


@pytest.mark.parametrize("key", ["tokenizer", "data", "steps", "batch_size"])
def test_a_missing_key_is_named(key, tmp_path):
    values = {name: value for name, value in VALID.items() if name != key}
    with pytest.raises(ValueError, match=rf"run\.yaml: {key} must be given"):
        recipe.read(written(tmp_path, values))


@pytest.mark.parametrize("text", ["a: [", "- 1", "just text", ""])
def test_what_is_no_mapping_is_refused_by_name(text, tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml"):
        recipe.read(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        recipe.read(tmp_path / "gone.yaml")


SHIPPED = [
    *("vistok-mini", "binary-small", "karl-small-base", "karl-small", "flextok-small-vae", "flextok-small"),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid(name):
    from importlib.resources import files

    config = recipe.read(str(files("vistok.assets") / f"{name}.yaml"))
    fields = dict(config.tokenizer)
    assert create(fields.pop("name"), **fields).image_size
    held_out, sources = set(config.validation), config.data["sources"]
    assert all(held_out <= set(source["exclude"]) for source in sources if source["kind"] == "photos")


@pytest.mark.parametrize("data", [{}, {"sources": []}, {"sources": [{"kind": "video"}]}])
def test_impossible_data_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="source"):
        run(replace(BASE, data=data, steps=1), tmp_path)


def test_a_missing_validation_picture_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=r"gone\.png"):
        run(replace(BASE, validation=("gone.png",)), tmp_path)
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "checkpoint.pt").exists()
