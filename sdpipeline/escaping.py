"""Escaping functions for terminals, JSON documents, Markdown and spreadsheets."""

from __future__ import annotations

import re

# C0 and C1 controls with the line and paragraph separators; bidirectional controls; invisible tags; halves
# of surrogate pairs. Joiners and no-break spaces are part of words and names and stay.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)
_UNSAFE_IN_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))
_UNSAFE_IN_JSON = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", ""))

# Characters with a meaning in inline Markdown or HTML, with the dots and colons that turn addresses into links.
_MARKUP = re.compile(r"[\\`*\[\]()<>!|~&@$^{}#\"]|(?<![^\W_])_|_(?![^\W_])|(?<=\S)[:](?=\S)|(?<=\w)\.(?=\w)")

_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)*([eE][+-]?\d+)?")


def terminal(text: str) -> str:
    """Escape text to one line that moves no cursor, sets no title and changes no writing direction."""
    return _UNSAFE.sub(_escaped, text)


def terminal_lines(text: str) -> str:
    """Escape as ``terminal`` does, but keep line ends: for a table's cell, whose borders contain them."""
    return _UNSAFE_IN_LINES.sub(_escaped, text)


def json_document(text: str) -> str:
    """Escape a serialised JSON document for terminals too; it stays the same document to a parser."""
    return _UNSAFE_IN_JSON.sub(lambda found: "".join(f"\\u{unit:04x}" for unit in _utf16(found[0])), text)


def markdown(value: object) -> str:
    """Escape text for a line or table cell of a Markdown document, so that it means nothing as Markdown or HTML.

    Numeric references are text in every dialect, even before a table is split at its bars.
    """
    text = "" if value is None else str(value)
    line = _UNSAFE.sub(_escaped, " ".join(text.split()))
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)


def spreadsheet(value: object) -> object:
    """Escape a CSV cell so that no spreadsheet takes it for a formula: prefix an apostrophe."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _utf16(character: str) -> list[int]:
    data = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[n : n + 2], "big") for n in range(0, len(data), 2)]
