"""Parser of weighted prompts: ``(word:1.3)``, ``(word)``, ``[word]``, ``BREAK`` and escapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from sdpipeline.domain import PromptSyntax

REFERENCE = "AUTOMATIC1111 Original"
"""Name of the reference whose syntax and weights we implement; the record has it."""

ROUND, SQUARE = 1.1, 1 / 1.1
"""Factors of ``(word)`` and ``[word]``."""
MAX_WEIGHT = 5.0
"""Highest weight of a word, with all brackets around it; the lowest is 0."""
MAX_DEPTH = 50
"""Highest number of brackets that are open at once."""
MAX_BREAKS = 63
"""Highest number of ``BREAK`` in a prompt: each one starts a chunk of its own."""

_TOKEN = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:(?=(?P<weight>[^():\[\]\\]*)\))|[^\\()\[\]:]+|:")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_MEANT_AS_NUMBER = re.compile(r"|[-+]?[\d.,]\S*|[-+]?(?:nan|inf|infinity)", re.IGNORECASE | re.ASCII)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_SYNTAX = re.compile(r"[()\[\]\\]|BREAK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Text of one weight, without its brackets."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """Part of a prompt that is allowed but probably not meant: its kind, and its first character's index."""

    kind: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedPrompt:
    """Parsed prompt: sections separated by ``BREAK``, each with its parts in order."""

    sections: tuple[tuple[Part, ...], ...]
    doubts: tuple[Doubt, ...] = ()

    @property
    def text(self) -> str:
        """The words without syntax; a ``BREAK`` is a space."""
        return " ".join("".join(part.text for part in section) for section in self.sections)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each part, in order."""
        return tuple(part.weight for section in self.sections for part in section)


class WeightRefusedError(ValueError):
    """A weight is not valid; the message has its place in the prompt."""


def read(text: str, syntax: PromptSyntax) -> WeightedPrompt:
    """Read a prompt in that syntax; raises WeightRefusedError for a weight that is not valid."""
    return parse(text) if syntax == "weighted" else _plain(text)


def parse(text: str) -> WeightedPrompt:
    r"""Parse a weighted prompt.

    ``(word:1.3)`` multiplies the weight by 1.3, ``(word)`` by 1.1, ``[word]`` by 1 / 1.1; brackets nest. ``BREAK``
    starts another section. ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` are the characters themselves. A bracket that
    is not closed ends with the prompt. The grammar is that of ``parse_prompt_attention`` in
    ``modules/prompt_parser.py`` of AUTOMATIC1111/stable-diffusion-webui, with two differences: ``BREAK`` also works
    inside brackets (there it becomes a word), and what cannot be a sensible weight is refused (there it is text).

    Raises WeightRefusedError for a weight that is not a number from 0 to ``MAX_WEIGHT``, and for more than
    ``MAX_DEPTH`` open brackets or ``MAX_BREAKS`` breaks.
    """
    if not _SYNTAX.search(text):
        return _plain(text)
    return _Parser(text).parsed()


@dataclass(slots=True)
class _Piece:
    """Text with its weight so far; a ``BREAK`` has no text."""

    text: str | None
    position: int
    weight: float = 1.0


@dataclass(slots=True)
class _Parser:
    """State of one parse. Brackets multiply the pieces since they were opened; round and square ones are separate."""

    text: str
    pieces: list[_Piece] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    open: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"(": [], "[": []})

    def parsed(self) -> WeightedPrompt:
        position = 0
        while found := _TOKEN.match(self.text, position):
            position = self._take(found)
        for bracket, factor in (("(", ROUND), ("[", SQUARE)):
            while self.open[bracket]:
                self.doubts.append(Doubt(kind="unbalanced", position=self.open[bracket][-1][1]))
                self._close(bracket, factor)
        self._check()
        sections = tuple(tuple(_merged(section)) for section in _split(self.pieces))
        return WeightedPrompt(sections=sections, doubts=tuple(sorted(self.doubts, key=lambda doubt: doubt.position)))

    def _take(self, found: re.Match[str]) -> int:
        """Process one mark or text; return the position after it."""
        mark, start, end = found[0], found.start(), found.end()
        if mark in self.open:
            self._open(mark, start)
        elif mark == ")" and self.open["("]:
            self._close("(", ROUND)
        elif mark == "]" and self.open["["]:
            self._close("[", SQUARE)
        elif found["weight"] is not None and self.open["("] and (weight := self._weight(found)) is not None:
            self._close("(", weight)
            end = found.end("weight") + 1
        elif mark.startswith("\\"):
            self.pieces.append(_Piece(mark[1:], start))
        else:
            if mark in (")", "]"):
                self.doubts.append(Doubt(kind="unbalanced", position=start))
            self._add(mark, start)
        return end

    def _open(self, bracket: str, position: int) -> None:
        if sum(map(len, self.open.values())) >= MAX_DEPTH:
            raise _refused(self.text, position, f"more than {MAX_DEPTH} brackets are open")
        self.open[bracket].append((len(self.pieces), position))

    def _close(self, bracket: str, factor: float) -> None:
        first, _ = self.open[bracket].pop()
        for piece in self.pieces[first:]:
            piece.weight *= factor

    def _weight(self, found: re.Match[str]) -> float | None:
        """Return the number between a colon and its bracket; ``None`` for words, which are text."""
        written, position = found["weight"].strip(), found.start()
        if _NUMBER.fullmatch(written) and 0 <= float(written) <= MAX_WEIGHT:
            return float(written)
        if _MEANT_AS_NUMBER.fullmatch(written):
            what = f"{written[:20]!r} is not a weight" if written else "no weight follows the colon"
            raise _refused(self.text, position, f"{what}; a weight is a number from 0 to {MAX_WEIGHT:g}")
        self.doubts.append(Doubt(kind="not-a-weight", position=position))
        return None

    def _add(self, text: str, position: int) -> None:
        for n, words in enumerate(_BREAK.split(text)):
            if n:
                self.pieces.append(_Piece(None, position))
            self.pieces.append(_Piece(words, position))

    def _check(self) -> None:
        """Refuse words whose brackets multiply to a weight that is too high, and too many breaks."""
        for piece in self.pieces:
            if piece.text and piece.weight > MAX_WEIGHT:
                what = f"the brackets multiply to a weight of {piece.weight:.4g}"
                raise _refused(self.text, piece.position, f"{what}; the highest weight is {MAX_WEIGHT:g}")
        if sum(piece.text is None for piece in self.pieces) > MAX_BREAKS:
            raise WeightRefusedError(f"has more than {MAX_BREAKS} BREAK")


def _plain(text: str) -> WeightedPrompt:
    return WeightedPrompt(sections=((Part(text=text),),))


def _refused(text: str, position: int, why: str) -> WeightRefusedError:
    """Return an error that quotes the surroundings of a position; characters count from 1."""
    start, end = max(0, position - 20), position + 20
    quoted = ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
    return WeightRefusedError(f"at character {position + 1}, in {quoted!r}: {why}")


def _split(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    section: list[_Piece] = []
    for piece in pieces:
        if piece.text is None:
            yield section
            section = []
        else:
            section.append(piece)
    yield section


def _merged(section: list[_Piece]) -> Iterator[Part]:
    """Join neighbours of one weight, so that brackets without effect do not split a word into two tokens."""
    text, weight = "", 1.0
    for piece in section:
        if piece.weight != weight and text:
            yield Part(text=text, weight=weight)
            text = ""
        text, weight = text + (piece.text or ""), piece.weight
    if text:
        yield Part(text=text, weight=weight)
