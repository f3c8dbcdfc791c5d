"""What files ask for is checked before it is built, and nothing is downloaded that was not asked for."""

import copy
import dataclasses
import itertools
import json
import logging
import os
import resource
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from checkpoints import MINI, cached, same
from safetensors.torch import save_file

from vistok import create, list_tokenizers, load
from vistok.bounded_build import empty_weights
from vistok.files import looks_like_path
from vistok.models.mini import MiniConfig
from vistok.registry import TOKENIZERS, entries, families

pytestmark = pytest.mark.usefixtures("small_and_quick")


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    return create("mini", **MINI).eval()


@pytest.fixture
def saved(mini, tmp_path):
    mini.save_pretrained(tmp_path / "mini")
    return tmp_path / "mini"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---- configurations ----------------------------------------------------------------------------------------

VALUES = [
    *(None, True, -1, 0, 1, 3, 7.5, 2**16, 2**31, 2**63, 10**30, float("nan"), float("inf"), -1e300),
    *(
        "",
        "text",
        "8",
        [],
        [0],
        [[]],
        [[1, [2]]],
        [[2**31, [4]]],
        [[4, [2**40]]],
        {},
        {"a": 1},
        [None],
        [["x", ["y"]]],
    ),
]


def mutations(config):
    """The configuration with each field and each top entry replaced by each value, left out or unknown."""
    for name, value in itertools.product(config["config"], VALUES):
        yield name, {**config, "config": {**config["config"], name: value}}
    for name, value in itertools.product(config, VALUES):
        yield name, {**config, name: value}
    for name in config["config"]:
        fields = {key: value for key, value in config["config"].items() if key != name}
        yield name, {**config, "config": fields}
    yield "colour", {**config, "config": {**config["config"], "colour": "blue"}}


def test_a_mutated_configuration_loads_or_is_refused_in_words_quickly_and_in_little_memory(mini, saved):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, outcomes = time.monotonic(), {True: 0, False: 0}
    for name, config in mutations(config_of(saved)):
        (saved / "config.json").write_text(json.dumps(config))
        begun = time.monotonic()
        try:
            loaded = load(saved)
        except ValueError as error:
            assert len(str(error)) < 2000, (name, error)
            outcomes[False] += 1
        else:
            assert same(loaded, mini), name
            outcomes[True] += 1
        assert time.monotonic() - begun < 5, name
    assert outcomes[True] >= 5 and outcomes[False] > 200, outcomes
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # KiB


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoder_depth", 2**31, "encoder_depth is 2147483648"),
        ("encoder_depth", 900, "far more than .*model.safetensors holds|does not fit"),
        ("image_size", 32768, "far more than .*model.safetensors holds"),
        ("width", 65536, "far more than .*model.safetensors holds"),
        ("image_size", "128", "image_size is '128'; it takes a whole number"),
        ("levels", [[4, "88"]], r"levels\[0\]\[1\] is '88'; it takes a list"),
        ("heads", 0, "heads is 0; it is 1 to"),
        ("heads", 3, "width 32 is not a multiple of heads 3"),
    ],
)
def test_sizes_that_the_file_cannot_back_are_refused_by_name(saved, field, value, message):
    config = config_of(saved)
    config["config"][field] = value
    (saved / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load(saved)
    assert time.monotonic() - start < 5


def test_a_saved_configuration_loads_equal(mini, saved):
    assert load(saved).config == mini.config
    assert dataclasses.asdict(load(saved).config) == dataclasses.asdict(MiniConfig(**MINI))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"family": "mini", "config": ' + "9" * 5000 + "}"]
)
def test_json_that_python_chokes_on_is_named(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|configuration"):
        load(saved)


def test_a_huge_configuration_and_a_pipe_are_not_read(saved):
    with open(saved / "config.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"config.json has 1,099,511,627,776 bytes"):
        load(saved)
    os.mkfifo(saved / "pipe.safetensors")
    with pytest.raises(OSError, match=r"pipe.safetensors is a named pipe"):
        load(saved / "pipe.safetensors")


# ---- values ------------------------------------------------------------------------------------------------


def altered(mini, change):
    state = copy.deepcopy(mini.state_dict())
    state["decoder.absent"] = change(state["decoder.absent"])
    return state


def with_infinity(value):
    value[3] = float("inf")
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_infinity, r"decoder.absent holds NaN or infinity \(1 of 32 values\)"),
        (lambda value: value * float("nan"), r"decoder.absent holds NaN or infinity \(32 of 32 values\)"),
        (lambda value: value.to_sparse(), "decoder.absent is stored as sparse_coo"),
        (lambda value: value.to(torch.complex64), "decoder.absent has the dtype torch.complex64"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "decoder.absent"),
        (lambda value: (value * 100).to(torch.int8), "decoder.absent has the dtype torch.int8"),
        (lambda value: value.to(torch.float8_e4m3fn), "decoder.absent has the dtype torch.float8"),
        (lambda value: value.to("meta"), "decoder.absent has no values"),
    ],
)
def test_weights_that_are_not_finite_numbers_are_refused_by_their_first_key(mini, change, message, tmp_path):
    torch.save(altered(mini, change), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "w.pt", config={"family": "mini", "config": MINI})


def test_values_that_a_dtype_cannot_hold_are_refused(mini, tmp_path):
    save_file(altered(mini, lambda value: value + 1e6), tmp_path / "w.safetensors")
    load(tmp_path / "w.safetensors", config={"family": "mini", "config": MINI})
    with pytest.raises(
        ValueError, match=r"decoder.absent has values up to 1e\+06, too large for torch.float16"
    ):
        load(tmp_path / "w.safetensors", config={"family": "mini", "config": MINI}, dtype="float16")


def test_an_archive_that_unpacks_to_more_than_it_has_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.infolist():
            bomb.writestr(member.filename, plain.read(member))
    with pytest.raises(ValueError, match="claims to unpack to 4,"):
        load(tmp_path / "bomb.pt")


def test_a_view_that_repeats_a_number_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "view.pt")
    with pytest.raises(ValueError, match="its tensors would take 4,398,046,511,104"):
        load(tmp_path / "view.pt")


def test_the_shipped_model_is_checked_by_its_digest(tmp_path, monkeypatch):
    changed = dataclasses.replace(entries()["vistok-mini"], sha256="0" * 64)
    monkeypatch.setitem(TOKENIZERS._entries, "vistok-mini", changed)
    with pytest.raises(ValueError, match=r"is not the vistok-mini that this version of vistok ships"):
        load("vistok-mini")


# ---- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_may_be_named(saved, dtype):
    assert load(saved, dtype=dtype).dtype == torch.bfloat16
    assert load(saved).to(dtype).dtype == torch.bfloat16
    assert load(saved).to(dtype=dtype).dtype == torch.bfloat16
    assert load(saved).to("cpu", dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "half-ish", "float8_e4m3fn", torch.int64, 3])
def test_other_dtypes_are_refused_by_name(saved, dtype):
    with pytest.raises(ValueError, match=f"dtype is .*{str(dtype).removeprefix('torch.')}.*float32, float16"):
        load(saved, dtype=dtype)


def test_a_misspelt_dtype_is_not_a_device(mini):
    with pytest.raises(ValueError, match=r"'bfloat17' is neither a device .* nor a dtype"):
        copy.deepcopy(mini).to("bfloat17")


# ---- paths and the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    *[
        [
            "runs/vistok-mini",
            "data/val",
            "./a/b",
            "~/a",
            "a/b/c",
            "owner/model.safetensors",
            "here/model",
            "../x",
        ]
    ],
)
def test_what_looks_like_a_path_is_one_and_nothing_is_asked_of_the_hub(source, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert looks_like_path(source)
    with caplog.at_level(logging.INFO), pytest.raises(FileNotFoundError, match="no file or folder"):
        load(source)
    assert "huggingface" not in caplog.text


@pytest.mark.parametrize(
    "source", ["owner/model", "titok-l32", "vistok-mini", "hf://runs/model", "owner/v1.5"]
)
def test_names_are_not_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path(source)


def test_a_repository_that_is_not_in_the_registry_has_to_be_asked_for(caplog):
    with pytest.raises(FileNotFoundError, match=r"someone/mini is neither .* hf://someone/mini"):
        load("someone/mini")
    assert "huggingface" not in caplog.text


def test_a_repository_of_the_registry_may_go_by_its_own_name(offline):
    with pytest.raises(FileNotFoundError, match="yucornetto/tokenizer_titok_l32_imagenet"):
        load("yucornetto/tokenizer_titok_l32_imagenet")


@pytest.mark.parametrize("source", ["hf://", "hf://owner", "hf://owner/", "hf://a/b/c"])
def test_half_a_repository_is_refused(source):
    with pytest.raises(ValueError, match="is not a hub repository; give hf://owner/name"):
        load(source)


def test_a_cached_repository_needs_no_network_and_says_nothing(mini, saved, tmp_path, caplog):
    files = {name: (saved / name).read_bytes() for name in ("model.safetensors", "config.json")}
    options = cached(tmp_path / "hub", "someone/mini", files)
    assert same(load("hf://someone/mini", cache_dir=options["cache_dir"]), mini)
    assert "huggingface" not in caplog.text


NO_NETWORK = """
import socket, sys, time
def refuse(*arguments, **options): raise socket.gaierror(-2, "Name or service not known")
socket.getaddrinfo = refuse
import vistok
start = time.monotonic()
for _ in range(2):
    try: vistok.load(sys.argv[1])
    except FileNotFoundError as error: print(error)
print(time.monotonic() - start)
"""


@pytest.mark.parametrize("source", ["titok-l32", "hf://someone/thing"])
def test_without_network_it_fails_at_once_and_announces_itself_once(source, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *messages, seconds = done.stdout.splitlines()
    assert len(messages) == 2 and all("weights=" in message for message in messages)
    assert float(seconds) < 10
    assert done.stderr.count("downloading from the Hugging Face hub: https://huggingface.co/") == 1


@pytest.mark.parametrize("source", [None, 3, b"vistok-mini", ["vistok-mini"]])
def test_what_is_not_a_name_is_a_type_error(source):
    with pytest.raises(TypeError, match=f"by a name or path; got a {type(source).__name__}"):
        load(source)


def test_a_device_that_does_not_exist_is_named(saved):
    with pytest.raises(ValueError, match="device is 'gpu'; give cpu"):
        load(saved, device="gpu")
    with pytest.raises(ValueError, match="device is 'gpu'; give cpu"):
        load(saved).to(device="gpu")


def test_a_configuration_may_be_given_by_a_path_below_home(mini, saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    (saved / "model.safetensors").rename(saved / "w.safetensors")
    assert same(load(saved / "w.safetensors", config="~/config.json"), mini)


@pytest.mark.parametrize("name", list_tokenizers())
def test_the_keys_of_a_published_checkpoint_are_those_of_one_family(name):
    with empty_weights():
        shapes = {key: value.shape for key, value in create(name).state_dict().items()}

    def recognises(kind):
        try:
            return kind.recognise(shapes, None) is not None
        except ValueError as error:  # FlexTok's keys do not have the whole configuration
            assert "come without the configuration" in str(error)
            return True

    known = {family for family, kind in families().items() if recognises(kind)}
    family = entries()[name].family
    # One-D-Piece has the keys of a legacy TiTok: its configuration or its name is needed.
    expected = {"mini": set(), "one-d-piece": {"titok"}}.get(family, {family})
    assert known == expected
