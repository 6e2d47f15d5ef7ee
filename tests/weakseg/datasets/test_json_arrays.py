import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakseg.datasets import json_arrays
from weakseg.datasets.json_arrays import arrays
from weakseg.errors import DatasetError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def found_in(data: bytes, chunk: int) -> dict[str, list[object]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "CHUNK_BYTES", chunk)
        out = {}
        for key, elements in arrays(io.BytesIO(data).read):
            out[key] = []
            for element in elements:
                assert json.loads(data[element.begin : element.end].decode()) == element.value
                out[key].append(element.value)
        return out


@given(
    content=st.dictionaries(st.text(), values | st.lists(values), max_size=4),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_what_json_loads_finds_wherever_reading_is_cut(content, chunk, ascii_only, indent, mark) -> None:
    text = json.dumps(content, ensure_ascii=ascii_only, indent=indent)
    data = mark + text.encode("utf-8", "surrogatepass") + b"\n "
    expected = {key: value for key, value in content.items() if isinstance(value, list)}
    assert found_in(data, chunk) == expected


def test_elements_that_nobody_takes_are_read_over() -> None:
    data = b'{"a": [1, [2], {"b": 3}], "c": {"a": [7]}, "d": [4]}'
    got = [(key, list(elements)[:1] if key == "d" else None) for key, elements in arrays(io.BytesIO(data).read)]
    assert got == [("a", None), ("d", [(49, 50, 4)])]


def test_a_long_array_is_read_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "CHUNK_BYTES", 100)
    source = io.BytesIO(b'{"a": [' + b'{"x": 12345},' * 1000 + b'"' + b"y" * 350 + b'"]}')
    asked = []

    def read(n_bytes: int) -> bytes:
        asked.append(n_bytes)
        return source.read(n_bytes)

    ((_, n_elements),) = [(key, sum(1 for _ in elements)) for key, elements in arrays(read)]
    assert n_elements == 1001
    assert set(asked[:130]) == {100} and max(asked) < 400, "more only for the long text at the end"


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected '{' at byte 0, got 'the end of the file'"),
        ("[]", r"expected '{' at byte 0, got '\['"),
        ('{"a" 1}', "expected ':' at byte 5, got '1'"),
        ('{"a": [1, 2', "expected ',' or ']' at byte 11"),
        ('{"a": [1 2]}', "expected ',' or ']' at byte 9, got '2'"),
        ('{"a": [1,]}', "expected JSON at byte 9, got: Expecting value"),
        ('{"a": [tru]}', "expected JSON at byte 7, got: Expecting value"),
        ('{"a": ["x]}', "expected JSON at byte 7, got: Unterminated string"),
        ('{"a": [1]} {', "expected the end of the file at byte 11, got '{'"),
        ("{1: []}", "expected a name in quotes before byte 2, got 1"),
        (f'{{"a": [{"[" * 100_000}', "expected JSON at byte 7, got: maximum recursion depth"),
        (f'{{"a": [{"1" * 5000}]}}', "expected JSON at byte 7, got: Exceeds the limit"),
    ],
)
def test_what_is_wrong_is_said_with_its_byte(text: str, message: str, chunk: int) -> None:
    with pytest.raises(DatasetError, match=message):
        found_in(text.encode(), chunk)


def test_a_wrong_value_does_not_make_it_read_to_the_end() -> None:
    asked = []
    parts = iter([b'{"a": [{"b" 1}, ' + b" " * 100])

    def read(n_bytes: int) -> bytes:
        asked.append(n_bytes)
        return next(parts, b"")

    with pytest.raises(DatasetError, match="expected JSON at byte 12, got: Expecting ':' delimiter"):
        [list(elements) for _, elements in arrays(read)]
    assert len(asked) == 1


def test_text_that_is_not_utf8() -> None:
    with pytest.raises(DatasetError, match="expected UTF-8 at byte 8"):
        found_in(b'{"a": ["\xff"]}', 100)
