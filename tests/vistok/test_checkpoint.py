"""Weights are found, read whole or refused with the reason, fitted strictly, written whole or not at all."""

import json
import os
import pickle
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoints import MINI, cached, same
from safetensors.torch import save_file

from vistok import checkpoint, create, load
from vistok.files import atomic_write
from vistok.models.maskgit_vqgan import MaskGITVQGAN
from vistok.models.mini import MiniTokenizer
from vistok.models.titok import TATiTok, TiTok, TiTokConfig
from vistok.registry import entries

pytestmark = pytest.mark.usefixtures("small_and_quick")

TINY = {"crop_size": 32, "vit_enc_model_size": "tiny", "vit_dec_model_size": "tiny", "num_latent_tokens": 6}
SINGLE = {"finetune_decoder": False, "is_legacy": False, "token_size": 8, "codebook_size": 64}


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    return create("mini", **MINI).eval()


@pytest.fixture
def saved(mini, tmp_path):
    mini.save_pretrained(tmp_path / "mini")
    return tmp_path / "mini"


def pickled(state, path):
    torch.save(state, path)
    return path


def safe(state, path):
    """Written as anyone would who holds a state dict, whatever its memory format."""
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def mini_config(folder):
    return json.loads((folder / "config.json").read_text())


# ---- where weights come from -------------------------------------------------------------------------------


def test_a_folder_and_the_files_in_it_load_alike(mini, saved, monkeypatch):
    assert same(load(saved), mini)
    assert same(load(str(saved)), mini)
    assert same(load(saved / "model.safetensors"), mini)
    monkeypatch.chdir(saved.parent)
    assert same(load("mini/model.safetensors"), mini)


def test_a_home_relative_path_is_expanded(mini, saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert same(load("~/mini"), mini)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_a_weights_only_pickle_loads_with_the_configuration_given(mini, saved, name, tmp_path):
    path = pickled(mini.state_dict(), tmp_path / name)
    assert same(load(path, config=mini_config(saved)), mini)
    assert same(load(path, config=saved / "config.json"), mini)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_training_wrappers_are_opened(mini, wrapper, tmp_path):
    state = {f"module.{key}": value for key, value in mini.state_dict().items()}
    read = checkpoint.read(pickled({wrapper: state, "step": 3}, tmp_path / "w.pt"))
    assert read.keys() == mini.state_dict().keys()


def test_weights_replaces_the_published_file(tmp_path):
    # The sizes are the registry's, so tiny weights cannot fit; the message shows that this file was read.
    path = safe(create("titok", **TINY, **SINGLE).state_dict(), tmp_path / "anything.safetensors")
    with pytest.raises(ValueError, match=r"anything\.safetensors.*misshapen latent_tokens"):
        load("titok-bl64-vq", weights=path)


def test_a_name_with_weights_of_another_family_is_refused(saved):
    with pytest.raises(ValueError, match="mini"):
        load("titok-l32", weights=saved)


def test_a_config_given_beside_a_registry_name_is_not_ignored(saved, tmp_path):
    torch.manual_seed(0)
    config = {**TINY, **SINGLE}
    path = safe(create("titok", **config).state_dict(), tmp_path / "own.safetensors")
    nested = {"model": {"vq_model": config}, "dataset": {"preprocessing": {"crop_size": 32}}}
    assert load("titok-bl64-vq", weights=path, config=nested).num_tokens == 6


def test_the_loaded_class_is_checked(saved):
    assert isinstance(MiniTokenizer.from_pretrained(saved), MiniTokenizer)
    with pytest.raises(ValueError, match=r"'mini' checkpoint.*TiTok.*vistok\.load"):
        TiTok.from_pretrained(saved)


def test_an_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"titok-l23.*Did you mean titok-l32") as raised:
        load("titok-l23")
    assert "vistok list" in str(raised.value)


def test_the_name_survives_saving(mini, tmp_path):
    mini.name = "my-tokenizer"
    mini.save_pretrained(tmp_path)
    mini.name = None
    assert load(tmp_path).name == "my-tokenizer"


@pytest.mark.parametrize("missing", ["weights.safetensors", "missing/weights.pt"])
def test_a_missing_file_is_reported_as_missing(missing, tmp_path):
    with pytest.raises(FileNotFoundError, match=Path(missing).name):
        load(tmp_path / missing)


def test_a_missing_folder_is_reported_as_missing_not_as_an_unknown_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="runs"):
        load(tmp_path / "runs" / "model")


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin"):
        load(tmp_path)


def test_several_unconventional_files_must_be_told_apart(mini, tmp_path):
    for name in ("a.pt", "b.pt"):
        pickled(mini.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.pt, b\.pt.*name one"):
        load(tmp_path)


# ---- files that cannot be trusted --------------------------------------------------------------------------


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("raw", [True, False])
def test_a_malicious_pickle_is_refused_and_its_payload_never_runs(raw, tmp_path):
    path, harm = tmp_path / "evil.bin", tmp_path / "harm"
    if raw:
        path.write_bytes(pickle.dumps({"weight": Payload(harm)}))
    else:
        torch.save({"weight": torch.zeros(1), "other": Payload(harm)}, path)
    with pytest.raises(ValueError, match="refused because unpickling runs code") as caught:
        load(path, config={"family": "mini", "config": MINI})
    assert not harm.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice is to run it
    pickle.loads(pickle.dumps(Payload(harm)))  # the payload is a live one
    assert harm.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_anywhere_is_refused(zipped, tmp_path):
    path = tmp_path / "cut.pt"
    torch.save({"weight": torch.arange(6.0)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pt cannot be read as plain tensors.*truncated"):
            checkpoint.read(path)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file({"weight": torch.arange(6.0)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{size} bytes.*not a whole safetensors file"):
            checkpoint.read(path)


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(1), {"weight": 3}, {0: torch.zeros(1)}, {"model": {"a": "b"}}]
)
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match="no state dict"):
        checkpoint.read(pickled(content, tmp_path / "w.pt"))


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"does not end in \.safetensors"):
        load(path)


@pytest.mark.parametrize("text", ["{", "", "\xff", "[1, 2]", '"text"'])
def test_a_broken_configuration_is_named(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        load(saved)


def test_a_configuration_of_an_unknown_family_is_refused(saved):
    (saved / "config.json").write_text('{"family": "vistok9000", "config": {}}')
    with pytest.raises(ValueError, match=r"unknown family 'vistok9000'.*titok"):
        load(saved)


def test_a_configuration_with_an_unknown_field_is_refused(saved):
    config = mini_config(saved)
    config["config"]["colour"] = "blue"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no configuration field colour"):
        load(saved)


def test_weights_of_no_known_family_show_their_keys(tmp_path):
    path = pickled({"backbone.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"not of a known family.*backbone\.weight.*config="):
        load(path)


def test_every_key_that_does_not_fit_is_listed(mini, saved):
    state = dict(mini.state_dict())
    state.pop("encoder.norm.weight")
    state.pop("decoder.absent")
    state["encoder.norm.bias"] = torch.zeros(7)
    state["encoder.extra"] = torch.zeros(2, 3)
    state["another"] = torch.zeros(1)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        load(saved)
    message = str(raised.value)
    assert "model.safetensors" in message and "\n" not in message
    assert "(2 missing, 2 unexpected, 1 misshapen: " in message and "…" not in message
    for misfit in (
        "misshapen encoder.norm.bias: checkpoint [7], model [32]",
        "missing decoder.absent [32]",
        "missing encoder.norm.weight [32]",
        "unexpected another [1]",
        "unexpected encoder.extra [2, 3]",
    ):
        assert misfit in message


# ---- TiTok checkpoints without, or with the original's, configuration --------------------------------------

VARIANTS = {
    "published legacy": ("titok", {**TINY, "use_l2_norm": True}),
    "stage 1": ("titok", {**TINY, "use_l2_norm": True, "finetune_decoder": False}),
    "VQ": ("titok", {**TINY, **SINGLE}),
    "VQ of other patches": ("titok", {**TINY, **SINGLE, "vit_enc_patch_size": 8}),
    "KL": ("titok", {**TINY, **SINGLE, "codebook_size": 4096, "quantize_mode": "vae"}),
    "text-aware VQ": ("tatitok", {**TINY, **SINGLE}),
    "text-aware KL": ("tatitok", {**TINY, **SINGLE, "codebook_size": 4096, "quantize_mode": "vae"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_titok_weights_are_recognised_by_their_keys(variant, tmp_path):
    family, config = VARIANTS[variant]
    torch.manual_seed(0)
    model = create(family, **config)
    path = tmp_path / "twin.bin"
    pickled(model.state_dict(), path)
    loaded = load(path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert same(loaded, model)


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if "titok" in entry.family])
def test_keys_alone_tell_the_configuration_of_every_published_titok(name):
    entry = entries()[name]
    with torch.device("meta"):
        model = create(name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    family, other = (TATiTok, TiTok) if entry.family == "tatitok" else (TiTok, TATiTok)
    recognised = TiTokConfig(**family.recognise(shapes, None))
    assert recognised == model.config
    assert other.recognise(shapes, None) is None
    assert MaskGITVQGAN.recognise(shapes, None) is None
    assert MiniTokenizer.recognise(shapes, None) is None


def test_maskgit_vqgan_weights_are_recognised_by_their_keys(tmp_path):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create("maskgit-vqgan").state_dict().items()}
    assert MaskGITVQGAN.recognise(shapes, None) == {}
    assert TiTok.recognise(shapes, None) is None
    small = create("maskgit-vqgan", channel_mult=(1, 1), hidden_channels=32)
    path = pickled(small.state_dict(), tmp_path / "vqgan.bin")
    with pytest.raises(ValueError, match=r"does not fit this MaskGITVQGAN.*encoder\.down\.2"):
        load(path)


def nested(config, **vq_model):
    """A config.json as the original writes it, the whole training configuration in it."""
    fields = {key: value for key, value in config.items() if key != "crop_size"}
    return {
        "experiment": {"project": "titok", "name": "run", "max_train_examples": 1_281_167},
        "model": {
            "vq_model": {**fields, **vq_model},
            "generator": {"image_seq_len": "${model.vq_model.num_latent_tokens}"},
        },
        "losses": {"quantizer_weight": 1.0},
        "dataset": {"preprocessing": {"crop_size": config["crop_size"], "random_flip": True}},
    }


def with_config(folder, model, config):
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("variant", ["VQ", "KL", "text-aware VQ", "stage 1"])
def test_the_originals_nested_configuration_is_understood(variant, tmp_path):
    family, config = VARIANTS[variant]
    torch.manual_seed(0)
    model = create(family, **config)
    loaded = load(with_config(tmp_path, model, nested(config)))
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert same(loaded, model)
    assert create(family, **nested(config)).config == model.config


def test_legacy_configurations_predate_two_keys(tmp_path):
    family, config = VARIANTS["stage 1"]
    assert not {"is_legacy", "quantize_mode"} & set(config)
    model = create(family, **config)
    loaded = load(with_config(tmp_path, model, nested(config)))
    assert loaded.config.is_legacy
    assert loaded.config.quantize_mode == "vq"


@pytest.mark.parametrize(
    "reference",
    [
        {"num_latent_tokens": "${model.tokens}"},
        {"num_latent_tokens": "${model.generator.tokens}"},
        {"vit_dec_model_size": "${model.vq_model.vit_enc_model_size}"},
        {"vit_dec_patch_size": "${model.vq_model.vit_enc_patch_size}", "vit_enc_patch_size": 16},
        {"token_size": "${model.generator.channels}"},
    ],
)
def test_unresolved_interpolations_are_followed(reference, tmp_path):
    family, config = VARIANTS["VQ"]
    model = create(family, **config)
    written = nested(config, **reference)
    written["model"]["tokens"] = 6
    written["model"]["generator"] |= {"tokens": 6, "channels": 8}
    assert load(with_config(tmp_path, model, written)).config == model.config


def test_an_interpolation_that_leads_nowhere_is_named():
    family, config = VARIANTS["VQ"]
    with pytest.raises(ValueError, match="num_latent_tokens"):
        create(family, **nested(config, num_latent_tokens="${model.nowhere}"))


def test_a_crop_size_by_reference_is_followed(tmp_path):
    family, config = VARIANTS["VQ"]
    model, written = create(family, **config), nested(config)
    written["dataset"]["preprocessing"]["crop_size"] = "${dataset.size}"
    written["dataset"]["size"] = 32
    assert load(with_config(tmp_path, model, written)).image_size == 32


@pytest.mark.parametrize("dataset", [None, {}, {"preprocessing": None}, {"preprocessing": {}}])
def test_a_configuration_without_crop_size_has_the_published_one(dataset):
    family, config = VARIANTS["VQ"]
    with torch.device("meta"):
        assert create(family, **{**nested(config), "dataset": dataset}).image_size == 256


def test_a_generators_configuration_is_no_tokenizer():
    with pytest.raises(ValueError, match=r"generator.*vq_model"):
        create("titok", model={"generator": {}})


def test_clustering_statistics_in_a_checkpoint_are_accepted(tmp_path):
    family, config = VARIANTS["text-aware VQ"]
    trained = create(family, **config, clustering_vq=True)
    assert "quantize.embed_prob" in trained.state_dict()
    path = safe(trained.state_dict(), tmp_path / "twin.safetensors")
    assert "quantize.embed_prob" not in load(path).state_dict()


def test_clustering_weights_published_without_statistics_load(tmp_path):
    family, config = VARIANTS["text-aware VQ"]
    state = create(family, **config).state_dict()
    safe(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(nested(config, clustering_vq=True)))
    loaded = load(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())


# ---- the hub -----------------------------------------------------------------------------------------------


def test_a_published_name_that_is_not_cached_names_repository_file_and_way_out(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        load("titok-l32", local_files_only=True, cache_dir=tmp_path)
    for part in ("yucornetto/tokenizer_titok_l32_imagenet", "model.safetensors", "weights="):
        assert part in str(raised.value)


def test_a_repository_that_is_not_cached_names_both_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'someone/tokenizer'.*weights="):
        load("hf://someone/tokenizer", local_files_only=True, cache_dir=tmp_path)


def test_offline_by_environment_is_the_same_message(tmp_path):
    script = "import vistok\ntry: vistok.load('titok-l32')\nexcept FileNotFoundError as error: print(error)\n"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for part in ("yucornetto/tokenizer_titok_l32_imagenet", "model.safetensors", "weights="):
        assert part in done.stdout


def test_a_cached_repository_loads_offline(mini, saved, tmp_path):
    files = {name: (saved / name).read_bytes() for name in ("model.safetensors", "config.json")}
    assert same(load("hf://someone/mini", **cached(tmp_path / "hub", "someone/mini", files)), mini)


def test_a_cached_repository_that_holds_a_pickle_loads_offline(mini, saved, tmp_path):
    path = pickled(mini.state_dict(), tmp_path / "w.bin")
    files = {"pytorch_model.bin": path.read_bytes(), "config.json": (saved / "config.json").read_bytes()}
    assert same(load("hf://someone/mini", **cached(tmp_path / "hub", "someone/mini", files)), mini)


def test_a_broken_configuration_in_the_cache_is_not_passed_over(saved, tmp_path):
    files = {"model.safetensors": (saved / "model.safetensors").read_bytes(), "config.json": b"{"}
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load("hf://someone/mini", **cached(tmp_path / "hub", "someone/mini", files))


# ---- files are whole or not there --------------------------------------------------------------------------


def test_atomic_write_replaces_only_on_success(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with atomic_write(target) as path:
        path.write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_write(target) as path:
        path.write_text("half of the ne")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_atomic_write_keeps_the_permissions_a_plain_file_would_have(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "aside") as path:
        path.write_text("")
    assert (tmp_path / "aside").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "aside").chmod(0o640)
    with atomic_write(tmp_path / "aside") as path:
        path.write_text("")
    assert (tmp_path / "aside").stat().st_mode & 0o777 == 0o640


@contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [10, 10_000])
def test_saving_to_a_full_disk_leaves_the_old_files_whole(mini, saved, size):
    before = contents(saved)
    torch.manual_seed(1)
    other = create("mini", **MINI)
    with full_disk(size), pytest.raises(Exception):  # noqa: B017  safetensors and Python each have their own error
        other.save_pretrained(saved)
    assert contents(saved) == before
    assert same(load(saved), mini)


def test_a_configuration_that_cannot_be_written_leaves_the_old_pair(mini, saved):
    before = contents(saved)
    torch.manual_seed(1)
    other = create("mini", **MINI)
    other.name = object()
    with pytest.raises(TypeError):
        other.save_pretrained(saved)
    assert contents(saved) == before


def test_saved_files_follow_the_hubs_conventions(mini, saved):
    from safetensors import safe_open

    assert set(contents(saved)) == {"config.json", "model.safetensors"}
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(mini.state_dict())
    assert mini_config(saved)["family"] == "mini"
