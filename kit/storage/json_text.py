"""JSON of any size, value by value, in bounded memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from kit.errors import first_line

CHUNK = 1 << 20  # characters read at once
BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


class JsonText:
    """JSON read from front to back: `at` is the next character's place in `text`, `offset` its byte in the file.

    start: the byte at which the stream stands; most: how many characters a value may have.
    """

    def __init__(self, stream: BinaryIO, start: int, most: int) -> None:
        self.stream = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        self.text, self.at, self.offset, self.ended, self.most = "", 0, start, False, most

    def read_more(self) -> None:
        more = self.stream.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at, self.ended = self.text[self.at :] + more, 0, not more

    def move(self, end: int) -> str:
        piece = self.text[self.at : end]
        self.offset += len(piece.encode("utf-8", "surrogateescape"))
        self.at = end
        return piece

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            self.move(BLANKS.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def take(self, expected: str) -> bool:
        """Go behind the next character if it is the expected one."""
        found = self.peek() == expected
        self.move(self.at + found)
        return found

    def take_value(self) -> tuple[Any, str]:
        """The next value and its text; OSError saying where and why there is none."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    return value, self.move(end)
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.text) - self.at > self.most:
                    self.move(getattr(error, "pos", self.at))
                    reason = getattr(error, "msg", first_line(error)).removesuffix(" starting at")
                    long = "" if self.ended else f", or longer than {self.most >> 20} MB"
                    raise OSError(f"not JSON at byte {self.offset}{long}: {reason}") from None
            self.read_more()

    def take_list(self) -> Iterator[tuple[int, Any, str]]:
        """(byte offset, value, text) of each element of the list that begins here."""
        self.take("[")
        while self.peek() != "]":
            offset = self.offset
            yield offset, *self.take_value()
            if not self.take(","):
                break
        if not self.take("]"):
            raise OSError(f"not JSON at byte {self.offset}: ']' is missing")
