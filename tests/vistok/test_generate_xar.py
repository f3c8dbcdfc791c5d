"""xAR: clusters of continuous latents by flow matching, and tokens that its tokenizer decodes."""

import json
import math
from itertools import pairwise

import pytest
import tiny_tokenizers
import torch
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_generators import filled

from vistok import Tokens, generate
from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.generate.noise import ImageNoise
from vistok.generate.registry import GENERATORS
from vistok.generate.xar import sde_step, solver_times

pytestmark = pytest.mark.usefixtures("small_and_quick")

CONFIG = {
    "tokenizer": "tiny",
    "encoder_embed_dim": 32,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 3,
    "decoder_num_heads": 4,
    "img_size": 64,
    "vae_embed_dim": 4,
    "class_num": 5,
    "cfg": 3.0,
    "num_steps": 4,
}
LABELS = [3, 0, 4, 1, 2]
SIZE, CHANNELS = 4, 4  # of a cluster


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(**changes):
    model = filled(generate.create("xar", **{**CONFIG, **changes}))
    with torch.no_grad():  # or classes and context hardly matter
        model.class_emb.weight.mul_(30)
        for block in (*model.encoder_blocks, *model.decoder_blocks):
            block.attn.proj.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def assert_close(tokens, expected):
    """Equal up to the rounding of batches of other sizes, which the solver carries along."""
    torch.testing.assert_close(tokens.latents, expected.latents, atol=2e-3, rtol=1e-3)


# ---- clusters ----------------------------------------------------------------------------------------------


def test_clusters_are_quarters_of_the_grid_row_by_row(model):
    places = torch.arange(16).view(1, 16, 1)
    clusters = model.clusterify(places)
    assert clusters[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(model.unclusterify(clusters), places)
    rows = torch.randn(3, 256, 2)
    large = build(img_size=256)
    assert torch.equal(large.unclusterify(large.clusterify(rows)), rows)


def test_rotations_follow_the_places_in_the_grid(model):
    table = model.rotations(8)  # two pairs per axis, with frequencies 1 and 1/100
    for cluster in range(4):
        for cell in range(4):
            row, column = 2 * (cluster // 2) + cell // 2, 2 * (cluster % 2) + cell % 2
            angles = torch.tensor([row, row / 100, column, column / 100])
            torch.testing.assert_close(table[4 * cluster + cell, :, 0], angles.cos())
            torch.testing.assert_close(table[4 * cluster + cell, :, 1], angles.sin())


def test_a_cluster_does_not_depend_on_later_ones(model):
    x, times = torch.randn(2, 16, CHANNELS, generator=seeded()), torch.rand(2, 4, generator=seeded())
    classes = torch.tensor([1, 5])
    whole = model.velocity(x, times, classes)
    for count in range(1, 4):
        part = model.velocity(x[:, : SIZE * count], times[:, :count], classes)
        torch.testing.assert_close(part, whole[:, : SIZE * count], atol=1e-5, rtol=1e-5)
        changed = x.clone()
        changed[:, SIZE * count :] += 1
        other = model.velocity(changed, times, classes)
        torch.testing.assert_close(other[:, : SIZE * count], part, atol=1e-5, rtol=1e-5)
        assert (other - whole)[:, SIZE * count :].abs().max() > 1e-2


def test_a_cluster_depends_on_every_earlier_one_and_on_its_own_time_and_class(model):
    x, times, classes = torch.randn(1, 16, CHANNELS, generator=seeded()), torch.full((1, 4), 0.5), [1]
    last = model.velocity(x, times, torch.tensor(classes))[:, -SIZE:]
    for cluster in range(4):
        for change in ("x", "times"):
            values = {"x": x.clone(), "times": times.clone(), "classes": torch.tensor(classes)}
            rows = slice(SIZE * cluster, SIZE * cluster + SIZE) if change == "x" else cluster
            values[change][:, rows] += 0.3
            assert (model.velocity(**values)[:, -SIZE:] - last).abs().max() > 1e-5, (cluster, change)
    assert (model.velocity(x, times, torch.tensor([2]))[:, -SIZE:] - last).abs().max() > 1e-3


def test_velocities_with_a_cache_are_those_of_the_whole_sequence(model):
    clusters = torch.randn(4, 2, SIZE, CHANNELS, generator=seeded())
    caches, classes = model.caches(2), torch.tensor([1, 5])
    for cluster in range(4):
        for time, scale in ((1.0, 1.0), (0.5, 0.7), (0.04, 0.2)):
            context = [clusters[cluster - 1]] if cluster and time == 1 else []
            x = scale * clusters[cluster]
            cached = model.next_velocity(x, time, classes, cluster, caches, context)
            rows = torch.cat([*clusters[:cluster], x], 1)
            times = torch.tensor([[0.0] * cluster + [time]] * 2)
            whole = model.velocity(rows, times, classes)[:, -SIZE:]
            torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)


# ---- sampling ----------------------------------------------------------------------------------------------


def plain_latents(model, label, noise, guidance, steps):
    """Latents [N, C] of one image in cluster order, without cache or batches, with drifts from scores."""
    clusters = []
    for k in range(4):
        scale = 1 + (guidance - 1) * k / 3
        x = noise.normal(SIZE, CHANNELS)[0].double()
        points = [1 - 0.96 * i / (steps - 1) for i in range(steps)] + [0.0]
        for t, after in pairwise(points):
            rows = torch.cat([*clusters, x]).float()[None]
            times = torch.tensor([[0.0] * k + [t]])
            drifts = []
            for each in (label, 5):
                v = model.velocity(rows, times, torch.tensor([each]))[0, -SIZE:].double()
                score = (-(1 - t) * v - x) / (t**2 + (1 - t) * t)
                drifts.append(v - 0.5 * 2 * t * score)
            drift = drifts[1] + scale * (drifts[0] - drifts[1]) if scale > 1 else drifts[0]
            x = x + drift * (after - t)
            if after:
                x = x + math.sqrt(2 * t) * math.sqrt(t - after) * noise.normal(SIZE, CHANNELS)[0].double()
        clusters.append(x)
    return torch.cat(clusters)


@torch.no_grad()
@pytest.mark.parametrize(("guidance", "steps"), [(1.0, 3), (3.0, 4), (0.5, 3)])
def test_sampling_equals_a_plain_loop(model, guidance, steps):
    tokens = model.sample(LABELS[:3], guidance=guidance, steps=steps, generator=[seeded(i) for i in range(3)])
    for i, label in enumerate(LABELS[:3]):
        plain = plain_latents(model, label, ImageNoise(1, [seeded(i)]), guidance, steps)
        rows = model.clusterify(tokens.latents[i : i + 1].double() * 0.2325).flatten(0, 2)
        torch.testing.assert_close(rows, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "bound"), [(50, 0.015), (200, 0.007)])
def test_the_solver_reaches_the_mean_and_deviation_of_a_gaussian(steps, bound):
    mean, deviation = 1.5, 0.7
    x, points = torch.randn(200_000, generator=seeded()).double(), solver_times(steps)
    noise = seeded(1)
    for t, after in pairwise(points):
        # x_t is normal, so that noise - data has a linear conditional mean.
        variance = (1 - t) ** 2 * deviation**2 + t**2
        velocity = (t - (1 - t) * deviation**2) / variance * (x - (1 - t) * mean) - mean
        x = sde_step(x, velocity, t, after, torch.randn(x.shape, generator=noise) if after else None)
    assert abs(float(x.mean()) - mean) < 0.01
    assert abs(float(x.std()) / deviation - 1) < bound


def test_times_go_evenly_to_a_last_noisy_one_and_then_to_data():
    assert solver_times(4) == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])


def test_the_first_cluster_is_never_guided(model):
    weak, strong = (model.sample(LABELS, guidance=each, generator=seeded()) for each in (1.0, 9.0))
    first = torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(weak.latents[:, first], strong.latents[:, first], atol=1e-4, rtol=1e-4)
    others = [place for place in range(16) if place not in first]
    assert (weak.latents - strong.latents)[:, others].abs().amax((0, 2)).min() > 1e-2


def test_passes_are_doubled_where_guidance_counts(model):
    for guidance, expected in ((1.0, {5}), (0.3, {5}), (2.0, {5, 10})):
        batches = []
        handle = model.decoder_norm.register_forward_pre_hook(lambda _, x, all=batches: all.append(len(x[0])))
        model.sample(LABELS, guidance=guidance, generator=seeded())
        handle.remove()
        assert set(batches) == expected and len(batches) == 4 * CONFIG["num_steps"]


def test_an_image_depends_neither_on_its_batch_nor_on_its_place(model):
    alone = [model.sample(label, generator=[seeded(i)]) for i, label in enumerate(LABELS)]
    assert all(tokens.latents.shape == (1, 16, CHANNELS) for tokens in alone)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        batch = model.sample([LABELS[i] for i in order], generator=[seeded(i) for i in order])
        assert_close(batch, Tokens.cat([alone[i] for i in order]))


def test_a_seed_gives_the_same_latents_and_another_others(model):
    first, again, other = (model.sample(LABELS, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first == again
    assert (first.latents - other.latents).abs().amax((1, 2)).min() > 0.1
    parts, generator = [[3], [0, 4], [1, 2]], seeded()
    assert_close(Tokens.cat([model.sample(part, generator=generator) for part in parts]), first)


def test_no_classes_give_no_images(model):
    assert model.sample([]).latents.shape == (0, 16, CHANNELS)
    assert model.sample([], guidance=1.0).latents.shape == (0, 16, CHANNELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_sample_float32_latents(model, dtype):
    tokens = build().to(dtype).sample(LABELS, generator=seeded())
    tokens.validate()
    assert tokens.latents.dtype == torch.float32
    expected = model.sample(LABELS, generator=seeded()).latents
    error = (tokens.latents - expected).abs().mean() / expected.abs().mean()
    assert error < (1e-5 if dtype == torch.float64 else 0.1)


def test_from_class_to_picture():
    tokenizer = tiny_tokenizers.build("kl16-vae")
    tokenizer.name = "tiny"
    model = build()
    model.check_tokenizer(tokenizer)
    tokens = model.sample(LABELS, generator=seeded())
    assert tokens.grid == (4, 4) and tokens.tokenizer == "tiny"
    assert tokenizer.decode(tokens).shape == (5, 3, 32, 32)


# ---- training ----------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_noise_less_data():
    model = build()
    with torch.no_grad():
        model.pred.weight.zero_()
        model.pred.bias.fill_(0.25)
    latents, noise = torch.randn(2, 16, CHANNELS), torch.randn(2, 4, SIZE, CHANNELS)
    loss = model.loss(latents, torch.tensor([0, 5]), noise=noise)
    expected = (noise - model.clusterify(latents) - 0.25).square().mean()
    torch.testing.assert_close(loss, expected)


def test_a_model_that_learns_one_image_samples_it():
    torch.manual_seed(0)
    model = generate.create("xar", **CONFIG)
    image = torch.randn(1, 16, CHANNELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = model.loss(image.expand(16, -1, -1), torch.zeros(16, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    sampled = model.sample([0, 0], guidance=1.0, steps=20, generator=seeded()).latents * 0.2325
    assert (sampled - image).square().mean() < 0.2


# ---- files -------------------------------------------------------------------------------------------------


def published_form(model):
    """The state dict as published, with its constants."""
    state = dict(model.state_dict())
    state["mask"] = torch.zeros(1, 1, 16, 16)
    for name, heads in (("encoder", 2), ("decoder", 4)):
        for layer in range(len(getattr(model, f"{name}_blocks"))):
            prefix = f"{name}_blocks.{layer}.attn.rope."
            state[f"{prefix}freqs"] = torch.zeros(32 // heads // 4)
            for part in ("freqs_cos", "freqs_sin"):
                state[prefix + part] = torch.zeros(16, 32 // heads)
    return state


def test_the_published_form_is_recognised_and_averages_are_taken(model, tmp_path):
    state = published_form(model)
    trained = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": trained, "model_ema": state, "epoch": 3}, tmp_path / "xAR-B.pth")
    loaded = generate.load(tmp_path / "xAR-B.pth")
    assert loaded.config.encoder_num_heads == 2 and loaded.config.decoder_num_heads == 4
    sampled = loaded.sample(LABELS, generator=seeded(), guidance=3.0, steps=4)
    assert torch.equal(sampled.latents, model.sample(LABELS, generator=seeded()).latents)
    with pytest.raises(ValueError, match=r"does not state cfg; give guidance="):
        loaded.sample([0])


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = generate.load(tmp_path)
    assert loaded.config == model.config
    assert loaded.sample(LABELS, generator=seeded()) == model.sample(LABELS, generator=seeded())


def test_weights_without_rotations_and_configuration_are_refused(model):
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="heads do not show"):
        type(model).recognise(shapes, None)
    assert type(model).recognise({"mask": torch.Size([1])}, None) is None


def test_published_rows_have_the_papers_sizes():
    rows = {name: entry for name, entry in GENERATORS.entries().items() if entry.family == "xar"}
    assert {
        name: (entry.file, entry.config["cfg"], entry.config["num_steps"]) for name, entry in rows.items()
    } == {
        "xar-b": ("xAR-B.pth", 2.7, 40),
        "xar-l": ("xAR-L.pth", 2.3, 50),
        "xar-h": ("xAR-H.pth", 2.2, 50),
    }
    for name, entry in rows.items():
        with torch.device("meta"):
            model = generate.create(name)
        assert model.grid == (16, 16) and model.cluster_size == 64
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.parameters, abs=0.06)


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": [0, 5]}, r"class 5 does not exist; .* 0\.\.4"),
        ({"condition": [-1]}, "class -1 does not exist"),
        ({"steps": 2}, "num_steps is 2; it takes a number from 3"),
        ({"steps": 2.5}, "steps is 2.5; it takes a whole number"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": -1}, "guidance is -1"),
        ({"temperature": 1.0}, "temperature does not apply to .*; it takes guidance, steps"),
        ({"generator": [seeded()]}, "1 generators were given for 2 images"),
    ],
)
def test_what_cannot_be_sampled_names_what_is_accepted(model, change, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**{"condition": [0, 1], **change})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_velocities_that_overflow_are_not_turned_into_latents(value):
    broken = build()
    with torch.no_grad():
        broken.pred.bias[0] = value
    with pytest.raises(ValueError, match=r"velocities of .* hold NaN or infinity"):
        broken.sample([0])


def test_a_tokenizer_that_does_not_fit_is_refused(model):
    for case, change, message in (
        (
            "kl16-vae",
            {"embed_dim": 6},
            "writes latents of 4 channels; tokens of kl16 are latents of 6 channels",
        ),
        ("maskgit-vqgan", {}, "writes latents of 4 channels; tokens of .* are indices"),
        ("softvq", {}, "writes a grid of .* tokens; softvq does not decode grids"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check_tokenizer(tiny_tokenizers.fresh(case, **change))
    tokenizer = tiny_tokenizers.fresh("kl16-vae")
    tokenizer.name = "other"
    with pytest.raises(ValueError, match=r"writes tokens of 'tiny'; 'other' cannot decode them"):
        model.check_tokenizer(tokenizer)


def test_latents_and_times_of_other_shapes_are_refused(model):
    x, times, classes = torch.zeros(2, 8, CHANNELS), torch.zeros(2, 2), torch.tensor([0, 1])
    for change in ({"x": x[:, :7]}, {"times": times[:1]}, {"times": torch.zeros(2, 5)}, {"x": x[..., :3]}):
        with pytest.raises(ValueError, match=r"takes \[B, 4 k, 4\] and \[B, k\] with k from 1 to 4"):
            model.velocity(**{"x": x, "times": times, "classes": classes, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_embed_dim": 64}, "encoder_embed_dim is 32 and decoder_embed_dim 64"),
        ({"encoder_num_heads": 3}, "encoder_embed_dim is 32 and encoder_num_heads 3"),
        ({"decoder_num_heads": 16}, "encoder_embed_dim is 32 and decoder_num_heads 16"),
        ({"img_size": 48}, "img_size is 48 and vae_stride 16; .* a multiple of 32"),
        ({"num_steps": 1}, "num_steps is 1"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"preset": "S"}, "preset is 'S'; it takes B, L, H"),
        ({"label_drop_prob": 2.0}, "label_drop_prob is 2.0"),
    ],
)
def test_configurations_that_cannot_be_built_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


def rewritten(folder, change):
    """The recorded case with its json and tensors changed."""
    path = GOLDEN / "xar_small.json"
    data, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    change(data, tensors)
    (folder / "case.json").write_text(json.dumps(data))
    save_file(tensors, folder / "case.safetensors")
    return folder / "case.json"


@pytest.mark.parametrize("tensor", ["sample_cfg2.7", "train_loss", "velocity_second_cached", "rope_cos"])
def test_a_changed_recording_is_a_miss(tmp_path, tensor):
    def change(data, tensors):
        tensors[tensor].view(-1)[-1] += 0.1

    assert [row.name for row in verify(rewritten(tmp_path, change)) if not row.passed] == [tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, _: data["inputs"].update({"label drop": "none"}), "label drop"),
        (lambda data, _: data["inputs"].pop("sampler noise"), "sampler noise"),
        (lambda data, _: data["tensors"].update({"sample_cfg2.7": "latents"}), "solver steps"),
        (lambda data, _: data["config"].update(encoder_depth=3), "keys differ"),
    ],
)
def test_cases_that_cannot_be_run_say_why(tmp_path, change, message):
    with pytest.raises(CannotBuild, match=message):
        verify(rewritten(tmp_path, change))
