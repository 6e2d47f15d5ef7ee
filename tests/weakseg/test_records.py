from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from weakseg.records import RecordError, from_json, to_json


@dataclass(frozen=True)
class Inner:
    side: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float
    inner: Inner | None
    pair: tuple[int, str]
    many: tuple[Inner, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    either: int | str = 0
    on: bool = False


FULL = Outer("n", 0.5, Inner(3, "b"), (1, "x"), (Inner(1), Inner(2)), {"k": [1, None]}, "text", True)


def test_round_trip():
    assert from_json(Outer, to_json(FULL), "f") == FULL


def test_defaults_and_whole_floats():
    made = from_json(Outer, {"name": "n", "rate": 2, "inner": None, "pair": [1, "x"]}, "f")
    assert made == Outer("n", 2.0, None, (1, "x"))
    assert isinstance(made.rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": 1}, "f: unknown key 'nmae', did you mean 'name'"),
        ({"name": 3}, "f.name must be str, got 3"),
        ({"rate": "0.5"}, "f.rate must be float, got '0.5'"),
        ({"rate": True}, "f.rate must be float, got True"),
        ({"either": True}, "f.either must be str"),
        ({"inner": {"side": 1.5}}, "f.inner.side must be int, got 1.5"),
        ({"inner": {"side": 1, "kind": "c"}}, "f.inner.kind must be 'a' or 'b', got 'c'"),
        ({"inner": {}}, "f.inner: the key 'side' is missing"),
        ({"inner": [1]}, "f.inner must be an object"),
        ({"pair": [1]}, "f.pair must be a list of 2"),
        ({"pair": "ab"}, "f.pair must be a list"),
        ({"many": [{"side": 1}, {"side": None}]}, r"f.many\[1\].side must be int, got None"),
        ({"extra": 1}, "f.extra must be an object"),
        ({"name": None}, "f.name must be str"),
    ],
)
def test_misfits_are_named(change, message):
    with pytest.raises(RecordError, match=message):
        from_json(Outer, to_json(FULL) | change, "f")
