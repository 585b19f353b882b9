"""YAML with positions: plain data only, bounded in size, and every value knows its line and column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdpipeline.errors import CampaignError, Mistake

LARGEST_FILE_BYTES = 4 * 1024 * 1024
MOST_NODES = 200_000
DEEPEST = 40

PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "value", "merge")
}

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """A file's data, and where each key path stands in it (line and column from 1)."""

    file: str
    data: Any
    places: dict[KeyPath, tuple[int, int]]

    def mistake(self, path: KeyPath, message: str, fix: str | None = None) -> Mistake:
        """A mistake at ``path``, or at the nearest enclosing key that the file has."""
        known = path
        while known and known not in self.places:
            known = known[:-1]
        line, column = self.places.get(known, (1, 1))
        return Mistake(file=self.file, line=line, column=column, key=dotted(path), message=message, fix=fix)


def dotted(path: KeyPath) -> str:
    """``("stages", 0, "prompt")`` as ``stages[0].prompt``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def load(path: Path) -> Located:
    """Read one document; raises CampaignError for anything that is not plain, small YAML."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise CampaignError(Mistake(file=str(path), message="is larger than 4 MiB", fix="put the rows in a table"))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CampaignError(Mistake(file=str(path), message=f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise CampaignError(Mistake(file=str(path), message="is not UTF-8 text")) from error
    return parse(text, file=str(path))


def parse(text: str, *, file: str) -> Located:
    """The same for a document at hand."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (None, None)
        message = f"is not YAML: {error.problem}"
        raise CampaignError(Mistake(file=file, line=line, column=column, message=message)) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CampaignError(Mistake(file=file, message=f"is not YAML: {str(error).splitlines()[0]}")) from error
    builder = _Builder(file)
    data = builder.build(node, ()) if node is not None else None
    if builder.mistakes:
        raise CampaignError(*builder.mistakes)
    return Located(file, data, builder.places)


class _Builder:
    """Turns nodes into data, refusing what could run code, repeat a key or grow without bound."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[KeyPath, tuple[int, int]] = {}
        self.mistakes: list[Mistake] = []
        self._nodes = 0
        self._constructor = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        self.places[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if self._nodes > MOST_NODES or len(path) > DEEPEST:
            # Aliases of aliases end here, long before memory does.
            raise CampaignError(self._mistake(node, path, "expands to too many values", "write fewer aliases"))
        if node.tag not in PLAIN_TAGS:
            self.mistakes.append(self._mistake(node, path, f"the tag {_short(node.tag)} is not allowed", "remove it"))
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, n)) for n, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key_node.tag == "tag:yaml.org,2002:merge":
                self.mistakes.append(self._mistake(key_node, path, "keys must be plain words", "use `defaults:`"))
                continue
            if key in data:
                self.mistakes.append(self._mistake(key_node, (*path, key), "is written twice", "keep one of them"))
                continue
            data[key] = self.build(value_node, (*path, key))
            self.places[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        return data

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        if node.tag == "tag:yaml.org,2002:timestamp":
            return node.value
        try:
            return self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError):
            self.mistakes.append(self._mistake(node, path, f"{node.value!r} is not a value", "put it in quotes"))
            return None

    def _mistake(self, node: yaml.Node, path: KeyPath, message: str, fix: str) -> Mistake:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        return Mistake(file=self.file, line=line, column=column, key=dotted(path), message=message, fix=fix)


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")
