"""Whatever a training script wraps weights in, the average loads first, and the choice is reported."""

import json
import logging

import pytest
import torch
from checkpoints import CONFIG, MINI, same, sharded
from safetensors.torch import save_file

from vistok import checkpoint, create, load

pytestmark = pytest.mark.usefixtures("small_and_quick")


def model(seed):
    torch.manual_seed(seed)
    return create("mini", **MINI).eval()


@pytest.fixture(scope="module")
def raw():
    return model(0)


@pytest.fixture(scope="module")
def average():
    return model(1)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    "ema": lambda raw, average: {"model": raw, "ema": average, "ema_decay": 0.99},
    "ema_state_dict": lambda raw, average: {"state_dict": raw, "ema_state_dict": average, "step": 3},
    "model_ema": lambda raw, average: {"model": raw, "model_ema": average, "optimizer": {"state": {}}},
    "ema_model": lambda raw, average: {"ema_model": {"state_dict": average, "decay": 0.9}, "model": raw},
    "state_dict_ema": lambda raw, average: {"state_dict": raw, "state_dict_ema": average},
    "params_ema": lambda raw, average: {"params": raw, "params_ema": average},
    "averaged_model": lambda raw, average: {"averaged_model": average, "model": raw},
    "prefix ema.": lambda raw, average: {"state_dict": prefixed(raw, "model.") | prefixed(average, "ema.")},
    "prefix ema_model.": lambda raw, average: (
        prefixed(average, "ema_model.")
        | prefixed(raw, "online_model.")
        | {"initted": torch.tensor(True), "step": torch.tensor(5)}
    ),
    "prefix module.ema.": lambda raw, average: (
        prefixed(raw, "module.model.") | prefixed(average, "module.ema.module.")
    ),
    "prefix model_ema, no dots": lambda raw, average: (
        prefixed(raw, "model.")
        | {f"model_ema.{key.replace('.', '')}": value for key, value in average.items()}
        | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    ),
    "AveragedModel": lambda raw, average: prefixed(average, "module.") | {"n_averaged": torch.tensor(4)},
    "AveragedModel compiled": lambda raw, average: (
        prefixed(average, "module._orig_mod.") | {"n_averaged": torch.tensor(4)}
    ),
    "beside the model": lambda raw, average: {"model": raw, "swa": prefixed(average, "module.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_loads_before_the_weights_and_is_reported(raw, average, layout, tmp_path, caplog):
    torch.save(LAYOUTS[layout](raw.state_dict(), average.state_dict()), tmp_path / "last.ckpt")
    with caplog.at_level(logging.WARNING, "vistok"):
        assert same(load(tmp_path / "last.ckpt", config=CONFIG), average)
    assert "loading the average of its weights" in caplog.text


def test_an_average_lacks_buffers_and_takes_the_models(raw, average, tmp_path):
    parameters = dict(list(average.state_dict().items())[1:])  # one key is only with the weights
    torch.save(
        {"state_dict": prefixed(raw.state_dict(), "model.") | prefixed(parameters, "ema.")}, tmp_path / "a.pt"
    )
    loaded = load(tmp_path / "a.pt", config=CONFIG).state_dict()
    first, *others = average.state_dict()
    assert torch.equal(loaded[first], raw.state_dict()[first])
    assert all(torch.equal(loaded[key], average.state_dict()[key]) for key in others)


def test_an_average_of_something_else_is_passed_over_and_reported(raw, tmp_path, caplog):
    other = {"head.weight": torch.zeros(3), "head.bias": torch.zeros(3)}
    torch.save({"model": raw.state_dict(), "ema": other}, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING, "vistok"):
        assert same(load(tmp_path / "a.pt", config=CONFIG), raw)
    assert "its average does not fit this model" in caplog.text


def test_an_average_without_names_is_reported(raw, tmp_path, caplog):
    content = {"model": raw.state_dict(), "ema": {"decay": 0.9, "shadow_params": [torch.zeros(2)]}}
    torch.save(content, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING, "vistok"):
        assert same(load(tmp_path / "a.pt", config=CONFIG), raw)
    assert "its average 'ema' has no names" in caplog.text


def test_averages_inside_a_model_are_its_own(raw, tmp_path):
    state = {"quantize.ema_weight": torch.zeros(2), "encoder.ema.weight": torch.ones(2)}
    torch.save(state, tmp_path / "a.pt")
    assert checkpoint.read(tmp_path / "a.pt").keys() == state.keys()


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "a.b."],
)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_prefixes_of_wrappers_are_removed_when_that_makes_keys_fit(raw, prefix, kind, tmp_path):
    path, state = tmp_path / f"w.{kind}", prefixed(raw.state_dict(), prefix)
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    assert same(load(path, config=CONFIG), raw)


def test_compiled_parts_are_understood(raw, tmp_path):
    state = {
        key.replace("encoder.", "encoder._orig_mod.", 1): value for key, value in raw.state_dict().items()
    }
    save_file(state, tmp_path / "w.safetensors")
    assert same(load(tmp_path / "w.safetensors", config=CONFIG), raw)


def test_what_lightning_keeps_beside_the_model_is_left(raw, tmp_path):
    state = prefixed(raw.state_dict(), "model.") | {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 1, "callbacks": {}}, tmp_path / "last.ckpt")
    assert same(load(tmp_path / "last.ckpt", config=CONFIG), raw)


def test_a_misfit_shows_the_first_keys_of_each_kind_and_how_many_there_are(raw, tmp_path):
    state = {f"other.{key}": value for key, value in raw.state_dict().items()}
    save_file(state | {"first": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "w.safetensors", config=CONFIG)
    message, count = str(caught.value), len(raw.state_dict())
    assert f"({count} missing, {count + 1} unexpected: missing " in message and "\n" not in message
    assert message.count("; ") == 6 and "; …); check" in message
    assert (message.count("missing "), message.count("unexpected ")) == (3, 2)


# ---- shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_shards_load_by_folder_and_by_index(raw, suffix, prefix, tmp_path):
    index = sharded(raw.state_dict(), tmp_path / "model", suffix, prefix)
    assert same(load(index.parent), raw)
    assert same(load(index), raw)


def test_a_missing_shard_is_named(raw, tmp_path):
    index = sharded(raw.state_dict(), tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 2 shards and 1 are not beside it.*00002-of-00002"):
        load(index)


def test_a_shard_without_its_tensors_is_noticed(raw, tmp_path):
    sharded(raw.state_dict(), tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="tensors that its shards do not hold"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", 3, "a.txt"])
def test_shards_lie_beside_their_index(raw, name, tmp_path):
    index = sharded(raw.state_dict(), tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["decoder.absent"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="shards are weights files beside the index"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="has no weight_map"):
        load(tmp_path)
