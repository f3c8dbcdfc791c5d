"""Every recorded case of the originals goes through the same code as `vistok verify`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vistok.eval.parity.case import CannotBuild, fill
from vistok.eval.verify import verify

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*.json"))
SMALL = GOLDEN / "train_step_stage1_s128.json"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_recorded_tensor_is_within_tolerance(path):
    misses = [row for row in verify(path) if not row.passed]
    assert not misses, misses


def test_a_changed_recording_is_a_miss(tmp_path):
    case = _copied(tmp_path, GOLDEN / "preprocess.json")
    tensors = load_file(case.with_suffix(".safetensors"))
    tensors["adm_1"][3, 4, 1] += 1
    save_file(tensors, case.with_suffix(".safetensors"))
    assert [row.name for row in verify(case) if not row.passed] == ["adm_1"]


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
