"""Escapers, one for each place that text is shown in: terminals, JSON documents, Markdown and spreadsheets."""

from __future__ import annotations

import re

# C0 and C1 controls with the line and paragraph separators; controls of the writing direction; invisible tags; halves
# of surrogate pairs. Joiners and no-break spaces are part of words and names and stay.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ud800-\udfff]"
)
_UNSAFE_IN_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))
_UNSAFE_IN_JSON = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", ""))

# What Markdown or HTML gives a meaning to inside a line, with the dots and colons that make links of addresses.
_MARKUP = re.compile(r"[\\`*\[\]()<>!|~&@$^{}#\"]|(?<![^\W_])_|_(?![^\W_])|(?<=\S)[:](?=\S)|(?<=\w)\.(?=\w)")

_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)*([eE][+-]?\d+)?")


def terminal(text: str) -> str:
    """One line that moves no cursor, sets no title and turns no writing direction."""
    return _UNSAFE.sub(_escaped, text)


def terminal_lines(text: str) -> str:
    """As ``terminal``, but line ends stay: for a cell of a table, whose borders hold them."""
    return _UNSAFE_IN_LINES.sub(_escaped, text)


def json_document(text: str) -> str:
    """A serialised JSON document that is safe on a terminal too; the same document to a parser."""
    return _UNSAFE_IN_JSON.sub(lambda found: "".join(f"\\u{unit:04x}" for unit in _utf16(found[0])), text)


def markdown(value: object) -> str:
    """Text inside a line or a table's cell of a Markdown document, with no meaning as Markdown or HTML.

    Numeric references are text in every dialect, also before a table is split at its bars.
    """
    text = "" if value is None else str(value)
    line = _UNSAFE.sub(_escaped, " ".join(text.split()))
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)


def spreadsheet(value: object) -> object:
    """A cell of a CSV file that no spreadsheet takes for a formula: an apostrophe comes before what looks like one."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _utf16(character: str) -> list[int]:
    data = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[n : n + 2], "big") for n in range(0, len(data), 2)]
