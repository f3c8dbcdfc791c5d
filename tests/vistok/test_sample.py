"""`vistok sample`, run for real on a small generator and tokenizer from folders."""

import numpy as np
import pytest
from PIL import Image
from tiny_generators import CASES, filled
from tiny_tokenizers import shared

from vistok import generate
from vistok.models import titok


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a generator that names no tokenizer, and of a tokenizer that decodes its tokens."""
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(titok.SIZES, "tiny", (64, 2, 2))
        tokenizer, (family, config) = shared("titok-vq"), CASES["bert-linear"]
        (codes,) = tokenizer.quantizer.codebook_sizes
        sizes = {"tokenizer": None, "codebook_size": codes, "image_seq_len": tokenizer.num_tokens}
        filled(generate.create(family, **{**config, **sizes})).save_pretrained(root / "generator")
        tokenizer.save_pretrained(root / "tokenizer")
        yield root / "generator", root / "tokenizer"


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def sample(run, folders, out, *arguments):
    generator, tokenizer = folders
    return run("sample", generator, "--tokenizer", tokenizer, "--out", out, *arguments)


def test_pictures_of_classes_are_written_and_depend_on_seed_and_number_alone(run, folders, tmp_path):
    status, _, err = sample(run, folders, "a", "--class", 1, "--class", 3, "--n", 3)
    assert status == 0, err
    first = pictures(tmp_path / "a")
    assert list(first) == [f"class{each:04d}-{number:04d}.png" for each in (1, 3) for number in range(3)]
    size = shared("titok-vq").image_size
    assert {picture.shape for picture in first.values()} == {(size, size, 3)}
    assert len({picture.tobytes() for picture in first.values()}) > 1
    sample(run, folders, "b", "--class", 3, "--class", 1, "--n", 3, "--batch-size", 1)
    again = pictures(tmp_path / "b")
    assert all((again[name] == picture).all() for name, picture in first.items())
    sample(run, folders, "c", "--class", 1, "--class", 3, "--n", 3, "--seed", 1)
    other = pictures(tmp_path / "c")
    assert any((other[name] != picture).any() for name, picture in first.items())


def test_settings_reach_the_generator(run, folders, tmp_path):
    for out, settings in (("likely", ()), ("steps", ("--steps", 1)), ("guided", ("--guidance", 30))):
        status, _, err = sample(run, folders, out, "--class", 2, "--n", 2, "--temperature", 0, *settings)
        assert status == 0, err
    likely, one_step, guided = (pictures(tmp_path / out) for out in ("likely", "steps", "guided"))
    one, two = likely.values()
    assert (one == two).all(), "at temperature 0 nothing is drawn"
    for changed in (one_step, guided):
        assert any((changed[name] != picture).any() for name, picture in likely.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--class", 5), "class 5 does not exist"),
        (("--class", 1, "--temperature", "nan"), "temperature is nan; it takes a finite number"),
        ((), "Missing option '--class'"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(run, folders, tmp_path, arguments, message):
    status, _, err = sample(run, folders, "out", *arguments)
    assert status and message in err
    assert not list(tmp_path.glob("out/*"))


def test_a_generator_without_a_tokenizer_asks_for_one(run, folders):
    status, _, err = run("sample", folders[0], "--class", 1)
    assert status and "does not name the tokenizer of its tokens; give --tokenizer" in err


def test_a_tokenizer_that_does_not_fit_is_refused(run, folders):
    status, _, err = run("sample", folders[0], "--class", 1, "--tokenizer", "vistok-mini")
    assert status and "codebook" in err


def test_pictures_that_are_there_are_kept(run, folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "class0001-0000.png").write_bytes(b"mine")
    status, _, err = sample(run, folders, "out", "--class", 1)
    assert status != 0 and "is there already" in err
    assert (tmp_path / "out" / "class0001-0000.png").read_bytes() == b"mine"
