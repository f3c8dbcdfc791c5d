"""Every recorded case of the originals goes through the same code as `vistok verify`."""

import functools
import json
import math
import operator
import re
from pathlib import Path

import PIL
import pytest
import torch
from oracles import BEFORE_5_18
from paths import GOLDEN
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vistok.cli import app
from vistok.eval.parity.case import CannotBuild, fill
from vistok.eval.parity.verify import verify

pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="older Pillows resize otherwise, which the case refuses"
)
transformers_5_18 = pytest.mark.skipif(
    BEFORE_5_18, reason="older releases take no features made before the forward"
)
LARGE = 10_000_000  # numbers in the weights of a case that a quick run leaves out


def cases():
    for path in sorted(GOLDEN.glob("*.json")):
        weights = json.loads(path.read_text()).get("state_dict", {})
        tables = list(weights.values()) if isinstance(next(iter(weights.values()), []), dict) else [weights]
        large = sum(math.prod(shape) for table in tables for _, shape in table.values()) > LARGE
        marks = [pillow_13] if path.stem == "preprocess" else [pytest.mark.slow] if large else []
        if path.stem.startswith("reduce_") and path.stem.endswith("_llama"):
            marks += [transformers_5_18]
        yield pytest.param(path, id=path.stem, marks=marks)


SMALL = GOLDEN / "train_step_stage1_s128.json"


@pytest.mark.parametrize("path", list(cases()))
def test_every_recorded_tensor_is_within_tolerance(path):
    misses = [row for row in verify(path) if not row.passed]
    assert not misses, misses


@pillow_13
def test_a_changed_recording_is_a_miss(tmp_path):
    case = _copied(tmp_path, GOLDEN / "preprocess.json")
    tensors = load_file(case.with_suffix(".safetensors"))
    tensors["adm_1"][3, 4, 1] += 1
    save_file(tensors, case.with_suffix(".safetensors"))
    assert [row.name for row in verify(case) if not row.passed] == ["adm_1"]


@pillow_13
def test_a_tensor_nobody_computes_is_not_passed_over(tmp_path):
    case = _copied(tmp_path, GOLDEN / "preprocess.json")
    tensors = load_file(case.with_suffix(".safetensors"))
    save_file(tensors | {"extra": torch.zeros(2)}, case.with_suffix(".safetensors"))
    with pytest.raises(CannotBuild, match="extra"):
        verify(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "nobody"}, "family is 'nobody'"),
        ({"system": "Another"}, "no adapter for the system 'Another'"),
        ({"config": {"model": {"vq_model": {"vit_enc_model_size": "huge"}}}}, "vit_enc_model_size is 'huge'"),
    ],
)
def test_cases_that_cannot_be_built_say_why(tmp_path, change, message):
    case = _copied(tmp_path, SMALL)
    case.write_text(json.dumps(json.loads(case.read_text()) | change))
    with pytest.raises(CannotBuild, match=message):
        verify(case)


def test_keys_that_differ_from_the_published_ones_are_listed(tmp_path):
    case = _copied(tmp_path, SMALL)
    data = json.loads(case.read_text())
    data["state_dict"]["encoder.ln_pre.weight"] = ["float32", [513]]
    case.write_text(json.dumps(data))
    with pytest.raises(CannotBuild, match=r"encoder\.ln_pre\.weight: ours \[512\], published \[513\]"):
        verify(case)


def test_scale_and_overrides_change_the_filled_weights(tmp_path):
    case = _copied(tmp_path, SMALL)
    data = json.loads(case.read_text())
    case.write_text(json.dumps(data | {"scale": {"latent_tokens": 2.0}}))
    assert not all(row.passed for row in verify(case))
    values = fill("latent_tokens", (128, 512), data["seed"]).tolist()
    case.write_text(
        json.dumps(data | {"scale": {"latent_tokens": 2.0}, "overrides": {"latent_tokens": values}})
    )
    assert all(row.passed for row in verify(case))


def test_a_missing_tensor_file_is_named(tmp_path):
    (tmp_path / "case.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"case\.safetensors"):
        verify(tmp_path / "case.json")


# ---- what a case must hold ---------------------------------------------------------------------------------


def run(path):
    """`vistok verify` on a case: its exit code, and what it printed."""
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def rewritten(folder, case, change):
    """A copy of a case with its json changed in place."""
    path = _copied(folder, case)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("name", ["fsq_a_ids", "rf_u", "sincos"])
def test_a_recording_that_lacks_a_named_tensor_does_not_pass(tmp_path, name):
    case = _copied(tmp_path, GOLDEN / "flextok_components.json")
    tensors = load_file(case.with_suffix(".safetensors"))
    del tensors[name]
    save_file(tensors, case.with_suffix(".safetensors"))
    rows = [row for row in verify(case) if not row.passed]
    assert [(row.name, row.allowed) for row in rows] == [(name, "missing from case.safetensors")]
    code, output = run(case)
    assert code == 1
    assert name in output


@pillow_13
def test_a_numbered_tensor_that_is_missing_does_not_pass(tmp_path):
    case = rewritten(tmp_path, GOLDEN / "preprocess.json", lambda data: data.pop("shapes"))
    tensors = load_file(case.with_suffix(".safetensors"))
    del tensors["adm_2"]
    save_file(tensors, case.with_suffix(".safetensors"))
    assert [row.name for row in verify(case) if not row.passed] == ["adm_2"]


@pillow_13
def test_a_recording_of_another_shape_than_the_json_states_does_not_pass(tmp_path):
    def change(data):
        data["shapes"]["eval_1"] = ["uint8", [1, 2, 3]]

    rows = [row for row in verify(rewritten(tmp_path, GOLDEN / "preprocess.json", change)) if not row.passed]
    assert [row.name for row in rows] == ["eval_1"]


SMALLER = GOLDEN / "flextok_components.json"
FAULTS = [
    (SMALLER, lambda d: d.update(tensors={}), "names no tensor"),
    (SMALLER, lambda d: d.update(tensors=[]), "tensors is []; it takes a mapping"),
    (SMALLER, lambda d: d.update(tensors={"sincos": 3}), "tensors is"),
    (SMALLER, lambda d: d.update(rtol=0.5), "rtol is 0.5; it takes a number from 0 to 0.1"),
    (SMALLER, lambda d: d.update(atol=-1), "atol is -1"),
    (SMALLER, lambda d: d.update(atol=float("nan")), "NaN is not a number"),
    (SMALLER, lambda d: d.update(atol=1e6), "is not below its largest value"),
    (SMALLER, lambda d: d.update(tensor_exact="ids"), "tensor_exact is 'ids'; it takes a list of names"),
    (SMALLER, lambda d: d["tensors"].update(fsq_a_z="latents"), "states no levels"),
    (SMALL, lambda d: d.pop("state_dict"), "holds none of|names no weights"),
    (SMALL, lambda d: d.update(state_dict={"latent_tokens": "float32"}), "state_dict is"),
    (SMALL, lambda d: d["state_dict"].update({"latent_tokens": ["float32", [-1]]}), "state_dict is"),
    (SMALL, lambda d: d.pop("seed"), "has no seed"),
    (SMALL, lambda d: d.update(seed="11"), "seed is '11'"),
    (SMALL, lambda d: d.update(keep="posembs"), "keep is 'posembs'"),
    (SMALL, lambda d: d.update(overrides={"latent_tokens": [1.0]}), "overrides of latent_tokens has 1 value"),
    (SMALL, lambda d: d.update(config="titok.yaml"), "config is 'titok.yaml'"),
    (SMALL, lambda d: d.update(config={"model": "titok.yaml"}), "model is 'titok.yaml'; it takes a mapping"),
    (SMALL, lambda d: d["inputs"].update(images="two pictures"), "inputs has images as 'two pictures'"),
    (SMALL, lambda d: d["inputs"]["images"].update(B=10**9), "B is 1000000000"),
    (SMALL, lambda d: d["inputs"]["images"].update(H=65536, W=65536, B=64), "its entries at most"),
    (SMALL, lambda d: d["inputs"]["images"].update(H=-16), "H is -16"),
    (SMALL, lambda d: d["inputs"]["images"].update(S="x"), "S is 'x'"),
    (SMALL, lambda d: d["inputs"].update(rest="any noise"), "no RandomState"),
    (SMALL, lambda d: d["config"]["model"]["vq_model"].update(num_latent_tokens=2**23), "keys differ"),
    (
        SMALL,
        lambda d: d["config"]["model"]["vq_model"].update(num_latent_tokens=-1),
        "num_latent_tokens is -1",
    ),
    (SMALL, lambda d: d["config"]["dataset"]["preprocessing"].update(crop_size=0), "crop_size is 0"),
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_case_that_cannot_be_run_is_refused_in_one_line(tmp_path, fault):
    source, change, message = FAULTS[fault]
    path = rewritten(tmp_path, source, change)
    with pytest.raises(CannotBuild) as raised:
        verify(path)
    assert re.search(message if "|" in message else re.escape(message), str(raised.value))
    assert "\n" not in str(raised.value)
    code, output = run(path)
    assert code == 2
    assert "Traceback" not in output


CHANGED = [None, 7, -7, 10**12, 1e300, -0.5, "text", [], {}, True, [1, 2], {"a": 1}]


def _places(node, place=()):
    if place:
        yield place
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items)[:12]:
        yield from _places(value, (*place, key))


@pytest.mark.parametrize("name", ["flextok_components", pytest.param("preprocess", marks=pillow_13)])
def test_any_changed_value_is_compared_or_refused(tmp_path, name):
    path = _copied(tmp_path, GOLDEN / f"{name}.json")
    original = json.loads(path.read_text())
    outcomes = set()
    for number, place in enumerate(_places(original)):
        data = json.loads(json.dumps(original))
        *parents, last = place
        node = functools.reduce(operator.getitem, parents, data)
        if number % 13 == 0:
            del node[last]
        else:
            node[last] = CHANGED[number % len(CHANGED)]
        path.write_text(json.dumps(data))
        try:
            outcomes.add(all(row.passed for row in verify(path)))
        except CannotBuild as error:
            outcomes.add("refused")
            assert "\n" not in str(error)
    assert outcomes >= {True, "refused"}


# ---- parts of a model --------------------------------------------------------------------------------------


def _part_of(folder, source, parts, names, inputs=(), **tensors):
    """A copy of a case with the weights of some parts, some of its recorded tensors, and others as inputs."""
    path = _copied(folder, source)
    data, recorded = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    data["state_dict"] = {k: v for k, v in data["state_dict"].items() if k.split(".")[0] in parts}
    recorded = {name: recorded[name] for name in (*names, *inputs)} | tensors
    data["shapes"] = {name: text for name, text in data["shapes"].items() if name in recorded}
    table = data["tensors"].items()
    patterns = ("enc.*", "dec.*", "enc.downN", "dec.upN")
    data["tensors"] = {name: text for name, text in table if name in recorded or name in patterns}
    path.write_text(json.dumps(data))
    save_file(recorded, path.with_suffix(".safetensors"))
    return path


VQGAN, STAGE1 = GOLDEN / "maskgit_vqgan.json", GOLDEN / "titok_b64_stage1.json"
ENCODED = ["enc.down0", "enc.down4", "z"]
DECODED = ["dec.up4", "dec.up0", "recon_raw", "recon"]
PARTS = [
    (VQGAN, ["encoder"], ENCODED, []),
    (VQGAN, ["encoder", "quantize"], [*ENCODED, "codes", "margin"], []),
    (VQGAN, ["decoder", "quantize"], DECODED, ["codes"]),
    (STAGE1, ["encoder", "latent_tokens"], ["enc.ln_pre", "enc.block_last", "z"], []),
    (STAGE1, ["decoder", "quantize"], ["dec.ln_pre", "dec.ln_post", "code_logits", "z_q"], ["indices"]),
    (STAGE1, ["decoder"], ["dec.block_first", "code_logits"], ["z_q"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "parts", "names", "inputs"), PARTS, ids=lambda part: str(part)[-24:])
def test_an_encoder_or_a_decoder_alone_is_run(tmp_path, source, parts, names, inputs):
    path = _part_of(tmp_path, source, parts, names, inputs)
    rows = verify(path)
    assert {row.name for row in rows} >= set(names)
    assert all(row.passed for row in rows)
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors[names[0]] = tensors[names[0]] * 1.1 + 0.1
    save_file(tensors, path.with_suffix(".safetensors"))
    assert [row.name for row in verify(path) if not row.passed] == [names[0]]


def test_a_part_without_weights_is_named(tmp_path):
    path = _part_of(tmp_path, STAGE1, ["decoder"], ["code_logits", "z"], ["z_q"])
    with pytest.raises(CannotBuild, match="recorded tensors that this version does not compute: z"):
        verify(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_titok_matches_on_a_gpu(dtype):
    misses = [row for row in verify(GOLDEN / "titok_b64_stage1.json", "cuda", dtype) if not row.passed]
    assert not misses, misses


def _copied(folder: Path, case: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        (folder / f"case{suffix}").write_bytes(case.with_suffix(suffix).read_bytes())
    return folder / "case.json"
