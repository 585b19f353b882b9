"""Headers of safetensors files, and JSON documents beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from sdpipeline.errors import CheckpointError

_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Header:
    """Tensor names with their shapes and safetensors dtypes, and the metadata of one safetensors file."""

    tensors: Mapping[str, list[int]]
    metadata: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)


def read_header(alias: str, path: Path) -> Header:
    """Read a header without the tensors; CheckpointError for a file that is incomplete or damaged.

    safetensors itself checks sizes, dtypes and offsets: https://github.com/safetensors/safetensors#format
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"checkpoint {alias!r}: {path.name} is a Git LFS pointer, not the weights; run `git lfs pull`"
                )
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: list(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: str(each.get_dtype()) for name, each in slices.items()}
            return Header(tensors, file.metadata() or {}, dtypes)
    except OSError as error:
        raise CheckpointError(f"checkpoint {alias!r}: {path.name} cannot be read: {error}") from error
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"checkpoint {alias!r}: {path.name} is not a safetensors file, or is incomplete ({error}); fetch it again"
        ) from error


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
