"""Values from files become what a dataclass declares, or one line says what is accepted."""

import dataclasses
import json
import math
from typing import Any, Literal

import numpy as np
import pytest

from vistok import configuration


@dataclasses.dataclass(frozen=True)
class Part:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Whole:
    count: int
    share: float = 0.1
    flag: bool = False
    name: str = "a"
    limit: int | None = None
    kind: Literal["vq", "vae"] = "vq"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    levels: tuple[tuple[int, tuple[int, ...]], ...] = ((4, (8, 8)),)
    names: list[str] = dataclasses.field(default_factory=list)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    part: Part = dataclasses.field(default_factory=Part)
    either: int | str = 3
    anything: Any = None


def test_a_configuration_survives_json():
    whole = Whole(
        count=3,
        share=1e-4,
        limit=5,
        sizes=(7,),
        pair=(2, 0.5),
        levels=((2, (4, 4)), (1, ())),
        names=["x"],
        scales={"a.*": 0.1},
        part=Part(2.0),
        either="text",
        anything={"deep": [1]},
    )
    assert configuration.build(Whole, json.loads(json.dumps(dataclasses.asdict(whole)))) == whole


def test_numbers_of_yaml_and_numpy_are_numbers():
    whole = configuration.build(Whole, {"count": np.int64(4), "share": "1e-4", "limit": np.uint8(3)})
    assert whole == Whole(count=4, share=1e-4, limit=3)
    assert type(whole.count) is int
    assert type(configuration.build(Whole, {"count": 1, "share": 1}).share) is float


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("count", "3", "a whole number"),
        ("count", 3.0, "a whole number"),
        ("count", True, "a whole number"),
        ("count", None, "a whole number"),
        ("count", 2**64, "a whole number"),
        pytest.param("count", 10**5000, "a whole number", id="count-huge"),
        ("share", math.nan, "a finite number"),
        ("share", -math.inf, "a finite number"),
        ("share", "much", "a finite number"),
        pytest.param("share", 10**400, "a finite number", id="share-huge"),
        ("share", False, "a finite number"),
        ("flag", 1, "true or false"),
        ("flag", "yes", "true or false"),
        ("name", ["a"], "text"),
        ("limit", [], "a whole number"),
        ("kind", "fsq", "'vq' or 'vae'"),
        ("kind", ["vq"], "'vq' or 'vae'"),
        ("sizes", 3, "a list, each of it a whole number"),
        ("sizes", "12", "a list, each of it a whole number"),
        ("pair", [1, 2.0, 3], r"a list of 2 \(a whole number, a finite number\)"),
        ("levels", [[1]], "a list of 2"),
        ("scales", [], "a mapping"),
        ("part", 3, "a mapping|give a mapping"),
        ("either", [], "a whole number or text"),
    ],
)
def test_values_of_another_type_are_refused_by_field_and_by_what_is_accepted(field, value, accepted):
    with pytest.raises(ValueError, match=rf"^config\.json: {field}.*{accepted}") as caught:
        configuration.build(Whole, {"count": 1, field: value}, "config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_an_item_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"levels\[0\]\[1\]\[1\] is 'x'; it takes a whole number"):
        configuration.build(Whole, {"count": 1, "levels": [[2, [4, "x"]]]})


def test_unknown_keys_name_the_nearest_and_missing_ones_are_named():
    with pytest.raises(ValueError, match=r"unknown key shere \(did you mean share\?\); accepted are count, "):
        configuration.build(Whole, {"count": 1, "shere": 2})
    with pytest.raises(ValueError, match="count must be given"):
        configuration.build(Whole, {})
    with pytest.raises(ValueError, match="give a mapping of Whole's fields"):
        configuration.build(Whole, [1])
    with pytest.raises(ValueError, match=r"x: part: unknown key speed"):
        configuration.build(Whole, {"count": 1, "part": {"speed": 1}}, "x")
