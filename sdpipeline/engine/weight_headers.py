"""Checks of downloaded files by their first bytes: Git LFS pointers, pages in place of files, truncated weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpipeline.engine.weight_files import WEIGHTS
from sdpipeline.errors import CheckpointError

AGAIN = "download it again"

_POINTERS = (b"version https://git-lfs.github.com/spec/", b"# xet version")
_PAGES = (b"<!doctype html", b"<html")
_SMALL = 4096
"""Bytes of the longest pointer file; a larger file is not one."""
_LONGEST_HEADER = 100_000_000
"""Limit of the safetensors library for a header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Header of a safetensors file: the shapes of its tensors by name, and its metadata."""

    tensors: Mapping[str, Sequence[int]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def check_content(alias: str, directory: Path, name: str) -> None:
    """Raise CheckpointError for a file that is empty, a Git LFS pointer or an HTML page."""
    path = directory / name
    size = path.stat().st_size
    if size == 0 and not name.endswith(".txt"):
        raise CheckpointError(f"checkpoint {alias!r}: {name} is empty; {AGAIN}")
    if size > _SMALL and not name.endswith(WEIGHTS):
        return
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(_POINTERS):
        raise CheckpointError(
            f"checkpoint {alias!r}: {name} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )
    if start.lstrip().lower().startswith(_PAGES):
        raise CheckpointError(
            f"checkpoint {alias!r}: {name} is an HTML page, as a download without login leaves it; "
            f"accept the licence on the repository's page, log in with `hf auth login`, and {AGAIN}"
        )


def read_header(alias: str, directory: Path, name: str) -> Header:
    """Return the header of a safetensors file; CheckpointError if the file is not one, or is truncated."""
    path = directory / name
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LONGEST_HEADER:
            raise _not_safetensors(alias, name)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise _not_safetensors(alias, name)
    if len(text) < length:
        raise _wrong_size(alias, name, size, 8 + length)
    tensors, metadata, end = _entries(alias, name, text)
    if size != 8 + length + end:
        raise _wrong_size(alias, name, size, 8 + length + end)
    return Header(tensors=tensors, metadata=metadata)


def _entries(alias: str, name: str, text: bytes) -> tuple[dict[str, list[int]], dict[str, str], int]:
    try:
        entries: dict[str, Any] = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        tensors = {tensor: [int(side) for side in entry["shape"]] for tensor, entry in entries.items()}
        return tensors, {str(key): str(value) for key, value in metadata.items()}, end
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _not_safetensors(alias, name) from error


def _not_safetensors(alias: str, name: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {alias!r}: {name} is not a safetensors file; {AGAIN}")


def _wrong_size(alias: str, name: str, size: int, expected: int) -> CheckpointError:
    fault = "truncated" if size < expected else "longer than its header says"
    return CheckpointError(f"checkpoint {alias!r}: {name} is {fault}: {size} bytes, not {expected}; {AGAIN}")
