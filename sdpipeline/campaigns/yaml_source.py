"""YAML loader with positions: plain data only, bounded in size, with line and column of every value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdpipeline.errors import CampaignError, Mistake

LARGEST_FILE_BYTES = 4 * 1024 * 1024
MAX_NODES = 100_000
DEEPEST = 40
LARGEST_INTEGER = 2**63 - 1

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """A file's data and text, the place of each key path (line and column from 1), and its invalid values."""

    file: str
    data: Any
    text: str
    places: Mapping[KeyPath, tuple[int, int]]
    mistakes: tuple[tuple[KeyPath, Mistake], ...] = ()

    def mistake(self, path: KeyPath, message: str, fix: str | None = None) -> Mistake:
        """Return a mistake at ``path``, or at the nearest enclosing key that the file has."""
        known = path
        while known and known not in self.places:
            known = known[:-1]
        line, column = self.places.get(known, (1, 1))
        return Mistake(file=self.file, line=line, column=column, key=dotted(path), message=message, fix=fix)


@dataclass(slots=True)
class Faults:
    """Collector of mistakes. A mistake at or below the place of one from an earlier phase is dropped as a follow-up."""

    source: Located
    mistakes: list[Mistake] = field(default_factory=list)
    _found: set[KeyPath] = field(default_factory=set)
    _settled: set[KeyPath] = field(default_factory=set)

    def __post_init__(self) -> None:
        for path, mistake in self.source.mistakes:
            self.mistakes.append(mistake)
            self._found.add(path)
        self.next_phase()

    def next_phase(self) -> None:
        """Start a phase in which mistakes found so far hide follow-up mistakes."""
        self._settled |= self._found

    def add(self, path: KeyPath, message: str, fix: str | None = None) -> None:
        """Record a mistake at that place."""
        if not self.has(path):
            self.mistakes.append(self.source.mistake(path, message, fix))
            self._found.add(path)

    def hide(self, path: KeyPath) -> None:
        """Suppress mistakes about that place in later phases."""
        self._found.add(path)

    def has(self, path: KeyPath) -> bool:
        """Return True if an earlier phase found a mistake at ``path`` or an enclosing key."""
        return any(path[:n] in self._settled for n in range(len(path) + 1))

    def within(self, path: KeyPath) -> bool:
        """Return True if an earlier phase found a mistake at ``path`` or below it."""
        return any(found[: len(path)] == path for found in self._settled)

    def in_order(self) -> list[Mistake]:
        """Return all mistakes, each once, in the file's order."""
        return sorted(dict.fromkeys(self.mistakes), key=lambda mistake: (mistake.line or 0, mistake.column or 0))


def dotted(path: KeyPath) -> str:
    """Format a key path: ``("stages", 0, "prompt")`` becomes ``stages[0].prompt``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def shown(value: Any) -> str:
    """Format a value from a file for an error message."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "keys with values"
    text = repr(value).removesuffix(".0")
    return text if len(text) <= 60 else text[:57] + "..." + text[-1]


def load(path: Path) -> Located:
    """Read one document; raises CampaignError for anything that is not plain, small YAML."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise CampaignError(Mistake(file=str(path), message=f"cannot be read: {error.strerror}")) from error
    except ValueError as error:
        raise CampaignError(Mistake(file=str(path), message=f"is not a file name: {error}")) from error
    if len(data) > LARGEST_FILE_BYTES:
        raise CampaignError(Mistake(file=str(path), message="is larger than 4 MiB", fix="put the rows in a table"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CampaignError(Mistake(file=str(path), line=line, message="is not UTF-8 text")) from error
    return parse(text, file=str(path))


def parse(text: str, *, file: str) -> Located:
    """Parse one document from its text; raises CampaignError as :func:`load` does."""
    try:
        loader = _Loader(text, file)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        message = f"is not YAML: {', '.join(filter(None, (error.context, error.problem)))}"
        raise CampaignError(Mistake(file=file, line=line, column=column, message=message)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"is not YAML: the character U+{error.character:04X} is not allowed"
        raise CampaignError(Mistake(file=file, line=line, message=message)) from error
    except RecursionError as error:
        raise CampaignError(Mistake(file=file, message="is not YAML: nested too deeply")) from error
    builder = _Builder(file)
    data = builder.build(node, ()) if node is not None else None
    return Located(file, data, text, builder.places, tuple(builder.mistakes))


class _Loader(yaml.SafeLoader):
    """PyYAML's parser, bounded while it reads, with the plain scalars of YAML 1.2.

    In YAML 1.1 ``no`` would be false, ``16:9`` 969 and ``0123`` 83; in a prompt or an article number
    they are words. A number-like value with a leading zero stays text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- replaces PyYAML's own, whose type this is

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self._file = file
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > DEEPEST:
            line, column = _start(self.peek_event())  # type: ignore[no-untyped-call]
            message = "is nested too deeply" if self._depth > DEEPEST else "has too many values"
            raise CampaignError(
                Mistake(file=self._file, line=line, column=column, message=message, fix="put the rows in a table")
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)

_TAG = "tag:yaml.org,2002:"
for _name, _pattern in (("null", _NULL), ("bool", _BOOLEAN), ("int", _INTEGER), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern.pattern})$"), None)

_SCALARS: Mapping[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _TAG + "null": (_NULL, lambda _: None),
    _TAG + "bool": (_BOOLEAN, lambda text: text.lower() == "true"),
    _TAG + "int": (_INTEGER, int),
    _TAG + "float": (_FLOAT, lambda text: float(re.sub(r"\.(?=[iInN])", "", text))),
    _TAG + "str": (re.compile(r"(?s).*"), str),
}

# Tab, line feed and carriage return are text; the rest of C0 and C1, and halves of a surrogate pair, are not.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


# JSON writes characters beyond U+FFFF as two escapes, which PyYAML does not join.
_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def _joined_pair(pair: re.Match[str]) -> str:
    return pair.group().encode("utf-16", "surrogatepass").decode("utf-16")


def control_character(text: str) -> str | None:
    """Return the first character, as ``U+0000``, that no database or picture could store, or None."""
    found = _CONTROL.search(text)
    return f"U+{ord(found.group()):04X}" if found else None


class _Builder:
    """Builder of data from nodes; it refuses tags that could run code, repeated keys and unbounded growth."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[KeyPath, tuple[int, int]] = {}
        self.mistakes: list[tuple[KeyPath, Mistake]] = []
        self._nodes = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        self.places[path] = _start(node)
        if self._nodes > MAX_NODES or len(path) > DEEPEST:
            # Stop nested aliases (billion laughs attack) long before memory runs out.
            self._refuse(node, path, "expands to too many values", "write fewer aliases")
            raise CampaignError(self.mistakes[-1][1])
        match node:
            case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                return [self.build(item, (*path, n)) for n, item in enumerate(node.value)]
            case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                return self._mapping(node, path)
            case yaml.ScalarNode() if node.tag in _SCALARS:
                return self._scalar(node, path)
        self._refuse(node, path, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed here", "remove it")
        return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key == "<<" or control_character(key):
                self._refuse(key_node, path, "a key must be a plain word", "write out what is merged")
                continue
            if key in data:
                self._refuse(key_node, (*path, key), "is written twice", "keep one of them")
                continue
            data[key] = self.build(value_node, (*path, key))
            self.places[(*path, key)] = _start(key_node)
        return data

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        pattern, convert = _SCALARS[node.tag]
        node.value = _SURROGATES.sub(_joined_pair, node.value)
        shown = node.value if len(node.value) <= 40 else node.value[:40] + "..."
        if not pattern.fullmatch(node.value):
            self._refuse(node, path, f"{shown!r} is not a valid {node.tag.removeprefix(_TAG)}", "remove the tag")
            return None
        if character := control_character(node.value):
            self._refuse(node, path, f"holds the character {character}", "remove it")
            return None
        if node.tag == _TAG + "int" and len(node.value) > 20:
            self._refuse(node, path, f"{shown} is too large a number", "put it in quotes if it is a text")
            return None
        value = convert(node.value)
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(node, path, f"{shown} is not a finite number", "write a number")
            return None
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            self._refuse(node, path, f"{shown} is too large a number", "put it in quotes if it is a text")
            return None
        return value

    def _refuse(self, node: yaml.Node, path: KeyPath, message: str, fix: str) -> None:
        line, column = _start(node)
        mistake = Mistake(file=self.file, line=line, column=column, key=dotted(path), message=message, fix=fix)
        self.mistakes.append((path, mistake))


def _start(part: Any) -> tuple[int, int]:
    return part.start_mark.line + 1, part.start_mark.column + 1
