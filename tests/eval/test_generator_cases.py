"""Parity cases of generators: other sizes and settings than the recorded ones, and faulty cases."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_generators import CASES, CLASSES, CODES, COUNT, build

from vistok.eval.parity.case import CannotBuild
from vistok.eval.parity.verify import verify
from vistok.generate.noise import gumbel

pytestmark = pytest.mark.usefixtures("small_and_quick")
SYSTEMS = {"maskgit": "ImageBert", "maskgit-uvit": "UViTBert", "rar": "RAR"}
NOISE_SEED = 77


class Stream:
    """NumPy's stream of a recorded run."""

    def __init__(self, batch, draw):
        self.random, self.batch, self.draw = np.random.RandomState(NOISE_SEED), batch, draw

    def gumbel(self, *shape):
        return self.draw(self.random, (self.batch, *shape))


def uniform(random, shape):
    return gumbel(torch.from_numpy(random.random_sample(shape).astype(np.float32)))


def direct(random, shape):
    return torch.from_numpy(random.gumbel(size=shape).astype(np.float32))


def nested(model):
    fields = {key: value for key, value in vars(model.config).items() if key not in ("tokenizer", "grid")}
    return {"model": {"vq_model": {"codebook_size": fields.pop("codebook_size")}, "generator": fields}}


def write(folder, name, **fields):
    """A case of a small generator as the recordings are laid out; `fields` replace those of its json."""
    model = build(name)
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(CODES, (2, COUNT), generator=random)
    classes, no_class = torch.tensor([1, 4]), torch.tensor([CLASSES] * 2)
    if model.family == "rar":
        orders = torch.stack([torch.randperm(COUNT, generator=random) for _ in classes])
        labels = ids.gather(1, orders)
        permuted = model.logits(labels, classes, orders)
        loss = torch.nn.functional.cross_entropy(permuted[:, :-1].flatten(0, 1), labels.flatten())
        logits = {
            "raster": model.logits(ids, classes),
            "uncond": model.logits(ids, no_class),
            "permuted": permuted,
        }
        tensors = {"class": classes, "orders": orders, "labels_permuted": labels, "ar_loss_permuted": loss}
        run = {"noise_seed": NOISE_SEED, "B": 1, "guidance_scale": 2.0, "randomize_temperature": 0.9}
        settings = model.check_settings({"guidance": 2.0, "temperature": 0.9})
        tensors["sample_eval"] = model.write(classes[:1], settings, Stream(1, direct))
    else:
        ids[:, 1::2] = CODES
        logits = {"cond": model.logits(ids, classes), "uncond": model.logits(ids, no_class)}
        run = {"noise_seed": NOISE_SEED, "num_sample_steps": 3, "guidance_decay": "constant"}
        settings = model.check_settings({"steps": 3, "guidance_decay": "constant"})
        states = torch.stack(list(model.states(classes, settings, Stream(2, uniform))))
        tensors = {"condition": classes, "steps_eval": states, "sample_eval": states[-1]}
    tensors["input_ids"] = ids
    for key, value in logits.items():
        tensors |= {f"logits_{key}": value[:, ::2, ::4], f"lse_{key}": value.logsumexp(-1)}
    tensors = {key: value.int() if value.dtype == torch.int64 else value for key, value in tensors.items()}
    data = {
        "family": "titok",
        "system": SYSTEMS[model.family],
        "config": nested(model),
        "seed": 1,
        "state_dict": {key: ["float32", list(value.shape)] for key, value in model.state_dict().items()},
        "tensors": {key: "[:, ::2, ::4]" if key.startswith("logits") else "" for key in tensors},
        "sampling": {"eval": run},
        "rtol": 1e-4,
        "atol": 1e-4,
    } | fields
    (folder / "case.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    arrays = {key: value.detach().contiguous() for key, value in tensors.items()}
    save_file(arrays, folder / "case.safetensors")
    return folder / "case.json"


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_recorded_tensor_is_recomputed(tmp_path, name, dtype):
    rows = verify(write(tmp_path, name), dtype=dtype)
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    inputs = {"input_ids", "condition", "class", "orders"}
    assert {row.name for row in rows} == set(load_file(tmp_path / "case.safetensors")) - inputs


def test_a_generator_is_recognised_by_its_keys_alone(tmp_path, name):
    assert all(row.passed for row in verify(write(tmp_path, name, system=None)))


@pytest.mark.parametrize("tensor", ["sample_eval", "logits_uncond", "lse_uncond"])
def test_a_changed_recording_is_a_miss(tmp_path, name, tensor):
    path = write(tmp_path, name)
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors[tensor].view(-1)[3] += 1
    save_file(tensors, path.with_suffix(".safetensors"))
    assert [row.name for row in verify(path) if not row.passed] == [tensor]


def test_a_tensor_no_class_computes_is_not_passed_over(tmp_path, name):
    path = write(tmp_path, name)
    tensors = load_file(path.with_suffix(".safetensors"))
    save_file(tensors | {"sample_other": tensors["sample_eval"].clone()}, path.with_suffix(".safetensors"))
    with pytest.raises(CannotBuild, match="does not compute: sample_other"):
        verify(path)


RUN = {"noise_seed": NOISE_SEED, "guidance_scale": 2.0, "randomize_temperature": 0.9}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({**RUN, "top_k": 3}, "the run eval has the settings top_k; known are randomize_temperature"),
        ({**RUN, "guidance_scale": -1}, "guidance is -1"),
        ({**RUN, "guidance_scale": "high"}, "guidance is 'high'"),
        ({**RUN, "noise_seed": -1}, "noise_seed is -1; it takes a whole number"),
        ({**RUN, "B": 3}, "B is 3; it takes a whole number from 1 to 2"),
        ({"guidance_scale": 2.0}, "noise_seed is None"),
        ([1], "sampling is {'eval': \\[1\\]}; it maps names of runs to their settings"),
    ],
)
def test_runs_that_cannot_be_replayed_say_why(tmp_path, name, run, message):
    with pytest.raises(CannotBuild, match=message):
        verify(write(tmp_path, name, sampling={"eval": run}))


def test_a_configuration_of_another_size_than_the_weights_is_refused(tmp_path, name):
    config = nested(build(name))
    config["model"]["generator"]["intermediate_size"] = 64
    with pytest.raises(CannotBuild, match=r"keys differ.*ours \[64"):
        verify(write(tmp_path, name, config=config))
