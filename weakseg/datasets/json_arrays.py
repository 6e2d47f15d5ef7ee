"""The elements of a JSON object's arrays one by one, however long the file is: at most one of them is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from weakseg.errors import DatasetError

CHUNK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER = frozenset(",:]} \t\n\r")  # what ends a value; after anything else a number may go on, as 1 in 1.5 and 1e5
_DECODER = json.JSONDecoder()
# The decoder says where a value went wrong; of one that the end of the text cut off that is this near to the end, or
# for a string its start.
_NEAR = 16


class Element(NamedTuple):
    """A value and the bytes [begin, end) of the file that it was read from."""

    begin: int
    end: int
    value: Any


def arrays(read: Callable[[int], bytes]) -> Iterator[tuple[str, Iterator[Element]]]:
    """(key, elements) of each value of an object that is an array; other values are read over.

    Args:
        read: of a binary file at its start. UTF-8, with or without a byte order mark.
    Raises:
        DatasetError: no JSON object. The message says at which byte; the caller adds the file.
    """
    text = _Text(read)
    text.skip_mark()
    text.expect("{")
    for _ in text.items("}"):
        key = text.value().value
        if not isinstance(key, str):
            raise DatasetError(f"expected a name in quotes before byte {text.position}, got {key!r}")
        text.expect(":")
        if text.peek() != "[":
            text.value()
            continue
        text.expect("[")
        elements = (text.value() for _ in text.items("]"))
        yield key, elements
        for _ in elements:  # that the caller did not take
            pass
    if text.peek():
        raise DatasetError(f"expected the end of the file at byte {text.position}, got {text.peek()!r}")


class _Text:
    """A window on the file. As Latin-1, in which a character is a byte, so that positions are those of the file."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._text, self._at = "", 0
        self._begin = 0  # of the window, in the file

    @property
    def position(self) -> int:
        return self._begin + self._at

    def skip_mark(self) -> None:
        while len(self._text) < 3 and self._more():
            pass
        if self._text.startswith("\xef\xbb\xbf"):
            self._at = 3

    def peek(self) -> str:
        """The next character that is no space, empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, marks: str) -> str:
        """Take one of these characters."""
        mark = self.peek()
        if not mark or mark not in marks:
            expected = " or ".join(map(repr, marks))
            raise DatasetError(f"expected {expected} at byte {self.position}, got {mark or 'the end of the file'!r}")
        self._at += 1
        return mark

    def items(self, close: str) -> Iterator[None]:
        """Before each item of an array or object that has been opened; takes the commas and its end."""
        if self.peek() == close:
            self.expect(close)
            return
        yield
        while self.expect(f",{close}") != close:
            yield

    def value(self) -> Element:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                place = self._begin + error.pos
                wrong = error.pos < len(self._text) - _NEAR and not error.msg.startswith("Unterminated")
                if wrong or not self._more():
                    raise DatasetError(f"expected JSON at byte {place}, got: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
                raise DatasetError(f"expected JSON at byte {self.position}, got: {error}") from error
            else:
                if self._text[end : end + 1] in _AFTER or not self._more():
                    return self._taken(end, value)

    def _taken(self, end: int, value: Any) -> Element:
        text = self._text[self._at : end]
        if not text.isascii():
            try:
                value = json.loads(text.encode("latin-1").decode())
            except UnicodeDecodeError as error:
                raise DatasetError(f"expected UTF-8 at byte {self.position + error.start}, got another") from error
        element = Element(self.position, self._begin + end, value)
        self._at = end
        return element

    def _more(self) -> bool:
        """Read on and drop what was taken; whether there was more. What does not fit in a window doubles it."""
        data = self._read(max(CHUNK_BYTES, len(self._text) - self._at))
        self._begin, self._text, self._at = self.position, self._text[self._at :] + data.decode("latin-1"), 0
        return bool(data)
