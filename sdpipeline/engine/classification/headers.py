"""Headers of safetensors files, and JSON documents next to them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from sdpipeline.errors import CheckpointError

AGAIN = "download it again"
POINTERS = (b"version https://git-lfs.github.com/spec/", b"# xet version")
"""Beginnings of the small files that stand for large ones in a repository."""

_LONGEST = 100_000_000
"""Limit of the safetensors library for a header, in bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """Tensor names with their shapes and safetensors dtypes, and the metadata of one safetensors file."""

    tensors: Mapping[str, list[int]]
    metadata: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)


def read_header(alias: str, path: Path, *, name: str | None = None) -> Header:
    """Read a header without the tensors; CheckpointError for a file that is truncated, damaged or no safetensors file.

    ``name`` is the file's name in messages; default: that of ``path``. safetensors itself checks dtypes, offsets and
    duplicate names: https://github.com/safetensors/safetensors#format
    """
    where = f"checkpoint {alias!r}: {name or path.name}"
    try:
        text, size = _header_text(where, path)
        found, end = _entries(text)
        if size != 8 + len(text) + end:
            raise _wrong_size(where, size, 8 + len(text) + end)
        with safetensors.safe_open(path, framework="numpy"):
            return found
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    except (safetensors.SafetensorError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a safetensors file, or is damaged ({error}); {AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _not_safetensors(where) from error


def _header_text(where: str, path: Path) -> tuple[bytes, int]:
    """Return the JSON text of a header, and the file's size in bytes."""
    with path.open("rb") as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        if len(start) == 8 and any(pointer.startswith(start) for pointer in POINTERS):
            raise CheckpointError(f"{where} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LONGEST:
            raise _not_safetensors(where)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise _not_safetensors(where)
    if len(text) < length:
        raise _wrong_size(where, size, 8 + length)
    return text, size


def _entries(text: bytes) -> tuple[Header, int]:
    """Return a header, and the length in bytes of the tensors that it describes."""
    entries: dict[str, Any] = json.loads(text)
    metadata = entries.pop("__metadata__", None) or {}
    end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    tensors = {tensor: [int(side) for side in entry["shape"]] for tensor, entry in entries.items()}
    dtypes = {tensor: str(entry["dtype"]) for tensor, entry in entries.items()}
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()}, dtypes), end


def _not_safetensors(where: str) -> CheckpointError:
    return CheckpointError(f"{where} is not a safetensors file; {AGAIN}")


def _wrong_size(where: str, size: int, expected: int) -> CheckpointError:
    fault = "truncated" if size < expected else "longer than its header says"
    return CheckpointError(f"{where} is {fault}: {size} bytes, not {expected}; {AGAIN}")


def header(alias: str, path: Path) -> dict[str, list[int]]:
    """Return the tensors' names and shapes of a safetensors file, from its header alone."""
    return dict(read_header(alias, path).tensors)


def read_json(alias: str, path: Path) -> dict[str, Any]:
    """Return a JSON object; CheckpointError if the file is missing or holds anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.parent.name}/{path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is nested too deeply") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} is not a JSON object")
    return document
